/*
Dense projections of prefill: chunks of T tokens, T >= 1.

prefill_split        x [T, cols] f32 -> high, low [T, kblocks * 64] f16, row_scale [T], normed [T, cols]
    x, or rms_norm(x) * norm_scale, = (high + low) * row_scale; zeros from cols on. row_scale is a power
    of two that brings the token's largest value into [2^13, 2^14). A token with an infinity or a NaN
    has zeros and a row_scale of NaN: every product with it is NaN.
    low and normed may be null: not written.
    launch: grid (ceil(T / 8)), block (256), smem 0.

prefill_linear       out [T, rows] f32 (+)= x w^T
prefill_linear_fast  the same from `high` alone (low may be null)
    launch: grid (1 .. ceil(rows / 256), ceil(T / 128) .. ceil(T / 16)), block (256), smem 99,328 bytes
    (fast: 66,560). Right for any grid in these ranges: a block takes row blocks x, x + grid.x, .. of
    16 ceil(T / (16 grid.y)) tokens. Best, with r = ceil(rows / 256), t = ceil(T / 128) on n SMs:
        r t < n:       (r, min(ceil(T / 16), max(t, n / r)))
        r t >= 8 n:    (ceil(r / 4), t)
        else:          (r, t)
    BF16_ROWS and F32_ROWS take x from high and low, too, with f32 FMAs; the fast variant then adds low
    if it is there.
*/
#include "linear_prefill.cuh"

/* ---- prefill_split ---- */

/* The largest exponent of 2 that row_scale's inverse may have: both stay normal numbers. Tokens whose
   largest value is below 2^-87 lose bits. */
constexpr int MAX_SCALE_UP = 100;

/* The power of two that divides values up to `largest` into [2^13, 2^14). */
__device__ __forceinline__ int scale_exponent(float largest) {
  int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
  return largest == 0.0f ? 0 : max(exponent - 13, -MAX_SCALE_UP);
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float((uint32_t)(exponent + 127) << 23);
}

/* One warp per token. */
KERNEL prefill_split(const float *x, const float *norm_scale, float eps, uint16_t *high, uint16_t *low,
                     float *row_scale, float *normed, int tokens, int cols) {
  launch_next_kernel();
  wait_for_previous_kernels();
  const int token = blockIdx.x * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const float *row = x + (int64_t)token * cols;
  const int padded = (cols + TILE_COLS - 1) / TILE_COLS * TILE_COLS;

  /* Magnitudes compare as integers, where NaN is above infinity. */
  float squares = 0.0f;
  uint32_t largest_bits = 0;
#pragma unroll 4
  for (int c = 4 * lane; c < cols; c += 128) {
    float4 v = load_columns(row, c, cols);
    float value[4] = {v.x, v.y, v.z, v.w};
    if (norm_scale) {
      float4 s = load_columns(norm_scale, c, cols);
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      value[0] *= s.x, value[1] *= s.y, value[2] *= s.z, value[3] *= s.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      largest_bits = max(largest_bits, __float_as_uint(value[i]) & 0x7fffffffu);
  }
  float factor = 1.0f;
  if (norm_scale) factor = 1.0f / sqrtf(warp_sum(squares) / (float)cols + eps);
  for (int offset = 16; offset > 0; offset /= 2)
    largest_bits = max(largest_bits, __shfl_xor_sync(0xffffffffu, largest_bits, offset));
  /* Largest before rounding to the product with factor: off by a bit at most, and f16 has two to spare. */
  const float largest = __uint_as_float(largest_bits) * factor;
  const bool finite = __float_as_uint(largest) < 0x7f800000u;
  const int exponent = scale_exponent(finite ? largest : 0.0f);
  const float inverse = power_of_two(-exponent);
  if (lane == 0)
    row_scale[token] = finite ? power_of_two(exponent) : __uint_as_float(0x7fc00000u);

  uint16_t *high_row = high + (int64_t)token * padded;
  uint16_t *low_row = low ? low + (int64_t)token * padded : nullptr;
#pragma unroll 4
  for (int c = 4 * lane; c < padded; c += 128) {
    float4 v = load_columns(row, c, cols);
    float value[4] = {v.x, v.y, v.z, v.w};
    if (norm_scale) {
      float4 s = load_columns(norm_scale, c, cols);
      value[0] *= factor * s.x, value[1] *= factor * s.y;
      value[2] *= factor * s.z, value[3] *= factor * s.w;
    }
    if (normed) {
      float *to = normed + (int64_t)token * cols + c;
      if (cols % 4 == 0 && c < cols)
        *(float4 *)to = make_float4(value[0], value[1], value[2], value[3]);
      else
        for (int i = 0; i < 4 && c + i < cols; i++) to[i] = value[i];
    }
    uint16_t h[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) split_f16(finite ? value[i] * inverse : 0.0f, h[i], l[i]);
    *(uint2 *)(high_row + c) =
        make_uint2((uint32_t)h[0] | (uint32_t)h[1] << 16, (uint32_t)h[2] | (uint32_t)h[3] << 16);
    if (low_row)
      *(uint2 *)(low_row + c) =
          make_uint2((uint32_t)l[0] | (uint32_t)l[1] << 16, (uint32_t)l[2] | (uint32_t)l[3] << 16);
  }
}

/* ---- prefill_linear ---- */

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_linear(const uint16_t *high, const uint16_t *low, const float *row_scale, int tokens, Linear w,
               float *out, int add) {
  DYNAMIC_SMEM(smem);
  linear_block<MmaProducts<true>>(smem, high, low, row_scale, tokens, w, out, add);
}

KERNEL __launch_bounds__(MATMUL_THREADS, 1)
prefill_linear_fast(const uint16_t *high, const uint16_t *low, const float *row_scale, int tokens,
                    Linear w, float *out, int add) {
  DYNAMIC_SMEM(smem);
  linear_block<MmaProducts<false>>(smem, high, low, row_scale, tokens, w, out, add);
}

EXPORT(prefill_split)
EXPORT(prefill_linear)
EXPORT(prefill_linear_fast)
