/*
decode_router: chooses a token's experts, for the GPU (Decision) and for the CPU (Handoff).

  launch: grid (blocks(router) + blocks(shared_gate) + (handoff_x ? 1 : 0), 1, tokens), block (512),
    shared memory ROUTER_SMEM = 49,152 bytes; blocks(m) = ceil(rows / 16) for NF4_TILES, else ceil(rows / 4).

All blocks compute logits [E + 1], the shared expert's gate last: half a tile row, or four rows of bf16 or
f32 with four warps each; all products are exact to f32. One more block writes the normed x for the CPU. The
last block to finish decides: its first warp takes the softmax and picks, while the others fetch the slots.
E <= 1024, k <= min(E, 32).
*/
#include "matvec.cuh"

constexpr int ROUTER_WARPS = 16;
constexpr int ROUTER_THREADS = 32 * ROUTER_WARPS;
constexpr int ROUTER_SMEM = shared_bytes(ROUTER_WARPS);
static_assert(ROUTER_SMEM == 49152, "as the header says");

constexpr int TILE_BLOCK_ROWS = 16;
constexpr int ROW_BLOCK_ROWS = 4;
constexpr int WARPS_PER_ROW = ROUTER_WARPS / ROW_BLOCK_ROWS;

constexpr int AREA_SQUARES = 32; /* float of a warp's area, behind its sums */

/* What the deciding block keeps in shared memory, in the table's place. Aligned, so that reading four keys at once
   touches nothing that another warp writes. */
constexpr int MAX_EXPERTS = 1024;
struct __align__(16) Candidates {
  uint32_t keys[MAX_EXPERTS];
  int32_t ids[MAX_EXPERTS];
  int32_t best_ids[MAX_TOP_K];
  uint32_t best_keys[MAX_TOP_K];
};
struct Lookups {
  uint64_t slots[MAX_EXPERTS];
  int32_t split[MAX_TOP_K + 1];
  Candidates candidates;
};
static_assert(sizeof(Lookups) <= TABLE_BYTES, "they fit");

/* Stands for every NaN in the order of probabilities: above infinity. */
constexpr uint32_t NAN_BITS = 0x7f800001u;

/* Half tile row `block` of an NF4 matrix. */
__device__ __forceinline__ void tile_logits(const Linear &m, int block, const Normed &n, float eps,
                                            uint8_t *shared, float *logits) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  const uint8_t *tiles = m.weights + (int64_t)(block >> 1) * m.kblocks * TILE_BYTES;
  const int begin = share(m.kblocks, warp_index(), ROUTER_WARPS);
  const int end = share(m.kblocks, warp_index() + 1, ROUTER_WARPS);
  TileStream<TILE_BLOCK_ROWS, 2> stream[1];
  start_stream(stream[0], tiles, block & 1, begin, end);
  prefetch_tiles(tiles, begin + 2, end);
  fill_table_wide<ROUTER_THREADS>(shared);
  __syncthreads();
  wait_for_previous_kernels();

  float sums[1][TILE_BLOCK_ROWS / 8], squares = 0.0f;
  multiply_streams(stream, sums, shared, (uint4 *)area,
                   [&](int column, float(&v)[8]) { normed_values(n, column, v, squares); });
  squares = warp_sum(squares);
  store_sums<TILE_BLOCK_ROWS>(sums[0], area, 0);
  if (lane_index() == 0) area[AREA_SQUARES] = squares;
  __syncthreads();
  const int row = block * TILE_BLOCK_ROWS + (int)threadIdx.x;
  if (threadIdx.x < TILE_BLOCK_ROWS && row < m.rows) {
    const float factor = inverse_rms(sum_areas<ROUTER_WARPS>(areas, AREA_SQUARES), n.cols, eps);
    logits[row] = sum_areas<ROUTER_WARPS>(areas, (int)threadIdx.x) * m.units[block >> 1] * factor;
  }
}

/* Four rows, four warps each. */
template <int FORMAT>
__device__ __forceinline__ void row_logits(const Linear &m, int block, const Normed &n, float eps,
                                           uint8_t *shared, float *logits) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  const int row = block * ROW_BLOCK_ROWS + warp_index() / WARPS_PER_ROW;
  constexpr int DEPTH = RowFormat<FORMAT>::BYTES; /* all of 2048 columns: 2 pieces of bf16, 4 of f32 */
  RowStream<FORMAT, DEPTH> stream = {row_of<FORMAT>(m.weights, row, m.rows, m.kblocks), m.kblocks * TILE_COLS,
                                     warp_index() % WARPS_PER_ROW, WARPS_PER_ROW};
  start_row(stream);
  wait_for_previous_kernels();
  float squares = 0.0f;
  float sum = multiply_row(stream, [&](int column) { return normed_four(n, column, squares); });
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (lane_index() == 0) area[0] = sum, area[AREA_SQUARES] = squares;
  __syncthreads();
  const int i = (int)threadIdx.x;
  if (i < ROW_BLOCK_ROWS && block * ROW_BLOCK_ROWS + i < m.rows) {
    const float *of_row = areas + i * WARPS_PER_ROW * AREA_FLOATS;
    const float factor = inverse_rms(sum_areas<WARPS_PER_ROW>(of_row, AREA_SQUARES), n.cols, eps);
    logits[block * ROW_BLOCK_ROWS + i] = sum_areas<WARPS_PER_ROW>(of_row, 0) * factor;
  }
}

/* The normed x, for the CPU. */
__device__ __forceinline__ void hand_over_x(const Normed &n, float eps, uint8_t *shared, float *to) {
  constexpr int KEPT = 4; /* 8192 values over 512 threads */
  float *areas = (float *)shared;
  wait_for_previous_kernels();
  float4 kept[KEPT];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < KEPT; i++) kept[i] = normed_four(n, 4 * ((int)threadIdx.x + i * ROUTER_THREADS), squares);
  squares = warp_sum(squares);
  if (lane_index() == 0) areas[warp_index() * AREA_FLOATS] = squares;
  __syncthreads();
  const float factor = inverse_rms(sum_areas<ROUTER_WARPS>(areas, 0), n.cols, eps);
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int column = 4 * ((int)threadIdx.x + i * ROUTER_THREADS);
    const float4 x = kept[i];
    if (column < n.cols)
      *(float4 *)(to + column) = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
  }
  __threadfence_system();
  __syncthreads();
}

/* The k most probable experts: lane r gets the r-th and its weight; lower ids first among equals. One warp;
   lane i holds experts i, i + 32, ..

   The k-th largest of the lanes' best is a lower bound of the k-th of all, and only some 1.5 k experts reach it:
   each of these counts how many are before it. Ten rounds of a warp-wide arg-max take twice as long. */
template <int PER_LANE>
__device__ __forceinline__ void softmax_top_k(const float *logits, int num_experts, int k, int norm_topk_prob,
                                              Candidates &candidates, int &id, float &weight) {
  const int lane = lane_index();
  float p[PER_LANE];
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    p[j] = 32 * j + lane < num_experts ? __ldcg(logits + 32 * j + lane) : -INFINITY;
    largest = fmaxf(largest, p[j]);
  }
  largest = warp_max(largest);
  /* Keys in the order of the probabilities, which are positive or NaN, all NaNs alike; 0: none. */
  uint32_t keys[PER_LANE], best = 0;
  float total = 0.0f;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    const bool there = 32 * j + lane < num_experts;
    p[j] = expf(p[j] - largest);
    total += there ? p[j] : 0.0f;
    keys[j] = there ? min(__float_as_uint(p[j]) & 0x7fffffffu, NAN_BITS) + 1 : 0;
    best = max(best, keys[j]);
  }
  total = warp_sum(total);

  int above = 0;
#pragma unroll 8
  for (int i = 0; i < 32; i++) above += __shfl_sync(ALL_LANES, best, i) > best;
  const uint32_t bound = __reduce_min_sync(ALL_LANES, above < k ? best : ALL_LANES);

  int count = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) { /* in the order of ids */
    const bool is_candidate = keys[j] >= bound;
    const uint32_t those = __ballot_sync(ALL_LANES, is_candidate);
    if (is_candidate) {
      const int at = count + __popc(those & ((1u << lane) - 1));
      candidates.keys[at] = keys[j];
      candidates.ids[at] = 32 * j + lane;
    }
    count += __popc(those);
  }
  __syncwarp();
  for (int mine = lane; mine < count; mine += 32) {
    const uint32_t key = candidates.keys[mine];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const uint32_t other = candidates.keys[i];
      rank += other > key || (other == key && i < mine);
    }
    if (rank < k) {
      candidates.best_ids[rank] = candidates.ids[mine];
      candidates.best_keys[rank] = key;
    }
  }
  __syncwarp();
  if (lane < k) id = candidates.best_ids[lane], weight = __uint_as_float(candidates.best_keys[lane] - 1);
  const float sum = warp_sum(weight);
  weight /= norm_topk_prob ? sum : total;
}

struct Choice {
  int num_experts;
  int k;
  const uint8_t *host_blobs;
  int64_t blob_bytes;
  const float *units;
  int num_units;
  const uint8_t *shared_blob;
  const float *shared_units;
};

/* One warp writes Decision and Handoff. */
__device__ __forceinline__ void decide(const Choice &c, const float *logits, const Lookups &lookups,
                                       int id, float weight, Decision *decision, Handoff *handoff) {
  const int rank = lane_index();
  const uint32_t before = (1u << rank) - 1;
  const bool chosen = rank < c.k;
  const uint64_t slot = chosen ? lookups.slots[id] : 0;
  const uint32_t misses = __ballot_sync(ALL_LANES, chosen && slot == 0);
  const int num_misses = __popc(misses);
  const int num_read = c.host_blobs == nullptr ? 0 : min(lookups.split[num_misses], num_misses);
  const bool is_read = (misses >> rank & 1) && __popc(misses & before) >= num_misses - num_read;
  const uint32_t on_gpu = __ballot_sync(ALL_LANES, chosen && (slot != 0 || is_read));
  const uint32_t on_cpu = misses & ~on_gpu;
  const int num_gpu = __popc(on_gpu);
  if (on_gpu >> rank & 1) {
    const int i = __popc(on_gpu & before);
    decision->blob[i] = slot != 0 ? (const uint8_t *)(uintptr_t)slot : c.host_blobs + id * c.blob_bytes + IN_HOST;
    decision->units[i] = c.units + (int64_t)id * c.num_units;
    decision->weight[i] = weight;
  }
  if (rank == 0) {
    decision->count = num_gpu + 1;
    decision->shared = num_gpu;
    decision->blob[num_gpu] = c.shared_blob;
    decision->units[num_gpu] = c.shared_units;
    decision->weight[num_gpu] = sigmoid(__ldcg(logits + c.num_experts));
  }
  if (handoff == nullptr) return;
  if (chosen) handoff->topk_ids[rank] = id, handoff->topk_weights[rank] = weight;
  if (on_cpu >> rank & 1) {
    const int i = __popc(on_cpu & before);
    handoff->cpu_ids[i] = id;
    handoff->cpu_weights[i] = weight;
  }
  if (rank == 0) handoff->num_cpu = __popc(on_cpu);
  __threadfence_system();
}

__device__ __forceinline__ int router_blocks(const Linear &m) {
  const int rows = m.format == NF4_TILES ? TILE_BLOCK_ROWS : ROW_BLOCK_ROWS;
  return (m.rows + rows - 1) / rows;
}

/* Two blocks on a multiprocessor, so that the next kernel's can wait beside this one's. Before sm_90 kernels
   don't overlap, and ptxas needs more registers. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int ROUTER_RESIDENT = 1;
#else
constexpr int ROUTER_RESIDENT = 2;
#endif

KERNEL __launch_bounds__(ROUTER_THREADS, ROUTER_RESIDENT)
    decode_router(const Step *step, const float *hidden, const float *norm_scale, float eps, int dim,
                  Linear router, Linear shared_gate, int k, int norm_topk_prob, float *logits, uint32_t *counter,
                  const uint64_t *slots, const uint8_t *host_blobs, int64_t blob_bytes, const float *units,
                  int num_units, const uint8_t *shared_blob, const float *shared_units, const int32_t *split,
                  Decision *decision, Handoff *handoff, float *handoff_x, int signal) {
  DYNAMIC_SMEM(shared);
  /* A float behind all sums in the last warp's area: static shared memory would not fit beside 48 KB. */
  volatile bool &is_last = *(volatile bool *)(shared + ROUTER_SMEM - 4);
  launch_next_kernel();
  const int num_experts = router.rows, token = token_index();
  step += token, hidden += (int64_t)token * dim, handoff_x += (int64_t)token * dim;
  logits += (int64_t)token * (num_experts + 1), counter += token, decision += token;
  if (handoff != nullptr) handoff += token;
  const Normed n = {hidden, norm_scale, dim};
  int block = (int)blockIdx.x;
  Linear m = router;
  float *to = logits;
  if (block >= router_blocks(router)) block -= router_blocks(router), m = shared_gate, to += num_experts;
  if (block >= router_blocks(m))
    hand_over_x(n, eps, shared, handoff_x);
  else if (m.format == NF4_TILES)
    tile_logits(m, block, n, eps, shared, to);
  else if (m.format == BF16_ROWS)
    row_logits<BF16_ROWS>(m, block, n, eps, shared, to);
  else
    row_logits<F32_ROWS>(m, block, n, eps, shared, to);

  /* The first warp alone wrote logits; hand_over_x ends with a barrier. */
  if (warp_index() == 0) {
    __threadfence();
    __syncwarp();
    if (threadIdx.x == 0) is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;

  Lookups &lookups = *(Lookups *)shared;
  int id = 0;
  float weight = 0.0f;
  uint32_t number = 0;
  if (warp_index() == 0) {
    number = __ldcg(&step->number); /* now: it is needed when the last store must not wait */
    if (num_experts <= 512)
      softmax_top_k<16>(logits, num_experts, k, norm_topk_prob, lookups.candidates, id, weight);
    else
      softmax_top_k<32>(logits, num_experts, k, norm_topk_prob, lookups.candidates, id, weight);
  } else {
    const int first = (int)threadIdx.x - 32;
    if (first <= k) lookups.split[first] = split[first];
    for (int i = first; i < num_experts; i += ROUTER_THREADS - 32) lookups.slots[i] = __ldcg(slots + i);
  }
  __syncthreads();
  if (warp_index() != 0) return;
  const Choice choice = {num_experts, k, host_blobs, blob_bytes, units, num_units, shared_blob, shared_units};
  decide(choice, logits, lookups, id, weight, decision, handoff);
  if (threadIdx.x == 0) *counter = 0;
  __syncwarp();
  if (threadIdx.x == 0 && handoff != nullptr && signal) store_release_system(&handoff->ready, number);
}

EXPORT(decode_router)
