/*
prefill_linear_fast, prefill_experts_up_fast and prefill_experts_down_fast on Hopper's warpgroup products, with
the same arguments and meaning; linear_prefill.cu and moe_prefill.cu describe them.
  launch: as there, dynamic shared memory 99,392 bytes
*/
#include "linear_prefill.cuh"
#include "moe_prefill.cuh"
#include "wgmma_products.cuh"

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_linear_sm90(const uint16_t *high, const uint16_t *low, const float *row_scale, int tokens,
                    Linear w, float *out, int add) {
  extern __shared__ __align__(1024) uint8_t smem[];
  linear_block<WgmmaProducts>(smem, high, low, row_scale, tokens, w, out, add);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_up_sm90(const uint16_t *high, const uint16_t *low, const float *row_scale,
                        const int32_t *rows, const int4 *tiles, const int32_t *tile_offsets,
                        const uint8_t *const *blobs, const float *const *units, ExpertLayout experts,
                        ExpertLayout shared, int num_experts, int dim, int first_expert,
                        int num_groups, float *h, int h_stride) {
  extern __shared__ __align__(1024) uint8_t smem[];
  experts_up_block<WgmmaProducts>(smem, high, low, row_scale, rows, tiles, tile_offsets, blobs, units,
                                  experts, shared, num_experts, dim, first_expert, num_groups, h, h_stride);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_experts_down_sm90(const uint16_t *h_high, const uint16_t *h_low, const float *h_scale,
                          const int4 *tiles, const int32_t *tile_offsets, const uint8_t *const *blobs,
                          const float *const *units, ExpertLayout experts, ExpertLayout shared,
                          int num_experts, int dim, int h_stride, int first_expert, int num_groups,
                          int first_row, int row_count, float *y) {
  extern __shared__ __align__(1024) uint8_t smem[];
  experts_down_block<WgmmaProducts>(smem, h_high, h_low, h_scale, tiles, tile_offsets, blobs, units,
                                    experts, shared, num_experts, dim, h_stride, first_expert, num_groups,
                                    first_row, row_count, y);
}
