"""Gated activations on NVIDIA's GPUs, of a gate and an x in one array: neither is copied, and nor is a gradient."""

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
  const Word gates = own[0], xs = own[width];
  const float linear = factors[0], cubic = factors[1];
"""
FORWARD = """
  Word found;
  for (int i = 0; i < N; ++i) {
    const float gate = gates.values[i], inner = gate * (linear + cubic * gate * gate);
    found.values[i] = static_cast<T>(gate / (1.0f + expf(-inner)) * float(xs.values[i]));
  }
  reinterpret_cast<Word*>(out)[at] = found;
"""
BACKWARD = """
  const Word slope = reinterpret_cast<const Word*>(slopes)[at];
  Word of_gate, of_x;
  for (int i = 0; i < N; ++i) {
    const float gate = gates.values[i], squares = gate * gate;
    const float sigmoid = 1.0f / (1.0f + expf(-gate * (linear + cubic * squares)));
    const float through = float(slope.values[i]) * sigmoid, rest = gate * (1.0f - sigmoid);
    of_gate.values[i] =
        static_cast<T>(through * float(xs.values[i]) * (1.0f + rest * (linear + 3.0f * cubic * squares)));
    of_x.values[i] = static_cast<T>(through * gate);
  }
  Word* to = reinterpret_cast<Word*>(out) + size_t(row) * 2 * width + column;
  to[0] = of_gate, to[width] = of_x;
"""


def fit(both):
    """Whether gate and x of a row of `(..., 2 D)` are whole words."""
    return both.shape[-1] * both.itemsize % (2 * WORD) == 0


def gated(both, linear, cubic):
    """gate * sigmoid(linear gate + cubic gate^3) * x, `(..., D)`, computed in float32.

    Args:
        both: gate and x side by side, `(..., 2 D)` such as `fit`.
    """
    factors = mx.array([linear, cubic])

    def run(name, source, both, others, width):
        """A kernel's `(..., width)`, with a thread for each word of gate."""
        words = both.size * both.itemsize // (2 * WORD)
        inputs = {"both": both.reshape(-1, both.shape[-1]), "factors": factors} | others
        outputs, grid = {"out": ((*both.shape[:-1], width), both.dtype)}, (words, 1, 1)
        return run_kernel(name, START + source, inputs, outputs, grid, THREADS, T=both.dtype, WORD=WORD)[0]

    @mx.custom_function
    def forward(both):
        return run("gated", FORWARD, both, {}, both.shape[-1] // 2)

    @forward.vjp
    def backward(both, slopes, _):
        return run("gated_vjp", BACKWARD, both, {"slopes": slopes}, both.shape[-1])

    return forward(both)
