"""The gated delta rule on NVIDIA's GPUs in chunks of 64 tokens, as products of half precision summed in float32.

With the names of `recurrent.py`, G_i for the sum of the logarithms of a chunk's gates up to its token i, and d_ij for
exp(G_i - G_j), a chunk's updates and outputs are

    W = T B (exp(G) K),    U = T B V,    u = U - W S^T,    O = exp(G) (Q S^T) + P u,    P_ij = d_ij q_i . k_j for j <= i

All but S is known for all chunks at once; the states go from chunk to chunk, a block for 32 rows of each. Backwards,
with dS' the gradient of the state behind a chunk and d_Cj the decay from token j to its end,

    du = P^T dO + d_C (K dS'^T),    dS = exp(G_C) dS' + (exp(G) dO)^T Q - du^T W

goes from chunk to chunk, and what remains is each chunk's own: with Y the part below the diagonal of -(T^T du) u^T,
which is the gradient of M, those of queries, keys, values, betas and gates. A gate's is the sum of what all G behind it
within the chunk have.

All states of a sequence go through one block, those of sequences that begin with it after its own.
"""

import mlx.core as mx
import numpy as np

from .attention import capability
from .cuda_kernel import run_kernel

CHUNK, THREADS = 64, 128
# Rows of a state that a block has.
ROWS = 32

MULTIPLY_ADD = """
template <>
__device__ void multiply_add<TYPE>(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
"""
# What a GPU has instructions for.
INSTRUCTIONS = (
    """
template <typename T>
__device__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
"""
    + MULTIPLY_ADD.replace("TYPE", "__nv_bfloat16").replace("KIND", "bf16")
    + MULTIPLY_ADD.replace("TYPE", "__half").replace("KIND", "f16")
    + """
// Four matrices of 8 x 8 numbers in shared memory, of each of which a thread is given two neighbours of a row, or if
// TURNED of a column: the numbers that `multiply_add` takes of it. Each eight lanes of a warp have the rows of one.
template <bool TURNED>
__device__ void load_four(unsigned (&to)[4], const void* row) {
  const unsigned at = __cvta_generic_to_shared(row);
  if (TURNED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
  }
}

// Begins to copy 16 bytes into shared memory.
__device__ void copy(void* to, const void* from) {
  const unsigned at = __cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
}

__device__ void begun() { asm volatile("cp.async.commit_group;"); }

// Waits for all copies but those that were `begun` last, `LATER` times; a block's threads see what all have copied.
template <int LATER = 0>
__device__ void landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
  __syncthreads();
}
"""
)

HEADER = """
constexpr int CHUNK = 64, THREADS = 128, GAP = 8, SQUARE = CHUNK + GAP;

// Adds 16 rows of A B^T from `row` on, 8 * N columns from `column` on; A_TURNED for A stored as A^T, B_TURNED for B^T.
template <bool A_TURNED, bool B_TURNED, int N, typename T>
__device__ void product(float (&sums)[N][4], const T* a, int a_stride, int row, const T* b, int b_stride, int column,
                        int depth) {
  // Of 16 x 16 numbers: where the row is that a lane has of one of the four matrices, which stand as `sums` has them.
  const int line = threadIdx.x % 8, second = threadIdx.x / 8 % 2 * 8, later = threadIdx.x / 16 % 2 * 8;
  const T* own = A_TURNED ? a + (line + later) * a_stride + row + second : a + (row + line + second) * a_stride + later;
  // An odd number of columns' eights has no second one: its lanes read the first one again.
  auto other = [&](int n) {
    const int i = column + 8 * n + (n + 1 < N ? later : 0);
    return B_TURNED ? b + (line + second) * b_stride + i : b + (i + line) * b_stride + second;
  };
  for (int k = 0; k < depth; k += 16) {
    unsigned left[4], right[4];
    load_four<A_TURNED>(left, own + k * (A_TURNED ? a_stride : 1));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      load_four<B_TURNED>(right, other(n) + k * (B_TURNED ? b_stride : 1));
      multiply_add<T>(sums[n], left, {right[0], right[1]});
      if (n + 1 < N) multiply_add<T>(sums[n + 1 < N ? n + 1 : n], left, {right[2], right[3]});
    }
  }
}

// Calls `each(row, column, half, x, y)` for all pairs of neighbouring sums of a thread, of two rows, 0 or 1 of a half.
template <int N, typename F>
__device__ void for_pairs(float (&sums)[N][4], int row, int column, F each) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      each(row + g + 8 * half, column + 8 * n + t, half, sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

template <typename T>
__device__ void store(T* to, float x, float y) {
  *reinterpret_cast<Pair<T>*>(to) = {static_cast<T>(x), static_cast<T>(y)};
}

// The sum of the products of a pair with what is stored.
template <typename T>
__device__ float dot(const T* from, float x, float y) {
  const Pair<T> own = *reinterpret_cast<const Pair<T>*>(from);
  return x * float(own.x) + y * float(own.y);
}

template <int N>
__device__ void add(float (&to)[N][4], const float (&others)[N][4], float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[n][i] += factor * others[n][i];
  }
}

// Adds what the four threads of a row have, for both of a thread's rows, to that row's number, which no other warp has.
__device__ void add_rows(const float (&own)[2], int row, float* to) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = own[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (threadIdx.x % 4 == 0) to[row + threadIdx.x % 32 / 4 + 8 * half] += sum;
  }
}

// Adds the sums of a square's rows to their numbers, and takes those of its columns from the warp's own, which are
// added up in one order at last.
__device__ void add_rows_less_columns(const float (&square)[8][4], int row, float* to, float* columns) {
  float own[2] = {};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[0] += square[n][i], own[1] += square[n][i + 2];
      float sum = square[n][i] + square[n][i + 2];
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (threadIdx.x % 32 < 4) columns[8 * n + threadIdx.x % 4 * 2 + i] -= sum;
    }
  }
  add_rows(own, row, to);
}

// Begins to copy COUNT rows of WIDTH numbers.
template <int WIDTH, int COUNT, typename T>
__device__ void fetch(T* to, const T* from, size_t stride) {
  constexpr int VECTORS = WIDTH / 8;
  for (int i = threadIdx.x; i < COUNT * VECTORS; i += THREADS) {
    copy(to + i / VECTORS * (WIDTH + GAP) + i % VECTORS * 8, from + i / VECTORS * stride + i % VECTORS * 8);
  }
}

// The sums of the logarithms of a chunk's gates, up to each token.
struct Decays {
  float sums[CHUNK];
  __device__ void fetch(const float* from) {
    if (threadIdx.x < CHUNK / 4) copy(sums + 4 * threadIdx.x, from + 4 * threadIdx.x);
  }
  __device__ float between(int i, int j) const { return expf(sums[i] - sums[j]); }
  __device__ float before(int i) const { return expf(sums[i]); }
  __device__ float after(int i) const { return expf(sums[CHUNK - 1] - sums[i]); }
};
"""

# Of all kernels: a chunk a block, or states from chunk to chunk, and a value head; products of 16 rows a warp.
OWN = """
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int KS = DK + GAP, VS = DV + GAP, WIDE = CHUNK * (DK > DV ? KS : VS);
  const int head = blockIdx.y, row = threadIdx.x / 32 * 16;
  const size_t key_stride = size_t(H / RATIO) * DK, value_stride = size_t(H) * DV;
  Decays* decays = reinterpret_cast<Decays*>(shared);
  T* tiles = reinterpret_cast<T*>(decays + 2);
"""
# Where a chunk's numbers are: in what the kernels pass on, of keys and queries, of values, and of gates and betas.
PLACES = """
  const size_t place = (size_t(CHUNK_AT) * H + head) * CHUNK;
  const size_t of_key = CHUNK_AT * CHUNK * key_stride + head / RATIO * DK;
  const size_t of_value = CHUNK_AT * CHUNK * value_stride + head * DV;
  // Without the delta rule the updates are the values.
  const size_t of_update = DELTA ? place * DV : of_value, update_stride = DELTA ? DV : value_stride;
"""
PLACE = OWN + PLACES.replace("CHUNK_AT", "blockIdx.x") + "  Decays& decay = *decays;\n"

# W, U, T, and the sums of gates' logarithms.
PREPARE = (
    PLACE
    + """
  T *tile = tiles, *square = tile + WIDE;
  float* lower = reinterpret_cast<float*>(square + CHUNK * SQUARE);
  float *inverse = lower + CHUNK * (CHUNK + 1), *beta = inverse + CHUNK * (CHUNK + 1), *gate = beta + CHUNK;
  fetch<DK, CHUNK>(tile, keys + of_key, key_stride);
  begun();
  if (threadIdx.x < CHUNK) {
    const size_t at = size_t(blockIdx.x * CHUNK + threadIdx.x) * H + head;
    gate[threadIdx.x] = gates[at], beta[threadIdx.x] = float(betas[at]);
  }
  __syncthreads();
  if (threadIdx.x < CHUNK) {
    float sum = 0.0f;
#pragma unroll 16
    for (int j = 0; j < CHUNK; ++j) sum += j <= threadIdx.x ? gate[j] : 0.0f;
    sums[place + threadIdx.x] = decay.sums[threadIdx.x] = sum;
  }
  landed();
  float scores[8][4] = {};
  product<false, false>(scores, tile, KS, row, tile, KS, 0, DK);
  for_pairs(scores, row, 0, [&](int i, int j, int, float x, float y) {
    float *to = lower + i * (CHUNK + 1) + j, *one = inverse + i * (CHUNK + 1) + j;
    to[0] = j < i ? beta[i] * decay.between(i, j) * x : 0.0f, one[0] = i == j;
    to[1] = j + 1 < i ? beta[i] * decay.between(i, j + 1) * y : 0.0f, one[1] = i == j + 1;
  });
  __syncthreads();
  // Blocks of 16 on the diagonal, a thread a column; then those beside it, and so on.
  constexpr int S = CHUNK + 1;
  if (threadIdx.x < CHUNK) {
    const int from = threadIdx.x / 16 * 16, column = threadIdx.x % 16;
    float own[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum += lower[(from + i) * S + from + j] * own[j];
      own[i] = i > column ? -sum : float(i == column);
      inverse[(from + i) * S + threadIdx.x] = own[i];
    }
  }
  for (int apart = 16; apart < CHUNK; apart += 16) {
    // T_IJ is -T_II times the sum over K of A_IK T_KJ, which stands above the diagonal meanwhile, turned. A thread has
    // two numbers of a block's column, eight rows from each other.
    const int count = (CHUNK - apart) * 16;
    auto sums = [&](const float* rows, const float* others, int apart, int from, int end, float (&to)[2]) {
#pragma unroll 16
      for (int k = from; k < end; ++k) {
        const float other = others[k * apart];
        to[0] += rows[k] * other, to[1] += rows[8 * S + k] * other;
      }
    };
    __syncthreads();
    for (int n = threadIdx.x; n < count; n += 2 * THREADS) {
      const int i = apart + n / 16, block = i / 16 * 16, j = block - apart + n % 16;
      float found[2] = {};
      sums(lower + i * S, inverse + j, S, block - apart, block, found);
      lower[j * S + i] = found[0], lower[j * S + i + 8] = found[1];
    }
    __syncthreads();
    for (int n = threadIdx.x; n < count; n += 2 * THREADS) {
      const int i = apart + n / 16, block = i / 16 * 16, j = block - apart + n % 16;
      float found[2] = {};
      sums(inverse + i * S, lower + j * S, 1, block, block + 16, found);
      inverse[i * S + j] = -found[0], inverse[(i + 8) * S + j] = -found[1];
    }
  }
  __syncthreads();
  // Columns of T times a factor each, for products and, without one, for the backward pass.
  auto scaled = [&](T* to, int stride, auto factor) {
    for (int n = threadIdx.x; n < CHUNK * CHUNK; n += THREADS) {
      const int i = n / CHUNK, j = n % CHUNK;
      to[i * stride + j] = static_cast<T>(j <= i ? inverse[i * (CHUNK + 1) + j] * factor(j) : 0.0f);
    }
  };
  scaled(solve + place * CHUNK, CHUNK, [](int) { return 1.0f; });
  scaled(square, SQUARE, [&](int j) { return beta[j] * decay.before(j); });
  __syncthreads();
  float of_keys[DK / 8][4] = {};
  product<false, true>(of_keys, square, SQUARE, row, tile, KS, 0, CHUNK);
  __syncthreads();
  fetch<DV, CHUNK>(tile, values + of_value, value_stride);
  begun();
  for_pairs(of_keys, row, 0, [&](int i, int j, int, float x, float y) { store(reads + (place + i) * DK + j, x, y); });
  scaled(square, SQUARE, [&](int j) { return beta[j]; });
  landed();
  float of_values[DV / 8][4] = {};
  product<false, true>(of_values, square, SQUARE, row, tile, VS, 0, CHUNK);
  for_pairs(of_values, row, 0, [&](int i, int j, int, float x, float y) {
    store(writes + (place + i) * DV + j, x, y);
  });
"""
)

# A block's rows of the states, or of their gradients, from chunk to chunk: a thread's part of them stays where the sums
# of a product are, of all rows and, a warp each, a quarter of the columns. `ahead` has what the next chunk begins with.
FROM_CHUNK_TO_CHUNK = """
  constexpr int N = DK / 32, US = ROWS + GAP;
  const int first_row = blockIdx.x * ROWS, first = threadIdx.x / 32 * (DK / 4);
  const size_t own_state = ((size_t(blockIdx.z) * H + head) * DV + first_row) * DK;
  const int begin = starts[blockIdx.z], end = starts[blockIdx.z + 1];
  T *copied = tiles, *update = copied + ROWS * KS, *tile = update + CHUNK * US, *ahead = tile + CHUNK * KS;
  float state[2][N][4], kept[2][N][4];
  auto for_state = [&](auto each) {
    for (int half = 0; half < 2; ++half) for_pairs(state[half], 16 * half, first, each);
  };
  auto keep = [&](auto each) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) each(kept[half][n][i], state[half][n][i]);
      }
    }
  };
  // From nowhere, zeros.
  auto load = [&](const float* from) {
    for_state([&](int i, int j, int, float& x, float& y) {
      const float2* both = reinterpret_cast<const float2*>(from + own_state + i * DK + j);
      x = FROM_ZERO ? 0.0f : both->x, y = FROM_ZERO ? 0.0f : both->y;
    });
  };
  auto add_product = [&](const T* own, const T* other) {
    for (int half = 0; half < 2; ++half) product<true, true>(state[half], own, US, 16 * half, other, KS, first, CHUNK);
  };
  // What stands before a chunk, or behind it, for its own kernel and for the products here.
  auto tell = [&](T* to) {
    for_state([&](int i, int j, int, float x, float y) {
      store(copied + i * KS + j, x, y);
      store(to + i * DK + j, x, y);
    });
  };
"""

STATES = (
    OWN
    + FROM_CHUNK_TO_CHUNK
    + """
  auto look_ahead = [&](int n, int at) {
    const size_t place = (size_t(at) * H + head) * CHUNK;
    if (DELTA) fetch<DK, CHUNK>(ahead + n % 2 * CHUNK * KS, reads + place * DK, DK);
    decays[n % 2].fetch(sums + place);
    begun();
  };
  int at = chain[2 * begin], fork = 0;
  look_ahead(begin, at);
  load(before);
  for (int n = begin; n < end; ++n) {
    const int upcoming = min(n + 1, end - 1), next = chain[2 * upcoming], next_fork = chain[2 * upcoming + 1];
    const Decays& decay = decays[n % 2];
    PLACES
    __syncthreads();
    fetch<DK, CHUNK>(tile, keys + of_key, key_stride);
    begun();
    float own[ROWS / 8][4], read[ROWS / 8][4] = {};
    for_pairs(own, row, 0, [&](int i, int j, int, float& x, float& y) {
      const Pair<T> both = *reinterpret_cast<const Pair<T>*>(writes + of_update + i * update_stride + first_row + j);
      x = both.x, y = both.y;
    });
    if (fork == 1) keep([](float& kept, float& state) { kept = state; });
    if (fork == 2) keep([](float& kept, float& state) { state = kept; });
    tell(states + ((size_t(at) * H + head) * DV + first_row) * DK);
    landed<1>();
    if (n + 1 < end) look_ahead(n + 1, next);
    if (DELTA) product<false, false>(read, ahead + n % 2 * CHUNK * KS, KS, row, copied, KS, 0, DK);
    add(own, read, -1.0f);
    for_pairs(own, row, 0, [&](int i, int j, int, float x, float y) {
      if (DELTA) store(updates + of_update + i * update_stride + first_row + j, x, y);
      store(update + i * US + j, x * decay.after(i), y * decay.after(i));
    });
    const float whole = decay.before(CHUNK - 1);
    keep([&](float&, float& state) { state *= whole; });
    if (n + 1 < end) landed<1>(); else landed();
    add_product(update, tile);
    at = next, fork = next_fork;
  }
  for_state([&](int i, int j, int, float x, float y) { store(after + own_state + i * DK + j, x, y); });
""".replace("PLACES", PLACES.replace("CHUNK_AT", "at"))
)

# Begins to read queries; then P, of these and of the keys in `other`, and what it multiplies in the queries' place.
SCORED = """
  T *query = tiles, *square = query + WIDE, *other = square + CHUNK * SQUARE;
  decay.fetch(sums + place);
  fetch<DK, CHUNK>(query, queries + of_key, key_stride);
  auto scored = [&](const T* others, size_t stride) {
    float scores[8][4] = {};
    product<false, false>(scores, query, KS, row, other, KS, 0, DK);
    __syncthreads();
    fetch<DV, CHUNK>(query, others, stride);
    begun();
    for_pairs(scores, row, 0, [&](int i, int j, int, float x, float y) {
      x = j <= i ? decay.between(i, j) * x : 0.0f, y = j + 1 <= i ? decay.between(i, j + 1) * y : 0.0f;
      store(square + i * SQUARE + j, x, y);
    });
    landed();
  };
"""

OUTPUTS = (
    PLACE
    + SCORED
    + """
  fetch<DK, DV>(other, states + place / CHUNK * DV * DK, DK);
  begun();
  landed();
  float found[DV / 8][4] = {};
  product<false, false>(found, query, KS, row, other, KS, 0, DK);
  __syncthreads();
  fetch<DK, CHUNK>(other, keys + of_key, key_stride);
  begun();
  for_pairs(found, row, 0, [&](int i, int, int, float& x, float& y) { x *= decay.before(i), y *= decay.before(i); });
  landed();
  scored(updates + of_update, update_stride);
  product<false, true>(found, square, SQUARE, row, query, VS, 0, CHUNK);
  for_pairs(found, row, 0, [&](int i, int j, int, float x, float y) {
    store(outputs + of_value + i * value_stride + j, x, y);
  });
"""
)

# P^T dO.
OWN_SLOPES = (
    PLACE
    + SCORED
    + """
  fetch<DK, CHUNK>(other, keys + of_key, key_stride);
  begun();
  landed();
  float found[DV / 8][4] = {};
  scored(slopes + of_value, value_stride);
  product<true, true>(found, square, SQUARE, row, query, VS, 0, CHUNK);
  for_pairs(found, row, 0, [&](int i, int j, int, float x, float y) {
    store(own_slopes + (place + i) * DV + j, x, y);
  });
"""
)

# The gradients of states and updates, from the last chunk on.
STATE_SLOPES = (
    OWN
    + FROM_CHUNK_TO_CHUNK
    + """
  T *second = ahead + 2 * CHUNK * KS, *slope = second + CHUNK * KS;
  auto look_ahead = [&](int n, int at) {
    fetch<DK, CHUNK>(ahead + n % 2 * CHUNK * KS, keys + at * CHUNK * key_stride + head / RATIO * DK, key_stride);
    decays[n % 2].fetch(sums + (size_t(at) * H + head) * CHUNK);
    begun();
  };
  int at = chain[2 * end - 2], fork = chain[2 * end - 1];
  look_ahead(end - 1, at);
  load(after_slope);
  keep([](float& kept, float&) { kept = 0.0f; });
  for (int n = end - 1; n >= begin; --n) {
    const int upcoming = max(n - 1, begin), next = chain[2 * upcoming], next_fork = chain[2 * upcoming + 1];
    const Decays& decay = decays[n % 2];
    PLACES
    __syncthreads();
    fetch<ROWS, CHUNK>(slope, slopes + of_value + first_row, value_stride);
    fetch<DK, CHUNK>(tile, queries + of_key, key_stride);
    if (DELTA) fetch<DK, CHUNK>(second, reads + place * DK, DK);
    begun();
    float own[ROWS / 8][4], found[ROWS / 8][4] = {};
    for_pairs(own, row, 0, [&](int i, int j, int, float& x, float& y) {
      const Pair<T> both = *reinterpret_cast<const Pair<T>*>(own_slopes + (place + i) * DV + first_row + j);
      x = both.x, y = both.y;
    });
    tell(state_slopes + ((size_t(at) * H + head) * DV + first_row) * DK);
    landed<1>();
    if (n > begin) look_ahead(n - 1, next);
    product<false, false>(found, ahead + n % 2 * CHUNK * KS, KS, row, copied, KS, 0, DK);
    for_pairs(found, row, 0, [&](int i, int, int, float& x, float& y) { x *= decay.after(i), y *= decay.after(i); });
    add(own, found, 1.0f);
    for_pairs(own, row, 0, [&](int i, int j, int, float x, float y) {
      store(update_slopes + of_update + i * update_stride + first_row + j, x, y);
      store(update + i * US + j, -x, -y);
    });
    const float whole = decay.before(CHUNK - 1);
    keep([&](float&, float& state) { state *= whole; });
    if (n > begin) landed<1>(); else landed();
    for (int i = threadIdx.x; i < CHUNK * ROWS / 2; i += THREADS) {
      T* to = slope + i / (ROWS / 2) * US + i % (ROWS / 2) * 2;
      const float factor = decay.before(i / (ROWS / 2));
      store(to, factor * float(to[0]), factor * float(to[1]));
    }
    __syncthreads();
    add_product(slope, tile);
    if (DELTA) add_product(update, second);
    // Sequences that begin with one state: what they have of it is added up, and each ends with nothing.
    if (fork == 2) keep([](float& kept, float& state) { kept += state, state = 0.0f; });
    if (fork == 1) keep([](float& kept, float& state) { state += kept, kept = 0.0f; });
    at = next, fork = next_fork;
  }
  for_state([&](int i, int j, int, float x, float y) { store(before_slope + own_state + i * DK + j, x, y); });
""".replace("PLACES", PLACES.replace("CHUNK_AT", "at"))
)

# Of keys, values, betas and gates, through a chunk's updates.
THROUGH_UPDATES = """
    __syncthreads();
    fetch<DV, CHUNK>(first, update_slopes + place * DV, DV);
    fetch<CHUNK, CHUNK>(square, solve + place * CHUNK, CHUNK);
    begun();
    landed();
    own[0] = own[1] = 0.0f;
    {
      float found[DV / 8][4] = {};
      product<true, true>(found, square, SQUARE, row, first, VS, 0, CHUNK);
      __syncthreads();
      for_pairs(found, row, 0, [&](int i, int j, int half, float x, float y) {
        store(first + i * VS + j, x, y);
        const size_t at = of_value + i * value_stride + j;
        own[half] += dot(values + at, x, y);
        store(value_slopes + at, beta[i] * x, beta[i] * y);
      });
    }
    add_rows(own, row, of_betas);
    __syncthreads();
    fetch<DK, DV>(whole, own_states, DK);
    begun();
    {
      float scores[8][4] = {}, weights[8][4] = {};
      product<false, false>(scores, second, KS, row, second, KS, 0, DK);
      product<false, false>(weights, first, VS, row, third, VS, 0, DV);
      own[0] = own[1] = 0.0f;
      for_pairs(weights, row, 0, [&](int i, int j, int, float& x, float& y) {
        x = j < i ? -x * decay.between(i, j) : 0.0f, y = j + 1 < i ? -y * decay.between(i, j + 1) : 0.0f;
        store(square + i * SQUARE + j, beta[i] * x, beta[i] * y);
      });
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n][i] *= weights[n][i];
          own[i / 2] += scores[n][i];
          scores[n][i] *= beta[row + threadIdx.x % 32 / 4 + i / 2 * 8];
        }
      }
      add_rows(own, row, of_betas);
      add_rows_less_columns(scores, row, of_gates, columns);
    }
    landed();
    {
      float found[DK / 8][4] = {}, through[2] = {};
      product<false, true>(found, first, VS, row, whole, KS, 0, DV);
      own[0] = own[1] = 0.0f;
      for_pairs(found, row, 0, [&](int i, int j, int half, float& x, float& y) {
        x *= -decay.before(i), y *= -decay.before(i);
        own[half] += dot(second + i * KS + j, x, y);
        x *= beta[i], y *= beta[i];
      });
      for (int half = 0; half < 2; ++half) through[half] = own[half] * beta[row + threadIdx.x % 32 / 4 + 8 * half];
      add_rows(own, row, of_betas);
      add_rows(through, row, of_gates);
      add(of_keys, found, 1.0f);
    }
    product<false, true>(of_keys, square, SQUARE, row, second, KS, 0, CHUNK);
    product<true, true>(of_keys, square, SQUARE, row, second, KS, 0, CHUNK);
"""

# What is left of the gradients, each chunk's own.
TOKEN_SLOPES = (
    PLACE
    + """
  float *of_gates = reinterpret_cast<float*>(tiles), *of_betas = of_gates + CHUNK, *beta = of_betas + CHUNK;
  float *all_columns = beta + CHUNK, *columns = all_columns + threadIdx.x / 32 * CHUNK;
  T *first = reinterpret_cast<T*>(all_columns + THREADS / 32 * CHUNK), *second = first + WIDE, *third = second + WIDE;
  T *square = third + WIDE, *whole = square + CHUNK * SQUARE;
  const size_t of_slope = (size_t(blockIdx.x) * CHUNK * H + head) * DK;
  const T* own_states = states + place / CHUNK * DV * DK;
  const T* own_state_slopes = state_slopes + place / CHUNK * DV * DK;
  decay.fetch(sums + place);
  fetch<DK, CHUNK>(first, queries + of_key, key_stride);
  fetch<DK, CHUNK>(second, keys + of_key, key_stride);
  fetch<DV, CHUNK>(third, slopes + of_value, value_stride);
  fetch<DV, CHUNK>(whole, updates + of_update, update_stride);
  begun();
  if (threadIdx.x < CHUNK) {
    of_gates[threadIdx.x] = of_betas[threadIdx.x] = 0.0f;
    for (int i = 0; i < THREADS / 32; ++i) all_columns[i * CHUNK + threadIdx.x] = 0.0f;
    if (DELTA) beta[threadIdx.x] = float(betas[size_t(blockIdx.x * CHUNK + threadIdx.x) * H + head]);
  }
  landed();
  {
    float scores[8][4] = {}, weights[8][4] = {};
    product<false, false>(scores, first, KS, row, second, KS, 0, DK);
    product<false, false>(weights, third, VS, row, whole, VS, 0, DV);
    for_pairs(weights, row, 0, [&](int i, int j, int, float& x, float& y) {
      x = j <= i ? x * decay.between(i, j) : 0.0f, y = j + 1 <= i ? y * decay.between(i, j + 1) : 0.0f;
      store(square + i * SQUARE + j, x, y);
    });
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= weights[n][i];
    }
    add_rows_less_columns(scores, row, of_gates, columns);
  }
  __syncthreads();
  fetch<DK, DV>(whole, own_states, DK);
  begun();
  landed();
  {
    float found[DK / 8][4] = {}, own[2] = {};
    product<false, true>(found, third, VS, row, whole, KS, 0, DV);
    for_pairs(found, row, 0, [&](int i, int j, int half, float& x, float& y) {
      x *= decay.before(i), y *= decay.before(i);
      own[half] += dot(first + i * KS + j, x, y);
    });
    add_rows(own, row, of_gates);
    product<false, true>(found, square, SQUARE, row, second, KS, 0, CHUNK);
    for_pairs(found, row, 0, [&](int i, int j, int, float x, float y) {
      store(query_slopes + of_slope + i * (H * DK) + j, x, y);
    });
  }
  __syncthreads();
  fetch<DV, CHUNK>(third, updates + of_update, update_stride);
  fetch<DK, DV>(whole, own_state_slopes, DK);
  begun();
  float of_keys[DK / 8][4] = {}, own[2] = {}, both = 0.0f;
  for (int i = threadIdx.x; i < DV * DK; i += THREADS) both += float(own_states[i]) * float(own_state_slopes[i]);
  both *= decay.before(CHUNK - 1);
  landed();
  product<false, true>(of_keys, third, VS, row, whole, KS, 0, DV);
  for_pairs(of_keys, row, 0, [&](int i, int j, int half, float& x, float& y) {
    x *= decay.after(i), y *= decay.after(i);
    own[half] -= dot(second + i * KS + j, x, y);
  });
  add_rows(own, row, of_gates);
  both -= own[0] + own[1];
  for (int apart = 16; apart; apart /= 2) both += __shfl_xor_sync(0xffffffffu, both, apart);
  // By the lane that has this column of a square.
  if (threadIdx.x % 32 == 3) columns[CHUNK - 1] += both;
  product<true, true>(of_keys, square, SQUARE, row, first, KS, 0, CHUNK);
  if (DELTA) {
    THROUGH_UPDATES
  }
  for_pairs(of_keys, row, 0, [&](int i, int j, int, float x, float y) {
    store(key_slopes + of_slope + i * (H * DK) + j, x, y);
  });
  __syncthreads();
  if (threadIdx.x < CHUNK) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < CHUNK; ++i) {
      sum += of_gates[i];
      for (int j = 0; j < THREADS / 32; ++j) sum += all_columns[j * CHUNK + i];
    }
    const size_t at = size_t(blockIdx.x * CHUNK + threadIdx.x) * H + head;
    gate_slopes[at] = sum;
    if (DELTA) beta_slopes[at] = static_cast<B>(of_betas[threadIdx.x]);
  }
""".replace("    THROUGH_UPDATES\n", THROUGH_UPDATES)
)


def fits(key_width, value_width, dtype):
    """Whether heads of these widths are whole parts of all warps, and the GPU multiplies the dtype as it is."""
    half = dtype == mx.float16 or dtype == mx.bfloat16
    return half and capability() >= (8, 0) and all(w % 32 == 0 and w <= 128 for w in (key_width, value_width))


def order_of(parts, begun):
    """`(starts, chain)`: which chunks come one after another, of sequences in parts.

    Args:
        parts: of each part how many sequences it has, and how many chunks each of them.
        begun: whether the sequences of the first part are what those of the others begin with, in turns.

    Returns:
        starts: `(R + 1,)` int32, where in `chain` each sequence begins that begins with nothing.
        chain: `(C, 2)` int32: a chunk's number, and 1 where others too begin with the state before it, 2 where they do.
    """
    chains, before = [], 0
    for number, (rows, count) in enumerate(parts):
        for row in range(rows):
            own = [[before + row * count + i, 0] for i in range(count)]
            if number and begun:
                root = chains[row % parts[0][0]]
                own[0][1] = 2 if any(fork for _, fork in root) else 1
                root += own
            else:
                chains.append(own)
        before += rows * count
    starts = np.cumsum([0, *map(len, chains)], dtype=np.int32)
    return mx.array(starts), mx.array(np.array([step for own in chains for step in own], np.int32))


def in_rows(queries, keys, values, log_gates, betas=None, state=None):
    """As `recurrent.gated_delta_chunks`, or without betas `state_space.decayed_sums`; outputs are as `values`."""
    rows, length = values.shape[:2]
    missing = -length % CHUNK

    def whole(x):
        return (mx.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x).flatten(0, 1)

    inputs = [None if x is None else whole(x) for x in (queries, keys, values, log_gates, betas)]
    outputs, state = products(*inputs, order_of([(rows, -(-length // CHUNK))], False), state)
    return outputs.reshape(rows, -1, *outputs.shape[1:])[:, :length], state


def products(queries, keys, values, log_gates, betas, order, state=None, alone=False):
    """The gated delta rule of whole chunks, or without betas S_t = a_t S_{t-1} + v_t k_t^T.

    Args:
        queries, keys: `(64 C, Hk, Dk)`, in the dtype of `values`, such as `fits`.
        values: `(64 C, Hv, Dv)`.
        log_gates: `(64 C, Hv)`.
        betas: the same, or None.
        order: what `order_of` gives.
        state: what R sequences begin with, `(R, Hv, Dv, Dk)`, or None for zeros.
        alone: whether the outputs alone are wanted, of sequences that begin with zeros.

    Returns:
        `(outputs, state)`: `(64 C, Hv, Dv)`, and what stands behind the last chunk of each of R, `(R, Hv, Dv, Dk)`
        float32, or None.
    """
    (count, key_heads, key_width), (heads, value_width) = keys.shape, values.shape[1:]
    (starts, chain), nothing, delta = order, mx.array(0.0), betas is not None
    chunks, roots, dtype = count // CHUNK, len(starts) - 1, values.dtype
    per_key, per_value, square = (CHUNK * (width + 8) for width in (key_width, value_width, CHUNK))
    wide, part, of_block = max(per_key, per_value), CHUNK * (ROWS + 8), ROWS * (key_width + 8)
    template = {"T": dtype, "DK": key_width, "DV": value_width, "H": heads, "RATIO": heads // key_heads}
    of_keys, of_values = (((chunks, heads, CHUNK, width), dtype) for width in (key_width, value_width))
    of_updates, none = of_values if delta else (values.shape, dtype), ((1,), dtype)
    of_states = (chunks, heads, value_width, key_width), dtype
    of_roots = (roots, heads, value_width, key_width), mx.float32

    def run(name, source, inputs, outputs, numbers, **more):
        """A kernel with so many of the dtype's numbers in shared memory: of all chunks, or states along the chain."""
        if "chain" in inputs:
            more |= {"ROWS": ROWS, "FROM_ZERO": alone}
            grid = value_width // ROWS * THREADS, heads, roots
        else:
            grid = chunks * THREADS, heads, 1
        memory, more = 8 * CHUNK + 2 * numbers, template | {"DELTA": delta} | more
        return run_kernel(
            f"chunks_{name}", source, inputs, outputs, grid, THREADS, INSTRUCTIONS + HEADER, memory, **more
        )

    def prepared(keys, values, log_gates, betas, before):
        """What kernels of both passes read: inputs of all, W, T, what updates the states, and the states."""
        if delta:
            inputs = {"keys": keys, "values": values, "gates": log_gates, "betas": betas}
            outputs = {"reads": of_keys, "writes": of_values, "solve": ((chunks, heads, CHUNK, CHUNK), dtype)}
            outputs["sums"] = (chunks, heads, CHUNK), mx.float32
            numbers = wide + square + 4 * CHUNK * (CHUNK + 2)
            reads, writes, solve, sums = run("prepared", PREPARE, inputs, outputs, numbers)
        else:
            # Without the rule nothing reads what stands in place of the others.
            reads, writes, solve = keys, values, keys
            sums = mx.cumsum(log_gates.reshape(chunks, CHUNK, heads), axis=1).swapaxes(1, 2)
        common = {"keys": keys, "sums": sums}
        inputs = common | {"reads": reads, "writes": writes, "before": before, "starts": starts, "chain": chain}
        outputs = {"updates": of_values if delta else none, "states": of_states, "after": of_roots}
        updates, states, after = run("states", STATES, inputs, outputs, of_block + part + 3 * per_key)
        return common, reads, solve, updates if delta else values, states, after

    def unpacked(inputs):
        """Queries, keys, values, gates, betas or None, and the states before."""
        queries, keys, values, log_gates, *others = inputs
        return queries, keys, values, log_gates, others.pop(0) if delta else None, others[0] if others else nothing

    @mx.custom_function
    def forward(*inputs):
        queries, keys, values, log_gates, betas, before = unpacked(inputs)
        common, _, _, updates, states, after = prepared(keys, values, log_gates, betas, before)
        inputs = common | {"queries": queries, "updates": updates, "states": states}
        numbers = wide + square + max(value_width, CHUNK) * (key_width + 8)
        (out,) = run("outputs", OUTPUTS, inputs, {"outputs": (values.shape, dtype)}, numbers)
        return (out,) if alone else (out, after)

    @forward.vjp
    def backward(inputs, cotangents, _):
        queries, keys, values, log_gates, betas, before = unpacked(inputs)
        slopes, last_slope = [*cotangents, nothing][:2]
        # Computed again: kept from the forward pass they would be twice what the inputs are.
        common, reads, solve, updates, states, _ = prepared(keys, values, log_gates, betas, before)
        common |= {"queries": queries, "slopes": slopes}
        (own,) = run("own_slopes", OWN_SLOPES, common, {"own_slopes": of_values}, wide + per_key + square)
        inputs = common | {"own_slopes": own, "reads": reads, "after_slope": last_slope}
        inputs |= {"starts": starts, "chain": chain}
        outputs = {"update_slopes": of_updates, "state_slopes": of_states, "before_slope": of_roots}
        numbers = of_block + 2 * part + 4 * per_key
        update_slopes, state_slopes, first = run("state_slopes", STATE_SLOPES, inputs, outputs, numbers)
        inputs = common | {"values": values, "betas": betas if delta else log_gates, "updates": updates}
        inputs |= {"states": states, "solve": solve, "update_slopes": update_slopes, "state_slopes": state_slopes}
        # Of value heads of one key head each has a part.
        of_key = (count, heads, key_width), dtype if heads == key_heads else mx.float32
        beta = (log_gates.shape, betas.dtype) if delta else none
        outputs = {"query_slopes": of_key, "key_slopes": of_key}
        outputs["value_slopes"] = (values.shape, dtype) if delta else none
        outputs |= {"gate_slopes": (log_gates.shape, mx.float32), "beta_slopes": beta}
        numbers = 14 * CHUNK + 3 * wide + square + max(value_width * (key_width + 8), per_value)
        found = run("token_slopes", TOKEN_SLOPES, inputs, outputs, numbers, B=beta[1])
        *of_keyed, of_value, of_gate, of_beta = found
        if heads != key_heads:
            of_keyed = [x.reshape(count, key_heads, -1, key_width).sum(2).astype(dtype) for x in of_keyed]
        through = [of_value, of_gate, of_beta] if delta else [update_slopes, of_gate]
        return *of_keyed, *through, *([] if alone else [first])

    inputs = [queries, keys, values, log_gates.astype(mx.float32)] + ([betas] if delta else [])
    if not alone:
        inputs.append(mx.zeros(of_roots[0]) if state is None else state.astype(mx.float32))
    found = forward(*inputs)
    return found[0], None if alone else found[1]
