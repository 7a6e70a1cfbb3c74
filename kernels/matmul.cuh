/*
The core of prefill's matrix products: per block, 8 warps with 32 weight rows each, times up to 128
tokens, on tensor cores.

  A  weights, NF4 tiles: global memory -> registers, one tile ahead, dequantised through a table in
     shared memory. No weight is dequantised twice in a block, and none passes through shared memory.
  B  x as two f16 terms (prefill_split): cp.async into two stages that all warps share. The column
     order inside a tile (layout.rs) is that of m16n8k16, so B lies as it is in global memory.
  C  f32. Every 32 (exact) or 64 (fast) columns start from zero and are then multiplied by absmax.

EXACT takes three products, w_high x_high + w_high x_low + w_low x_high: as exact as f32. Not EXACT
takes the first only: 2^-11 relative per product, and half the bytes of x.

A token tile has the tokens that are there, in steps of 16: experts have 80 tokens on average in a
chunk of 4096, and whole tiles of 64 or 128 would waste a third. A group of n tokens is cut into
ceil(n / 128) tiles of equal size.

128 x 32 per warp balances tensor cores and shared memory: per 64 columns and SM, 620 cycles of MMA
(three products) against 64 of table and 256 of B. Two warps share a tensor core, so that one
dequantises while the other multiplies; 255 registers each is all there are.
*/
#pragma once

#include "common.cuh"

constexpr int MATMUL_WARPS = 8;
constexpr int MATMUL_THREADS = MATMUL_WARPS * 32;
constexpr int TILE_TOKENS = 128;
constexpr int TOKEN_PAIRS = TILE_TOKENS / 16; /* n-tiles are of 8 tokens and come in pairs */

/* One term of x in a stage: [128 tokens][8 chunks of 16 bytes]; chunk c of token i lies at
   c ^ (i & 7), so that neither cp.async nor ldmatrix meets in a bank. */
constexpr int X_TERM_BYTES = TILE_TOKENS * TILE_COLS * 2;

/* Shared memory: table, two stages of x, row_scale [128], source row [128]. */
template <bool EXACT>
struct MatmulSmem {
  static constexpr int STAGE_BYTES = (EXACT ? 2 : 1) * X_TERM_BYTES;
  static constexpr int X = TABLE_BYTES;
  static constexpr int SCALES = X + 2 * STAGE_BYTES;
  static constexpr int SOURCES = SCALES + TILE_TOKENS * 4;
  static constexpr int BYTES = SOURCES + TILE_TOKENS * 4; /* exact 99,328; fast 66,560 */
};

/* The x of up to 128 tokens. */
struct TokenTile {
  const uint16_t *high; /* [.., stride * 64] f16 */
  const uint16_t *low;  /* the same; not read by the fast kernels, may be null there */
  int32_t count;        /* tokens of this tile, at least 1 */
  int32_t kblocks;      /* of the product */
  int32_t stride;       /* kblocks of a row of high and low */
};

/* Tokens per tile when n of them are cut into `tiles` tiles of at most 128. */
__device__ __forceinline__ int tokens_per_tile(int n, int tiles) {
  return ((n + tiles - 1) / tiles + 15) / 16 * 16;
}

/* The table, by byte. EXACT: [256][16 columns] of two words, one per weight: its f16 terms, high in the
   low half. (CodePair has the words as the MMA takes them, but no two of them in neighbouring
   registers: the compiler then copies four registers per MMA. Permuting bytes costs two instructions
   per byte of weights.) Fast: the high terms only, [256][32 columns] of 4 bytes, one column per lane.
   A thread writes the 128 bytes of its byte in an order that keeps a warp out of one bank. */
template <bool EXACT>
__device__ __forceinline__ void fill_matmul_table(uint8_t *table) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    uint16_t high[2], low[2];
    split_f16(NF4_VALUES[byte & 15], high[0], low[0]);
    split_f16(NF4_VALUES[byte >> 4], high[1], low[1]);
    uint32_t first = (uint32_t)high[0] | (uint32_t)(EXACT ? low[0] : high[1]) << 16;
    uint32_t second = EXACT ? (uint32_t)high[1] | (uint32_t)low[1] << 16 : first;
    for (int i = 0; i < 8; i++)
      *(uint4 *)(table + byte * 128 + ((i + byte) & 7) * 16) =
          make_uint4(first, second, first, second);
  }
}

/* ---- B ---- */

/* What a thread copies of every stage: chunk threadIdx % 8 of tokens threadIdx / 8 + 32 i. */
struct XCopies {
  int32_t block[4]; /* source row * stride */
};

/* `sources` in shared memory: [count] rows of high and low. */
__device__ __forceinline__ XCopies x_copies(const TokenTile &x, const int32_t *sources) {
  XCopies copies;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int token = threadIdx.x / 8 + 32 * i;
    copies.block[i] = token < x.count ? sources[token] * x.stride : -1;
  }
  return copies;
}

/* Starts the copies of column block kb; tokens beyond the tile's count become zeros. */
template <bool EXACT>
__device__ __forceinline__ void copy_stage(uint8_t *stage, const TokenTile &x, const XCopies &copies,
                                           int kb) {
  int chunk = threadIdx.x % 8;
  int first = threadIdx.x / 8;
  uint8_t *to = stage + first * 128 + (chunk ^ (first & 7)) * 16;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (32 * i >= x.count) break;
    bool valid = copies.block[i] >= 0;
    int64_t from = (int64_t)(valid ? copies.block[i] + kb : 0) * TILE_COLS + chunk * 8;
    cp_async16(to + i * 4096, x.high + from, valid);
    if (EXACT) cp_async16(to + i * 4096 + X_TERM_BYTES, x.low + from, valid);
  }
}

/* B of two n-tiles: chunks of 8 columns, the lane's two of each. EXACT: [n][term][4 chunks of half a
   tile]; fast: [n][half][its 4 chunks]. */
struct XFragments {
  uint32_t r[2][2][4];
};

/* row_offset: lane i names token i % 8 of an n-tile and chunk i / 8, chunk + 4 with bit 6 turned. */
template <bool EXACT>
__device__ __forceinline__ void load_x(XFragments &b, const uint8_t *stage, int row_offset, int half,
                                       int pair) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const uint8_t *row = stage + (row_offset ^ (64 * half)) + (2 * pair + n) * 1024;
    ldmatrix_x4(b.r[n][0], row);
    ldmatrix_x4(b.r[n][1], EXACT ? row + X_TERM_BYTES
                                 : stage + (row_offset ^ 64) + (2 * pair + n) * 1024);
  }
}

/* ---- A ---- */

/*
Where a warp's two 16-row fragments come from: of lane 4g + t, fragment m has in MMA rows g and g + 8
two neighbouring rows of a tile.

- halves of one tile row: fragment m has tile rows 4g + 2m and 4g + 2m + 1; one load of 16 bytes has
  both.
- of two matrices (SwiGLU): fragment 0 has rows 4g + 2h, 4g + 2h + 1 of gate, fragment 1 the same rows
  of up, with h the warp's half of both tile rows: gate and up of a value meet in one lane.
*/
struct WeightTiles {
  const uint8_t *tiles[2]; /* tile rows; the same one twice for halves of one */
  int32_t half;            /* of two matrices: h */
};

/* A lane's codes of the tile: [d][row of fragment 0: 0, 1; of fragment 1: 2, 3]. */
struct Codes {
  uint32_t word[2][4];
};

template <bool TWO_MATRICES>
__device__ __forceinline__ void load_codes(uint32_t (&word)[4], const WeightTiles &w, int kb, int d) {
  int lane = threadIdx.x % 32;
  int64_t offset = (int64_t)kb * TILE_BYTES + (4 * d + lane % 4) * 128 + lane / 4 * 16;
  if (TWO_MATRICES) {
    uint2 gate = *(const uint2 *)(w.tiles[0] + offset + 8 * w.half);
    uint2 up = *(const uint2 *)(w.tiles[1] + offset + 8 * w.half);
    word[0] = gate.x, word[1] = gate.y, word[2] = up.x, word[3] = up.y;
  } else {
    uint4 v = load_stream16(w.tiles[0] + offset);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }
}

/* The u16 absmax of the same four rows, two per word. */
template <bool TWO_MATRICES>
__device__ __forceinline__ uint2 load_absmax(const WeightTiles &w, int kb) {
  int64_t offset = (int64_t)kb * TILE_BYTES + 1024 + threadIdx.x % 32 / 4 * 8;
  if (TWO_MATRICES)
    return make_uint2(*(const uint32_t *)(w.tiles[0] + offset + 4 * w.half),
                      *(const uint32_t *)(w.tiles[1] + offset + 4 * w.half));
  return load_stream8(w.tiles[0] + offset);
}

/* Byte i of a word, as an offset into the table. */
__device__ __forceinline__ uint32_t table_offset(uint32_t word, int i) {
  return (i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7f80;
}

/* acc += part * absmax, for two n-tiles: part of rows g (0, 1) and g + 8 (2, 3) of two fragments. */
__device__ __forceinline__ void scale_and_add(float (&acc)[2][2][4], const float (&part)[2][2][4],
                                              const float (&absmax)[4]) {
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        acc[n][m][i] = fmaf(absmax[2 * m + i / 2], part[n][m][i], acc[n][m][i]);
}

/*
acc[p][n][m][..] = the warp's 32 rows (without units and row_scale) times tokens 16p + 8n ..: of lane
4g + t, elements 0, 1 are tokens 2t, 2t + 1 of the fragment's row g, elements 2, 3 of row g + 8.

All threads of the block call it; those of a warp that has no rows with active = false. On entry the
table and `sources` are written and a __syncthreads lies behind.
*/
template <bool EXACT, bool TWO_MATRICES>
__device__ __forceinline__ void multiply(float (&acc)[TOKEN_PAIRS][2][2][4], uint8_t *smem,
                                         const TokenTile &x, const WeightTiles &w, bool active) {
  typedef MatmulSmem<EXACT> Smem;
  constexpr int PASSES = EXACT ? 2 : 1;      /* per tile: a[][][] of both terms, or of all columns */
  constexpr int K_STEPS = EXACT ? 2 : 4;     /* per pass */
  const int lane = threadIdx.x % 32;
  const int pairs = (x.count + 15) / 16;
  const XCopies copies = x_copies(x, (const int32_t *)(smem + Smem::SOURCES));
  const uint8_t *table = smem + (EXACT ? lane % 16 * 8 : lane * 4);
  const int row_offset = lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16;

#pragma unroll
  for (int p = 0; p < TOKEN_PAIRS; p++)
#pragma unroll
    for (int i = 0; i < 16; i++) acc[p][i / 8][i / 4 % 2][i % 4] = 0.0f;

  copy_stage<EXACT>(smem + Smem::X, x, copies, 0);
  cp_async_commit();
  Codes codes = {};
  uint2 packed_absmax = {};
  if (active) {
    load_codes<TWO_MATRICES>(codes.word[0], w, 0, 0);
    load_codes<TWO_MATRICES>(codes.word[1], w, 0, 1);
    packed_absmax = load_absmax<TWO_MATRICES>(w, 0);
  }

  for (int kb = 0; kb < x.kblocks; kb++) {
    const uint8_t *stage = smem + Smem::X + kb % 2 * Smem::STAGE_BYTES;
    cp_async_wait<0>();
    /* The stage is there, and nobody reads the other one any more. */
    __syncthreads();
    if (kb + 1 < x.kblocks)
      copy_stage<EXACT>(smem + Smem::X + (kb + 1) % 2 * Smem::STAGE_BYTES, x, copies, kb + 1);
    cp_async_commit();
    if (!active) continue;

    const int next = min(kb + 1, x.kblocks - 1);
    const float absmax[4] = {
        (float)(packed_absmax.x & 0xffff), (float)(packed_absmax.x >> 16),
        (float)(packed_absmax.y & 0xffff), (float)(packed_absmax.y >> 16)};
    packed_absmax = load_absmax<TWO_MATRICES>(w, next);

#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      uint32_t a_high[K_STEPS][2][4], a_low[K_STEPS][2][4];
#pragma unroll
      for (int k = 0; k < K_STEPS; k++) {
        const uint32_t(&word)[4] = codes.word[EXACT ? pass : k / 2];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const uint8_t *entry = table + table_offset(word[2 * m + i % 2], k % 2 * 2 + i / 2);
            if (EXACT) {
              uint2 weights = *(const uint2 *)entry;
              a_high[k][m][i] = __byte_perm(weights.x, weights.y, 0x5410);
              a_low[k][m][i] = __byte_perm(weights.x, weights.y, 0x7632);
            } else {
              a_high[k][m][i] = *(const uint32_t *)entry;
            }
          }
      }
      /* The words have been used: the next tile's take their registers. */
      if (EXACT) {
        load_codes<TWO_MATRICES>(codes.word[pass], w, next, pass);
      } else {
        load_codes<TWO_MATRICES>(codes.word[0], w, next, 0);
        load_codes<TWO_MATRICES>(codes.word[1], w, next, 1);
      }

      XFragments b;
      load_x<EXACT>(b, stage, row_offset, pass, 0);
#pragma unroll
      for (int p = 0; p < TOKEN_PAIRS; p++) {
        if (p >= pairs) break;
        float part[2][2][4] = {};
        /* Four accumulators in turn: a product waits for the one four before it. */
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
          const int half = EXACT ? 0 : k / 2, r = k % 2 * 2;
#pragma unroll
          for (int i = 0; i < 4; i++)
            mma_f16(part[i / 2][i % 2], a_high[k][i % 2], b.r[i / 2][half][r], b.r[i / 2][half][r + 1]);
          if (EXACT) {
#pragma unroll
            for (int i = 0; i < 4; i++)
              mma_f16(part[i / 2][i % 2], a_high[k][i % 2], b.r[i / 2][1][r], b.r[i / 2][1][r + 1]);
#pragma unroll
            for (int i = 0; i < 4; i++)
              mma_f16(part[i / 2][i % 2], a_low[k][i % 2], b.r[i / 2][0][r], b.r[i / 2][0][r + 1]);
          }
        }
        /* Before the sums, which wait for the last product. Rows beyond the pairs are not used. */
        if (p + 1 < TOKEN_PAIRS) load_x<EXACT>(b, stage, row_offset, pass, p + 1);
        scale_and_add(acc[p], part, absmax);
      }
    }
  }
}

/* out[0..4] (+)= v, of which `count` exist. */
__device__ __forceinline__ void store_rows(float *out, float4 v, int count, bool aligned, int add) {
  if (aligned) {
    if (add) {
      float4 old = *(const float4 *)out;
      v = make_float4(old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w);
    }
    *(float4 *)out = v;
    return;
  }
  const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) out[i] = add ? out[i] + value[i] : value[i];
}

/* What a warp with one tile row has: `out` is the place of the lane's first row, tile row 4g, for token
   0; row_count rows from there on exist; `stride` floats lie from token to token. */
__device__ __forceinline__ void store_accumulators(const float (&acc)[TOKEN_PAIRS][2][2][4], float *out,
                                                   int stride, int row_count, int tokens, float unit,
                                                   const float *scales, int add) {
  const bool aligned = stride % 4 == 0 && row_count >= 4;
#pragma unroll
  for (int n = 0; n < 2 * TOKEN_PAIRS; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int token = 8 * n + threadIdx.x % 4 * 2 + i;
      if (token >= tokens) continue;
      float scale = unit * scales[token];
      const float(&c)[2][4] = acc[n / 2][n % 2];
      store_rows(
          out + (int64_t)token * stride,
          make_float4(c[0][i] * scale, c[0][2 + i] * scale, c[1][i] * scale, c[1][2 + i] * scale),
          row_count, aligned, add);
    }
}

/* ---- BF16_ROWS and F32_ROWS: only small models have them ---- */

/* Tokens that a lane works on at a time. */
constexpr int ROW_TOKENS = 8;

/*
sum[j] = the row's product with token first + j, without row_scale, in f32: every lane has a row of
its own, null for none. x is put together again from its terms, which is exact to 2^-22; without low
terms it is high alone.
*/
__device__ __forceinline__ void multiply_row(float (&sum)[ROW_TOKENS], const uint8_t *row, int format,
                                             const TokenTile &x, const int32_t *sources, int first) {
#pragma unroll
  for (int j = 0; j < ROW_TOKENS; j++) sum[j] = 0.0f;
  if (!row) return;
  for (int c = 0; c < x.kblocks * TILE_COLS; c += 4) {
    float w[4];
    if (format == BF16_ROWS) {
      uint2 v = *(const uint2 *)(row + 2 * (int64_t)c);
      w[0] = bf16_to_f32((uint16_t)v.x), w[1] = bf16_to_f32((uint16_t)(v.x >> 16));
      w[2] = bf16_to_f32((uint16_t)v.y), w[3] = bf16_to_f32((uint16_t)(v.y >> 16));
    } else {
      float4 v = *(const float4 *)(row + 4 * (int64_t)c);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < ROW_TOKENS; j++) {
      int source = sources[min(first + j, x.count - 1)];
      int64_t at = (int64_t)source * x.stride * TILE_COLS + c;
      uint2 high = *(const uint2 *)(x.high + at);
      uint2 low = x.low ? *(const uint2 *)(x.low + at) : make_uint2(0, 0);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t h = (i < 2 ? high.x : high.y) >> (i % 2 * 16);
        uint32_t l = (i < 2 ? low.x : low.y) >> (i % 2 * 16);
        sum[j] = fmaf(w[i], f16_to_f32((uint16_t)h) + f16_to_f32((uint16_t)l), sum[j]);
      }
    }
  }
}

/* A row of a BF16_ROWS or F32_ROWS matrix at `matrix`. */
__device__ __forceinline__ const uint8_t *row_of(const uint8_t *matrix, int format, int row,
                                                 int kblocks) {
  return matrix + (int64_t)row * kblocks * TILE_COLS * (format == BF16_ROWS ? 2 : 4);
}
