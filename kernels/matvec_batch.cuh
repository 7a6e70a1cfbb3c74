/*
A row of tiles, or rows of bf16 or f32, times up to four vectors at once: matvec.cuh with weights that are
read, and looked up, once for all.

In the tensor cores' product B has eight columns, of which one vector fills two: its high and its low parts.
Token n of a group has columns 2n and 2n + 1, and lanes with t = n have its sums: four tokens take no more
instructions than one, but for their x.

Each token's sums are bit for bit those that matvec.cuh gives it alone: the same products, added in the same
order. So a token does not depend on who shares the group.
*/
#pragma once

#include "matvec.cuh"

/* Tokens of a group. */
constexpr int GROUP = 4;

/* Dynamic shared memory: the table, then each warp's area, with room for every token's fragments. */
constexpr int GROUP_AREA_FLOATS = GROUP * AREA_FLOATS;
constexpr int group_shared_bytes(int warps) { return TABLE_BYTES + warps * GROUP * AREA_BYTES; }

/* The first token of the block's group, of `tokens` in all, and how many it has. */
__device__ __forceinline__ int group_first() { return GROUP * (int)blockIdx.z; }
__device__ __forceinline__ int group_size(int tokens) { return min(tokens - group_first(), GROUP); }

/* multiply_tile, for lanes of any t: sums of token t. `fragments` of the tile's columns, the tokens' 64 uint4
   apart. */
template <int ROWS>
__device__ __forceinline__ void multiply_group_tile(float (&sums)[ROWS / 8], const TileWords<ROWS> &words,
                                                    const uint8_t *table, const uint4 *fragments, int tokens,
                                                    float factor) {
  const uint32_t column = table_column();
  const int token = lane_index() >> 3;
  float c[ROWS / 8][4] = {};
#pragma unroll
  for (int d = 0; d < 2; d++) {
    uint4 x = make_uint4(0, 0, 0, 0);
    if (token < tokens) x = fragments[token * (AREA_FLOATS / 4) + 8 * d + (lane_index() & 7)];
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

/* multiply_streams of one tile row: sums[i] is of token t of the lane. `values(token, column, v)`. */
template <int ROWS, int DEPTH, class Values>
__device__ __forceinline__ void multiply_group(TileStream<ROWS, DEPTH> &s, float (&sums)[ROWS / 8],
                                               const uint8_t *table, uint4 *fragments, int tokens,
                                               Values values) {
  static_assert(CHUNK % DEPTH == 0, "a chunk is whole turns of the buffers");
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) sums[i] = 0.0f;
#pragma unroll 1
  for (int first = s.begin; first < s.end; first += CHUNK) {
    const int column = chunk_column(first, s.end);
    float undo = 0.0f;
    /* Two at a time: their loads go out together. */
#pragma unroll
    for (int pair = 0; pair < GROUP; pair += 2) {
      if (pair >= tokens) break;
      float v[2][8];
      values(pair, column, v[0]);
      if (pair + 1 < tokens) values(pair + 1, column, v[1]);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (pair + n >= tokens) break;
        const float of_token = store_fragments(v[n], fragments + (pair + n) * (AREA_FLOATS / 4));
        if ((lane_index() & 3) == pair + n) undo = of_token;
      }
    }
#pragma unroll 1
    for (int turn = 0; turn < CHUNK; turn += DEPTH) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
        const int kblock = first + turn + j;
        if (kblock >= s.end) break;
        multiply_group_tile<ROWS>(sums, s.words[j], table, fragments + 16 * (turn + j), tokens, undo);
        if (kblock + DEPTH < s.end) load_tile<ROWS>(s.words[j], s.next);
      }
    }
    __syncwarp();
  }
}

/* Leaves the warp's sums in its area: of token n in floats n * ROWS .. */
template <int ROWS>
__device__ __forceinline__ void store_group_sums(const float (&sums)[ROWS / 8], int tokens, float *area) {
  const int token = lane_index() & 3;
  if (token >= tokens) return;
#pragma unroll
  for (int i = 0; i < ROWS / 8; i++) area[token * ROWS + (lane_index() >> 2) * (ROWS / 8) + i] = sums[i];
}

/* Float `at` of the areas of all warps, added in order. */
template <int WARPS>
__device__ __forceinline__ float sum_group_areas(const float *areas, int at) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += areas[w * GROUP_AREA_FLOATS + at];
  return sum;
}

/* multiply_row for every token of the group: `x(token, column)`. */
template <int FORMAT, int DEPTH, class Values>
__device__ __forceinline__ void multiply_group_row(RowStream<FORMAT, DEPTH> &s, float (&sums)[GROUP], int tokens,
                                                   Values x) {
  using F = RowFormat<FORMAT>;
  const int step = s.parts * F::WARP_COLS;
#pragma unroll
  for (int n = 0; n < GROUP; n++) sums[n] = 0.0f;
#pragma unroll 1
  for (int first = s.part * F::WARP_COLS; first < s.cols; first += DEPTH * step) {
    const int column = first + lane_index() * F::LANE_COLS;
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
      if (n >= tokens) break;
      float4 four[DEPTH][F::LANE_COLS / 4];
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
#pragma unroll
        for (int i = 0; i < F::LANE_COLS / 4; i++) four[j][i] = x(n, column + j * step + 4 * i);
      }
#pragma unroll
      for (int j = 0; j < DEPTH; j++) sums[n] = dot16<FORMAT>(s.words[j], four[j], sums[n]);
    }
    if (first + DEPTH * step < s.cols) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) s.words[j] = load_piece(s, column + (j + DEPTH) * step);
    }
  }
}
