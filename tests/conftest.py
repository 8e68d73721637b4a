"""Tests marked `device` need a GPU; `--run-device` runs them on whatever device there is."""

import os
import sys
from pathlib import Path

# Tests run on all cores already.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if sys.platform == "darwin":
    # Metal keeps what some forty operations in a row took until the last of them is done: here each is handed over by
    # itself, for `one_by_one`.
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "0")
    # The folder for temporary files has a long name there, and messages are cut in their middle.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/tmp")

import mlx_lm  # noqa: F401, I001 (first: it chooses the BLAS that MLX multiplies with)
import mlx.core as mx
import pytest
from kernels_on_cpu import cuda_kernels  # noqa: F401 (a fixture)

from mlx_lm._backend import prepare_for_training

# As a run does, before anything is computed.
prepare_for_training()


# Some tests run the scripts there, which import each other.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))


@pytest.fixture
def uncompiled():
    """Compiling upstream's small functions takes longer than running them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def one_by_one():
    """MLX waits for each operation before the next one, at a limit of no memory: a peak is of what has to be there."""
    usual = mx.set_memory_limit(0)
    yield
    mx.set_memory_limit(usual)


def pytest_addoption(parser):
    parser.addoption("--run-device", action="store_true", help="run tests marked `device` on a CPU, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-device") or mx.default_device() == mx.gpu:
        return
    skip = pytest.mark.skip(reason="needs a GPU; --run-device runs it without")
    for item in items:
        if "device" in item.keywords:
            item.add_marker(skip)
