"""The gated delta rule on NVIDIA's GPUs, token by token, with states in registers: a kernel forward, two backward.

With the names of `recurrent.py`, a_t for the gate, e_t = v_t - S_{t-1} diag(a_t) k_t and u_t = beta_t e_t, the gradient
D_t of the state after a token takes what the outputs do to it and passes on what the token before needs:

    D_t = D_{t+1}' + dO_t q_t^T,    du_t = D_t k_t,    D_t' = (D_t - beta_t du_t k_t^T) diag(a_t)

which needs no state: so the updates' gradients come from one loop backwards, the transposed of the loop forward. Given
both, the gradients of queries and keys are rows of the same loops over columns of S and D:

    dq_t = S_t^T dO_t,    dk_t = D_t^T u_t - beta_t diag(a_t) S_{t-1}^T du_t

None of these sums over the rows (or columns) of a state runs from one of them to another, so that a row of S, `(Dk,)`,
stays in the registers of a few threads from the first token to the last. Where a gate's logarithm stands for decays
from every earlier token to every later one, its gradient is a sum over the tokens from it on of

    q_t * dq_t + k_t * dk_t's second part - k_t * dk_t's first part

and of the last state times its gradient. All sums are in float32.

Chunks, as matrix products, need fewer operations and some 250 kernels a layer; a host starts these more slowly than a
GPU runs them.
"""

import mlx.core as mx

from .cuda_kernel import run_kernel

# Threads a block, and tokens that are in shared memory at a time.
THREADS, TILE = 128, 8
# Rows of a state that a thread has a part of, at most: their sums hide each other's latency, and share what is read of
# a token, but leave fewer blocks to run at a time.
MOST_ROWS = {"forward": 2, "updates": 2, "keys": 4}

HEADER = """
// A thread's part of a vector of LANES * N floats: four neighbours at a time, so that lanes read without conflict.
template <int LANES, int N>
struct Part {
  float x[N];
  __device__ void load(const float* from, int lane) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i * LANES + lane];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  }
  __device__ void store(float* to, int lane) const {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      reinterpret_cast<float4*>(to)[i * LANES + lane] =
          make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  }
  __device__ float dot(const Part& other) const {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i % 4] += x[i] * other.x[i];
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
  __device__ void add(float factor, const Part& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += factor * other.x[i];
  }
  __device__ void scale(const Part& factors) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= factors.x[i];
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= factor;
  }
};

// A row's number is known to all its lanes: lane r stores that of row r, neighbours side by side.
template <int ROWS, typename T>
__device__ void store_rows(T* to, const float (&numbers)[ROWS], int lane) {
  float own = numbers[0];
#pragma unroll
  for (int r = 1; r < ROWS; ++r) own = lane == r ? numbers[r] : own;
  if (lane < ROWS) to[lane] = static_cast<T>(own);
}

// A thread's part of COLUMNS numbers of each of TILE tokens: fetched while the tokens before are computed, then put
// where all threads of the block see it.
template <int COLUMNS, int TILE, int THREADS, typename T>
struct Tokens {
  static constexpr int WIDTH = COLUMNS % 4 ? 1 : 4, VECTORS = COLUMNS / WIDTH;
  static constexpr int N = (TILE * VECTORS + THREADS - 1) / THREADS;
  struct alignas(WIDTH * sizeof(T)) Vector {
    T x[WIDTH];
  };
  const T* from;
  size_t stride;
  Vector fetched[N];
  // Numbers of a sequence's first token, and from one token to the next.
  __device__ Tokens(const T* from, size_t stride) : from(from), stride(stride) {}
  __device__ void fetch(int first, int count) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int i = threadIdx.x + n * THREADS;
      if (i < count * VECTORS) {
        const T* token = from + size_t(first + i / VECTORS) * stride;
        fetched[n] = reinterpret_cast<const Vector*>(token)[i % VECTORS];
      }
    }
  }
  __device__ void put(float (*to)[COLUMNS]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int i = threadIdx.x + n * THREADS;
      if (i < TILE * VECTORS) {
        const T* x = fetched[n].x;
        float* token = to[i / VECTORS];
        if (WIDTH == 1) {
          token[i % VECTORS] = float(x[0]);
        } else {
          reinterpret_cast<float4*>(token)[i % VECTORS] =
              make_float4(float(x[0]), float(x[1 % WIDTH]), float(x[2 % WIDTH]), float(x[3 % WIDTH]));
        }
      }
    }
  }
};

template <int COLUMNS, int TILE, int THREADS, typename T>
__device__ Tokens<COLUMNS, TILE, THREADS, T> tokens_of(const T* from, size_t stride) {
  return {from, stride};
}
"""

# What every kernel begins with: H value heads, RATIO of them a key head; CHANNELS gates a token and head, 1 or DK. A
# block has BLOCK_ROWS of the rows of a state and goes through a sequence's tokens, TILE of them at a time.
PLACE = """
  constexpr int BLOCK_ROWS = THREADS / LANES * ROWS, KEY_HEADS = H / RATIO;
  const int length = keys_shape[1], head = blockIdx.y;
  const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES * ROWS, row = blockIdx.x * BLOCK_ROWS;
  const size_t first = size_t(SEQUENCE) * length;  // token
  const size_t of_key = (first * KEY_HEADS + head / RATIO) * DK, of_value = (first * H + head) * DV;
  auto next_gate = tokens_of<CHANNELS, TILE, THREADS>(gates + (first * H + head) * CHANNELS, H * CHANNELS);
  auto next_beta = tokens_of<1, TILE, THREADS>(betas + first * H + head, H);
  __shared__ __align__(16) float gate[TILE][CHANNELS], beta[TILE][1];
"""

# A sequence's tokens, in its own order or backwards. FETCH and PUT are of all that a kernel reads of tokens.
TOKENS = """
  auto fetch = [&](int done) {
    const int count = min(TILE, length - done), at = BACKWARDS ? length - done - count : done;
    next_gate.fetch(at, count);
    next_beta.fetch(at, count);
    FETCH
  };
  fetch(0);
  for (int done = 0; done < length; done += TILE) {
    const int count = min(TILE, length - done), at = BACKWARDS ? length - done - count : done;
    __syncthreads();
    next_gate.put(gate);
    next_beta.put(beta);
    PUT
    __syncthreads();
    if (done + TILE < length) fetch(done + TILE);
#pragma unroll 2
    for (int step = 0; step < count; ++step) {
      const int i = BACKWARDS ? count - 1 - step : step;
      TOKEN
    }
  }
"""


def _over_tokens(arrays, token):
    """`TOKENS` for arrays in shared memory, each with a `Tokens` of its name, and what happens at a token."""
    calls = "next_{0}.fetch(at, count);", "next_{0}.put({0});"
    fetch, put = (" ".join(call.format(x) for x in arrays) for call in calls)
    return TOKENS.replace("FETCH", fetch).replace("PUT", put).replace("TOKEN", token)


# Rows of the states from the first token on, or of their gradients from the last one on: `before` is what stands at
# that end, `rows` each token's numbers for the rows, of v or dO.
ROWS_OF_STATES = (
    PLACE.replace("SEQUENCE", "blockIdx.z")
    + """
  constexpr int N = DK / LANES;
  __shared__ __align__(16) float key[TILE][DK], query[TILE][DK], given[TILE][BLOCK_ROWS];
  auto next_key = tokens_of<DK, TILE, THREADS>(keys + of_key, KEY_HEADS * DK);
  auto next_query = tokens_of<DK, TILE, THREADS>(queries + of_key, KEY_HEADS * DK);
  auto next_given = tokens_of<BLOCK_ROWS, TILE, THREADS>(rows + of_value + row, H * DV);
  const size_t states = ((size_t(blockIdx.z) * H + head) * DV + row + own) * DK;
  Part<LANES, N> state[ROWS], k, q, a;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) state[r].load(before + states + r * DK, lane);
"""
    + _over_tokens(
        ("key", "query", "given"),
        """
      const size_t out = of_value + size_t(at + i) * (H * DV) + row + own;
      k.load(key[i], lane);
      q.load(query[i], lane);
      if (CHANNELS > 1) a.load(gate[i], lane);
      EACH_ROW""",
    )
    + """
#pragma unroll
  for (int r = 0; r < ROWS; ++r) state[r].store(after + states + r * DK, lane);
"""
)

DECAY = "if (CHANNELS > 1) state[r].scale(a); else state[r].scale(gate[i][0]);"

# Nothing is stored before all rows are computed: with a branch between them each would wait for the one before.
FORWARD = f"""
      float error[ROWS], output[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {{
        {DECAY}
        error[r] = given[i][own + r] - state[r].dot(k);
        state[r].add(beta[i][0] * error[r], k);
        output[r] = state[r].dot(q);
      }}
      store_rows(errors + out, error, lane);
      store_rows(outputs + out, output, lane);
"""

UPDATE_SLOPES = f"""
      float update[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {{
        state[r].add(given[i][own + r], q);
        update[r] = state[r].dot(k);
        state[r].add(-beta[i][0] * update[r], k);
        {DECAY}
      }}
      store_rows(update_slopes + out, update, lane);
"""

# Columns of the states, where blockIdx.z is even, and of their gradients; `before` and `after_slope` are transposed.
COLUMNS_OF_STATES = (
    "const bool BACKWARDS = blockIdx.z % 2;"
    + PLACE.replace("SEQUENCE", "blockIdx.z / 2")
    + """
  constexpr int N = DV / LANES;
  __shared__ __align__(16) float slope[TILE][DV], error[TILE][DV], update[TILE][DV];
  __shared__ __align__(16) float key[TILE][BLOCK_ROWS], query[TILE][BLOCK_ROWS];
  auto next_slope = tokens_of<DV, TILE, THREADS>(slopes + of_value, H * DV);
  auto next_error = tokens_of<DV, TILE, THREADS>(errors + of_value, H * DV);
  auto next_update = tokens_of<DV, TILE, THREADS>(update_slopes + of_value, H * DV);
  auto next_key = tokens_of<BLOCK_ROWS, TILE, THREADS>(keys + of_key + row, KEY_HEADS * DK);
  auto next_query = tokens_of<BLOCK_ROWS, TILE, THREADS>(queries + of_key + row, KEY_HEADS * DK);
  const size_t states = ((size_t(blockIdx.z / 2) * H + head) * DK + row + own) * DV;
  Part<LANES, N> state[ROWS], dO, e, du;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) state[r].load((BACKWARDS ? after_slope : before) + states + r * DV, lane);
"""
    + _over_tokens(
        ("slope", "error", "update", "key", "query"),
        """
      const size_t out = ((first + at + i) * H + head) * DK + row + own;
      dO.load(slope[i], lane);
      e.load(error[i], lane);
      du.load(update[i], lane);
      float written[ROWS], read[ROWS], asked[ROWS];
      if (BACKWARDS) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          state[r].add(query[i][own + r], dO);
          written[r] = beta[i][0] * state[r].dot(e);
          state[r].add(-beta[i][0] * key[i][own + r], du);
          state[r].scale(gate[i][CHANNELS > 1 ? row + own + r : 0]);
        }
        store_rows(write_slopes + out, written, lane);
      } else {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          state[r].scale(gate[i][CHANNELS > 1 ? row + own + r : 0]);
          read[r] = -beta[i][0] * state[r].dot(du);
          state[r].add(beta[i][0] * key[i][own + r], e);
          asked[r] = state[r].dot(dO);
        }
        store_rows(read_slopes + out, read, lane);
        store_rows(query_slopes + out, asked, lane);
      }""",
    )
)


SOURCES = {
    "forward": ROWS_OF_STATES.replace("EACH_ROW", FORWARD),
    "updates": ROWS_OF_STATES.replace("EACH_ROW", UPDATE_SLOPES),
    "keys": COLUMNS_OF_STATES,
}


def fits(key_width, value_width):
    """Whether heads of these widths are whole vectors of all threads that share a row of a state."""
    return all(width % (4 * _lanes(width)) == 0 and width <= 256 for width in (key_width, value_width))


def _lanes(width):
    """Threads that share a row of a state of so many numbers."""
    return 8 if width <= 128 else 16


def _rows_a_thread(name, rows, lanes):
    """Of how many of a state's rows, a multiple of 32, a thread has a part, so that blocks are whole."""
    return max(count for count in range(1, MOST_ROWS[name] + 1) if rows % (THREADS // lanes * count) == 0)


def gated_delta_loops(queries, keys, values, log_gates, betas, state=None):
    """As `recurrent.gated_delta_chunks`, for widths that `fits` allows, outputs in the dtype of `values`.

    The backward pass keeps the inputs, and e of each token in float32.
    """
    batch, length, key_heads, key_width = keys.shape
    value_heads, value_width = values.shape[2:]
    channels = 1 if log_gates.ndim == 3 else key_width
    per_value = batch, length, value_heads, value_width
    per_key = batch, length, value_heads, key_width

    def run(name, rows, columns, inputs, outputs, **template):
        lanes = _lanes(columns)
        count = _rows_a_thread(name, rows, lanes)
        template |= {"T": values.dtype, "DK": key_width, "DV": value_width, "H": value_heads, "CHANNELS": channels}
        template |= {"RATIO": value_heads // key_heads, "TILE": TILE, "THREADS": THREADS, "LANES": lanes, "ROWS": count}
        grid = (rows * lanes // count, value_heads, 2 * batch if name == "keys" else batch)
        return run_kernel(f"gated_delta_{name}", SOURCES[name], inputs, outputs, grid, THREADS, HEADER, **template)

    def of_rows(name, common, before, rows, outputs):
        inputs, outputs = {**common, "before": before, "rows": rows}, {**outputs, "after": (before.shape, mx.float32)}
        return run(name, value_width, key_width, inputs, outputs, BACKWARDS=name == "updates")

    @mx.custom_function
    def loop(queries, keys, values, log_gates, betas, state):
        common = {"keys": keys, "queries": queries, "gates": mx.exp(log_gates), "betas": betas}
        outputs = {"outputs": (per_value, values.dtype), "errors": (per_value, mx.float32)}
        return tuple(of_rows("forward", common, state, values, outputs))

    @loop.vjp
    def backward(inputs, cotangents, outputs):
        queries, keys, _, log_gates, betas, state = inputs
        (slopes, _, last_slope), (_, errors, last) = cotangents, outputs
        common = {"keys": keys, "queries": queries, "gates": mx.exp(log_gates), "betas": betas}
        slopes = mx.contiguous(slopes)
        updates, first_slope = of_rows(
            "updates", common, last_slope, slopes, {"update_slopes": (per_value, mx.float32)}
        )
        columns = {"before": state.swapaxes(-1, -2), "after_slope": last_slope.swapaxes(-1, -2)}
        columns |= {"slopes": slopes, "errors": errors, "update_slopes": updates}
        wanted = dict.fromkeys(("query_slopes", "read_slopes", "write_slopes"), (per_key, mx.float32))
        found = run("keys", key_width, value_width, common | columns, wanted)
        asked, read, written = (x.reshape(batch, length, key_heads, -1, key_width) for x in found)
        passed = (queries[..., None, :] * asked + keys[..., None, :] * (read - written)).reshape(per_key)
        at_end = (last * last_slope).sum(-2)
        if channels == 1:
            passed, at_end = passed.sum(-1), at_end.sum(-1)
        slopes = (
            asked.sum(3),
            (read + written).sum(3),
            betas[..., None] * updates,
            mx.cumsum(passed, axis=1, reverse=True) + at_end[:, None],
            (errors * updates).sum(-1),
            first_slope,
        )
        return tuple(slope.astype(x.dtype) for slope, x in zip(slopes, inputs, strict=True))

    before = (batch, value_heads, value_width, key_width)
    state = mx.zeros(before) if state is None else state.astype(mx.float32)
    outputs, _, last = loop(queries, keys, values, log_gates.astype(mx.float32), betas, state)
    return outputs, last
