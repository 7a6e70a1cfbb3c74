/*
A row of tiles, or rows of bf16 or f32, times one vector: what the decode kernels share.

NF4 (`TileStream`): a block takes one tile row (ROWS = 32) or half of one (16 rows: twice the blocks,
for matrices with fewer tile rows than the GPU can hold blocks) and splits its columns over its warps.
A warp turns CHUNK blocks of 64 values of x into f16 fragments in its own area of shared memory, and
multiplies its tiles with mma.m16n8k16, eight rows at a time. Weights are A, looked up by byte in the table:
their high parts in row g, their low parts in row g + 8, because an 8-byte look-up then lands in the two
registers that A wants (rows g and g + 8 as 16 rows cost a third of the instructions in moves). x is B, its
high part in column 0 and its low part in column 1, so a row's product is c0 + c1 + c2 (+ c3) of lanes
with t = 0.

  Lane 4g + t has rows ROWS / 8 * g + i, i < ROWS / 8, of the tile row or of its half, columns of group t:
  its loads are contiguous, and whole 32-byte sectors are used in both cases.

The vector is scaled by a power of two for every chunk, which loses nothing: its largest value then lies
in [2^13, 2^14) of f16, and what f16 rounds off of high + low is 2^-38 of it.

bf16 and f32 (`RowStream`): a warp, or several, take one row; f32 FMAs.

Per tile and warp: 32 8-byte look-ups of 2 cycles bound an SM to a tile in ~66 cycles (3.8 TB/s on an
H100); 64 shifts and masks, 16 MMAs and ~50 other instructions take less. Weights known at the launch are on
their way before wait_for_previous_kernels().

Vectors are 16-byte aligned, their lengths (cols) multiples of 4.
*/
#pragma once

#include "common.cuh"

constexpr uint32_t ALL_LANES = 0xffffffffu;

/* Blocks of 64 columns whose fragments a warp makes at once: eight lanes for each, eight values a lane. */
constexpr int CHUNK = 4;

/* Shared memory of a warp: fragments of a chunk; at the end of a kernel, the warp's sums. */
constexpr int AREA_BYTES = CHUNK * TILE_COLS * 4;
constexpr int AREA_FLOATS = AREA_BYTES / 4;

/* Dynamic shared memory of a kernel: the table, then the warps' areas. 40 KB for 8, 48 KB for 16. */
constexpr int shared_bytes(int warps) { return TABLE_BYTES + warps * AREA_BYTES; }

/* Columns that fit in the table's place, for formats that don't need the table. */
constexpr int TABLE_FLOATS = TABLE_BYTES / 4;

/* Added to Decision::blob of an expert in host memory: experts.cu reads such blobs by whole lines of 128
   bytes; by halves of lines, PCIe would take as many requests for half the bytes. Blobs are 16-byte aligned. */
constexpr uintptr_t IN_HOST = 1;

__device__ __forceinline__ int lane_index() { return (int)(threadIdx.x & 31); }
__device__ __forceinline__ int warp_index() { return (int)(threadIdx.x >> 5); }

/* Four bytes of weights, as load_stream16. */
#ifdef MOECTL_EMULATE
inline uint32_t load_stream4(const void *p) { return *(const uint32_t *)p; }
#else
__device__ __forceinline__ uint32_t load_stream4(const void *p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
#endif

/* ---- the table ---- */

/* NF4_VALUES[FIRST + code % 2^BITS] from immediates: a kernel that starts has no memory to wait for. */
template <int BITS, int FIRST>
__device__ __forceinline__ float nf4_value(int code) {
  if constexpr (BITS == 0) {
    return NF4_VALUES[FIRST];
  } else {
    const float low = nf4_value<BITS - 1, FIRST>(code);
    const float high = nf4_value<BITS - 1, FIRST + (1 << (BITS - 1))>(code);
    return code >> (BITS - 1) & 1 ? high : low;
  }
}

/* fill_table of common.cuh with 16-byte stores that meet in no bank; then __syncthreads. */
template <int THREADS>
__device__ __forceinline__ void fill_table_wide(uint8_t *table) {
  static_assert(THREADS % 256 == 0, "a thread fills pieces of one byte's entry");
  const int byte = (int)(threadIdx.x & 255);
  uint16_t value_high, value_low;
  split_f16(nf4_value<4, 0>(byte), value_high, value_low); /* lane i holds code i % 16 */
  const uint32_t first = (uint32_t)value_high | (uint32_t)value_low << 16;
  const uint32_t second = __shfl_sync(ALL_LANES, first, byte >> 4);
  const uint32_t high = (first & 0xffff) | second << 16;
  const uint32_t low = first >> 16 | (second & 0xffff0000u);
#pragma unroll
  for (int i = 0; i < 2048 / THREADS; i++) {
    const int piece = (int)(threadIdx.x >> 8) + i * (THREADS / 256) + byte;
    *(uint4 *)(table + byte * 128 + (piece & 7) * 16) = make_uint4(high, low, high, low);
  }
}

/* Where the lane's column of the table starts, in bytes: threadIdx.x % 16 * 8. Written so that ptxas doesn't
   see a mask, which it would fold into every look-up, for one more instruction each. */
__device__ __forceinline__ uint32_t table_column() {
#ifdef MOECTL_EMULATE
  return threadIdx.x % 16 * 8;
#else
  uint32_t column;
  asm("mad.lo.u32 %0, %1, -128, %2;" : "=r"(column) : "r"(threadIdx.x >> 4), "r"(threadIdx.x * 8));
  return column;
#endif
}

/* The two weights of byte `i` of `codes`. */
__device__ __forceinline__ CodePair look_up_byte(const uint8_t *table, uint32_t column, uint32_t codes,
                                                 int i) {
  const uint32_t entry = (i == 0 ? codes << 7 : codes >> (8 * i - 7)) & 0x7f80;
  const uint2 pair = *(const uint2 *)(table + (entry | column));
  return {pair.x, pair.y};
}

/* ---- x as fragments ---- */

/* (a, b) as f16 pairs: rounded, and the rest. |a|, |b| < 2^14. */
__device__ __forceinline__ void split_pair(float a, float b, uint32_t &high, uint32_t &low) {
#ifdef MOECTL_EMULATE
  uint16_t h[2], l[2];
  split_f16(a, h[0], l[0]);
  split_f16(b, h[1], l[1]);
  high = h[0] | (uint32_t)h[1] << 16;
  low = l[0] | (uint32_t)l[1] << 16;
#else
  const __half2 h = __floats2half2_rn(a, b);
  const float2 back = __half22float2(h);
  const __half2 l = __floats2half2_rn(a - back.x, b - back.y);
  high = *(const uint32_t *)&h;
  low = *(const uint32_t *)&l;
#endif
}

/* Powers of two for values whose largest has the bits `largest` (without sign): the first brings them
   below 2^14, the second undoes it; it is NaN if a value isn't finite. */
__device__ __forceinline__ float2 scale_for(uint32_t largest) {
  const int exponent = (int)(largest >> 23);
  const int scale = min(267 - exponent, 253); /* 2^(140 - exponent), within normal numbers */
  const uint32_t undo = exponent == 255 ? 0x7fc00000u : (uint32_t)(254 - scale) << 23;
  return make_float2(__uint_as_float((uint32_t)scale << 23), __uint_as_float(undo));
}

/* First of the eight columns of a lane in its block of 64: this and + 1, + 8, + 9, + 16, + 17, + 24, + 25. */
__device__ __forceinline__ int lane_column() {
  return 32 * (lane_index() >> 2 & 1) + 2 * (lane_index() & 3);
}

/* A column beyond every vector. */
constexpr int NO_COLUMN = 1 << 29;

/* Eight values of x at `column`; zeros from `cols` on. */
__device__ __forceinline__ void load_values(const float *x, int column, int cols, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = make_float2(0.0f, 0.0f);
    if (column + 8 * i < cols) pair = *(const float2 *)(x + column + 8 * i);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

/* Writes the warp's chunk, [CHUNK][d 2][high, low][t 4] of 16 bytes: b0, b1 of k-step 2d, b0, b1 of
   2d + 1. Returns the factor that undoes the scaling. */
__device__ __forceinline__ float store_fragments(const float (&v)[8], uint4 *fragments) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
  const float2 scale = scale_for(__reduce_max_sync(ALL_LANES, largest));
  uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    split_pair(v[2 * i] * scale.x, v[2 * i + 1] * scale.x, high[i], low[i]);
  uint4 *to = fragments + (lane_index() >> 2) * 8 + (lane_index() & 3);
  to[0] = make_uint4(high[0], high[1], high[2], high[3]);
  to[4] = make_uint4(low[0], low[1], low[2], low[3]);
  __syncwarp();
  return scale.y;
}

/* ---- tiles ---- */

/* A lane's part of a tile, or of 16 rows of it. */
template <int ROWS>
struct TileWords {
  uint32_t codes[2][ROWS / 8];
  uint32_t absmax[ROWS / 16]; /* two u16 each */
};

/* Where a lane reads the next tile. */
struct TileCursor {
  const uint8_t *codes;
  const uint8_t *absmax;
};

/* `tile`: its first byte; `half`: which 16 rows, if ROWS is 16. */
template <int ROWS>
__device__ __forceinline__ TileCursor cursor_at(const uint8_t *tile, int half) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  if constexpr (ROWS == 32)
    return {tile + t * 128 + g * 16, tile + 1024 + g * 8};
  else
    return {tile + t * 128 + half * 64 + g * 8, tile + 1024 + half * 32 + g * 4};
}

/* Requests the tile and goes on to the next. */
template <int ROWS>
__device__ __forceinline__ void load_tile(TileWords<ROWS> &words, TileCursor &at) {
#pragma unroll
  for (int d = 0; d < 2; d++) {
    if constexpr (ROWS == 32) {
      const uint4 v = load_stream16(at.codes + d * 512);
      words.codes[d][0] = v.x, words.codes[d][1] = v.y;
      words.codes[d][2] = v.z, words.codes[d][3] = v.w;
    } else {
      const uint2 v = load_stream8(at.codes + d * 512);
      words.codes[d][0] = v.x, words.codes[d][1] = v.y;
    }
  }
  if constexpr (ROWS == 32) {
    const uint2 v = load_stream8(at.absmax);
    words.absmax[0] = v.x, words.absmax[1] = v.y;
  } else {
    words.absmax[0] = load_stream4(at.absmax);
  }
  at.codes += TILE_BYTES;
  at.absmax += TILE_BYTES;
}

/* The warp's A fragment of k-step 2d + h, rows i of all lanes: high in a0 and a2, low in a1 and a3. */
template <int ROWS>
__device__ __forceinline__ void look_up_fragment(const TileWords<ROWS> &words, const uint8_t *table,
                                                 uint32_t column, int d, int h, int i, uint32_t (&a)[4]) {
  const CodePair first = look_up_byte(table, column, words.codes[d][i], 2 * h);
  const CodePair second = look_up_byte(table, column, words.codes[d][i], 2 * h + 1);
  a[0] = first.high, a[1] = first.low;
  a[2] = second.high, a[3] = second.low;
}

template <int ROWS>
__device__ __forceinline__ float absmax_of(const TileWords<ROWS> &words, int i) {
  return (float)(uint16_t)(words.absmax[i >> 1] >> (16 * (i & 1)));
}

/* sums[i] += factor * absmax * (row ROWS / 8 * g + i of the tile) . x, in lanes with t = 0; `fragments` of
   the tile's columns. */
template <int ROWS>
__device__ __forceinline__ void multiply_tile(float (&sums)[ROWS / 8], const TileWords<ROWS> &words,
                                              const uint8_t *table, const uint4 *fragments, float factor) {
  const uint32_t column = table_column();
  float c[ROWS / 8][4] = {};
#pragma unroll
  for (int d = 0; d < 2; d++) {
    uint4 x = make_uint4(0, 0, 0, 0);
    if (lane_index() < 8) x = fragments[8 * d + lane_index()];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int i = 0; i < ROWS / 8; i++) {
        uint32_t a[4];
        look_up_fragment<ROWS>(words, table, column, d, h, i, a);
        mma_f16(c[i], a, h ? x.z : x.x, h ? x.w : x.y);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++)
    sums[i] = fmaf(absmax_of(words, i) * factor, c[i][0] + (c[i][1] + c[i][2]), sums[i]);
}

/* The warp's share of `count` pieces, in order. */
__device__ __forceinline__ int share(int count, int warp, int warps) { return count * warp / warps; }

/* Tiles begin .. end of a tile row, the warp's share; DEPTH of them are under way. */
template <int ROWS, int DEPTH>
struct TileStream {
  int begin;
  int end;
  TileCursor next;
  TileWords<ROWS> words[DEPTH];
};

/* Requests the first tiles of the warp's share of the tile row that starts with `tiles`. */
template <int ROWS, int DEPTH>
__device__ __forceinline__ void start_stream(TileStream<ROWS, DEPTH> &s, const uint8_t *tiles, int half,
                                             int begin, int end) {
  s.begin = begin;
  s.end = end;
  s.next = cursor_at<ROWS>(tiles + (int64_t)begin * TILE_BYTES, half);
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    if (begin + j < end) load_tile<ROWS>(s.words[j], s.next);
  }
}

/* Calls tiles begin .. end into L2, before it is known that they can be used. */
__device__ __forceinline__ void prefetch_tiles(const uint8_t *tiles, int begin, int end) {
  const int bytes = (end - begin) * TILE_BYTES;
  for (int at = lane_index() * 128; at < bytes; at += 32 * 128)
    prefetch_to_l2(tiles + (int64_t)begin * TILE_BYTES + at);
}

/* The lane's first column in the chunk that starts with tile `first`. */
__device__ __forceinline__ int chunk_column(int first, int end) {
  const int kblock = first + (lane_index() >> 3);
  return kblock < end ? kblock * TILE_COLS + lane_column() : NO_COLUMN;
}

/* sums[n][i]: row ROWS / 8 * g + i of tile row n, over the warp's tiles, in lanes with t = 0. All streams
   have the same share. `values(column, v)`: the lane's eight values of x (lane_column); the whole warp
   calls it together, lanes beyond the warp's share with NO_COLUMN, which must give zeros. */
template <int ROWS, int DEPTH, int N, class Values>
__device__ __forceinline__ void multiply_streams(TileStream<ROWS, DEPTH> (&s)[N], float (&sums)[N][ROWS / 8],
                                                 const uint8_t *table, uint4 *fragments, Values values) {
  static_assert(CHUNK % DEPTH == 0, "a chunk is whole turns of the buffers");
#pragma unroll
  for (int i = 0; i < N * ROWS / 8; i++) sums[i / (ROWS / 8)][i % (ROWS / 8)] = 0.0f;
  const int end = s[0].end;
#pragma unroll 1
  for (int first = s[0].begin; first < end; first += CHUNK) {
    float v[8];
    values(chunk_column(first, end), v);
    const float undo = store_fragments(v, fragments);
#pragma unroll 1
    for (int turn = 0; turn < CHUNK; turn += DEPTH) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
        const int kblock = first + turn + j;
        if (kblock >= end) break;
#pragma unroll
        for (int n = 0; n < N; n++) {
          multiply_tile<ROWS>(sums[n], s[n].words[j], table, fragments + 16 * (turn + j), undo);
          if (kblock + DEPTH < end) load_tile<ROWS>(s[n].words[j], s[n].next);
        }
      }
    }
    __syncwarp();
  }
}

/* Leaves the warp's sums in floats at .. at + ROWS of its area. */
template <int ROWS>
__device__ __forceinline__ void store_sums(const float (&sums)[ROWS / 8], float *area, int at) {
  if ((lane_index() & 3) != 0) return;
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) area[at + (lane_index() >> 2) * (ROWS / 8) + i] = sums[i];
}

/* Float `at` of the areas of all warps, added in order. */
template <int WARPS>
__device__ __forceinline__ float sum_areas(const float *areas, int at) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += areas[w * AREA_FLOATS + at];
  return sum;
}

/* ---- rows of bf16 or f32 ---- */

template <int FORMAT>
struct RowFormat {
  static constexpr int LANE_COLS = FORMAT == BF16_ROWS ? 8 : 4; /* 16 bytes */
  static constexpr int WARP_COLS = 32 * LANE_COLS;
  static constexpr int BYTES = FORMAT == BF16_ROWS ? 2 : 4;
};

/* sum + weights . x for the lane's 16 bytes of weights; x in steps of four. */
template <int FORMAT>
__device__ __forceinline__ float dot16(const uint4 &w, const float4 *x, float sum) {
  if constexpr (FORMAT == BF16_ROWS) {
    sum = fmaf(__uint_as_float(w.x << 16), x[0].x, sum);
    sum = fmaf(__uint_as_float(w.x & 0xffff0000u), x[0].y, sum);
    sum = fmaf(__uint_as_float(w.y << 16), x[0].z, sum);
    sum = fmaf(__uint_as_float(w.y & 0xffff0000u), x[0].w, sum);
    sum = fmaf(__uint_as_float(w.z << 16), x[1].x, sum);
    sum = fmaf(__uint_as_float(w.z & 0xffff0000u), x[1].y, sum);
    sum = fmaf(__uint_as_float(w.w << 16), x[1].z, sum);
    sum = fmaf(__uint_as_float(w.w & 0xffff0000u), x[1].w, sum);
  } else {
    sum = fmaf(__uint_as_float(w.x), x[0].x, sum);
    sum = fmaf(__uint_as_float(w.y), x[0].y, sum);
    sum = fmaf(__uint_as_float(w.z), x[0].z, sum);
    sum = fmaf(__uint_as_float(w.w), x[0].w, sum);
  }
  return sum;
}

/* x[column ..], zeros from `cols` on. */
__device__ __forceinline__ float4 load_four(const float *x, int column, int cols) {
  return column < cols ? *(const float4 *)(x + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

/* Part `part` of `parts` of a row: every parts-th piece of WARP_COLS columns; DEPTH pieces under way. */
template <int FORMAT, int DEPTH>
struct RowStream {
  const uint8_t *row; /* null: no row, the products are zeros */
  int cols;           /* padded: kblocks * 64 */
  int part;
  int parts;
  uint4 words[DEPTH];
};

template <int FORMAT, int DEPTH>
__device__ __forceinline__ uint4 load_piece(const RowStream<FORMAT, DEPTH> &s, int column) {
  if (s.row == nullptr || column >= s.cols) return make_uint4(0, 0, 0, 0);
  return load_stream16(s.row + (int64_t)column * RowFormat<FORMAT>::BYTES);
}

template <int FORMAT, int DEPTH>
__device__ __forceinline__ void start_row(RowStream<FORMAT, DEPTH> &s) {
  using F = RowFormat<FORMAT>;
#pragma unroll
  for (int j = 0; j < DEPTH; j++)
    s.words[j] = load_piece(s, (s.part + j * s.parts) * F::WARP_COLS + lane_index() * F::LANE_COLS);
}

/* The lane's share of row . x; `x(column)`: four values, zeros beyond the vector's end; each column of the
   part is asked for once, by one lane. No branches in a turn: its loads of x go out together. */
template <int FORMAT, int DEPTH, class Values>
__device__ __forceinline__ float multiply_row(RowStream<FORMAT, DEPTH> &s, Values x) {
  using F = RowFormat<FORMAT>;
  const int step = s.parts * F::WARP_COLS;
  float sum = 0.0f;
#pragma unroll 1
  for (int first = s.part * F::WARP_COLS; first < s.cols; first += DEPTH * step) {
    const int column = first + lane_index() * F::LANE_COLS;
    float4 four[DEPTH][F::LANE_COLS / 4];
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
#pragma unroll
      for (int i = 0; i < F::LANE_COLS / 4; i++) four[j][i] = x(column + j * step + 4 * i);
    }
#pragma unroll
    for (int j = 0; j < DEPTH; j++) sum = dot16<FORMAT>(s.words[j], four[j], sum);
    if (first + DEPTH * step < s.cols) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) s.words[j] = load_piece(s, column + (j + DEPTH) * step);
    }
  }
  return sum;
}

/* Row `row` of a matrix in bf16 or f32, or null beyond its end. */
template <int FORMAT>
__device__ __forceinline__ const uint8_t *row_of(const uint8_t *weights, int row, int rows, int kblocks) {
  if (row >= rows) return nullptr;
  return weights + (int64_t)row * kblocks * TILE_COLS * RowFormat<FORMAT>::BYTES;
}

/* ---- RMS norm ---- */

/* Values of hidden * scale (null: 1), while the squares of hidden are summed up. The factor that is left,
   1 / rms, goes onto the products: no warp needs the whole vector. */
struct Normed {
  const float *hidden;
  const float *scale;
  int cols;
};

__device__ __forceinline__ float inverse_rms(float squares, int cols, float eps) {
  return rsqrtf(__fdividef(squares, (float)cols) + eps);
}

/* silu of common.cuh without the slow exact division; 2 ulp. */
__device__ __forceinline__ float quick_silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

__device__ __forceinline__ float4 normed_four(const Normed &n, int column, float &squares) {
  float4 x = load_four(n.hidden, column, n.cols);
  squares = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, squares))));
  if (n.scale == nullptr) return x;
  const float4 s = load_four(n.scale, column, n.cols);
  return make_float4(x.x * s.x, x.y * s.y, x.z * s.z, x.w * s.w);
}

/* The lane's eight. */
__device__ __forceinline__ void normed_values(const Normed &n, int column, float (&v)[8], float &squares) {
  load_values(n.hidden, column, n.cols, v);
  if (n.scale == nullptr) {
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(v[i], v[i], squares);
    return;
  }
  float scale[8];
  load_values(n.scale, column, n.cols, scale);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    squares = fmaf(v[i], v[i], squares);
    v[i] *= scale[i];
  }
}
