/*
The matrices of linear.cu times the tokens of a step at once, up to MAX_BATCH, in groups of four: a group reads
and looks up weights once, a second group finds them in L2. A token's results are bit for bit those of
linear.cu, which is the readable version.

decode_norm_linear_batch: as decode_norm_linear; out_m is [tokens, rows of m], or where `ring_slots` is given, out_a
  is in each sequence's own ring.
  launch: grid x as decode_norm_linear's, z = ceil(tokens / 4), block (256), shared memory
    max(NORM_BATCH_SMEM = 65,536, 16 * hidden + 128) bytes.

decode_linear_add_batch, decode_delta_out_batch: NF4_TILES only.
  launch: grid (ceil(rows / 16), 1, ceil(tokens / 4)), block (512), shared memory ADD_BATCH_SMEM = 98,304 bytes.
*/
#include "linear.cuh"
#include "matvec_batch.cuh"

constexpr int NORM_BATCH_SMEM = group_shared_bytes(NORM_WARPS);
constexpr int ADD_BATCH_SMEM = group_shared_bytes(ADD_WARPS);
static_assert(NORM_BATCH_SMEM == 65536 && ADD_BATCH_SMEM == 98304, "as the header says");

/* Floats of a warp's area behind its sums: the squares of each token's part of x. */
constexpr int BATCH_SQUARES = GROUP * TILE_ROWS;

/* The tokens of a block's group: rows of hidden. */
struct NormedGroup {
  Normed first;
  int tokens;
};

__device__ __forceinline__ Normed token_of(const NormedGroup &g, int token) {
  return {g.first.hidden + (int64_t)token * g.first.cols, g.first.scale, g.first.cols};
}

/* ---- decode_norm_linear_batch ---- */

/* norm_tile_row; `out(token)` is known after the wait. */
template <class Out>
__device__ __forceinline__ void norm_group_tile_row(const Linear &m, int tile_row, const NormedGroup &group,
                                                    float eps, uint8_t *shared, Out out) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * GROUP_AREA_FLOATS;
  const uint8_t *tiles = m.weights + (int64_t)tile_row * m.kblocks * TILE_BYTES;
  const int begin = share(m.kblocks, warp_index(), NORM_WARPS);
  const int end = share(m.kblocks, warp_index() + 1, NORM_WARPS);
  TileStream<TILE_ROWS, 2> stream;
  start_stream(stream, tiles, 0, begin, end);
  prefetch_tiles(tiles, begin + 2, end);
  const float unit = m.units[tile_row];
  fill_table_wide<NORM_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();

  float sums[TILE_ROWS / 8], squares[GROUP] = {};
  multiply_group(stream, sums, shared, (uint4 *)area, group.tokens, [&](int token, int column, float(&v)[8]) {
    normed_values(token_of(group, token), column, v, squares[token]);
  });
  store_group_sums<TILE_ROWS>(sums, group.tokens, area);
#pragma unroll
  for (int n = 0; n < GROUP; n++) {
    const float of_warp = warp_sum(squares[n]);
    if (lane_index() == 0) area[BATCH_SQUARES + n] = of_warp;
  }
  __syncthreads();
  const int in_tile = (int)threadIdx.x % TILE_ROWS, token = (int)threadIdx.x / TILE_ROWS;
  const int row = tile_row * TILE_ROWS + in_tile;
  if (token < group.tokens && row < m.rows) {
    const float factor =
        norm_factor(group.first, sum_group_areas<NORM_WARPS>(areas, BATCH_SQUARES + token), eps);
    out(token)[row] = sum_group_areas<NORM_WARPS>(areas, token * TILE_ROWS + in_tile) * unit * factor;
  }
}

/* norm_rows: eight rows, a warp each. */
template <int FORMAT, class Out>
__device__ __forceinline__ void norm_group_rows(const Linear &m, int block, const NormedGroup &group, float eps,
                                                Out out) {
  const int row = block * NORM_WARPS + warp_index();
  RowStream<FORMAT, 4> stream = {row_of<FORMAT>(m.weights, row, m.rows, m.kblocks), m.kblocks * TILE_COLS,
                                 0, 1};
  start_row(stream);
  wait_for_previous_kernels();
  float sums[GROUP], squares[GROUP] = {};
  multiply_group_row(stream, sums, group.tokens, [&](int token, int column) {
    return normed_four(token_of(group, token), column, squares[token]);
  });
#pragma unroll
  for (int n = 0; n < GROUP; n++) {
    if (n >= group.tokens) break;
    const float sum = warp_sum(sums[n]), of_row = warp_sum(squares[n]);
    if (lane_index() == 0 && row < m.rows) out(n)[row] = sum * norm_factor(group.first, of_row, eps);
  }
}

/* norm_many_rows: all rows of a large matrix over `blocks` blocks, R rows a warp, U pieces of each under way. */
template <int FORMAT, class Out>
__device__ __forceinline__ void norm_group_many_rows(const Linear &m, int block, int blocks,
                                                     const NormedGroup &group, float eps, uint8_t *shared,
                                                     Out out) {
  using F = RowFormat<FORMAT>;
  constexpr int R = 4, U = 2;
  const int cols = m.kblocks * TILE_COLS;
  float *x = (float *)shared; /* [GROUP, cols] in the table's place, and beyond it */
  float *squares = x + GROUP * cols;
  wait_for_previous_kernels();
  for (int n = 0; n < group.tokens; n++) {
    const Normed token = token_of(group, n);
    float of_lane = 0.0f;
    for (int column = 4 * (int)threadIdx.x; column < cols; column += 4 * NORM_WARPS * 32)
      *(float4 *)(x + n * cols + column) = normed_four(token, column, of_lane);
    of_lane = warp_sum(of_lane);
    if (lane_index() == 0) squares[n * NORM_WARPS + warp_index()] = of_lane;
  }
  __syncthreads();
  float factors[GROUP];
#pragma unroll
  for (int n = 0; n < GROUP; n++) {
    float sum = 0.0f;
    if (n < group.tokens) {
#pragma unroll
      for (int w = 0; w < NORM_WARPS; w++) sum += squares[n * NORM_WARPS + w];
    }
    factors[n] = norm_factor(group.first, sum, eps);
  }

  const int64_t row_bytes = (int64_t)cols * F::BYTES;
  const int start = (block * NORM_WARPS + warp_index()) * R;
  for (int row = start; row < m.rows; row += blocks * NORM_WARPS * R) {
    const uint8_t *weights = m.weights + row * row_bytes;
    float sums[R][GROUP] = {};
    for (int first = lane_index() * F::LANE_COLS; first < cols; first += U * F::WARP_COLS) {
      uint4 words[U][R];
#pragma unroll
      for (int u = 0; u < U; u++) {
#pragma unroll
        for (int r = 0; r < R; r++) {
          const int column = first + u * F::WARP_COLS;
          words[u][r] = make_uint4(0, 0, 0, 0);
          if (column < cols && row + r < m.rows)
            words[u][r] = load_stream16(weights + r * row_bytes + (int64_t)column * F::BYTES);
        }
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int column = first + u * F::WARP_COLS;
        if (column >= cols) break;
#pragma unroll
        for (int n = 0; n < GROUP; n++) {
          if (n >= group.tokens) break;
          float4 four[F::LANE_COLS / 4];
#pragma unroll
          for (int i = 0; i < F::LANE_COLS / 4; i++) four[i] = *(const float4 *)(x + n * cols + column + 4 * i);
#pragma unroll
          for (int r = 0; r < R; r++) sums[r][n] = dot16<FORMAT>(words[u][r], four, sums[r][n]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
      if (n >= group.tokens) break;
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float sum = warp_sum(sums[r][n]);
        if (lane_index() == r && row + r < m.rows) out(n)[row + r] = sum * factors[n];
      }
    }
  }
}

template <int FORMAT, class Out>
__device__ __forceinline__ void norm_group_any_rows(const Linear &m, int block, int blocks,
                                                    const NormedGroup &group, float eps, uint8_t *shared,
                                                    Out out) {
  /* As for one token: the two add squares in another order. */
  if (blocks * NORM_WARPS >= m.rows)
    norm_group_rows<FORMAT>(m, block, group, eps, out);
  else
    norm_group_many_rows<FORMAT>(m, block, blocks, group, eps, shared, out);
}

KERNEL __launch_bounds__(NORM_WARPS * 32, 3)
    decode_norm_linear_batch(const Step *step, int tokens, const float *hidden, const float *norm_scale, float eps,
                             Linear a, Linear b, Linear c, float *out_a, float *out_b, float *out_c,
                             int ring_slots) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  const int first = group_first();
  const int b_blocks = norm_blocks(b), c_blocks = norm_blocks(c);
  const int a_blocks = (int)gridDim.x - b_blocks - c_blocks;
  int block = (int)blockIdx.x, blocks = a_blocks;
  Linear m = a;
  float *to = out_a;
  bool ring = ring_slots > 0;
  if (block >= a_blocks) {
    block -= a_blocks, blocks = b_blocks, m = b, to = out_b, ring = false;
    if (block >= b_blocks) block -= b_blocks, blocks = c_blocks, m = c, to = out_c;
  }
  const NormedGroup group = {{hidden + (int64_t)first * m.cols, norm_scale, m.cols}, group_size(tokens)};
  const auto out = [=](int token) {
    const Step *own = step + first + token;
    return ring ? of_sequence(to, own) + (int64_t)(own->position % ring_slots) * m.rows
                : to + (int64_t)(first + token) * m.rows;
  };
  if (m.format == NF4_TILES)
    norm_group_tile_row(m, block, group, eps, shared, out);
  else if (m.format == BF16_ROWS)
    norm_group_any_rows<BF16_ROWS>(m, block, blocks, group, eps, shared, out);
  else
    norm_group_any_rows<F32_ROWS>(m, block, blocks, group, eps, shared, out);
}

/* ---- decode_linear_add_batch, decode_delta_out_batch ---- */

/* add_half_tile_row. */
template <int DEPTH, class Values, class AfterWait>
__device__ __forceinline__ void add_group_half_tile_row(const Linear &w, int tokens, float *hidden, uint8_t *shared,
                                                        int granule, AfterWait after_wait, Values values) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * GROUP_AREA_FLOATS;
  const int tile_row = (int)blockIdx.x >> 1;
  const int granules = (w.kblocks + granule - 1) / granule;
  const uint8_t *tiles = w.weights + (int64_t)tile_row * w.kblocks * TILE_BYTES;
  const int begin = granule * share(granules, warp_index(), ADD_WARPS);
  const int end = min(granule * share(granules, warp_index() + 1, ADD_WARPS), w.kblocks);
  TileStream<ADD_ROWS, DEPTH> stream;
  start_stream(stream, tiles, (int)blockIdx.x & 1, begin, end);
  prefetch_tiles(tiles, begin + DEPTH, end);
  const float unit = w.units[tile_row];
  fill_table_wide<ADD_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();
  after_wait();

  float sums[ADD_ROWS / 8];
  multiply_group(stream, sums, shared, (uint4 *)area, tokens, values);
  store_group_sums<ADD_ROWS>(sums, tokens, area);
  __syncthreads();
  const int in_block = (int)threadIdx.x % ADD_ROWS, token = (int)threadIdx.x / ADD_ROWS;
  const int row = (int)blockIdx.x * ADD_ROWS + in_block;
  if (token < tokens && row < w.rows)
    hidden[(int64_t)token * w.rows + row] +=
        sum_group_areas<ADD_WARPS>(areas, token * ADD_ROWS + in_block) * unit;
}

KERNEL __launch_bounds__(ADD_WARPS * 32, 1)
    decode_linear_add_batch(int tokens, const float *x, Linear w, float *hidden) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  x += (int64_t)group_first() * w.cols, hidden += (int64_t)group_first() * w.rows;
  add_group_half_tile_row<4>(
      w, group_size(tokens), hidden, shared, 1, []() {}, [&](int token, int column, float(&v)[8]) {
        load_values(x + (int64_t)token * w.cols, column, w.cols, v);
      });
}

KERNEL __launch_bounds__(ADD_WARPS * 32, 1)
    decode_delta_out_batch(const Step *step, int tokens, const float *o, const float *ring, int ring_slots,
                           int qkvz_rows, const float *norm, float eps, int num_key_heads, int num_value_heads,
                           int dk, int dv, Linear w, float *hidden) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  const int first = group_first(), size = group_size(tokens);
  o += (int64_t)first * w.cols, hidden += (int64_t)first * w.rows;
  const Gated one = {o,  nullptr,           norm, eps, num_value_heads * dv,
                     dk, 31 - __clz(dv), num_value_heads / num_key_heads};
  const float *projections[GROUP] = {};
  const auto find_projections = [&]() {
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
      if (n >= size) break;
      const Step *own = step + first + n;
      projections[n] = ring_slots > 0 ? of_sequence(ring, own) + (int64_t)(own->position % ring_slots) * qkvz_rows
                                      : ring + (int64_t)(first + n) * qkvz_rows;
    }
  };
  add_group_half_tile_row<2>(w, size, hidden, shared, dv == 128 ? 2 : 1, find_projections,
                             [&](int token, int column, float(&v)[8]) {
                               Gated n = one;
                               n.o += (int64_t)token * n.cols;
                               n.projection = projections[token];
                               gated_values(n, column, v);
                             });
}

EXPORT(decode_norm_linear_batch)
EXPORT(decode_linear_add_batch)
EXPORT(decode_delta_out_batch)
