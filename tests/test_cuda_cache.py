"""Code of kernels kept where MLX looks for it: their names and texts, and what is written when."""

import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_lm._backend import _is_whole
from mlx_lm.tuner.preference import cuda_cache
from mlx_lm.tuner.preference.cuda_cache import all_kept, hash_of, keep, text_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's and its C++ library's place")

INPUTS = {"x": mx.zeros((4, 2), mx.bfloat16), "places": mx.zeros(3, mx.int32), "eps": mx.array(1.0)}
OUTPUTS = {"out": ((4,), mx.float32), "sums": ((4,), mx.float16)}
KERNEL = "made", "  out[0] = x_shape[1] + places_strides[0] + eps_ndim;", "// before\n", INPUTS, OUTPUTS
TEMPLATE = {"T": mx.bfloat16, "N": 4, "B": True, "C": False}
# What MLX 0.32.4 makes of it: an array without dimensions has no shape.
NAME = "custom_kernel_made_bfloat16_t_4_t_f"
TEXT = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// before
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_made_bfloat16_t_4_t_f(
    const __nv_bfloat16* x,
    const __grid_constant__ Shape x_shape,
    const int32_t* places,
    const __grid_constant__ Strides places_strides,
    const float* eps,
    float* out,
    __half* sums) {
  using T = __nv_bfloat16;
  constexpr int N = 4;
  constexpr bool B = true;
  constexpr bool C = false;

  out[0] = x_shape[1] + places_strides[0] + eps_ndim;
}

} // namespace mlx::core::cu
"""


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A folder in which code is kept, and the names of kernels that were compiled."""
    names = []

    def compile_text(text, name):
        names.append(name)
        if "refused" in text:
            raise OSError("NVRTC refuses it")
        return b"code", f"_Z{name}"

    monkeypatch.setattr(cuda_cache, "_compiler", lambda: (None, []))
    monkeypatch.setattr(cuda_cache, "_compiled", compile_text)
    monkeypatch.setattr(cuda_cache, "_asked", set())
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept", names


def test_a_kernels_name_and_text_are_mlxs():
    assert text_of(*KERNEL, TEMPLATE) == (NAME, TEXT)
    own, text = text_of(*KERNEL, {})
    assert own == "custom_kernel_made" and "sums) {\n  out[0]" in text


@pytest.mark.parametrize("text", ["", "a", "eight by", "of nine b", TEXT])
def test_the_hash_is_the_one_of_cs_library(text):
    """MurmurHash64A of Austin Appleby, which libstdc++ has for 64 bits."""
    factor, whole, code = 0xC6A4A7935BD1E995, 2**64, text.encode()
    value = cuda_cache.SEED ^ len(code) * factor % whole
    for at in range(0, len(code), 8):
        word = int.from_bytes(code[at : at + 8], "little")
        if at + 8 <= len(code):
            word = word * factor % whole
            word = (word ^ word >> 47) * factor % whole
        value = (value ^ word) * factor % whole
    value = (value ^ value >> 47) * factor % whole
    assert hash_of(text) == value ^ value >> 47


def test_code_is_compiled_once_for_all_runs(compiled, monkeypatch):
    folder, names = compiled
    for _ in range(2):
        keep(*KERNEL, TEMPLATE)
        keep(*KERNEL, TEMPLATE | {"N": 8})
        all_kept()
        # As in another process.
        monkeypatch.setattr(cuda_cache, "_asked", set())
    assert sorted(names) == [f"mlx::core::cu::{NAME}", f"mlx::core::cu::{NAME.replace('4', '8')}"]
    path = folder / f"{NAME}_{hash_of(TEXT):x}.ptx"
    assert (
        path.read_bytes() == b"code"
        and path.with_suffix(".cu").read_text() == cuda_cache.NEEDED + TEXT.split("groups.h>\n\n")[1]
        and _is_whole(path)
    )
    assert path.with_suffix(".txt").read_text() == f"mlx::core::cu::{NAME}\t_Zmlx::core::cu::{NAME}\n"
    assert len(list(folder.iterdir())) == 6


def test_what_cannot_be_compiled_or_named_is_left_to_mlx(compiled):
    folder, names = compiled
    keep("one", "refused", *KERNEL[2:], {})
    keep("two", *KERNEL[1:3], {"x": mx.zeros(1, mx.int64)}, OUTPUTS, {})
    keep("three", *KERNEL[1:], {})
    all_kept()
    assert len(names) == 2 and [path.stem[:19] for path in folder.glob("*.ptx")] == ["custom_kernel_three"]


def test_another_text_of_one_name_replaces_what_is_kept(compiled, monkeypatch):
    folder, names = compiled
    for text in (cuda_cache.NEEDED, "// other", "// other"):
        monkeypatch.setattr(cuda_cache, "NEEDED", text)
        monkeypatch.setattr(cuda_cache, "_asked", set())
        keep(*KERNEL, TEMPLATE)
        all_kept()
    assert len(names) == 2 and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("owner, failing", [(cuda_cache.Path, "exists"), (os, "replace"), (cuda_cache.Path, "mkdir")])
def test_a_folder_of_another_users_ends_nothing_and_is_left_as_it_is(compiled, owner, failing, monkeypatch):
    folder, _ = compiled

    def refuse(*_, **__):
        raise PermissionError("another user's")

    monkeypatch.setattr(owner, failing, refuse)
    keep(*KERNEL, TEMPLATE)
    all_kept()
    monkeypatch.undo()
    assert not list(folder.glob("*"))


STUB = 'extern "C" int nvrtcVersion(int* major, int* minor) { return *major = 12, *minor = 0; }'
LOADED = """
import ctypes, sys
import mlx.core as mx
from mlx_lm.tuner.preference import cuda_cache
assert cuda_cache._compiler() is None
cuda_cache._compiler.cache_clear()
mx.__file__, *libraries = sys.argv[1:]
for path in libraries: ctypes.CDLL(path)
mx.device_info = lambda device: {"architecture": "sm_90"}
library, options = cuda_cache._compiler()
print(library._name, *options, sep="\\n")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_compiler_is_the_one_that_stands_beside_mlx(tmp_path):
    """With its headers, in a folder whose name has a blank."""
    packages = tmp_path / "my packages"
    for place in ("mlx/include/cccl", "nvidia/cuda_runtime/include", "nvidia/cu13/include"):
        (packages / place).mkdir(parents=True)
    libraries = [folder / "libnvrtc.so.12" for folder in (tmp_path, packages / "nvidia")]
    for path in libraries:
        subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", path], input=STUB, text=True, check=True)
    script = [sys.executable, "-c", LOADED, packages / "mlx" / "core.so", *libraries]
    environment = os.environ | {"CUDA_HOME": str(tmp_path)}
    out = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    includes = "mlx/include", "mlx/include/cccl", "nvidia/cuda_runtime/include"
    expected = ["--device-as-default-execution-space", "--gpu-architecture=sm_90a"]
    assert out == [str(libraries[1]), *expected, *(f"--include-path={packages / place}" for place in includes)]


def test_without_a_folder_or_a_compiler_nothing_is_kept(compiled, monkeypatch):
    folder, names = compiled
    monkeypatch.setattr(cuda_cache, "_compiler", lambda: None)
    keep(*KERNEL, TEMPLATE)
    monkeypatch.setattr(cuda_cache, "_compiler", lambda: (None, []))
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    keep(*KERNEL, {})
    all_kept()
    assert not names and not folder.exists()
