/*
CUDA's device functions, and common.cuh's wrappers of instructions, in C++; included by device.h.

Each does what the GPU's does to the bit, but for the approximate ones (__expf, rsqrtf, __fdividef ..),
which are as exact as the C library, and for mma, whose order of summation hardware does not tell.
*/
#pragma once

#define EMULATE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emulate {
/* What a lane reads of one that does not take part. */
constexpr uint32_t NO_VALUE = 0xCDCDCDCDu;

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

/* in[2]: the lane to read; in[0..1]: the value. */
inline void combine_shuffle(Lane *lanes, uint32_t group) {
  for (uint32_t rest = group; rest; rest &= rest - 1) {
    Lane &lane = lanes[__builtin_ctz(rest)];
    uint32_t from = lane.in[2];
    bool there = group >> from & 1;
    lane.out[0] = there ? lanes[from].in[0] : NO_VALUE;
    lane.out[1] = there ? lanes[from].in[1] : NO_VALUE;
  }
}
template <typename T>
inline T shuffle(uint32_t mask, T value, int from, const char *name, const char *file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  memcpy(self->in, &value, sizeof value);
  self->in[2] = (uint32_t)from;
  collective(combine_shuffle, mask, name, file, line);
  memcpy(&value, self->out, sizeof value);
  return value;
}
/* All lanes get the fold of in[0]. */
template <typename F>
inline void fold(Lane *lanes, uint32_t group, F f) {
  uint32_t total = lanes[__builtin_ctz(group)].in[0];
  for (uint32_t rest = group & (group - 1); rest; rest &= rest - 1) total = f(total, lanes[__builtin_ctz(rest)].in[0]);
  for (uint32_t rest = group; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].out[0] = total;
}
inline void combine_ballot(Lane *lanes, uint32_t group) {
  uint32_t ballot = 0;
  for (uint32_t rest = group; rest; rest &= rest - 1)
    ballot |= (uint32_t)(lanes[__builtin_ctz(rest)].in[0] != 0) << __builtin_ctz(rest);
  for (uint32_t rest = group; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].out[0] = ballot;
}
inline void combine_match(Lane *lanes, uint32_t group) {
  for (uint32_t i = group; i; i &= i - 1) {
    Lane &lane = lanes[__builtin_ctz(i)];
    lane.out[0] = 0;
    for (uint32_t j = group; j; j &= j - 1) {
      const Lane &other = lanes[__builtin_ctz(j)];
      lane.out[0] |= (uint32_t)(lane.in[0] == other.in[0] && lane.in[1] == other.in[1]) << __builtin_ctz(j);
    }
  }
}
inline uint32_t ballot(uint32_t mask, bool predicate, const char *name, const char *file, int line) {
  self->in[0] = predicate;
  collective(combine_ballot, mask, name, file, line);
  return self->out[0];
}
}  // namespace emulate

/* ---- warps and blocks ---- */

template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, EMULATE_HERE) {
  int from = (emulate::lane_id & ~(width - 1)) | (lane & (width - 1));
  return emulate::shuffle(mask, value, from, "__shfl_sync", file, line);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, EMULATE_HERE) {
  int from = emulate::lane_id ^ lanes;
  if (from > (emulate::lane_id | (width - 1))) from = emulate::lane_id;
  return emulate::shuffle(mask, value, from, "__shfl_xor_sync", file, line);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATE_HERE) {
  int from = emulate::lane_id - (int)delta;
  if (from < (emulate::lane_id & ~(width - 1))) from = emulate::lane_id;
  return emulate::shuffle(mask, value, from, "__shfl_up_sync", file, line);
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATE_HERE) {
  int from = emulate::lane_id + (int)delta;
  if (from > (emulate::lane_id | (width - 1))) from = emulate::lane_id;
  return emulate::shuffle(mask, value, from, "__shfl_down_sync", file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATE_HERE) {
  return emulate::ballot(mask, predicate != 0, "__ballot_sync", file, line);
}
inline int __any_sync(uint32_t mask, int predicate, EMULATE_HERE) {
  return emulate::ballot(mask, predicate != 0, "__any_sync", file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATE_HERE) {
  return emulate::ballot(mask, predicate == 0, "__all_sync", file, line) == 0;
}
template <typename T>
inline uint32_t __match_any_sync(uint32_t mask, T value, EMULATE_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  emulate::self->in[1] = 0;
  memcpy(emulate::self->in, &value, sizeof value);
  emulate::collective(emulate::combine_match, mask, "__match_any_sync", file, line);
  return emulate::self->out[0];
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATE_HERE) {
  emulate::collective(nullptr, mask, "__syncwarp", file, line);
}

#define EMULATE_REDUCE(op, type, expression)                                                      \
  inline type __reduce_##op##_sync(uint32_t mask, type value, EMULATE_HERE) {                     \
    emulate::self->in[0] = (uint32_t)value;                                                       \
    emulate::collective(                                                                          \
        [](emulate::Lane *lanes, uint32_t group) {                                                \
          emulate::fold(lanes, group, [](uint32_t x, uint32_t y) {                                \
            type a = (type)x, b = (type)y;                                                        \
            return (uint32_t)(expression);                                                        \
          });                                                                                     \
        },                                                                                        \
        mask, "__reduce_" #op "_sync", file, line);                                               \
    return (type)emulate::self->out[0];                                                           \
  }
EMULATE_REDUCE(add, unsigned, a + b)
EMULATE_REDUCE(add, int, (unsigned)a + (unsigned)b)
EMULATE_REDUCE(max, unsigned, a > b ? a : b)
EMULATE_REDUCE(max, int, a > b ? a : b)
EMULATE_REDUCE(min, unsigned, a < b ? a : b)
EMULATE_REDUCE(min, int, a < b ? a : b)
EMULATE_REDUCE(and, unsigned, a & b)
EMULATE_REDUCE(or, unsigned, a | b)
EMULATE_REDUCE(xor, unsigned, a ^ b)
#undef EMULATE_REDUCE

inline void __syncthreads(EMULATE_HERE) { emulate::barrier(0, "__syncthreads", file, line); }
inline int __syncthreads_count(int predicate, EMULATE_HERE) {
  return emulate::barrier(predicate != 0, "__syncthreads_count", file, line);
}
inline int __syncthreads_or(int predicate, EMULATE_HERE) {
  return emulate::barrier(predicate != 0, "__syncthreads_or", file, line) != 0;
}
inline int __syncthreads_and(int predicate, EMULATE_HERE) {
  return emulate::barrier(predicate == 0, "__syncthreads_and", file, line) == 0;
}

/* ---- memory ---- */

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Atomic for the host's threads too, which may share the memory. */
#define EMULATE_ATOMICS(type)                                                                         \
  inline type atomicAdd(type *p, type x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }       \
  inline type atomicSub(type *p, type x) { return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST); }       \
  inline type atomicAnd(type *p, type x) { return __atomic_fetch_and(p, x, __ATOMIC_SEQ_CST); }       \
  inline type atomicOr(type *p, type x) { return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST); }         \
  inline type atomicXor(type *p, type x) { return __atomic_fetch_xor(p, x, __ATOMIC_SEQ_CST); }       \
  inline type atomicExch(type *p, type x) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); }     \
  inline type atomicCAS(type *p, type expected, type x) {                                             \
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
    return expected;                                                                                  \
  }                                                                                                   \
  inline type atomicMax(type *p, type x) {                                                            \
    type old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                  \
    while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
      ;                                                                                               \
    return old;                                                                                       \
  }                                                                                                   \
  inline type atomicMin(type *p, type x) {                                                            \
    type old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                  \
    while (old > x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
      ;                                                                                               \
    return old;                                                                                       \
  }
EMULATE_ATOMICS(int)
EMULATE_ATOMICS(unsigned)
EMULATE_ATOMICS(unsigned long long)
#undef EMULATE_ATOMICS
inline unsigned atomicInc(unsigned *p, unsigned limit) {
  unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
inline unsigned atomicDec(unsigned *p, unsigned limit) {
  unsigned old = *p;
  *p = old == 0 || old > limit ? limit : old - 1;
  return old;
}

#define EMULATE_LOAD(name) \
  template <typename T>    \
  inline T name(const T *p) { return *p; }
EMULATE_LOAD(__ldg)
EMULATE_LOAD(__ldca)
EMULATE_LOAD(__ldcg)
EMULATE_LOAD(__ldcs)
EMULATE_LOAD(__ldlu)
#undef EMULATE_LOAD
template <typename T>
inline T __ldcv(const T *p) { return *(const volatile T *)p; }
#define EMULATE_STORE(name) \
  template <typename T>     \
  inline void name(T *p, T x) { *p = x; }
EMULATE_STORE(__stcg)
EMULATE_STORE(__stcs)
EMULATE_STORE(__stwb)
EMULATE_STORE(__stwt)
#undef EMULATE_STORE

inline void __trap() { abort(); }
inline void __nanosleep(unsigned) {}
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }

/* ---- integers ---- */

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t both = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = selector >> (4 * i);
    unsigned byte = (unsigned)(both >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline int __mulhi(int x, int y) { return (int)((int64_t)x * y >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline int __dp4a(int x, int y, int sum) {
  for (int i = 0; i < 4; i++) sum += (int8_t)(x >> (8 * i)) * (int8_t)(y >> (8 * i));
  return sum;
}

#define EMULATE_MIN_MAX(type)                                \
  inline type min(type x, type y) { return y < x ? y : x; }  \
  inline type max(type x, type y) { return x < y ? y : x; }
EMULATE_MIN_MAX(int)
EMULATE_MIN_MAX(unsigned)
EMULATE_MIN_MAX(long)
EMULATE_MIN_MAX(unsigned long)
EMULATE_MIN_MAX(long long)
EMULATE_MIN_MAX(unsigned long long)
#undef EMULATE_MIN_MAX
inline unsigned min(int x, unsigned y) { return min((unsigned)x, y); }
inline unsigned min(unsigned x, int y) { return min(x, (unsigned)y); }
inline unsigned max(int x, unsigned y) { return max((unsigned)x, y); }
inline unsigned max(unsigned x, int y) { return max(x, (unsigned)y); }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

/* ---- floats ---- */

inline float __uint_as_float(unsigned x) { return emulate::bits<float>(x); }
inline float __int_as_float(int x) { return emulate::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulate::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulate::bits<int>(x); }
inline double __longlong_as_double(long long x) { return emulate::bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulate::bits<long long>(x); }

/* As the GPU does it: beyond the range, the end of the range; NaN is 0. */
inline int emulate_to_int(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : (int)x;
}
inline unsigned emulate_to_uint(float x) {
  return x != x || x < 0 ? 0 : x >= 4294967296.0f ? UINT32_MAX : (unsigned)x;
}
inline int __float2int_rn(float x) { return emulate_to_int(rintf(x)); }
inline int __float2int_rz(float x) { return emulate_to_int(truncf(x)); }
inline int __float2int_rd(float x) { return emulate_to_int(floorf(x)); }
inline int __float2int_ru(float x) { return emulate_to_int(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return emulate_to_uint(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return emulate_to_uint(truncf(x)); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x != x ? 0.0f : fminf(fmaxf(x, 0.0f), 1.0f); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

/* Macros, because glibc declares some of these names for itself. */
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
#define __tanf(x) tanf(x)

inline float f16_to_f32(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest < 0x400) /* subnormal or zero: a multiple of 2^-24 */
    return __uint_as_float(__float_as_uint((float)rest * 0x1p-24f) | sign);
  if (rest < 0x7c00) return __uint_as_float(sign | ((rest << 13) + (112u << 23)));
  return __uint_as_float(sign | 0x7f800000u | rest << 13);
}
inline uint16_t f32_to_f16(float x) {
  uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7fff);
  if (rest >= 0x477fe000) return (uint16_t)(sign | 0x7bff); /* 65504 and above */
  if (rest < 0x38800000) /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
    return (uint16_t)(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

/* ---- instructions that common.cuh wraps ---- */

namespace emulate {
inline void check_aligned(const void *p, unsigned bytes, const char *name, const char *file, int line) {
  if ((uintptr_t)p % bytes) fail(file, line, "%s: %p is not a multiple of %u", name, p, bytes);
}
inline void need_all_lanes(uint32_t group, const char *name) {
  if (group != 0xffffffffu) fail(__FILE__, __LINE__, "%s with lanes missing: %08x", name, group);
}

/* in[0..4]: A, in[4..6]: B, in[6..10]: C; out: C + A B. */
inline void combine_mma(Lane *lanes, uint32_t group) {
  typedef float Row __attribute__((vector_size(32)));
  need_all_lanes(group, "mma_f16");
  float a[16][16];
  union {
    Row row[16];
    float at[16][8];
  } b, c;
  for (int g = 0; g < 8; g++) {
    for (int t = 0; t < 4; t++) {
      const uint32_t *in = lanes[4 * g + t].in;
      for (int half = 0; half < 2; half++) {
        a[g][2 * t + half] = f16_to_f32((uint16_t)(in[0] >> (16 * half)));
        a[g + 8][2 * t + half] = f16_to_f32((uint16_t)(in[1] >> (16 * half)));
        a[g][2 * t + 8 + half] = f16_to_f32((uint16_t)(in[2] >> (16 * half)));
        a[g + 8][2 * t + 8 + half] = f16_to_f32((uint16_t)(in[3] >> (16 * half)));
        b.at[2 * t + half][g] = f16_to_f32((uint16_t)(in[4] >> (16 * half)));
        b.at[2 * t + 8 + half][g] = f16_to_f32((uint16_t)(in[5] >> (16 * half)));
        c.at[g][2 * t + half] = __uint_as_float(in[6 + half]);
        c.at[g + 8][2 * t + half] = __uint_as_float(in[8 + half]);
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    Row sum = c.row[row];
    for (int k = 0; k < 16; k++) sum += a[row][k] * b.row[k];
    c.row[row] = sum;
  }
  for (int g = 0; g < 8; g++) {
    for (int t = 0; t < 4; t++) {
      uint32_t *out = lanes[4 * g + t].out;
      for (int half = 0; half < 2; half++) {
        out[half] = __float_as_uint(c.at[g][2 * t + half]);
        out[2 + half] = __float_as_uint(c.at[g + 8][2 * t + half]);
      }
    }
  }
}

/* in[0..2]: the address of a row of 8 f16. */
template <bool transposed>
inline void combine_ldmatrix(Lane *lanes, uint32_t group) {
  need_all_lanes(group, "ldmatrix");
  uint16_t matrices[32][8];
  for (int lane = 0; lane < 32; lane++) {
    const void *row;
    memcpy(&row, lanes[lane].in, sizeof row);
    memcpy(matrices[lane], row, 16);
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int m = 0; m < 4; m++) {
      int g = lane / 4, t = lane % 4;
      uint16_t low = transposed ? matrices[8 * m + 2 * t][g] : matrices[8 * m + g][2 * t];
      uint16_t high = transposed ? matrices[8 * m + 2 * t + 1][g] : matrices[8 * m + g][2 * t + 1];
      lanes[lane].out[m] = (uint32_t)low | (uint32_t)high << 16;
    }
  }
}
template <bool transposed>
inline void ldmatrix(uint32_t (&r)[4], const void *row, const char *name, const char *file, int line) {
  check_aligned(row, 16, name, file, line);
  memcpy(self->in, &row, sizeof row);
  collective(combine_ldmatrix<transposed>, 0xffffffffu, name, file, line);
  memcpy(r, self->out, sizeof r);
}
}  // namespace emulate

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATE_HERE) {
  uint32_t *in = emulate::self->in;
  memcpy(in, a, sizeof a);
  in[4] = b0;
  in[5] = b1;
  memcpy(in + 6, c, sizeof c);
  emulate::collective(emulate::combine_mma, 0xffffffffu, "mma_f16", file, line);
  memcpy(c, emulate::self->out, sizeof c);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, EMULATE_HERE) {
  emulate::ldmatrix<false>(r, row, "ldmatrix_x4", file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, EMULATE_HERE) {
  emulate::ldmatrix<true>(r, row, "ldmatrix_x4_trans", file, line);
}

inline uint4 load_stream16(const void *p, EMULATE_HERE) {
  emulate::check_aligned(p, 16, "load_stream16", file, line);
  uint4 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline uint2 load_stream8(const void *p, EMULATE_HERE) {
  emulate::check_aligned(p, 8, "load_stream8", file, line);
  uint2 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline float4 load_host16(const void *p, EMULATE_HERE) {
  emulate::check_aligned(p, 16, "load_host16", file, line);
  const volatile float *v = (const volatile float *)p;
  return {v[0], v[1], v[2], v[3]};
}
inline void store_release_system(uint32_t *flag, uint32_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

inline uint32_t dynamic_smem_bytes() { return emulate::shared_memory_bytes; }
template <int THREADS>
inline void group_sync(int id, EMULATE_HERE) { emulate::group_barrier(id, THREADS, file, line); }

inline void cp_async16(void *shared, const void *global, bool valid, EMULATE_HERE) {
  emulate::check_aligned(shared, 16, "cp_async16 to", file, line);
  emulate::check_aligned(global, 16, "cp_async16 from", file, line);
  emulate::cp_async(shared, global, valid);
}
inline void cp_async_commit() { emulate::cp_async_commit(); }
template <int N>
inline void cp_async_wait() { emulate::cp_async_wait(N); }

inline void wait_for_previous_kernels() {}
inline void launch_next_kernel() {}
