"""What MLX reads before it starts: a fast BLAS on Linux CPUs, and CUDA's settings for preference runs alone."""

import itertools
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

import mlx_lm.lora
from mlx_lm import _backend
from mlx_lm._backend import CUDA_SETTINGS, prepare_for_training
from mlx_lm.tuner.preference.options import ConfigError


def test_other_systems_and_gpus_are_left_alone(monkeypatch):
    assert _backend._installed("mlx") and not _backend._installed("no-such-package")
    # Whether a fast BLAS is loaded here is not looked at.
    monkeypatch.setattr(_backend, "open", None, raising=False)
    monkeypatch.setattr(_backend.sys, "platform", "darwin")
    assert not _backend.is_linux_cpu() and _backend.slow_blas_hint() is None
    monkeypatch.setattr(_backend.sys, "platform", "linux")
    monkeypatch.setattr(_backend, "_installed", lambda package: package == "mlx-cuda-13")
    assert not _backend.is_linux_cpu() and _backend.slow_blas_hint() is None


def test_a_library_that_is_there_is_loaded_globally_and_once_mlx_is_there_nothing(monkeypatch):
    loaded = []

    def load(name, mode):
        if name == _backend.LIBRARIES[0]:
            raise OSError("no such library")
        loaded.append((name, mode))

    monkeypatch.setattr(_backend.ctypes, "CDLL", load)
    monkeypatch.setattr(_backend, "is_linux_cpu", lambda: True)
    assert _backend.load_fast_blas() is None and not loaded  # MLX is loaded in this process
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert _backend.load_fast_blas() == _backend.LIBRARIES[1]
    assert loaded == [(_backend.LIBRARIES[1], _backend.ctypes.RTLD_GLOBAL)]


@pytest.mark.parametrize(
    "hosts, given, threads",
    [
        ([["127.0.0.1:5000"], ["127.0.0.1:5001"]], {}, 4),
        ([["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.2:5001"]], {}, None),  # the first is alone on its machine
        ([["127.0.0.1:5000"]] * 20, {}, 1),
        ([["127.0.0.1:5000"]] * 2, {"OMP_NUM_THREADS": "3"}, None),
        ("not JSON", {}, None),
        ([[5]], {}, None),
        (None, {}, None),
    ],
)
def test_workers_of_one_machine_share_its_cores(hosts, given, threads, monkeypatch, tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    environment = {"MLX_RANK": "0", **given} | ({} if hosts is None else {"MLX_HOSTFILE": str(file)})
    monkeypatch.setattr(_backend.os, "environ", environment)
    monkeypatch.setattr(_backend.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)  # macOS has none
    told = []
    library = SimpleNamespace(openblas_set_num_threads=told.append)
    monkeypatch.setattr(_backend.ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr(_backend, "is_linux_cpu", lambda: True)
    monkeypatch.delitem(sys.modules, "mlx.core")
    _backend.load_fast_blas()
    assert told == ([] if threads is None else [threads])


def test_the_hint_names_the_remedy_exactly_where_no_library_was_loaded():
    code = "import mlx_lm; from mlx_lm import _backend; print(_backend.slow_blas_hint())"
    code += "; print(any(name in open('/proc/self/maps').read() for name in ('libopenblas', 'libmkl_rt')))"
    if not _backend.is_linux_cpu():
        return
    told, found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[:2]
    assert (told == "None") == (found == "True")
    assert found == "True" or "libopenblas0-pthread" in told


@pytest.mark.parametrize("place", _backend.NVIDIA)
def test_a_gpu_that_the_cpu_package_leaves_idle_is_told_of(place, monkeypatch):
    monkeypatch.setattr(_backend.os.path, "exists", lambda path: path == place)
    for on_cpu in (True, False):
        monkeypatch.setattr(_backend, "is_linux_cpu", lambda on_cpu=on_cpu: on_cpu)
        assert _backend.idle_gpu_hint() == (_backend.IDLE_GPU if on_cpu else None)
    monkeypatch.setattr(_backend.os.path, "exists", lambda _: False)
    monkeypatch.setattr(_backend, "is_linux_cpu", lambda: True)
    assert _backend.idle_gpu_hint() is None


def test_a_program_that_imports_mlx_first_is_told():
    if not _backend.is_linux_cpu():
        return
    code = "import mlx.core; from mlx_lm import _backend; print(_backend.slow_blas_hint())"
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone).stdout
    assert "import mlx_lm before mlx" in told


@pytest.fixture
def cuda_settings_unset(monkeypatch):
    for name in CUDA_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is taken back after the test
        monkeypatch.delenv(name)


def test_a_cuda_setting_that_is_set_already_stays(cuda_settings_unset, monkeypatch):
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    prepare_for_training()
    assert {name: os.environ[name] for name in CUDA_SETTINGS} == CUDA_SETTINGS | {"MLX_USE_CUDA_GRAPHS": "1"}


def test_the_c_library_of_a_linux_cpu_is_told_to_keep_memory(cuda_settings_unset, monkeypatch):
    told = []
    monkeypatch.setattr(_backend.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *given: told.append(given)))
    for linux_cpu in (False, True):
        monkeypatch.setattr(_backend, "is_linux_cpu", lambda linux_cpu=linux_cpu: linux_cpu)
        prepare_for_training()
        assert told == ([(-1, 2**31 - 1), (-3, 2**31 - 1)] if linux_cpu else [])
    # Another C library has no such function.
    monkeypatch.setattr(_backend.ctypes, "CDLL", lambda _: SimpleNamespace())
    prepare_for_training()


def test_kernels_that_a_killed_run_left_half_written_are_compiled_again(monkeypatch, tmp_path):
    """MLX writes a CUDA kernel's code, names and source in this order, and reads the code and the names."""
    monkeypatch.setattr(_backend, "_has_cuda", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {})
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    long_name = tmp_path / ("x" * 200)
    long_name.mkdir()
    for place, ends in (
        (tmp_path / "whole", (".ptx", ".txt", ".cu")),
        (tmp_path / "without_source", (".ptx", ".txt")),
        (tmp_path / "without_names", (".ptx", ".cu")),
        (tmp_path / "code_alone", (".ptx",)),
        (long_name / "rest", (".ptx",)),
    ):
        for end in ends:
            place.with_suffix(end).write_text("text")
    (tmp_path / "no_room.ptx").write_text("text")
    (tmp_path / "no_room.cu").write_text("")
    # ELFs with a table of two entries of 56 bytes, and one of three of 64, one of them from byte 72 on and one behind.
    for name, starts, size in (
        ("whole_code", (264, 72), 376),
        ("segments_cut", (264, 72), 375),
        ("sections_cut", (72, 184), 375),
        ("header_cut", (264, 72), 63),
        ("beginning", (264, 72), 3),
        ("empty", (264, 72), 0),
    ):
        header = b"\x7fELF" + bytes(28) + struct.pack("<QQ", *starts) + bytes(6) + struct.pack("<HHHH", 56, 2, 64, 3)
        (tmp_path / f"{name}.ptx").write_bytes(header.ljust(size, b"\0")[:size])
        for end in (".txt", ".cu"):
            (tmp_path / name).with_suffix(end).write_text("text")

    def refuse(*_, **__):
        raise PermissionError("another user's")

    with monkeypatch.context() as patch:
        patch.setattr(_backend.Path, "unlink", refuse)
        prepare_for_training()
    assert len([*tmp_path.rglob("*.ptx")]) == 12
    prepare_for_training()
    assert {path.name for path in tmp_path.rglob("*.ptx")} == {"whole.ptx", "whole_code.ptx"}


@pytest.mark.parametrize("given", [True, False])
def test_each_worker_and_each_kind_of_gpu_keeps_kernels_of_its_own(given, monkeypatch, tmp_path):
    monkeypatch.setattr(_backend, "_has_cuda", lambda: True)
    monkeypatch.setattr(_backend.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(_backend.os, "getuid", lambda: 1003, raising=False)
    own = tmp_path / "own"
    folder = own if given else tmp_path / "mlx_lm_1003" / mx.__version__
    for rank, kind in itertools.product(("0", "3"), ("sm_86", "sm_120")):
        monkeypatch.setenv("MLX_RANK", rank)
        monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(own) if given else "")
        monkeypatch.setattr(mx, "device_info", lambda _, kind=kind: {"architecture": kind})
        for _ in range(2):
            prepare_for_training()
            assert os.environ["MLX_PTX_CACHE_DIR"] == str(folder / kind / ("worker_3" if rank == "3" else ""))


@pytest.mark.parametrize(
    "info, told",
    [
        ({}, "finds no GPU: it needs NVIDIA's driver, .* 580 or later for cuda13"),
        (("Tesla V100", 7, 0), "Tesla V100, has compute capability 7.0, and MLX's CUDA packages have kernels for 7.5"),
        (("Tesla T4", 7, 5), None),
        (("NVIDIA GB10", 12, 1), None),
    ],
)
def test_a_gpu_that_mlx_cannot_compute_on_is_told_before_anything_is_loaded(
    info, told, cuda_settings_unset, monkeypatch
):
    def refuse(_):
        raise ConfigError("checked")

    names = "device_name", "compute_capability_major", "compute_capability_minor"
    monkeypatch.setattr(mx, "device_info", lambda *_: dict(zip(names, info, strict=False)))
    monkeypatch.setattr(mlx_lm.lora, "on_cuda", lambda: True)
    monkeypatch.setattr(mlx_lm.lora, "check_config", refuse)
    with pytest.raises(ConfigError, match=told or "^checked$"):
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, "loss_type": "dpo"}))


@pytest.mark.parametrize("loss_type", ["dpo", "sft"])
def test_only_a_preference_run_changes_cuda_settings(loss_type, cuda_settings_unset, tmp_path):
    options = {"model": str(tmp_path / "none"), "data": str(tmp_path), "train": True, "loss_type": loss_type}
    with pytest.raises((ConfigError, OSError, ValueError)):
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **options}))
    assert [name in os.environ for name in CUDA_SETTINGS] == [loss_type == "dpo"] * len(CUDA_SETTINGS)


def test_cuda_settings_are_there_before_a_configuration_is_checked(cuda_settings_unset, monkeypatch):
    """Checks of a schedule and of an optimizer compute, and MLX reads the settings at its first computation."""

    def check(args):
        assert all(name in os.environ for name in CUDA_SETTINGS)
        raise ConfigError("checked")

    monkeypatch.setattr(mlx_lm.lora, "check_config", check)
    with pytest.raises(ConfigError, match="checked"):
        mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, "loss_type": "dpo"}))
