/*
Attention over a chunk of T tokens, between the projections and o_proj. G = H / Hkv; head_dim (hd) 32,
64, 128 or 256.

prefill_qkv: norm and rotary; keys and values into the cache.
  q       [T, H, 2 hd] f32: per head its query, then its gate
  k, v    [T, Hkv, hd] f32, to the cache at start_position ..
  q_high, q_low [T, H, hd] f16: the query times a power of two, as the sum of two f16
  q_scales [T, H] f32: from the product of that with a key to log2 of the softmax weight (undoes the
          power of two; has hd^-0.5 and log2 e)
  launch: grid (ceil(T (H + 2 Hkv) / 8)), block 256, no dynamic shared memory. One warp per head.

prefill_attention: causal attention over the cache, positions 0 .. start_position + t, times
sigmoid(gate), with what prefill_qkv left in the cache and in q_high, q_low, q_scales.
  out     [T, H, hd] f32
  launch: grid (ceil(T G / 64), Hkv), block 128,
          dynamic shared memory 384 * hd bytes (98,304 at hd = 256)
prefill_attention_fast: the same without q_low (may be null) and with probabilities rounded to f16:
          half the MMAs; errors of 2^-11 of a score's or an output's terms, as large as the cache's own.
  launch: the same, 256 * hd bytes

Flash attention with 64 rows, 16 per warp: tokens times the G heads that share a KV head, so a tile of
keys serves them all. 32 keys per step; K and V alternate, each is under way while the other is used.
Two blocks fit on an H100's SM and hide each other's softmax. All of S and P are f32 accumulators; Q
from shared memory and P from registers are two f16 each, with two MMAs per product, so that the only
rounding is the cache's. int8 caches are turned into f16 on the way to shared memory (rounded once more,
to 2^-12).
Blocks with the most keys come first.
*/
#include "common.cuh"

#include "attention.cuh"

/* ---- prefill_qkv ---- */

constexpr int QKV_WARPS = 8;
constexpr int MAX_HEAD_DIM = 256;

template <int HD, bool INT8>
__device__ __forceinline__ void prepare_head(float *row, const float *q, const float *k,
                                             const float *v, const float *q_norm,
                                             const float *k_norm, float eps,
                                             const float *inverse_frequencies, int rotary_dim,
                                             int start_position, int64_t token, int item,
                                             const KvCache &cache, uint16_t *q_high,
                                             uint16_t *q_low, float *q_scales, int num_heads,
                                             int num_kv_heads) {
  constexpr int VALUES = HD / 32;
  int lane = threadIdx.x & 31, half = rotary_dim / 2;
  bool is_q = item < num_heads, is_v = item >= num_heads + num_kv_heads;
  int kv_head = (item - num_heads) % num_kv_heads;
  const float *from = is_q ? q + (token * num_heads + item) * 2 * HD
                           : (is_v ? v : k) + (token * num_kv_heads + kv_head) * HD;
  float x[VALUES], square = 0.0f;
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    x[j] = from[lane + 32 * j];
    square += x[j] * x[j];
  }
  if (!is_v) {
    const float *norm = is_q ? q_norm : k_norm;
    float scale = rsqrtf(warp_sum(square) / HD + eps);
#pragma unroll
    for (int j = 0; j < VALUES; j++) x[j] *= scale * norm[lane + 32 * j];
  }
#pragma unroll
  for (int j = 0; j < VALUES; j++) row[lane + 32 * j] = x[j];
  __syncwarp();
  if (!is_v) {
    for (int j = lane; j < half; j += 32) {
      float sine, cosine, a = row[j], b = row[j + half];
      sincosf((float)(start_position + token) * inverse_frequencies[j], &sine, &cosine);
      row[j] = a * cosine - b * sine;
      row[j + half] = b * cosine + a * sine;
    }
    __syncwarp();
  }

  if (!is_q) {
    int64_t at = (int64_t)kv_head * cache.capacity + start_position + token;
    uint16_t *scales = is_v ? cache.v_scales : cache.k_scales;
    store_row<HD, INT8>(row, (uint8_t *)(is_v ? cache.v : cache.k) + at * HD * (INT8 ? 1 : 2),
                        scales + at * (HD / SCALE_BLOCK));
    return;
  }
  float largest = 0.0f;
  bool broken = false;
#pragma unroll
  for (int j = 0; j < VALUES; j++) {
    x[j] = row[lane + 32 * j];
    largest = fmaxf(largest, fabsf(x[j]));
    broken |= !(fabsf(x[j]) < INFINITY);
  }
  float up = power_of_two_to_f16(warp_max(largest));
  broken = __any_sync(0xffffffffu, broken);
  int64_t at = token * num_heads + item;
#pragma unroll
  for (int j = 0; j < VALUES; j++)
    split_f16(x[j] * up, q_high[at * HD + lane + 32 * j], q_low[at * HD + lane + 32 * j]);
  if (lane == 0) q_scales[at] = broken ? NAN : LOG2_E * rsqrtf((float)HD) / up;
}

KERNEL __launch_bounds__(32 * QKV_WARPS)
    prefill_qkv(const float *q, const float *k, const float *v, const float *q_norm,
                const float *k_norm, float eps, const float *inverse_frequencies, int rotary_dim,
                int start_position, int tokens, KvCache cache, uint16_t *q_high, uint16_t *q_low,
                float *q_scales, int num_heads, int num_kv_heads, int head_dim) {
  __shared__ float rows[QKV_WARPS][MAX_HEAD_DIM];
  launch_next_kernel();
  wait_for_previous_kernels();
  int warp = threadIdx.x / 32, per_token = num_heads + 2 * num_kv_heads;
  int64_t at = (int64_t)blockIdx.x * QKV_WARPS + warp;
  int64_t token = at / per_token;
  int item = (int)(at % per_token);
  if (token >= tokens) return;
#define RUN(HD, INT8)                                                                              \
  prepare_head<HD, INT8>(rows[warp], q, k, v, q_norm, k_norm, eps, inverse_frequencies,            \
                         rotary_dim, start_position, token, item, cache, q_high, q_low, q_scales,  \
                         num_heads, num_kv_heads)
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
EXPORT(prefill_qkv)

/* ---- prefill_attention ---- */

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS; /* of a block: (token, head) pairs */
constexpr int KEYS = 32;         /* of a step */
/* Probabilities are at most this before they are rounded to f16: keeps small ones from f16's
   subnormal numbers. */
constexpr float P_SCALE = 16384.0f;
constexpr uint32_t F16_ONES = 0x3c003c00u;

template <int HD, bool INT8, bool FAST>
struct Prefill {
  static constexpr int CHUNKS = HD / 8; /* 16-byte chunks of a row in shared memory */

  /* Where a chunk lies: moved within its row, so that eight rows' chunks are in different banks. */
  static __device__ __forceinline__ uint8_t *chunk_at(uint8_t *rows, int row, int chunk) {
    return rows + row * 2 * HD + (chunk ^ (row & 7 & (CHUNKS - 1))) * 16;
  }

  /* The same for ldmatrix, whose chunks in a loop are `even` or one more: a lane has a row and its
     first chunk's place there, and the rest is constant. */
  struct Place {
    const uint8_t *row;
    int first;
  };
  static __device__ __forceinline__ Place place(const uint8_t *rows, int row, int chunk) {
    return {rows + row * 2 * HD, (chunk ^ (row & 7 & (CHUNKS - 1))) * 16};
  }
  static __device__ __forceinline__ const uint8_t *chunk_at(Place place, int row, int even) {
    return place.row + row * 2 * HD + even / 8 * 128 + (place.first ^ (even & 7) * 16);
  }

  /* ---- tiles of K and V: asked for with `ask`, in shared memory after `arrive` and a barrier ---- */

  /* 16 int8 a thread has under way. */
  static constexpr int PARTS = INT8 ? (KEYS * HD / 16 + THREADS - 1) / THREADS : 1;
  struct Parts {
    uint4 values[PARTS];
    uint16_t scales[PARTS];
  };

  static __device__ __forceinline__ void ask(uint8_t *tile, Parts &parts, const void *rows,
                                             const uint16_t *scales, int first_row,
                                             int first_key, int num_keys) {
    int tid = threadIdx.x;
    if constexpr (!INT8) {
      const uint8_t *from = (const uint8_t *)rows + (int64_t)(first_row + first_key) * 2 * HD;
#pragma unroll
      for (int i = 0; i < KEYS * CHUNKS / THREADS; i++) {
        int at = tid + i * THREADS, key = at / CHUNKS;
        bool valid = first_key + key < num_keys;
        cp_async16(chunk_at(tile, key, at % CHUNKS), valid ? from + at * 16 : from, valid);
      }
      cp_async_commit();
    } else {
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        int at = tid + i * THREADS, key = first_key + at / (HD / 16), part = at % (HD / 16);
        parts.values[i] = make_uint4(0, 0, 0, 0);
        parts.scales[i] = 0;
        if (at >= KEYS * HD / 16 || key >= num_keys) continue;
        int64_t row = first_row + key;
        parts.values[i] = *(const uint4 *)((const uint8_t *)rows + row * HD + part * 16);
        parts.scales[i] = scales[row * (HD / SCALE_BLOCK) + part / 2];
      }
    }
  }

  static __device__ __forceinline__ void arrive(uint8_t *tile, const Parts &parts) {
    if constexpr (!INT8) {
      cp_async_wait<0>();
    } else {
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        int at = threadIdx.x + i * THREADS, key = at / (HD / 16), part = at % (HD / 16);
        if (at >= KEYS * HD / 16) continue;
        uint32_t scales = parts.scales[i] * 0x10001u;
        const uint32_t words[4] = {parts.values[i].x, parts.values[i].y, parts.values[i].z,
                                   parts.values[i].w};
        uint32_t y[8];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          y[2 * w] = mul_f16x2(int8_pair_to_f16<0>(words[w]), scales);
          y[2 * w + 1] = mul_f16x2(int8_pair_to_f16<1>(words[w]), scales);
        }
        *(uint4 *)chunk_at(tile, key, 2 * part) = make_uint4(y[0], y[1], y[2], y[3]);
        *(uint4 *)chunk_at(tile, key, 2 * part + 1) = make_uint4(y[4], y[5], y[6], y[7]);
      }
    }
  }

  static __device__ __forceinline__ void ask_for_queries(uint8_t *to, const uint16_t *from,
                                                         int first_row, int num_rows,
                                                         int per_kv_head, int num_heads,
                                                         int first_head) {
    for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS) {
      int row = at / CHUNKS, chunk = at % CHUNKS;
      bool valid = first_row + row < num_rows;
      int r = valid ? first_row + row : 0;
      int64_t head = (int64_t)(r / per_kv_head) * num_heads + first_head + r % per_kv_head;
      cp_async16(chunk_at(to, row, chunk), from + head * HD + chunk * 8, valid);
    }
  }

  /* ---- the kernel ---- */

  static __device__ __forceinline__ void run(uint8_t *smem, const uint16_t *q_high,
                                             const uint16_t *q_low, const float *q_scales,
                                             const float *q, const KvCache &cache,
                                             int start_position, int tokens, int num_heads,
                                             int num_kv_heads, float *out) {
    uint8_t *high = smem, *low = high + ROWS * HD * 2; /* queries */
    uint8_t *k_tile = FAST ? low : low + ROWS * HD * 2, *v_tile = k_tile + KEYS * HD * 2;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int per_kv_head = num_heads / num_kv_heads, kv_head = blockIdx.y;
    int first_head = kv_head * per_kv_head;
    int num_rows = tokens * per_kv_head;
    int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;
    if (first_row >= num_rows) return;
    int first_token = first_row / per_kv_head;
    int last_token = min(first_row + ROWS - 1, num_rows - 1) / per_kv_head;
    int num_keys = start_position + last_token + 1;
    int unmasked = start_position + first_token + 1; /* keys that every row sees */

    int first_cache_row = kv_head * cache.capacity;

    Parts parts;
    ask_for_queries(high, q_high, first_row, num_rows, per_kv_head, num_heads, first_head);
    if (!FAST) ask_for_queries(low, q_low, first_row, num_rows, per_kv_head, num_heads, first_head);
    if (INT8) cp_async_commit();
    ask(k_tile, parts, cache.k, cache.k_scales, first_cache_row, 0, num_keys);

    /* Rows g and g + 8 of the warp's 16: of a score its factor and the last key to be seen. */
    float scale[2];
    int last_key[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int row = min(first_row + warp * 16 + g + 8 * i, num_rows - 1);
      int token = row / per_kv_head;
      scale[i] = q_scales[(int64_t)token * num_heads + first_head + row % per_kv_head];
      last_key[i] = start_position + token;
    }

    float o[HD / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY};
    /* Sums of probabilities, in 0 and 2: a product with ones. An MMA rounds its accumulators towards
       zero, which takes from outputs; this way it takes from both sides of the division (on an H100
       at 9,000 keys the worst error fell from 1.7e-5 to 1e-5 of the largest output). */
    float totals[4] = {};
    /* Lane's row and chunk in ldmatrix: of A and of V^T (matrices rows 0-7, rows 8-15, then the next
       chunk), and of K (both chunks of keys 0-7, then of keys 8-15). */
    Place q_place = place(high, warp * 16 + (lane & 15), lane >> 4);
    Place v_place = place(v_tile, lane & 15, lane >> 4);
    Place k_place = place(k_tile, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);

    for (int key = 0; key < num_keys; key += KEYS) {
      if (INT8) cp_async_wait<0>(); /* the queries */
      arrive(k_tile, parts);
      __syncthreads(); /* K is there, and nobody reads the V before it */
      if (!INT8) ask(v_tile, parts, cache.v, cache.v_scales, first_cache_row, key, num_keys);

      float s[KEYS / 8][4] = {};
#pragma unroll 4
      for (int j = 0; j < HD / 16; j++) {
        uint32_t a[4], b[KEYS / 16][4];
        ldmatrix_x4(a, chunk_at(q_place, 0, 2 * j));
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++)
          ldmatrix_x4(b[n], chunk_at(k_place, 16 * n, 2 * j));
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
          mma_f16(s[n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        if (FAST) continue;
        ldmatrix_x4(a, chunk_at(q_place, ROWS, 2 * j));
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
          mma_f16(s[n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }

      /* Not earlier: registers are scarce. */
      if (INT8) ask(v_tile, parts, cache.v, cache.v_scales, first_cache_row, key, num_keys);

      /* Online softmax; s becomes the probabilities. */
      float top[2] = {largest[0], largest[1]};
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          s[n][e] *= scale[e / 2];
          if (key + KEYS > unmasked && key + 8 * n + 2 * t + e % 2 > last_key[e / 2])
            s[n][e] = -INFINITY;
          top[e / 2] = fmaxf(top[e / 2], s[n][e]);
        }
      }
      float correction[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
        correction[i] = exp2f(largest[i] - top[i]);
        totals[2 * i] *= correction[i];
      }
      /* Maxima settle after the first keys. */
      if (__any_sync(0xffffffffu, top[0] != largest[0] || top[1] != largest[1])) {
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
          o[i][0] *= correction[0], o[i][1] *= correction[0];
          o[i][2] *= correction[1], o[i][3] *= correction[1];
        }
      }
      largest[0] = top[0], largest[1] = top[1];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = exp2f(s[n][e] - top[e / 2]) * P_SCALE;
      /* The accumulators of two tiles of 8 keys are the A operand of 16 keys. */
      uint32_t p_high[KEYS / 16][4], p_low[KEYS / 16][4];
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float x = s[2 * n + i / 2][i % 2 * 2], y = s[2 * n + i / 2][i % 2 * 2 + 1];
          uint16_t h[2], l[2];
          split_f16(x, h[0], l[0]);
          split_f16(y, h[1], l[1]);
          p_high[n][i] = (uint32_t)h[0] | (uint32_t)h[1] << 16;
          p_low[n][i] = (uint32_t)l[0] | (uint32_t)l[1] << 16;
        }
      }

      arrive(v_tile, parts);
      __syncthreads(); /* V is there, and nobody reads this K any more */
      if (key + KEYS < num_keys)
        ask(k_tile, parts, cache.k, cache.k_scales, first_cache_row, key + KEYS, num_keys);
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        mma_f16(totals, p_high[n], F16_ONES, F16_ONES);
        if (!FAST) mma_f16(totals, p_low[n], F16_ONES, F16_ONES);
#pragma unroll
        for (int i = 0; i < HD / 8; i += 2) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, chunk_at(v_place, 16 * n, i));
          mma_f16(o[i], p_high[n], b[0], b[1]);
          mma_f16(o[i + 1], p_high[n], b[2], b[3]);
          if (FAST) continue;
          mma_f16(o[i], p_low[n], b[0], b[1]);
          mma_f16(o[i + 1], p_low[n], b[2], b[3]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
      float scale = 1.0f / totals[2 * r];
      int row = first_row + warp * 16 + g + 8 * r;
      if (row >= num_rows) continue;
      int64_t head =
          (int64_t)(row / per_kv_head) * num_heads + first_head + row % per_kv_head;
      const float *gate = q + head * 2 * HD + HD;
#pragma unroll
      for (int i = 0; i < HD / 8; i++) {
        int d = 8 * i + 2 * t;
        float2 z = *(const float2 *)(gate + d);
        *(float2 *)(out + head * HD + d) =
            make_float2(__fdividef(o[i][2 * r] * scale, 1.0f + expf(-z.x)),
                        __fdividef(o[i][2 * r + 1] * scale, 1.0f + expf(-z.y)));
      }
    }
  }
};

template <bool FAST>
__device__ __forceinline__ void attend(uint8_t *smem, const uint16_t *q_high,
                                       const uint16_t *q_low, const float *q_scales,
                                       const float *q, const KvCache &cache, int start_position,
                                       int tokens, int num_heads, int num_kv_heads, int head_dim,
                                       float *out) {
#define RUN(HD, INT8)                                                                            \
  Prefill<HD, INT8, FAST>::run(smem, q_high, q_low, q_scales, q, cache, start_position, tokens,  \
                               num_heads, num_kv_heads, out)
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

KERNEL __launch_bounds__(THREADS, 2)
    prefill_attention(const uint16_t *q_high, const uint16_t *q_low, const float *q_scales,
                      const float *q, KvCache cache, int start_position, int tokens,
                      int num_heads, int num_kv_heads, int head_dim, float *out) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  wait_for_previous_kernels();
  attend<false>(smem, q_high, q_low, q_scales, q, cache, start_position, tokens, num_heads,
                num_kv_heads, head_dim, out);
}
EXPORT(prefill_attention)

KERNEL __launch_bounds__(THREADS, 2)
    prefill_attention_fast(const uint16_t *q_high, const uint16_t *q_low, const float *q_scales,
                           const float *q, KvCache cache, int start_position, int tokens,
                           int num_heads, int num_kv_heads, int head_dim, float *out) {
  DYNAMIC_SMEM(smem);
  launch_next_kernel();
  wait_for_previous_kernels();
  attend<true>(smem, q_high, q_low, q_scales, q, cache, start_position, tokens, num_heads,
               num_kv_heads, head_dim, out);
}
EXPORT(prefill_attention_fast)
