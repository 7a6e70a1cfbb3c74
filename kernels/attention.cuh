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

/* One warp turns x [HD] f32 (shared memory) into a row of the cache: at `row`, and its scales at
   `scales` if INT8. */
template <int HD, bool INT8>
__device__ __forceinline__ void store_row(const float *x, void *row, uint16_t *scales) {
  int lane = threadIdx.x & 31;
  if constexpr (!INT8) {
#pragma unroll
    for (int i = 0; i < (HD / 2 + 31) / 32; i++) {
      int at = lane + 32 * i;
      if (at < HD / 2)
        ((uint32_t *)row)[at] =
            (uint32_t)cache_f16(x[2 * at]) | (uint32_t)cache_f16(x[2 * at + 1]) << 16;
    }
  } else {
    constexpr int VALUES = HD / 32; /* of a lane, neighbours; 32 / VALUES lanes share a scale */
    float largest = 0.0f;
    bool broken = false;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      float size = fabsf(x[lane * VALUES + i]);
      largest = fmaxf(largest, size);
      broken |= !(size < INFINITY);
    }
    if (broken) largest = INFINITY;
#pragma unroll
    for (int offset = 16 / VALUES; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    /* Rounded up if need be, so that the largest value fits in 127. */
    uint16_t scale = f32_to_f16(largest / 127.0f);
    if (f16_to_f32(scale) * 127.0f < largest && scale < 0x7bff) scale++;
    float inverse = f16_to_f32(scale) > 0.0f ? 1.0f / f16_to_f32(scale) : 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      float units = rintf(x[lane * VALUES + i] * inverse);
      ((int8_t *)row)[lane * VALUES + i] = (int8_t)(int)fminf(fmaxf(units, -127.0f), 127.0f);
    }
    if (lane % (32 / VALUES) == 0)
      scales[lane / (32 / VALUES)] = largest < INFINITY ? scale : (uint16_t)0x7e00;
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
