/*
One step of the gated delta rule, as a block of decode_delta_net (delta_net.cu) and of decode_delta_net_few
(delta_net_few.cu) takes it.
*/
#pragma once

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

/* What a thread of a block works on: a channel of the convolution, and part of four rows of the state. */
template <int DK>
struct DeltaPlace {
  static constexpr int LANES = DK / 4;       /* of a row */
  static constexpr int ABREAST = 32 / LANES; /* rows that a warp has in one load */
  static constexpr int COLUMNS = DELTA_WARPS * ABREAST * ROWS_PER_LANE;
  static_assert(COLUMNS == 4096 / DK, "the launch geometry says so");
  static_assert(2 * DK + COLUMNS <= DELTA_THREADS, "a thread per channel");

  int lane, warp, l;
  int head, key_head, within, share;
  int first_column; /* of the block */
  int column0;      /* of the lane's first row */
  /* The channel: where it lies in a projection and in the convolution. */
  int row, channel;
  bool has_channel;

  __device__ __forceinline__ DeltaPlace(int num_key_heads, int num_value_heads, int dv) {
    const int tid = (int)threadIdx.x;
    lane = tid & 31, warp = tid / 32;
    head = (int)blockIdx.y, first_column = (int)blockIdx.x * COLUMNS;
    share = num_value_heads / num_key_heads;
    key_head = head / share, within = head % share;
    row = key_head * (2 * DK + 2 * share * dv) + tid;
    channel = key_head * DK + tid;
    has_channel = true;
    if (tid >= 2 * DK) {
      int column = first_column + tid - 2 * DK;
      has_channel = column < dv && tid < 2 * DK + COLUMNS;
      row = key_head * (2 * DK + 2 * share * dv) + 2 * DK + within * dv + column;
      channel = 2 * num_key_heads * DK + head * dv + column;
    } else if (tid >= DK) {
      channel += (num_key_heads - 1) * DK;
    }
    l = lane % LANES;
    column0 = first_column + warp * ABREAST + lane / LANES;
  }

  __device__ __forceinline__ float4 *rows_of(float *state, int dv) const {
    return (float4 *)state + ((int64_t)head * dv + column0) * LANES + l;
  }
  __device__ __forceinline__ int column(int r) const { return column0 + r * DELTA_WARPS * ABREAST; }
  __device__ __forceinline__ bool has_row(int r, int dv) const { return warp < DELTA_WARPS && column(r) < dv; }
  static constexpr int ROW_STEP = DELTA_WARPS * ABREAST * LANES; /* float4 from one of a lane's rows to the next */
};

/* Shares the convolved channels and their squares; then __syncthreads. */
__device__ __forceinline__ void share_channels(DeltaShared &shared, float y) {
  const int tid = (int)threadIdx.x;
  y = silu(y);
  shared.mixed[tid] = y;
  float square = warp_sum(y * y);
  if ((tid & 31) == 0) shared.squares[tid / 32] = square;
}

/* The state s after the token whose channels are shared, by the warps that hold it; and its output. */
template <int DK>
__device__ __forceinline__ void advance_state(const DeltaPlace<DK> &at, const DeltaShared &shared, float gamma,
                                              float beta, float4 (&s)[ROWS_PER_LANE], float *o, int dv) {
  constexpr int LANES = DeltaPlace<DK>::LANES;
  float q_square = 0.0f, k_square = 0.0f;
#pragma unroll
  for (int i = 0; i < DK / 32; i++) {
    q_square += shared.squares[i];
    k_square += shared.squares[DK / 32 + i];
  }
  float q_scale = rsqrtf(q_square + L2_NORM_EPS) * rsqrtf((float)DK);
  float k_scale = rsqrtf(k_square + L2_NORM_EPS);
  float4 q = ((const float4 *)shared.mixed)[at.l], k = ((const float4 *)shared.mixed)[LANES + at.l];
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
    int column = at.column(r);
    float read = __shfl_sync(0xffffffffu, answer, at.lane - at.l + r * LANES_PER_ANSWER);
    if (column >= dv) continue;
    float d = (shared.mixed[2 * DK + column - at.first_column] - read) * beta;
    s[r] = make_float4(s[r].x + k.x * d, s[r].y + k.y * d, s[r].z + k.z * d, s[r].w + k.w * d);
    if (at.l == (ROWS_PER_LANE + r) * LANES_PER_ANSWER && o != nullptr) o[at.head * dv + column] = answer + d * kq;
  }
}
