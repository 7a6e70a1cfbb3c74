/*
What decode and prefill attention share: the KV cache and how a row gets into it.

Included once by each of attention.cu and attention_prefill.cu, after common.cuh; no include guard,
because each of them may stand in a namespace of its own.
*/

/* Keys (after norm and rotary) and values of one layer, [Hkv, capacity, head_dim] each.
   format 0: f16.
   format 1: int8 times an f16 scale per 32 consecutive values; scales [Hkv, capacity, head_dim / 32].
   All four start at multiples of 16 bytes; capacity is a multiple of 16. */
struct KvCache {
  void *k;
  void *v;
  uint16_t *k_scales;
  uint16_t *v_scales;
  int32_t capacity;
  int32_t format;
};

constexpr int SCALE_BLOCK = 32; /* int8 values under one scale */
constexpr float LOG2_E = 1.4426950408889634f;

/* Rounds to f16, and keeps NaN, so that a broken model shows. */
__device__ __forceinline__ uint16_t cache_f16(float x) {
  return x == x ? f32_to_f16(x) : (uint16_t)0x7e00;
}

/* One warp stores x [HD] f32 (shared memory) as a row of the cache: at `row`, and its scales at
   `scales` if INT8. */
template <int HD, bool INT8>
__device__ __forceinline__ void store_row(const float *x, void *row, uint16_t *scales) {
  int lane = threadIdx.x & 31;
  if constexpr (!INT8) {
    for (int i = lane; i < HD / 2; i += 32)
      ((uint32_t *)row)[i] =
          (uint32_t)cache_f16(x[2 * i]) | (uint32_t)cache_f16(x[2 * i + 1]) << 16;
  } else {
#pragma unroll 1
    for (int b = 0; b < HD / SCALE_BLOCK; b++) {
      float value = x[b * SCALE_BLOCK + lane];
      float largest = warp_max(fabsf(value));
      bool broken = __any_sync(0xffffffffu, !(fabsf(value) < INFINITY));
      /* Rounded up if need be, so that the largest value fits in 127. */
      uint16_t scale = f32_to_f16(largest / 127.0f);
      if (f16_to_f32(scale) * 127.0f < largest && scale < 0x7bff) scale++;
      float units = f16_to_f32(scale) > 0.0f ? value / f16_to_f32(scale) : 0.0f;
      units = fminf(fmaxf(rintf(units), -127.0f), 127.0f);
      ((int8_t *)row)[b * SCALE_BLOCK + lane] = (int8_t)(int)units;
      if (lane == 0) scales[b] = broken ? (uint16_t)0x7e00 : scale;
    }
  }
}

/* Two of the four int8 in `x` as exact f16: bytes 0, 1 if `pair` is 0, else bytes 2, 3. f16 1024 + u
   has u in its low byte, and u is the value + 128. */
template <int PAIR>
__device__ __forceinline__ uint32_t int8_pair_to_f16(uint32_t x) {
  uint32_t biased = __byte_perm(x ^ 0x80808080u, 0x64646464u, PAIR == 0 ? 0x4140 : 0x4342);
  return sub_f16x2(biased, 0x64806480u); /* 1152 */
}

/* The power of two that brings a head of which `largest` is the largest magnitude to f16's upper range,
   [2^13, 2^14); 1 for zeros. Splitting into two f16 then loses as little as f32 has. */
__device__ __forceinline__ float power_of_two_to_f16(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
  return __uint_as_float((uint32_t)min(max(13 - exponent + 127, 1), 254) << 23);
}
