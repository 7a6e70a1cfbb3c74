/*
The core of prefill's matrix products: per block, 8 warps with 32 weight rows each, times up to 128
tokens, on tensor cores.

  A  weights, NF4 tiles: global memory -> registers, one tile ahead, dequantised through a table in
     shared memory. No weight is dequantised twice in a block, and none passes through shared memory.
  B  x as two f16 terms (prefill_split): cp.async into two stages that all warps share. The column
     order inside a tile (layout.rs) is that of m16n8k16, so B lies as it is in global memory.
  C  f32. Every 64 columns start from zero and are then multiplied by absmax.

EXACT takes three products, w_high x_high + w_high x_low + w_low x_high: as exact as f32. Not EXACT
takes the first only: 2^-11 relative per product, and half the bytes of x.

A token tile has the tokens that are there, in steps of 16: experts have 80 tokens on average in a
chunk of 4096, and whole tiles of 64 or 128 would waste a third. n tokens are cut into tiles of equal
size. A block takes several blocks of 256 rows, one after another without a gap, if the grid is small.

Measured on an H100, chunk of 4096 tokens, 80B shape; mma.sync alone reaches 620 TFLOP/s, so 207 is the
limit of three products. Exact: 148 TFLOP/s dense, 121 experts' up, 115 down (80 tokens per expert do not
fill their tiles). Fast: 290, 211, 188. What is missing goes in about equal parts to dequantising, to the
barrier of each stage and to the sums by absmax: two warps per tensor core cannot hide all of it. Tried:
twelve warps with 64 tokens each (129: they dequantise twice as often), eight accumulators in turn (139:
no gain), sums after every 32 columns (140), all warps dequantising at the same time (139).
*/
#pragma once

#include "common.cuh"

constexpr int MATMUL_WARPS = 8;
constexpr int MATMUL_THREADS = MATMUL_WARPS * 32;
constexpr int MATMUL_ROWS = MATMUL_WARPS * TILE_ROWS;
constexpr int TILE_TOKENS = 128; /* per token tile, at most */
constexpr int TOKEN_PAIRS = TILE_TOKENS / 16; /* n-tiles have 8 tokens and come in pairs */

/* One term of x in a stage: [TILE_TOKENS][8 chunks of 16 bytes]; chunk c of token i lies at c ^ (i & 7),
   so that neither cp.async nor ldmatrix meets in a bank. */
constexpr int X_ROW_BYTES = TILE_COLS * 2;

/* Shared memory: table, two stages of x, row_scale [TILE_TOKENS], source row [TILE_TOKENS]. */
template <bool EXACT>
struct MatmulSmem {
  static constexpr int TERM_BYTES = TILE_TOKENS * X_ROW_BYTES;
  static constexpr int STAGE_BYTES = (EXACT ? 2 : 1) * TERM_BYTES;
  static constexpr int X = TABLE_BYTES;
  static constexpr int SCALES = X + 2 * STAGE_BYTES;
  static constexpr int SOURCES = SCALES + TILE_TOKENS * 4;
  static constexpr int BYTES = SOURCES + TILE_TOKENS * 4; /* exact 99,328; fast 66,560 */
};

/* The accumulators of a lane, [pair of n-tiles][n-tile][fragment][element]: tokens 16p + 8n ..; of lane
   4g + t, elements 0, 1 are tokens 2t, 2t + 1 of the fragment's row g, elements 2, 3 of row g + 8. */
struct Accumulators {
  float c[TOKEN_PAIRS][2][2][4];
};

/* The x of a token tile. */
struct TokenTile {
  const uint16_t *high; /* [.., stride * 64] f16 */
  const uint16_t *low;  /* the same; not read by the fast kernels, may be null there */
  int32_t count;        /* tokens of this tile, at least 1 */
  int32_t kblocks;      /* of the product */
  int32_t stride;       /* kblocks of a row of high and low */
};

/* Tokens per tile when n of them are cut into `tiles` tiles. */
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

/* Starts the copies of column block kb: a thread has chunk threadIdx % 8 of tokens threadIdx / 8 + 32 i.
   Tokens beyond the tile's count become zeros. sources: [TILE_TOKENS] rows of high and low. */
template <bool EXACT>
__device__ __forceinline__ void copy_stage(uint8_t *stage, const TokenTile &x, const int32_t *sources,
                                           int kb) {
  constexpr int STEP = MATMUL_THREADS / 8;
  static_assert(TILE_TOKENS % STEP == 0, "every thread has as many tokens");
  const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
  uint8_t *to = stage + first * X_ROW_BYTES + (chunk ^ (first & 7)) * 16;
#pragma unroll
  for (int i = 0; i < TILE_TOKENS / STEP; i++) {
    if (STEP * i >= x.count) break;
    const bool valid = first + STEP * i < x.count;
    const int block = valid ? sources[first + STEP * i] * x.stride + kb : 0;
    const int64_t from = (int64_t)block * TILE_COLS + chunk * 8;
    cp_async16(to + i * STEP * X_ROW_BYTES, x.high + from, valid);
    if (EXACT)
      cp_async16(to + i * STEP * X_ROW_BYTES + MatmulSmem<EXACT>::TERM_BYTES, x.low + from,
                 valid);
  }
}

/* B of a k-step and a pair of n-tiles, one term: [n-tile 0: b0, b1; n-tile 1: b0, b1]. */
struct XFragments {
  uint32_t r[4];
};

/* `term` is where the term's part of the stage starts. row_offset: lane i names token i % 8 of n-tile
   i / 16, and chunk i / 8 % 2 of the k-step. */
__device__ __forceinline__ void load_x(XFragments &b, const uint8_t *term, int row_offset, int k,
                                       int pair) {
  ldmatrix_x4(b.r, term + (row_offset ^ (32 * k)) + pair * 16 * X_ROW_BYTES);
}

/* ---- A ---- */

/*
Where a warp's two 16-row fragments come from: of lane 4g + t, fragment m has in MMA rows g and g + 8
two neighbouring rows of a tile.

- halves of one tile row: fragment m has tile rows 4g + 2m and 4g + 2m + 1; one load of 16 bytes has
  both.
- of two matrices (SwiGLU): fragment 0 has rows 4g + 2h, 4g + 2h + 1 of gate, fragment 1 the same rows
  of up, with h = warp % 2 the half of both tile rows: gate and up of a value meet in one lane.
*/
struct WeightTiles {
  const uint8_t *codes; /* the lane's codes of the next tile to load, d = 0: of the tile row, or gate's */
  int32_t up;           /* bytes from gate's tiles to up's, below 2 GB; for halves of one tile row unused */
  int32_t active;       /* 0: no rows for this warp */
};

/* Where the lane's codes and absmax lie in a tile. half: of two matrices h, else 0. */
__device__ __forceinline__ int lane_codes(int half) {
  return threadIdx.x % 4 * 128 + threadIdx.x % 32 / 4 * 16 + 8 * half;
}
__device__ __forceinline__ int lane_absmax(int half) {
  return 1024 + threadIdx.x % 32 / 4 * 8 + 4 * half;
}

/* What a lane needs of a tile. */
struct LaneTile {
  uint32_t word[2][4]; /* [d][row of fragment 0: 0, 1; of fragment 1: 2, 3] */
  uint32_t absmax[2];  /* u16, two rows per word */
};

/* Loads the tile and goes on to the next one of its row. */
template <bool TWO_MATRICES>
__device__ __forceinline__ void load_tile(LaneTile &tile, WeightTiles &w) {
  const int half = TWO_MATRICES ? threadIdx.x / 32 % 2 : 0;
  const uint8_t *absmax = w.codes + (lane_absmax(half) - lane_codes(half));
#pragma unroll
  for (int d = 0; d < 2; d++) {
    uint4 v;
    if (TWO_MATRICES) {
      uint2 gate = *(const uint2 *)(w.codes + 512 * d);
      uint2 up = *(const uint2 *)(w.codes + w.up + 512 * d);
      v = make_uint4(gate.x, gate.y, up.x, up.y);
    } else {
      v = load_stream16(w.codes + 512 * d);
    }
    tile.word[d][0] = v.x, tile.word[d][1] = v.y, tile.word[d][2] = v.z, tile.word[d][3] = v.w;
  }
  if (TWO_MATRICES) {
    tile.absmax[0] = *(const uint32_t *)absmax;
    tile.absmax[1] = *(const uint32_t *)(absmax + w.up);
  } else {
    uint2 v = load_stream8(absmax);
    tile.absmax[0] = v.x, tile.absmax[1] = v.y;
  }
  w.codes += TILE_BYTES;
}

/* A of a tile: [k-step][fragment][register]; `low` of EXACT only. */
struct WeightFragments {
  uint32_t high[4][2][4];
  uint32_t low[4][2][4];
};

template <bool EXACT>
__device__ __forceinline__ void dequantise(WeightFragments &a, const LaneTile &tile,
                                           const uint8_t *table) {
  table += EXACT ? threadIdx.x % 16 * 8 : threadIdx.x % 32 * 4;
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t word = tile.word[k / 2][2 * m + i % 2];
        const int byte = k % 2 * 2 + i / 2;
        const uint8_t *entry = table + ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80);
        if (EXACT) {
          uint2 weights = *(const uint2 *)entry;
          a.high[k][m][i] = __byte_perm(weights.x, weights.y, 0x5410);
          a.low[k][m][i] = __byte_perm(weights.x, weights.y, 0x7632);
        } else {
          a.high[k][m][i] = *(const uint32_t *)entry;
        }
      }
}

/* ---- C ---- */

/* One product of terms in a k-step: four accumulators in turn, because a product waits for the one
   before it on its own. */
__device__ __forceinline__ void multiply_terms(float (&part)[2][2][4], const uint32_t (&a)[2][4],
                                               const XFragments &b) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    mma_f16(part[i / 2][i % 2], a[i % 2], b.r[i / 2 * 2], b.r[i / 2 * 2 + 1]);
}

/*
For row blocks `first`, first + step, .. below `end`: weights(row_block) says which tiles the calling warp
multiplies, and store(row_block, accumulators) gets the products, without units and row_scale.

All threads of the block call it. On entry the table and the sources are in shared memory, behind a
__syncthreads.
*/
template <bool EXACT, bool TWO_MATRICES, typename Weights, typename Store>
__device__ __forceinline__ void multiply(uint8_t *smem, const TokenTile &x, int first, int end, int step,
                                         Weights weights, Store store) {
  typedef MatmulSmem<EXACT> Smem;
  const int lane = threadIdx.x % 32;
  const int pairs = (x.count + 15) / 16;
  const int32_t *sources = (const int32_t *)(smem + Smem::SOURCES);
  const int row_offset =
      (lane / 16 * 8 + lane % 8) * X_ROW_BYTES + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  /* Half of the warps, one of the two at each tensor core, dequantises before the barrier and the other
     half after it: so one of them always multiplies. Fast kernels gain nothing by it. */
  const bool early = EXACT && threadIdx.x >= MATMUL_THREADS / 2;

  if (first >= end) return;
  int stage = 0;
  copy_stage<EXACT>(smem + Smem::X, x, sources, 0);
  cp_async_commit();
  WeightTiles w = weights(first);
  LaneTile tile = {};
  WeightFragments a = {};
  if (w.active) load_tile<TWO_MATRICES>(tile, w);

  for (int row_block = first; row_block < end; row_block += step) {
    Accumulators acc = {};
    for (int kb = 0; kb < x.kblocks; kb++) {
      const int active = w.active;
      const bool last = kb + 1 == x.kblocks;
      const bool more = !last || row_block + step < end;
      const int next = last ? 0 : kb + 1;
      float absmax[4];
#pragma unroll
      for (int i = 0; i < 4; i++) absmax[i] = (float)(tile.absmax[i / 2] >> (16 * (i % 2)) & 0xffff);
      if (early && active) dequantise<EXACT>(a, tile, smem);
      cp_async_wait<0>();
      /* The stage is there, and nobody reads the other one any more. */
      __syncthreads();
      if (more)
        copy_stage<EXACT>(smem + Smem::X + (stage ^ 1) * Smem::STAGE_BYTES, x, sources, next);
      cp_async_commit();
      if (!early && active) dequantise<EXACT>(a, tile, smem);
      /* The codes have been used: the next tile's take their registers. */
      if (last && more) w = weights(row_block + step);
      if (more && w.active) load_tile<TWO_MATRICES>(tile, w);

      const uint8_t *x_high = smem + Smem::X + stage * Smem::STAGE_BYTES;
      const uint8_t *x_low = x_high + Smem::TERM_BYTES;
      stage ^= 1;
      if (!active) continue;
      /* x is loaded a k-step ahead; its low term, which comes last, into the same registers. Rows
         beyond the pairs are not used. */
      XFragments high[2], low;
      load_x(high[0], x_high, row_offset, 0, 0);
      if (EXACT) load_x(low, x_low, row_offset, 0, 0);
#pragma unroll
      for (int p = 0; p < TOKEN_PAIRS; p++) {
        if (p >= pairs) break;
        float part[2][2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int next_k = (k + 1) % 4, next_p = p + (k + 1) / 4;
          if (next_p < TOKEN_PAIRS) load_x(high[(k + 1) % 2], x_high, row_offset, next_k, next_p);
          multiply_terms(part, a.high[k], high[k % 2]);
          if (EXACT) {
            multiply_terms(part, a.low[k], high[k % 2]);
            multiply_terms(part, a.high[k], low);
            if (next_p < TOKEN_PAIRS) load_x(low, x_low, row_offset, next_k, next_p);
          }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
          float &c = acc.c[p][i / 8][i / 4 % 2][i % 4];
          c = fmaf(absmax[i / 4 % 2 * 2 + i / 2 % 2], part[i / 8][i / 4 % 2][i % 4], c);
        }
      }
    }
    store(row_block, acc);
  }
}

/* What the kernels' blocks take their products from: here mma.sync, in wgmma_products.cuh wgmma. */
template <bool EXACT>
struct MmaProducts {
  static constexpr int SCALES = MatmulSmem<EXACT>::SCALES, SOURCES = MatmulSmem<EXACT>::SOURCES;

  static __device__ __forceinline__ void fill_table(uint8_t *smem) { fill_matmul_table<EXACT>(smem); }

  template <bool TWO_MATRICES, typename Weights, typename Store>
  static __device__ __forceinline__ void run(uint8_t *smem, const TokenTile &x, int first, int end,
                                             int step, Weights weights, Store store) {
    multiply<EXACT, TWO_MATRICES>(smem, x, first, end, step, weights, store);
  }
};

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
__device__ __forceinline__ void store_accumulators(const Accumulators &acc, float *out,
                                                   int stride, int row_count, int tokens, float unit,
                                                   const float *scales, int add) {
  const bool aligned = stride % 4 == 0 && row_count >= 4;
  const int first = threadIdx.x % 4 * 2;
  out += (int64_t)first * stride;
#pragma unroll
  for (int n = 0; n < TILE_TOKENS / 8; n++) {
    const float(&c)[2][4] = acc.c[n / 2][n % 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (8 * n + i + first >= tokens) return;
      const float scale = unit * scales[8 * n + i + first];
      store_rows(
          out + (int64_t)i * stride,
          make_float4(c[0][i] * scale, c[0][2 + i] * scale, c[1][i] * scale, c[1][2 + i] * scale),
          row_count, aligned, add);
    }
    out += (int64_t)8 * stride;
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
