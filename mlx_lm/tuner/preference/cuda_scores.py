"""Attention of heads for which NVIDIA's GPUs have no fused kernel in MLX: wider than 128, or of float32.

MLX computes it of some thirty kernels with their gradients, which masks, scales and copies are most of. Here products
of matrices are all but two of nine: one makes weights of scores, and one the gradients of scores of those of weights.
Query heads that have one key head are rows of one product, whose gradients need no sum.
"""

import mlx.core as mx

from .cpu_attention import blocks_of, in_blocks
from .cuda_kernel import SUM_OF, run_kernel

# Threads a block, bytes that each reads of a row, a warp's, at a time, and a multiple of which blocks of queries begin.
THREADS, WORD, WHOLE = 256, 16, 8

START = (
    """
  struct alignas(N * sizeof(T)) Word { T values[N]; };
  const unsigned lane = threadIdx.x % 32;
  const size_t row = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int width = x_shape[3], words = width / N;
  if (row >= size_t(x_shape[0]) * x_shape[1] * x_shape[2]) return;
  const Word* own = reinterpret_cast<const Word*>(x) + row * words;
  Word* to = reinterpret_cast<Word*>(out) + row * words;
"""
    + SUM_OF
)

# A row's query is the number of so many keys, and sees those up to its own, of which so many at most.
WEIGHTS = (
    START
    + """
  const int queries = numbers[0], number = numbers[1] + row % queries;
  const int end = CAUSAL ? min(number + 1, width) : width, first = CAUSAL ? max(0, end - numbers[2]) : 0;
  auto seen = [&](int at) { return at >= first && at < end; };
  float most = -INFINITY, sum = 0.0f;
  for (int word = first / N + lane; word * N < end; word += 32) {
    const Word found = own[word];
    for (int i = 0; i < N; ++i) {
      if (seen(word * N + i)) most = fmaxf(most, float(found.values[i]));
    }
  }
  for (int apart = 16; apart; apart /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
  for (int word = first / N + lane; word * N < end; word += 32) {
    const Word found = own[word];
    for (int i = 0; i < N; ++i) {
      if (seen(word * N + i)) sum += expf(*scale * (float(found.values[i]) - most));
    }
  }
  const float share = 1.0f / sum_of(sum);
  for (int word = lane; word < words; word += 32) {
    Word found = own[word];
    for (int i = 0; i < N; ++i) {
      const float weight = seen(word * N + i) ? share * expf(*scale * (float(found.values[i]) - most)) : 0.0f;
      found.values[i] = static_cast<T>(weight);
    }
    to[word] = found;
  }
"""
)

SLOPES = (
    START
    + """
  const Word* through = reinterpret_cast<const Word*>(slopes) + row * words;
  float sum = 0.0f;
  for (int word = lane; word < words; word += 32) {
    const Word weights = own[word], found = through[word];
    for (int i = 0; i < N; ++i) sum += float(weights.values[i]) * float(found.values[i]);
  }
  sum = sum_of(sum);
  for (int word = lane; word < words; word += 32) {
    const Word weights = own[word];
    Word found = through[word];
    for (int i = 0; i < N; ++i) {
      found.values[i] = static_cast<T>(*scale * float(weights.values[i]) * (float(found.values[i]) - sum));
    }
    to[word] = found;
  }
"""
)


def scored_attention(queries, keys, values, scale, causal, window=None, most_scores=2**25, keeps=True):
    """Attention whose scores are an array.

    Args:
        queries, keys, values: `(B, H, Q, D)`, `(B, H / R, T, D)` and `(B, H / R, T, Dv)` of one dtype; read without a
            copy where they lie so. The queries are the last Q of the keys.
        scale: of the scores.
        causal: whether a query sees the keys up to its own alone.
        window: of these, how many, its own the last; None for all.
        most_scores: that a block of queries has at most.
        keeps: whether the weights of one block are kept for the gradients, and not computed again.

    Returns:
        `(B, H, Q, Dv)`.
    """
    if queries.dtype == mx.float16:
        # Its scores could be too large before they are scaled.
        queries, scale = queries * scale, 1.0
    factor, spans = mx.array([scale], mx.float32), blocks_of(queries, keys, most_scores, 1, WHOLE)
    keeps = keeps and len(spans) == 1
    rows = (len(queries), keys.shape[1], -1)

    def run(name, source, x, others, **more):
        vector = WORD // x.itemsize
        template = {"T": x.dtype, "N": vector if x.shape[3] % vector == 0 else 1} | more
        grid = x.size // x.shape[3] * 32, 1, 1
        inputs = {"x": x, "scale": factor} | others
        return run_kernel(f"scores_{name}", source, inputs, {"out": (x.shape, x.dtype)}, grid, THREADS, **template)[0]

    def weights_of(queries, keys, before):
        scores = queries.reshape(*rows, queries.shape[3]) @ keys.swapaxes(2, 3)
        numbers = mx.array([queries.shape[2], before, window or 2**30], mx.int32)
        return run("weights", WEIGHTS, scores, {"numbers": numbers}, CAUSAL=causal)

    def block(queries, keys, values, before):
        weights = weights_of(queries, keys, before)
        out = (weights @ values).reshape(*queries.shape[:3], -1)
        return [out, weights.reshape(*queries.shape[:3], -1)] if keeps else [out]

    def gradient(queries, keys, values, before, slope, _, *kept):
        weights = kept[0].reshape(*rows, keys.shape[2]) if kept else weights_of(queries, keys, before)
        slope, own = (x.reshape(*rows, x.shape[3]) for x in (slope, queries))
        of_scores = run("slopes", SLOPES, weights, {"slopes": slope @ values.swapaxes(2, 3)})
        of_queries = (of_scores @ keys).reshape(queries.shape)
        return of_queries, of_scores.swapaxes(2, 3) @ own, weights.swapaxes(2, 3) @ slope

    return in_blocks(queries, keys, values, spans, causal, block, gradient, window=window)
