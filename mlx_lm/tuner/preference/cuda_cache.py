"""Code of this project's CUDA kernels, kept from run to run, and compiled side by side where there is none.

MLX looks for a kernel's code among what it keeps before it compiles it, whoever wrote the kernel, but keeps only what
it made of its own operations: what is given to it as a text it compiles anew in each process, one after another, and
reads CUDA's C++ library for each. Here NVRTC, which MLX has loaded, compiles the text without that library, and its
code is put where MLX looks for it (its `mlx/backend/cuda/custom_kernel.cpp` and `jit_module.cpp`, 0.32.4). A version of
MLX for which any of that is otherwise finds nothing, and compiles by itself.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from operator import methodcaller
from pathlib import Path

import mlx.core as mx

from .files import replace_files

# What a dtype is in a text, and in a kernel's name.
TYPES = {
    mx.bfloat16: ("__nv_bfloat16", "bfloat16_t"),
    mx.bool_: ("bool", "bool"),
    mx.float16: ("__half", "float16_t"),
    mx.float32: ("float", "float"),
    mx.int32: ("int32_t", "int32_t"),
    mx.uint32: ("uint32_t", "uint32_t"),
}
# What MLX's text begins with, and what these kernels need of it.
BEFORE = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
NEEDED = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INFINITY __int_as_float(0x7f800000)
typedef int int32_t;
typedef unsigned int uint32_t;
namespace cooperative_groups {}
namespace mlx::core::cu {
template <typename T>
struct Dimensions {
  T values[10];
  __device__ T operator[](int i) const { return values[i]; }
};
using Shape = Dimensions<int>;
using Strides = Dimensions<long long>;
}
"""
INSIDE = "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
AFTER = "\n}\n\n} // namespace mlx::core::cu\n"
# What the standard library begins a hash with.
SEED = 0xC70F6907
# Compilations at a time, at most.
MOST_AT_ONCE = 8

_asked, _compiling = set(), []


def keep(name, source, header, inputs, outputs, template):
    """Have the code of a kernel, as `run_kernel` takes it, kept where MLX looks for it, before `all_kept` returns."""
    key = (name, *(x.dtype for x in inputs.values()), *(dtype for _, dtype in outputs.values()), *template.items())
    if key in _asked:
        return
    _asked.add(key)
    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    # A dtype that is no kernel's of ours, a folder that is another user's alone, or a compiler that cannot be had.
    with suppress(KeyError, OSError):
        if folder and _compiler() is not None:
            own, text = text_of(name, source, header, inputs, outputs, template)
            path = Path(folder) / f"{own}_{hash_of(text):x}.ptx"
            text, kept = text.replace(BEFORE, NEEDED), path.with_suffix(".cu")
            if not path.exists() or kept.read_text() != text:
                _compiling.append(_pool().submit(_write, path, f"mlx::core::cu::{own}", text))


def all_kept():
    """Wait for the code of all kernels that `keep` was told of, before they are evaluated: MLX would compile them too.

    Whichever cannot be compiled so is left to it.
    """
    while _compiling:
        # NVRTC refuses it, or a folder cannot be written to: MLX tells of the first, and can do without the second.
        with suppress(OSError):
            _compiling.pop().result()


def text_of(name, source, header, inputs, outputs, template):
    """MLX's name of a kernel, and its text of it."""
    own, constants = f"custom_kernel_{name}", ""
    for constant, value in template.items():
        if isinstance(value, mx.Dtype):
            own += f"_{TYPES[value][1]}"
            constants += f"  using {constant} = {TYPES[value][0]};\n"
        elif isinstance(value, bool):
            own += f"_{'ft'[value]}"
            constants += f"  constexpr bool {constant} = {str(value).lower()};\n"
        else:
            own += f"_{value}"
            constants += f"  constexpr int {constant} = {value};\n"
    arguments = []
    for argument, x in inputs.items():
        arguments.append(f"const {TYPES[x.dtype][0]}* {argument}")
        for suffix, kind in (("_shape", "Shape"), ("_strides", "Strides"), ("_ndim", "int")):
            if x.ndim and argument + suffix in source:
                arguments.append(f"const __grid_constant__ {kind} {argument}{suffix}")
    arguments += [f"{TYPES[dtype][0]}* {argument}" for argument, (_, dtype) in outputs.items()]
    head = f"__global__ void {own}(\n    " + ",\n    ".join(arguments) + ") {\n"
    return own, "".join([BEFORE, header, INSIDE, head, constants, "\n" if constants else "", source, AFTER])


def hash_of(text):
    """C++'s `std::hash` of a text, as MLX's library computes it."""
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    text = text.encode()
    return function(text, len(text), SEED)


@cache
def _pool():
    return ThreadPoolExecutor(min(MOST_AT_ONCE, os.cpu_count() or 1))


@cache
def _compiler():
    """NVRTC as MLX has loaded it, and the options that MLX gives it; None where there is none."""
    maps = Path("/proc/self/maps")
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines()) if maps.exists() else ()
    loaded = sorted({Path(fields[5]) for fields in lines if len(fields) == 6})
    nvrtc = [path for path in loaded if path.name.startswith("libnvrtc.so")]
    if not nvrtc:
        return None
    own, version = Path(mx.__file__).parent, ctypes.c_int()
    packages = own.parent
    # Another program's may be loaded besides.
    library = ctypes.CDLL(str(min(nvrtc, key=lambda path: packages not in path.parents)))
    library.nvrtcVersion(ctypes.byref(version), ctypes.byref(ctypes.c_int()))
    runtime = packages / "nvidia" / ("cuda_runtime" if version.value < 13 else f"cu{version.value}")
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"]
    includes = [own / "include", own / "include" / "cccl", *(Path(home) / "include" for home in [runtime, *homes])]
    architecture = mx.device_info(mx.gpu)["architecture"]
    # As from Hopper on MLX does, for its own instructions.
    architecture += "a" if int(architecture.removeprefix("sm_")) >= 90 else ""
    options = ["--device-as-default-execution-space", f"--gpu-architecture={architecture}"]
    return library, options + [f"--include-path={path}" for path in includes if path.is_dir()]


def _write(path, name, text):
    """Compile a kernel and put its code, names and text where MLX looks for them, the code last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code, lowered = _compiled(text, name)
    contents = {".txt": f"{name}\t{lowered}\n".encode(), ".cu": text.encode(), ".ptx": code}
    replace_files(*((path.with_suffix(end), methodcaller("write", content)) for end, content in contents.items()))


def _compiled(text, name):
    """A text's code for this machine's GPU, and what the kernel of that name is called in it.

    Raises:
        OSError: where NVRTC refuses the text.
    """
    nvrtc, options = _compiler()
    program, lowered, size = ctypes.c_void_p(), ctypes.c_char_p(), ctypes.c_size_t()

    def call(function, *arguments):
        if getattr(nvrtc, f"nvrtc{function}")(*arguments):
            raise OSError(f"NVRTC's {function} failed for {name}")

    call("CreateProgram", ctypes.byref(program), text.encode(), None, 0, None, None)
    try:
        call("AddNameExpression", program, name.encode())
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        call("CompileProgram", program, len(options), given)
        call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
        call("GetCUBINSize", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        call("GetCUBIN", program, code)
        return code.raw, lowered.value.decode()
    finally:
        call("DestroyProgram", ctypes.byref(program))
