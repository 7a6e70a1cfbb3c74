/*
decode_delta_net: convolution, gates and one step of the gated delta rule for one token.
  ring   [taps, qkvz_rows] f32: the projection of position p in slot p % taps; it and `state` are places in the
         sequence's states (Step::state)
  ba     [2 Hv] f32: per key head its value heads' b, then their a
  conv   [C, taps] f32, channels q of all key heads, k, then v of all value heads
  state  [Hv, dv, dk] f32, one row per value column: read and written
  o      [Hv dv] f32
launch: grid (ceil(dv / (4096 / dk)), Hv), block 288, no dynamic shared memory. taps <= 8,
        dk 32, 64 or 128, dv a multiple of 32.

A block has 4096 / dk columns of one head, 16 KB of state: 128 blocks on the 80B model. All of it is
under way to registers before the convolution starts. Each block computes q and k of its head again;
a thread has one channel, so the block is 2 dk + 4096 / dk threads at most.
*/
#include "common.cuh"
#include "delta_net.cuh"

constexpr int DELTA_WARPS = 8; /* that hold state; the ninth only convolves */
constexpr int DELTA_THREADS = 288;
constexpr int ROWS_PER_LANE = 4; /* rows of the state that a lane has 16 bytes of */

/* Sums each of N values over groups of LANES lanes, and leaves the i-th in the group's lanes
   i * LANES / N ..: N - 1 + log2(LANES / N) shuffles where butterflies would take N log2(LANES). */
template <int N, int LANES>
__device__ __forceinline__ float sum_and_scatter(float (&v)[N]) {
  int offset = LANES / 2;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, offset /= 2) {
    bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < half; i++) {
      float give = upper ? v[i] : v[i + half];
      float keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

__device__ __forceinline__ float dot(float4 a, float4 b) {
  return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}

struct DeltaShared {
  float mixed[DELTA_THREADS]; /* q, k, then the block's columns of v */
  float squares[DELTA_THREADS / 32];
  float taps[MAX_TAPS][DELTA_THREADS]; /* each thread's own channel */
};

template <int DK>
__device__ __forceinline__ void delta_step(DeltaShared &shared, const Step *step,
                                           const float *ring, int taps, int qkvz_rows,
                                           const float *ba, const float *conv,
                                           const float *negative_a, const float *dt_bias,
                                           float *state, float *o, int num_key_heads,
                                           int num_value_heads, int dv) {
  constexpr int LANES = DK / 4;       /* of a row */
  constexpr int ABREAST = 32 / LANES; /* rows that a warp has in one load */
  constexpr int COLUMNS = DELTA_WARPS * ABREAST * ROWS_PER_LANE;
  static_assert(COLUMNS == 4096 / DK, "the launch geometry says so");
  static_assert(2 * DK + COLUMNS <= DELTA_THREADS, "a thread per channel");

  int tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
  int head = blockIdx.y, first_column = blockIdx.x * COLUMNS;
  int share = num_value_heads / num_key_heads;
  int key_head = head / share, within = head % share;

  /* This thread's channel: where it lies in a ring slot and in the convolution. */
  int row = key_head * (2 * DK + 2 * share * dv) + tid;
  int channel = key_head * DK + tid;
  bool has_channel = true;
  if (tid >= 2 * DK) {
    int column = first_column + tid - 2 * DK;
    has_channel = column < dv && tid < 2 * DK + COLUMNS;
    row = key_head * (2 * DK + 2 * share * dv) + 2 * DK + within * dv + column;
    channel = 2 * num_key_heads * DK + head * dv + column;
  } else if (tid >= DK) {
    channel += (num_key_heads - 1) * DK;
  }
  if (has_channel)
    for (int j = 0; j < taps; j++) shared.taps[j][tid] = conv[(int64_t)channel * taps + j];
  float rate = negative_a[head], bias = dt_bias[head];
  int l = lane % LANES;
  int column0 = first_column + warp * ABREAST + lane / LANES;
  float4 *rows = (float4 *)state + ((int64_t)head * dv + column0) * LANES + l;
  /* On its way while the kernels before this one finish: the state, and the inputs of earlier tokens. */
  if (has_channel && lane < taps) prefetch_to_l2(ring + (int64_t)lane * qkvz_rows + row - lane);
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    if (warp < DELTA_WARPS && column0 + r * DELTA_WARPS * ABREAST < dv && lane % 8 == 0)
      prefetch_to_l2(rows + r * DELTA_WARPS * ABREAST * LANES);

  wait_for_previous_kernels();

  /* Every load at once: all slots are needed, whatever the position. */
  int position = step->position;
  float inputs[MAX_TAPS];
#pragma unroll
  for (int s = 0; s < MAX_TAPS; s++)
    inputs[s] = s < taps && has_channel ? ring[(int64_t)s * qkvz_rows + row] : 0.0f;
  float b = ba[key_head * 2 * share + within], a = ba[key_head * 2 * share + share + within];

  float4 s[ROWS_PER_LANE];
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    bool there = warp < DELTA_WARPS && column0 + r * DELTA_WARPS * ABREAST < dv;
    s[r] = there ? rows[r * DELTA_WARPS * ABREAST * LANES] : make_float4(0, 0, 0, 0);
  }

  /* Slot s holds the latest position p' <= position with p' % taps = s: `age` before it. */
  float y = 0.0f;
  int age = position % taps;
  if (has_channel) {
#pragma unroll
    for (int s = 0; s < MAX_TAPS; s++) {
      if (s < taps) {
        if (age <= position) y += shared.taps[taps - 1 - age][tid] * inputs[s];
        age = age == 0 ? taps - 1 : age - 1;
      }
    }
  }
  y = silu(y);
  shared.mixed[tid] = y;
  float square = warp_sum(y * y);
  if (lane == 0) shared.squares[warp] = square;
  float gamma = expf(rate * softplus(a + bias)), beta = sigmoid(b);
  __syncthreads();
  if (warp >= DELTA_WARPS) return;

  float q_square = 0.0f, k_square = 0.0f;
#pragma unroll
  for (int i = 0; i < DK / 32; i++) {
    q_square += shared.squares[i];
    k_square += shared.squares[DK / 32 + i];
  }
  float q_scale = rsqrtf(q_square + L2_NORM_EPS) * rsqrtf((float)DK);
  float k_scale = rsqrtf(k_square + L2_NORM_EPS);
  float4 q = ((const float4 *)shared.mixed)[l], k = ((const float4 *)shared.mixed)[LANES + l];
  q = make_float4(q.x * q_scale, q.y * q_scale, q.z * q_scale, q.w * q_scale);
  k = make_float4(k.x * k_scale, k.y * k_scale, k.z * k_scale, k.w * k_scale);

  /* What the decayed state answers to k and to q; the output is the latter plus d (k q), so both
     are summed at once instead of one after the other. */
  float answers[2 * ROWS_PER_LANE];
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    s[r] = make_float4(s[r].x * gamma, s[r].y * gamma, s[r].z * gamma, s[r].w * gamma);
    answers[r] = dot(s[r], k);
    answers[ROWS_PER_LANE + r] = dot(s[r], q);
  }
  float kq = dot(k, q);
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    kq += __shfl_xor_sync(0xffffffffu, kq, offset);
  float answer = sum_and_scatter<2 * ROWS_PER_LANE, LANES>(answers);

  constexpr int LANES_PER_ANSWER = LANES / (2 * ROWS_PER_LANE);
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    int column = column0 + r * DELTA_WARPS * ABREAST;
    float read = __shfl_sync(0xffffffffu, answer, lane - l + r * LANES_PER_ANSWER);
    if (column >= dv) continue;
    float d = (shared.mixed[2 * DK + column - first_column] - read) * beta;
    float4 v = make_float4(s[r].x + k.x * d, s[r].y + k.y * d, s[r].z + k.z * d, s[r].w + k.w * d);
    rows[r * DELTA_WARPS * ABREAST * LANES] = v;
    if (l == (ROWS_PER_LANE + r) * LANES_PER_ANSWER) o[head * dv + column] = answer + d * kq;
  }
}

KERNEL __launch_bounds__(DELTA_THREADS)
    decode_delta_net(const Step *step, const float *ring, int ring_slots, int qkvz_rows,
                     const float *ba, const float *conv, const float *negative_a,
                     const float *dt_bias, float *state, float *o, int num_key_heads,
                     int num_value_heads, int dk, int dv) {
  __shared__ __align__(16) DeltaShared shared;
  launch_next_kernel();
  ring = of_sequence(ring, step);
  state = of_sequence(state, step);
  if (dk == 128)
    delta_step<128>(shared, step, ring, ring_slots, qkvz_rows, ba, conv, negative_a, dt_bias, state, o,
                    num_key_heads, num_value_heads, dv);
  else if (dk == 64)
    delta_step<64>(shared, step, ring, ring_slots, qkvz_rows, ba, conv, negative_a, dt_bias, state, o,
                   num_key_heads, num_value_heads, dv);
  else
    delta_step<32>(shared, step, ring, ring_slots, qkvz_rows, ba, conv, negative_a, dt_bias, state, o,
                   num_key_heads, num_value_heads, dv);
}
EXPORT(decode_delta_net)
