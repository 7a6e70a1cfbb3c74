/*
sample_best: the best logits of each token, so that a step need not bring all of them to the host. Of each
token in the grid's z:
  logits   [V] f32
  maxima   [chunks] of scratch, chunks = ceil(V / chunk) <= 1024; chunk is a multiple of 32
  counter  0 before the first launch, and again after each
  best     the best token, the lowest id among equals, or the first logit that is NaN or +inf; and a
           set of candidates with every token that is at least as good as the wanted-th best
launch: grid (ceil(chunks / 8), 1, tokens), block 256, no dynamic shared memory.

A warp takes the maximum of a chunk. The last block to finish has the maxima: of its threads' best, the
wanted-th is a lower bound of the wanted-th logit of all, and few others reach it, so only chunks that do
are read again. With fewer chunks than wanted everything is a candidate. Candidates come in any order,
but always the same ones; where they don't fit, `count` says how many there are and the host takes all
logits.
*/
#include "common.cuh"

constexpr int BEST_WARPS = 8;
constexpr int BEST_THREADS = 32 * BEST_WARPS;
constexpr int MAX_CHUNKS = 1024;
constexpr int MAX_CANDIDATES = 512;

/* src/backend/cuda/abi.rs has the same. */
struct Best {
  int32_t count; /* candidates, also if they don't fit */
  int32_t id;
  float logit; /* of id: NaN or +inf if there is one, -inf if there is no other */
  int32_t padding;
  int32_t ids[MAX_CANDIDATES];
  float logits[MAX_CANDIDATES];
};

constexpr uint32_t BROKEN = 0xffffffffu;

/* In the order of the logits, both zeros alike; BROKEN, above all, for NaN and +inf. */
__device__ __forceinline__ uint32_t key_of(float logit) {
  if (!(logit < INFINITY)) return BROKEN;
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Calls f(id, logit) for ids first, first + stride, .. below `last`; the loads of a round are all under
   way before the first is used. */
template <class F>
__device__ __forceinline__ void for_logits(const float *logits, int first, int last, int stride, F f) {
  constexpr int TOGETHER = 8;
  for (int i = first; i < last; i += TOGETHER * stride) {
    float x[TOGETHER];
#pragma unroll
    for (int u = 0; u < TOGETHER; u++)
      x[u] = i + u * stride < last ? logits[i + u * stride] : -INFINITY;
#pragma unroll
    for (int u = 0; u < TOGETHER; u++)
      if (i + u * stride < last) f(i + u * stride, x[u]);
  }
}

KERNEL __launch_bounds__(BEST_THREADS)
    sample_best(const float *logits, int vocab, int chunk, int wanted, uint32_t *maxima,
                uint32_t *counter, Best *best) {
  __shared__ uint32_t keys[MAX_CHUNKS];
  __shared__ uint32_t thread_best[BEST_THREADS];
  __shared__ uint32_t bound, top;
  __shared__ int top_chunk, id, count, is_last;
  launch_next_kernel();
  wait_for_previous_kernels();
  const int tid = (int)threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int chunks = (vocab + chunk - 1) / chunk, token = token_index();
  logits += (int64_t)token * vocab, maxima += (int64_t)token * chunks, counter += token, best += token;

  const int own = (int)blockIdx.x * BEST_WARPS + warp;
  if (own < chunks) {
    uint32_t largest = 0;
    for_logits(logits, own * chunk + lane, min(vocab, (own + 1) * chunk), 32,
               [&](int, float logit) { largest = max(largest, key_of(logit)); });
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) maxima[own] = largest;
  }
  __threadfence();
  __syncthreads();
  if (tid == 0) is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;

  uint32_t largest = 0;
  for (int c = tid; c < chunks; c += BEST_THREADS) {
    keys[c] = __ldcg(maxima + c);
    largest = max(largest, keys[c]);
  }
  thread_best[tid] = largest;
  if (tid == 0) bound = 0, top = 0, top_chunk = chunks, id = vocab, count = 0;
  __syncthreads();
  int rank = 0; /* no two threads have the same */
#pragma unroll 8
  for (int other = 0; other < BEST_THREADS; other++)
    rank += thread_best[other] > largest || (thread_best[other] == largest && other < tid);
  if (rank == 0) top = largest;
  if (rank == wanted - 1) bound = largest;
  __syncthreads();
  for (int c = tid; c < chunks; c += BEST_THREADS)
    if (keys[c] == top) atomicMin(&top_chunk, c);
  __syncthreads();

  for_logits(logits, top_chunk * chunk + tid, min(vocab, (top_chunk + 1) * chunk), BEST_THREADS,
             [&](int i, float logit) {
               if (key_of(logit) == top) atomicMin(&id, i);
             });
  for (int c = warp; c < chunks && wanted > 0; c += BEST_WARPS) {
    if (keys[c] < bound) continue;
    for_logits(logits, c * chunk + lane, min(vocab, (c + 1) * chunk), 32, [&](int i, float logit) {
      if (key_of(logit) < bound) return;
      const int at = atomicAdd(&count, 1);
      if (at >= MAX_CANDIDATES) return;
      best->ids[at] = i;
      best->logits[at] = logit;
    });
  }
  __syncthreads();
  if (tid == 0) {
    best->count = count;
    best->id = id;
    best->logit = logits[id];
    *counter = 0;
  }
}

EXPORT(sample_best)
