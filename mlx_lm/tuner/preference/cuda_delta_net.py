"""A gated delta layer of Qwen3.5 on NVIDIA's GPUs, from its projections to what its last one reads.

Upstream convolves queries, keys and values, takes a silu, norms the first two, and makes gates and betas; in a packed
batch all of them then move to where their sequences' chunks stand. Here one kernel does all that and two do its
gradients; what the chunks give is normed, gated and moved back in one. They read the projections where they stand side
by side, and write their gradients so.
"""

import mlx.core as mx
from mlx.utils import tree_flatten

from . import cuda_chunks
from .cuda_convolution import CONVOLVE
from .cuda_kernel import run_kernel
from .cuda_norms import REDUCE, gated_norm
from .siblings import multiplied_in, side_by_side

# Threads a block; a head of a token is a warp's.
THREADS = 256
# What upstream adds to the squares of queries and keys.
EPS = 1e-6

# Which token or place a warp has, which head of it, and which of its numbers are a lane's. A token's row has the heads
# of queries, keys and values, those of what gates the outputs, and two numbers for each of these: of betas, and of
# gates.
START = """
  constexpr int N = D / 32, CONVOLVED = 2 * KH + VH, CHANNELS = CONVOLVED * D, WIDTH = CHANNELS + VH * (D + 2);
  struct alignas(N * sizeof(T)) Word { T values[N]; };
  const unsigned lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int number = warp / HEADS, head = warp % HEADS, channel = head * D + lane * N;
  const T *of_betas = projected + CHANNELS + VH * D, *of_gates = of_betas + VH;
  if (number >= count) return;
  auto store = [&](T* to, const float (&from)[N]) {
    Word word;
    for (int i = 0; i < N; ++i) word.values[i] = static_cast<T>(from[i]);
    *reinterpret_cast<Word*>(to) = word;
  };
  auto add = [&](float (&to)[N], const T* from) {
    const Word word = *reinterpret_cast<const Word*>(from);
    for (int i = 0; i < N; ++i) to[i] += float(word.values[i]);
  };
  auto sigmoid = [](float x) { return 1.0f / (1.0f + expf(-x)); };
  // What a head's part of a token's queries, keys or values is in an array of heads of its own.
  auto place_of = [&](int token) {
    const int kind = head < KH ? 0 : head < 2 * KH ? 1 : 2, heads = kind == 2 ? VH : KH;
    return (size_t(token) * heads + head - kind * KH) * D + lane * N;
  };
"""
OF_TOKENS = f"""
  const int tokens = projected_shape[0], count = tokens;
{START}
  const int token = number;
"""
# A token's convolution, its silu, and what a norm multiplies that by, if there is one.
INNER = (
    REDUCE
    + """
  float sums[N] = {}, x[N], inverse = 1.0f;
  convolve<TAPS, N, 1>(sums, projected + channel, WIDTH, weight + channel * TAPS, before, tokens, token);
  for (int i = 0; i < N; ++i) x[i] = sums[i] * sigmoid(sums[i]);
  if (head < 2 * KH) inverse = inverse_of(x, numbers[2]);
  const float factor = head < 2 * KH ? numbers[head >= KH] : 1.0f;
"""
)

# Of each place of the chunks, the token that stands there.
INPUTS = (
    """
  const int tokens = projected_shape[0], count = places_shape[0];
"""
    + START
    + """
  const int token = places[number];
  if (head == CONVOLVED) {
    for (int h = lane; h < VH; h += 32) {
      const float x = float(of_gates[size_t(token) * WIDTH + h]) + float(dt_bias[h]);
      // log(1 + exp(x)), which is x where that is large.
      const float softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
      gates[size_t(number) * VH + h] = -expf(float(A_log[h])) * softplus;
      betas[size_t(number) * VH + h] = static_cast<T>(sigmoid(float(of_betas[size_t(token) * WIDTH + h])));
    }
    return;
  }
"""
    + INNER
    + """
  for (int i = 0; i < N; ++i) x[i] *= factor * inverse;
  store((head < KH ? queries : head < 2 * KH ? keys : values) + place_of(number), x);
"""
)

# Gradients of a token's convolution, of all places that it stands at.
INNER_SLOPES = (
    OF_TOKENS
    + INNER
    + """
  float slopes[N] = {};
  const T* from = head < KH ? of_queries : head < 2 * KH ? of_keys : of_values;
  for (int n = 0; n < uses_shape[0]; ++n) {
    const int place = uses[size_t(n) * tokens + token];
    if (place >= 0) add(slopes, from + place_of(place));
  }
  for (int i = 0; i < N; ++i) slopes[i] *= factor;
  if (head < 2 * KH) through(slopes, x, inverse);
  for (int i = 0; i < N; ++i) {
    const float share = sigmoid(sums[i]);
    slopes[i] *= share * (1.0f + sums[i] * (1.0f - share));
  }
  store(inner + size_t(token) * CHANNELS + channel, slopes);
"""
)

# Gradients of all that stands side by side.
SLOPES = (
    OF_TOKENS
    + """
  float slopes[N] = {};
  if (head < CONVOLVED) {
    convolve<TAPS, N, 4>(slopes, inner + channel, CHANNELS, weight + channel * TAPS, after, tokens, token);
  } else if (head < CONVOLVED + VH) {
    add(slopes, of_gated + size_t(token) * (VH * D) + channel - CHANNELS);
  } else {
    T* to = out + size_t(token) * WIDTH + CHANNELS + VH * D;
    for (int h = lane; h < VH; h += 32) {
      float gate = 0.0f, beta = 0.0f;
      for (int n = 0; n < uses_shape[0]; ++n) {
        const int place = uses[size_t(n) * tokens + token];
        if (place < 0) continue;
        gate += gate_slopes[size_t(place) * VH + h], beta += float(beta_slopes[size_t(place) * VH + h]);
      }
      const float x = float(of_gates[size_t(token) * WIDTH + h]) + float(dt_bias[h]);
      const float own = sigmoid(float(of_betas[size_t(token) * WIDTH + h]));
      to[h] = static_cast<T>(beta * own * (1.0f - own));
      to[VH + h] = static_cast<T>(-gate * expf(float(A_log[h])) * sigmoid(x));
    }
    return;
  }
  store(out + size_t(token) * WIDTH + channel, slopes);
"""
)


def fits(module, x):
    """Whether a `GatedDeltaNet` of Qwen3.5's is computed so for inputs like `x`: nothing but adapters is trained."""
    width, heads, own = module.head_k_dim, module.num_v_heads, module.conv1d
    parts = {"conv1d", "norm", "A_log", "dt_bias"}
    frozen = not any(name.split(".")[0] in parts for name, _ in tree_flatten(module.trainable_parameters()))
    alike = width == module.head_v_dim and own.weight.dtype == x.dtype and "bias" not in own
    # Side by side, projections of several dtypes are of the widest.
    alike = alike and all(multiplied_in(layer) == x.dtype for layer in _projections(module))
    # A lane reads its part of a row at once.
    whole = width in (32, 64, 128) and 2 * heads % (width // 32) == 0
    return frozen and alike and whole and module.sharding_group is None and cuda_chunks.fits(width, width, x.dtype)


def _projections(module):
    return module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a


def gated_delta_net(module, x, parts, order, before, after):
    """What a `GatedDeltaNet` such as `fits` gives for a packed batch `(N, 1, D)`.

    Args:
        parts: the recurrent `Parts` of the batch as one, of whole chunks.
        order: the chunks', as for `cuda_chunks.products`.
        before, after: what `cuda_convolution.neighbours` gives for the convolution.
    """
    projected = side_by_side(_projections(module), x.squeeze(1))
    *inputs, gate = _parted(module, projected, parts, before, after)
    out, _ = cuda_chunks.products(*inputs, order, alone=True)
    moves = parts.outputs, parts.answered[0].reshape(-1)
    out = gated_norm(out[:, None], gate[:, None], module.norm.weight, module.norm.eps, moves)
    return module.out_proj(out.reshape(len(x), 1, -1))


def _parted(module, projected, parts, before, after):
    """Queries, keys, values, gates' logarithms and betas where the chunks' tokens stand, and what gates the outputs."""
    places, weight = parts.keys[0].reshape(-1), module.conv1d.weight
    key_heads, heads, width = module.num_k_heads, module.num_v_heads, module.head_k_dim
    (tokens, _), count, dtype, scale = projected.shape, len(places), projected.dtype, width**-0.5
    convolved, gates = 2 * key_heads + heads, (count, heads)
    # What a norm of queries and one of keys are multiplied by, and what is added to the mean of their squares.
    numbers = mx.array([scale**2, scale, EPS * scale**2])
    constants = {"weight": weight, "A_log": module.A_log, "dt_bias": module.dt_bias, "numbers": numbers}
    constants |= {"before": before, "after": after, "uses": parts.uses, "places": places}
    template = {"T": dtype, "D": width, "KH": key_heads, "VH": heads, "TAPS": weight.shape[1]}

    def run(name, source, inputs, outputs, number, own):
        """A kernel with a warp for each of so many heads of a number of tokens."""
        grid = number * own * 32, 1, 1
        return run_kernel(
            f"delta_{name}", source, inputs | constants, outputs, grid, THREADS, CONVOLVE, HEADS=own, **template
        )

    @mx.custom_function
    def forward(projected):
        of_keys, of_values = (((count, own, width), dtype) for own in (key_heads, heads))
        outputs = {"queries": of_keys, "keys": of_keys, "values": of_values}
        outputs |= {"gates": (gates, mx.float32), "betas": (gates, dtype)}
        found = run("inputs", INPUTS, {"projected": projected}, outputs, count, convolved + 1)
        return *found, projected[:, convolved * width :][:, : heads * width].reshape(tokens, heads, width)

    @forward.vjp
    def backward(projected, slopes, _):
        names = ["of_queries", "of_keys", "of_values", "gate_slopes", "beta_slopes", "of_gated"]
        inputs = {"projected": projected} | dict(zip(names, slopes, strict=True))
        outputs = {"inner": ((tokens, convolved * width), dtype)}
        (inner,) = run("inner_slopes", INNER_SLOPES, inputs, outputs, tokens, convolved)
        outputs = {"out": (projected.shape, dtype)}
        return run("slopes", SLOPES, inputs | {"inner": inner}, outputs, tokens, convolved + heads + 1)[0]

    return forward(projected)
