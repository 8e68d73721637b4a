"""Settings of MLX's CUDA backend, made for preference runs alone."""

import os
from types import SimpleNamespace

import pytest

import mlx_lm.lora
from mlx_lm._cuda import SETTINGS, suit_training
from mlx_lm.tuner.preference.options import ConfigError


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)


def test_what_is_set_already_stays(monkeypatch):
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    suit_training()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS | {"MLX_USE_CUDA_GRAPHS": "1"}


@pytest.mark.parametrize("loss_type", ["dpo", "sft"])
def test_only_a_preference_run_changes_them(loss_type, tmp_path):
    options = {"model": str(tmp_path / "none"), "data": str(tmp_path), "train": True, "loss_type": loss_type}
    with pytest.raises((ConfigError, OSError, ValueError)):
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **options}))
    assert [name in os.environ for name in SETTINGS] == [loss_type == "dpo"] * len(SETTINGS)
