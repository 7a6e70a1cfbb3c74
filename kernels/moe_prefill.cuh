/*
Blocks of prefill_experts_up and prefill_experts_down, whatever their products come from: MmaProducts,
WgmmaProducts.
*/
#pragma once

#include "matmul.cuh"

/* What experts_up and experts_down have in common: the block's tile and its expert. */
struct ExpertTile {
  int32_t expert;
  int32_t first_row; /* of R */
  int32_t count;
};

/* False for a block beyond the tiles of the groups. */
__device__ __forceinline__ bool find_tile(ExpertTile &tile, const int4 *tiles,
                                          const int32_t *tile_offsets, int first_expert,
                                          int num_groups) {
  const int index = tile_offsets[first_expert] + (int)blockIdx.y;
  if (index >= tile_offsets[first_expert + num_groups]) return false;
  const int4 t = tiles[index];
  tile = {t.x, t.y, t.z};
  return t.z > 0;
}

template <typename Products>
__device__ __forceinline__ void experts_up_block(
    uint8_t *smem, const uint16_t *high, const uint16_t *low, const float *row_scale,
    const int32_t *rows, const int4 *tiles, const int32_t *tile_offsets, const uint8_t *const *blobs,
    const float *const *units, const ExpertLayout &experts, const ExpertLayout &shared,
    int num_experts, int dim, int first_expert, int num_groups, float *h, int h_stride) {
  launch_next_kernel();
  Products::fill_table(smem);
  wait_for_previous_kernels();
  ExpertTile tile;
  if (!find_tile(tile, tiles, tile_offsets, first_expert, num_groups)) return;
  const bool is_shared = tile.expert == num_experts;
  const int intermediate = is_shared ? shared.intermediate : experts.intermediate;
  const int format = is_shared ? shared.format : experts.format;
  const int up_units = is_shared ? shared.up_unit : experts.up_unit;
  const uint8_t *gate = blobs[tile.expert];
  const uint8_t *up = gate + (is_shared ? shared.up_offset : experts.up_offset);
  const int kblocks = (dim + TILE_COLS - 1) / TILE_COLS;
  const TokenTile x = {high, low, tile.count, kblocks, kblocks};
  float *scales = (float *)(smem + Products::SCALES);
  int32_t *sources = (int32_t *)(smem + Products::SOURCES);
  if ((int)threadIdx.x < x.count) {
    const int token = rows[tile.first_row + threadIdx.x];
    scales[threadIdx.x] = row_scale[token];
    sources[threadIdx.x] = token;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  h += (int64_t)tile.first_row * h_stride;

  /* A row block is 128 values of h: of 128 rows of gate and as many of up. */
  const int row_blocks = (h_stride + MATMUL_ROWS / 2 - 1) / (MATMUL_ROWS / 2);

  if (format != NF4_TILES) {
    for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
      /* Lanes 0 .. 15 have rows of gate, lanes 16 .. 31 the same rows of up. */
      const int row = (row_block * MATMUL_WARPS + warp) * 16 + lane % 16;
      const uint8_t *weights =
          row < intermediate ? row_of(lane < 16 ? gate : up, format, row, kblocks) : nullptr;
      for (int first = 0; first < x.count; first += ROW_TOKENS) {
        float sum[ROW_TOKENS];
        multiply_row(sum, weights, format, x, sources, first);
#pragma unroll
        for (int j = 0; j < ROW_TOKENS; j++) {
          float value = first + j < x.count ? sum[j] * scales[first + j] : 0.0f;
          float other = __shfl_xor_sync(0xffffffffu, value, 16);
          if (lane < 16 && row < h_stride && first + j < x.count)
            h[(int64_t)(first + j) * h_stride + row] = weights ? silu(value) * other : 0.0f;
        }
      }
    }
    return;
  }

  const float *unit = units[tile.expert];
  /* Two warps share a tile row of gate and one of up. */
  auto weights = [&](int row_block) {
    const int tile_row = row_block * (MATMUL_WARPS / 2) + warp / 2;
    const uint8_t *tiles = gate + (int64_t)tile_row * kblocks * TILE_BYTES;
    return WeightTiles{tiles + lane_codes(warp % 2), (int32_t)(up - gate),
                       tile_row * TILE_ROWS < intermediate};
  };
  auto store = [&](int row_block, const Accumulators &acc) {
    const int tile_row = row_block * (MATMUL_WARPS / 2) + warp / 2;
    const int row = tile_row * TILE_ROWS + lane / 4 * 4 + warp % 2 * 2;
    if (row >= h_stride) return;
    const bool first_is_row = row < intermediate, second_is_row = row + 1 < intermediate;
    const float gate_unit = first_is_row ? unit[tile_row] : 0.0f;
    const float up_unit = first_is_row ? unit[up_units + tile_row] : 0.0f;
    const int first_token = lane % 4 * 2;
    float *to = h + (int64_t)first_token * h_stride + row;
#pragma unroll
    for (int n = 0; n < TILE_TOKENS / 8; n++) {
      const float(&c)[2][4] = acc.c[n / 2][n % 2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (8 * n + i + first_token >= x.count) return;
        const float scale = scales[8 * n + i + first_token];
        const float gate_scale = gate_unit * scale, up_scale = up_unit * scale;
        float2 v = make_float2(
            first_is_row ? silu(c[0][i] * gate_scale) * (c[1][i] * up_scale) : 0.0f,
            second_is_row ? silu(c[0][2 + i] * gate_scale) * (c[1][2 + i] * up_scale) : 0.0f);
        float *at = to + (int64_t)i * h_stride;
        if (h_stride % 2 == 0) {
          *(float2 *)at = v;
        } else {
          at[0] = v.x;
          if (row + 1 < h_stride) at[1] = v.y;
        }
      }
      to += (int64_t)8 * h_stride;
    }
  };
  Products::template run<true>(smem, x, blockIdx.x, row_blocks, gridDim.x, weights, store);
}

template <typename Products>
__device__ __forceinline__ void experts_down_block(
    uint8_t *smem, const uint16_t *h_high, const uint16_t *h_low, const float *h_scale,
    const int4 *tiles, const int32_t *tile_offsets, const uint8_t *const *blobs,
    const float *const *units, const ExpertLayout &experts, const ExpertLayout &shared,
    int num_experts, int dim, int h_stride, int first_expert, int num_groups, int first_row,
    int row_count, float *y) {
  launch_next_kernel();
  Products::fill_table(smem);
  wait_for_previous_kernels();
  ExpertTile tile;
  if (!find_tile(tile, tiles, tile_offsets, first_expert, num_groups)) return;
  const bool is_shared = tile.expert == num_experts;
  const int format = is_shared ? shared.format : experts.format;
  const int down_units = is_shared ? shared.down_unit : experts.down_unit;
  const int intermediate = is_shared ? shared.intermediate : experts.intermediate;
  const uint8_t *down =
      blobs[tile.expert] + (is_shared ? shared.down_offset : experts.down_offset);
  const int kblocks = (intermediate + TILE_COLS - 1) / TILE_COLS;
  /* Rows of h may be longer than this expert's: h is zero there. */
  const TokenTile x = {h_high, h_low, tile.count, kblocks, (h_stride + TILE_COLS - 1) / TILE_COLS};
  float *scales = (float *)(smem + Products::SCALES);
  int32_t *sources = (int32_t *)(smem + Products::SOURCES);
  if ((int)threadIdx.x < x.count) {
    scales[threadIdx.x] = h_scale[tile.first_row + threadIdx.x];
    sources[threadIdx.x] = tile.first_row + threadIdx.x;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_blocks = (row_count + MATMUL_ROWS - 1) / MATMUL_ROWS;
  const int end_row = min(dim, first_row + row_count);
  y += (int64_t)tile.first_row * row_count;

  if (format != NF4_TILES) {
    for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
      const int row = first_row + row_block * MATMUL_ROWS + threadIdx.x;
      const uint8_t *weights = row < end_row ? row_of(down, format, row, kblocks) : nullptr;
      for (int first = 0; first < x.count; first += ROW_TOKENS) {
        float sum[ROW_TOKENS];
        multiply_row(sum, weights, format, x, sources, first);
#pragma unroll
        for (int j = 0; j < ROW_TOKENS; j++)
          if (first + j < x.count && weights)
            y[(int64_t)(first + j) * row_count + row - first_row] = sum[j] * scales[first + j];
      }
    }
    return;
  }

  const float *unit = units[tile.expert] + down_units;
  auto weights = [&](int row_block) {
    const int tile_row = first_row / TILE_ROWS + row_block * MATMUL_WARPS + warp;
    const uint8_t *tiles = down + (int64_t)tile_row * kblocks * TILE_BYTES;
    return WeightTiles{tiles + lane_codes(0), 0, tile_row * TILE_ROWS < end_row};
  };
  auto store = [&](int row_block, const Accumulators &acc) {
    const int tile_row = first_row / TILE_ROWS + row_block * MATMUL_WARPS + warp;
    const int row = tile_row * TILE_ROWS + lane / 4 * 4;
    if (row < end_row)
      store_accumulators(acc, y + row - first_row, row_count, end_row - row, x.count, unit[tile_row],
                         scales, 0);
  };
  Products::template run<false>(smem, x, blockIdx.x, row_blocks, gridDim.x, weights, store);
}
