/*
The router of prefill: chunks of T tokens, k of E experts.

prefill_router  normed [T, D] f32 -> logits [T, E] f32
    The choice of experts is the f32 reference's up to rounding. BF16_ROWS: on tensor cores, x as the sum of
    three bf16, which has all of f32's bits and range; others: f32 FMAs.
    launch: grid (ceil(T / 128), ceil(E / n)), block (256), smem 0. n = 128 if those blocks are at least
    as many as 3/4 of the SMs, else 64; the kernel sees by grid.y which.
prefill_topk    logits -> topk_ids, topk_weights [T, k]: best first, equal ones in order of id;
                normed, shared_gate [1, D] -> shared_gates [T] = sigmoid(shared_gate x)
    launch: grid (ceil(T / 8)), block (256), smem 0. E <= 1024.

The gate is prefill_topk's because blocks for it beside the router's push some of those onto an SM that
has one already, and 4096 tokens times 512 experts make just one block of 128 x 128 per SM.
*/
#include "common.cuh"

constexpr int ROUTER_TOKENS = 128; /* per block; 8 per thread */
constexpr int ROUTER_COLS = 8;     /* per step: what 256 threads bring as one float4 each */

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

/* A step of x and of the weights, columns first; padded so that float4 rows stay aligned. */
struct RouterStep {
  float x[ROUTER_COLS][ROUTER_TOKENS + 4];
  float w[ROUTER_COLS][128 + 4];
};

__device__ __forceinline__ void store_column(float *column, float4 v) {
  constexpr int STRIDE = 128 + 4;
  column[0] = v.x, column[STRIDE] = v.y, column[2 * STRIDE] = v.z, column[3 * STRIDE] = v.w;
}

/* Logits of 128 tokens and 64 * HALVES experts: a thread has tokens 4 (tid / 16) .. and 64 + those, times
   experts 4 (tid % 16) .. and 64 + those. */
template <int HALVES>
__device__ __forceinline__ void router_block(RouterStep (&steps)[2], const float *normed,
                                             const Linear &router, float *logits, int tokens,
                                             int first_token, int first_expert) {
  const int cols = router.cols, num_experts = router.rows;
  /* It brings columns 4 (tid % 2) .. of token and expert tid / 2. */
  const int c4 = threadIdx.x % 2 * 4, r = threadIdx.x / 2;
  const float *x = normed + (int64_t)min(first_token + r, tokens - 1) * cols;
  const int expert = min(first_expert + r, num_experts - 1);
  const bool has_expert = r < 64 * HALVES;
  float4 next_x, next_w = make_float4(0, 0, 0, 0);
  auto load = [&](int c) {
    next_x = load_columns(x, c + c4, cols);
    if (has_expert) next_w = load_weights(router, expert, c + c4);
  };
  auto store = [&](RouterStep &step) {
    store_column(&step.x[c4][r], next_x);
    if (has_expert) store_column(&step.w[c4][r], next_w);
  };

  const int token4 = threadIdx.x / 16 * 4, expert4 = threadIdx.x % 16 * 4;
  float acc[8][4 * HALVES] = {};
  load(0);
  store(steps[0]);
  __syncthreads();
  const int end = router.kblocks * TILE_COLS;
  for (int c = 0; c < end; c += ROUTER_COLS) {
    const RouterStep &step = steps[c / ROUTER_COLS % 2];
    if (c + ROUTER_COLS < end) load(c + ROUTER_COLS);
#pragma unroll
    for (int i = 0; i < ROUTER_COLS; i++) {
      float token[8], weight[4 * HALVES];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float4 v = *(const float4 *)&step.x[i][token4 + 64 * half];
        token[4 * half] = v.x, token[4 * half + 1] = v.y;
        token[4 * half + 2] = v.z, token[4 * half + 3] = v.w;
      }
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const float4 v = *(const float4 *)&step.w[i][expert4 + 64 * half];
        weight[4 * half] = v.x, weight[4 * half + 1] = v.y;
        weight[4 * half + 2] = v.z, weight[4 * half + 3] = v.w;
      }
#pragma unroll
      for (int t = 0; t < 8; t++)
#pragma unroll
        for (int e = 0; e < 4 * HALVES; e++) acc[t][e] = fmaf(token[t], weight[e], acc[t][e]);
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
    for (int e = 0; e < 4 * HALVES; e++) {
      const int id = first_expert + expert4 + e % 4 + e / 4 * 64;
      if (token < tokens && id < num_experts)
        logits[(int64_t)token * num_experts + id] = acc[t][e];
    }
  }
}

/* ---- BF16_ROWS ---- */

constexpr int BF16_COLS = 32; /* of a step */
constexpr int TERMS = 3;

/* Rows of 32 bf16, whose chunks of 16 bytes are moved so that eight rows' are in different banks. */
struct Bf16Step {
  uint8_t x[TERMS][ROUTER_TOKENS * BF16_COLS * 2];
  uint8_t w[128 * BF16_COLS * 2];
};
__device__ __forceinline__ int bf16_chunk(int row, int chunk) {
  return row * BF16_COLS * 2 + (chunk ^ (row >> 1 & 3)) * 16;
}

/* Takes the largest bf16 not above |x|, with x's sign, out of x. What is left has 8 bits less. */
__device__ __forceinline__ uint32_t take_bf16(float &x) {
  const uint32_t bits = __float_as_uint(x) & 0xffff0000u;
  x -= __uint_as_float(bits);
  return bits >> 16;
}

/* Logits of 128 tokens and 64 * HALVES experts: a warp has 32 tokens and half of the experts. */
template <int HALVES>
__device__ __forceinline__ void router_block_bf16(Bf16Step &step, const float *normed, const Linear &router,
                                                  float *logits, int tokens, int first_token,
                                                  int first_expert) {
  constexpr int PAIRS = 2 * HALVES; /* of n-tiles of 8 experts, of a warp */
  const int cols = router.cols, num_experts = router.rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  /* A thread brings 16 columns of token tid / 2, and of expert tid / 2. */
  const int r = threadIdx.x / 2, half = threadIdx.x % 2 * 16;
  const float *x = normed + (int64_t)min(first_token + r, tokens - 1) * cols;
  const bool has_expert = r < 64 * HALVES;
  const uint8_t *w =
      router.weights + (int64_t)min(first_expert + r, num_experts - 1) * router.kblocks * TILE_COLS * 2;
  float4 next_x[4];
  uint4 next_w[2] = {};
  auto load = [&](int c) {
#pragma unroll
    for (int i = 0; i < 4; i++) next_x[i] = load_columns(x, c + half + 4 * i, cols);
    if (!has_expert) return;
#pragma unroll
    for (int i = 0; i < 2; i++) next_w[i] = *(const uint4 *)(w + 2 * (c + half) + 16 * i);
  };
  auto store = [&]() {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = bf16_chunk(r, half / 8 + i);
      float v[8] = {next_x[2 * i].x,     next_x[2 * i].y,     next_x[2 * i].z,     next_x[2 * i].w,
                    next_x[2 * i + 1].x, next_x[2 * i + 1].y, next_x[2 * i + 1].z, next_x[2 * i + 1].w};
#pragma unroll
      for (int term = 0; term < TERMS; term++) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t low = take_bf16(v[2 * j]);
          words[j] = low | take_bf16(v[2 * j + 1]) << 16;
        }
        *(uint4 *)(step.x[term] + at) = make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (has_expert) *(uint4 *)(step.w + at) = next_w[i];
    }
  };

  const int token0 = warp / 2 * 32, expert0 = warp % 2 * 32 * HALVES;
  float acc[2][2 * PAIRS][4] = {};
  const int end = router.kblocks * TILE_COLS;
  load(0);
  for (int c = 0; c < end; c += BF16_COLS) {
    __syncthreads(); /* nobody reads the step before */
    store();
    __syncthreads();
    if (c + BF16_COLS < end) load(c + BF16_COLS);
    uint32_t a[2][TERMS][BF16_COLS / 16][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int term = 0; term < TERMS; term++)
#pragma unroll
        for (int k = 0; k < BF16_COLS / 16; k++)
          ldmatrix_x4(a[m][term][k],
                      step.x[term] + bf16_chunk(token0 + 16 * m + lane % 16, 2 * k + lane / 16));
    /* Sums of a step start from zero, because an MMA rounds its accumulators towards zero. */
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      float part[2][2][4] = {};
#pragma unroll
      for (int k = 0; k < BF16_COLS / 16; k++) {
        uint32_t b[4];
        ldmatrix_x4(b, step.w + bf16_chunk(expert0 + 16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--)
#pragma unroll
          for (int i = 0; i < 4; i++)
            mma_bf16(part[i / 2][i % 2], a[i / 2][term][k], b[i % 2 * 2], b[i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int i = 0; i < 16; i++)
        acc[i / 8][2 * n + i / 4 % 2][i % 4] += part[i / 8][i / 4 % 2][i % 4];
    }
  }
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = first_token + token0 + 16 * m + g + e / 2 * 8;
        const int id = first_expert + expert0 + 8 * n + 2 * t + e % 2;
        if (token < tokens && id < num_experts) logits[(int64_t)token * num_experts + id] = acc[m][n][e];
      }
}

/* ---- the kernel ---- */

KERNEL __launch_bounds__(256)
prefill_router(const float *normed, Linear router, float *logits, int tokens) {
  __shared__ __align__(16) uint8_t smem[sizeof(Bf16Step)];
  static_assert(2 * sizeof(RouterStep) <= sizeof(Bf16Step), "either fits");
  RouterStep(&steps)[2] = *(RouterStep(*)[2])smem;
  launch_next_kernel();
  wait_for_previous_kernels();
  const int first_token = blockIdx.x * ROUTER_TOKENS;
  const bool wide = (int)gridDim.y == (router.rows + 127) / 128;
  if (router.format == BF16_ROWS && wide)
    router_block_bf16<2>(*(Bf16Step *)smem, normed, router, logits, tokens, first_token, blockIdx.y * 128);
  else if (router.format == BF16_ROWS)
    router_block_bf16<1>(*(Bf16Step *)smem, normed, router, logits, tokens, first_token, blockIdx.y * 64);
  else if (wide)
    router_block<2>(steps, normed, router, logits, tokens, first_token, blockIdx.y * 128);
  else
    router_block<1>(steps, normed, router, logits, tokens, first_token, blockIdx.y * 64);
}

constexpr int MAX_EXPERTS_PER_LANE = 32;

/* One warp per token; lane l has experts l, l + 32, .. */
KERNEL prefill_topk(const float *logits, const float *normed, Linear shared_gate, int tokens,
                    int num_experts, int k, int norm_topk_prob, int32_t *topk_ids, float *topk_weights,
                    float *shared_gates) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;

  const float *x = normed + (int64_t)token * shared_gate.cols;
  float gate = 0.0f;
#pragma unroll 4
  for (int c = 4 * lane; c < shared_gate.cols; c += 128) {
    float4 a = load_columns(x, c, shared_gate.cols), w = load_weights(shared_gate, 0, c);
    gate = fmaf(a.x, w.x, gate), gate = fmaf(a.y, w.y, gate);
    gate = fmaf(a.z, w.z, gate), gate = fmaf(a.w, w.w, gate);
  }
  gate = warp_sum(gate);
  if (lane == 0) shared_gates[token] = sigmoid(gate);

  const float *row = logits + (int64_t)token * num_experts;
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
      if (lane + 32 * i == (int)id) key[i] = 0;
  }
  if (lane < k) {
    const float weight = __uint_as_float(kept_key - 1);
    topk_ids[(int64_t)token * k + lane] = kept_id;
    topk_weights[(int64_t)token * k + lane] = norm_topk_prob ? weight / total : weight;
  }
}

EXPORT(prefill_router)
EXPORT(prefill_topk)
