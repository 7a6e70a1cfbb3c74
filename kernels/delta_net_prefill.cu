/*
The gated delta net over a chunk of T tokens, between its projections and out_proj.

prefill_conv: convolution, silu, l2 norm, gates.
  qkvz [T, qkvz_rows], ba [T, 2 Hv], ring [taps, qkvz_rows]: positions before start_position
  q, k [T, Hk, dk] (q also times dk^-0.5), v [T, Hv, dv], decay = exp(g) and beta [T, Hv]
  launch: grid (ceil(T / 16), ceil((2 Hk + Hv) / 8)), block 256. One warp per head's q, k or v and
          16 tokens, the window of inputs in registers.

prefill_delta_rule: the recurrence, token by token. In chunks: delta_rule_prefill.cu.
  state [Hv, dv, dk] read and written, o [T, Hv dv]
  launch: grid (ceil(dv / (4096 / dk)), Hv), block 128. 128 blocks on the 80B model.
  A block holds 4096 / dk columns of one head's state in registers, a lane 16 elements of two columns,
  so that one load of k and q from shared memory serves both; dk / 16 lanes share a column. Tokens
  come through shared memory 16 at a time, the next 16 under way. Per token and warp about 128 FMA
  and one reduction over dk / 16 lanes are on the way from one state to the next.

prefill_gated_norm: out = rms_norm(o) * norm * silu(z), per value head.
  launch: grid (ceil(T Hv / 8)), block 256. One warp per token and head.

prefill_ring: keeps the last rows of qkvz for what follows; after prefill_conv.
  launch: grid (ceil(qkvz_rows / 256), min(T, taps)), block 256.

None uses dynamic shared memory. taps <= 8, dk 32, 64 or 128, dv a multiple of 32 up to 128. Arrays are
f32 and start at multiples of 16 bytes.
*/
#include "common.cuh"
#include "delta_net.cuh"

/* ---- prefill_conv ---- */

constexpr int CONV_WARPS = 8;
constexpr int CONV_TOKENS = 16; /* per warp; taps - 1 more are read before them */
constexpr int CONV_BATCH = 4;   /* tokens whose inputs a warp has under way */
constexpr int MAX_PER_LANE = 4; /* channels of a lane: dk, dv up to 128 */

/* Where channels of one head come from and go to. */
struct ConvPart {
  int row;       /* in qkvz */
  int channel;   /* in conv */
  int dim;       /* a multiple of 32 */
  float *out;    /* of token 0 */
  int stride;    /* from one token to the next in out */
  bool normalise;
  float scale; /* after normalisation */
};

template <int TAPS>
__device__ __forceinline__ void convolve(const ConvPart &part, const float *qkvz, int qkvz_rows,
                                         const float *ring, int ring_slots, int start_position,
                                         const float *conv, int taps, int first, int last) {
  int lane = threadIdx.x & 31;
  /* Inputs of tokens token - TAPS + 1 .. token + CONV_BATCH - 1. With fewer taps than TAPS the oldest
     weights are 0. */
  float weights[MAX_PER_LANE][TAPS], window[MAX_PER_LANE][TAPS - 1 + CONV_BATCH];
#pragma unroll
  for (int i = 0; i < MAX_PER_LANE; i++) {
    int c = lane + 32 * i;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
      int tap = taps - TAPS + j;
      bool there = c < part.dim && tap >= 0;
      weights[i][j] = there ? conv[(int64_t)(part.channel + c) * taps + tap] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
      int token = first - TAPS + 1 + j, position = start_position + token;
      window[i][j] = 0.0f;
      if (c >= part.dim || position < 0 || token <= first - taps) continue;
      window[i][j] = token >= 0
                         ? qkvz[(int64_t)token * qkvz_rows + part.row + c]
                         : ring[(int64_t)(position % ring_slots) * qkvz_rows + part.row + c];
    }
  }
  for (int token = first; token < last; token += CONV_BATCH) {
#pragma unroll
    for (int u = 0; u < CONV_BATCH; u++) {
#pragma unroll
      for (int i = 0; i < MAX_PER_LANE; i++) {
        int c = lane + 32 * i;
        window[i][TAPS - 1 + u] = c < part.dim && token + u < last
                                      ? qkvz[(int64_t)(token + u) * qkvz_rows + part.row + c]
                                      : 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < CONV_BATCH; u++) {
      if (token + u >= last) break;
      float y[MAX_PER_LANE], square = 0.0f;
#pragma unroll
      for (int i = 0; i < MAX_PER_LANE; i++) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < TAPS; j++) sum += weights[i][j] * window[i][u + j];
        y[i] = silu(sum); /* 0 where there is no channel */
        square += y[i] * y[i];
      }
      float scale = part.scale;
      if (part.normalise) scale *= rsqrtf(warp_sum(square) + L2_NORM_EPS);
#pragma unroll
      for (int i = 0; i < MAX_PER_LANE; i++) {
        int c = lane + 32 * i;
        if (c < part.dim) part.out[(int64_t)(token + u) * part.stride + c] = y[i] * scale;
      }
    }
#pragma unroll
    for (int i = 0; i < MAX_PER_LANE; i++)
#pragma unroll
      for (int j = 0; j < TAPS - 1; j++) window[i][j] = window[i][j + CONV_BATCH];
  }
}

KERNEL __launch_bounds__(32 * CONV_WARPS)
    prefill_conv(const float *qkvz, const float *ba, const float *ring, int ring_slots,
                 int start_position, const float *conv, const float *negative_a,
                 const float *dt_bias, float *q, float *k, float *v, float *decay, float *beta,
                 int tokens, int num_key_heads, int num_value_heads, int dk, int dv, int taps) {
  launch_next_kernel();
  wait_for_previous_kernels();
  int lane = threadIdx.x & 31;
  int first = blockIdx.x * CONV_TOKENS, last = min(tokens, first + CONV_TOKENS);
  int item = blockIdx.y * CONV_WARPS + threadIdx.x / 32;
  if (item >= 2 * num_key_heads + num_value_heads || first >= tokens) return;
  int share = num_value_heads / num_key_heads;
  int rows_per_key_head = 2 * dk + 2 * share * dv, qkvz_rows = num_key_heads * rows_per_key_head;

  ConvPart part;
  if (item < 2 * num_key_heads) {
    int head = item % num_key_heads;
    bool is_k = item >= num_key_heads;
    part.row = head * rows_per_key_head + (is_k ? dk : 0);
    part.channel = item * dk;
    part.dim = dk;
    part.out = (is_k ? k : q) + head * dk;
    part.stride = num_key_heads * dk;
    part.normalise = true;
    part.scale = is_k ? 1.0f : rsqrtf((float)dk);
  } else {
    int head = item - 2 * num_key_heads, key_head = head / share, within = head % share;
    part.row = key_head * rows_per_key_head + 2 * dk + within * dv;
    part.channel = 2 * num_key_heads * dk + head * dv;
    part.dim = dv;
    part.out = v + head * dv;
    part.stride = num_value_heads * dv;
    part.normalise = false;
    part.scale = 1.0f;

    /* The head's gates, a lane per token. */
    int token = first + lane;
    if (token < last) {
      const float *gates = ba + (int64_t)token * 2 * num_value_heads + key_head * 2 * share;
      float b = gates[within], a = gates[share + within];
      int64_t at = (int64_t)token * num_value_heads + head;
      beta[at] = sigmoid(b);
      decay[at] = expf(negative_a[head] * softplus(a + dt_bias[head]));
    }
  }
  if (taps <= 4)
    convolve<4>(part, qkvz, qkvz_rows, ring, ring_slots, start_position, conv, taps, first, last);
  else
    convolve<MAX_TAPS>(part, qkvz, qkvz_rows, ring, ring_slots, start_position, conv, taps, first,
                       last);
}
EXPORT(prefill_conv)

/* ---- prefill_delta_rule ---- */

constexpr int RULE_THREADS = 128;
constexpr int RULE_TILE = 16;    /* tokens in a stage of shared memory */
constexpr int RULE_TOGETHER = 4; /* tokens whose outputs are reduced together */
constexpr int PER_LANE = 16;     /* elements of a column that a lane holds */

/* Sums 8 values over groups of LANES lanes and leaves 8 / LANES of them in each lane, in order. */
template <int LANES>
__device__ __forceinline__ void sum_and_scatter(float (&v)[8]) {
#pragma unroll
  for (int offset = LANES / 2, half = 4; offset > 0; offset /= 2, half /= 2) {
    bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < half; i++) {
      float give = upper ? v[i] : v[i + half];
      float keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
}

template <int DK>
struct RuleStage {
  float k[RULE_TILE][DK];
  float q[RULE_TILE][DK];
  float v[RULE_TILE][4096 / DK];
  float gates[2][RULE_TILE]; /* decay, beta */
};

template <int DK>
__device__ __forceinline__ void delta_rule(RuleStage<DK> *stages, const float *q, const float *k,
                                           const float *v, const float *decay, const float *beta,
                                           float *state, float *o, int tokens, int num_key_heads,
                                           int num_value_heads, int dv) {
  constexpr int LANES = DK / PER_LANE; /* of a column */
  constexpr int COLUMNS = 4096 / DK;   /* of the block */
  static_assert(RULE_THREADS / LANES * 2 == COLUMNS, "a lane has two columns");
  int tid = threadIdx.x, lane = tid & 31, l = lane % LANES;
  int head = blockIdx.y, first_column = blockIdx.x * COLUMNS;
  int key_head = head / (num_value_heads / num_key_heads);
  int local = tid / LANES * 2; /* first of the lane's two columns, in the block */
  bool mine = first_column + local < dv;
  int value_dim = num_value_heads * dv;

  /* Asks for the tokens of tile `tile`; gates come back in a register. */
  auto load = [&](int tile) {
    RuleStage<DK> &stage = stages[tile & 1];
    int first = tile * RULE_TILE;
#pragma unroll
    for (int n = 0; n < RULE_TILE * DK / 4 / RULE_THREADS; n++) {
      int i = tid + n * RULE_THREADS, t = i / (DK / 4), c = i % (DK / 4) * 4;
      bool valid = first + t < tokens;
      int64_t at = ((int64_t)(valid ? first + t : 0) * num_key_heads + key_head) * DK + c;
      cp_async16(&stage.k[t][c], k + at, valid);
      cp_async16(&stage.q[t][c], q + at, valid);
    }
#pragma unroll
    for (int n = 0; n < RULE_TILE * COLUMNS / 4 / RULE_THREADS; n++) {
      int i = tid + n * RULE_THREADS, t = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
      bool valid = first + t < tokens && first_column + c < dv;
      int64_t at = valid ? (int64_t)(first + t) * value_dim + head * dv + first_column + c : 0;
      cp_async16(&stage.v[t][c], v + at, valid);
    }
    cp_async_commit();
    /* Tokens past the end change nothing: decay 1, beta 0. */
    int t = first + tid % RULE_TILE;
    bool is_beta = tid >= RULE_TILE;
    float gate = is_beta ? 0.0f : 1.0f;
    if (tid < 2 * RULE_TILE && t < tokens)
      gate = (is_beta ? beta : decay)[(int64_t)t * num_value_heads + head];
    return gate;
  };

  float s[2][PER_LANE];
  float4 *column = (float4 *)(state + ((int64_t)head * dv + first_column + local) * DK);
#pragma unroll
  for (int c = 0; c < 2; c++) {
#pragma unroll
    for (int i = 0; i < PER_LANE / 4; i++) {
      float4 x = mine ? column[c * DK / 4 + i * LANES + l] : make_float4(0, 0, 0, 0);
      s[c][4 * i] = x.x;
      s[c][4 * i + 1] = x.y;
      s[c][4 * i + 2] = x.z;
      s[c][4 * i + 3] = x.w;
    }
  }

  int tiles = (tokens + RULE_TILE - 1) / RULE_TILE;
  float gate = load(0);
  for (int tile = 0; tile < tiles; tile++) {
    RuleStage<DK> &stage = stages[tile & 1];
    if (tid < 2 * RULE_TILE) stage.gates[tid / RULE_TILE][tid % RULE_TILE] = gate;
    cp_async_wait<0>();
    __syncthreads(); /* the tile is there, and nobody reads the other stage any more */
    if (tile + 1 < tiles) gate = load(tile + 1);

    for (int first = 0; first < RULE_TILE; first += RULE_TOGETHER) {
      float outputs[2 * RULE_TOGETHER];
#pragma unroll
      for (int u = 0; u < RULE_TOGETHER; u++) {
        int t = first + u;
        float gamma = stage.gates[0][t], write = stage.gates[1][t];
        float2 value = *(const float2 *)&stage.v[t][local];
        float kx[PER_LANE], qx[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE / 4; i++) {
          float4 x = ((const float4 *)stage.k[t])[i * LANES + l];
          kx[4 * i] = x.x, kx[4 * i + 1] = x.y, kx[4 * i + 2] = x.z, kx[4 * i + 3] = x.w;
          x = ((const float4 *)stage.q[t])[i * LANES + l];
          qx[4 * i] = x.x, qx[4 * i + 1] = x.y, qx[4 * i + 2] = x.z, qx[4 * i + 3] = x.w;
        }
        /* The state is decayed while its answer to k travels between lanes. */
        float read[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float sum[4] = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < PER_LANE; i++) sum[i % 4] += s[c][i] * kx[i];
          read[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) {
          read[0] += __shfl_xor_sync(0xffffffffu, read[0], offset);
          read[1] += __shfl_xor_sync(0xffffffffu, read[1], offset);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
          for (int i = 0; i < PER_LANE; i++) s[c][i] *= gamma;
          float d = ((c == 0 ? value.x : value.y) - gamma * read[c]) * write;
          float sum[4] = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < PER_LANE; i++) {
            s[c][i] += kx[i] * d;
            sum[i % 4] += s[c][i] * qx[i];
          }
          outputs[2 * u + c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
      }
      sum_and_scatter<LANES>(outputs);
      constexpr int KEPT = 8 / LANES; /* a lane has outputs l KEPT ..: token i / 2, column i % 2 */
#pragma unroll
      for (int i = 0; i < KEPT; i++) {
        int index = l * KEPT + i, t = tile * RULE_TILE + first + index / 2;
        if (mine && t < tokens)
          o[(int64_t)t * value_dim + head * dv + first_column + local + index % 2] = outputs[i];
      }
    }
  }

#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int i = 0; i < PER_LANE / 4; i++)
      if (mine)
        column[c * DK / 4 + i * LANES + l] =
            make_float4(s[c][4 * i], s[c][4 * i + 1], s[c][4 * i + 2], s[c][4 * i + 3]);
}

KERNEL __launch_bounds__(RULE_THREADS, 1)
    prefill_delta_rule(const float *q, const float *k, const float *v, const float *decay,
                       const float *beta, float *state, float *o, int tokens, int num_key_heads,
                       int num_value_heads, int dk, int dv) {
  static_assert(sizeof(RuleStage<32>) <= sizeof(RuleStage<128>), "the largest stage");
  static_assert(sizeof(RuleStage<64>) <= sizeof(RuleStage<128>), "the largest stage");
  __shared__ __align__(16) uint8_t stages[2 * sizeof(RuleStage<128>)];
  launch_next_kernel();
  wait_for_previous_kernels();
  if (dk == 128)
    delta_rule<128>((RuleStage<128> *)stages, q, k, v, decay, beta, state, o, tokens,
                    num_key_heads, num_value_heads, dv);
  else if (dk == 64)
    delta_rule<64>((RuleStage<64> *)stages, q, k, v, decay, beta, state, o, tokens, num_key_heads,
                   num_value_heads, dv);
  else
    delta_rule<32>((RuleStage<32> *)stages, q, k, v, decay, beta, state, o, tokens, num_key_heads,
                   num_value_heads, dv);
}
EXPORT(prefill_delta_rule)

/* ---- prefill_gated_norm ---- */

KERNEL __launch_bounds__(256)
    prefill_gated_norm(const float *o, const float *qkvz, const float *norm, float eps, float *out,
                       int tokens, int num_key_heads, int num_value_heads, int dk, int dv) {
  launch_next_kernel();
  wait_for_previous_kernels();
  int lane = threadIdx.x & 31;
  int64_t item = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; /* token * Hv + head */
  if (item >= (int64_t)tokens * num_value_heads) return;
  int64_t token = item / num_value_heads;
  int head = (int)(item % num_value_heads);
  int share = num_value_heads / num_key_heads, rows_per_key_head = 2 * dk + 2 * share * dv;
  const float *z = qkvz + token * num_key_heads * rows_per_key_head +
                   head / share * rows_per_key_head + 2 * dk + (share + head % share) * dv;
  float x[MAX_PER_LANE], gate[MAX_PER_LANE], square = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_PER_LANE; i++) {
    int c = lane + 32 * i;
    x[i] = c < dv ? o[item * dv + c] : 0.0f;
    gate[i] = c < dv ? z[c] : 0.0f;
    square += x[i] * x[i];
  }
  float scale = rsqrtf(warp_sum(square) / (float)dv + eps);
#pragma unroll
  for (int i = 0; i < MAX_PER_LANE; i++) {
    int c = lane + 32 * i;
    if (c < dv) out[item * dv + c] = x[i] * scale * norm[c] * silu(gate[i]);
  }
}
EXPORT(prefill_gated_norm)

/* ---- prefill_ring ---- */

KERNEL __launch_bounds__(256)
    prefill_ring(const float *qkvz, float *ring, int ring_slots, int start_position, int tokens,
                 int qkvz_rows) {
  launch_next_kernel();
  wait_for_previous_kernels();
  int row = blockIdx.x * 256 + threadIdx.x;
  int token = tokens - 1 - (int)blockIdx.y;
  if (row >= qkvz_rows || token < 0 || (int)blockIdx.y >= ring_slots) return;
  ring[(int64_t)((start_position + token) % ring_slots) * qkvz_rows + row] =
      qkvz[(int64_t)token * qkvz_rows + row];
}
EXPORT(prefill_ring)
