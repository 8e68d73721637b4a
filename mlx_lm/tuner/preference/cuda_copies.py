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
// A word of a row of arrays that have so many rows each, one behind the other.
template <typename T, int N>
__device__ unsigned long long word_at(T* const (&arrays)[N], const int (&rows)[N], int row, int words, int column) {
  int i = 0;
  while (i < N - 1 && row >= rows[i]) row -= rows[i++];
  return reinterpret_cast<const unsigned long long*>(arrays[i])[size_t(row) * words + column];
}

// The same of the sum of those rows that `sources` rows of indices name; -1 names none.
template <typename T, int M>
__device__ unsigned long long word_of(const T* const (&arrays)[M], const int (&counts)[M], const int* index, int rows,
                                      int sources, int words, size_t at) {
  const int row = at / words, column = at % words;
  if (sources == 1) return index[row] < 0 ? 0 : word_at(arrays, counts, index[row], words, column);
  constexpr int N = sizeof(unsigned long long) / sizeof(T);
  float sums[N] = {};
  unsigned long long word = 0;
  T* parts = reinterpret_cast<T*>(&word);
  for (int s = 0; s < sources; ++s) {
    const int source = index[size_t(s) * rows + row];
    if (source < 0) continue;
    word = word_at(arrays, counts, source, words, column);
    for (int i = 0; i < N; ++i) sums[i] += float(parts[i]);
  }
  for (int i = 0; i < N; ++i) parts[i] = static_cast<T>(sums[i]);
  return word;
}
"""

ROWS = """
  {
    int words = sizeof(*x_@_0);
    for (int i = 1; i < x_@_0_ndim; ++i) words *= x_@_0_shape[i];
    words /= sizeof(unsigned long long);
    const int rows = index_@_shape[1], counts[] = {COUNTS};
    auto* first = x_@_0;
    decltype(first) arrays[] = {ARRAYS};
    if (at < size_t(rows) * words) {
      reinterpret_cast<unsigned long long*>(out_@)[at] =
          word_of(arrays, counts, index_@, rows, index_@_shape[0], words, at);
      return;
    }
    at -= size_t(rows) * words;
  }
"""


@cache
def _rows_source(count, parts):
    """The text that copies rows of so many arrays, each of which comes in so many parts."""
    names = [f"x_@_{part}" for part in range(parts)]
    text = ROWS.replace("ARRAYS", ", ".join(names)).replace("COUNTS", ", ".join(f"{name}_shape[0]" for name in names))
    place = "  size_t at = blockIdx.x * size_t(blockDim.x) + threadIdx.x;\n"
    return place + "".join(text.replace("@", str(i)) for i in range(count))


def fit(arrays):
    """Whether rows of arrays `(N, ...)` are whole words."""
    return not any(x.nbytes // len(x) % WORD for x in arrays)


def rows_of(arrays, indices):
    """Of each array the sums of the rows that the columns of `(S, M)` int32 name, -1 none: `(M, ...)` each.

    Args:
        arrays: each in as many parts as the others, `(N, ...)`, such as `fit`; its rows are numbered from the first
            part's to the last's.
        indices: one for each.
    """
    inputs, outputs, words = {}, {}, 0
    for i, (parts, index) in enumerate(zip(arrays, indices, strict=True)):
        inputs |= {f"x_{i}_{n}": part for n, part in enumerate(parts)} | {f"index_{i}": index}
        outputs[f"out_{i}"] = (index.shape[1], *parts[0].shape[1:]), parts[0].dtype
        words += index.shape[1] * (parts[0].nbytes // len(parts[0]) // WORD)
    grid, count, parts = (words, 1, 1), len(arrays), len(arrays[0])
    source = _rows_source(count, parts)
    return run_kernel(f"rows_of_{count}_in_{parts}", source, inputs, outputs, grid, THREADS, HEADER)


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
        outputs, count = {"joined": ((int(ends[-1]),), some[0].dtype)}, len(some)
        grid, source = (-(-int(sizes.max()) // 4), count, 1), _joining_source(count)
        vectors += run_kernel(f"joined_{count}", source, inputs, outputs, grid, THREADS, T=some[0].dtype)
    return mx.concatenate(vectors)
