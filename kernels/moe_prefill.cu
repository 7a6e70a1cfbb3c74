/*
The experts of prefill: chunks of T tokens; k of E experts and the shared one per token.

R = T * (k + 1) rows: first the T * k picks sorted by expert, by token within an expert (offsets), then
the T rows of the shared expert, which is group E. x stays where it is; products gather its rows.

prefill_group_count    topk_ids [T, k] -> counts [C, E], C = ceil(T / 64)
    launch: grid (C), block (256), smem 8 E bytes
prefill_group_scan     counts -> counts [C, E]: where the picks of 64 tokens start among the rows;
                       offsets [E + 2]; tiles [.., 4]: expert, first row, rows, 0 of every token tile, in
                       order of expert; tile_offsets [E + 2]
    tiles has room for ceil(T k / 128) + E + ceil(T / 128) at most
    launch: grid (1), block (1024), smem 0
prefill_group_scatter  topk_ids, counts -> rows [R]: token of each row; positions [T, k + 1]: row of each
                       pick, the shared expert's last
    launch: grid (C), block (256), smem 8 E bytes

prefill_experts_up (_fast)    h [R, h_stride] f32 = silu(gate x) * (up x), zeros from I on
    launch: grid (1 .. ceil(h_stride / 128), tiles_bound), block (256), smem 99,328 bytes (fast: 66,560).
    Best: as many as there are.
prefill_experts_down (_fast)  y [R, row_count] f32 = rows first_row .. of down h, unweighted
    h_high, h_low, h_scale: prefill_split of h, cols = h_stride. first_row is a multiple of 32.
    launch: grid (1 .. ceil(row_count / 256), tiles_bound), block (256), smem as above. Best: half of them
    if row_count >= 2048 and T >= 2048, else all; few launches with many rows.

Both take the groups first_expert .. first_expert + num_groups of the E + 1, so the host may launch some
while others are still on their way. tiles_bound = ceil(min(T k, T n) / 128) + n for n experts, and
ceil(T / 128) more if the shared expert is among the groups; blocks beyond the tiles exit. blobs
[E + 1], units [E + 1]: addresses, read for those groups only. h_stride >= I of either layout.
The fast kernels may have null for the low terms.

prefill_fetch          to[i] = from[i] of up to eight arrays of words, from host memory
    Copies would wait in the copy engine behind experts on their way: 1 ms a layer of 67 tokens on an H200.
    launch: grid (1 .., 8), block (256), smem 0

prefill_combine        hidden[t, first_row + r] += sum over ranks of w y + gate y_shared, r < row_count
    launch: grid (ceil(T / 4)), block (64, 4), smem 0
*/
#include "moe_prefill.cuh"

/* ---- sort by expert ---- */

/* Tokens that one block counts: the bits of a word. */
constexpr int GROUP_TOKENS = 64;

/* mask[e]: which of the block's tokens pick expert e. Deterministic, unlike the order of atomics. */
__device__ __forceinline__ void pick_masks(unsigned long long *mask, const int32_t *topk_ids,
                                           int first_token, int tokens, int k, int num_experts) {
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) mask[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < min(GROUP_TOKENS, tokens - first_token) * k; i += blockDim.x)
    atomicOr(&mask[topk_ids[(int64_t)first_token * k + i]], 1ull << (i / k));
  __syncthreads();
}

KERNEL prefill_group_count(const int32_t *topk_ids, int tokens, int k, int num_experts,
                           int32_t *counts) {
  DYNAMIC_SMEM(smem);
  unsigned long long *mask = (unsigned long long *)smem;
  launch_next_kernel();
  wait_for_previous_kernels();
  pick_masks(mask, topk_ids, blockIdx.x * GROUP_TOKENS, tokens, k, num_experts);
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x)
    counts[(int64_t)blockIdx.x * num_experts + e] = __popcll(mask[e]);
}

/* The sum of `value` over the threads before this one; 1024 threads. */
__device__ __forceinline__ int sum_before(int value, int *warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; w++) before += warp_sums[w];
  __syncthreads();
  return before + sum - value;
}

/* One thread per expert, E <= 1024; thread 0 adds the shared expert. */
KERNEL prefill_group_scan(int32_t *counts, int tokens, int k, int num_experts, int32_t *offsets,
                          int4 *tiles, int32_t *tile_offsets) {
  __shared__ int warp_sums[32];
  launch_next_kernel();
  wait_for_previous_kernels();
  const int e = threadIdx.x;
  const int chunks = (tokens + GROUP_TOKENS - 1) / GROUP_TOKENS;
  int count = 0;
  if (e < num_experts)
#pragma unroll 16
    for (int c = 0; c < chunks; c++) count += counts[(int64_t)c * num_experts + e];
  const int num_tiles = (count + TILE_TOKENS - 1) / TILE_TOKENS;
  const int offset = sum_before(count, warp_sums);
  const int first_tile = sum_before(num_tiles, warp_sums);

  if (e < num_experts) {
    int start = offset;
#pragma unroll 16
    for (int c = 0; c < chunks; c++) {
      int32_t *at = counts + (int64_t)c * num_experts + e;
      int n = *at;
      *at = start;
      start += n;
    }
    offsets[e] = offset;
    tile_offsets[e] = first_tile;
  }
  /* The last thread may be an expert's, with a tile list of its own. */
  const int picks = tokens * k;
  if (e == (int)blockDim.x - 1) {
    int end = first_tile + num_tiles;
    tile_offsets[num_experts] = end;
    tile_offsets[num_experts + 1] = end + (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    offsets[num_experts] = picks;
    offsets[num_experts + 1] = picks + tokens;
    const int shared_tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    const int size = tokens_per_tile(tokens, shared_tiles);
    for (int i = 0; i < shared_tiles; i++)
      tiles[end + i] =
          make_int4(num_experts, picks + i * size, max(0, min(size, tokens - i * size)), 0);
  }
  if (num_tiles > 0) {
    const int size = tokens_per_tile(count, num_tiles);
    for (int i = 0; i < num_tiles; i++)
      tiles[first_tile + i] = make_int4(e, offset + i * size, max(0, min(size, count - i * size)), 0);
  }
}

KERNEL prefill_group_scatter(const int32_t *topk_ids, int tokens, int k, int num_experts,
                             const int32_t *counts, int32_t *rows, int32_t *positions) {
  DYNAMIC_SMEM(smem);
  unsigned long long *mask = (unsigned long long *)smem;
  launch_next_kernel();
  wait_for_previous_kernels();
  const int first = blockIdx.x * GROUP_TOKENS;
  pick_masks(mask, topk_ids, first, tokens, k, num_experts);
  const int count = min(GROUP_TOKENS, tokens - first);
  for (int i = threadIdx.x; i < count * (k + 1); i += blockDim.x) {
    const int local = i / (k + 1), rank = i % (k + 1), token = first + local;
    int row;
    if (rank == k) {
      row = tokens * k + token;
    } else {
      const int e = topk_ids[(int64_t)token * k + rank];
      row = counts[(int64_t)blockIdx.x * num_experts + e] +
            __popcll(mask[e] & ((1ull << local) - 1));
    }
    rows[row] = token;
    positions[(int64_t)token * (k + 1) + rank] = row;
  }
}

/* ---- products ---- */

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_up(const uint16_t *high, const uint16_t *low, const float *row_scale,
                   const int32_t *rows, const int4 *tiles, const int32_t *tile_offsets,
                   const uint8_t *const *blobs, const float *const *units, ExpertLayout experts,
                   ExpertLayout shared, int num_experts, int dim, int first_expert, int num_groups,
                   float *h, int h_stride) {
  DYNAMIC_SMEM(smem);
  experts_up_block<MmaProducts<true>>(smem, high, low, row_scale, rows, tiles, tile_offsets, blobs, units, experts,
                         shared, num_experts, dim, first_expert, num_groups, h, h_stride);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_up_fast(const uint16_t *high, const uint16_t *low, const float *row_scale,
                        const int32_t *rows, const int4 *tiles, const int32_t *tile_offsets,
                        const uint8_t *const *blobs, const float *const *units, ExpertLayout experts,
                        ExpertLayout shared, int num_experts, int dim, int first_expert,
                        int num_groups, float *h, int h_stride) {
  DYNAMIC_SMEM(smem);
  experts_up_block<MmaProducts<false>>(smem, high, low, row_scale, rows, tiles, tile_offsets, blobs, units, experts,
                         shared, num_experts, dim, first_expert, num_groups, h, h_stride);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_down(const uint16_t *h_high, const uint16_t *h_low, const float *h_scale,
                     const int4 *tiles, const int32_t *tile_offsets, const uint8_t *const *blobs,
                     const float *const *units, ExpertLayout experts, ExpertLayout shared,
                     int num_experts, int dim, int h_stride, int first_expert, int num_groups,
                     int first_row, int row_count, float *y) {
  DYNAMIC_SMEM(smem);
  experts_down_block<MmaProducts<true>>(smem, h_high, h_low, h_scale, tiles, tile_offsets, blobs, units, experts,
                           shared, num_experts, dim, h_stride, first_expert, num_groups, first_row,
                           row_count, y);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_down_fast(const uint16_t *h_high, const uint16_t *h_low, const float *h_scale,
                          const int4 *tiles, const int32_t *tile_offsets, const uint8_t *const *blobs,
                          const float *const *units, ExpertLayout experts, ExpertLayout shared,
                          int num_experts, int dim, int h_stride, int first_expert, int num_groups,
                          int first_row, int row_count, float *y) {
  DYNAMIC_SMEM(smem);
  experts_down_block<MmaProducts<false>>(smem, h_high, h_low, h_scale, tiles, tile_offsets, blobs, units, experts,
                           shared, num_experts, dim, h_stride, first_expert, num_groups, first_row,
                           row_count, y);
}

/* ---- prefill_fetch ---- */

struct HostArray {
  const uint32_t *from;
  uint32_t *to;
  int64_t count; /* words; 0 for an array that is absent */
};

struct HostArrays {
  HostArray each[8];
};

KERNEL prefill_fetch(HostArrays arrays) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const HostArray array = arrays.each[blockIdx.y];
  const int64_t first = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  const bool wide = ((uint64_t)array.from | (uint64_t)array.to) % 16 == 0;
  const int64_t quads = wide ? array.count / 4 : 0;
#pragma unroll 4
  for (int64_t i = first; i < quads; i += step) ((uint4 *)array.to)[i] = ((const uint4 *)array.from)[i];
  for (int64_t i = 4 * quads + first; i < array.count; i += step) array.to[i] = array.from[i];
}

/* ---- prefill_combine ---- */

KERNEL prefill_combine(const float *y, const int32_t *positions, const float *topk_weights,
                       const float *shared_gates, float *hidden, int tokens, int k, int first_row,
                       int row_count, int dim) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int token = blockIdx.x * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int32_t *row = positions + (int64_t)token * (k + 1);
  const float *weight = topk_weights + (int64_t)token * k;
  const float gate = shared_gates[token];
  float *out = hidden + (int64_t)token * dim + first_row;
  if (row_count % 4 == 0 && first_row % 4 == 0 && dim % 4 == 0) {
    for (int r = 4 * threadIdx.x; r < row_count; r += 4 * blockDim.x) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int i = 0; i <= k; i++) {
        float w = i < k ? weight[i] : gate;
        float4 v = *(const float4 *)(y + (int64_t)row[i] * row_count + r);
        sum.x = fmaf(w, v.x, sum.x), sum.y = fmaf(w, v.y, sum.y);
        sum.z = fmaf(w, v.z, sum.z), sum.w = fmaf(w, v.w, sum.w);
      }
      float4 *to = (float4 *)(out + r);
      *to = make_float4(to->x + sum.x, to->y + sum.y, to->z + sum.z, to->w + sum.w);
    }
  } else {
    for (int r = threadIdx.x; r < row_count; r += blockDim.x) {
      float sum = 0.0f;
      for (int i = 0; i <= k; i++)
        sum = fmaf(i < k ? weight[i] : gate, y[(int64_t)row[i] * row_count + r], sum);
      out[r] += sum;
    }
  }
}

EXPORT(prefill_group_count)
EXPORT(prefill_group_scan)
EXPORT(prefill_group_scatter)
EXPORT(prefill_experts_up)
EXPORT(prefill_experts_up_fast)
EXPORT(prefill_experts_down)
EXPORT(prefill_experts_down_fast)
EXPORT(prefill_fetch)
EXPORT(prefill_combine)
