/*
Matrices of a layer outside the experts, times one token (decode) or up to eight.

Grids of decode kernels have a token in z; each has its row of every buffer, one after the other.

decode_begin: copies the token's embedding row and the step.
  launch: grid (ceil(dim / 1024)), block (256), no shared memory.

decode_norm_linear: out_m = m x for m = a, b, c, x = rms_norm(hidden) * norm_scale.
  launch: grid (blocks(a) + blocks(b) + blocks(c)), block (256), shared memory NORM_SMEM = 40,960 bytes.
    blocks(m) = 0 if it has no weights, ceil(rows / 32) for NF4_TILES, else ceil(rows / 8), but
    blocks(a) = min(ceil(rows / 8), multiprocessors * blocks that fit on one at once) for rows of bf16 or
    f32: fewer blocks than ceil(rows / 8) share the rows evenly, so none must come late. Three fit on an
    H100, two where a multiprocessor has 100 KB of shared memory. hidden <= 8192.
  v1  NF4: one block per tile row, columns over 8 warps (TileStream)
  v2  bf16, f32: one warp per row, weights under way before the wait; for matrices of few rows
  v3  bf16, f32, a: persistent blocks with x in shared memory, four rows a warp at once; lm_head

decode_linear_add: hidden += W x.
decode_delta_out: the same with x = gated rms norm of the delta rule's output; its gate is in the sequence's ring, or
  where ring_slots is 0 in row `token` of `ring`.
  launch: grid (ceil(rows / 16)), block (512), shared memory ADD_SMEM = 49,152 bytes (both).
  NF4: one block per half tile row, so that 2048 rows fill 128 multiprocessors; else one warp per row.

linear_small: out[m] = W x[m] for up to eight tokens; tokens are the columns of B.
  launch: block (256), shared memory NORM_SMEM; grid (ceil(rows / 32)) for NF4_TILES, else
    (ceil(rows / 8)) up to SMALL_ONE_ROW = 4096 rows, (ceil(rows / 32)) above.

Vectors and rows of tokens are 16-byte aligned, lengths multiples of 4.
*/
#include "linear.cuh"

constexpr int MAX_TOKENS = 8;
/* Above this, linear_small takes four rows a warp: they share the loads of x. */
constexpr int SMALL_ONE_ROW = 4096;

KERNEL decode_begin(const float *embedding, const Step *host_step, float *hidden, Step *step, int dim) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = token_index();
  const int64_t at = (int64_t)token * dim + 4 * i;
  if (4 * i < dim) *(float4 *)(hidden + at) = load_host16(embedding + at);
  if (i == 0) {
    const volatile Step *from = host_step + token;
    step[token].position = from->position;
    step[token].number = from->number;
  }
}

/* ---- decode_norm_linear ---- */

/* Tile row `tile_row` of an NF4 matrix; `out` is known after the wait. */
template <class Out>
__device__ __forceinline__ void norm_tile_row(const Linear &m, int tile_row, const Normed &n, float eps,
                                              uint8_t *shared, Out out) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  const uint8_t *tiles = m.weights + (int64_t)tile_row * m.kblocks * TILE_BYTES;
  const int begin = share(m.kblocks, warp_index(), NORM_WARPS);
  const int end = share(m.kblocks, warp_index() + 1, NORM_WARPS);
  TileStream<TILE_ROWS, 2> stream[1];
  start_stream(stream[0], tiles, 0, begin, end);
  prefetch_tiles(tiles, begin + 2, end);
  const float unit = m.units[tile_row];
  fill_table_wide<NORM_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();

  float sums[1][TILE_ROWS / 8], squares = 0.0f;
  multiply_streams(stream, sums, shared, (uint4 *)area,
                   [&](int column, float(&v)[8]) { normed_values(n, column, v, squares); });
  squares = warp_sum(squares);
  store_sums<TILE_ROWS>(sums[0], area, 0);
  if (lane_index() == 0) area[AREA_SQUARES] = squares;
  __syncthreads();
  const int row = tile_row * TILE_ROWS + (int)threadIdx.x;
  if (threadIdx.x < TILE_ROWS && row < m.rows) {
    const float factor = norm_factor(n, sum_areas<NORM_WARPS>(areas, AREA_SQUARES), eps);
    out()[row] = sum_areas<NORM_WARPS>(areas, (int)threadIdx.x) * unit * factor;
  }
}

/* Eight rows, a warp each. */
template <int FORMAT, class Out>
__device__ __forceinline__ void norm_rows(const Linear &m, int block, const Normed &n, float eps, Out out) {
  const int row = block * NORM_WARPS + warp_index();
  RowStream<FORMAT, 4> stream = {row_of<FORMAT>(m.weights, row, m.rows, m.kblocks), m.kblocks * TILE_COLS,
                                 0, 1};
  start_row(stream);
  wait_for_previous_kernels();
  float squares = 0.0f;
  float sum = multiply_row(stream, [&](int column) { return normed_four(n, column, squares); });
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (lane_index() == 0 && row < m.rows) out()[row] = sum * norm_factor(n, squares, eps);
}

/* All rows of a large matrix over `blocks` blocks: R rows a warp, U pieces of each under way. */
template <int FORMAT, class Out>
__device__ __forceinline__ void norm_many_rows(const Linear &m, int block, int blocks, const Normed &n,
                                               float eps, uint8_t *shared, Out out) {
  using F = RowFormat<FORMAT>;
  constexpr int R = 4, U = 2;
  float *x = (float *)shared; /* in the table's place */
  float *areas = (float *)(shared + TABLE_BYTES);
  const int cols = m.kblocks * TILE_COLS;
  wait_for_previous_kernels();
  float squares = 0.0f;
  for (int column = 4 * (int)threadIdx.x; column < cols; column += 4 * NORM_WARPS * 32)
    *(float4 *)(x + column) = normed_four(n, column, squares);
  squares = warp_sum(squares);
  if (lane_index() == 0) areas[warp_index() * AREA_FLOATS + AREA_SQUARES] = squares;
  __syncthreads();
  const float factor = norm_factor(n, sum_areas<NORM_WARPS>(areas, AREA_SQUARES), eps);
  float *to = out();

  const int64_t row_bytes = (int64_t)cols * F::BYTES;
  const int start = (block * NORM_WARPS + warp_index()) * R;
  for (int row = start; row < m.rows; row += blocks * NORM_WARPS * R) {
    const uint8_t *weights = m.weights + row * row_bytes;
    float sums[R] = {};
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
        float4 four[F::LANE_COLS / 4];
#pragma unroll
        for (int i = 0; i < F::LANE_COLS / 4; i++) four[i] = *(const float4 *)(x + column + 4 * i);
#pragma unroll
        for (int r = 0; r < R; r++) sums[r] = dot16<FORMAT>(words[u][r], four, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float sum = warp_sum(sums[r]);
      if (lane_index() == r && row + r < m.rows) to[row + r] = sum * factor;
    }
  }
}

template <int FORMAT, class Out>
__device__ __forceinline__ void norm_any_rows(const Linear &m, int block, int blocks, const Normed &n,
                                              float eps, uint8_t *shared, Out out) {
  if (blocks * NORM_WARPS >= m.rows)
    norm_rows<FORMAT>(m, block, n, eps, out);
  else
    norm_many_rows<FORMAT>(m, block, blocks, n, eps, shared, out);
}

KERNEL __launch_bounds__(NORM_WARPS * 32, 3)
    decode_norm_linear(const Step *step, const float *hidden, const float *norm_scale, float eps, Linear a,
                       Linear b, Linear c, float *out_a, float *out_b, float *out_c, int ring_slots) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  const int token = token_index();
  step += token, hidden += (int64_t)token * a.cols;
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
  to = ring ? of_sequence(to, step) : to + (int64_t)token * m.rows;
  const Normed n = {hidden, norm_scale, m.cols};
  const auto out = [=]() { return ring ? to + (int64_t)(step->position % ring_slots) * m.rows : to; };
  if (m.format == NF4_TILES)
    norm_tile_row(m, block, n, eps, shared, out);
  else if (m.format == BF16_ROWS)
    norm_any_rows<BF16_ROWS>(m, block, blocks, n, eps, shared, out);
  else
    norm_any_rows<F32_ROWS>(m, block, blocks, n, eps, shared, out);
}

/* ---- decode_linear_add, decode_delta_out ---- */

/* Half tile row `blockIdx.x` of an NF4 matrix times x, added to hidden. A warp's share is whole groups of
   `granule` blocks of 64 columns. `values` as in multiply_stream; `after_wait` runs before it. */
template <int DEPTH, class Values, class AfterWait>
__device__ __forceinline__ void add_half_tile_row(const Linear &w, float *hidden, uint8_t *shared, int granule,
                                                  AfterWait after_wait, Values values) {
  float *areas = (float *)(shared + TABLE_BYTES);
  float *area = areas + warp_index() * AREA_FLOATS;
  const int tile_row = (int)blockIdx.x >> 1;
  const int granules = (w.kblocks + granule - 1) / granule;
  const uint8_t *tiles = w.weights + (int64_t)tile_row * w.kblocks * TILE_BYTES;
  const int begin = granule * share(granules, warp_index(), ADD_WARPS);
  const int end = min(granule * share(granules, warp_index() + 1, ADD_WARPS), w.kblocks);
  TileStream<ADD_ROWS, DEPTH> stream[1];
  start_stream(stream[0], tiles, (int)blockIdx.x & 1, begin, end);
  prefetch_tiles(tiles, begin + DEPTH, end);
  const float unit = w.units[tile_row];
  fill_table_wide<ADD_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();
  after_wait();

  float sums[1][ADD_ROWS / 8];
  multiply_streams(stream, sums, shared, (uint4 *)area, values);
  store_sums<ADD_ROWS>(sums[0], area, 0);
  __syncthreads();
  const int row = (int)blockIdx.x * ADD_ROWS + (int)threadIdx.x;
  if (threadIdx.x < ADD_ROWS && row < w.rows)
    hidden[row] += sum_areas<ADD_WARPS>(areas, (int)threadIdx.x) * unit;
}

/* The same for bf16 or f32: sixteen rows, a warp each. */
template <int FORMAT>
__device__ __forceinline__ void add_rows(const float *x, const Linear &w, float *hidden) {
  const int row = (int)blockIdx.x * ADD_ROWS + warp_index();
  RowStream<FORMAT, 4> stream = {row_of<FORMAT>(w.weights, row, w.rows, w.kblocks), w.kblocks * TILE_COLS, 0,
                                 1};
  start_row(stream);
  wait_for_previous_kernels();
  const float sum = warp_sum(multiply_row(stream, [&](int column) { return load_four(x, column, w.cols); }));
  if (lane_index() == 0 && row < w.rows) hidden[row] += sum;
}

KERNEL __launch_bounds__(ADD_WARPS * 32, 2) decode_linear_add(const float *x, Linear w, float *hidden) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  x += (int64_t)token_index() * w.cols, hidden += (int64_t)token_index() * w.rows;
  if (w.format == NF4_TILES)
    add_half_tile_row<4>(
        w, hidden, shared, 1, []() {},
        [&](int column, float(&v)[8]) { load_values(x, column, w.cols, v); });
  else if (w.format == BF16_ROWS)
    add_rows<BF16_ROWS>(x, w, hidden);
  else
    add_rows<F32_ROWS>(x, w, hidden);
}

/* Sixteen rows, a warp each; x in the table's place, TABLE_FLOATS columns at a time. */
template <int FORMAT>
__device__ __forceinline__ void add_gated_rows(const Gated &n, const Linear &w, float *hidden, uint8_t *shared) {
  float *x = (float *)shared;
  const int row = (int)blockIdx.x * ADD_ROWS + warp_index();
  const int cols = w.kblocks * TILE_COLS;
  const uint8_t *weights = row_of<FORMAT>(w.weights, row, w.rows, w.kblocks);
  float sum = 0.0f;
  for (int phase = 0; phase < cols; phase += TABLE_FLOATS) {
    const int end = min(cols, phase + TABLE_FLOATS);
    RowStream<FORMAT, 2> stream = {
        weights == nullptr ? nullptr : weights + (int64_t)phase * RowFormat<FORMAT>::BYTES, end - phase, 0, 1};
    start_row(stream);
    __syncthreads();
    for (int chunk = phase + warp_index() * CHUNK * TILE_COLS; chunk < end;
         chunk += ADD_WARPS * CHUNK * TILE_COLS) {
      const int column = chunk + (lane_index() >> 3) * TILE_COLS + lane_column();
      float v[8];
      gated_values(n, column, v);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (column + 8 * i < end) *(float2 *)(x + column - phase + 8 * i) = make_float2(v[2 * i], v[2 * i + 1]);
      }
    }
    __syncthreads();
    sum += multiply_row(stream, [&](int column) { return load_four(x, column, end - phase); });
  }
  sum = warp_sum(sum);
  if (lane_index() == 0 && row < w.rows) hidden[row] += sum;
}

KERNEL __launch_bounds__(ADD_WARPS * 32, 2)
    decode_delta_out(const Step *step, const float *o, const float *ring, int ring_slots, int qkvz_rows,
                     const float *norm, float eps, int num_key_heads, int num_value_heads, int dk, int dv,
                     Linear w, float *hidden) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  step += token_index();
  o += (int64_t)token_index() * w.cols, hidden += (int64_t)token_index() * w.rows;
  if (ring_slots > 0) ring = of_sequence(ring, step);
  Gated n = {o, nullptr, norm, eps, num_value_heads * dv, dk, 31 - __clz(dv), num_value_heads / num_key_heads};
  const auto find_projection = [&]() {
    n.projection = ring + (int64_t)(ring_slots > 0 ? step->position % ring_slots : token_index()) * qkvz_rows;
  };
  if (w.format == NF4_TILES) {
    add_half_tile_row<2>(w, hidden, shared, dv == 128 ? 2 : 1, find_projection,
                      [&](int column, float(&v)[8]) { gated_values(n, column, v); });
    return;
  }
  wait_for_previous_kernels();
  find_projection();
  if (w.format == BF16_ROWS)
    add_gated_rows<BF16_ROWS>(n, w, hidden, shared);
  else
    add_gated_rows<F32_ROWS>(n, w, hidden, shared);
}

/* ---- linear_small ---- */

/* A lane's share of 64 columns of x as B fragments: token g, the four k-steps. */
struct TokenFragments {
  uint32_t high[4][2];
  uint32_t low[4][2];
  float undo; /* the token's scaling */
};

__device__ __forceinline__ TokenFragments token_fragments(const float *x, int kblock, int cols, bool there) {
  TokenFragments f;
  float v[4][4];
  uint32_t largest = 0;
#pragma unroll
  for (int s = 0; s < 4; s++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = kblock * TILE_COLS + 16 * s + 8 * i + 2 * (lane_index() & 3);
      float2 pair = make_float2(0.0f, 0.0f);
      if (there && column < cols) pair = *(const float2 *)(x + column);
      v[s][2 * i] = pair.x, v[s][2 * i + 1] = pair.y;
      largest = max(largest, __float_as_uint(pair.x) & 0x7fffffffu);
      largest = max(largest, __float_as_uint(pair.y) & 0x7fffffffu);
    }
  }
  largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
  largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
  const float2 scale = scale_for(largest);
#pragma unroll
  for (int s = 0; s < 4; s++) {
    split_pair(v[s][0] * scale.x, v[s][1] * scale.x, f.high[s][0], f.low[s][0]);
    split_pair(v[s][2] * scale.x, v[s][3] * scale.x, f.high[s][1], f.low[s][1]);
  }
  f.undo = scale.y;
  return f;
}

__device__ __forceinline__ void small_tile_row(const float *x, int tokens, const Linear &w, float *out,
                                               uint8_t *shared) {
  float *areas = (float *)(shared + TABLE_BYTES);
  const int tile_row = (int)blockIdx.x, lane = lane_index(), g = lane >> 2, t = lane & 3;
  const uint8_t *tiles = w.weights + (int64_t)tile_row * w.kblocks * TILE_BYTES;
  const int begin = share(w.kblocks, warp_index(), NORM_WARPS);
  const int end = share(w.kblocks, warp_index() + 1, NORM_WARPS);
  TileStream<TILE_ROWS, 1> stream;
  start_stream(stream, tiles, 0, begin, end);
  prefetch_tiles(tiles, begin + 1, end);
  fill_table_wide<NORM_WARPS * 32>(shared);
  __syncthreads();
  wait_for_previous_kernels();

  const uint32_t column = table_column();
  float sums[4][2] = {}; /* row 4g + i, tokens 2t and 2t + 1 */
  for (int kblock = begin; kblock < end; kblock++) {
    const TileWords<TILE_ROWS> words = stream.words[0];
    if (kblock + 1 < end) load_tile<TILE_ROWS>(stream.words[0], stream.next);
    const TokenFragments f = token_fragments(x + (int64_t)g * w.cols, kblock, w.cols, g < tokens);
    float c[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        look_up_fragment<TILE_ROWS>(words, shared, column, s >> 1, s & 1, i, a);
        mma_f16(c[i], a, f.high[s][0], f.high[s][1]);
        mma_f16(c[i], a, f.low[s][0], f.low[s][1]);
      }
    }
    const float undo[2] = {__shfl_sync(ALL_LANES, f.undo, 8 * t), __shfl_sync(ALL_LANES, f.undo, 8 * t + 4)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float absmax = absmax_of(words, i);
#pragma unroll
      for (int j = 0; j < 2; j++) sums[i][j] = fmaf(absmax * undo[j], c[i][j] + c[i][2 + j], sums[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    *(float2 *)(areas + warp_index() * AREA_FLOATS + (4 * g + i) * MAX_TOKENS + 2 * t) =
        make_float2(sums[i][0], sums[i][1]);
  __syncthreads();
  const int row = tile_row * TILE_ROWS + (int)(threadIdx.x & 31), token = (int)threadIdx.x >> 5;
  if (row < w.rows && token < tokens)
    out[(int64_t)token * w.rows + row] =
        sum_areas<NORM_WARPS>(areas, (int)(threadIdx.x & 31) * MAX_TOKENS + token) * w.units[tile_row];
}

/* R rows a warp; x comes through L1. */
template <int FORMAT, int R>
__device__ __forceinline__ void small_rows(const float *x, int tokens, const Linear &w, float *out) {
  using F = RowFormat<FORMAT>;
  const int row = ((int)blockIdx.x * NORM_WARPS + warp_index()) * R, cols = w.kblocks * TILE_COLS;
  wait_for_previous_kernels();
  float sums[R][MAX_TOKENS] = {};
  for (int column = lane_index() * F::LANE_COLS; column < cols; column += F::WARP_COLS) {
    uint4 words[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint8_t *from = row_of<FORMAT>(w.weights, row + r, w.rows, w.kblocks);
      words[r] = make_uint4(0, 0, 0, 0);
      if (from != nullptr) words[r] = load_stream16(from + (int64_t)column * F::BYTES);
    }
#pragma unroll
    for (int token = 0; token < MAX_TOKENS; token++) {
      if (token >= tokens) break;
      float4 four[F::LANE_COLS / 4];
#pragma unroll
      for (int i = 0; i < F::LANE_COLS / 4; i++)
        four[i] = load_four(x + (int64_t)token * w.cols, column + 4 * i, w.cols);
#pragma unroll
      for (int r = 0; r < R; r++) sums[r][token] = dot16<FORMAT>(words[r], four, sums[r][token]);
    }
  }
#pragma unroll
  for (int token = 0; token < MAX_TOKENS; token++) {
    if (token >= tokens) break;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float sum = warp_sum(sums[r][token]);
      if (lane_index() == 0 && row + r < w.rows) out[(int64_t)token * w.rows + row + r] = sum;
    }
  }
}

KERNEL __launch_bounds__(NORM_WARPS * 32, 2) linear_small(const float *x, int tokens, Linear w, float *out) {
  DYNAMIC_SMEM(shared);
  launch_next_kernel();
  const bool one_row = w.rows <= SMALL_ONE_ROW;
  if (w.format == NF4_TILES)
    small_tile_row(x, tokens, w, out, shared);
  else if (w.format == BF16_ROWS)
    one_row ? small_rows<BF16_ROWS, 1>(x, tokens, w, out) : small_rows<BF16_ROWS, 4>(x, tokens, w, out);
  else
    one_row ? small_rows<F32_ROWS, 1>(x, tokens, w, out) : small_rows<F32_ROWS, 4>(x, tokens, w, out);
}

EXPORT(decode_begin)
EXPORT(decode_norm_linear)
EXPORT(decode_linear_add)
EXPORT(decode_delta_out)
EXPORT(linear_small)
