/*
The experts that Decision gives to the GPU, the shared one last, for each token in the grid's z: one that
several tokens picked comes from L2 for all but the first.

decode_experts_up: h[i] = silu(gate_i x) * (up_i x), x = rms_norm(hidden) * norm_scale, for each entry i.
  launch: grid (ceil(max(experts.intermediate, shared.intermediate) / 16), k + 1, tokens), block (256),
    shared memory UP_SMEM = 40,960 bytes.
decode_experts_down: out[r] = sum over the entries of weight_i * (down_i h_i)[r].
  h: per token k + 1 rows of h_stride.
  launch: grid (ceil(dim / 16), 1, tokens), block (512), shared memory DOWN_SMEM = 49,152 bytes.
decode_combine: hidden += gpu + cpu.
  launch: grid (ceil(dim / 1024), 1, tokens), block (256), no shared memory.

NF4: a block takes half tile rows (16 rows; of gate and of up), so that the 80B model's 11 experts fill an H100
evenly. Of blobs in host memory it takes whole ones, by which PCIe works better, and every other block has
nothing to do: `up` for such an expert, `down` altogether if any expert is there.
bf16, f32: one warp per row.

decode_experts_up lets the next kernel start only after its own wait: so decode_experts_down, which must
come next, may read Decision and request weights before it waits itself.

h_stride is a multiple of 4; vectors and blobs are 16-byte aligned.
*/
#include "matvec.cuh"

constexpr int UP_WARPS = 8;
constexpr int UP_SMEM = shared_bytes(UP_WARPS);
constexpr int DOWN_WARPS = 16;
constexpr int DOWN_SMEM = shared_bytes(DOWN_WARPS);
static_assert(UP_SMEM == 40960 && DOWN_SMEM == 49152, "as the header says");

constexpr int BLOCK_ROWS = 16;

/* Floats of a warp's area. `up`: sums of gate, of up, squares. `down`: sums, then products of whole rows. */
constexpr int AREA_UP = TILE_ROWS;
constexpr int AREA_SQUARES = 2 * TILE_ROWS;
constexpr int AREA_ROWS = TILE_ROWS;

__device__ __forceinline__ bool in_host(const uint8_t *blob) { return ((uintptr_t)blob & IN_HOST) != 0; }
__device__ __forceinline__ const uint8_t *address_of(const uint8_t *blob) {
  return (const uint8_t *)((uintptr_t)blob & ~IN_HOST);
}
__device__ __forceinline__ int blocks_of_64(int cols) { return (cols + TILE_COLS - 1) / TILE_COLS; }

/* A pointer of Decision, past L1: read before the wait, which would make L1 new. */
template <class T>
__device__ __forceinline__ T *load_pointer(T *const *p) {
  return (T *)(uintptr_t)__ldcg((const unsigned long long *)p);
}

/* ---- decode_experts_up ---- */

/* What `up` needs of an ExpertLayout. */
struct UpLayout {
  int intermediate;
  int format;
  int up_unit;
  int64_t up_offset;
};

/* Rows `row` .. + ROWS of gate and up; both at once, or, if TOGETHER is false, one after the other. */
template <int ROWS, bool TOGETHER>
__device__ __forceinline__ void up_tiles(const UpLayout &e, const uint8_t *gate, const float *units, int row,
                                         const Normed &n, float eps, uint8_t *shared, float *h) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  uint4 *fragments = (uint4 *)area;
  const int kblocks = blocks_of_64(n.cols), tile_row = row / TILE_ROWS, half = row / 16 & 1;
  const int begin = share(kblocks, warp_index(), UP_WARPS), end = share(kblocks, warp_index() + 1, UP_WARPS);
  const uint8_t *tiles = gate + (int64_t)tile_row * kblocks * TILE_BYTES;
  float squares = 0.0f;
  const auto values = [&](int column, float(&v)[8]) { normed_values(n, column, v, squares); };
  if constexpr (TOGETHER) {
    TileStream<ROWS, 2> streams[2];
    start_stream(streams[0], tiles, half, begin, end);
    start_stream(streams[1], tiles + e.up_offset, half, begin, end);
    float sums[2][ROWS / 8];
    multiply_streams(streams, sums, shared, fragments, values);
    store_sums<ROWS>(sums[0], area, 0);
    store_sums<ROWS>(sums[1], area, AREA_UP);
  } else {
    float sums[2][1][ROWS / 8];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      TileStream<ROWS, 2> stream[1];
      start_stream(stream[0], tiles + m * e.up_offset, half, begin, end);
      squares = 0.0f;
      multiply_streams(stream, sums[m], shared, fragments, values);
    }
    store_sums<ROWS>(sums[0][0], area, 0);
    store_sums<ROWS>(sums[1][0], area, AREA_UP);
  }
  squares = warp_sum(squares);
  if (lane_index() == 0) area[AREA_SQUARES] = squares;
  __syncthreads();
  const int i = (int)threadIdx.x;
  if (i < ROWS && row + i < e.intermediate) {
    const float factor = inverse_rms(sum_areas<UP_WARPS>(areas, AREA_SQUARES), n.cols, eps);
    const float gate_x = sum_areas<UP_WARPS>(areas, i) * units[tile_row] * factor;
    const float up_x = sum_areas<UP_WARPS>(areas, AREA_UP + i) * units[e.up_unit + tile_row] * factor;
    h[row + i] = quick_silu(gate_x) * up_x;
  }
}

template <int FORMAT>
__device__ __forceinline__ void up_rows(const UpLayout &e, const uint8_t *gate, int row, const Normed &n,
                                        float eps, float *h) {
  const int kblocks = blocks_of_64(n.cols);
  for (int i = row + warp_index(); i < min(row + BLOCK_ROWS, e.intermediate); i += UP_WARPS) {
    float gate_x = 0.0f, up_x = 0.0f, squares = 0.0f;
#pragma unroll 1
    for (int m = 0; m < 2; m++) {
      const uint8_t *weights = row_of<FORMAT>(gate + m * e.up_offset, i, e.intermediate, kblocks);
      RowStream<FORMAT, 2> stream = {weights, kblocks * TILE_COLS, 0, 1};
      start_row(stream);
      squares = 0.0f;
      gate_x = up_x;
      up_x = warp_sum(multiply_row(stream, [&](int column) { return normed_four(n, column, squares); }));
    }
    squares = warp_sum(squares);
    const float factor = inverse_rms(squares, n.cols, eps);
    if (lane_index() == 0) h[i] = quick_silu(gate_x * factor) * (up_x * factor);
  }
}

KERNEL __launch_bounds__(UP_WARPS * 32, 3)
    decode_experts_up(const float *hidden, const float *norm_scale, float eps, int dim, const Decision *decision,
                      ExpertLayout experts, ExpertLayout shared_expert, float *h, int h_stride) {
  DYNAMIC_SMEM(shared);
  if (experts.format == NF4_TILES || shared_expert.format == NF4_TILES)
    fill_table_wide<UP_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();
  launch_next_kernel();
  hidden += (int64_t)token_index() * dim, decision += token_index();
  const int entry = (int)blockIdx.y;
  int row = (int)blockIdx.x * BLOCK_ROWS;
  const uint8_t *blob = load_pointer(&decision->blob[entry]);
  const float *units = load_pointer(&decision->units[entry]);
  if (entry >= __ldcg(&decision->count)) return;
  const bool is_shared = entry == __ldcg(&decision->shared);
  const UpLayout e = {is_shared ? shared_expert.intermediate : experts.intermediate,
                      is_shared ? shared_expert.format : experts.format,
                      is_shared ? shared_expert.up_unit : experts.up_unit,
                      is_shared ? shared_expert.up_offset : experts.up_offset};
  if (row >= e.intermediate) return;
  const Normed n = {hidden, norm_scale, dim};
  h += ((int64_t)token_index() * gridDim.y + entry) * h_stride;
  if (e.format == BF16_ROWS) {
    up_rows<BF16_ROWS>(e, address_of(blob), row, n, eps, h);
  } else if (e.format == F32_ROWS) {
    up_rows<F32_ROWS>(e, address_of(blob), row, n, eps, h);
  } else if (!in_host(blob)) {
    up_tiles<BLOCK_ROWS, true>(e, blob, units, row, n, eps, shared, h);
  } else if (row % TILE_ROWS == 0) {
    up_tiles<TILE_ROWS, false>(e, address_of(blob), units, row, n, eps, shared, h);
  }
}

/* ---- decode_experts_down ---- */

/* Decision as one warp holds it: routed entry i in lane i; there may be as many as lanes, so the shared one
   is in all of them. */
struct Entries {
  int routed;
  const uint8_t *blob;
  const float *units;
  float weight;
  const uint8_t *shared_blob;
  const float *shared_units;
  float shared_weight;
};

__device__ __forceinline__ Entries load_entries(const Decision *decision) {
  Entries e;
  const int lane = lane_index();
  e.blob = load_pointer(&decision->blob[lane]);
  e.units = load_pointer(&decision->units[lane]);
  e.weight = __ldcg(&decision->weight[lane]);
  e.routed = __ldcg(&decision->shared);
  e.shared_blob = load_pointer(&decision->blob[e.routed]);
  e.shared_units = load_pointer(&decision->units[e.routed]);
  e.shared_weight = __ldcg(&decision->weight[e.routed]);
  return e;
}

/* Tiles of one tile row of all NF4 entries, in order: routed_tiles of each routed entry, then the shared
   expert's. */
struct DownTiles {
  int routed; /* NF4 entries */
  int routed_tiles;
  int shared_tiles;
  const uint8_t *tiles; /* lane i: the first of entry i */
  float factor;         /* lane i: weight * unit */
  const uint8_t *shared_first;
  float shared_factor;
};

__device__ __forceinline__ DownTiles down_tiles(const Entries &entries, const ExpertLayout &experts,
                                                const ExpertLayout &shared_expert, int tile_row) {
  DownTiles t = {};
  if (experts.format == NF4_TILES) {
    t.routed = entries.routed;
    t.routed_tiles = blocks_of_64(experts.intermediate);
    t.tiles = address_of(entries.blob) + experts.down_offset + (int64_t)tile_row * t.routed_tiles * TILE_BYTES;
    if (lane_index() < t.routed) t.factor = entries.weight * entries.units[experts.down_unit + tile_row];
  }
  if (shared_expert.format == NF4_TILES) {
    t.shared_tiles = blocks_of_64(shared_expert.intermediate);
    t.shared_first = address_of(entries.shared_blob) + shared_expert.down_offset +
                     (int64_t)tile_row * t.shared_tiles * TILE_BYTES;
    t.shared_factor = entries.shared_weight * entries.shared_units[shared_expert.down_unit + tile_row];
  }
  return t;
}

/* The entry whose tile is number `q`, and which of its tiles that is. */
__device__ __forceinline__ int2 entry_of(const DownTiles &t, int q) {
  const int before_shared = t.routed * t.routed_tiles;
  if (q >= before_shared) return make_int2(t.routed, q - before_shared);
  const int entry = (int)((unsigned)q / (unsigned)t.routed_tiles);
  return make_int2(entry, q - entry * t.routed_tiles);
}

/* The warp's place among them: the next tile to request. */
struct DownCursor {
  TileCursor next;
  int entry;
  int left; /* tiles of the entry */
  float factor;
};

template <int ROWS>
__device__ __forceinline__ void go_to(DownCursor &c, const DownTiles &t, int entry, int tile, int half) {
  const uint64_t tiles = __shfl_sync(ALL_LANES, (unsigned long long)(uintptr_t)t.tiles, entry & 31);
  const float factor = __shfl_sync(ALL_LANES, t.factor, entry & 31);
  const bool is_shared = entry == t.routed;
  const uint8_t *first = is_shared ? t.shared_first : (const uint8_t *)(uintptr_t)tiles;
  c.next = cursor_at<ROWS>(first + (int64_t)tile * TILE_BYTES, half);
  c.entry = entry;
  c.left = (is_shared ? t.shared_tiles : t.routed_tiles) - tile;
  c.factor = is_shared ? t.shared_factor : factor;
}

/* Requests the next tile and returns its factor. */
template <int ROWS>
__device__ __forceinline__ float next_tile(TileWords<ROWS> &words, DownCursor &c, const DownTiles &t, int half) {
  if (c.left == 0) go_to<ROWS>(c, t, c.entry + 1, 0, half);
  load_tile<ROWS>(words, c.next);
  c.left--;
  return c.factor;
}

/* Rows `row` .. + ROWS over all NF4 entries; leaves the sums in the warps' areas. Waits for h. */
template <int ROWS, int DEPTH>
__device__ __forceinline__ void multiply_down(const Entries &entries, const ExpertLayout &experts,
                                              const ExpertLayout &shared_expert, const float *h, int h_stride,
                                              int row, uint8_t *shared, float *area) {
  uint4 *fragments = (uint4 *)area;
  const int half = row / 16 & 1;
  const DownTiles t = down_tiles(entries, experts, shared_expert, row / TILE_ROWS);
  const int total = t.routed * t.routed_tiles + t.shared_tiles;
  const int begin = share(total, warp_index(), DOWN_WARPS), end = share(total, warp_index() + 1, DOWN_WARPS);
  DownCursor cursor = {};
  TileWords<ROWS> words[DEPTH];
  float factors[DEPTH];
  if (begin < end) {
    const int2 at = entry_of(t, begin);
    go_to<ROWS>(cursor, t, at.x, at.y, half);
  }
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    if (begin + j < end) factors[j] = next_tile<ROWS>(words[j], cursor, t, half);
  }
  if (total > 0) fill_table_wide<DOWN_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();

  float sums[ROWS / 8] = {};
#pragma unroll 1
  for (int first = begin; first < end; first += CHUNK) {
    float v[8];
    const int q = first + (lane_index() >> 3);
    const int2 at = entry_of(t, q);
    /* h has the shared expert behind all routed ones, of whatever format. */
    const bool is_shared = at.x == t.routed;
    load_values(h + (int64_t)(is_shared ? entries.routed : at.x) * h_stride,
                q < end ? at.y * TILE_COLS + lane_column() : NO_COLUMN,
                is_shared ? shared_expert.intermediate : experts.intermediate, v);
    const float undo = store_fragments(v, fragments);
#pragma unroll 1
    for (int turn = 0; turn < CHUNK; turn += DEPTH) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
        const int at = first + turn + j;
        if (at >= end) break;
        multiply_tile<ROWS>(sums, words[j], shared, fragments + 16 * (turn + j), factors[j] * undo);
        if (at + DEPTH < end) factors[j] = next_tile<ROWS>(words[j], cursor, t, half);
      }
    }
    __syncwarp();
  }
  store_sums<ROWS>(sums, area, 0);
}

/* Row `row` of one entry's down, in bf16 or f32, times its h; in all lanes. */
template <int FORMAT>
__device__ __forceinline__ float down_row(const uint8_t *down, int row, int dim, int intermediate,
                                          const float *h) {
  const int kblocks = blocks_of_64(intermediate);
  RowStream<FORMAT, 4> stream = {row_of<FORMAT>(down, row, dim, kblocks), kblocks * TILE_COLS, 0, 1};
  start_row(stream);
  return warp_sum(multiply_row(stream, [&](int column) { return load_four(h, column, intermediate); }));
}

__device__ __forceinline__ float down_row_of(const ExpertLayout &e, const uint8_t *blob, int row, int dim,
                                             const float *h) {
  const uint8_t *down = address_of(blob) + e.down_offset;
  if (e.format == BF16_ROWS) return down_row<BF16_ROWS>(down, row, dim, e.intermediate, h);
  return down_row<F32_ROWS>(down, row, dim, e.intermediate, h);
}

/* Rows `row` .. + rows over the entries in bf16 or f32, a warp each. */
__device__ __forceinline__ void down_plain_rows(const Decision *decision, const ExpertLayout &experts,
                                                const ExpertLayout &shared_expert, const float *h, int h_stride,
                                                int dim, int row, int rows, float *area) {
  const int routed = decision->shared;
  for (int i = warp_index(); i < rows; i += DOWN_WARPS) {
    float sum = 0.0f;
    for (int entry = 0; entry <= routed; entry++) {
      const ExpertLayout e = entry == routed ? shared_expert : experts;
      if (e.format == NF4_TILES) continue;
      sum += decision->weight[entry] *
             down_row_of(e, decision->blob[entry], row + i, dim, h + (int64_t)entry * h_stride);
    }
    if (lane_index() == 0) area[AREA_ROWS + i / DOWN_WARPS] = sum;
  }
}

template <int ROWS, int DEPTH>
__device__ __forceinline__ void down_block(const Decision *decision, const Entries &entries,
                                           const ExpertLayout &experts, const ExpertLayout &shared_expert,
                                           const float *h, int h_stride, int dim, int row, float *out, int add_to,
                                           uint8_t *shared) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  multiply_down<ROWS, DEPTH>(entries, experts, shared_expert, h, h_stride, row, shared, area);
  const bool plain = experts.format != NF4_TILES || shared_expert.format != NF4_TILES;
  if (plain) down_plain_rows(decision, experts, shared_expert, h, h_stride, dim, row, ROWS, area);
  __syncthreads();
  const int i = (int)threadIdx.x;
  if (i >= ROWS || row + i >= dim) return;
  float sum = sum_areas<DOWN_WARPS>(areas, i);
  if (plain) sum += areas[i % DOWN_WARPS * AREA_FLOATS + AREA_ROWS + i / DOWN_WARPS];
  out[row + i] = add_to ? out[row + i] + sum : sum;
}

KERNEL __launch_bounds__(DOWN_WARPS * 32, 2)
    decode_experts_down(const float *h, int h_stride, int k, const Decision *decision, ExpertLayout experts,
                        ExpertLayout shared_expert, int dim, float *hidden_add, int add_to) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  decision += token_index(), hidden_add += (int64_t)token_index() * dim;
  h += (int64_t)token_index() * (k + 1) * h_stride;
  const Entries entries = load_entries(decision);
  const bool host = __any_sync(ALL_LANES, (lane_index() < entries.routed && in_host(entries.blob)) ||
                                              in_host(entries.shared_blob));
  const int row = (int)blockIdx.x * BLOCK_ROWS;
  if (!host)
    down_block<BLOCK_ROWS, 4>(decision, entries, experts, shared_expert, h, h_stride, dim, row, hidden_add,
                              add_to, shared);
  else if (row % TILE_ROWS == 0)
    down_block<TILE_ROWS, 1>(decision, entries, experts, shared_expert, h, h_stride, dim, row, hidden_add,
                             add_to, shared);
}

KERNEL decode_combine(const float *gpu, const float *cpu, uint32_t *done, float *hidden, int dim) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int i = 4 * (int)(blockIdx.x * blockDim.x + threadIdx.x), token = token_index();
  const int64_t row = (int64_t)token * dim;
  hidden += row, cpu += row, gpu += gpu != nullptr ? row : 0;
  if (i < dim) {
    float4 x = *(const float4 *)(hidden + i);
    const float4 y = load_host16(cpu + i);
    if (gpu != nullptr) {
      const float4 z = *(const float4 *)(gpu + i);
      x.x += z.x, x.y += z.y, x.z += z.z, x.w += z.w;
    }
    x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    *(float4 *)(hidden + i) = x;
  }
  if (i == 0 && token == 0 && done != nullptr) *(volatile uint32_t *)done = 0;
}

EXPORT(decode_experts_up)
EXPORT(decode_experts_down)
EXPORT(decode_combine)
