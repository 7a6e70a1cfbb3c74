/*
The recurrence of prefill_delta_rule in chunks of 64 tokens, with matrix products instead of one token
after the other: for a range of tokens, prefill_delta_prepare, then prefill_delta_chunks; for the next range
again.

Of a chunk, with K, Q, V its keys, queries and values as rows, S the state before it, G_i the sum of the
logarithms of decays up to token i:

  A_ij = beta_i (k_i . k_j) exp(G_i - G_j), j < i         T = (I + A)^-1
  P_ij = (q_i . k_j) exp(G_i - G_j), j <= i
  R = beta (V - exp(G) K S)                               N = T R
  O = exp(G) Q S + P N                                    S' = exp(G_63) S + (exp(G_63 - G) K)^T N

prefill_delta_prepare: what needs no state, for all chunks of the range at once.
  q, k, decay, beta as in prefill_delta_rule -> scratch: of each chunk and key head K and Q, of each chunk
  and value head T, P, exp(G), exp(G_63 - G) and beta, as they are to lie in shared memory
  launch: grid (ceil(tokens / 64), Hk), block 128, dynamic shared memory PREPARE_BYTES
prefill_delta_chunks: one chunk after the other.
  v, scratch, state -> state, o
  launch: grid (dv / 32, Hv), block 128, dynamic shared memory BYTES of a stage, or twice that: then the next
  chunk arrives beside this one

Factors are sums of two f16, "terms", with three products each: as exact as f32. With q and k of one term, the
same everywhere, greedy tokens of a golden changed on an H200.

Two warps with 16 columns of the state each hold it transposed, [columns, dk], in accumulators: that way
accumulators are the first operand of the next product as they are, all others come from shared memory, and
the warps need nothing from each other. The other two copy.

|k| <= 1, |q| <= dk^-0.5, beta and decay <= 1, so |A|, |T|, |P| <= 1, and fixed powers of two keep them in
f16's range. S, R and N get one per chunk and warp. A NaN breaks all tokens of its chunk.

Source: Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3.3.
*/
#include "common.cuh"
#include "delta_rule_prefill.cuh"

/* The power of two that brings `largest` to [2^target, 2^(target + 1)); within 2^-60 .. 2^60. */
__device__ __forceinline__ float power_of_two_to(float largest, int target) {
  const int exponent = target + 127 - (int)(__float_as_uint(largest) >> 23 & 0xff);
  return __uint_as_float((uint32_t)(min(max(exponent, -60), 60) + 127) << 23);
}

/* Copies `bytes`, a multiple of 16, from shared memory. */
__device__ __forceinline__ void copy_out(uint8_t *to, const uint8_t *from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) *(uint4 *)(to + i) = *(const uint4 *)(from + i);
}

/* ---- prefill_delta_prepare ---- */

template <int DK>
struct Prepare {
  typedef Stage<DK> S;
  uint8_t *smem;
  int warp, lane;

  __device__ __forceinline__ Rows<DK> keys() const { return {smem + S::K}; }
  __device__ __forceinline__ Rows<DK> queries() const { return {smem + S::Q}; }
  __device__ __forceinline__ Rows<CHUNK> inverse() const { return {smem + S::T}; }
  __device__ __forceinline__ Rows<CHUNK> scores() const { return {smem + S::P}; }
  __device__ __forceinline__ float *gates(int at) const { return (float *)(smem + at); }

  /* Rows of q or k, zeros from `count` on. */
  __device__ __forceinline__ void fill(const Rows<DK> &to, const float *from, int64_t stride, int count,
                                       float up) {
    constexpr int STEP = THREADS / (DK / 4); /* rows from one load to the next */
    const int first = threadIdx.x / (DK / 4), col = threadIdx.x % (DK / 4) * 4;
#pragma unroll 8
    for (int row = first; row < CHUNK; row += STEP) {
      const float4 x = row < count ? *(const float4 *)(from + row * stride + col) : make_float4(0, 0, 0, 0);
      to.store(row, col, make_float4(x.x * up, x.y * up, x.z * up, x.w * up));
    }
  }

  /* Sums of the decays' logarithms, by one warp, a lane two tokens. As a multiple of 2^-10, whose sums are
     exact, and a small rest, because differences of large sums are needed to f32's precision. Tokens past
     the end change nothing: decay 1, beta 0. */
  __device__ __forceinline__ void write_gates(const float *decay, const float *beta, int stride, int count) {
    float whole[2], rest[2], betas[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = 2 * lane + i;
      const float d = token < count ? decay[(int64_t)token * stride] : 1.0f;
      betas[i] = token < count ? beta[(int64_t)token * stride] : 0.0f;
      const float log = logf(d < 1e-38f ? 1e-38f : d);
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
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = 2 * lane + i;
      const float g = i == 0 ? sum - whole[1] : sum, g_rest = i == 0 ? sum_rest - rest[1] : sum_rest;
      gates(S::LOG)[token] = g;
      gates(S::LOG_REST)[token] = g_rest;
      gates(S::DECAY)[token] = expf(g + g_rest);
      gates(S::REST)[token] = expf((all - g) + (all_rest - g_rest));
      gates(S::BETA)[token] = betas[i];
    }
  }

  /* The warp's 16 rows of K K^T and Q K^T. */
  __device__ __forceinline__ void multiply(float (&kk)[2 * BLOCKS][4], float (&qk)[2 * BLOCKS][4]) {
#pragma unroll 2
    for (int j = 0; j < DK; j += 16) {
      Operand k, q;
      keys().load(k, BLOCK * warp, j);
      queries().load(q, BLOCK * warp, j);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        multiply_rows(kk[2 * m], kk[2 * m + 1], k, keys(), BLOCK * m, j);
        multiply_rows(qk[2 * m], qk[2 * m + 1], q, keys(), BLOCK * m, j);
      }
    }
  }

  /* From these the warp's rows of A, in the place of T, and of P. Block (b, m) of A lies where block (m, b) of
     T would be, which is zero and never read. */
  __device__ __forceinline__ void write_scores(const float (&kk)[2 * BLOCKS][4],
                                               const float (&qk)[2 * BLOCKS][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int in_block = g + 8 * r, row = BLOCK * warp + in_block;
      const float log_row = gates(S::LOG)[row], log_rest_row = gates(S::LOG_REST)[row];
      const float k_down = gates(S::BETA)[row] / (K_UP * K_UP), q_down = P_UP / (Q_UP * K_UP);
#pragma unroll
      for (int n = 0; n < 2 * BLOCKS; n++) {
        float a[2], p[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int col = 8 * n + 2 * t + e;
          const float decay =
              __expf((log_row - gates(S::LOG)[col]) + (log_rest_row - gates(S::LOG_REST)[col]));
          a[e] = col < row ? kk[n][2 * r + e] * k_down * decay : 0.0f;
          p[e] = col <= row ? qk[n][2 * r + e] * q_down * decay : 0.0f;
        }
        const int m = n / 2, col = 8 * n + 2 * t;
        if (m > warp) continue;
        scores().store(row, col, p[0], p[1]);
        if (m < warp)
          inverse().store(BLOCK * m + in_block, BLOCK * warp + col % BLOCK, a[0], a[1]);
        else
          inverse().store(row, col, a[0], a[1]);
      }
    }
  }

  /* (I + A)^-1 of the warp's diagonal block, a column per lane; lanes 16 .. do the same again. */
  __device__ __forceinline__ void invert_block() {
    const Rows<CHUNK> t = inverse();
    const int c = lane % 16;
    float x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
      float sum[2] = {i == c ? 1.0f : 0.0f, 0.0f};
#pragma unroll
      for (int chunk = 0; chunk < 2; chunk++) {
        if (8 * chunk >= i) break;
        const uint8_t *from = t.chunk(BLOCK * warp + i, 2 * warp + chunk);
        const uint4 high = *(const uint4 *)from, low = *(const uint4 *)(from + t.TERM_BYTES);
        const uint32_t highs[4] = {high.x, high.y, high.z, high.w}, lows[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (8 * chunk + j >= i) break;
          const float a = f16_to_f32((uint16_t)(highs[j / 2] >> 16 * (j % 2))) +
                          f16_to_f32((uint16_t)(lows[j / 2] >> 16 * (j % 2)));
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
      if (lane < 16 && c % 2 == 0) t.store(BLOCK * warp + i, BLOCK * warp + c, x[i], other);
    }
  }

  /* Blocks of T below the diagonal, of the warp's block column c: T_rc = -T_rr sum_m A_rm T_mc. */
  __device__ __forceinline__ void invert_below() {
    const Rows<CHUNK> t = inverse();
    const int c = warp, g = lane / 4, u = lane % 4;
    for (int r = c + 1; r < BLOCKS; r++) {
      Operand diagonal;
      t.load(diagonal, BLOCK * r, BLOCK * r);
      float x[2][4] = {};
      for (int m = c; m < r; m++) {
        float e[2][4] = {};
        multiply_columns(e[0], e[1], diagonal, t, BLOCK * m, BLOCK * r); /* A_rm */
        Operand a;
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

  __device__ __forceinline__ void run(const float *q, const float *k, const float *decay, const float *beta,
                                      uint8_t *scratch, int first_token, int tokens, int num_key_heads,
                                      int num_value_heads) {
    const int chunk = blockIdx.x, key_head = blockIdx.y, share = num_value_heads / num_key_heads;
    const int64_t token = first_token + chunk * CHUNK;
    const int count = min(CHUNK, tokens - chunk * CHUNK);
    const int64_t stride = (int64_t)num_key_heads * DK, at = token * stride + key_head * DK;
    fill(keys(), k + at, stride, count, K_UP);
    fill(queries(), q + at, stride, count, Q_UP);
    __syncthreads();
    float kk[2 * BLOCKS][4] = {}, qk[2 * BLOCKS][4] = {};
    multiply(kk, qk);
    copy_out(scratch + ((int64_t)chunk * num_key_heads + key_head) * S::KEY_IMAGE, smem, S::KEY_IMAGE);
    scratch += (int64_t)gridDim.x * num_key_heads * S::KEY_IMAGE;
    for (int head = key_head * share; head < (key_head + 1) * share; head++) {
      const int64_t gate = token * num_value_heads + head;
      if (warp == 0) write_gates(decay + gate, beta + gate, num_value_heads, count);
      __syncthreads();
      write_scores(kk, qk);
      __syncwarp();
      invert_block(); /* of what this warp wrote */
      __syncthreads();
      invert_below();
      __syncthreads();
      copy_out(scratch + ((int64_t)chunk * num_value_heads + head) * S::HEAD_IMAGE, smem + S::T, S::HEAD_IMAGE);
      __syncthreads();
    }
  }
};

/* ---- prefill_delta_chunks ---- */

/* What the block works on. */
struct Problem {
  const float *v;
  const uint8_t *scratch;
  float *state, *o;
  int first_token, tokens, num_key_heads, num_value_heads, dv;
  int head, key_head, first_column;

  __device__ __forceinline__ int chunks() const { return (tokens + CHUNK - 1) / CHUNK; }
};

/* All threads: a chunk is there, and the one before it is done. */
__device__ __forceinline__ void block_sync() { __syncthreads(); }

/* The copying warps: chunk `chunk` into a stage. */
template <int DK>
__device__ __forceinline__ void bring(uint8_t *stage, const Problem &p, int chunk) {
  typedef Stage<DK> S;
  const int tid = threadIdx.x - CONSUMERS;
  auto copy = [&](uint8_t *to, const uint8_t *from, int bytes) {
#pragma unroll 8
    for (int i = tid * 16; i < bytes; i += COPIERS * 16) cp_async16(to + i, from + i, true);
  };
  const uint8_t *heads = p.scratch + (int64_t)p.chunks() * p.num_key_heads * S::KEY_IMAGE;
  copy(stage, p.scratch + ((int64_t)chunk * p.num_key_heads + p.key_head) * S::KEY_IMAGE, S::KEY_IMAGE);
  copy(stage + S::T, heads + ((int64_t)chunk * p.num_value_heads + p.head) * S::HEAD_IMAGE, S::HEAD_IMAGE);
  const int64_t value_dim = (int64_t)p.num_value_heads * p.dv;
  const float *v = p.v + p.first_token * value_dim + p.head * p.dv + p.first_column;
#pragma unroll
  for (int i = tid; i < CHUNK * COLUMNS / 4; i += COPIERS) {
    const int row = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4, token = chunk * CHUNK + row;
    const bool valid = token < p.tokens;
    cp_async16(stage + S::V + (row * V_STRIDE + c) * 4, valid ? v + token * value_dim + c : v, valid);
  }
  cp_async_commit();
  cp_async_wait<0>();
}

/* ---- the warps that hold the state ---- */

template <int DK>
struct Consumer {
  typedef Stage<DK> S;
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

  __device__ __forceinline__ void step(uint8_t *stage, int chunk) {
    const Rows<DK> k = {stage + S::K}, q = {stage + S::Q};
    const Rows<CHUNK> inverse = {stage + S::T};
    const Rows<CHUNK> scores = {stage + S::P};
    const float *v = (const float *)(stage + S::V);
    const float *decays = (const float *)(stage + S::DECAY), *rests = (const float *)(stage + S::REST);
    const float *betas = (const float *)(stage + S::BETA);

    /* x = S K^T, y = S Q^T: [columns, tokens] */
    const float s_up = power_of_two_to(largest, 13);
    float x[CHUNK / 8][4] = {}, y[CHUNK / 8][4] = {};
#pragma unroll
    for (int j = 0; j < DK / 16; j++) {
      Operand a;
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
    Operand r[BLOCKS];
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
    write_outputs(x, y, scores, decays, s_up, r_up, chunk);

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
        for (int e = 0; e < 4; e++) x[2 * j + half][e] *= rests[16 * j + 8 * half + 2 * t + e % 2];
      Operand a;
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

  /* O from n = N and y = S Q^T, in the units r_up and s_up. */
  __device__ __forceinline__ void write_outputs(const float (&x)[CHUNK / 8][4], float (&y)[CHUNK / 8][4],
                                                const Rows<CHUNK> &scores, const float *decays,
                                                float s_up, float r_up, int chunk) {
    Operand r[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) r[j].set(x[2 * j], x[2 * j + 1], 1.0f);
    const float y_up = r_up / s_up * (P_UP / Q_UP), o_down = 1.0f / (r_up * P_UP);
    const int64_t value_dim = (int64_t)p.num_value_heads * p.dv;
    float *o = p.o + ((int64_t)p.first_token + chunk * CHUNK) * value_dim + p.head * p.dv + p.first_column + column;
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
  }
};

/* ---- the kernels ---- */

template <int DK>
__device__ __forceinline__ void delta_chunks(uint8_t *smem, const Problem &problem) {
  constexpr int BYTES = Stage<DK>::BYTES;
  const int chunks = problem.chunks();
  /* With two stages chunk i arrives beside chunk i - 1, with one before it is gone through. */
  const int stages = dynamic_smem_bytes() >= 2 * BYTES ? 2 : 1, behind = stages - 1;
  if (threadIdx.x >= CONSUMERS) {
    for (int i = 0; i < chunks + behind; i++) {
      if (i < chunks) bring<DK>(smem + i % stages * BYTES, problem, i);
      if (!behind) block_sync();
      block_sync();
    }
  } else {
    Consumer<DK> consumer(problem);
    consumer.load_state();
    for (int i = 0; i < chunks + behind; i++) {
      if (!behind) block_sync();
      if (i >= behind) consumer.step(smem + (i - behind) % stages * BYTES, i - behind);
      block_sync();
    }
    consumer.store_state();
  }
}

#define FOR_DK(call, ...)                  \
  if (dk == 128) call<128> __VA_ARGS__;    \
  else if (dk == 64) call<64> __VA_ARGS__; \
  else call<32> __VA_ARGS__

KERNEL __launch_bounds__(THREADS)
    prefill_delta_prepare(const float *q, const float *k, const float *decay, const float *beta,
                          uint8_t *scratch, int first_token, int tokens, int num_key_heads,
                          int num_value_heads, int dk) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  wait_for_previous_kernels();
  FOR_DK(Prepare, {smem, (int)threadIdx.x / 32, (int)threadIdx.x % 32}.run(
      q, k, decay, beta, scratch, first_token, tokens, num_key_heads, num_value_heads));
}
EXPORT(prefill_delta_prepare)

KERNEL __launch_bounds__(THREADS, 1)
    prefill_delta_chunks(const float *v, const uint8_t *scratch, float *state, float *o, int first_token,
                         int tokens, int num_key_heads, int num_value_heads, int dk, int dv) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  wait_for_previous_kernels();
  const int head = blockIdx.y;
  const Problem problem = {v,          scratch,         state,           o,  first_token,
                           tokens,     num_key_heads,   num_value_heads, dv, head,
                           head / (num_value_heads / num_key_heads), (int)blockIdx.x * COLUMNS};
  FOR_DK(delta_chunks, (smem, problem));
}
EXPORT(prefill_delta_chunks)
