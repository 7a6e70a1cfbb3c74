/*
prefill_attention_fast on Hopper's warpgroup products, for head_dim 256. Same arguments and meaning; same
rounding: queries one f16, probabilities rounded to f16, int8 caches turned into f16.

prefill_attention_sm90: f16 caches.  prefill_attention_sm90_int8: int8 caches.
  launch: grid (ceil(T G / 128), Hkv), block 384 (f16) or 512 (int8),
          dynamic shared memory 197,632 (f16) or 232,448 bytes (int8)

A block has 128 rows, (token, head) pairs of a KV head, and goes through the keys 64 at a time. Two
warpgroups multiply, 64 rows each, their outputs in registers; a third copies K and V tiles into two
stages each (int8: a third K, a fourth V, and both turn them into f16). The score product of a tile runs beside the output product of the tile before it, and one
warpgroup's softmax beside the other's products.

mma.sync reads each operand from shared memory once per 16 rows, which takes as long as the products;
wgmma reads K and V once per 64 rows, and P from registers.
*/
#include "wgmma.cuh"

#include "attention.cuh"

constexpr int HD = 256;
constexpr int PANELS = HD / 64;
constexpr int ROWS = 128; /* of a block */
constexpr int KEYS = 64;  /* of a tile */
constexpr int STAGES = 2; /* of K, and of V */
constexpr int GROUP = 128; /* threads of a warpgroup */
constexpr int THREADS = 3 * GROUP;
constexpr int THREADS_INT8 = 4 * GROUP; /* another copying one */

constexpr int Q_PANEL = ROWS * PANEL_ROW, TILE_PANEL = KEYS * PANEL_ROW; /* bytes */
constexpr int TILE = PANELS * TILE_PANEL;
/* An int8 tile as it lies in the cache, and its scales. */
constexpr int RAW_TILE = KEYS * HD, RAW_SCALES = KEYS * (HD / SCALE_BLOCK) * 2;

/* Shared memory; the int8 kernel needs all that there is. */
constexpr int Q_AT = 0;
constexpr int K_AT = Q_AT + PANELS * Q_PANEL;
constexpr int V_AT = K_AT + STAGES * TILE;
constexpr int BARRIERS_AT = V_AT + STAGES * TILE;
constexpr int RAW_AT = BARRIERS_AT + 1024;
static_assert(RAW_AT == 197632, "geometry.rs says so");
static_assert(RAW_AT + 2 * (RAW_TILE + RAW_SCALES) <= 232448, "a block has no more");

/* Probabilities are at most 2^14 before they are rounded to f16: keeps small ones from f16's subnormal
   numbers. */
constexpr float P_SCALE_LOG2 = 14.0f;

struct Barriers {
  uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

/* The block's part of the problem. */
struct Work {
  int first_row, num_rows, per_kv_head, first_head, kv_head, num_keys, unmasked;

  __device__ Work(int tokens, int start_position, int num_heads, int num_kv_heads) {
    per_kv_head = num_heads / num_kv_heads;
    kv_head = blockIdx.y;
    first_head = kv_head * per_kv_head;
    num_rows = tokens * per_kv_head;
    first_row = (int)(gridDim.x - 1 - blockIdx.x) * ROWS; /* most keys first */
    const int last_token = min(first_row + ROWS - 1, num_rows - 1) / per_kv_head;
    num_keys = start_position + last_token + 1;
    unmasked = start_position + first_row / per_kv_head + 1; /* keys that every row sees */
  }
  __device__ int tiles() const { return (num_keys + KEYS - 1) / KEYS; }
  /* Row of [T, H] that a row of the block is. */
  __device__ int64_t head(int row, int num_heads) const {
    return (int64_t)(row / per_kv_head) * num_heads + first_head + row % per_kv_head;
  }
};

/* ---- the copying warpgroup ---- */

/* The order in which tiles are needed: K0, K1, V0, K2, V1 .. V(n-1). */
struct Item {
  bool is_v;
  int tile;
  __device__ Item(bool is_v, int tile) : is_v(is_v), tile(tile) {}
  /* Number i of the order. */
  static __device__ Item in_order(int i, int tiles) {
    const bool is_v = i > 0 && (i % 2 == 0 || i == 2 * tiles - 1);
    return {is_v, i == 0 ? 0 : is_v ? (i == 2 * tiles - 1 ? tiles - 1 : i / 2 - 1) : (i + 1) / 2};
  }
  __device__ int stage() const { return tile % STAGES; }
  __device__ uint32_t phase() const { return tile / STAGES & 1; }
};

__device__ __forceinline__ void wait_until_free(Barriers *barriers, const Item &item) {
  barrier_wait(&(item.is_v ? barriers->v_empty : barriers->k_empty)[item.stage()], item.phase() ^ 1);
}
__device__ __forceinline__ void announce(Barriers *barriers, const Item &item) {
  fence_for_wgmma();
  barrier_arrive(&(item.is_v ? barriers->v_full : barriers->k_full)[item.stage()]);
}
__device__ __forceinline__ uint8_t *tile_of(uint8_t *smem, const Item &item) {
  return smem + (item.is_v ? V_AT : K_AT) + item.stage() * TILE;
}

__device__ __forceinline__ void produce(uint8_t *smem, Barriers *barriers, const KvCache &cache,
                                        const Work &work) {
  const int tid = threadIdx.x % GROUP, chunk = tid % 32, first = tid / 32, tiles = work.tiles();
  const int64_t at = (int64_t)work.kv_head * cache.capacity * HD + first * HD + chunk * 8;
  const int to = chunk / 8 * TILE_PANEL;
  for (int i = 0; i < 2 * tiles; i++) {
    const Item item = Item::in_order(i, tiles);
    wait_until_free(barriers, item);
    const uint16_t *from = (const uint16_t *)(item.is_v ? cache.v : cache.k) + at;
    const int key = item.tile * KEYS + first;
    from += (int64_t)item.tile * KEYS * HD;
    uint8_t *tile = tile_of(smem, item) + to;
#pragma unroll
    for (int n = 0; n < KEYS / 4; n++) {
      const bool valid = key + 4 * n < work.num_keys;
      cp_async16(tile + panel_chunk(first + 4 * n, chunk % 8), valid ? from + n * 4 * HD : from, valid);
    }
    cp_async_commit();
    if (i == 0) continue;
    cp_async_wait<1>();
    announce(barriers, Item::in_order(i - 1, tiles));
  }
  cp_async_wait<0>();
  announce(barriers, Item::in_order(2 * tiles - 1, tiles));
}

/* Two warpgroups, one for K and one for V: a tile arrives as int8 and is turned into f16 here. */
__device__ __forceinline__ void produce_int8(uint8_t *smem, Barriers *barriers, const KvCache &cache,
                                             const Work &work, bool is_v) {
  constexpr int CHUNKS = HD / 16, STEP = GROUP / CHUNKS; /* of a row; keys of a pass */
  const int tid = threadIdx.x % GROUP, chunk = tid % CHUNKS, first = tid / CHUNKS;
  const int tiles = work.tiles(), sync = 3 + is_v;
  const int64_t first_row = (int64_t)work.kv_head * cache.capacity;
  const uint8_t *rows = (const uint8_t *)(is_v ? cache.v : cache.k) + first_row * HD + first * HD + chunk * 16;
  const uint16_t *row_scales = (is_v ? cache.v_scales : cache.k_scales) + first_row * (HD / SCALE_BLOCK);
  uint8_t *raw = smem + RAW_AT + is_v * (RAW_TILE + RAW_SCALES), *raw_scales = raw + RAW_TILE;

  auto ask = [&](int tile) {
    const int left = work.num_keys - tile * KEYS;
    const uint8_t *from = rows + (int64_t)tile * KEYS * HD;
    uint8_t *to = raw + first * HD + chunk * 16;
#pragma unroll
    for (int n = 0; n < KEYS / STEP; n++) {
      const bool valid = first + n * STEP < left;
      cp_async16(to + n * STEP * HD, valid ? from + n * STEP * HD : rows, valid);
    }
    if (tid < KEYS) {
      const uint16_t *scales = row_scales + (int64_t)tile * KEYS * (HD / SCALE_BLOCK);
      cp_async16(raw_scales + tid * 16, tid < left ? scales + tid * 8 : row_scales, tid < left);
    }
    cp_async_commit();
  };

  ask(0);
  for (int j = 0; j < tiles; j++) {
    const Item item(is_v, j);
    wait_until_free(barriers, item);
    cp_async_wait<0>();
    group_sync<GROUP>(sync); /* everybody's part of the int8 tile is there */
    uint8_t *tile = tile_of(smem, item) + chunk / 4 * TILE_PANEL;
    const uint8_t *from = raw + chunk * 16;
    const uint16_t *scales = (const uint16_t *)raw_scales + chunk / 2;
#pragma unroll 2
    for (int n = 0; n < KEYS / STEP; n++) {
      const int key = first + n * STEP;
      const uint4 values = *(const uint4 *)(from + key * HD);
      const uint32_t scale = scales[key * (HD / SCALE_BLOCK)] * 0x10001u;
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
      uint32_t y[8];
#pragma unroll
      for (int w = 0; w < 4; w++) {
        y[2 * w] = mul_f16x2(int8_pair_to_f16<0>(words[w]), scale);
        y[2 * w + 1] = mul_f16x2(int8_pair_to_f16<1>(words[w]), scale);
      }
      const int at = chunk % 4 * 2;
      *(uint4 *)(tile + panel_chunk(key, at)) = make_uint4(y[0], y[1], y[2], y[3]);
      *(uint4 *)(tile + panel_chunk(key, at + 1)) = make_uint4(y[4], y[5], y[6], y[7]);
    }
    announce(barriers, item);
    group_sync<GROUP>(sync); /* nobody reads this int8 tile any more */
    if (j + 1 < tiles) ask(j + 1);
  }
}

/* ---- the multiplying warpgroups ---- */

/* The online softmax of a lane's rows g and g + 8 of its warp's 16. */
struct Softmax {
  float scale[2], largest[2], total[2];
  int last_key[2];

  /* Scores [8-key tile][row, row, row + 8, row + 8] of keys first_key .. become probabilities times
     2^14; `correction` is what outputs so far have to be multiplied by. */
  __device__ __forceinline__ void step(float (&s)[KEYS / 2], int first_key, bool masked,
                                       float (&correction)[2]) {
    const int t = threadIdx.x % 4;
    if (masked) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        if (first_key + i / 4 * 8 + 2 * t + i % 2 > last_key[i / 2 % 2]) s[i] = -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = s[2 * r];
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        if (i / 2 % 2 == r) top = fmaxf(top, s[i]);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(largest[r], top * scale[r]);
      correction[r] = exp2_approx(largest[r] - top);
      largest[r] = top;
      total[r] *= correction[r];
      const float shift = P_SCALE_LOG2 - top;
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        if (i / 2 % 2 == r) s[i] = exp2_approx(fmaf(s[i], scale[r], shift));
      /* Products round their sums towards zero, once per 16 keys. Rounding the total likewise takes as
         much from both sides of the division. */
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) {
        const float *p = s + 8 * k + 2 * r;
        total[r] = __fadd_rz(total[r], (p[0] + p[1]) + (p[4] + p[5]));
      }
    }
  }
};

/* Accumulators of two tiles of 8 keys are the A operand of 16 keys. */
__device__ __forceinline__ void pack(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; i++)
    p[i / 4][i % 4] = round_f16x2(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void load_queries(uint8_t *to, const uint16_t *queries, const Work &work,
                                             int num_heads, int first) {
  const int tid = threadIdx.x % GROUP;
#pragma unroll 4
  for (int i = 0; i < 64 * 32 / GROUP; i++) {
    const int at = tid + i * GROUP, row = first + at / 32, chunk = at % 32;
    const bool valid = work.first_row + row < work.num_rows;
    const int64_t head = work.head(valid ? work.first_row + row : 0, num_heads);
    cp_async16(to + chunk / 8 * Q_PANEL + panel_chunk(row, chunk % 8), queries + head * HD + chunk * 8,
               valid);
  }
  cp_async_commit();
}

/* q, k, v: descriptors. */
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int j = 0; j < HD / 16; j++)
    wgmma_m64n64(s, descriptor_at(q, j / 4 * Q_PANEL + j % 4 * 32),
                 descriptor_at(k, j / 4 * TILE_PANEL + j % 4 * 32), j > 0);
}
/* NARROW: half of head_dim at a time, because with 512 threads ptxas takes no product that needs more than
   128 registers. */
template <bool NARROW>
__device__ __forceinline__ void multiply_values(float (&o)[HD / 2], const uint32_t (&p)[KEYS / 16][4],
                                                uint64_t v) {
#pragma unroll
  for (int j = 0; j < KEYS / 16; j++) {
    const uint64_t rows = descriptor_at(v, j * 16 * PANEL_ROW);
    if (NARROW) {
      wgmma_m64n128_v(*(float(*)[HD / 4])o, p[j], rows, 1);
      wgmma_m64n128_v(*(float(*)[HD / 4])(o + HD / 4), p[j], descriptor_at(rows, 2 * TILE_PANEL), 1);
    } else {
      wgmma_m64n256_v(o, p[j], rows, 1);
    }
  }
}

/* A warp has finished its part of a tile. */
__device__ __forceinline__ void release(uint64_t *barrier) {
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <bool NARROW>
__device__ __forceinline__ void consume(uint8_t *smem, Barriers *barriers, const uint16_t *queries,
                                        const float *q_scales, const float *q, int start_position,
                                        int num_heads, const Work &work, int group, float *out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32, g = lane / 4, t = lane % 4;
  const int tiles = work.tiles();
  load_queries(smem + Q_AT, queries, work, num_heads, group * 64);
  const int row = work.first_row + group * 64 + warp * 16 + g;
  Softmax softmax;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int at = min(row + 8 * r, work.num_rows - 1);
    softmax.scale[r] = q_scales[work.head(at, num_heads)];
    softmax.last_key[r] = start_position + at / work.per_kv_head;
    softmax.largest[r] = -INFINITY;
    softmax.total[r] = 0.0f;
  }
  cp_async_wait<0>();
  fence_for_wgmma();
  group_sync<GROUP>(1 + group);

  const uint32_t base = shared_address(smem);
  const uint64_t q_at = panel_descriptor(base + Q_AT + group * 64 * PANEL_ROW, 16);
  const uint64_t k_at = panel_descriptor(base + K_AT, 16), v_at = panel_descriptor(base + V_AT, TILE_PANEL);
  float o[HD / 2], s[KEYS / 2], correction[2];
  uint32_t p[KEYS / 16][4];
#pragma unroll
  for (int i = 0; i < HD / 2; i++) o[i] = 0.0f;

  barrier_wait(&barriers->k_full[0], 0);
  wgmma_fence();
  multiply_keys(s, q_at, k_at);
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
  release(&barriers->k_empty[0]);
  softmax.step(s, 0, KEYS > work.unmasked, correction);
  pack(p, s);

  for (int j = 1; j < tiles; j++) {
    const int stage = j % STAGES, before = (j - 1) % STAGES;
    barrier_wait(&barriers->k_full[stage], j / STAGES & 1);
    wgmma_fence();
    multiply_keys(s, q_at, descriptor_at(k_at, stage * TILE));
    wgmma_commit();
    barrier_wait(&barriers->v_full[before], (j - 1) / STAGES & 1);
    wgmma_fence();
    multiply_values<NARROW>(o, p, descriptor_at(v_at, before * TILE));
    wgmma_commit();
    wgmma_wait<1>();
    pin(s);
    release(&barriers->k_empty[stage]);
    softmax.step(s, j * KEYS, (j + 1) * KEYS > work.unmasked, correction);
    /* Maxima settle after the first keys. The totals, never negative, are part of the condition so that the
       whole softmax comes before the wait: ptxas would move it behind, where nothing runs beside it. */
    const bool rescale = __any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f ||
                                                     softmax.total[0] + softmax.total[1] < 0.0f);
    if (rescale) {
      wgmma_wait<0>();
      pin(o);
#pragma unroll
      for (int i = 0; i < HD / 2; i++) o[i] *= correction[i / 2 % 2];
    } else {
      wgmma_wait<0>();
    }
    pin(o);
    release(&barriers->v_empty[before]);
    pack(p, s);
  }
  barrier_wait(&barriers->v_full[(tiles - 1) % STAGES], (tiles - 1) / STAGES & 1);
  wgmma_fence();
  multiply_values<NARROW>(o, p, descriptor_at(v_at, (tiles - 1) % STAGES * TILE));
  wgmma_commit();
  wgmma_wait<0>();
  pin(o);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = softmax.total[r];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float scale = 1.0f / total;
    if (row + 8 * r >= work.num_rows) continue;
    const int64_t head = work.head(row + 8 * r, num_heads);
    const float *gate = q + head * 2 * HD + HD;
#pragma unroll
    for (int i = 0; i < HD / 8; i++) {
      const int d = 8 * i + 2 * t;
      const float2 z = *(const float2 *)(gate + d);
      *(float2 *)(out + head * HD + d) =
          make_float2(__fdividef(o[4 * i + 2 * r] * scale, 1.0f + expf(-z.x)),
                      __fdividef(o[4 * i + 2 * r + 1] * scale, 1.0f + expf(-z.y)));
    }
  }
}

/* ---- the kernels ---- */

template <bool INT8>
__device__ __forceinline__ void attend(uint8_t *smem, const uint16_t *queries, const float *q_scales,
                                       const float *q, const KvCache &cache, int start_position,
                                       int tokens, int num_heads, int num_kv_heads, float *out) {
  Barriers *barriers = (Barriers *)(smem + BARRIERS_AT);
  launch_next_kernel();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&barriers->k_full[i], GROUP);
      barrier_init(&barriers->v_full[i], GROUP);
      barrier_init(&barriers->k_empty[i], 8); /* warps of both multiplying groups */
      barrier_init(&barriers->v_empty[i], 8);
    }
  }
  __syncthreads();
  wait_for_previous_kernels();
  const Work work(tokens, start_position, num_heads, num_kv_heads);
  if (work.first_row >= work.num_rows) return;
  const int group = uniform(threadIdx.x / GROUP);
  constexpr int COPYING = INT8 ? 2 : 1;
  if (group < COPYING) {
    give_registers<INT8 ? 48 : 40>();
    if (INT8) produce_int8(smem, barriers, cache, work, group == 1);
    else produce(smem, barriers, cache, work);
  } else {
    take_registers<INT8 ? 208 : 232>();
    consume<INT8>(smem, barriers, queries, q_scales, q, start_position, num_heads, work, group - COPYING, out);
  }
}

KERNEL __launch_bounds__(THREADS, 1)
    prefill_attention_sm90(const uint16_t *q_high, const uint16_t *, const float *q_scales,
                           const float *q, KvCache cache, int start_position, int tokens,
                           int num_heads, int num_kv_heads, int, float *out) {
  extern __shared__ __align__(1024) uint8_t smem[];
  attend<false>(smem, q_high, q_scales, q, cache, start_position, tokens, num_heads, num_kv_heads, out);
}

KERNEL __launch_bounds__(THREADS_INT8, 1)
    prefill_attention_sm90_int8(const uint16_t *q_high, const uint16_t *, const float *q_scales,
                                const float *q, KvCache cache, int start_position, int tokens,
                                int num_heads, int num_kv_heads, int, float *out) {
  extern __shared__ __align__(1024) uint8_t smem[];
  attend<true>(smem, q_high, q_scales, q, cache, start_position, tokens, num_heads, num_kv_heads, out);
}
