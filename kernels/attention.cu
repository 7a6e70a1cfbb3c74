/*
decode_attention: attention of one token over the whole context, one pass over K and V.
  q     [H, 2 hd] f32: per head its query, then its gate
  k, v  [Hkv, hd] f32 of this token: appended to the cache at step->position
  cache places in the sequence's states (Step::state)
  out   [H, hd] f32, times sigmoid(gate)
G = H / Hkv query heads share a KV head; a block serves 8 of them, so with G > 8 K and V are read
ceil(G / 8) times (the second time mostly from L2).
launch: grid (splits, Hkv * ceil(G / 8), tokens), block 128,
        dynamic shared memory: f16  388 * hd + 336     (99,664 bytes at hd = 256)
                               int8 344 * hd + 336     (88,400)
        splits: what fills the GPU once, max(1, SMs / (Hkv * ceil(G / 8))), at most 256.
        partial: Hkv * ceil(G / 8) * splits * min(G, 8) * (hd + 2) floats for each token.
        counters: 64 per grid row (Hkv * ceil(G / 8)) and token, zero before the first launch.
hd 32, 64, 128 or 256; rotary_dim <= hd.

The context is cut into tiles of 16 keys, dealt to blocks in contiguous runs and to the four warps of a
block in turn; a warp works alone until the end. Its K and V tiles come through a ring of stages in shared
memory of its own (cp.async), two or more under way.
  S = Q K^T: the A operand has the queries' high halves as rows 0-7 and their low halves as rows
     8-15, so one MMA per 16 dims and 8 keys computes both.
  O^T += V^T P: P's values, scaled up into f16's range, are split into two f16 and cost two MMAs. S
     comes out of the accumulators exactly as P goes into the B operand.
int8: K's and V's integers are exact in f16; scales of K multiply partial sums of 32 dims in f32, those
of V are put on P before it is split.
Blocks that got no keys exit. The last block of a KV head to finish merges; from 17 blocks on in two
levels, groups of about the square root first: one SM takes 5 us to read 66 results. At short context time
is the latency of what depends on each other, so whatever can be loaded early is.
*/
#include "common.cuh"

#include "attention.cuh"
#include "attention_tiles.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int MAX_MERGED = 16; /* results that one merge reads; more take two levels */
constexpr int COUNTERS = 64;   /* per KV head: the last level's, then one per group */
/* Probabilities are at most this before they are split into f16; it keeps what is 2^-25 of the largest
   exact. With int8, scales up to 512 (of values that f16 could not hold either) come on top. */
constexpr float P_SCALE_F16 = 16384.0f;
constexpr float P_SCALE_INT8 = 64.0f;

/* After the ring of stages in shared memory. */
template <int HD>
struct Rest {
  uint8_t own_rows[2][2 * HD]; /* this token's k and v as the cache has them */
  uint16_t own_scales[2][8];
  float largest[WARPS][HEADS];
  float total[WARPS][HEADS];
  float unscale[HEADS]; /* from Q K^T to log2 of the weight */
  int is_last;
  int padding[3];
};

/* In the stages that are not used at first. */
template <int HD>
struct Queries {
  float rows[HEADS + 2][HD]; /* after the norm; then k and v */
  uint16_t halves[2 * HEADS][HD + 8]; /* of heads: high, then low */
};

/* What a block works on. */
struct Place {
  int kv_head;
  int first_head;   /* query head */
  int heads;        /* 1..8 */
  int stored_heads; /* heads per row of `partial` */
};

template <int HD, bool INT8>
struct Attention {
  using T = Tiles<HD, INT8>;
  static constexpr int AHEAD = T::STAGES - 1;     /* items under way */
  static constexpr int AT_FIRST = INT8 ? 3 : 2;   /* until the queries have left the ring */
  static constexpr int MERGE_STRIDE = HD + 4;     /* keeps four heads in different banks */
  static constexpr int VALUES = HD / 16;          /* of a row in a lane, in `prepare` */
  /* At the end threads share out the results: 16 have a head, each ITS float4 (if hd is 32, half of
     them none). */
  static constexpr int PER_HEAD = THREADS / HEADS;
  static constexpr int ITS = HD < 64 ? 1 : HD / 64;
  static_assert(PER_HEAD == MAX_MERGED, "a merge has a lane for each result's statistics");
  static_assert(sizeof(Queries<HD>) <= (T::STAGES - AT_FIRST) * WARPS * T::STAGE, "they fit");
  static_assert(WARPS * HEADS * MERGE_STRIDE * 4 <= T::RING, "warps' results fit in the ring");
  static_assert(T::RING + sizeof(Rest<HD>) <= 99 * 1024, "what consumer GPUs have");

  /* ---- the queries, and the token's own key and value ---- */

  /* Half a warp has a row: of warp w heads 2w and 2w + 1; then of warp 0 k and v. Lane l of 16 has its
     values l + 16 j. */
  static __device__ __forceinline__ int row_of(int pass) {
    return pass == 0 ? threadIdx.x / 16 : HEADS + threadIdx.x / 16;
  }

  /* From x, the half-warp's rows as they were projected, to `queries`, `rest` and the cache. `weights`:
     q_norm's values of this lane, then k_norm's. `meanwhile` is done where it delays nothing. */
  template <typename F>
  static __device__ __forceinline__ void prepare(Queries<HD> &queries, Rest<HD> &rest,
                                                 const Place &place, const float (&x)[2][VALUES],
                                                 const float (&weights)[2][VALUES], float eps,
                                                 const float *inverse_frequencies, int rotary_dim,
                                                 int position, bool owns, bool writes_cache,
                                                 const KvCache &cache, F meanwhile) {
    int tid = threadIdx.x, lane = tid & 31, l = lane & 15, warp = tid / 32, half = rotary_dim / 2;
    int passes = owns && warp == 0 ? 2 : 1;
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
      if (pass >= passes) break;
      int i = row_of(pass);
      float square = 0.0f;
#pragma unroll
      for (int j = 0; j < VALUES; j++) square += x[pass][j] * x[pass][j];
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2)
        square += __shfl_xor_sync(0xffffffffu, square, offset);
      float scale = rsqrtf(square / HD + eps);
#pragma unroll
      for (int j = 0; j < VALUES; j++)
        queries.rows[i][l + 16 * j] =
            i == HEADS + 1 ? x[pass][j] : x[pass][j] * scale * weights[pass][j];
    }
    meanwhile();
    __syncwarp();
    /* Pairs of dims j and j + half turn by position times frequency; a lane has a pair of all the
       warp's rows. */
#pragma unroll 1
    for (int j = lane; j < half; j += 32) {
      float sine, cosine;
      sincosf((float)position * inverse_frequencies[j], &sine, &cosine);
#pragma unroll
      for (int n = 0; n < 3; n++) { /* both heads; k */
        if (n == 2 && passes == 1) break;
        float *row = queries.rows[n < 2 ? 2 * warp + n : HEADS];
        float a = row[j], b = row[j + half];
        row[j] = a * cosine - b * sine;
        row[j + half] = b * cosine + a * sine;
      }
    }
    __syncwarp();

    int head = row_of(0);
    float y[VALUES], largest = 0.0f;
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      y[j] = queries.rows[head][l + 16 * j];
      float size = fabsf(y[j]);
      largest = size < INFINITY ? fmaxf(largest, size) : INFINITY; /* for NaN, too */
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    float up = power_of_two_to_f16(largest);
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      int d = l + 16 * j;
      split_f16(y[j] * up, queries.halves[head][d], queries.halves[HEADS + head][d]);
    }
    if (l == 0)
      rest.unscale[head] = largest < INFINITY ? LOG2_E * rsqrtf((float)HD) / up : NAN;

    if (passes == 2) {
      store_row<HD, INT8>(queries.rows[HEADS], rest.own_rows[0], rest.own_scales[0]);
      store_row<HD, INT8>(queries.rows[HEADS + 1], rest.own_rows[1], rest.own_scales[1]);
      __syncwarp();
      int64_t at = (int64_t)place.kv_head * cache.capacity + position;
      uint4 *k = (uint4 *)((uint8_t *)cache.k + at * T::ROW);
      uint4 *v = (uint4 *)((uint8_t *)cache.v + at * T::ROW);
      if (writes_cache && lane < T::CHUNKS) {
        k[lane] = ((const uint4 *)rest.own_rows[0])[lane];
        v[lane] = ((const uint4 *)rest.own_rows[1])[lane];
      }
      if (INT8 && writes_cache && lane < T::BLOCKS) {
        cache.k_scales[at * T::BLOCKS + lane] = rest.own_scales[0][lane];
        cache.v_scales[at * T::BLOCKS + lane] = rest.own_scales[1][lane];
      }
    }
    __syncthreads();
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

  /* A thread's part of a result. */
  struct Result {
    float4 values[ITS]; /* the part-th of every PER_HEAD */
    float top;
    float total;
  };

  static __device__ __forceinline__ void add(float4 &sum, float factor, float4 x) {
    sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
  }

  static __device__ __forceinline__ void store(float *partial, const Place &place, int split,
                                               const Result &result) {
    int head = threadIdx.x / PER_HEAD, part = threadIdx.x % PER_HEAD;
    if (head >= place.heads || part * 4 >= HD) return;
    float4 *values = (float4 *)(values_of(partial, place, split) + head * HD) + part;
#pragma unroll
    for (int r = 0; r < ITS; r++) values[r * PER_HEAD] = result.values[r];
    if (part == 0)
      *(float2 *)(stats_of(partial, place, split) + 2 * head) =
          make_float2(result.top, result.total);
  }

  /* Merges the results of `count` splits, first, first + stride, .. All of a round's loads are under way
     before the first is used; those past the end are the last one's again, with factor 0. */
  static __device__ __forceinline__ Result merge(float *partial, const Place &place, int first,
                                                 int stride, int count) {
    constexpr int TOGETHER = 8;
    int lane = threadIdx.x & 31, part = threadIdx.x % PER_HEAD;
    int head = min(threadIdx.x / PER_HEAD, place.heads - 1);
    float2 stats = __ldcg((const float2 *)(
        stats_of(partial, place, first + min(part, count - 1) * stride) + 2 * head));
    const float4 *from = (const float4 *)(values_of(partial, place, first) + head * HD) +
                         part % (HD / 4);
    int64_t step = (int64_t)stride * place.stored_heads * (HD / 4);
    float4 values[TOGETHER][ITS];
    Result result = {};
    float factors;
#pragma unroll 1
    for (int n = 0; n < count; n += TOGETHER) {
#pragma unroll
      for (int u = 0; u < TOGETHER; u++) {
        const float4 *x = from + min(n + u, count - 1) * step;
#pragma unroll
        for (int r = 0; r < ITS; r++) values[u][r] = __ldcg(x + r * PER_HEAD);
      }
      if (n == 0) {
        result.top = stats.x;
#pragma unroll
        for (int offset = PER_HEAD / 2; offset > 0; offset /= 2)
          result.top = fmaxf(result.top, __shfl_xor_sync(0xffffffffu, result.top, offset));
        factors = part < count && stats.x != -INFINITY ? exp2f(stats.x - result.top) : 0.0f;
        result.total = factors * stats.y;
#pragma unroll
        for (int offset = PER_HEAD / 2; offset > 0; offset /= 2)
          result.total += __shfl_xor_sync(0xffffffffu, result.total, offset);
      }
#pragma unroll
      for (int u = 0; u < TOGETHER; u++) {
        float factor = __shfl_sync(0xffffffffu, factors, lane - part + n + u);
#pragma unroll
        for (int r = 0; r < ITS; r++) add(result.values[r], factor, values[u][r]);
      }
    }
    return result;
  }

  /* True in all threads of the block that is the last of `count` to come here; what the others wrote
     before is then visible in L2. */
  static __device__ __forceinline__ bool is_last(uint32_t *counter, int count, int *flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      bool last = atomicAdd(counter, 1u) == (uint32_t)count - 1;
      if (last) *counter = 0;
      *flag = last;
    }
    __syncthreads();
    return *flag;
  }

  /* ---- the kernel ---- */

  static __device__ __forceinline__ void run(uint8_t *ring, const Step *step, const float *q,
                                             const float *k, const float *v, const float *q_norm,
                                             const float *k_norm, float eps,
                                             const float *inverse_frequencies, int rotary_dim,
                                             const KvCache &cache, int num_heads,
                                             int num_kv_heads, float *partial, uint32_t *counters,
                                             float *out) {
    int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, g = lane / 4, t = lane % 4;
    Rest<HD> &rest = *(Rest<HD> *)(ring + T::RING);
    Queries<HD> &queries = *(Queries<HD> *)(ring + AT_FIRST * WARPS * T::STAGE);
    int per_kv_head = num_heads / num_kv_heads;
    int groups = (per_kv_head + HEADS - 1) / HEADS, group = blockIdx.y % groups;
    Place place;
    place.kv_head = blockIdx.y / groups;
    place.first_head = place.kv_head * per_kv_head + group * HEADS;
    place.heads = min(HEADS, per_kv_head - group * HEADS);
    place.stored_heads = min(HEADS, per_kv_head);

    float weights[2][VALUES];
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
      weights[0][j] = q_norm[lane % 16 + 16 * j];
      weights[1][j] = warp == 0 ? k_norm[lane % 16 + 16 * j] : 0.0f;
    }

    wait_for_previous_kernels();

    /* These loads depend on nothing; the position is needed next. */
    int position = step->position;
    float x[2][VALUES];
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
      int i = row_of(pass);
      const float *from = nullptr;
      if (i < place.heads) from = q + (int64_t)(place.first_head + i) * 2 * HD;
      if (i == HEADS) from = k + place.kv_head * HD;
      if (i == HEADS + 1) from = v + place.kv_head * HD;
#pragma unroll
      for (int j = 0; j < VALUES; j++) x[pass][j] = from ? from[lane % 16 + 16 * j] : 0.0f;
    }

    /* A block is worth starting for a tile per warp. */
    int splits = gridDim.x, split = blockIdx.x, tiles = position / TILE_KEYS + 1;
    int per_split = max((tiles + splits - 1) / splits, WARPS);
    int first_tile = split * per_split;
    if (first_tile >= tiles) return;
    int count = min(per_split, tiles - first_tile); /* tiles of this block */
    bool owns = first_tile + count == tiles;
    int items = warp < count ? 2 * ((count - warp + WARPS - 1) / WARPS) : 0;
    int first_key = (first_tile + warp) * TILE_KEYS; /* of the warp's first tile */
    /* A group per item, be it empty: the waits count them. */
    auto ask = [&](int item) {
      if (item < items)
        T::ask(ring, cache, place.kv_head, position, first_key + item / 2 * (WARPS * TILE_KEYS),
               item);
      cp_async_commit();
    };
    ask(0);
    prepare(queries, rest, place, x, weights, eps, inverse_frequencies, rotary_dim, position, owns,
            group == 0, cache, [&] {
#pragma unroll 1
              for (int item = 1; item < AT_FIRST; item++) ask(item);
            });
    uint32_t a[HD / 16][4];
    T::load_queries(a, queries.halves[0]);
    float unscale = g < place.heads ? rest.unscale[g] : 0.0f;
    __syncthreads(); /* the queries' stages are free */
    for (int item = AT_FIRST; item < AHEAD; item++) ask(item);

    float o[HD / 16][4] = {};
    float largest = -INFINITY, total = 0.0f; /* of head g; total of this lane's keys */
    for (int item = 0; item < items; item += 2) {
      int own = position - first_key - item / 2 * (WARPS * TILE_KEYS); /* the token's row, if < 16 */
      auto next_stage = [&](int item) {
        cp_async_wait<AHEAD - 1>();
        __syncwarp(); /* `item` is there, and no lane reads the one before it any more */
        ask(item + AHEAD);
        uint8_t *stage = T::stage_of(ring, item);
        if (own < TILE_KEYS)
          T::put_own_row(stage, rest.own_rows[item & 1], rest.own_scales[item & 1], own);
        return stage;
      };

      float p[2][2];
      T::products_with_keys(p, next_stage(item), a);
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
          p[n][e] = exp2f(p[n][e] - top) * (INT8 ? P_SCALE_INT8 : P_SCALE_F16);
          sum += p[n][e];
        }
      }
      total = total * correction + sum;
      /* A lane has two heads' outputs, 2t and 2t + 1. */
      float corrections[2] = {__shfl_sync(0xffffffffu, correction, 8 * t),
                              __shfl_sync(0xffffffffu, correction, 8 * t + 4)};
#pragma unroll
      for (int i = 0; i < HD / 16; i++) {
        o[i][0] *= corrections[0], o[i][1] *= corrections[1];
        o[i][2] *= corrections[0], o[i][3] *= corrections[1];
      }
      T::add_values(o, next_stage(item + 1), p);
    }

    /* The four warps' results, through the ring. */
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    cp_async_wait<0>();
    __syncthreads();
    float *results = (float *)ring;
#pragma unroll
    for (int i = 0; i < HD / 16; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float *to = results + (warp * HEADS + 2 * t + e) * MERGE_STRIDE;
        if (INT8) {
          *(float2 *)(to + T::dim_of(i, 0)) = make_float2(o[i][e], o[i][e + 2]);
        } else {
          to[T::dim_of(i, 0)] = o[i][e];
          to[T::dim_of(i, 1)] = o[i][e + 2];
        }
      }
    }
    if (t == 0) {
      rest.largest[warp][g] = largest;
      rest.total[warp][g] = total;
    }
    /* The gates are under way while results are merged. */
    int head = tid / PER_HEAD, part = tid % PER_HEAD;
    bool has_values = head < place.heads && part * 4 < HD;
    int64_t query = place.first_head + head;
    float4 gates[ITS];
#pragma unroll
    for (int r = 0; r < ITS; r++)
      gates[r] = has_values ? ((const float4 *)(q + query * 2 * HD + HD))[part + r * PER_HEAD]
                            : make_float4(0, 0, 0, 0);
    __syncthreads();
    Result result = {};
    result.top = -INFINITY;
    if (has_values) {
#pragma unroll
      for (int w = 0; w < WARPS; w++) result.top = fmaxf(result.top, rest.largest[w][head]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float factor = w < count ? exp2f(rest.largest[w][head] - result.top) : 0.0f;
        result.total += factor * rest.total[w][head];
        const float4 *values = (const float4 *)(results + (w * HEADS + head) * MERGE_STRIDE);
#pragma unroll
        for (int r = 0; r < ITS; r++) add(result.values[r], factor, values[part + r * PER_HEAD]);
      }
    }

    /* Levels of merging: within groups of `size` splits if there are many, then of all. Of each, the
       block that comes last goes on. */
    int size = 1, active = (tiles + per_split - 1) / per_split;
    if (active > MAX_MERGED)
      for (size = 5; size * size < active;) size++;
    counters += blockIdx.y * COUNTERS;
#pragma unroll 1
    for (int level = size > 1 ? 0 : 1; level < 2 && active > 1; level++) {
      bool last_level = level == 1;
      int group = split / size;
      int first = last_level ? 0 : group * size, stride = last_level ? size : 1;
      int members = last_level ? (active + size - 1) / size : min(size, active - first);
      /* After the first level the group's result takes the place of its first split's. */
      __syncthreads(); /* all have read what is overwritten here */
      store(partial, place, last_level ? group * size : split, result);
      if (!is_last(counters + (last_level ? 0 : 1 + group), members, &rest.is_last)) return;
      result = merge(partial, place, first, stride, members);
    }
    if (!has_values) return;
    float4 *to = (float4 *)(out + query * HD) + part;
    float scale = 1.0f / result.total;
#pragma unroll
    for (int r = 0; r < ITS; r++) {
      float4 y = result.values[r], z = gates[r];
      to[r * PER_HEAD] = make_float4(gated(y.x * scale, z.x), gated(y.y * scale, z.y),
                                     gated(y.z * scale, z.z), gated(y.w * scale, z.w));
    }
  }

  static __device__ __forceinline__ float gated(float x, float gate) {
    return __fdividef(x, 1.0f + expf(-gate));
  }
};

KERNEL __launch_bounds__(THREADS, 1)
    decode_attention(const Step *step, const float *q, const float *k, const float *v,
                     const float *q_norm, const float *k_norm, float eps,
                     const float *inverse_frequencies, int rotary_dim, KvCache cache,
                     int num_heads, int num_kv_heads, int head_dim, int splits, float *partial,
                     uint32_t *counters, float *out) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  (void)splits; /* gridDim.x */
  const int token = token_index(), query_heads = min(HEADS, num_heads / num_kv_heads);
  step += token;
  q += (int64_t)token * num_heads * 2 * head_dim, out += (int64_t)token * num_heads * head_dim;
  k += (int64_t)token * num_kv_heads * head_dim, v += (int64_t)token * num_kv_heads * head_dim;
  partial += (int64_t)token * gridDim.y * gridDim.x * query_heads * (head_dim + 2);
  counters += (int64_t)token * gridDim.y * COUNTERS;
  cache.k = of_sequence((uint8_t *)cache.k, step);
  cache.v = of_sequence((uint8_t *)cache.v, step);
  cache.k_scales = of_sequence(cache.k_scales, step);
  cache.v_scales = of_sequence(cache.v_scales, step);
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
