"""Runs the text of a CUDA kernel on the CPU: the threads of a block as fibers that wait for each other.

What is emulated is what this project's kernels use of CUDA: blocks and threads in three dimensions (threads in one),
shared memory, `__syncthreads`, and `__shfl_xor_sync` of whole warps. All floating dtypes are float32 here.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

PRELUDE = r"""
#include <setjmp.h>
#include <ucontext.h>
#include <math.h>
#include <stddef.h>
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
struct Three { int x, y, z; };
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#define __device__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
static Three threadIdx, blockIdx, blockDim, gridDim;
// A context begins a fiber; between fibers one jumps, which calls no kernel of the system's as swapcontext does.
struct Place { jmp_buf of; };
static ucontext_t beginning;
static Place scheduler;
static Place fibers[1024];
static char stacks[1024][1 << 16];
static bool ended[1024];
static float told[1024];
static void (*kernel)();
inline void __syncthreads() {
  if (!_setjmp(fibers[threadIdx.x].of)) _longjmp(scheduler.of, 1);
}
inline float __shfl_xor_sync(unsigned, float value, int step) {
  const int own = threadIdx.x;
  told[own] = value;
  __syncthreads();
  const float other = told[own ^ step];
  __syncthreads();
  return other;
}
inline void thread() {
  kernel();
  ended[threadIdx.x] = true;
  _longjmp(scheduler.of, 1);
}
static void begin(int t) {
  getcontext(&beginning);
  beginning.uc_stack.ss_sp = stacks[t], beginning.uc_stack.ss_size = sizeof stacks[t];
  makecontext(&beginning, thread, 0);
  setcontext(&beginning);
}
static __attribute__((noinline)) void go_on(int t, bool begun) {
  threadIdx = {t, 0, 0};
  if (_setjmp(scheduler.of)) return;
  if (begun) _longjmp(fibers[t].of, 1);
  begin(t);
}
// All threads of a block run up to the same wait before any runs on.
inline void launch(int x, int y, int z, int threads, void (*body)()) {
  kernel = body, blockDim = {threads, 1, 1}, gridDim = {x, y, z};
  for (int block = 0; block < x * y * z; ++block) {
    blockIdx = {block % x, block / x % y, block / (x * y)};
    for (int t = 0; t < threads; ++t) ended[t] = false;
    bool begun = false;
    for (bool any = true; any; begun = true) {
      any = false;
      for (int t = 0; t < threads; ++t) {
        if (ended[t]) continue;
        any = true;
        go_on(t, begun);
      }
    }
  }
}
"""


@pytest.fixture
def cuda_kernels(monkeypatch, tmp_path_factory):
    """Has `mx.fast.cuda_kernel` make kernels that run on the CPU; gives the names of those that ran."""
    if sys.platform == "darwin" or shutil.which("g++") is None:
        pytest.skip("no C++ compiler, or macOS, whose headers refuse fibers")
    from mlx_lm.tuner.preference import cuda_kernel

    folder, ran = tmp_path_factory.getbasetemp(), []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: _Kernel(folder, ran, **options))
    # These kernels are of this test alone.
    monkeypatch.setattr(cuda_kernel, "_made", {})
    return ran


def _place(array):
    """Where the values of a numpy array are."""
    return array.ctypes.data_as(ctypes.c_void_p)


class _Kernel:
    def __init__(self, folder, ran, name, input_names, output_names, source, header=""):
        self.folder, self.ran, self.name = folder, ran, name
        self.names, self.source, self.header = (input_names, output_names), source, header

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes, template=()):
        assert threadgroup[0] <= 1024
        assert all(size % threads == 0 for size, threads in zip(grid, threadgroup, strict=True))
        self.ran.append(self.name)
        arrays = [np.array(x if x.dtype == mx.int32 else x.astype(mx.float32), order="C") for x in inputs]
        outputs = [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        text = self._text([x.dtype for x in arrays], template)
        shapes = [np.array(x.shape, np.int32) for x in arrays]
        given = [value for x, shape in zip(arrays, shapes, strict=True) for value in (_place(x), _place(shape), x.ndim)]
        blocks = [size // threads for size, threads in zip(grid, threadgroup, strict=True)]
        self._library(text).run(*blocks, threadgroup[0], *given, *map(_place, outputs))
        return [mx.array(x).astype(dtype) for x, dtype in zip(outputs, output_dtypes, strict=True)]

    def _text(self, dtypes, template):
        """What compiles to a function `run` of the numbers of blocks, of threads, and of all arrays."""
        inputs, outputs = self.names
        arrays = []
        for name, dtype in zip(inputs, dtypes, strict=True):
            arrays += [f"const {'int' if dtype == np.int32 else 'float'}* {name}", f"const int* {name}_shape"]
            arrays.append(f"int {name}_ndim")
        arrays += [f"float* {name}" for name in outputs]
        constants = [
            f"using {name} = float;" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {int(value)};"
            for name, value in template
        ]
        kept = [f"static {array};" for array in arrays]
        given = [f"{name} = {name}_;" for name in (array.split()[-1] for array in arrays)]
        arguments = ", ".join(["int nx, int ny, int nz, int threads", *(f"{array}_" for array in arrays)])
        return "\n".join(
            [PRELUDE, self.header, *kept, *constants, "static void body() {", self.source, "}"]
            + [f'extern "C" void run({arguments}) {{', *given, "launch(nx, ny, nz, threads, body);", "}"]
        )

    def _library(self, text):
        """The text compiled, once a session."""
        path = self.folder / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            source = path.with_suffix(".cpp")
            source.write_text(text)
            subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", path, source], check=True)
        return ctypes.CDLL(str(path))
