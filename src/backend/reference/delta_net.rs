//! Gated delta net: projections, causal convolution, delta rule, gated norm.

use candle_core::{D, Device, Tensor};

use super::Probe;
use super::delta_rule::{chunked, recurrent};
use super::ops::{l2norm, linear, normalize, sigmoid, silu};
use crate::backend::tally::{Counted, Tally};
use crate::backend::weights::DeltaNetWeights;
use crate::backend::{DeltaNetShape, ModelShape, Result};

/// What a sequence carries through one delta-net layer.
#[derive(Clone, Debug)]
pub struct DeltaNetState {
    /// `[conv_dim, conv_kernel_dim]`: the last inputs of the convolution, oldest first, zeros
    /// before the first token.
    pub conv: Tensor,
    /// `[Hv, dk, dv]`
    pub recurrent: Tensor,
    counted: Counted,
}

impl DeltaNetState {
    /// The state before the first token, counted by `tally`.
    pub(super) fn new(shape: &DeltaNetShape, tally: &Tally) -> Result<Self> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu);
        let conv = zeros(&[shape.conv_dim(), shape.conv_kernel_dim])?;
        let recurrent = zeros(&[
            shape.num_value_heads,
            shape.key_head_dim,
            shape.value_head_dim,
        ])?;
        let bytes = size_of::<f32>() * (conv.elem_count() + recurrent.elem_count());
        Ok(DeltaNetState {
            conv,
            recurrent,
            counted: tally.count(bytes),
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.counted.bytes()
    }
}

/// `x: [T, D]`, already normed, to `[T, D]`.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn forward(
    shape: &ModelShape,
    weights: &DeltaNetWeights,
    x: &Tensor,
    state: &mut DeltaNetState,
    probe: &mut Probe,
) -> Result<Tensor> {
    let net = &shape.delta_net;
    let (tokens, dk, dv) = (x.dims()[0], net.key_head_dim, net.value_head_dim);
    let (key_heads, value_heads) = (net.num_key_heads, net.num_value_heads);
    let ratio = value_heads / key_heads;

    let qkvz = linear(x, &weights.in_proj_qkvz)?;
    let ba = linear(x, &weights.in_proj_ba)?;
    probe.see("in_proj_qkvz", &qkvz);
    probe.see("in_proj_ba", &ba);

    // One block of outputs per key head: its q, its k, then v and z of its value heads.
    let qkvz = qkvz.reshape((tokens, key_heads, 2 * dk + 2 * ratio * dv))?;
    let part = |start, len, dim| qkvz.narrow(D::Minus1, start, len)?.reshape((tokens, dim));
    let q = part(0, dk, net.key_dim())?;
    let k = part(dk, dk, net.key_dim())?;
    let v = part(2 * dk, ratio * dv, net.value_dim())?;
    let z = part(2 * dk + ratio * dv, ratio * dv, net.value_dim())?;
    let ba = ba.reshape((tokens, key_heads, 2 * ratio))?;
    let b = ba
        .narrow(D::Minus1, 0, ratio)?
        .reshape((tokens, value_heads))?;
    let a = ba
        .narrow(D::Minus1, ratio, ratio)?
        .reshape((tokens, value_heads))?;

    let mixed = causal_conv(
        net,
        &weights.conv1d,
        &Tensor::cat(&[q, k, v], 1)?,
        &mut state.conv,
    )?;
    let q = mixed
        .narrow(1, 0, net.key_dim())?
        .reshape((tokens, key_heads, dk))?;
    let k = mixed
        .narrow(1, net.key_dim(), net.key_dim())?
        .reshape((tokens, key_heads, dk))?;
    let v = mixed.narrow(1, 2 * net.key_dim(), net.value_dim())?;
    let v = v.reshape((tokens, value_heads, dv))?;
    probe.see("q_conv", &q);
    probe.see("k_conv", &k);
    probe.see("v_conv", &v);

    let beta = sigmoid(&b)?;
    let g = decay(&a, &weights.a_log, &weights.dt_bias)?;
    probe.see("beta", &beta);
    probe.see("g", &g);

    let q = per_value_head(&(l2norm(&q)? / (dk as f64).sqrt())?, ratio)?;
    let k = per_value_head(&l2norm(&k)?, ratio)?;
    let rule = if tokens == 1 { recurrent } else { chunked };
    let (o, recurrent_state) = rule(&q, &k, &v, &g, &beta, &state.recurrent)?;
    state.recurrent = recurrent_state;
    probe.see("delta_rule_out", &o);

    // Gated RMSNorm per value head: the norm's weight is plain, and the gate comes after it.
    let norm = Tensor::new(weights.norm.as_slice(), &Device::Cpu)?;
    let o = normalize(&o, shape.rms_norm_eps)?.broadcast_mul(&norm)?;
    let o = (o * silu(&z.reshape((tokens, value_heads, dv))?)?)?;
    probe.see("gated_norm", &o);
    let out = linear(&o.reshape((tokens, net.value_dim()))?, &weights.out_proj)?;
    probe.see("linear_attn", &out);
    Ok(out)
}

/// Depthwise causal convolution of `u: [T, C]` with taps `[C, K]`, then silu.
///
/// `history: [C, K]` holds the inputs before `u`, oldest first, and is moved on by T.
fn causal_conv(
    net: &DeltaNetShape,
    taps: &[f32],
    u: &Tensor,
    history: &mut Tensor,
) -> candle_core::Result<Tensor> {
    let (tokens, kernel) = (u.dims()[0], net.conv_kernel_dim);
    let taps = Tensor::new(taps, &Device::Cpu)?.reshape((net.conv_dim(), kernel))?;
    let inputs = Tensor::cat(&[&history.t()?.contiguous()?, u], 0)?; // [K + T, C]
    let mut sum = u.zeros_like()?;
    for j in 0..kernel {
        // The last tap meets the current token; `inputs` starts K tokens before it.
        let shifted = inputs.narrow(0, 1 + j, tokens)?;
        sum = (sum + shifted.broadcast_mul(&taps.narrow(1, j, 1)?.t()?)?)?;
    }
    *history = inputs.narrow(0, tokens, kernel)?.t()?.contiguous()?;
    silu(&sum)
}

/// `g = -exp(A_log) * softplus(a + dt_bias)`, `[T, Hv]`, never positive.
fn decay(a: &Tensor, a_log: &[f32], dt_bias: &[f32]) -> candle_core::Result<Tensor> {
    let rate: Vec<f32> = a_log.iter().map(|v| -v.exp()).collect();
    let x = a.broadcast_add(&Tensor::new(dt_bias, &Device::Cpu)?)?;
    let linear_above = x.gt(20.0)?; // torch's threshold: softplus(x) = x beyond it
    let softplus = (x.minimum(20.0)?.exp()? + 1.0)?.log()?;
    let softplus = linear_above.where_cond(&x, &softplus)?;
    softplus.broadcast_mul(&Tensor::new(rate.as_slice(), &Device::Cpu)?)
}

/// `[T, Hk, d]` to `[T, Hv, d]`: value head j uses key head j / ratio.
fn per_value_head(x: &Tensor, ratio: usize) -> candle_core::Result<Tensor> {
    let (tokens, heads, dim) = x.dims3()?;
    let x = x.unsqueeze(2)?.broadcast_as((tokens, heads, ratio, dim))?;
    x.contiguous()?.reshape((tokens, heads * ratio, dim))
}
