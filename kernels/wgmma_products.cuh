/*
matmul.cuh's products of one f16 term on Hopper's wgmma: the same blocks of 256 rows times up to 128 tokens,
the same tiles, table and accumulators.

A warpgroup takes 128 rows, as two products of 64: a warp's two fragments of 16 rows each are what wgmma
takes from its registers, once dequantised, for all tokens of the tile. x comes from shared memory, 64
columns a stage, which is a panel of wgmma.cuh. Sums of 64 columns are made in two halves of the tokens, so
that those of one half are multiplied by absmax while the other's are under way; meanwhile the other
warpgroup's products run, too. Warpgroups meet only at the stages' barriers, up to a stage apart.
*/
#pragma once

#include "matmul.cuh"
#include "wgmma.cuh"

struct WgmmaProducts {
  static constexpr int STAGES = 4;
  static constexpr int AHEAD = 2; /* stages between a copy and its use */
  static constexpr int STAGE_BYTES = TILE_TOKENS * X_ROW_BYTES;
  static constexpr int X = TABLE_BYTES;
  static constexpr int SCALES = X + STAGES * STAGE_BYTES;
  static constexpr int SOURCES = SCALES + TILE_TOKENS * 4;
  static constexpr int BARRIERS = SOURCES + TILE_TOKENS * 4;
  static constexpr int BYTES = BARRIERS + STAGES * 16;
  static_assert(X % 1024 == 0 && STAGE_BYTES % 1024 == 0, "panels start at multiples of 1024");
  static_assert(BYTES == 99392, "geometry.rs says so");

  static __device__ __forceinline__ uint64_t *full(uint8_t *smem, int stage) {
    return (uint64_t *)(smem + BARRIERS) + stage;
  }
  static __device__ __forceinline__ uint64_t *empty(uint8_t *smem, int stage) {
    return full(smem, STAGES + stage);
  }

  /* Before the __syncthreads that `run` wants behind it. */
  static __device__ __forceinline__ void fill_table(uint8_t *smem) {
    fill_matmul_table<false>(smem);
    if (threadIdx.x < STAGES) {
      barrier_init(full(smem, threadIdx.x), MATMUL_THREADS);
      barrier_init(empty(smem, threadIdx.x), MATMUL_WARPS);
    }
  }

  /* Fragment m of a tile, [k-step][register]; see `dequantise`. */
  static __device__ __forceinline__ void dequantise_fragment(uint32_t (&a)[4][4], const LaneTile &tile, int m,
                                                             const uint8_t *table) {
    table += threadIdx.x % 32 * 4;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t word = tile.word[k / 2][2 * m + i % 2];
        const int byte = k % 2 * 2 + i / 2;
        a[k][i] =
            *(const uint32_t *)(table + ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80));
      }
  }

  /* acc += absmax * part for half the tokens, N / 2 of them. */
  template <int N>
  static __device__ __forceinline__ void add(Accumulators &acc, const float (&part)[N / 4], int half, int m,
                                             float first, float second) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const int tile = half * (N / 16) + i / 4;
      float &c = acc.c[tile / 2][tile % 2][m][i % 4];
      c = fmaf(i % 4 < 2 ? first : second, part[i], c);
    }
  }

  template <int N, bool TWO_MATRICES, typename Weights, typename Store>
  static __device__ __forceinline__ void run_tokens(uint8_t *smem, const TokenTile &x, int first, int end,
                                                    int step, Weights weights, Store store) {
    const int32_t *sources = (const int32_t *)(smem + SOURCES);
    const int total = (end - first + step - 1) / step * x.kblocks;
    const uint64_t panels = panel_descriptor(shared_address(smem) + X, 16);

    /* Copies of stage `copied`, of which column block copied_kb is next; groups are empty at the end. */
    int copied = 0, copied_kb = 0;
    auto copy = [&]() {
      if (copied < total) {
        barrier_wait(empty(smem, copied % STAGES), (copied / STAGES & 1) ^ 1);
        copy_stage<false>(smem + X + copied % STAGES * STAGE_BYTES, x, sources, copied_kb);
        if (++copied_kb == x.kblocks) copied_kb = 0;
      }
      cp_async_commit();
      copied++;
    };
    /* This thread's part of stage i, the last but one that was asked for, is there. */
    auto announce = [&](int i) {
      cp_async_wait<AHEAD - 1>();
      fence_for_wgmma();
      if (i < total) barrier_arrive(full(smem, i % STAGES));
    };
    copy();
    copy();
    announce(0);

    WeightTiles w = weights(first);
    LaneTile next = {};
    if (w.active) load_tile<TWO_MATRICES>(next, w);
    int i = 0;
    for (int row_block = first; row_block < end; row_block += step) {
      Accumulators acc = {};
      for (int kb = 0; kb < x.kblocks; kb++, i++) {
        const LaneTile tile = next;
        copy();
        announce(i + 1);
        if (kb + 1 == x.kblocks) {
          w.active = 0;
          if (row_block + step < end) w = weights(row_block + step);
        }
        if (w.active) load_tile<TWO_MATRICES>(next, w);
        barrier_wait(full(smem, i % STAGES), i / STAGES & 1);
        const uint64_t panel = descriptor_at(panels, i % STAGES * STAGE_BYTES);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          uint32_t a[4][4];
          dequantise_fragment(a, tile, m, smem);
          const float first_row = (float)(tile.absmax[m] & 0xffff), second_row = (float)(tile.absmax[m] >> 16);
          float part[2][N / 4];
          wgmma_fence();
#pragma unroll
          for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int k = 0; k < 4; k++)
              wgmma_rows(part[half], a[k], descriptor_at(panel, half * (N / 2) * PANEL_ROW + 32 * k), k > 0);
            wgmma_commit();
          }
          wgmma_wait<1>();
          pin(part[0]);
          add<N>(acc, part[0], 0, m, first_row, second_row);
          wgmma_wait<0>();
          pin(part[1]);
          add<N>(acc, part[1], 1, m, first_row, second_row);
        }
        if (threadIdx.x % 32 == 0) barrier_arrive(empty(smem, i % STAGES));
      }
      store(row_block, acc);
    }
  }

  /* As `multiply` of matmul.cuh. */
  template <bool TWO_MATRICES, typename Weights, typename Store>
  static __device__ __forceinline__ void run(uint8_t *smem, const TokenTile &x, int first, int end,
                                             int step, Weights weights, Store store) {
    if (first >= end) return;
#define TOKENS(N)                                                                                \
  case N / 16: return run_tokens<N, TWO_MATRICES>(smem, x, first, end, step, weights, store)
    switch ((x.count + 15) / 16) {
      TOKENS(16);
      TOKENS(32);
      TOKENS(48);
      TOKENS(64);
      TOKENS(80);
      TOKENS(96);
      TOKENS(112);
      TOKENS(128);
    }
#undef TOKENS
  }
};
