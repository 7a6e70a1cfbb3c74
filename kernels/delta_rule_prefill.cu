/*
The recurrence of prefill_delta_rule in chunks of 64 tokens, with matrix products instead of one token
after the other. Arguments as there.

prefill_delta_chunks: every factor as two f16 and three products each: as exact as f32.
prefill_delta_chunks_fast: every factor as one f16, errors of 2^-11 per product. The state is f32 in both.
  launch: grid (dv / 32, Hv), block 192, dynamic shared memory ChunkStage<dk, exact>::BYTES, or twice
          that: then the next chunk is prepared beside this one

Of a chunk, with K, Q, V its keys, queries and values as rows, S the state before it, G_i the sum of the
logarithms of decays up to token i:

  A_ij = beta_i (k_i . k_j) exp(G_i - G_j), j < i         T = (I + A)^-1
  P_ij = (q_i . k_j) exp(G_i - G_j), j <= i
  R = beta (V - exp(G) K S)                               N = T R
  O = exp(G) Q S + P N                                    S' = exp(G_63) S + (exp(G_63 - G) K)^T N

Four warps prepare T and P, which need no state, and bring K and Q as f16 terms into shared memory, while
two warps with 16 columns of the state each go through the chunk before. They hold the state transposed,
[columns, dk], in accumulators: that way accumulators are the first operand of the next product as they
are, all others come from shared memory, and the warps need nothing from each other.

|k| <= 1, |q| <= dk^-0.5, beta and decay <= 1, so |A|, |T|, |P| <= 1, and fixed powers of two keep them in
f16's range. S, R and N get one per chunk and warp. A NaN breaks all tokens of its chunk.

Source: Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3.3.
*/
#include "common.cuh"

constexpr int CHUNK = 64;   /* tokens */
constexpr int COLUMNS = 32; /* of the block */
constexpr int CONSUMERS = 64, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int V_STRIDE = COLUMNS + 4; /* floats; lanes read different banks */
constexpr int BLOCK = 16;             /* T is inverted by blocks of 16 x 16 */
constexpr int BLOCKS = CHUNK / BLOCK;

/* Powers of two that K, Q and P are multiplied by. */
constexpr float K_UP = 64.0f, Q_UP = 512.0f, P_UP = 512.0f;

/* A stage of shared memory: terms of K and Q [64, DK] and of T and P [64, 64] as rows of f16; V [64, 32] f32;
   per token the logarithm of the decay up to it, as a multiple of 2^-10 and a rest, exp of it, exp of what
   is left to the chunk's end, and beta. */
template <int DK, bool EXACT>
struct ChunkStage {
  static constexpr int TERMS = EXACT ? 2 : 1;
  static constexpr int ROWS_BYTES = CHUNK * DK * 2, SQUARE_BYTES = CHUNK * CHUNK * 2; /* of a term */
  static constexpr int K = 0;
  static constexpr int Q = K + TERMS * ROWS_BYTES;
  static constexpr int T = Q + TERMS * ROWS_BYTES;
  static constexpr int P = T + TERMS * SQUARE_BYTES;
  static constexpr int V = P + TERMS * SQUARE_BYTES;
  static constexpr int LOG = V + CHUNK * V_STRIDE * 4;
  static constexpr int LOG_REST = LOG + CHUNK * 4;
  static constexpr int DECAY = LOG_REST + CHUNK * 4;
  static constexpr int REST = DECAY + CHUNK * 4;
  static constexpr int BETA = REST + CHUNK * 4;
  static constexpr int BYTES = BETA + CHUNK * 4; /* dk 128: exact 108,800, fast 59,648 */
};

/* Two accumulator tiles of 8 columns, or values in their place, as terms of an A operand. */
template <bool EXACT>
struct Operand {
  uint32_t high[4], low[4];

  __device__ __forceinline__ void set(int i, float x, float y) {
    high[i] = round_f16x2(x, y);
    if (EXACT)
      low[i] = round_f16x2(x - f16_to_f32((uint16_t)high[i]), y - f16_to_f32((uint16_t)(high[i] >> 16)));
  }
  __device__ __forceinline__ void set(const float (&c)[4], const float (&d)[4], float up) {
    set(0, c[0] * up, c[1] * up);
    set(1, c[2] * up, c[3] * up);
    set(2, d[0] * up, d[1] * up);
    set(3, d[2] * up, d[3] * up);
  }
};

/* Rows of f16 in shared memory, of which chunks of 16 bytes are moved so that eight rows' are in different
   banks. `term_bytes` lie between the terms. */
template <int COLS, bool EXACT>
struct Rows {
  static constexpr int CHUNKS = COLS / 8;
  uint8_t *at;
  int term_bytes;

  __device__ __forceinline__ uint8_t *chunk(int row, int chunk) const {
    return at + row * COLS * 2 + (chunk ^ (row & 7 & (CHUNKS - 1))) * 16;
  }
  /* Terms of x and y, neighbours from an even column on. */
  __device__ __forceinline__ void store(int row, int col, float x, float y) const {
    uint32_t *to = (uint32_t *)(chunk(row, col / 8) + col % 8 * 2);
    Operand<EXACT> terms;
    terms.set(0, x, y);
    *to = terms.high[0];
    if (EXACT) *(uint32_t *)((uint8_t *)to + term_bytes) = terms.low[0];
  }
  /* The same of four neighbours from a multiple of 4 on. */
  __device__ __forceinline__ void store(int row, int col, float4 x) const {
    uint2 *to = (uint2 *)(chunk(row, col / 8) + col % 8 * 2);
    Operand<EXACT> terms;
    terms.set(0, x.x, x.y);
    terms.set(1, x.z, x.w);
    *to = make_uint2(terms.high[0], terms.high[1]);
    if (EXACT) *(uint2 *)((uint8_t *)to + term_bytes) = make_uint2(terms.low[0], terms.low[1]);
  }
  /* The 16 x 16 block at (row, col) as an A operand. */
  __device__ __forceinline__ void load(Operand<EXACT> &a, int row, int col) const {
    const int lane = threadIdx.x % 32;
    const uint8_t *from = chunk(row + lane % 16, col / 8 + lane / 16);
    ldmatrix_x4(a.high, from);
    if (EXACT) ldmatrix_x4(a.low, from + term_bytes);
  }
};

/* c[0], c[1] += a B for two tiles of 8 columns of B, whose fragments lie one after the other in b. */
__device__ __forceinline__ void multiply_pair(float (&c)[4], float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[4]) {
  mma_f16(c, a, b[0], b[1]);
  mma_f16(d, a, b[2], b[3]);
}

/* c, d += a X^T: X the 16 x 16 block at (row, col), whose rows are the product's columns. */
template <int COLS, bool EXACT>
__device__ __forceinline__ void multiply_rows(float (&c)[4], float (&d)[4], const Operand<EXACT> &a,
                                              const Rows<COLS, EXACT> &x, int row, int col) {
  const int lane = threadIdx.x % 32;
  const uint8_t *from = x.chunk(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2);
  uint32_t b[4];
  ldmatrix_x4(b, from);
  multiply_pair(c, d, a.high, b);
  if (!EXACT) return;
  multiply_pair(c, d, a.low, b);
  ldmatrix_x4(b, from + x.term_bytes);
  multiply_pair(c, d, a.high, b);
}

/* c, d += a X: X the block at (row, col). */
template <int COLS, bool EXACT>
__device__ __forceinline__ void multiply_columns(float (&c)[4], float (&d)[4], const Operand<EXACT> &a,
                                                 const Rows<COLS, EXACT> &x, int row, int col) {
  const int lane = threadIdx.x % 32;
  const uint8_t *from = x.chunk(row + lane % 16, col / 8 + lane / 16);
  uint32_t b[4];
  ldmatrix_x4_trans(b, from);
  multiply_pair(c, d, a.high, b);
  if (!EXACT) return;
  multiply_pair(c, d, a.low, b);
  ldmatrix_x4_trans(b, from + x.term_bytes);
  multiply_pair(c, d, a.high, b);
}

/* The power of two that brings `largest` to [2^target, 2^(target + 1)); within 2^-60 .. 2^60. */
__device__ __forceinline__ float power_of_two_to(float largest, int target) {
  const int exponent = target + 127 - (int)(__float_as_uint(largest) >> 23 & 0xff);
  return __uint_as_float((uint32_t)(min(max(exponent, -60), 60) + 127) << 23);
}

/* What the block works on. */
struct Problem {
  const float *q, *k, *v, *decay, *beta;
  float *state, *o;
  int tokens, num_key_heads, num_value_heads, dv;
  int head, key_head, first_column;
};

/* All threads: a chunk is ready, and the one before it is done. */
__device__ __forceinline__ void block_sync() { __syncthreads(); }

/* ---- the preparing warps ---- */

template <int DK, bool EXACT>
struct Producer {
  typedef ChunkStage<DK, EXACT> Stage;
  static constexpr int LOADS = CHUNK * DK / 4 / PRODUCERS; /* of a thread, 16 bytes each, of K and of Q */
  static constexpr int STEP = PRODUCERS / (DK / 4); /* rows from one load to the next */
  static constexpr int SYNC = 1;

  const Problem &p;
  int tid, warp, lane, row, col; /* of the thread's first load */
  float4 keys[LOADS], queries[LOADS]; /* of the next chunk, on their way */
  float decays[2], betas[2];          /* of warp 0: tokens 2 lane and 2 lane + 1 */

  __device__ __forceinline__ Producer(const Problem &problem) : p(problem) {
    tid = threadIdx.x - CONSUMERS, warp = tid / 32, lane = tid % 32;
    row = tid / (DK / 4), col = tid % (DK / 4) * 4;
  }

  /* A thread's part of rows of q or k. */
  __device__ __forceinline__ void ask(float4 (&to)[LOADS], const float *rows, int chunk) {
    const int64_t stride = (int64_t)p.num_key_heads * DK;
    int token = chunk * CHUNK + row;
    rows += token * stride + p.key_head * DK + col;
#pragma unroll
    for (int n = 0; n < LOADS; n++) {
      to[n] = token < p.tokens ? *(const float4 *)rows : make_float4(0, 0, 0, 0);
      rows += STEP * stride, token += STEP;
    }
  }

  /* Tokens past the end change nothing: decay 1, beta 0. */
  __device__ __forceinline__ void ask_for_gates(int chunk) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = chunk * CHUNK + 2 * lane + i;
      const bool valid = warp == 0 && token < p.tokens;
      const int64_t at = (int64_t)token * p.num_value_heads + p.head;
      decays[i] = valid ? p.decay[at] : 1.0f;
      betas[i] = valid ? p.beta[at] : 0.0f;
    }
  }

  __device__ __forceinline__ void ask_for_first() {
    ask(keys, p.k, 0);
    ask_for_gates(0);
    ask(queries, p.q, 0);
  }

  __device__ __forceinline__ void ask_for_values(uint8_t *stage, int chunk) {
    const int value_dim = p.num_value_heads * p.dv;
#pragma unroll
    for (int n = 0; n < CHUNK * COLUMNS / 4 / PRODUCERS; n++) {
      const int i = tid + n * PRODUCERS, row = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
      const int token = chunk * CHUNK + row;
      const bool valid = token < p.tokens;
      const int64_t at = valid ? (int64_t)token * value_dim + p.head * p.dv + p.first_column + c : 0;
      cp_async16(stage + Stage::V + (row * V_STRIDE + c) * 4, p.v + at, valid);
    }
    cp_async_commit();
  }

  /* Sums of the decays' logarithms. As a multiple of 2^-10, whose sums are exact, and a small rest, because
     differences of large sums are needed to f32's precision. */
  __device__ __forceinline__ void write_gates(uint8_t *stage) {
    float whole[2], rest[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float log = logf(decays[i] < 1e-38f ? 1e-38f : decays[i]);
      whole[i] = rintf(log * 1024.0f) * (1.0f / 1024.0f);
      rest[i] = log - whole[i];
    }
    float sum = whole[0] + whole[1], sum_rest = rest[0] + rest[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, sum, offset);
      const float before_rest = __shfl_up_sync(0xffffffffu, sum_rest, offset);
      if (lane >= offset) sum += before, sum_rest += before_rest;
    }
    const float all = __shfl_sync(0xffffffffu, sum, 31), all_rest = __shfl_sync(0xffffffffu, sum_rest, 31);
    const float first = sum - whole[1], first_rest = sum_rest - rest[1];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = (2 * lane + i) * 4;
      const float g = i == 0 ? first : sum, g_rest = i == 0 ? first_rest : sum_rest;
      *(float *)(stage + Stage::LOG + at) = g;
      *(float *)(stage + Stage::LOG_REST + at) = g_rest;
      *(float *)(stage + Stage::DECAY + at) = expf(g + g_rest);
      *(float *)(stage + Stage::REST + at) = expf((all - g) + (all_rest - g_rest));
      *(float *)(stage + Stage::BETA + at) = betas[i];
    }
  }

  /*
  Rows 16 b .. of K K^T or Q K^T, times decays. Q: goes to P. K: times beta, and below the diagonal, to T; there
  block (b, m) of A lies where block (m, b) of T would be, which is zero and never read.
  */
  template <bool IS_Q>
  __device__ __forceinline__ void write_scores(uint8_t *stage, int b) {
    const Rows<DK, EXACT> k = {stage + Stage::K, Stage::ROWS_BYTES};
    const Rows<DK, EXACT> rows = {stage + (IS_Q ? Stage::Q : Stage::K), Stage::ROWS_BYTES};
    const Rows<CHUNK, EXACT> out = {stage + (IS_Q ? Stage::P : Stage::T), Stage::SQUARE_BYTES};
    const float *log = (const float *)(stage + Stage::LOG);
    const float *log_rest = (const float *)(stage + Stage::LOG_REST);
    const float *betas = (const float *)(stage + Stage::BETA);
    float c[2 * BLOCKS][4] = {};
#pragma unroll 2
    for (int j = 0; j < DK; j += 16) {
      Operand<EXACT> a;
      rows.load(a, 16 * b, j);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++)
        if (m <= b) multiply_rows(c[2 * m], c[2 * m + 1], a, k, 16 * m, j);
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 16 * b + g + 8 * r;
      const float log_row = log[row], log_rest_row = log_rest[row];
      const float factor = IS_Q ? P_UP / (Q_UP * K_UP) : betas[row] / (K_UP * K_UP);
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; n++) {
        const int m = n / 2;
        if (m > b) break;
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int col = 8 * n + 2 * t + e;
          const bool there = IS_Q ? col <= row : col < row;
          const float decay = expf((log_row - log[col]) + (log_rest_row - log_rest[col]));
          x[e] = there ? c[n][2 * r + e] * factor * decay : 0.0f;
        }
        const bool moved = !IS_Q && m < b;
        const int to_row = moved ? 16 * m + g + 8 * r : row;
        const int to_col = moved ? 16 * b + 8 * (n % 2) + 2 * t : 8 * n + 2 * t;
        out.store(to_row, to_col, x[0], x[1]);
      }
    }
  }

  /* (I + A)^-1 of the diagonal block b, a column per lane; lanes 16 .. do the same again. */
  __device__ __forceinline__ void invert_block(uint8_t *stage, int b) {
    const Rows<CHUNK, EXACT> t = {stage + Stage::T, Stage::SQUARE_BYTES};
    const int c = lane % 16;
    float x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      float sum[2] = {i == c ? 1.0f : 0.0f, 0.0f};
#pragma unroll
      for (int chunk = 0; chunk < 2; chunk++) {
        if (8 * chunk >= i) break;
        const uint8_t *from = t.chunk(BLOCK * b + i, 2 * b + chunk);
        const uint4 high = *(const uint4 *)from;
        const uint4 low = EXACT ? *(const uint4 *)(from + t.term_bytes) : make_uint4(0, 0, 0, 0);
        const uint32_t highs[4] = {high.x, high.y, high.z, high.w}, lows[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (8 * chunk + j >= i) break;
          float a = f16_to_f32((uint16_t)(highs[j / 2] >> 16 * (j % 2)));
          if (EXACT) a += f16_to_f32((uint16_t)(lows[j / 2] >> 16 * (j % 2)));
          sum[j % 2] = fmaf(-a, x[8 * chunk + j], sum[j % 2]);
        }
      }
      x[i] = sum[0] + sum[1];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      /* Neighbouring columns are stored together. */
      const float other = __shfl_xor_sync(0xffffffffu, x[i], 1);
      if (lane < 16 && c % 2 == 0) t.store(BLOCK * b + i, BLOCK * b + c, x[i], other);
    }
  }

  /* Blocks of T below the diagonal one of block column c: T_rc = -T_rr sum_m A_rm T_mc. */
  __device__ __forceinline__ void invert_below(uint8_t *stage, int c) {
    const Rows<CHUNK, EXACT> t = {stage + Stage::T, Stage::SQUARE_BYTES};
    const int g = lane / 4, u = lane % 4;
    for (int r = c + 1; r < BLOCKS; r++) {
      Operand<EXACT> diagonal;
      t.load(diagonal, BLOCK * r, BLOCK * r);
      float x[2][4] = {};
      for (int m = c; m < r; m++) {
        float e[2][4] = {};
        multiply_columns(e[0], e[1], diagonal, t, BLOCK * m, BLOCK * r); /* A_rm */
        Operand<EXACT> a;
        a.set(e[0], e[1], -1.0f);
        multiply_columns(x[0], x[1], a, t, BLOCK * m, BLOCK * c);
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          t.store(BLOCK * r + g + 8 * half, BLOCK * c + 8 * n + 2 * u, x[n][2 * half], x[n][2 * half + 1]);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void store(const Rows<DK, EXACT> &to, const float4 (&from)[LOADS], float up) {
#pragma unroll
    for (int n = 0; n < LOADS; n++) {
      const float4 x = from[n];
      to.store(row + n * STEP, col, make_float4(x.x * up, x.y * up, x.z * up, x.w * up));
    }
  }

  __device__ __forceinline__ void prepare(uint8_t *stage, int chunk, int num_chunks) {
    const Rows<DK, EXACT> k = {stage + Stage::K, Stage::ROWS_BYTES}, q = {stage + Stage::Q, Stage::ROWS_BYTES};
    ask_for_values(stage, chunk);
    store(k, keys, K_UP);
    if (warp == 0) write_gates(stage);
    store(q, queries, Q_UP);
    if (chunk + 1 < num_chunks) {
      ask(keys, p.k, chunk + 1);
      ask_for_gates(chunk + 1);
    }
    group_sync<PRODUCERS>(SYNC); /* K, Q and gates are there */
    write_scores<false>(stage, warp);
    write_scores<true>(stage, BLOCKS - 1 - warp);
    __syncwarp();
    invert_block(stage, warp); /* from what this warp wrote */
    group_sync<PRODUCERS>(SYNC); /* all of A and the diagonal blocks are there */
    invert_below(stage, warp);
    /* Last, because registers are scarce. */
    if (chunk + 1 < num_chunks) ask(queries, p.q, chunk + 1);
    cp_async_wait<0>();
  }
};

/* ---- the warps that hold the state ---- */

template <int DK, bool EXACT>
struct Consumer {
  typedef ChunkStage<DK, EXACT> Stage;
  const Problem &p;
  int g, t, column; /* rows g and g + 8 of accumulators are columns `column` and + 8 of the block */
  float s[DK / 8][4];
  float largest; /* of the warp's state */

  __device__ __forceinline__ Consumer(const Problem &problem) : p(problem) {
    const int lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4, column = threadIdx.x / 32 * 16 + g;
  }

  __device__ __forceinline__ float2 *state(int n, int half) const {
    const int64_t row = (int64_t)p.head * p.dv + p.first_column + column + 8 * half;
    return (float2 *)(p.state + row * DK + 8 * n + 2 * t);
  }
  __device__ __forceinline__ void load_state() {
#pragma unroll
    for (int n = 0; n < DK / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 x = *state(n, half);
        s[n][2 * half] = x.x, s[n][2 * half + 1] = x.y;
      }
    find_largest();
  }
  __device__ __forceinline__ void store_state() const {
#pragma unroll
    for (int n = 0; n < DK / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *state(n, half) = make_float2(s[n][2 * half], s[n][2 * half + 1]);
  }
  __device__ __forceinline__ void find_largest() {
    largest = 0.0f;
#pragma unroll
    for (int n = 0; n < DK / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) largest = fmaxf(largest, fabsf(s[n][e]));
    largest = warp_max(largest);
  }

  __device__ __forceinline__ void step(const uint8_t *stage_of_chunk, int chunk) {
    uint8_t *stage = (uint8_t *)stage_of_chunk;
    const Rows<DK, EXACT> k = {stage + Stage::K, Stage::ROWS_BYTES}, q = {stage + Stage::Q, Stage::ROWS_BYTES};
    const Rows<CHUNK, EXACT> inverse = {stage + Stage::T, Stage::SQUARE_BYTES};
    const Rows<CHUNK, EXACT> scores = {stage + Stage::P, Stage::SQUARE_BYTES};
    const float *v = (const float *)(stage + Stage::V);
    const float *decays = (const float *)(stage + Stage::DECAY);
    const float *rests = (const float *)(stage + Stage::REST);
    const float *betas = (const float *)(stage + Stage::BETA);

    /* x = S K^T, y = S Q^T: [columns, tokens] */
    const float s_up = power_of_two_to(largest, 13);
    float x[CHUNK / 8][4] = {}, y[CHUNK / 8][4] = {};
#pragma unroll
    for (int j = 0; j < DK / 16; j++) {
      Operand<EXACT> a;
      a.set(s[2 * j], s[2 * j + 1], s_up);
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) {
        multiply_rows(x[2 * n], x[2 * n + 1], a, k, 16 * n, 16 * j);
        multiply_rows(y[2 * n], y[2 * n + 1], a, q, 16 * n, 16 * j);
      }
    }

    /* x becomes R. */
    const float x_down = 1.0f / (K_UP * s_up);
    float largest_r = 0.0f;
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = 8 * n + 2 * t + e % 2;
        const float value = v[token * V_STRIDE + column + e / 2 * 8];
        x[n][e] = betas[token] * fmaf(-decays[token] * x_down, x[n][e], value);
        largest_r = fmaxf(largest_r, fabsf(x[n][e]));
      }
    /* |N| <= 64 |R| stays in range; the state in R's unit, too. */
    const float r_up = power_of_two_to(fmaxf(warp_max(largest_r), largest * 0x1p-30f), 8);
    Operand<EXACT> r[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) r[j].set(x[2 * j], x[2 * j + 1], r_up);

    /* x becomes N, in R's unit. */
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) x[2 * n][e] = x[2 * n + 1][e] = 0.0f;
#pragma unroll
      for (int j = 0; j <= n; j++)
        multiply_rows(x[2 * n], x[2 * n + 1], r[j], inverse, 16 * n, 16 * j);
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) r[j].set(x[2 * j], x[2 * j + 1], 1.0f);

    /* y becomes O. */
    const float y_up = r_up / s_up * (P_UP / Q_UP), o_down = 1.0f / (r_up * P_UP);
    const int64_t value_dim = (int64_t)p.num_value_heads * p.dv;
    float *o = p.o + (int64_t)chunk * CHUNK * value_dim + p.head * p.dv + p.first_column + column;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          y[2 * n + half][e] *= decays[16 * n + 8 * half + 2 * t + e % 2] * y_up;
#pragma unroll
      for (int j = 0; j <= n; j++)
        multiply_rows(y[2 * n], y[2 * n + 1], r[j], scores, 16 * n, 16 * j);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int token = 16 * n + 8 * half + 2 * t + e % 2;
          if (chunk * CHUNK + token < p.tokens)
            o[token * value_dim + e / 2 * 8] = y[2 * n + half][e] * o_down;
        }
    }

    /* The state, in the unit of N and K meanwhile. */
    const float s_scale = decays[CHUNK - 1] * (r_up * K_UP), s_down = 1.0f / (r_up * K_UP);
#pragma unroll
    for (int n = 0; n < DK / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= s_scale;
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          x[2 * j + half][e] *= rests[16 * j + 8 * half + 2 * t + e % 2];
      Operand<EXACT> a;
      a.set(x[2 * j], x[2 * j + 1], 1.0f);
#pragma unroll
      for (int n = 0; n < DK / 16; n++)
        multiply_columns(s[2 * n], s[2 * n + 1], a, k, 16 * j, 16 * n);
    }
#pragma unroll
    for (int n = 0; n < DK / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= s_down;
    find_largest();
  }
};

/* ---- the kernels ---- */

template <int DK, bool EXACT>
__device__ __forceinline__ void delta_chunks(uint8_t *smem, const Problem &problem) {
  constexpr int STAGE_BYTES = ChunkStage<DK, EXACT>::BYTES;
  const int chunks = (problem.tokens + CHUNK - 1) / CHUNK;
  /* With two stages chunk i is prepared beside chunk i - 1, with one before it is gone through. */
  const int stages = dynamic_smem_bytes() >= 2 * STAGE_BYTES ? 2 : 1, behind = stages - 1;
  if (threadIdx.x >= CONSUMERS) {
    Producer<DK, EXACT> producer(problem);
    producer.ask_for_first();
    for (int i = 0; i < chunks + behind; i++) {
      if (i < chunks) producer.prepare(smem + i % stages * STAGE_BYTES, i, chunks);
      if (!behind) block_sync();
      block_sync();
    }
  } else {
    Consumer<DK, EXACT> consumer(problem);
    consumer.load_state();
    for (int i = 0; i < chunks + behind; i++) {
      if (!behind) block_sync();
      if (i >= behind) consumer.step(smem + (i - behind) % stages * STAGE_BYTES, i - behind);
      block_sync();
    }
    consumer.store_state();
  }
}

template <bool EXACT>
__device__ __forceinline__ void run(uint8_t *smem, const Problem &problem, int dk) {
  launch_next_kernel();
  wait_for_previous_kernels();
  if (dk == 128) delta_chunks<128, EXACT>(smem, problem);
  else if (dk == 64) delta_chunks<64, EXACT>(smem, problem);
  else delta_chunks<32, EXACT>(smem, problem);
}

#define PROBLEM                                                                                     \
  {q, k, v, decay, beta, state, o, tokens, num_key_heads, num_value_heads, dv, (int)blockIdx.y,     \
   (int)blockIdx.y / (num_value_heads / num_key_heads), (int)blockIdx.x * COLUMNS}

KERNEL __launch_bounds__(THREADS, 1)
    prefill_delta_chunks(const float *q, const float *k, const float *v, const float *decay,
                         const float *beta, float *state, float *o, int tokens, int num_key_heads,
                         int num_value_heads, int dk, int dv) {
  DYNAMIC_SMEM(smem);
  const Problem problem = PROBLEM;
  run<true>(smem, problem, dk);
}
EXPORT(prefill_delta_chunks)

KERNEL __launch_bounds__(THREADS, 1)
    prefill_delta_chunks_fast(const float *q, const float *k, const float *v, const float *decay,
                              const float *beta, float *state, float *o, int tokens, int num_key_heads,
                              int num_value_heads, int dk, int dv) {
  DYNAMIC_SMEM(smem);
  const Problem problem = PROBLEM;
  run<false>(smem, problem, dk);
}
EXPORT(prefill_delta_chunks_fast)
