/*
decode_delta_net: convolution, gates and one step of the gated delta rule for one token.
  ring   [taps, qkvz_rows] f32: the projection of position p in slot p % taps; it and `state` are places in the
         sequence's states (Step::state)
  ba     [2 Hv] f32: per key head its value heads' b, then their a
  conv   [C, taps] f32, channels q of all key heads, k, then v of all value heads
  state  [Hv, dv, dk] f32, one row per value column: read and written
  o      [Hv dv] f32
launch: grid (ceil(dv / (4096 / dk)), Hv, tokens), block 288, no dynamic shared memory. taps <= 8,
        dk 32, 64 or 128, dv a multiple of 32.

A block has 4096 / dk columns of one head, 16 KB of state: 128 blocks on the 80B model. All of it is
under way to registers before the convolution starts. Each block computes q and k of its head again;
a thread has one channel, so the block is 2 dk + 4096 / dk threads at most.
*/
#include "delta_net_step.cuh"

template <int DK>
__device__ __forceinline__ void delta_step(DeltaShared &shared, const Step *step,
                                           const float *ring, int taps, int qkvz_rows,
                                           const float *ba, const float *conv,
                                           const float *negative_a, const float *dt_bias,
                                           float *state, float *o, int num_key_heads,
                                           int num_value_heads, int dv) {
  using Place = DeltaPlace<DK>;
  const Place at(num_key_heads, num_value_heads, dv);
  const int tid = (int)threadIdx.x;
  if (at.has_channel)
    for (int j = 0; j < taps; j++) shared.taps[j][tid] = conv[(int64_t)at.channel * taps + j];
  float rate = negative_a[at.head], bias = dt_bias[at.head];
  float4 *rows = at.rows_of(state, dv);
  /* On its way while the kernels before this one finish: the state, and the inputs of earlier tokens. */
  if (at.has_channel && at.lane < taps)
    prefetch_to_l2(ring + (int64_t)at.lane * qkvz_rows + at.row - at.lane);
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    if (at.has_row(r, dv) && at.lane % 8 == 0) prefetch_to_l2(rows + r * Place::ROW_STEP);

  wait_for_previous_kernels();

  /* Every load at once: all slots are needed, whatever the position. */
  int position = step->position;
  float inputs[MAX_TAPS];
#pragma unroll
  for (int s = 0; s < MAX_TAPS; s++)
    inputs[s] = s < taps && at.has_channel ? ring[(int64_t)s * qkvz_rows + at.row] : 0.0f;
  int gates = at.key_head * 2 * at.share + at.within;
  float b = ba[gates], a = ba[gates + at.share];

  float4 s[ROWS_PER_LANE];
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    s[r] = at.has_row(r, dv) ? rows[r * Place::ROW_STEP] : make_float4(0, 0, 0, 0);

  /* Slot s holds the latest position p' <= position with p' % taps = s: `age` before it. */
  float y = 0.0f;
  int age = position % taps;
  if (at.has_channel) {
#pragma unroll
    for (int s = 0; s < MAX_TAPS; s++) {
      if (s < taps) {
        if (age <= position) y += shared.taps[taps - 1 - age][tid] * inputs[s];
        age = age == 0 ? taps - 1 : age - 1;
      }
    }
  }
  share_channels(shared, y);
  float gamma = expf(rate * softplus(a + bias)), beta = sigmoid(b);
  __syncthreads();
  if (at.warp >= DELTA_WARPS) return;
  advance_state(at, shared, gamma, beta, s, o, dv);
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    if (at.column(r) < dv) rows[r * Place::ROW_STEP] = s[r];
}

KERNEL __launch_bounds__(DELTA_THREADS)
    decode_delta_net(const Step *step, const float *ring, int ring_slots, int qkvz_rows,
                     const float *ba, const float *conv, const float *negative_a,
                     const float *dt_bias, float *state, float *o, int num_key_heads,
                     int num_value_heads, int dk, int dv) {
  __shared__ __align__(16) DeltaShared shared;
  launch_next_kernel();
  const int token = token_index();
  step += token;
  ba += (int64_t)token * 2 * num_value_heads, o += (int64_t)token * num_value_heads * dv;
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
