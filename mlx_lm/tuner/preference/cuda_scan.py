"""Mamba's selective scan on NVIDIA's GPUs, token by token, with states in registers: a kernel forward, one backward.

With the names of `state_space.selective_scan`, the gradient L_t of the state after a token is

    L_t = dO_t c_t^T + exp(dt_{t+1} A) L_{t+1}

and of a token's inputs all is a sum over one of the state's axes: over a channel's N numbers for x and dt, over the
channels for b and c. The backward pass computes the states of TILE tokens again from the one before them, which the
forward pass has written, and goes back through them. All sums are in float32.

As single operations of MLX a layer is hundreds of kernels, which take a host longer to launch than a GPU to run.
"""

from math import log

import mlx.core as mx

from .cuda_kernel import run_kernel

# Threads a block, numbers of a state that a thread has, and tokens that are in shared memory at a time.
THREADS, NUMBERS, TILE = 256, 4, 16

HEADER = """
// Numbers of COLUMNS neighbours of each of TILE tokens, zeros behind the last one: these change no state.
template <int TILE, int THREADS, int COLUMNS, typename T>
__device__ void load(float (*to)[COLUMNS], const T* from, size_t stride, int count) {
  for (int i = threadIdx.x; i < TILE * COLUMNS; i += THREADS) {
    const int token = i / COLUMNS, column = i % COLUMNS;
    to[token][column] = token < count ? float(from[token * stride + column]) : 0.0f;
  }
}

template <int TILE, int THREADS, int COLUMNS, typename T>
__device__ void store(T* to, size_t stride, int count, const float (*from)[COLUMNS]) {
  for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
    to[i / COLUMNS * stride + i % COLUMNS] = static_cast<T>(from[i / COLUMNS][i % COLUMNS]);
  }
}

template <int FIRST, int BEHIND>
__device__ float sum_of_lanes(float x) {
#pragma unroll
  for (int step = FIRST; step < BEHIND; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
"""

# A block has CHANNELS channels of one sequence; LANES neighbouring threads have a channel's STATES numbers.
PLACE = """
  constexpr int LANES = STATES / NUMBERS, CHANNELS = THREADS / LANES;
  const int length = x_shape[1], width = x_shape[2], tiles = (length + TILE - 1) / TILE;
  const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES, sequence = blockIdx.y;
  const int channel = blockIdx.x * CHANNELS + own;
  const size_t first = size_t(sequence) * length;
  const size_t state = (size_t(sequence) * width + channel) * STATES + lane * NUMBERS;
  __shared__ float xs[TILE][CHANNELS], dts[TILE][CHANNELS], bs[TILE][STATES], cs[TILE][STATES];
  float a[NUMBERS];
  for (int n = 0; n < NUMBERS; ++n) a[n] = A[size_t(channel) * STATES + lane * NUMBERS + n];
  auto fetch = [&](size_t at, int count) {
    load<TILE, THREADS>(xs, x + at * width + blockIdx.x * CHANNELS, width, count);
    load<TILE, THREADS>(dts, steps + at * width + blockIdx.x * CHANNELS, width, count);
    load<TILE, THREADS>(bs, writes + at * STATES, STATES, count);
    load<TILE, THREADS>(cs, reads + at * STATES, STATES, count);
  };
  auto start_of = [&](int tile) {
    return ((size_t(sequence) * tiles + tile) * width + channel) * STATES + lane * NUMBERS;
  };
"""

FORWARD = (
    PLACE
    + """
  __shared__ float ys[TILE][CHANNELS];
  float h[NUMBERS];
  for (int n = 0; n < NUMBERS; ++n) h[n] = before[state + n];
  for (int tile = 0; tile < tiles; ++tile) {
    const int count = min(TILE, length - tile * TILE);
    for (int n = 0; n < NUMBERS; ++n) starts[start_of(tile) + n] = h[n];
    __syncthreads();
    fetch(first + tile * TILE, count);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      const float dt = dts[i][own], u = dt * xs[i][own];
      float y = 0.0f;
#pragma unroll
      for (int n = 0; n < NUMBERS; ++n) {
        h[n] = exp2f(dt * a[n]) * h[n] + u * bs[i][lane * NUMBERS + n];
        y += h[n] * cs[i][lane * NUMBERS + n];
      }
      y = sum_of_lanes<1, LANES>(y);
      if (lane == 0) ys[i][own] = y;
    }
    __syncthreads();
    store<TILE, THREADS>(outputs + (first + tile * TILE) * width + blockIdx.x * CHANNELS, width, count, ys);
  }
  for (int n = 0; n < NUMBERS; ++n) after[state + n] = h[n];
"""
)

# `slopes_b` and `slopes_c` are sums over a block's channels; `slopes_a` of a sequence's tokens.
BACKWARD = (
    PLACE
    + """
  constexpr int WARPS = THREADS / 32;
  __shared__ float dys[TILE][CHANNELS], parts_b[WARPS][TILE][STATES], parts_c[WARPS][TILE][STATES];
  float slope[NUMBERS], slope_a[NUMBERS] = {};
  for (int n = 0; n < NUMBERS; ++n) slope[n] = after_slope[state + n];
  for (int tile = tiles - 1; tile >= 0; --tile) {
    const int count = min(TILE, length - tile * TILE);
    const size_t at = first + tile * TILE;
    __syncthreads();
    fetch(at, count);
    load<TILE, THREADS>(dys, output_slopes + at * width + blockIdx.x * CHANNELS, width, count);
    __syncthreads();
    float states[TILE + 1][NUMBERS];  // before each token, and after the last
    for (int n = 0; n < NUMBERS; ++n) states[0][n] = starts[start_of(tile) + n];
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      const float dt = dts[i][own], u = dt * xs[i][own];
#pragma unroll
      for (int n = 0; n < NUMBERS; ++n) {
        states[i + 1][n] = exp2f(dt * a[n]) * states[i][n] + u * bs[i][lane * NUMBERS + n];
      }
    }
#pragma unroll
    for (int i = TILE - 1; i >= 0; --i) {
      const float dt = dts[i][own], x_i = xs[i][own], dy = dys[i][own];
      float of_u = 0.0f, of_dt = 0.0f;
#pragma unroll
      for (int n = 0; n < NUMBERS; ++n) {
        const float gate = exp2f(dt * a[n]);
        slope[n] += dy * cs[i][lane * NUMBERS + n];
        of_u += slope[n] * bs[i][lane * NUMBERS + n];
        const float of_b = sum_of_lanes<LANES, 32>(slope[n] * dt * x_i);
        const float of_c = sum_of_lanes<LANES, 32>(dy * states[i + 1][n]);
        if (threadIdx.x % 32 < LANES) {
          parts_b[threadIdx.x / 32][i][lane * NUMBERS + n] = of_b;
          parts_c[threadIdx.x / 32][i][lane * NUMBERS + n] = of_c;
        }
        slope[n] *= gate;
        const float of_log = slope[n] * states[i][n];
        of_dt += of_log * a[n];
        slope_a[n] += dt * of_log;
      }
      of_u = sum_of_lanes<1, LANES>(of_u);
      of_dt = sum_of_lanes<1, LANES>(of_dt);
      // What stands at this token these lanes alone have read, and will not again.
      if (lane == 0) {
        xs[i][own] = dt * of_u;
        dts[i][own] = x_i * of_u + 0.6931471805599453f * of_dt;
      }
    }
    __syncthreads();
    store<TILE, THREADS>(x_slopes + at * width + blockIdx.x * CHANNELS, width, count, xs);
    store<TILE, THREADS>(step_slopes + at * width + blockIdx.x * CHANNELS, width, count, dts);
    const size_t part = (size_t(blockIdx.x) * gridDim.y * length + at) * STATES;
    for (int i = threadIdx.x; i < count * STATES; i += THREADS) {
      float b = 0.0f, c = 0.0f;
      for (int warp = 0; warp < WARPS; ++warp) {
        b += parts_b[warp][i / STATES][i % STATES];
        c += parts_c[warp][i / STATES][i % STATES];
      }
      slopes_b[part + i] = b, slopes_c[part + i] = c;
    }
  }
  for (int n = 0; n < NUMBERS; ++n) {
    before_slope[state + n] = slope[n];
    slopes_a[state + n] = slope_a[n];
  }
"""
)


def fits(width, states):
    """Whether so many channels are whole blocks, and their states numbers of neighbouring threads, in shared memory."""
    lanes = states // NUMBERS
    return states % NUMBERS == 0 and lanes in (2, 4, 8) and width % (THREADS // lanes) == 0


def selective_loops(x, steps, write, read, A, state=None):
    """As `state_space.selective_scan`, for widths that `fits` allows, outputs in the dtype of `x`.

    The backward pass keeps the inputs, and computes the states between tiles again.
    """
    (batch, length, width), states = x.shape, A.shape[-1]
    blocks = width // (THREADS * NUMBERS // states)
    of_state, numbers = (batch, width, states), (blocks, batch, length, states)
    of_tiles = (batch, -(-length // TILE), width, states)

    def run(name, source, inputs, outputs):
        grid = (blocks * THREADS, batch, 1)
        sizes = {"STATES": states, "NUMBERS": NUMBERS, "TILE": TILE, "THREADS": THREADS}
        return run_kernel(f"selective_scan_{name}", source, inputs, outputs, grid, THREADS, HEADER, **sizes)

    def forward(x, steps, write, read, A, before):
        """The inputs of both kernels, and what the first one gives."""
        common = {"x": x, "steps": steps, "writes": write, "reads": read, "A": A / log(2)}
        outputs = {"outputs": (x.shape, x.dtype), "starts": (of_tiles, mx.float32), "after": (of_state, mx.float32)}
        return common, *run("forward", FORWARD, {**common, "before": before}, outputs)

    @mx.custom_function
    def loop(*inputs):
        _, outputs, _, after = forward(*inputs)
        return outputs, after

    @loop.vjp
    def backward(inputs, slopes, _):
        # The states wait for the gradient: before it comes they would only take memory.
        common, _, starts, _ = forward(*mx.depends(list(inputs), list(slopes)))
        given = {"starts": starts, "output_slopes": slopes[0], "after_slope": slopes[1]}
        outputs = {"x_slopes": (x.shape, x.dtype), "step_slopes": (steps.shape, steps.dtype)}
        outputs |= dict.fromkeys(("slopes_b", "slopes_c"), (numbers, mx.float32))
        outputs |= dict.fromkeys(("slopes_a", "before_slope"), (of_state, mx.float32))
        x_slopes, step_slopes, slopes_b, slopes_c, slopes_a, before_slope = run(
            "backward", BACKWARD, common | given, outputs
        )
        of_tokens = slopes_b.sum(0).astype(write.dtype), slopes_c.sum(0).astype(read.dtype)
        return x_slopes, step_slopes, *of_tokens, slopes_a.sum(0), before_slope

    state = mx.zeros(of_state) if state is None else state.astype(mx.float32)
    return loop(x, steps, write, read, A.astype(mx.float32), state)
