"""A fast BLAS is loaded before MLX on Linux CPUs, and nowhere else."""

import os
import subprocess
import sys
from ctypes.util import find_library

from mlx_lm import _blas


def test_other_systems_and_gpus_are_left_alone(monkeypatch):
    monkeypatch.setattr(_blas.sys, "platform", "darwin")
    assert not _blas.concerns_this_machine() and _blas.hint() is None
    monkeypatch.setattr(_blas.sys, "platform", "linux")
    monkeypatch.setattr(_blas, "_installed", lambda package: package == "mlx-cuda-13")
    assert not _blas.concerns_this_machine() and _blas.hint() is None


def test_a_library_that_is_there_is_loaded_globally_and_once_mlx_is_there_nothing(monkeypatch):
    loaded = []

    def load(name, mode):
        if name == _blas.LIBRARIES[0]:
            raise OSError("no such library")
        loaded.append((name, mode))

    monkeypatch.setattr(_blas.ctypes, "CDLL", load)
    monkeypatch.setattr(_blas, "concerns_this_machine", lambda: True)
    assert _blas.load_fast_blas() is None and not loaded  # MLX is loaded in this process
    monkeypatch.delitem(sys.modules, "mlx.core")
    assert _blas.load_fast_blas() == _blas.LIBRARIES[1]
    assert loaded == [(_blas.LIBRARIES[1], _blas.ctypes.RTLD_GLOBAL)]


def test_the_hint_names_the_remedy_exactly_where_no_library_was_loaded():
    code = "import mlx_lm; from mlx_lm import _blas; print(_blas.hint())"
    code += "; print(any(name in open('/proc/self/maps').read() for name in ('libopenblas', 'libmkl_rt')))"
    if not _blas.concerns_this_machine():
        return
    told, found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[:2]
    assert (told == "None") == (found == "True")
    assert found == "True" or "libopenblas0-pthread" in told


def test_a_program_that_imports_mlx_first_is_told():
    if not _blas.concerns_this_machine():
        return
    code = "import mlx.core; from mlx_lm import _blas; print(_blas.hint())"
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone).stdout
    library = find_library("openblas") or find_library("mkl_rt")
    assert (f"LD_PRELOAD={library}" if library else "libopenblas0-pthread") in told
