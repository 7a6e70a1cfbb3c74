/*
What both kernels of delta_rule_prefill.cu share: a chunk in shared memory, and products of factors that are
sums of two f16. Included once; no include guard, because that file may stand in a namespace of its own.
*/

constexpr int CHUNK = 64;   /* tokens */
constexpr int COLUMNS = 32; /* of the block */
constexpr int THREADS = 128;
constexpr int CONSUMERS = 64, COPIERS = THREADS - CONSUMERS;
constexpr int V_STRIDE = COLUMNS + 4; /* floats; lanes read different banks */
constexpr int BLOCK = 16;             /* T is inverted by blocks of 16 x 16 */
constexpr int BLOCKS = CHUNK / BLOCK;
constexpr int TERMS = 2;

/* Powers of two that K, Q and P are multiplied by. */
constexpr float K_UP = 64.0f, Q_UP = 512.0f, P_UP = 512.0f;

/* Shared memory: K and Q [64, DK], T and P [64, 64], each as its terms in rows of f16; per token exp of the
   decays' sum up to it, exp of what is left to the chunk's end, and beta; then either V [64, 32] f32, or the
   decays' sum, as a multiple of 2^-10 and a rest. */
template <int DK>
struct Stage {
  static constexpr int ROWS_BYTES = CHUNK * DK * 2, SQUARE_BYTES = CHUNK * CHUNK * 2; /* of a term */
  static constexpr int K = 0;
  static constexpr int Q = K + TERMS * ROWS_BYTES;
  static constexpr int T = Q + TERMS * ROWS_BYTES;
  static constexpr int P = T + TERMS * SQUARE_BYTES;
  static constexpr int DECAY = P + TERMS * SQUARE_BYTES;
  static constexpr int REST = DECAY + CHUNK * 4;
  static constexpr int BETA = REST + CHUNK * 4;
  static constexpr int V = BETA + CHUNK * 4;
  static constexpr int BYTES = V + CHUNK * V_STRIDE * 4; /* dk 128: 108,288 */
  static constexpr int LOG = V, LOG_REST = LOG + CHUNK * 4;
  static constexpr int PREPARE_BYTES = LOG_REST + CHUNK * 4;
  /* In scratch: [chunk][key head] of the first, then [chunk][value head] of the second. */
  static constexpr int KEY_IMAGE = T, HEAD_IMAGE = V - T;
};

/* An A operand of 16 x 16 as terms. */
struct Operand {
  uint32_t term[TERMS][4];

  __device__ __forceinline__ void set(int i, float x, float y) {
    const uint32_t high = round_f16x2(x, y);
    term[0][i] = high;
    term[1][i] = round_f16x2(x - f16_to_f32((uint16_t)high), y - f16_to_f32((uint16_t)(high >> 16)));
  }
  /* Of the accumulators of two tiles of 8 columns, times `up`. */
  __device__ __forceinline__ void set(const float (&c)[4], const float (&d)[4], float up) {
    set(0, c[0] * up, c[1] * up);
    set(1, c[2] * up, c[3] * up);
    set(2, d[0] * up, d[1] * up);
    set(3, d[2] * up, d[3] * up);
  }
};

/* Rows of f16 in shared memory, all of one term and then of the other; chunks of 16 bytes are moved so that
   eight rows' are in different banks. */
template <int COLS>
struct Rows {
  static constexpr int CHUNKS = COLS / 8, TERM_BYTES = CHUNK * COLS * 2;
  uint8_t *at;

  __device__ __forceinline__ uint8_t *chunk(int row, int chunk) const {
    return at + row * COLS * 2 + (chunk ^ (row & 7 & (CHUNKS - 1))) * 16;
  }
  /* x and y, neighbours from an even column on. */
  __device__ __forceinline__ void store(int row, int col, float x, float y) const {
    uint8_t *to = chunk(row, col / 8) + col % 8 * 2;
    Operand terms;
    terms.set(0, x, y);
#pragma unroll
    for (int i = 0; i < TERMS; i++) *(uint32_t *)(to + i * TERM_BYTES) = terms.term[i][0];
  }
  /* Four neighbours from a multiple of 4 on. */
  __device__ __forceinline__ void store(int row, int col, float4 x) const {
    uint8_t *to = chunk(row, col / 8) + col % 8 * 2;
    Operand terms;
    terms.set(0, x.x, x.y);
    terms.set(1, x.z, x.w);
#pragma unroll
    for (int i = 0; i < TERMS; i++)
      *(uint2 *)(to + i * TERM_BYTES) = make_uint2(terms.term[i][0], terms.term[i][1]);
  }
  /* The block at (row, col) as an A operand. */
  __device__ __forceinline__ void load(Operand &a, int row, int col) const {
    const int lane = threadIdx.x % 32;
    const uint8_t *from = chunk(row + lane % 16, col / 8 + lane / 16);
#pragma unroll
    for (int i = 0; i < TERMS; i++) ldmatrix_x4(a.term[i], from + i * TERM_BYTES);
  }
};

/* c, d += a B for two tiles of 8 columns. Of the products of terms, all but that of both second ones. The
   fragments of B are those at `from`, transposed or not. */
template <int TERM_BYTES, bool TRANSPOSED>
__device__ __forceinline__ void multiply_block(float (&c)[4], float (&d)[4], const Operand &a,
                                               const uint8_t *from) {
#pragma unroll
  for (int i = 0; i < TERMS; i++) {
    uint32_t b[4];
    if (TRANSPOSED) ldmatrix_x4_trans(b, from + i * TERM_BYTES);
    else ldmatrix_x4(b, from + i * TERM_BYTES);
#pragma unroll
    for (int j = 0; j < TERMS - i; j++) {
      mma_f16(c, a.term[j], b[0], b[1]);
      mma_f16(d, a.term[j], b[2], b[3]);
    }
  }
}

/* c, d += a X^T: X the 16 x 16 block at (row, col), whose rows are the product's columns. */
template <int COLS>
__device__ __forceinline__ void multiply_rows(float (&c)[4], float (&d)[4], const Operand &a,
                                              const Rows<COLS> &x, int row, int col) {
  const int lane = threadIdx.x % 32;
  multiply_block<Rows<COLS>::TERM_BYTES, false>(
      c, d, a, x.chunk(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2));
}

/* c, d += a X: X the block at (row, col). */
template <int COLS>
__device__ __forceinline__ void multiply_columns(float (&c)[4], float (&d)[4], const Operand &a,
                                                 const Rows<COLS> &x, int row, int col) {
  const int lane = threadIdx.x % 32;
  multiply_block<Rows<COLS>::TERM_BYTES, true>(
      c, d, a, x.chunk(row + lane % 16, col / 8 + lane / 16));
}
