/*
decode_attention: attention of one token over the whole context, one pass over K and V.
  q     [H, 2 hd] f32: per head its query, then its gate
  k, v  [Hkv, hd] f32 of this token: appended to the cache at step->position
  out   [H, hd] f32, times sigmoid(gate)
G = H / Hkv query heads share a KV head; a block serves 8 of them, so with G > 8 K and V are read
ceil(G / 8) times (the second time mostly from L2).
launch: grid (splits, Hkv * ceil(G / 8)), block 128,
        dynamic shared memory: f16  192 * hd * 2 + 4 * hd + 336     (99,664 bytes at hd = 256)
                               int8 320 * hd * 17 / 16 + 4 * hd + 336  (88,400)
        splits: what fills the GPU once, max(1, SMs / (Hkv * ceil(G / 8))), at most 1024.
        partial: Hkv * ceil(G / 8) * splits * min(G, 8) * (hd + 2) floats.
        counters: 64 per grid row (Hkv * ceil(G / 8)), zero before the first launch.
hd 32, 64, 128 or 256; rotary_dim <= hd.

The context is cut into tiles of 16 keys, dealt to blocks in contiguous runs and to the four warps of a
block in turn; a warp works alone until the end. Its K and V tiles come through a ring of stages in shared
memory of its own (cp.async), two or more under way.
  S = Q K^T: the A operand has the queries' high halves as rows 0-7 and their low halves as rows
     8-15, so one MMA per 16 dims and 8 keys computes both. Dims are permuted alike in Q and K: lane t of
     four takes 8 neighbours.
  O^T += V^T P: P's values, scaled up into f16's range, are split into two f16 and cost two MMAs. S comes out
     of the accumulators exactly as P goes into the B operand.
int8: K's and V's integers are exact in f16; scales of K multiply partial sums of 32 dims in f32, those
of V are put on P before it is split.
Blocks that got no keys exit. The last block of a KV head to finish merges; from 17 blocks on
in two levels, groups of about the square root first, because one SM takes 10 us to read 66 results.
*/
#include "common.cuh"

#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int TILE_KEYS = 16;
constexpr int HEADS = 8; /* query heads of a block */
constexpr int MAX_GROUP = 32; /* results that a merge reads: one lane each */
constexpr int ONE_LEVEL = 16; /* up to so many results one block merges alone */
constexpr int COUNTERS = 64;  /* per KV head: the last level's, then one per group */
/* Probabilities are at most this before they are split into f16; it keeps what is 2^-25 of the largest
   exact. With int8, scales up to 512 (of values that f16 could not hold either) come on top. */
constexpr float P_SCALE_F16 = 16384.0f;
constexpr float P_SCALE_INT8 = 64.0f;

template <int HD, bool INT8>
struct Shape {
  static constexpr int ROW = INT8 ? HD : 2 * HD; /* bytes of a key */
  static constexpr int CHUNKS = ROW / 16;
  static constexpr int BLOCKS = HD / SCALE_BLOCK;
  static constexpr int SCALES = INT8 ? TILE_KEYS * BLOCKS * 2 : 0; /* bytes of a tile's */
  static constexpr int STAGE = TILE_KEYS * ROW + SCALES;
  static constexpr int STAGES = INT8 ? 5 : 3;
  static constexpr int AHEAD = STAGES - 1;
  /* Stages that hold queries in the beginning instead of tiles. */
  static constexpr int BORROWED = INT8 ? 2 : 1;
  static constexpr int RING = STAGES * WARPS * STAGE;

  /* Bank conflicts are avoided by moving 16-byte chunks within a row, by these bits of the key. */
  static __device__ __forceinline__ int k_chunk(int key, int chunk) {
    return chunk ^ ((INT8 ? (key & 3) << 1 : (key & 1) << 2) & (CHUNKS - 1));
  }
  static __device__ __forceinline__ int v_chunk(int key, int chunk) {
    return chunk ^ ((INT8 ? key & 6 : key & 7) & (CHUNKS - 1));
  }
};

/* After the ring of stages in shared memory. */
template <int HD>
struct Rest {
  uint8_t new_k[2 * HD]; /* this token's rows as the cache has them */
  uint8_t new_v[2 * HD];
  uint16_t new_k_scales[8];
  uint16_t new_v_scales[8];
  float largest[WARPS][HEADS];
  float total[WARPS][HEADS];
  float unscale[HEADS]; /* from Q K^T to log2 of the weight */
  int is_last;
  int padding[3];
};

/* In the borrowed stages. */
template <int HD>
struct Queries {
  float rows[HEADS + 2][HD]; /* after the norm; then k and v */
  float rotated[HD];         /* k */
  float cosines[HD / 2];
  float sines[HD / 2];
  uint16_t high[HEADS][HD];
  uint16_t low[HEADS][HD];
};

/* What a block works on. */
struct Place {
  int kv_head;
  int first_head; /* query head */
  int heads;      /* 1..8 */
  int stored_heads; /* heads per row of `partial` */
  int position;
  int split;
  int active; /* splits with keys */
};

template <int HD, bool INT8>
struct Attention {
  using S = Shape<HD, INT8>;
  static constexpr int MERGE_STRIDE = HD + 4; /* keeps four heads in different banks */
  static_assert(sizeof(Queries<HD>) <= S::BORROWED * WARPS * S::STAGE, "fits in borrowed stages");
  static_assert(WARPS * HEADS * MERGE_STRIDE * 4 <= S::RING, "warps' results fit in the ring");
  static_assert(S::RING + sizeof(Rest<HD>) <= 99 * 1024, "what consumer GPUs have");

  /* ---- tiles ---- */

  /* Asks for a warp's item: even ones are K tiles, odd ones V tiles. */
  static __device__ __forceinline__ void ask(uint8_t *ring, const KvCache &cache, int kv_head,
                                             int position, int first_tile, int item) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    bool is_v = item & 1;
    int first_key = (first_tile + warp + item / 2 * WARPS) * TILE_KEYS;
    uint8_t *stage = ring + (item % S::STAGES * WARPS + warp) * S::STAGE;
    const uint8_t *rows = (const uint8_t *)(is_v ? cache.v : cache.k) +
                          ((int64_t)kv_head * cache.capacity + first_key) * S::ROW;
    /* The token's own row is put in later, from where this block made it. */
#pragma unroll
    for (int i = 0; i < TILE_KEYS * S::CHUNKS / 32; i++) {
      int key = (lane + 32 * i) / S::CHUNKS, chunk = (lane + 32 * i) % S::CHUNKS;
      int to = is_v ? S::v_chunk(key, chunk) : S::k_chunk(key, chunk);
      cp_async16(stage + key * S::ROW + to * 16, rows + (lane + 32 * i) * 16,
                 first_key + key < position);
    }
    if (INT8 && lane < S::SCALES / 16) {
      const uint16_t *scales = (is_v ? cache.v_scales : cache.k_scales) +
                               ((int64_t)kv_head * cache.capacity + first_key) * S::BLOCKS;
      cp_async16(stage + TILE_KEYS * S::ROW + lane * 16, scales + lane * 8, true);
    }
  }

  /* Puts the token's own row into the tile that ends the context. Later keys have weight 0, which a
     leftover NaN scale would not stand. */
  static __device__ __forceinline__ void put_own_row(uint8_t *stage, const Rest<HD> &rest,
                                                     bool is_v, int own) {
    int lane = threadIdx.x & 31;
    const uint8_t *row = is_v ? rest.new_v : rest.new_k;
    if (lane < S::CHUNKS) {
      int to = is_v ? S::v_chunk(own, lane) : S::k_chunk(own, lane);
      *(uint4 *)(stage + own * S::ROW + to * 16) = *(const uint4 *)(row + lane * 16);
    }
    if (INT8) {
      const uint16_t *from = is_v ? rest.new_v_scales : rest.new_k_scales;
      uint16_t *scales = (uint16_t *)(stage + TILE_KEYS * S::ROW);
      for (int i = lane; i < TILE_KEYS * S::BLOCKS; i += 32) {
        int key = i / S::BLOCKS;
        if (key >= own) scales[i] = key == own ? from[i % S::BLOCKS] : 0;
      }
    }
    __syncwarp();
  }

  /* ---- the queries, and the token's own key and value ---- */

  static __device__ __forceinline__ void prepare(Queries<HD> &queries, Rest<HD> &rest,
                                                 const Place &place, bool owns, const float *q,
                                                 const float *k, const float *v,
                                                 const float *q_norm, const float *k_norm,
                                                 float eps, const float *inverse_frequencies,
                                                 int rotary_dim, const KvCache &cache,
                                                 bool writes_cache) {
    constexpr int VALUES = HD / 32, ROWS_PER_WARP = (HEADS + 2 + WARPS - 1) / WARPS;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, half = rotary_dim / 2;

    /* Row i: query of head i, then k, then v. All loads first. */
    float x[ROWS_PER_WARP][VALUES];
#pragma unroll
    for (int n = 0; n < ROWS_PER_WARP; n++) {
      int i = warp + n * WARPS;
      const float *from = nullptr;
      if (i < place.heads) from = q + (int64_t)(place.first_head + i) * 2 * HD;
      if (i == HEADS && owns) from = k + place.kv_head * HD;
      if (i == HEADS + 1 && owns) from = v + place.kv_head * HD;
#pragma unroll
      for (int j = 0; j < VALUES; j++) x[n][j] = from ? from[lane + 32 * j] : 0.0f;
    }
    for (int j = threadIdx.x; j < half; j += 32 * WARPS)
      sincosf((float)place.position * inverse_frequencies[j], &queries.sines[j],
              &queries.cosines[j]);
#pragma unroll
    for (int n = 0; n < ROWS_PER_WARP; n++) {
      int i = warp + n * WARPS;
      if (i >= HEADS + 2) break;
      float square = 0.0f;
#pragma unroll
      for (int j = 0; j < VALUES; j++) square += x[n][j] * x[n][j];
      float scale = rsqrtf(warp_sum(square) / HD + eps);
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        int d = lane + 32 * j;
        float weight = i < HEADS ? q_norm[d] : k_norm[d];
        queries.rows[i][d] = i == HEADS + 1 ? x[n][j] : x[n][j] * scale * weight;
      }
    }
    __syncthreads();

#pragma unroll
    for (int n = 0; n < ROWS_PER_WARP; n++) {
      int i = warp + n * WARPS;
      if (i >= HEADS + 2 || (i >= HEADS && !owns)) break;
      const float *row = queries.rows[i];
      if (i == HEADS + 1) {
        if (writes_cache) store_row_in_cache(row, cache.v, cache.v_scales, cache, place);
        store_row<HD, INT8>(row, rest.new_v, rest.new_v_scales);
        break;
      }
      float y[VALUES], largest = 0.0f;
      bool broken = false;
#pragma unroll
      for (int j = 0; j < VALUES; j++) {
        int d = lane + 32 * j;
        y[j] = row[d];
        if (d < half)
          y[j] = y[j] * queries.cosines[d] - row[d + half] * queries.sines[d];
        else if (d < rotary_dim)
          y[j] = y[j] * queries.cosines[d - half] + row[d - half] * queries.sines[d - half];
        largest = fmaxf(largest, fabsf(y[j]));
        broken |= !(fabsf(y[j]) < INFINITY);
      }
      if (i == HEADS) {
#pragma unroll
        for (int j = 0; j < VALUES; j++) queries.rotated[lane + 32 * j] = y[j];
        __syncwarp();
        if (writes_cache) store_row_in_cache(queries.rotated, cache.k, cache.k_scales, cache, place);
        store_row<HD, INT8>(queries.rotated, rest.new_k, rest.new_k_scales);
        break;
      }
      float up = power_of_two_to_f16(warp_max(largest));
#pragma unroll
      for (int j = 0; j < VALUES; j++)
        split_f16(y[j] * up, queries.high[i][lane + 32 * j], queries.low[i][lane + 32 * j]);
      broken = __any_sync(0xffffffffu, broken);
      if (lane == 0) rest.unscale[i] = broken ? NAN : LOG2_E * rsqrtf((float)HD) / up;
    }
    __syncthreads();
  }

  static __device__ __forceinline__ void store_row_in_cache(const float *x, void *rows,
                                                            uint16_t *scales,
                                                            const KvCache &cache,
                                                            const Place &place) {
    int64_t at = (int64_t)place.kv_head * cache.capacity + place.position;
    store_row<HD, INT8>(x, (uint8_t *)rows + at * S::ROW, scales + at * S::BLOCKS);
  }

  /* ---- products ---- */

  /* Lane 4g + t gets head g's products with keys 8n + 2t and 8n + 2t + 1. */
  static __device__ __forceinline__ void products_with_keys(float (&s)[2][2], const uint8_t *stage,
                                                            const uint32_t (&q)[HD / 16][4]) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    if (!INT8) {
      float sums[2][2][4] = {}; /* four chains of MMAs */
#pragma unroll
      for (int j = 0; j < HD / 32; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          int key = 8 * n + g;
          uint4 x = *(const uint4 *)(stage + key * S::ROW + S::k_chunk(key, 4 * j + t) * 16);
          mma_f16(sums[n][0], q[2 * j], x.x, x.y);
          mma_f16(sums[n][1], q[2 * j + 1], x.z, x.w);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[n][e] = (sums[n][0][e] + sums[n][1][e]) + (sums[n][0][2 + e] + sums[n][1][2 + e]);
      return;
    }
    const uint16_t *scales = (const uint16_t *)(stage + TILE_KEYS * S::ROW);
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0.0f;
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int key = 8 * n + g;
        uint2 x = *(const uint2 *)(stage + key * S::ROW + S::k_chunk(key, 2 * b + t / 2) * 16 +
                                   t % 2 * 8);
        float sums[4] = {};
        mma_f16(sums, q[2 * b], int8_pair_to_f16<0>(x.x), int8_pair_to_f16<1>(x.x));
        mma_f16(sums, q[2 * b + 1], int8_pair_to_f16<0>(x.y), int8_pair_to_f16<1>(x.y));
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[n][e] +=
              f16_to_f32(scales[(8 * n + 2 * t + e) * S::BLOCKS + b]) * (sums[e] + sums[2 + e]);
      }
    }
  }

  /* p as two pairs of f16, the B operand of keys 2t, 2t + 1 and 2t + 8, 2t + 9. */
  static __device__ __forceinline__ void split_pairs(const float (&p)[2][2], uint32_t (&high)[2],
                                                     uint32_t (&low)[2]) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      uint16_t h[2], l[2];
      split_f16(p[n][0], h[0], l[0]);
      split_f16(p[n][1], h[1], l[1]);
      high[n] = (uint32_t)h[0] | (uint32_t)h[1] << 16;
      low[n] = (uint32_t)l[0] | (uint32_t)l[1] << 16;
    }
  }

  /* o[i] += V^T P of 16 dims: rows g and g + 8 of tile i are dims dim_of(i, 0), dim_of(i, 1). */
  static __device__ __forceinline__ int dim_of(int tile, int upper) {
    int g = (threadIdx.x & 31) / 4;
    return INT8 ? tile / 2 * 32 + 4 * g + tile % 2 * 2 + upper : 16 * tile + g + 8 * upper;
  }
  static __device__ __forceinline__ void add_values(float (&o)[HD / 16][4], const uint8_t *stage,
                                                    const float (&p)[2][2]) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    uint32_t high[2], low[2];
    if (!INT8) {
      split_pairs(p, high, low);
      int key = lane % 8 + lane / 16 * 8, upper = lane / 8 % 2;
#pragma unroll
      for (int i = 0; i < HD / 16; i += 2) {
        uint32_t a[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++)
          ldmatrix_x4_trans(
              a[n], stage + key * S::ROW + S::v_chunk(key, 2 * (i + n) + upper) * 16);
        mma_f16(o[i], a[0], high[0], high[1]);
        mma_f16(o[i + 1], a[1], high[0], high[1]);
        mma_f16(o[i], a[0], low[0], low[1]);
        mma_f16(o[i + 1], a[1], low[0], low[1]);
      }
      return;
    }
    const uint16_t *scales = (const uint16_t *)(stage + TILE_KEYS * S::ROW);
#pragma unroll
    for (int b = 0; b < S::BLOCKS; b++) {
      float scaled[2][2];
      uint32_t x[2][2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int key = 8 * n + 2 * t + e;
          scaled[n][e] = p[n][e] * f16_to_f32(scales[key * S::BLOCKS + b]);
          x[n][e] = *(const uint32_t *)(stage + key * S::ROW +
                                        S::v_chunk(key, 2 * b + g / 4) * 16 + g % 4 * 4);
        }
      }
      split_pairs(scaled, high, low);
      /* Four dims of two keys to pairs of keys: bytes (dim 0, 1) and (dim 2, 3) of both. */
      uint32_t a[2][4];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        uint32_t first = __byte_perm(x[n][0], x[n][1], 0x5140);
        uint32_t second = __byte_perm(x[n][0], x[n][1], 0x7362);
        a[0][2 * n] = int8_pair_to_f16<0>(first);
        a[0][2 * n + 1] = int8_pair_to_f16<1>(first);
        a[1][2 * n] = int8_pair_to_f16<0>(second);
        a[1][2 * n + 1] = int8_pair_to_f16<1>(second);
      }
      mma_f16(o[2 * b], a[0], high[0], high[1]);
      mma_f16(o[2 * b + 1], a[1], high[0], high[1]);
      mma_f16(o[2 * b], a[0], low[0], low[1]);
      mma_f16(o[2 * b + 1], a[1], low[0], low[1]);
    }
  }

  /* ---- results of blocks ---- */

  /* Where a split's result of one KV head lies: [heads, HD] values, and per head the logarithm's maximum
     and the sum. */
  static __device__ __forceinline__ float *values_of(float *partial, const Place &place, int split) {
    return partial + ((int64_t)blockIdx.y * gridDim.x + split) * place.stored_heads * HD;
  }
  static __device__ __forceinline__ float *stats_of(float *partial, const Place &place, int split) {
    int64_t rows = (int64_t)gridDim.y * gridDim.x * place.stored_heads;
    return partial + rows * HD +
           ((int64_t)blockIdx.y * gridDim.x + split) * place.stored_heads * 2;
  }

  static __device__ __forceinline__ void write_out(const Place &place, int head, int d,
                                                   const float (&x)[4], float total, const float *q,
                                                   float *out) {
    const float *gate = q + (int64_t)(place.first_head + head) * 2 * HD + HD + d;
    float4 y = make_float4(x[0] / total * sigmoid(gate[0]), x[1] / total * sigmoid(gate[1]),
                           x[2] / total * sigmoid(gate[2]), x[3] / total * sigmoid(gate[3]));
    *(float4 *)(out + (int64_t)(place.first_head + head) * HD + d) = y;
  }

  /* One block merges `count` splits' results, first, first + stride, ..: into that of split `first`,
     or if `final` into the output. */
  static __device__ __forceinline__ void merge(float *factors, float *partial, const Place &place,
                                               int first, int stride, int count, bool final,
                                               const float *q, float *out) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    float *totals = factors + MAX_GROUP * HEADS; /* then maxima */
    for (int head = warp; head < place.heads; head += WARPS) {
      float largest = -INFINITY, total = 0.0f;
      if (lane < count) {
        const float *stats = stats_of(partial, place, first + lane * stride) + 2 * head;
        largest = __ldcg(stats);
        total = __ldcg(stats + 1);
      }
      float top = warp_max(largest);
      float factor = largest == -INFINITY ? 0.0f : exp2f(largest - top);
      total = warp_sum(total * factor);
      factors[lane * HEADS + head] = factor;
      if (lane == 0) totals[head] = total, totals[HEADS + head] = top;
    }
    __syncthreads();
    float *to = values_of(partial, place, first);
    for (int i = threadIdx.x; i < place.heads * HD / 4; i += 32 * WARPS) {
      int head = i / (HD / 4);
      float x[4] = {};
#pragma unroll 8
      for (int n = 0; n < count; n++) {
        float4 y = __ldcg((const float4 *)values_of(partial, place, first + n * stride) + i);
        float factor = factors[n * HEADS + head];
        x[0] += factor * y.x, x[1] += factor * y.y, x[2] += factor * y.z, x[3] += factor * y.w;
      }
      if (final)
        write_out(place, head, i % (HD / 4) * 4, x, totals[head], q, out);
      else
        ((float4 *)to)[i] = make_float4(x[0], x[1], x[2], x[3]);
    }
    if (!final && threadIdx.x < place.heads) {
      float *stats = stats_of(partial, place, first) + 2 * threadIdx.x;
      stats[0] = totals[HEADS + threadIdx.x];
      stats[1] = totals[threadIdx.x];
    }
  }

  /* True in all threads of the block that is the last of `count` to come here; what the others wrote
     before is then visible. */
  static __device__ __forceinline__ bool is_last(uint32_t *counter, int count, int *flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      bool last = atomicAdd(counter, 1u) == (uint32_t)count - 1;
      if (last) *counter = 0;
      *flag = last;
    }
    __syncthreads();
    bool last = *flag;
    __threadfence();
    return last;
  }

  /* ---- the kernel ---- */

  static __device__ __forceinline__ void run(uint8_t *smem, const Step *step, const float *q,
                                             const float *k, const float *v, const float *q_norm,
                                             const float *k_norm, float eps,
                                             const float *inverse_frequencies, int rotary_dim,
                                             const KvCache &cache, int num_heads,
                                             int num_kv_heads, float *partial, uint32_t *counters,
                                             float *out) {
    int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, g = lane / 4, t = lane % 4;
    uint8_t *ring = smem;
    Rest<HD> &rest = *(Rest<HD> *)(smem + S::RING);
    int per_kv_head = num_heads / num_kv_heads;
    int groups = (per_kv_head + HEADS - 1) / HEADS, group = blockIdx.y % groups;
    Place place;
    place.kv_head = blockIdx.y / groups;
    place.first_head = place.kv_head * per_kv_head + group * HEADS;
    place.heads = min(HEADS, per_kv_head - group * HEADS);
    place.stored_heads = min(HEADS, per_kv_head);
    place.position = step->position;
    place.split = blockIdx.x;

    /* A block is worth starting for a tile per warp. */
    int splits = gridDim.x, tiles = place.position / TILE_KEYS + 1;
    int per_split = max((tiles + splits - 1) / splits, WARPS);
    place.active = (tiles + per_split - 1) / per_split;
    if (place.split >= place.active) return;
    int first_tile = place.split * per_split, count = min(per_split, tiles - first_tile);
    int items = warp < count ? 2 * ((count - warp + WARPS - 1) / WARPS) : 0;
    bool owns = place.split == place.active - 1;

    /* A group per item, be it empty: the waits count them. */
    for (int item = 0; item < S::STAGES - S::BORROWED; item++) {
      if (item < items) ask(ring, cache, place.kv_head, place.position, first_tile, item);
      cp_async_commit();
    }
    Queries<HD> &queries =
        *(Queries<HD> *)(ring + (S::STAGES - S::BORROWED) * WARPS * S::STAGE);
    prepare(queries, rest, place, owns, q, k, v, q_norm, k_norm, eps, inverse_frequencies,
            rotary_dim, cache, group == 0);
    uint32_t a[HD / 16][4];
#pragma unroll
    for (int j = 0; j < HD / 32; j++) {
      bool there = g < place.heads;
      uint4 zero = make_uint4(0, 0, 0, 0);
      uint4 high = there ? *(const uint4 *)&queries.high[g][32 * j + 8 * t] : zero;
      uint4 low = there ? *(const uint4 *)&queries.low[g][32 * j + 8 * t] : zero;
      a[2 * j][0] = high.x, a[2 * j][1] = low.x, a[2 * j][2] = high.y, a[2 * j][3] = low.y;
      a[2 * j + 1][0] = high.z, a[2 * j + 1][1] = low.z;
      a[2 * j + 1][2] = high.w, a[2 * j + 1][3] = low.w;
    }
    float unscale = g < place.heads ? rest.unscale[g] : 0.0f;
    __syncthreads(); /* the borrowed stages are free */
    for (int item = S::STAGES - S::BORROWED; item < S::AHEAD; item++) {
      if (item < items) ask(ring, cache, place.kv_head, place.position, first_tile, item);
      cp_async_commit();
    }

    float o[HD / 16][4] = {};
    float largest = -INFINITY, total = 0.0f; /* of head g; total of this lane's keys */
    constexpr float P_SCALE = INT8 ? P_SCALE_INT8 : P_SCALE_F16;
    for (int item = 0; item < items; item += 2) {
      int first_key = (first_tile + warp + item / 2 * WARPS) * TILE_KEYS;
      int own = place.position - first_key; /* row of this token's key, if below 16 */
      auto next_stage = [&](int item) {
        cp_async_wait<S::AHEAD - 1>();
        __syncwarp(); /* `item` is there, and no lane reads the one before it any more */
        if (item + S::AHEAD < items)
          ask(ring, cache, place.kv_head, place.position, first_tile, item + S::AHEAD);
        cp_async_commit();
        uint8_t *stage = ring + (item % S::STAGES * WARPS + warp) * S::STAGE;
        if (own < TILE_KEYS) put_own_row(stage, rest, item & 1, own);
        return stage;
      };

      float p[2][2];
      products_with_keys(p, next_stage(item), a);
      float top = largest;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          p[n][e] = 8 * n + 2 * t + e <= own ? p[n][e] * unscale : -INFINITY;
          top = fmaxf(top, p[n][e]);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      float correction = exp2f(largest - top), sum = 0.0f;
      largest = top;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          p[n][e] = exp2f(p[n][e] - top) * P_SCALE;
          sum += p[n][e];
        }
      }
      total = total * correction + sum;
      float corrections[2] = {__shfl_sync(0xffffffffu, correction, 8 * t),
                              __shfl_sync(0xffffffffu, correction, 8 * t + 4)};
#pragma unroll
      for (int i = 0; i < HD / 16; i++) {
        o[i][0] *= corrections[0], o[i][1] *= corrections[1];
        o[i][2] *= corrections[0], o[i][3] *= corrections[1];
      }
      add_values(o, next_stage(item + 1), p);
    }

    /* The four warps' results, through the ring. */
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    cp_async_wait<0>();
    __syncthreads();
    float *results = (float *)ring;
#pragma unroll
    for (int i = 0; i < HD / 16; i++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        results[(warp * HEADS + 2 * t + e % 2) * MERGE_STRIDE + dim_of(i, e / 2)] = o[i][e];
    if (t == 0) {
      rest.largest[warp][g] = largest;
      rest.total[warp][g] = total;
    }
    __syncthreads();
    float *values = values_of(partial, place, place.split);
    for (int i = tid; i < place.heads * HD / 4; i += 32 * WARPS) {
      int head = i / (HD / 4), d = i % (HD / 4) * 4;
      float top = -INFINITY, sum = 0.0f, x[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = fmaxf(top, rest.largest[w][head]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float factor = w < count ? exp2f(rest.largest[w][head] - top) : 0.0f;
        float4 y = *(const float4 *)&results[(w * HEADS + head) * MERGE_STRIDE + d];
        sum += factor * rest.total[w][head];
        x[0] += factor * y.x, x[1] += factor * y.y, x[2] += factor * y.z, x[3] += factor * y.w;
      }
      if (place.active == 1) {
        write_out(place, head, d, x, sum, q, out);
      } else {
        ((float4 *)values)[i] = make_float4(x[0], x[1], x[2], x[3]);
        if (d == 0) {
          float *stats = stats_of(partial, place, place.split) + 2 * head;
          stats[0] = top;
          stats[1] = sum;
        }
      }
    }
    if (place.active == 1) return;

    counters += blockIdx.y * COUNTERS;
    float *factors = results; /* read above, and is_last has a barrier */
    int stride = 1, merged = place.active;
    if (place.active > ONE_LEVEL) {
      int size = 4;
      while (size * size < place.active) size++;
      int mine = place.split / size, first = mine * size;
      int members = min(size, place.active - first);
      if (!is_last(counters + 1 + mine, members, &rest.is_last)) return;
      merge(factors, partial, place, first, 1, members, false, q, out);
      stride = size;
      merged = (place.active + size - 1) / size;
    }
    if (is_last(counters, merged, &rest.is_last))
      merge(factors, partial, place, 0, stride, merged, true, q, out);
  }
};

KERNEL __launch_bounds__(32 * WARPS, 1)
    decode_attention(const Step *step, const float *q, const float *k, const float *v,
                     const float *q_norm, const float *k_norm, float eps,
                     const float *inverse_frequencies, int rotary_dim, KvCache cache,
                     int num_heads, int num_kv_heads, int head_dim, int splits, float *partial,
                     uint32_t *counters, float *out) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  wait_for_previous_kernels();
  (void)splits; /* gridDim.x */
#define RUN(HD, INT8)                                                                            \
  Attention<HD, INT8>::run(smem, step, q, k, v, q_norm, k_norm, eps, inverse_frequencies,        \
                           rotary_dim, cache, num_heads, num_kv_heads, partial, counters, out)
  if (cache.format == 0) {
    if (head_dim == 256) RUN(256, false);
    else if (head_dim == 128) RUN(128, false);
    else if (head_dim == 64) RUN(64, false);
    else RUN(32, false);
  } else {
    if (head_dim == 256) RUN(256, true);
    else if (head_dim == 128) RUN(128, true);
    else if (head_dim == 64) RUN(64, true);
    else RUN(32, true);
  }
#undef RUN
}
EXPORT(decode_attention)
