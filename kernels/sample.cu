/*
sample_best: the best logits of a token, so that a step need not bring all of them to the host.
  logits   [V] f32
  maxima   [chunks] of scratch, chunks = ceil(V / chunk) <= 1024; chunk is a multiple of 32
  counter  0 before the first launch, and again after each
  best     the best token, the lowest id among equals, or the first logit that is NaN or +inf; and a
           set of candidates with every token that is at least as good as the wanted-th best
launch: grid (ceil(chunks / 8)), block 256, no dynamic shared memory.

A warp takes the maximum of a chunk. The last block to finish has the maxima: the wanted-th of them is a
lower bound of the wanted-th logit of all, and few others reach it, so only chunks that do are read
again. With fewer chunks than wanted everything is a candidate. Candidates come in any order, but always
the same ones; where they don't fit, `count` says how many there are and the host takes all logits.
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

KERNEL __launch_bounds__(BEST_THREADS)
    sample_best(const float *logits, int vocab, int chunk, int wanted, uint32_t *maxima,
                uint32_t *counter, Best *best) {
  __shared__ uint32_t keys[MAX_CHUNKS];
  __shared__ uint32_t bound;
  __shared__ int first_chunk, id, count, is_last;
  launch_next_kernel();
  wait_for_previous_kernels();
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  const int chunks = (vocab + chunk - 1) / chunk;

  const int own = (int)blockIdx.x * BEST_WARPS + warp;
  if (own < chunks) {
    const int end = min(vocab, (own + 1) * chunk);
    uint32_t largest = 0;
    for (int i = own * chunk + lane; i < end; i += 32) largest = max(largest, key_of(logits[i]));
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) maxima[own] = largest;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;

  for (int c = (int)threadIdx.x; c < chunks; c += BEST_THREADS) keys[c] = __ldcg(maxima + c);
  if (threadIdx.x == 0) bound = 0, id = vocab, count = 0;
  __syncthreads();
  for (int c = (int)threadIdx.x; c < chunks; c += BEST_THREADS) {
    const uint32_t key = keys[c];
    int rank = 0; /* no two chunks have the same */
    for (int other = 0; other < chunks; other++)
      rank += keys[other] > key || (keys[other] == key && other < c);
    if (rank == 0) first_chunk = c;
    if (rank == wanted - 1) bound = key;
  }
  __syncthreads();

  const uint32_t top = keys[first_chunk];
  const int end = min(vocab, (first_chunk + 1) * chunk);
  for (int i = first_chunk * chunk + (int)threadIdx.x; i < end; i += BEST_THREADS)
    if (key_of(logits[i]) == top) atomicMin(&id, i);
  for (int c = warp; c < chunks; c += BEST_WARPS) {
    if (wanted == 0 || keys[c] < bound) continue;
    const int last = min(vocab, (c + 1) * chunk);
    for (int i = c * chunk + lane; i < last; i += 32) {
      const float logit = logits[i];
      if (key_of(logit) < bound) continue;
      const int at = atomicAdd(&count, 1);
      if (at >= MAX_CANDIDATES) continue;
      best->ids[at] = i;
      best->logits[at] = logit;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    best->count = count;
    best->id = id;
    best->logit = logits[id];
    *counter = 0;
  }
}

EXPORT(sample_best)
