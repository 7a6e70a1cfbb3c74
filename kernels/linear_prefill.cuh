/*
A block of prefill_linear, whatever its products come from: MmaProducts, WgmmaProducts.
*/
#pragma once

#include "matmul.cuh"

template <typename Products>
__device__ __forceinline__ void linear_block(uint8_t *smem, const uint16_t *high, const uint16_t *low,
                                             const float *row_scale, int tokens, const Linear &w,
                                             float *out, int add) {
  launch_next_kernel();
  if (w.format == NF4_TILES) Products::fill_table(smem);
  const int per_tile = tokens_per_tile(tokens, gridDim.y);
  const int first_token = blockIdx.y * per_tile;
  const TokenTile x = {high, low, min(per_tile, tokens - first_token), w.kblocks, w.kblocks};
  float *scales = (float *)(smem + Products::SCALES);
  int32_t *sources = (int32_t *)(smem + Products::SOURCES);
  wait_for_previous_kernels();
  if (x.count <= 0) return;
  if ((int)threadIdx.x < x.count) {
    scales[threadIdx.x] = row_scale[first_token + threadIdx.x];
    sources[threadIdx.x] = first_token + threadIdx.x;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_blocks = (w.rows + MATMUL_ROWS - 1) / MATMUL_ROWS;

  if (w.format != NF4_TILES) {
    for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
      const int row = row_block * MATMUL_ROWS + threadIdx.x;
      const uint8_t *weights = row < w.rows ? row_of(w.weights, w.format, row, w.kblocks) : nullptr;
      for (int first = 0; first < x.count; first += ROW_TOKENS) {
        float sum[ROW_TOKENS];
        multiply_row(sum, weights, w.format, x, sources, first);
#pragma unroll
        for (int j = 0; j < ROW_TOKENS; j++) {
          if (first + j >= x.count || !weights) continue;
          float *to = out + (int64_t)(first_token + first + j) * w.rows + row;
          float value = sum[j] * scales[first + j];
          *to = add ? *to + value : value;
        }
      }
    }
    return;
  }

  auto weights = [&](int row_block) {
    const int tile_row = row_block * MATMUL_WARPS + warp;
    const uint8_t *tiles = w.weights + (int64_t)tile_row * w.kblocks * TILE_BYTES;
    return WeightTiles{tiles + lane_codes(0), 0, tile_row * TILE_ROWS < w.rows};
  };
  auto store = [&](int row_block, const Accumulators &acc) {
    const int tile_row = row_block * MATMUL_WARPS + warp;
    const int row = tile_row * TILE_ROWS + lane / 4 * 4;
    if (row < w.rows)
      store_accumulators(acc, out + (int64_t)first_token * w.rows + row, w.rows, w.rows - row, x.count,
                         w.units[tile_row], scales, add);
  };
  Products::template run<false>(smem, x, blockIdx.x, row_blocks, gridDim.x, weights, store);
}
