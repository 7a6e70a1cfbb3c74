/*
What all kernels share: structures that the host fills in, the NF4 table, fragments, fences.

Everything that only a GPU has is called through a function of this file, so that `emulate/` can run
the same kernels on a CPU: warp shuffles, matrix instructions, cache hints, fences, grid dependencies.

Shapes: T tokens, D hidden_size, E num_experts, k num_experts_per_tok, I moe_intermediate_size.
*/
#pragma once

#include <stdint.h>

#ifdef MOECTL_EMULATE
#include "emulate/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
/* Dynamic shared memory as an array of bytes, 16-byte aligned. */
#define DYNAMIC_SMEM(name) extern __shared__ __align__(16) uint8_t name[]
/* Names a kernel for the emulator; stands at the end of its file. */
#define EXPORT(kernel)
#endif

#define KERNEL extern "C" __global__ void

/* ---- structures shared with the host: src/backend/cuda/abi.rs has the same, field by field ---- */

/* How a matrix lies in memory. */
enum Format : int32_t {
  NF4_TILES = 0, /* tiles of 32 x 64, src/backend/cpu/layout.rs; rows padded to 32 */
  BF16_ROWS = 1, /* [rows, kblocks * 64] bf16, zero-padded */
  F32_ROWS = 2,  /* [rows, kblocks * 64] f32, zero-padded */
};

/* [rows, cols] matrix; a null `weights` stands for no matrix (rows = 0). */
struct Linear {
  const uint8_t *weights;
  const float *units; /* NF4_TILES: [ceil(rows / 32)], times u16 absmax; else null */
  int32_t rows;
  int32_t cols;
  int32_t kblocks; /* ceil(cols / 64) */
  int32_t format;
};

/* Where the three matrices of an expert lie in its blob: gate at 0, then up, then down. */
struct ExpertLayout {
  int64_t up_offset;   /* bytes */
  int64_t down_offset; /* bytes */
  int64_t blob_bytes;
  int32_t intermediate; /* I; gate and up are [I, D], down is [D, I] */
  int32_t format;       /* of all three */
  int32_t up_unit;      /* units of up start at this float; gate's at 0 */
  int32_t down_unit;
  int32_t num_units; /* floats per expert */
  int32_t padding;
};

/* What changes from one decode step to the next, of each token in the step; in device memory. decode_begin
   writes position and number. `state` is written before the graph is launched, so that kernels may read it before they wait. */
struct Step {
  int32_t position; /* of the token being decoded: tokens seen before it */
  uint32_t number;  /* counts decode steps from 1; never repeats within a process */
  uint64_t state;   /* where the sequence's states lie: added to the places that kernels are given */
};

/* Decode kernels take up to MAX_BATCH tokens in one launch, each with a Step, and in every buffer a row of its
   own; the grid's z is the token. What a token gets does not depend on the others. */
constexpr int MAX_BATCH = 8;

__device__ __forceinline__ int token_index() { return (int)blockIdx.z; }

/* A place in the states of the sequence that a token is of: graphs know places, not sequences. */
template <class T>
__device__ __forceinline__ T *of_sequence(T *place, const Step *step) {
  return (T *)((uint64_t)place + step->state);
}

constexpr int MAX_TOP_K = 32;

/* The router's choice, in device memory: what the GPU computes in this layer of this step. */
struct Decision {
  int32_t count;                        /* experts for the GPU, the shared one last */
  int32_t shared;                       /* index of the shared expert: count - 1 */
  const uint8_t *blob[MAX_TOP_K + 1];   /* in VRAM, or in mapped host memory */
  const float *units[MAX_TOP_K + 1];    /* in VRAM */
  float weight[MAX_TOP_K + 1];          /* router weight, or sigmoid of the shared gate */
};

/* The same for the CPU, in mapped host memory, one per layer. `ready` is stored last, released at
   system scope. */
struct Handoff {
  uint32_t ready; /* Step::number */
  int32_t num_cpu;
  int32_t cpu_ids[MAX_TOP_K]; /* in order of rank */
  float cpu_weights[MAX_TOP_K];
  int32_t topk_ids[MAX_TOP_K]; /* all k, best first */
  float topk_weights[MAX_TOP_K];
  int32_t padding[2];
};

constexpr int TILE_ROWS = 32;
constexpr int TILE_COLS = 64;
constexpr int TILE_BYTES = 1088; /* 8 groups of 32 dwords, then 32 u16 scales */

/* ---- NF4 ---- */

/* The 16 values of bitsandbytes' NF4, exactly. */
__device__ constexpr float NF4_VALUES[16] = {
    -1.0f,                -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171229824f,
    0.44070982933044434f, 0.5626170039176941f,  0.7229568362236023f,  1.0f};

/* Entries of the dequantisation table: by byte (two codes), for each of 16 lane pairs, so that a
   warp's 8-byte loads never meet in a bank. 32 KB. */
constexpr int TABLE_BYTES = 256 * 16 * 8;

/* What a byte stands for: two f16 values, the low nibble's in the low half, and what f16 rounds off
   of both, as f16 too: `high + low` is NF4_VALUES to 2^-23. */
struct __align__(8) CodePair {
  uint32_t high;
  uint32_t low;
};

/* ---- numbers ---- */

__device__ __forceinline__ float bf16_to_f32(uint16_t bits) {
  return __uint_as_float((uint32_t)bits << 16);
}

#ifndef MOECTL_EMULATE
__device__ __forceinline__ float f16_to_f32(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
/* Round to nearest; beyond the range, the largest finite number. NaN stays NaN. */
__device__ __forceinline__ uint16_t f32_to_f16(float x) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-65504.0f));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(65504.0f));
  return __half_as_ushort(__float2half_rn(x));
}
#endif

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  return (uint32_t)f32_to_f16(low) | (uint32_t)f32_to_f16(high) << 16;
}

/* x as the sum of two f16: `high` rounded, `low` the rest. Exact to 2^-22 of |x| in f16's range. */
__device__ __forceinline__ void split_f16(float x, uint16_t &high, uint16_t &low) {
  high = f32_to_f16(x);
  low = f32_to_f16(x - f16_to_f32(high));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
/* ln(1 + e^x), and x itself above 20, as torch has it. */
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* Fills the table for bytes; every thread of the block takes part, then __syncthreads. */
__device__ __forceinline__ void fill_table(CodePair *table) {
  for (int i = threadIdx.x; i < 256 * 16; i += blockDim.x) {
    int byte = i / 16;
    uint16_t high[2], low[2];
    split_f16(NF4_VALUES[byte & 15], high[0], low[0]);
    split_f16(NF4_VALUES[byte >> 4], high[1], low[1]);
    table[i].high = (uint32_t)high[0] | (uint32_t)high[1] << 16;
    table[i].low = (uint32_t)low[0] | (uint32_t)low[1] << 16;
  }
}

/* The two weights of `byte`, from the caller's own column of the table. */
__device__ __forceinline__ CodePair look_up(const CodePair *table, uint32_t byte) {
  return table[byte * 16 + (threadIdx.x & 15)];
}

/* ---- instructions ---- */

#ifndef MOECTL_EMULATE

/* c += A B: A [16, 16] and B [16, 8] of f16, c [16, 8] of f32, as mma.m16n8k16 spreads them over a
   warp. Lane 4g + t holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 2t.. (a0, a1) and
   2t + 8.. (a2, a3); of B rows 2t.. (b0) and 2t + 8.. (b1), column g; of c rows g (c0, c1) and
   g + 8 (c2, c3), columns 2t and 2t + 1. */
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same of bf16. */
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 8 x 8 matrices of f16 from shared memory: lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
  uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
  uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/* Weights, read once: past L1, and where they lie in host memory, over PCIe. */
__device__ __forceinline__ uint4 load_stream16(const void *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_stream8(const void *p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}

/* Memory that the host writes while the kernel may be running or was waiting for it. */
__device__ __forceinline__ float4 load_host16(const void *p) {
  float4 v;
  asm volatile("ld.relaxed.sys.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

/* Everything this thread wrote before, and what it saw through barriers, is visible to the host
   before the flag is. */
__device__ __forceinline__ void store_release_system(uint32_t *flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

/* 16 bytes from global to shared memory without registers; zeros if not `valid`. */
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid) {
  uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
/* Waits until at most N groups are under way. */
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* What the launch asked for. */
__device__ __forceinline__ uint32_t dynamic_smem_bytes() {
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

/* A barrier among THREADS threads of the block, whole warps; ids 1 .. 15. */
template <int THREADS>
__device__ __forceinline__ void group_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

/* Programmatic dependent launch: a kernel launched early waits here until the kernels before it
   have finished and their writes are visible. Every thread of every kernel that reads what another
   kernel wrote calls it first. */
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Lets the next kernel start; it will wait as above. */
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif /* MOECTL_EMULATE */

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

/* Two f16, rounded to nearest; for numbers in f16's range, at less cost than pack_f16. */
__device__ __forceinline__ uint32_t round_f16x2(float low, float high) {
#ifdef MOECTL_EMULATE
  return pack_f16(low, high);
#else
  uint32_t z;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(high), "f"(low));
  return z;
#endif
}

/* Two f16 in each: x - y. */
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t x, uint32_t y) {
#ifdef MOECTL_EMULATE
  return pack_f16(f16_to_f32((uint16_t)x) - f16_to_f32((uint16_t)y),
                  f16_to_f32((uint16_t)(x >> 16)) - f16_to_f32((uint16_t)(y >> 16)));
#else
  uint32_t z;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#endif
}

/* Two f16 in each: x y. */
__device__ __forceinline__ uint32_t mul_f16x2(uint32_t x, uint32_t y) {
#ifdef MOECTL_EMULATE
  return pack_f16(f16_to_f32((uint16_t)x) * f16_to_f32((uint16_t)y),
                  f16_to_f32((uint16_t)(x >> 16)) * f16_to_f32((uint16_t)(y >> 16)));
#else
  uint32_t z;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#endif
}

/* Asks for the 128 bytes at p to be brought into L2; harmless before wait_for_previous_kernels, because
   that is where other kernels' writes go, too. */
__device__ __forceinline__ void prefetch_to_l2(const void *p) {
#ifdef MOECTL_EMULATE
  (void)p;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

/* Columns c .. c + 4 of a row of f32; zeros from cols on. c is a multiple of 4. */
__device__ __forceinline__ float4 load_columns(const float *row, int c, int cols) {
  if (cols % 4 == 0) return c < cols ? *(const float4 *)(row + c) : make_float4(0, 0, 0, 0);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = c + i < cols ? row[c + i] : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}
