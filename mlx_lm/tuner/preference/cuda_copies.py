"""Many small copies in one kernel, on NVIDIA's GPUs: a host takes longer to launch one than a GPU does to copy."""

from functools import cache

import mlx.core as mx
import numpy as np

from .cuda_kernel import run_kernel

# Threads a block, and bytes that each copies at a time.
THREADS, WORD = 256, 8
# Arrays that one kernel may read: CUDA's bound is 4 KB of arguments.
MOST_ARRAYS = 480

HEADER = """
// A word of a row of the sum of those rows of x that `sources` rows of indices name; -1 names none.
template <typename T>
__device__ unsigned long long word_of(const T* x, const int* index, int rows, int sources, int words, size_t at) {
  const int row = at / words;
  const size_t column = at % words;
  const unsigned long long* from = reinterpret_cast<const unsigned long long*>(x);
  if (sources == 1) return index[row] < 0 ? 0 : from[size_t(index[row]) * words + column];
  constexpr int N = sizeof(unsigned long long) / sizeof(T);
  float sums[N] = {};
  unsigned long long word = 0;
  T* parts = reinterpret_cast<T*>(&word);
  for (int s = 0; s < sources; ++s) {
    const int source = index[size_t(s) * rows + row];
    if (source < 0) continue;
    word = from[size_t(source) * words + column];
    for (int i = 0; i < N; ++i) sums[i] += float(parts[i]);
  }
  for (int i = 0; i < N; ++i) parts[i] = static_cast<T>(sums[i]);
  return word;
}
"""

ROWS = """
  {
    int words = sizeof(*x_@);
    for (int i = 1; i < x_@_ndim; ++i) words *= x_@_shape[i];
    words /= sizeof(unsigned long long);
    const int rows = index_@_shape[1];
    if (at < size_t(rows) * words) {
      reinterpret_cast<unsigned long long*>(out_@)[at] = word_of(x_@, index_@, rows, index_@_shape[0], words, at);
      return;
    }
    at -= size_t(rows) * words;
  }
"""


@cache
def _rows_source(count):
    """The text that copies rows of so many arrays."""
    place = "  size_t at = blockIdx.x * size_t(blockDim.x) + threadIdx.x;\n"
    return place + "".join(ROWS.replace("@", str(i)) for i in range(count))


def fit(arrays):
    """Whether rows of arrays `(N, ...)` are whole words."""
    return not any(x.nbytes // len(x) % WORD for x in arrays)


def rows_of(arrays, indices):
    """Of each `(N, ...)` the sums of the rows that the columns of `(S, M)` int32 name, -1 none: `(M, ...)` each.

    Args:
        arrays: such as `fit`.
        indices: one for each.
    """
    inputs, outputs, words = {}, {}, 0
    for i, (x, index) in enumerate(zip(arrays, indices, strict=True)):
        inputs[f"x_{i}"], inputs[f"index_{i}"] = x, index
        outputs[f"out_{i}"] = (index.shape[1], *x.shape[1:]), x.dtype
        words += index.shape[1] * (x.nbytes // len(x) // WORD)
    grid, count = (-(-words // THREADS) * THREADS, 1, 1), len(arrays)
    return run_kernel(f"rows_of_{count}", _rows_source(count), inputs, outputs, grid, THREADS, HEADER)


JOINED = """
  const T* from;
  switch (blockIdx.y) {
CASES
  }
  const int start = places[blockIdx.y], size = places[gridDim.y + blockIdx.y], end = places[2 * gridDim.y + blockIdx.y];
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; start + i < end; i += gridDim.x * blockDim.x) {
    joined[start + i] = i < size ? from[i] : T(0);
  }
"""


@cache
def _joining_source(count):
    """The text that joins so many arrays."""
    cases = [f"    case {i}: from = part_{i}; break;" for i in range(count - 1)]
    return JOINED.replace("CASES", "\n".join([*cases, f"    default: from = part_{count - 1};"]))


def joined(arrays, aligned):
    """A vector of the values of arrays of one dtype, each array's from a multiple of `aligned` on, zeros between.

    Args:
        arrays: less than 2^31 values together.
    """
    vectors = []
    for first in range(0, len(arrays), MOST_ARRAYS):
        some = arrays[first : first + MOST_ARRAYS]
        sizes = np.array([x.size for x in some], np.int32)
        ends = np.cumsum(sizes + -sizes % aligned, dtype=np.int32)
        starts = np.append(0, ends[:-1]).astype(np.int32)
        inputs = {f"part_{i}": x for i, x in enumerate(some)}
        inputs["places"] = mx.array(np.stack([starts, sizes, ends]))
        vectors += run_kernel(
            f"joined_{len(some)}",
            _joining_source(len(some)),
            inputs,
            outputs={"joined": ((int(ends[-1]),), some[0].dtype)},
            grid=(-(-int(sizes.max()) // (4 * THREADS)) * THREADS, len(some), 1),
            threads=THREADS,
            T=some[0].dtype,
        )
    return mx.concatenate(vectors)
