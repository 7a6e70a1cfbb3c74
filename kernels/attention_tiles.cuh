/*
A warp's tiles of 16 keys or values in decode_attention: how they lie in shared memory, and the
products with them. Included once, by attention.cu; no include guard, as attention.cuh.

Dims and keys may be permuted as long as both operands of a product are permuted alike; that is how every
lane gets to read 8 or 16 neighbouring bytes of K.
*/

constexpr int WARPS = 4;
constexpr int TILE_KEYS = 16;
constexpr int HEADS = 8; /* query heads of a block */

template <int HD, bool INT8>
struct Tiles {
  static constexpr int ROW = INT8 ? HD : 2 * HD; /* bytes of a key */
  static constexpr int CHUNKS = ROW / 16;
  static constexpr int BLOCKS = HD / SCALE_BLOCK;
  static constexpr int SCALES = INT8 ? TILE_KEYS * BLOCKS * 2 : 0; /* bytes of a tile's */
  static constexpr int STAGE = TILE_KEYS * ROW + SCALES;
  static constexpr int STAGES = INT8 ? 5 : 3; /* of a warp, used in turn for K and V tiles */
  static constexpr int RING = STAGES * WARPS * STAGE;

  /* Where a row's chunk lies: moved within the row so that what a warp reads at once, one chunk of 8
     keys (f16) or half a chunk of keys 0-3, 4-7, or every other key (int8), is in different banks. */
  static __device__ __forceinline__ int chunk_at(int key, int chunk) {
    int bits = INT8 ? ((key + (key >> 2 & 1)) & 3) << 1 : key & 7;
    return key * ROW + (chunk ^ (bits & (CHUNKS - 1))) * 16;
  }

  static __device__ __forceinline__ uint8_t *stage_of(uint8_t *ring, int item) {
    return ring + (item % STAGES * WARPS + threadIdx.x / 32) * STAGE;
  }

  /* Asks for the keys first_key .. of one of the warp's items: even ones are K tiles, odd ones V tiles.
     Leaves out the keys from `position` on: the token's own row is put in later. */
  static __device__ __forceinline__ void ask(uint8_t *ring, const KvCache &cache, int kv_head,
                                             int position, int first_key, int item) {
    int lane = threadIdx.x & 31;
    bool is_v = item & 1;
    uint8_t *stage = stage_of(ring, item);
    int64_t first_row = (int64_t)kv_head * cache.capacity + first_key;
    const uint8_t *from = (const uint8_t *)(is_v ? cache.v : cache.k) + first_row * ROW + lane * 16;
#pragma unroll
    for (int i = 0; i < TILE_KEYS * CHUNKS / 32; i++) {
      int key = (lane + 32 * i) / CHUNKS, chunk = (lane + 32 * i) % CHUNKS;
      cp_async16(stage + chunk_at(key, chunk), from + i * 512, first_key + key < position);
    }
    if (INT8 && lane < SCALES / 16)
      cp_async16(stage + TILE_KEYS * ROW + lane * 16,
                 (is_v ? cache.v_scales : cache.k_scales) + first_row * BLOCKS + lane * 8, true);
  }

  /* Puts the token's own row, the `own`-th, into the tile that ends the context. Later keys have
     weight 0, which a leftover NaN scale would not stand. */
  static __device__ __forceinline__ void put_own_row(uint8_t *stage, const uint8_t *row,
                                                     const uint16_t *row_scales, int own) {
    int lane = threadIdx.x & 31;
    if (lane < CHUNKS)
      *(uint4 *)(stage + chunk_at(own, lane)) = *(const uint4 *)(row + lane * 16);
    if (INT8) {
      uint16_t *scales = (uint16_t *)(stage + TILE_KEYS * ROW);
      for (int i = lane; i < TILE_KEYS * BLOCKS; i += 32) {
        int key = i / BLOCKS;
        if (key >= own) scales[i] = key == own ? row_scales[i % BLOCKS] : 0;
      }
    }
    __syncwarp();
  }

  /* The A operand of Q K^T from [16, Q_STRIDE] f16: the heads' high halves, then their low halves. With
     int8, dims are permuted within 32: lane t of four has 8 neighbours. */
  static constexpr int Q_STRIDE = HD + 8; /* keeps eight rows in different banks */
  static __device__ __forceinline__ void load_queries(uint32_t (&a)[HD / 16][4],
                                                      const uint16_t *queries) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < HD / 32; j++) {
      if (INT8) {
        uint4 h = *(const uint4 *)(queries + g * Q_STRIDE + 32 * j + 8 * t);
        uint4 l = *(const uint4 *)(queries + (g + 8) * Q_STRIDE + 32 * j + 8 * t);
        a[2 * j][0] = h.x, a[2 * j][1] = l.x, a[2 * j][2] = h.y, a[2 * j][3] = l.y;
        a[2 * j + 1][0] = h.z, a[2 * j + 1][1] = l.z;
        a[2 * j + 1][2] = h.w, a[2 * j + 1][3] = l.w;
      } else {
        const uint16_t *row = queries + (lane & 15) * Q_STRIDE + lane / 16 * 8 + 32 * j;
        ldmatrix_x4(a[2 * j], row);
        ldmatrix_x4(a[2 * j + 1], row + 16);
      }
    }
  }

  /* Lane 4g + t gets head g's products with keys 8n + 2t and 8n + 2t + 1. */
  static __device__ __forceinline__ void products_with_keys(float (&s)[2][2], const uint8_t *stage,
                                                            const uint32_t (&q)[HD / 16][4]) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    if (!INT8) {
      float sums[2][2][4] = {}; /* four chains of MMAs */
      int key = (lane & 7) + lane / 16 * 8, upper = lane / 8 & 1;
#pragma unroll
      for (int j = 0; j < HD / 16; j++) {
        uint32_t b[4];
        ldmatrix_x4(b, stage + chunk_at(key, 2 * j + upper));
        mma_f16(sums[0][j & 1], q[j], b[0], b[1]);
        mma_f16(sums[1][j & 1], q[j], b[2], b[3]);
      }
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[n][e] = (sums[n][0][e] + sums[n][1][e]) + (sums[n][0][2 + e] + sums[n][1][2 + e]);
      return;
    }
    const uint16_t *scales = (const uint16_t *)(stage + TILE_KEYS * ROW);
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0.0f;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int key = 8 * n + g;
        uint2 x = *(const uint2 *)(stage + chunk_at(key, 2 * b + t / 2) + t % 2 * 8);
        float sums[4] = {};
        mma_f16(sums, q[2 * b], int8_pair_to_f16<0>(x.x), int8_pair_to_f16<1>(x.x));
        mma_f16(sums, q[2 * b + 1], int8_pair_to_f16<0>(x.y), int8_pair_to_f16<1>(x.y));
#pragma unroll
        for (int e = 0; e < 2; e++)
          s[n][e] +=
              f16_to_f32(scales[(8 * n + 2 * t + e) * BLOCKS + b]) * (sums[e] + sums[2 + e]);
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

  /* Rows g and g + 8 of the i-th o below are these dims. */
  static __device__ __forceinline__ int dim_of(int i, int upper) {
    int g = (threadIdx.x & 31) / 4;
    return INT8 ? i / 2 * 32 + 4 * g + i % 2 * 2 + upper : 16 * i + g + 8 * upper;
  }

  /* o += V^T P, 16 dims by 8 heads each, with p as products_with_keys leaves it. */
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
          ldmatrix_x4_trans(a[n], stage + chunk_at(key, 2 * (i + n) + upper));
        mma_f16(o[i], a[0], high[0], high[1]);
        mma_f16(o[i + 1], a[1], high[0], high[1]);
        mma_f16(o[i], a[0], low[0], low[1]);
        mma_f16(o[i + 1], a[1], low[0], low[1]);
      }
      return;
    }
    const uint16_t *scales = (const uint16_t *)(stage + TILE_KEYS * ROW);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      float scaled[2][2];
      uint32_t x[2][2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int key = 8 * n + 2 * t + e;
          scaled[n][e] = p[n][e] * f16_to_f32(scales[key * BLOCKS + b]);
          x[n][e] = *(const uint32_t *)(stage + chunk_at(key, 2 * b + g / 4) + g % 4 * 4);
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
};
