/*
Runs CUDA kernels on an x86-64 CPU: what nvcc gives a kernel, for a plain C++ compiler.

common.cuh includes this under MOECTL_EMULATE instead of CUDA's headers. The kernels' sources stay as
they are; only what common.cuh lists between `#ifndef MOECTL_EMULATE` is written twice (builtins.h).

- Every thread of a block is a fiber (emulator.cpp); blocks run one after another on the OS thread that
  launches. So a block must not wait for a later one; "the last block does it" works.
- A warp's lanes run in turn, each up to its next warp function or barrier. Warp functions wait for the
  lanes of their mask that have not exited. Lanes that meet at different source lines, barriers that
  some thread never reaches, misaligned 8- and 16-byte accesses and mma with lanes missing abort with the
  kernel's name and the line.
- Dynamic shared memory holds 0xCD at the start of each block and ends at a page without access.
  `__shared__` variables are C++ statics: they keep what the block before left there.
- cp_async16 fills its target with 0xCD, and copies as late as a GPU may: in cp_async_wait.
- A value taken from a lane that does not take part is 0xCDCDCDCD.
- Device pointers are host pointers.

To be launched by name (moectl_emulate_launch), a kernel is named at the end of its .cu:

    EXPORT(decode_begin)

Environment: MOECTL_EMULATE_REVERSE=1 runs blocks, warps and lanes from the last to the first, which
shows missing barriers that the usual order hides; MOECTL_EMULATE_TRACE=1 prints each launch.

Compile with -fno-strict-aliasing: kernels read memory through other types, as nvcc allows.
*/
#pragma once

#include <assert.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the emulator needs g++ or clang++ on x86-64"
#endif

/* ---- keywords ---- */

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define DYNAMIC_SMEM(name) uint8_t *const name = emulate::shared_memory
#define EXPORT(kernel) \
  static const emulate::Export emulate_export_##kernel(#kernel, emulate::exported<kernel>, kernel);

/* ---- types ---- */

#define EMULATE_VECTOR(type, name, bytes)                                    \
  struct __align__(2 * bytes) name##2 { type x, y; };                        \
  struct name##3 { type x, y, z; };                                          \
  struct __align__(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }           \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATE_VECTOR(signed char, char, 1)
EMULATE_VECTOR(unsigned char, uchar, 1)
EMULATE_VECTOR(short, short, 2)
EMULATE_VECTOR(unsigned short, ushort, 2)
EMULATE_VECTOR(int, int, 4)
EMULATE_VECTOR(unsigned, uint, 4)
EMULATE_VECTOR(float, float, 4)
EMULATE_VECTOR(long long, longlong, 8)
EMULATE_VECTOR(unsigned long long, ulonglong, 8)
EMULATE_VECTOR(double, double, 8)
#undef EMULATE_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- the emulator ---- */

namespace emulate {

extern uint8_t *shared_memory;
extern unsigned shared_memory_bytes;

/* Runs `entry(argument)` as every thread of the grid. */
void run(const char *kernel, void (*entry)(void *), void *argument, dim3 grid, dim3 block,
         unsigned smem_bytes);

/* Prints the kernel, block and thread, then the message, and aborts. */
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(const char *file, int line,
                                                             const char *format, ...);

/* Waits until all lanes of `mask` that have not exited call this from the same line. The last one to
   arrive runs `combine` for all of them: it turns every lane's `in` into its `out`. */
struct Lane {
  uint32_t in[16];
  uint32_t out[4];
};
typedef void Combine(Lane *lanes, uint32_t group);
void collective(Combine *combine, uint32_t mask, const char *name, const char *file, int line);
/* The calling lane's slot in its warp. */
extern Lane *self;
extern int lane_id;

/* __syncthreads and its kin; the sum of `value` over all threads. */
int barrier(int value, const char *name, const char *file, int line);

/* bar.sync among `threads` threads of the block, whole warps; ids 1 .. 15. */
void group_barrier(int id, int threads, const char *file, int line);

void cp_async(void *to, const void *from, bool valid);
void cp_async_commit();
void cp_async_wait(int groups_under_way);

/* A kernel that can be launched by name. */
struct Export {
  typedef void Entry(void *params);
  template <typename... P>
  Export(const char *name, Entry *entry, void (*)(P...)) {
    static const unsigned sizes[] = {sizeof(P)..., 0};
    add(name, entry, sizes, (int)sizeof...(P));
  }
  static void add(const char *name, Entry *entry, const unsigned *sizes, int num_params);
};

template <auto kernel, typename... P, size_t... I>
void call(void (*)(P...), void **params, std::index_sequence<I...>) {
  kernel(*(P *)params[I]...);
}
template <auto kernel, typename... P>
void call(void (*f)(P...), void **params) {
  call<kernel>(f, params, std::make_index_sequence<sizeof...(P)>());
}
/* The kernel with its parameters behind pointers, as cuLaunchKernel takes them. */
template <auto kernel>
void exported(void *params) {
  call<kernel>(kernel, (void **)params);
}

/* kernel<<<grid, block, smem_bytes>>>(args...), for tests in C++. */
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, unsigned smem_bytes, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> params;
  } call = {kernel, std::tuple<P...>(args...)};
  run("(launched by address)", [](void *p) { std::apply(((Call *)p)->kernel, ((Call *)p)->params); },
      &call, grid, block, smem_bytes);
}

}  // namespace emulate

extern "C" {
/* What cuLaunchKernel does. 0: ok, 1: no such kernel. A kernel's mistake aborts the process. */
int moectl_emulate_launch(const char *kernel, const unsigned grid[3], const unsigned block[3],
                          unsigned smem_bytes, void **params);
/* How many parameters the kernel has, their sizes in `sizes` (as many as fit); -1: no such kernel. */
int moectl_emulate_params(const char *kernel, unsigned *sizes, int max);
/* Name of the i-th kernel, or null. */
const char *moectl_emulate_kernel(int i);
}

#include "builtins.h"
