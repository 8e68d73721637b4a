"""Norms of a gated delta layer's heads on NVIDIA's GPUs: of queries and keys at once, and of what a gate multiplies.

Inputs are read where they lie in a wider array, which MLX would copy, and one kernel does for what MLX takes several.
"""

from functools import partial

import mlx.core as mx

from .cuda_kernel import SUM_OF, run_kernel

# Threads a block; a row of a head is a warp's.
THREADS = 256

# For a row whose D numbers a warp has, N a lane.
REDUCE = (
    SUM_OF
    + """
  // 1 over the root of the mean of squares, and the gradient through that of a row's multiples of it.
  auto inverse_of = [&](const float (&x)[N], float eps) {
    float squares = 0.0f;
    for (int i = 0; i < N; ++i) squares += x[i] * x[i];
    return rsqrtf(sum_of(squares) / D + eps);
  };
  auto through = [&](float (&slopes)[N], const float (&x)[N], float inverse) {
    float products = 0.0f;
    for (int i = 0; i < N; ++i) products += slopes[i] * x[i];
    const float back = sum_of(products) / D * inverse * inverse;
    for (int i = 0; i < N; ++i) slopes[i] = inverse * (slopes[i] - back * x[i]);
  };
"""
)

START = (
    """
  constexpr int N = D / 32;
  const unsigned lane = threadIdx.x % 32;
  const size_t row = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int tokens = x_0_shape[0], heads = x_0_shape[2];
  // A row's numbers of an array `(tokens, 1, heads, D)`, as its strides have them; each lane has every 32nd one.
  auto load = [&](auto* from, const auto& strides, size_t of, float (&to)[N]) {
    for (int i = 0; i < N; ++i) {
      to[i] = float(from[of / heads * strides[0] + of % heads * strides[2] + (i * 32 + lane) * strides[3]]);
    }
  };
  auto store = [&](T* to, size_t of, const float (&from)[N]) {
    for (int i = 0; i < N; ++i) to[of * D + i * 32 + lane] = static_cast<T>(from[i]);
  };
"""
    + REDUCE
)

# Of rows of `x_0`, then of those of `x_1`, with a factor each in `numbers`.
TWO = """
  const size_t rows = size_t(tokens) * heads;
  if (row >= 2 * rows) return;
  const bool second = row >= rows;
  const size_t own = second ? row - rows : row;
  const float factor = numbers[second];
  float x[N];
  if (second) load(x_1, x_1_strides, own, x); else load(x_0, x_0_strides, own, x);
  const float inverse = inverse_of(x, numbers[2]);
"""
NORMED = """
  for (int i = 0; i < N; ++i) x[i] *= factor * inverse;
  store(second ? out_1 : out_0, own, x);
"""
NORMED_SLOPES = """
  float slopes[N];
  if (second) load(slopes_1, slopes_1_strides, own, slopes); else load(slopes_0, slopes_0_strides, own, slopes);
  for (int i = 0; i < N; ++i) slopes[i] *= factor;
  through(slopes, x, inverse);
  store(second ? out_1 : out_0, own, slopes);
"""

# silu(x_0) times the norm of x_1 times a weight; where rows are MOVED, x_1 has at its places what tokens have in x_0.
GATED_NORM = """
  if (row >= size_t(tokens) * heads) return;
  float x[N] = {}, gate[N];
  const int place = MOVED ? outputs[row / heads] : row / heads;
  if (place >= 0) load(x_1, x_1_strides, size_t(place) * heads + row % heads, x);
  load(x_0, x_0_strides, row, gate);
  const float inverse = inverse_of(x, *numbers);
  for (int i = 0; i < N; ++i) {
    x[i] *= inverse * float(weight[i * 32 + lane]) * gate[i] / (1.0f + expf(-gate[i]));
  }
  store(out_0, row, x);
"""
# Of places, and then of tokens that have none.
GATED_SLOPES = """
  const size_t standing = size_t(x_1_shape[0]) * heads, beyond = row - standing;
  float x[N], gate[N], slopes[N], of_gate[N] = {};
  if (row >= standing) {
    if (MOVED && beyond < size_t(tokens) * heads && outputs[beyond / heads] < 0) store(out_0, beyond, of_gate);
    return;
  }
  const int token = MOVED ? answered[row / heads] : row / heads;
  if (token < 0) {
    store(out_1, row, of_gate);
    return;
  }
  const size_t own = size_t(token) * heads + row % heads;
  load(x_1, x_1_strides, row, x);
  load(x_0, x_0_strides, own, gate);
  load(slopes_0, slopes_0_strides, own, slopes);
  const float inverse = inverse_of(x, *numbers);
  for (int i = 0; i < N; ++i) {
    const float sigmoid = 1.0f / (1.0f + expf(-gate[i])), through_weight = slopes[i] * float(weight[i * 32 + lane]);
    of_gate[i] = through_weight * x[i] * inverse * sigmoid * (1.0f + gate[i] * (1.0f - sigmoid));
    slopes[i] = through_weight * gate[i] * sigmoid;
  }
  through(slopes, x, inverse);
  store(out_1, row, slopes);
  store(out_0, own, of_gate);
"""


def fits(*arrays):
    """Whether arrays are `(N, 1, H, D)` of one shape and dtype, of which warps take whole rows."""
    first = arrays[0]
    alike = all(x.shape == first.shape and x.dtype == first.dtype for x in arrays)
    return alike and first.ndim == 4 and first.shape[1] == 1 and first.shape[3] % 32 == 0


def _run(name, source, inputs, count, **more):
    """A kernel with a warp for each of so many rows; its outputs are as many as it names, each like its input."""
    x = inputs["x_0"]
    outputs = {f"out_{i}": (inputs[f"x_{i}"].shape, x.dtype) for i in range(2) if f"out_{i}" in source}
    grid, more = (count * 32, 1, 1), {"T": x.dtype, "D": x.shape[3]} | more
    return run_kernel(name, START + source, inputs, outputs, grid, THREADS, copies=False, **more)


def normed(x_0, x_1, factors, eps):
    """RMSNorms of two arrays `(N, 1, H, D)` such as `fits`, each times its factor."""
    numbers = mx.array([*factors, eps])
    run = partial(_run, count=2 * x_0.size // x_0.shape[3])

    @mx.custom_function
    def forward(x_0, x_1):
        return tuple(run("normed", TWO + NORMED, {"x_0": x_0, "x_1": x_1, "numbers": numbers}))

    @forward.vjp
    def backward(inputs, slopes, _):
        arrays = {f"x_{i}": x for i, x in enumerate(inputs)} | {f"slopes_{i}": x for i, x in enumerate(slopes)}
        return tuple(run("normed_vjp", TWO + NORMED_SLOPES, arrays | {"numbers": numbers}))

    return forward(x_0, x_1)


def gated_norm(x, gate, weight, eps, moves=None):
    """silu(gate) times an RMSNorm of `x` times a weight `(D,)` that has no gradient.

    Args:
        x, gate: `(N, 1, H, D)` such as `fits`; with `moves` `x` has places in the place of tokens.
        moves: `(outputs, answered)`: at which place the `x` of each token stands, and whose it is that stands at each
            place; -1 for nowhere and nobody.

    Returns:
        As `gate`.
    """
    outputs, answered = [mx.zeros(1, mx.int32)] * 2 if moves is None else moves
    others = {"weight": weight, "numbers": mx.array([eps]), "outputs": outputs, "answered": answered}
    run = partial(_run, MOVED=moves is not None)
    of_gate, of_x = (array.size // array.shape[3] for array in (gate, x))

    @mx.custom_function
    def forward(x, gate):
        return run("gated_norm", GATED_NORM, {"x_0": gate, "x_1": x} | others, of_gate)[0]

    @forward.vjp
    def backward(inputs, slopes, _):
        arrays = {"x_0": inputs[1], "x_1": inputs[0], "slopes_0": slopes} | others
        return tuple(reversed(run("gated_norm_vjp", GATED_SLOPES, arrays, of_gate + of_x)))

    return forward(x, gate)
