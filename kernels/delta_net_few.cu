/*
A few consecutive tokens of one sequence in decode_delta_net's step, some of which may be taken back: the state
goes from token to token in registers, and is written only for those that are kept. Each token's numbers are
bit for bit those of decode_delta_net.

decode_delta_net_few: convolution, gates and the gated delta rule for `tokens` tokens after step's position.
  ring   as in decode_delta_net, of the tokens before; not written
  fresh  [tokens, qkvz_rows] f32: the projections of these tokens
  ba     [tokens, 2 Hv] f32
  state  [Hv, dv, dk] f32: written if `keeps`
  o      [tokens, Hv dv] f32; null if it is not wanted
  launch: grid (ceil(dv / (4096 / dk)), Hv), block 288, no dynamic shared memory. Limits as decode_delta_net.

decode_keep_ring: puts the projections of `tokens` tokens after step's position into the ring.
  launch: grid (ceil(qkvz_rows / 256), min(tokens, taps)), block 256.
*/
#include "delta_net_step.cuh"

template <int DK>
__device__ __forceinline__ void delta_few(DeltaShared &shared, const Step *step, const float *ring, int taps,
                                          int qkvz_rows, const float *fresh, const float *ba, const float *conv,
                                          const float *negative_a, const float *dt_bias, float *state, float *o,
                                          int num_key_heads, int num_value_heads, int dv, int tokens, int keeps) {
  using Place = DeltaPlace<DK>;
  const Place at(num_key_heads, num_value_heads, dv);
  const int tid = (int)threadIdx.x;
  if (at.has_channel)
    for (int j = 0; j < taps; j++) shared.taps[j][tid] = conv[(int64_t)at.channel * taps + j];
  const float rate = negative_a[at.head], bias = dt_bias[at.head];
  float4 *rows = at.rows_of(state, dv);
  wait_for_previous_kernels();

  const int before = step->position, gates = at.key_head * 2 * at.share + at.within;
  float4 s[ROWS_PER_LANE];
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    s[r] = at.has_row(r, dv) ? rows[r * Place::ROW_STEP] : make_float4(0, 0, 0, 0);

#pragma unroll 1
  for (int token = 0; token < tokens; token++) {
    const int position = before + token;
    /* As decode_delta_net adds up, slot by slot: what is older than `fresh` is in the ring. */
    float y = 0.0f;
    int age = position % taps;
    if (at.has_channel) {
#pragma unroll
      for (int s = 0; s < MAX_TAPS; s++) {
        if (s < taps) {
          if (age <= position) {
            const float *from = age <= token ? fresh + (int64_t)(token - age) * qkvz_rows
                                             : ring + (int64_t)s * qkvz_rows;
            y += shared.taps[taps - 1 - age][tid] * from[at.row];
          }
          age = age == 0 ? taps - 1 : age - 1;
        }
      }
    }
    const float *own = ba + (int64_t)token * 2 * num_value_heads;
    const float b = own[gates], a = own[gates + at.share];
    share_channels(shared, y);
    const float gamma = expf(rate * softplus(a + bias)), beta = sigmoid(b);
    __syncthreads();
    float *of_token = o == nullptr ? nullptr : o + (int64_t)token * num_value_heads * dv;
    if (at.warp < DELTA_WARPS) advance_state(at, shared, gamma, beta, s, of_token, dv);
    __syncthreads(); /* the channels have been read */
  }
  if (!keeps) return;
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++)
    if (at.has_row(r, dv)) rows[r * Place::ROW_STEP] = s[r];
}

KERNEL __launch_bounds__(DELTA_THREADS)
    decode_delta_net_few(const Step *step, const float *ring, int ring_slots, int qkvz_rows, const float *fresh,
                         const float *ba, const float *conv, const float *negative_a, const float *dt_bias,
                         float *state, float *o, int num_key_heads, int num_value_heads, int dk, int dv,
                         int tokens, int keeps) {
  __shared__ __align__(16) DeltaShared shared;
  launch_next_kernel();
  ring = of_sequence(ring, step);
  state = of_sequence(state, step);
#define RUN(DK)                                                                                          \
  delta_few<DK>(shared, step, ring, ring_slots, qkvz_rows, fresh, ba, conv, negative_a, dt_bias, state, o, \
                num_key_heads, num_value_heads, dv, tokens, keeps)
  if (dk == 128) RUN(128);
  else if (dk == 64) RUN(64);
  else RUN(32);
#undef RUN
}

KERNEL __launch_bounds__(256)
    decode_keep_ring(const Step *step, const float *fresh, float *ring, int ring_slots, int qkvz_rows, int tokens) {
  launch_next_kernel();
  ring = of_sequence(ring, step);
  wait_for_previous_kernels();
  const int row = (int)(blockIdx.x * 256 + threadIdx.x), token = tokens - 1 - (int)blockIdx.y;
  if (row >= qkvz_rows || token < 0) return;
  ring[(int64_t)((step->position + token) % ring_slots) * qkvz_rows + row] =
      fresh[(int64_t)token * qkvz_rows + row];
}
EXPORT(decode_delta_net_few)
EXPORT(decode_keep_ring)
