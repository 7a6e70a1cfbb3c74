/*
Tests of the emulator itself, by kernels of its own:
  g++ -std=c++17 -O2 -fno-strict-aliasing -DMOECTL_EMULATE -I kernels kernels/emulate/test.cpp kernels/emulate/emulator.cpp
Prints what failed; exit status 1 then. SHOW=1 shows the messages of
the kernels that must abort.
*/
#include "common.cuh"

#include <sys/wait.h>
#include <unistd.h>

#include <random>
#include <vector>

static int failures;
#define CHECK(x) \
  if (!(x)) failures++, printf("%s:%d: %s\n", __FILE__, __LINE__, #x)

KERNEL shuffles(int *out) {
  int lane = threadIdx.x & 31, *o = out + threadIdx.x * 8;
  o[0] = __shfl_sync(0xffffffffu, lane * 10, 3);
  o[1] = __shfl_up_sync(0xffffffffu, lane, 1);
  o[2] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
  o[3] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
  o[4] = (int)__reduce_add_sync(0xffffffffu, (unsigned)lane);
  o[5] = (int)(__shfl_xor_sync(0xffffffffu, (unsigned long long)lane << 32, 1) >> 32);
  o[6] = (int)__match_any_sync(0xffffffffu, lane / 4);
  o[7] = 0;
  if (lane < 8) o[7] = __reduce_max_sync(0xffu, -lane - 5);
  else if (lane < 16) o[7] = __shfl_sync(0xff00u, lane, 9) + __shfl_sync(0xff00u, lane, 2);
  __syncwarp();
}
KERNEL sums(const float *x, int n, float *out) {
  __shared__ float parts[32];
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[i + blockIdx.x * n];
  s = warp_sum(s);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  s = threadIdx.x < (blockDim.x + 31) / 32 ? parts[threadIdx.x] : 0;
  s = warp_sum(s);
  if (threadIdx.x == 0) out[blockIdx.x] = s;
}
EXPORT(sums)

KERNEL reverse_in_shared(const int *in, int *out) {
  DYNAMIC_SMEM(smem);
  int *shared = (int *)smem;
  if (threadIdx.x == 0 && shared[5] != (int)0xCDCDCDCD) out[2000] = 1;
  __syncthreads();
  for (int round = 0; round < 3; round++) {
    shared[threadIdx.x] = round ? out[threadIdx.x] : in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
  }
  int count = __syncthreads_count(threadIdx.x % 2);
  int any = __syncthreads_or(threadIdx.x == 7), all = __syncthreads_and(threadIdx.x != 7);
  if (threadIdx.x == 0) out[2001] = count, out[2002] = any, out[2003] = all;
}

KERNEL tile_product(const uint16_t *a, const uint16_t *b, float *c) {
  DYNAMIC_SMEM(smem);
  uint16_t *sa = (uint16_t *)smem, *sb = sa + 16 * 16; /* a [16, 16], b [16 k, 8 n] padded to 16 */
  int lane = threadIdx.x;
  cp_async16(sa + lane * 8, a + lane * 8, true);
  cp_async_commit();
  cp_async16(sb + lane * 8, b + lane / 2 * 8, lane % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncwarp();
  uint32_t fa[4], fb[4];
  /* Matrices: rows 0-7 cols 0-7, rows 8-15 cols 0-7, rows 0-7 cols 8-15, rows 8-15 cols 8-15. */
  ldmatrix_x4(fa, sa + (lane % 16) * 16 + lane / 16 * 8);
  cp_async_wait<0>();
  __syncwarp();
  ldmatrix_x4_trans(fb, sb + (lane % 16) * 16 + lane / 16 * 8);
  float acc[4] = {1, 1, 1, 1};
  mma_f16(acc, fa, fb[0], fb[1]);
  int g = lane / 4, t = lane % 4;
  c[g * 8 + 2 * t] = acc[0];
  c[g * 8 + 2 * t + 1] = acc[1];
  c[(g + 8) * 8 + 2 * t] = acc[2];
  c[(g + 8) * 8 + 2 * t + 1] = acc[3];
  if (fb[2] != 0) c[0] = NAN;
}

/* threadFenceReduction: the last block adds up. */
KERNEL last_block(unsigned *counter, int *parts, int *total, Linear by_value) {
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = (int)blockIdx.x * by_value.rows;
    __threadfence();
  }
  bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1u) == gridDim.x - 1);
  if (!last || threadIdx.x) return;
  *total = 0;
  for (unsigned i = 0; i < gridDim.x; i++) *total += parts[i];
  *counter = 0;
}
EXPORT(last_block)

KERNEL grid3(int *out) {
  unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread]++;
}

/* Mistakes, which must abort. */
KERNEL different_lines(int *out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xffffffffu, 1, 0);
  else *out = __shfl_sync(0xffffffffu, 2, 0);
}
KERNEL barrier_in_branch(int *out) {
  if (threadIdx.x < 32) __syncthreads();
  else *out = __shfl_sync(0x3u, 1, 0);
}
KERNEL missing_lane(int *) {
  if (threadIdx.x < 5) __syncwarp();
  else __syncthreads();
}
KERNEL beyond_shared(int *out) {
  DYNAMIC_SMEM(smem);
  *out = ((volatile int *)smem)[16];
}
KERNEL misaligned(int *out) { load_stream16((const char *)out + 4); }

template <typename F>
static bool aborts(F f) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    if (!getenv("SHOW")) freopen("/dev/null", "w", stderr);
    f();
    _exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

int main() {
  using emulate::launch;
  {
    std::vector<int> out(64 * 8);
    launch(shuffles, 1, 64, 0, out.data());
    for (int i = 0; i < 64; i++) {
      int lane = i % 32;
      const int *o = &out[i * 8];
      CHECK(o[0] == 30 && o[1] == (lane ? lane - 1 : 0) && o[2] == (lane % 8 < 6 ? lane + 2 : lane));
      CHECK(o[3] == 0x49249249 && o[4] == 31 * 16 && o[5] == (lane ^ 1) && (unsigned)o[6] == 0xfu << lane / 4 * 4);
      CHECK(o[7] == (lane < 8 ? -5 : lane < 16 ? 9 + (int)0xCDCDCDCD : 0));
    }
  }
  std::mt19937 random(1);
  for (unsigned threads : {32u, 33u, 100u, 256u, 1024u}) {
    int n = 777;
    std::vector<float> x(3 * n), out(3);
    for (float &v : x) v = (float)(random() % 100);
    unsigned grid[3] = {3, 1, 1}, block[3] = {threads, 1, 1};
    float *px = x.data(), *pout = out.data();
    void *params[] = {&px, &n, &pout};
    if (threads % 32 == 0) { /* warp_sum reads absent lanes otherwise */
      CHECK(moectl_emulate_launch("sums", grid, block, 0, params) == 0);
      for (int b = 0; b < 3; b++) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += x[b * n + i];
        CHECK(out[b] == sum);
      }
    }
    std::vector<int> in(1024), back(2100);
    for (int &v : in) v = (int)random();
    launch(reverse_in_shared, 2, threads, threads * 4 + 64, in.data(), back.data());
    for (unsigned i = 0; i < threads; i++) CHECK(back[i] == in[threads - 1 - i]);
    CHECK(back[2000] == 0 && back[2001] == (int)threads / 2 && back[2002] == 1 && back[2003] == 0);
  }
  {
    std::vector<uint16_t> a(256), b(128);
    std::vector<float> c(128);
    for (auto &v : a) v = f32_to_f16((float)(random() % 2000) / 1000 - 1);
    for (auto &v : b) v = f32_to_f16((float)(random() % 2000) / 1000 - 1);
    launch(tile_product, 1, 32, 2048, a.data(), b.data(), c.data());
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 8; j++) {
        double sum = 1;
        for (int k = 0; k < 16; k++) sum += (double)f16_to_f32(a[i * 16 + k]) * f16_to_f32(b[k * 8 + j]);
        CHECK(fabs(c[i * 8 + j] - sum) < 1e-5);
      }
  }
  {
    unsigned counter = 0, sizes[8];
    int parts[10], total = -1;
    Linear linear = {};
    linear.rows = 7;
    unsigned *pc = &counter;
    int *pp = parts, *pt = &total;
    void *params[] = {&pc, &pp, &pt, &linear};
    unsigned grid[3] = {10, 1, 1}, block[3] = {64, 1, 1};
    CHECK(moectl_emulate_launch("last_block", grid, block, 0, params) == 0);
    CHECK(total == 45 * 7 && counter == 0);
    CHECK(moectl_emulate_params("last_block", sizes, 8) == 4 && sizes[3] == sizeof(Linear) && sizes[0] == 8);
    CHECK(moectl_emulate_launch("nothing", grid, block, 0, params) == 1);
  }
  {
    std::vector<int> out(2 * 3 * 4 * 5 * 3 * 2);
    launch(grid3, dim3(2, 3, 4), dim3(5, 3, 2), 0, out.data());
    for (int v : out) CHECK(v == 1);
  }
  {
    alignas(16) int out[8];
    CHECK(aborts([&] { launch(different_lines, 1, 32, 0, out); }));
    CHECK(aborts([&] { launch(barrier_in_branch, 1, 64, 0, out); }));
    CHECK(aborts([&] { launch(missing_lane, 1, 32, 0, out); }));
    CHECK(aborts([&] { launch(beyond_shared, 1, 1, 64, out); }));
    CHECK(aborts([&] { launch(misaligned, 1, 1, 0, out); }));
    CHECK(!aborts([&] { launch(beyond_shared, 1, 1, 68, out); }));
  }
  /* f16: every value there and back; every rounding against the definition. */
  for (uint32_t h = 0; h < 0x10000; h++) {
    float f = f16_to_f32((uint16_t)h);
    uint16_t back = f32_to_f16(f);
    CHECK(f != f ? (back & 0x7fff) > 0x7c00 : back == (isinf(f) ? (h & 0x8000) | 0x7bff : h));
  }
  for (uint32_t h = 0; h < 0x7bff; h++) {
    float low = f16_to_f32((uint16_t)h), high = f16_to_f32((uint16_t)(h + 1)), middle = (low + high) / 2;
    CHECK(f32_to_f16(middle) == (h & 1 ? h + 1 : h));
    CHECK(f32_to_f16(nextafterf(middle, 0)) == h && f32_to_f16(nextafterf(middle, 1e9f)) == h + 1);
    CHECK(f32_to_f16(-nextafterf(middle, 0)) == (h | 0x8000));
  }
  CHECK(f32_to_f16(1e-30f) == 0 && f32_to_f16(65519.0f) == 0x7bff && f32_to_f16(-1e30f) == 0xfbff);
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x7051) == 0x77005511);
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(NAN) == 0 && __float2int_rn(1e20f) == INT32_MAX);
  printf("%d failures\n", failures);
  return failures != 0;
}
