"""Runs the text of a CUDA kernel on the CPU: the threads of a block as fibers that wait for each other.

What is emulated is what this project's kernels use of CUDA: blocks and threads in three dimensions (threads in one),
shared memory, `__syncthreads`, `__shfl_xor_sync` of whole warps, and what `cuda_chunks.INSTRUCTIONS` stands for.
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
#include <stdint.h>
#include <string.h>
#include <vector>
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// As a GPU rounds to them: to the nearest, to the even one of two.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    uint32_t all;
    memcpy(&all, &x, 4);
    bits = x != x ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t all = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &all, 4);
    return x;
  }
};
typedef _Float16 __half;
struct float2 { float x, y; };
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
static char stacks[1024][1 << 17];
static __attribute__((aligned(16))) unsigned char shared[1 << 18];
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
static unsigned given[1024][6];
// The product of 16 x 16 and 16 x 8 numbers of a warp, each lane's as CUDA's `mma.m16n8k16` has them.
template <typename T>
void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const int own = threadIdx.x, warp = own / 32 * 32, group = own % 32 / 4, place = own % 4;
  for (int i = 0; i < 4; ++i) given[own][i] = a[i];
  for (int i = 0; i < 2; ++i) given[own][4 + i] = b[i];
  __syncthreads();
  auto number = [&](int lane, int part, int k) {
    T pair[2];
    memcpy(pair, &given[warp + lane][part], 4);
    return float(pair[k % 2]);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = 2 * place + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2;
      sums[i] += number(row % 8 * 4 + lane, row / 8 + k / 8 * 2, k) * number(column * 4 + lane, 4 + k / 8, k);
    }
  }
  __syncthreads();
}
// What lane 4 g + t has of four matrices: of row g the numbers 2 t and 2 t + 1, or of their columns.
static const uint16_t* lines[1024];
static int misplaced = 0;
template <bool TURNED>
void load_four(unsigned (&to)[4], const void* row) {
  const int own = threadIdx.x, warp = own / 32 * 32, group = own % 32 / 4, place = own % 4 * 2;
  lines[own] = static_cast<const uint16_t*>(row), misplaced += reinterpret_cast<uintptr_t>(row) % 16 != 0;
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const* matrix = lines + warp + 8 * i;
    to[i] = TURNED ? matrix[place][group] | matrix[place + 1][group] << 16
                   : matrix[group][place] | matrix[group][place + 1] << 16;
  }
  __syncthreads();
}
// Copies are made as late as may be: when they are waited for.
struct Copy { void* to; const void* from; };
static std::vector<std::vector<Copy>> copies[1024];
inline void copy(void* to, const void* from) {
  if (copies[threadIdx.x].empty()) copies[threadIdx.x].emplace_back();
  copies[threadIdx.x].back().push_back({to, from});
}
inline void begun() { copies[threadIdx.x].emplace_back(); }
template <int LATER = 0>
void landed() {
  auto& own = copies[threadIdx.x];
  for (; own.size() > LATER + 1; own.erase(own.begin())) {
    for (auto& one : own.front()) memcpy(one.to, one.from, 16);
  }
  __syncthreads();
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
// How many bytes of shared memory from there on were written, and matrices' rows read that are not at whole words.
inline int beyond(size_t size) {
  int count = 0;
  for (size_t i = size; i < sizeof shared; ++i) count += shared[i] != 0xff;
  return count + misplaced;
}
// All threads of a block run up to the same wait before any runs on; the last one first if `backwards`.
inline void launch(int x, int y, int z, int threads, bool backwards, void (*body)()) {
  kernel = body, blockDim = {threads, 1, 1}, gridDim = {x, y, z};
  for (int block = 0; block < x * y * z; ++block) {
    blockIdx = {block % x, block / x % y, block / (x * y)};
    memset(shared, 0xff, sizeof shared);
    for (int t = 0; t < threads; ++t) ended[t] = false, copies[t].clear();
    bool begun = false;
    for (bool any = true; any; begun = true) {
      any = false;
      for (int i = 0; i < threads; ++i) {
        const int t = backwards ? threads - 1 - i : i;
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
    from mlx_lm.tuner.preference import cuda_chunks, cuda_kernel

    folder, ran = tmp_path_factory.getbasetemp(), []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: _Kernel(folder, ran, **options))
    monkeypatch.setattr(cuda_chunks, "INSTRUCTIONS", "")
    # These kernels are of this test alone.
    monkeypatch.setattr(cuda_kernel, "_made", {})
    return ran


def _place(array):
    """Where the values of a numpy array are."""
    return array.ctypes.data_as(ctypes.c_void_p)


# Of 16 bits, which numpy has no name for.
HALF = (mx.bfloat16, mx.float16)
# A word that is read where none begins ends the process, as it would on a GPU.
ALIGNED = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
COMPILER = ["g++", "-std=c++20", "-O1", "-w", "-fPIC", *ALIGNED]
DYNAMIC = "extern __shared__ __align__(16) unsigned char shared[];"


class _Kernel:
    def __init__(self, folder, ran, name, input_names, output_names, source, header="", shared_memory=0, **_):
        self.folder, self.ran, self.name, self.shared_memory = folder, ran, name, shared_memory
        self.names, self.source, self.header = (input_names, output_names), source.replace(DYNAMIC, ""), header

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes, template=()):
        assert threadgroup[0] <= 1024
        assert all(size % threads == 0 for size, threads in zip(grid, threadgroup, strict=True))
        self.ran.append(self.name)
        arrays = [np.array(x.view(mx.uint16) if x.dtype in HALF else x, order="C") for x in inputs]
        text = self._text([x.dtype for x in inputs], output_dtypes, template)
        shapes = [np.array(x.shape, np.int32) for x in arrays]
        strides = [np.array(x.strides, np.int64) // x.itemsize for x in arrays]
        given = []
        for x, shape, own in zip(arrays, shapes, strides, strict=True):
            given += [_place(x), _place(shape), _place(own), x.ndim]
        blocks = [size // threads for size, threads in zip(grid, threadgroup, strict=True)]
        # In either order threads find what others have written, or they did not wait for it.
        first, second = (
            self._run(text, blocks, threadgroup[0], backwards, given, output_shapes, output_dtypes)
            for backwards in (False, True)
        )
        for one, other in zip(first, second, strict=True):
            one, other = (np.array(x.astype(mx.float32)) for x in (one, other))
            assert np.array_equal(one, other, equal_nan=True), "threads do not wait for each other"
        return first

    def _run(self, text, blocks, threads, backwards, given, shapes, dtypes):
        """What the kernel writes."""
        # Not a number, in each of the types.
        outputs = [
            np.full(shape, 0x7FFF if dtype in HALF else np.nan, np.uint16 if dtype in HALF else np.float32)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        kept = self._library(text).run(*blocks, threads, backwards, *given, *map(_place, outputs))
        assert kept, "more shared memory is written than was asked for, or a matrix begins within a word"
        found = zip(map(mx.array, outputs), dtypes, strict=True)
        return [x.view(dtype) if dtype in HALF else x for x, dtype in found]

    def _text(self, dtypes, output_dtypes, template):
        """What compiles to a function `run` of the numbers of blocks, of threads, and of all arrays."""
        from mlx_lm.tuner.preference.cuda_cache import TYPES

        inputs, outputs = self.names
        arrays = []
        for name, dtype in zip(inputs, dtypes, strict=True):
            arrays += [f"const {TYPES[dtype][0]}* {name}", f"const int* {name}_shape", f"const long* {name}_strides"]
            arrays.append(f"int {name}_ndim")
        arrays += [f"{TYPES[dtype][0]}* {name}" for name, dtype in zip(outputs, output_dtypes, strict=True)]
        constants = [
            f"using {name} = {TYPES[value][0]};"
            if isinstance(value, mx.Dtype)
            else f"constexpr int {name} = {int(value)};"
            for name, value in template
        ]
        kept = [f"static {array};" for array in arrays]
        given = [f"{name} = {name}_;" for name in (array.split()[-1] for array in arrays)]
        arguments = ", ".join(
            ["int nx, int ny, int nz, int threads, int backwards", *(f"{array}_" for array in arrays)]
        )
        return "\n".join(
            ['#include "prelude.h"', self.header, *kept, *constants, "static void body() {", self.source, "}"]
            + [f'extern "C" int run({arguments}) {{', *given, "launch(nx, ny, nz, threads, backwards, body);"]
            + [f"return beyond({self.shared_memory}) == 0;", "}"]
        )

    def _library(self, text):
        """The text compiled, once a session."""
        path = self.folder / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            prelude, source = self.folder / "prelude.h", path.with_suffix(".cpp")
            if not prelude.exists():
                # Compiled once, which is a third of a kernel's time.
                prelude.write_text(PRELUDE)
                subprocess.run([*COMPILER, "-x", "c++-header", prelude], check=True)
            source.write_text(text)
            subprocess.run([*COMPILER, "-shared", "-o", path, source], check=True)
        return ctypes.CDLL(str(path))
