/*
The router of prefill: chunks of T tokens, k of E experts.

prefill_router  normed [T, D] f32 -> logits [T, E + 1] f32: the router's, then the shared expert's gate
    f32 FMAs from column 0 on, so that the choice of experts is the f32 reference's up to rounding.
    launch: grid (ceil(T / 128), ceil(E / 64) + 1), block (256), smem 0; the last row of blocks computes
    the gate
prefill_topk    logits -> topk_ids, topk_weights [T, k]: best first, equal ones in order of id;
                shared_gates [T] = sigmoid of the last logit
    launch: grid (ceil(T / 8)), block (256), smem 0. E <= 1024.
*/
#include "common.cuh"

constexpr int ROUTER_TOKENS = 128; /* per block; 8 per thread */
constexpr int ROUTER_EXPERTS = 64; /* per block; 4 per thread */
constexpr int ROUTER_COLS = 16;    /* per step */

/* Columns c .. c + 4 of a row; c is a multiple of 4, rows are padded with zeros. */
__device__ __forceinline__ float4 load_weights(const Linear &w, int row, int c) {
  const int64_t at = (int64_t)row * w.kblocks * TILE_COLS + c;
  if (w.format == BF16_ROWS) {
    uint2 v = *(const uint2 *)(w.weights + 2 * at);
    return make_float4(bf16_to_f32((uint16_t)v.x), bf16_to_f32((uint16_t)(v.x >> 16)),
                       bf16_to_f32((uint16_t)v.y), bf16_to_f32((uint16_t)(v.y >> 16)));
  }
  if (w.format == F32_ROWS) return *(const float4 *)(w.weights + 4 * at);
  /* NF4_TILES. Columns 2t and 2t + 1 of 8 are one byte of group 4d + t (layout.rs). */
  const int tile_row = row / TILE_ROWS;
  const uint8_t *tile = w.weights + ((int64_t)tile_row * w.kblocks + c / TILE_COLS) * TILE_BYTES;
  const float absmax = (float)*(const uint16_t *)(tile + 1024 + row % TILE_ROWS * 2) * w.units[tile_row];
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const int in_tile = c % TILE_COLS + i;
    const int group = in_tile / 32 * 4 + in_tile / 2 % 4;
    const uint32_t byte = tile[group * 128 + row % TILE_ROWS * 4 + in_tile / 8 % 4];
    v[i] = NF4_VALUES[byte & 15] * absmax;
    v[i + 1] = NF4_VALUES[byte >> 4] * absmax;
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

/* Columns c .. c + 4 of x; zeros from cols on. */
__device__ __forceinline__ float4 load_columns(const float *row, int c, int cols) {
  if (cols % 4 == 0) return c < cols ? *(const float4 *)(row + c) : make_float4(0, 0, 0, 0);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = c + i < cols ? row[c + i] : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

/* A step of x and of the weights, columns first; padded so that float4 rows stay aligned. */
struct RouterStep {
  float x[ROUTER_COLS][ROUTER_TOKENS + 4];
  float w[ROUTER_COLS][ROUTER_EXPERTS + 4];
};

__device__ __forceinline__ void store_column(float *column, int stride, float4 v) {
  column[0] = v.x, column[stride] = v.y, column[2 * stride] = v.z, column[3 * stride] = v.w;
}

KERNEL __launch_bounds__(256, 2)
prefill_router(const float *normed, Linear router, Linear shared_gate, float *logits, int tokens) {
  __shared__ RouterStep steps[2];
  launch_next_kernel();
  wait_for_previous_kernels();
  const int tid = threadIdx.x, lane = tid % 32;
  const int cols = router.cols, num_experts = router.rows, stride = num_experts + 1;
  const int first_token = blockIdx.x * ROUTER_TOKENS;

  if (blockIdx.y == gridDim.y - 1) {
    for (int i = tid / 32; i < ROUTER_TOKENS && first_token + i < tokens; i += 8) {
      const float *x = normed + (int64_t)(first_token + i) * cols;
      float sum = 0.0f;
      for (int c = 4 * lane; c < cols; c += 128) {
        float4 a = load_columns(x, c, cols), w = load_weights(shared_gate, 0, c);
        sum = fmaf(a.x, w.x, sum), sum = fmaf(a.y, w.y, sum);
        sum = fmaf(a.z, w.z, sum), sum = fmaf(a.w, w.w, sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) logits[(int64_t)(first_token + i) * stride + num_experts] = sum;
    }
    return;
  }

  /* Thread tid brings columns 4 (tid % 4) .. of tokens tid / 4 and tid / 4 + 64, and of expert tid / 4. */
  const int first_expert = blockIdx.y * ROUTER_EXPERTS;
  const int c4 = tid % 4 * 4, r = tid / 4;
  const float *x[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    x[i] = normed + (int64_t)min(first_token + r + 64 * i, tokens - 1) * cols;
  const int expert = min(first_expert + r, num_experts - 1);
  float4 next_x[2], next_w;
  auto load = [&](int c) {
    next_x[0] = load_columns(x[0], c + c4, cols);
    next_x[1] = load_columns(x[1], c + c4, cols);
    next_w = load_weights(router, expert, c + c4);
  };
  auto store = [&](RouterStep &step) {
    store_column(&step.x[c4][r], ROUTER_TOKENS + 4, next_x[0]);
    store_column(&step.x[c4][r + 64], ROUTER_TOKENS + 4, next_x[1]);
    store_column(&step.w[c4][r], ROUTER_EXPERTS + 4, next_w);
  };

  /* 8 tokens from 4 (tid / 16) and 64 + 4 (tid / 16) on, times experts 4 (tid % 16) .. */
  const int token4 = tid / 16 * 4, expert4 = tid % 16 * 4;
  float acc[8][4] = {};
  load(0);
  store(steps[0]);
  __syncthreads();
  const int end = router.kblocks * TILE_COLS;
  for (int c = 0; c < end; c += ROUTER_COLS) {
    const RouterStep &step = steps[c / ROUTER_COLS % 2];
    if (c + ROUTER_COLS < end) load(c + ROUTER_COLS);
#pragma unroll
    for (int i = 0; i < ROUTER_COLS; i++) {
      const float4 a = *(const float4 *)&step.x[i][token4];
      const float4 b = *(const float4 *)&step.x[i][token4 + 64];
      const float4 w = *(const float4 *)&step.w[i][expert4];
      const float token[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int t = 0; t < 8; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[t][e] = fmaf(token[t], weight[e], acc[t][e]);
    }
    if (c + ROUTER_COLS < end) {
      store(steps[(c / ROUTER_COLS + 1) % 2]);
      __syncthreads();
    }
  }
#pragma unroll
  for (int t = 0; t < 8; t++) {
    const int token = first_token + token4 + t % 4 + t / 4 * 64;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (token < tokens && first_expert + expert4 + e < num_experts)
        logits[(int64_t)token * stride + first_expert + expert4 + e] = acc[t][e];
  }
}

constexpr int MAX_EXPERTS_PER_LANE = 32;

/* One warp per token; lane l has experts l, l + 32, .. */
KERNEL prefill_topk(const float *logits, int tokens, int num_experts, int k, int norm_topk_prob,
                    int32_t *topk_ids, float *topk_weights, float *shared_gates) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const float *row = logits + (int64_t)token * (num_experts + 1);
  float p[MAX_EXPERTS_PER_LANE];
  float largest = __uint_as_float(0xff800000u);
#pragma unroll
  for (int i = 0; i < MAX_EXPERTS_PER_LANE; i++) {
    p[i] = lane + 32 * i < num_experts ? row[lane + 32 * i] : 0.0f;
    if (lane + 32 * i < num_experts) largest = fmaxf(largest, p[i]);
  }
  largest = warp_max(largest);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_EXPERTS_PER_LANE; i++)
    if (lane + 32 * i < num_experts) sum += p[i] = expf(p[i] - largest);
  sum = warp_sum(sum);

  /* Probabilities order as their bits do. A key is 1 + those, so that 0 is "taken" or "none". A NaN among
     the logits makes all NaN: the first k experts, with NaN for weights. */
  uint32_t key[MAX_EXPERTS_PER_LANE];
#pragma unroll
  for (int i = 0; i < MAX_EXPERTS_PER_LANE; i++)
    key[i] = lane + 32 * i < num_experts ? (__float_as_uint(p[i] / sum) & 0x7fffffffu) + 1 : 0;
  uint32_t kept_key = 0, kept_id = 0; /* of rank `lane` */
  float total = 0.0f;
  for (int rank = 0; rank < k; rank++) {
    uint32_t best = 0;
    uint32_t id = lane;
#pragma unroll
    for (int i = 0; i < MAX_EXPERTS_PER_LANE; i++)
      if (key[i] > best) best = key[i], id = lane + 32 * i;
    for (int offset = 16; offset > 0; offset /= 2) {
      uint32_t other = __shfl_xor_sync(0xffffffffu, best, offset);
      uint32_t other_id = __shfl_xor_sync(0xffffffffu, id, offset);
      if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
    total += __uint_as_float(best - 1);
    if (lane == rank) kept_key = best, kept_id = id;
#pragma unroll
    for (int i = 0; i < MAX_EXPERTS_PER_LANE; i++)
      if (lane + 32 * i == id) key[i] = 0;
  }
  if (lane < k) {
    const float weight = __uint_as_float(kept_key - 1);
    topk_ids[(int64_t)token * k + lane] = kept_id;
    topk_weights[(int64_t)token * k + lane] = norm_topk_prob ? weight / total : weight;
  }
  if (lane == 0) shared_gates[token] = sigmoid(row[num_experts]);
}

EXPORT(prefill_router)
EXPORT(prefill_topk)
