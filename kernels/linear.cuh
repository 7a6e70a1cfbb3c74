/*
What the kernels of linear.cu, for one token, and of linear_batch.cu, for several, have in common.
*/
#pragma once

#include "matvec.cuh"

constexpr int NORM_WARPS = 8;
constexpr int NORM_SMEM = shared_bytes(NORM_WARPS);
constexpr int ADD_WARPS = 16;
constexpr int ADD_SMEM = shared_bytes(ADD_WARPS);
constexpr int ADD_ROWS = 16;
static_assert(NORM_SMEM == 40960 && ADD_SMEM == 49152, "as the header says");

/* Floats of a warp's area: rows of a tile row first, then the squares of its part of x. */
constexpr int AREA_SQUARES = TILE_ROWS;

/* Blocks of decode_norm_linear for a matrix that is not the first. */
__device__ __forceinline__ int norm_blocks(const Linear &m) {
  if (m.weights == nullptr) return 0;
  return m.format == NF4_TILES ? (m.rows + TILE_ROWS - 1) / TILE_ROWS : (m.rows + NORM_WARPS - 1) / NORM_WARPS;
}

/* Where the factor 1 / rms comes from; without a norm it is 1. */
__device__ __forceinline__ float norm_factor(const Normed &n, float squares, float eps) {
  return n.scale == nullptr ? 1.0f : inverse_rms(squares, n.cols, eps);
}

/* The gated norm's input: o [Hv * dv], and of the step's projection (qwen3-next.md 6.1) each key head's z. */
struct Gated {
  const float *o;
  const float *projection;
  const float *norm;
  float eps;
  int cols;
  int dk;
  int dv_shift; /* dv = 1 << dv_shift: 32, 64 or 128 */
  int value_heads_per_key_head;
};

/* The lane's eight values of the gated norm: o / rms(o of the head) * norm * silu(z). Lanes of a head are
   neighbours: four for each 32 columns. */
__device__ __forceinline__ void gated_values(const Gated &n, int column, float (&v)[8]) {
  load_values(n.o, column, n.cols, v);
  const int dv = 1 << n.dv_shift, r = n.value_heads_per_key_head;
  const bool there = column < n.cols;
  const int head = there ? column >> n.dv_shift : 0, in_head = column & (dv - 1);
  const int key_head = head / r;
  const int z_at = (2 * n.dk + 2 * r * dv) * key_head + 2 * n.dk + r * dv + dv * (head - r * key_head);
  float z[8], scale[8];
  load_values(n.projection + z_at, there ? in_head : NO_COLUMN, dv, z);
  load_values(n.norm, there ? in_head : NO_COLUMN, dv, scale);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) squares = fmaf(v[i], v[i], squares);
  squares += __shfl_xor_sync(ALL_LANES, squares, 1);
  squares += __shfl_xor_sync(ALL_LANES, squares, 2);
  const float of_block = squares + __shfl_xor_sync(ALL_LANES, squares, 4);
  const float of_two = of_block + __shfl_xor_sync(ALL_LANES, of_block, 8);
  const float of_head = dv == 32 ? squares : dv == 64 ? of_block : of_two;
  const float factor = inverse_rms(of_head, dv, n.eps);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = v[i] * factor * scale[i] * quick_silu(z[i]);
}
