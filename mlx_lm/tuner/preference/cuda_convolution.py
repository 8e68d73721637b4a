"""Convolutions along the tokens of a packed batch on NVIDIA's GPUs, which read them where they stand.

In rows of sequences each takes some twenty kernels a layer: rows are gathered, filled up and cut, and their gradients.
"""

import mlx.core as mx
import numpy as np

from .cuda_kernel import run_kernel

# Threads a block, and bytes that each reads of a token at a time.
THREADS, WORD = 256, 16

CONVOLVE = """
// Adds a token's and its neighbours' multiples by each channel's TAPS numbers, the last one of which is for the token
// itself, to sums of N channels: ROUNDS times TAPS - 1 rows of sources name those 1, 2, ... away, -1 for none.
template <int TAPS, int N, int ROUNDS, typename T>
__device__ void convolve(float (&sums)[N], const T* x, size_t stride, const T* weight, const int* sources, int count,
                         int token) {
  struct alignas(N * sizeof(T)) Word { T values[N]; };
  struct alignas(N * sizeof(T)) Taps { T values[N * TAPS]; };
  const Taps own = *reinterpret_cast<const Taps*>(weight);
  auto add = [&](const Word& found, int tap) {
    for (int i = 0; i < N; ++i) sums[i] += float(own.values[i * TAPS + tap]) * float(found.values[i]);
  };
  auto word_of = [&](int source) { return *reinterpret_cast<const Word*>(x + source * stride); };
  // All that is read at once is waited for once.
  int named[ROUNDS][TAPS - 1];
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
#pragma unroll
    for (int d = 0; d < TAPS - 1; ++d) named[n][d] = sources[(n * (TAPS - 1) + d) * count + token];
  }
  add(word_of(token), TAPS - 1);
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
    int last = -1;
    Word found[TAPS - 1];
#pragma unroll
    for (int d = 0; d < TAPS - 1; ++d) last = max(last, named[n][d]);
    if (last < 0) continue;
#pragma unroll
    for (int d = 0; d < TAPS - 1; ++d) found[d] = word_of(max(named[n][d], 0));
#pragma unroll
    for (int d = 0; d < TAPS - 1; ++d) {
      if (named[n][d] >= 0) add(found[d], TAPS - 2 - d);
    }
  }
}
"""

SOURCE = """
  constexpr int N = WORD / sizeof(T);
  const unsigned count = x_shape[0], words = x_shape[1] / N, at = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned token = at / words, channel = at % words * N;
  if (token >= count) return;
  float sums[N];
  for (int i = 0; i < N; ++i) sums[i] = BIASED ? float(bias[channel + i]) : 0.0f;
  convolve<TAPS, N, ROUNDS>(sums, x + channel, x_shape[1], weight + channel * TAPS, sources, count, token);
  struct alignas(WORD) Word { T values[N]; } found;
  for (int i = 0; i < N; ++i) found.values[i] = static_cast<T>(sums[i]);
  reinterpret_cast<Word*>(out)[at] = found;
"""


def fits(module):
    """Whether a depthwise `Conv1d`, of inputs of its weight's dtype, reads whole words of tokens and is not trained."""
    _, taps, _ = module.weight.shape
    whole = len(module.weight) * module.weight.itemsize % WORD == 0
    return whole and taps > 1 and not module.trainable_parameters()


def neighbours(parts, distance):
    """Which tokens come before and after each token of a packed batch, up to a distance.

    Args:
        parts: the recurrent `Parts` of N tokens.

    Returns:
        `(before, after)`, int32, -1 for none: of `before`, `(distance, N)`, row d has the token d + 1 before; of
        `after`, `(4 * distance, N)`, each fourth has those d + 1 after, which are two after a prompt's.
    """
    earlier, later = (mx.array(x) for x in _places(tuple(part.shape for part in parts.keys), parts.begun(), distance))
    tokens = mx.concatenate([part.reshape(-1) for part in parts.keys])

    def at(array, places):
        return mx.where(places < 0, -1, array[..., mx.maximum(places, 0)])

    before = at(tokens, at(earlier, parts.outputs))
    places = mx.concatenate([at(side, use) for use in parts.uses for side in later])
    after = at(tokens, places)
    # What stands at several places has its output from one of them.
    return before, mx.where(at(parts.outputs, after) == places, after, -1)


def _places(shapes, begun, distance):
    """`(earlier, later)`: for each place of parts of these shapes the one 1, 2, ... before, and up to two after."""
    numbers, start = [], 0
    for rows, length in shapes:
        numbers.append(start + np.arange(rows * length).reshape(rows, length))
        start += rows * length
    earlier, later = np.full((distance, start), -1, np.int32), np.full((2, distance, start), -1, np.int32)
    sequences = [row for part in numbers for row in part]
    if begun:
        first, own = numbers[0], [row for part in numbers[1:] for row in part]
        sequences = [np.concatenate([first[i % len(first)], row]) for i, row in enumerate(own)]
    for i, row in enumerate(sequences):
        side = i // len(numbers[0]) if begun else 0
        for d in range(1, distance + 1):
            earlier[d - 1, row[d:]] = row[:-d]
            later[side, d - 1, row[:-d]] = row[d:]
    if begun:
        # Within what both begin with there is one way on.
        same = later[0] == later[1]
        later[1][same] = -1
    return earlier, later


def convolved(x, weight, before, after, bias=None):
    """A depthwise convolution of tokens `(N, C)` with a weight `(C, TAPS, 1)`, which has no gradient, such as `fits`.

    Args:
        before, after: what `neighbours` gives for TAPS - 1.
        bias: `(C,)`, without a gradient too, or None.
    """

    def run(x, sources, bias):
        # Without one nothing reads what stands in its place.
        inputs = {"x": x, "weight": weight, "sources": sources, "bias": weight if bias is None else bias}
        grid = x.nbytes // WORD, 1, 1
        taps = weight.shape[1]
        template = {"T": x.dtype, "TAPS": taps, "ROUNDS": len(sources) // (taps - 1)}
        template |= {"WORD": WORD, "BIASED": bias is not None}
        outputs = {"out": (x.shape, x.dtype)}
        return run_kernel("convolved", SOURCE, inputs, outputs, grid, THREADS, CONVOLVE, **template)[0]

    @mx.custom_function
    def forward(x):
        return run(x, before, bias)

    @forward.vjp
    def backward(_, slopes, __):
        return run(slopes, after, None)

    return forward(x)
