"""silu(gate) * x on NVIDIA's GPUs, where both are parts of one array: neither is copied, and nor is a gradient."""

import mlx.core as mx

from .cuda_kernel import run_kernel

# Threads a block, and bytes that each reads of gate and x, and writes, at a time.
THREADS, WORD = 256, 16

START = """
  constexpr int N = WORD / sizeof(T);
  const unsigned width = both_shape[1] / 2 / N, at = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned row = at / width, column = at % width;
  if (row >= both_shape[0]) return;
  struct alignas(WORD) Word { T values[N]; };
  const Word* own = reinterpret_cast<const Word*>(both) + size_t(row) * 2 * width + column;
  const Word gate = own[0], x = own[width];
"""
FORWARD = """
  Word found;
  for (int i = 0; i < N; ++i) {
    const float value = gate.values[i];
    found.values[i] = static_cast<T>(value / (1.0f + expf(-value)) * float(x.values[i]));
  }
  reinterpret_cast<Word*>(out)[at] = found;
"""
BACKWARD = """
  const Word slope = reinterpret_cast<const Word*>(slopes)[at];
  Word of_gate, of_x;
  for (int i = 0; i < N; ++i) {
    const float value = gate.values[i], sigmoid = 1.0f / (1.0f + expf(-value));
    const float through = float(slope.values[i]) * sigmoid;
    of_gate.values[i] = static_cast<T>(through * float(x.values[i]) * (1.0f + value * (1.0f - sigmoid)));
    of_x.values[i] = static_cast<T>(through * value);
  }
  Word* to = reinterpret_cast<Word*>(out) + size_t(row) * 2 * width + column;
  to[0] = of_gate, to[width] = of_x;
"""


def fit(both):
    """Whether gate and x of a row of `(..., 2 D)` are whole words."""
    return both.shape[-1] * both.itemsize % (2 * WORD) == 0


@mx.custom_function
def swiglu_of(both):
    """silu(gate) * x, `(..., D)`, of gate and x side by side, `(..., 2 D)` such as `fit`; computed in float32."""
    return _run("swiglu", START + FORWARD, both, {}, both.shape[-1] // 2)


@swiglu_of.vjp
def _swiglu_of_vjp(both, slopes, _):
    return _run("swiglu_vjp", START + BACKWARD, both, {"slopes": slopes}, both.shape[-1])


def _run(name, source, both, others, width):
    """A kernel's `(..., width)`, with a thread for each word of gate."""
    words = both.size * both.itemsize // (2 * WORD)
    inputs = {"both": both.reshape(-1, both.shape[-1])} | others
    outputs, grid = {"out": ((*both.shape[:-1], width), both.dtype)}, (-(-words // THREADS) * THREADS, 1, 1)
    return run_kernel(name, source, inputs, outputs, grid, THREADS, T=both.dtype, WORD=WORD)[0]
