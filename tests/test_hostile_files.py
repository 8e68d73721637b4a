"""Files that anyone may hand us: whatever is in them, the answer is a value or one sentence, never a traceback.

HYPOTHESIS_EXAMPLES sets how many are drawn of each kind.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_tokenizers import smollm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlx_lm.lora
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.preference.check import check_file, warn_of_unread_keys
from mlx_lm.tuner.preference.curves import plot_metrics
from mlx_lm.tuner.preference.load import (
    _warn_of_scale,
    adopt_loss,
    compared_origin,
    read_adapter_config,
    start_of,
    tell_other_loss,
)
from mlx_lm.tuner.preference.metrics import read_metrics
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import LONGEST_MESSAGE, ConfigError
from mlx_lm.tuner.preference.pairs import PreferenceDataset
from mlx_lm.utils import load_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 60))


def is_one_sentence(error):
    told = str(error)
    return told and len(told) <= LONGEST_MESSAGE and told.isprintable()


def taken(call, *arguments):
    """What a call gives, or None where it refuses with one sentence."""
    try:
        return call(*arguments)
    except ConfigError as error:
        assert is_one_sentence(error), error
        return None


@pytest.fixture(scope="module")
def drawn():
    """What `fuzz.py` draws files from, with what they are read by."""
    fuzz.rows.tokenizer = smollm()
    fuzz.adapters.weights = fuzz.lora_weights(load_model(fuzz.MODEL)[0])
    return fuzz


@pytest.mark.parametrize("kind", ["rows", "configs", "models", "adapters", "metrics", "states"])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(random=st.randoms(use_true_random=True))
def test_files_of_any_content(drawn, kind, random):
    with tempfile.TemporaryDirectory() as folder:
        _, read, name = getattr(drawn, kind)(random, Path(folder))
        assert drawn.outcome(read, name) in ("read", "refused")


def test_the_line_of_a_value_that_is_none_is_told(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("loss_type: dpo\nseed: 2001-99-99\n")
    with pytest.raises(
        ConfigError, match=r"config.yaml:2: the value of seed cannot be read \(month must be in 1..12\)"
    ):
        check_file(file, mlx_lm.lora.yaml_loader)


def test_aliases_of_aliases_are_not_written_out(tmp_path, monkeypatch):
    """Nine values, nine times over for each of nine lines: 0.4 thousand million."""
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)]
    (tmp_path / "config.yaml").write_text("\n".join(lists))
    monkeypatch.setattr("mlx_lm.tuner.preference.check.SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"the value of a\d cannot be read \(it takes more than 0.3 s\)"):
        check_file(tmp_path / "config.yaml", mlx_lm.lora.yaml_loader)


@pytest.mark.parametrize(
    "content, told",
    [
        ("[" * 100_000, "cannot be used"),
        (
            '{"num_layers": 1, "lora_parameters": {"rank": 8, "scale": null, "dropout": 0}}',
            "lora_parameters lacks scale",
        ),
        ('{"num_layers": 1, "lora_parameters": {"rank": "8", "scale": 1, "dropout": 0}}', "rank is '8'"),
    ],
)
def test_an_adapter_configuration_that_cannot_be_used_is_told(tmp_path, content, told):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=told) as refused:
        read_adapter_config(tmp_path)
    assert is_one_sentence(refused.value)


def test_numbers_of_many_digits(tmp_path):
    args = SimpleNamespace(loss_type="dpo", train=True, test=False, data=str(tmp_path / "rows.jsonl"))
    for digits in (400, 5000):
        line = '{"context": "Who?", "response1": "I.", "response2": "You.", "overall_preference": ' + "7" * digits + "}"
        (tmp_path / "rows.jsonl").write_text(line)
        assert taken(load_dataset, args, smollm()) is None


def test_metrics_with_values_that_are_no_numbers_are_drawn(tmp_path):
    lines = [{"iteration": 1, "loss": "x"}, {"iteration": 2, "loss": 0.5}, {"iteration": 3, "loss": [1]}]
    lines += [{"iteration": 4, "loss": 1e308}, {"iteration": 5, "loss": 10**400}, {"iteration": 10**400, "loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert len(read) == 5
    assert plot_metrics(tmp_path, read) is None or (tmp_path / "training.png").is_file()


def test_what_is_told_of_rows_adapters_and_configurations_holds_no_control_characters(tmp_path, capsys):
    clear = "\x1b[2J"
    row = {"prompt": "a", "chosen": [{"role": "assistant", "content": "b", clear: 1}], "rejected": "c", clear + "d": 1}
    told = PreferenceDataset([row], smollm()).layout
    assert told.splitlines()[0].count("[2J") == 2 and "\x1b" not in told
    config = {"num_layers": 1, "lora_parameters": {"rank": 1, "scale": clear, "dropout": 0.0}, "loss_type": "dpo"}
    config |= {"beta": clear, "reference_model": clear}
    scale = {"rank": 1, "scale": 1.0, "dropout": 0.0}
    for name, lora in (("a", config["lora_parameters"]), ("b", scale), ("c", scale)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"lora_parameters": lora}))
    (tmp_path / "c" / "adapter_config.json").write_text(
        json.dumps(config | {"lora_parameters": scale, "reference_model": None})
    )
    _warn_of_scale(tmp_path / "a" / "adapters.safetensors", 1.0)
    loss = preference_loss("dpo")
    tell_other_loss("b", config, loss, 4)
    paths = [str(tmp_path / "b"), str(tmp_path / "c")]
    given = {"train": False, "test": True, "compare": paths, "adapter_path": "b", "reference_model": None}
    args = SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | given | {clear: 1}))
    adopt_loss(args)
    compared_origin(args, loss)
    (tmp_path / clear).touch()
    for start in (tmp_path / clear, clear):
        start_of("c", str(start))
    warn_of_unread_keys(args, set())
    (tmp_path / "config.yaml").write_text('"\\e[2J": 1\n"\\e[2J": 1\n')
    check_file(tmp_path / "config.yaml", mlx_lm.lora.yaml_loader)
    out = "".join(capsys.readouterr())
    assert out.count("[2J") >= 8 and "\x1b" not in out
