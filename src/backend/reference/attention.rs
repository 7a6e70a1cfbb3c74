//! Gated grouped-query attention with partial rotary embedding.

use candle_core::{D, Device, Tensor};

use super::Probe;
use super::ops::{linear, rms_norm, sigmoid, softmax};
use crate::backend::tally::{Counted, Tally};
use crate::backend::weights::AttentionWeights;
use crate::backend::{AttentionShape, ModelShape, Result};

/// Keys (after norm and rotary) and values of all tokens seen, `[Hkv, S, head_dim]` each.
#[derive(Clone, Debug)]
pub struct AttentionState {
    cache: Option<(Tensor, Tensor)>,
    tally: Tally,
    counted: Counted,
}

impl AttentionState {
    /// The state before the first token, counted by `tally`.
    pub(super) fn new(tally: &Tally) -> Self {
        AttentionState {
            cache: None,
            tally: tally.clone(),
            counted: tally.count(0),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.counted.bytes()
    }

    /// Takes back all tokens from `tokens` on.
    pub(super) fn truncate(&mut self, tokens: usize) -> Result<()> {
        if let Some((k, v)) = self.cache.take() {
            let cut = |x: &Tensor| x.narrow(1, 0, tokens)?.contiguous();
            self.set(cut(&k)?, cut(&v)?);
        }
        Ok(())
    }

    fn set(&mut self, k: Tensor, v: Tensor) {
        let bytes = size_of::<f32>() * (k.elem_count() + v.elem_count());
        self.counted = self.tally.count(bytes);
        self.cache = Some((k, v));
    }

    /// `(keys, values)`, `[Hkv, S, head_dim]` each; `None` before the first token.
    pub fn keys_values(&self) -> Option<&(Tensor, Tensor)> {
        self.cache.as_ref()
    }

    fn len(&self) -> usize {
        self.cache.as_ref().map_or(0, |(k, _)| k.dims()[1])
    }

    /// Appends `[Hkv, T, head_dim]` of new keys and values; returns all of them.
    fn append(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = match self.cache.take() {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 1)?, Tensor::cat(&[old_v, v], 1)?),
            None => (k.contiguous()?, v.contiguous()?),
        };
        self.set(k.clone(), v.clone());
        Ok((k, v))
    }
}

/// `x: [T, D]`, already normed, to `[T, D]`.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn forward(
    shape: &ModelShape,
    weights: &AttentionWeights,
    x: &Tensor,
    state: &mut AttentionState,
    probe: &mut Probe,
) -> Result<Tensor> {
    let AttentionShape {
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        ..
    } = shape.attention;
    let (tokens, past) = (x.dims()[0], state.len());
    let q_proj = linear(x, &weights.q_proj)?;
    let k_proj = linear(x, &weights.k_proj)?;
    let v_proj = linear(x, &weights.v_proj)?;
    probe.see("q_proj", &q_proj);
    probe.see("k_proj", &k_proj);
    probe.see("v_proj", &v_proj);

    // Per head: the first head_dim are the query, the last head_dim its gate.
    let q_and_gate = q_proj.reshape((tokens, heads, 2 * head_dim))?;
    let q = q_and_gate.narrow(D::Minus1, 0, head_dim)?.contiguous()?;
    let gate = q_and_gate
        .narrow(D::Minus1, head_dim, head_dim)?
        .contiguous()?;
    let q = rms_norm(&q, &weights.q_norm, shape.rms_norm_eps)?;
    let k = k_proj.reshape((tokens, kv_heads, head_dim))?;
    let k = rms_norm(&k, &weights.k_norm, shape.rms_norm_eps)?;
    probe.see("q_norm", &q);
    probe.see("k_norm", &k);

    let (cos, sin) = rotary_angles(&shape.attention, past, tokens)?;
    let q = rotate(&q, &cos, &sin)?.transpose(0, 1)?;
    let k = rotate(&k, &cos, &sin)?.transpose(0, 1)?;
    let v = v_proj
        .reshape((tokens, kv_heads, head_dim))?
        .transpose(0, 1)?;
    let (k, v) = state.append(k, v)?;

    // Query heads of one KV head are neighbours: fold them into the rows of one product.
    let (group, seen) = (heads / kv_heads, past + tokens);
    let q = q
        .contiguous()?
        .reshape((kv_heads, group * tokens, head_dim))?;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (head_dim as f64).sqrt())?;
    let scores = scores
        .reshape((heads, tokens, seen))?
        .broadcast_add(&causal_mask(past, tokens)?)?;
    let probs = softmax(&scores)?.reshape((kv_heads, group * tokens, seen))?;
    let attended = probs
        .matmul(&v)?
        .reshape((heads, tokens, head_dim))?
        .transpose(0, 1)?;

    let gated = (attended.contiguous()? * sigmoid(&gate)?)?.reshape((tokens, heads * head_dim))?;
    probe.see("o_proj_input", &gated);
    let out = linear(&gated, &weights.o_proj)?;
    probe.see("self_attn", &out);
    Ok(out)
}

/// Cosines and sines of positions `past..past + tokens`, `[T, 1, rotary_dim / 2]` each, in f32.
fn rotary_angles(shape: &AttentionShape, past: usize, tokens: usize) -> Result<(Tensor, Tensor)> {
    let half = shape.rotary_dim / 2;
    let inv_freq = shape.rope.inverse_frequencies(shape.rotary_dim);
    let angles: Vec<f32> = (past..past + tokens)
        .flat_map(|position| inv_freq.iter().map(move |f| position as f32 * f))
        .collect();
    let angles = Tensor::from_vec(angles, (tokens, 1, half), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}

/// Rotates the first `rotary_dim` of the last dimension of `[T, heads, head_dim]`: the first half
/// of them pairs with the second half (NeoX style), the rest passes through.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = cos.dims()[2];
    let head_dim = x.dims()[2];
    let a = x.narrow(D::Minus1, 0, half)?;
    let b = x.narrow(D::Minus1, half, half)?;
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    let rest = x.narrow(D::Minus1, 2 * half, head_dim - 2 * half)?;
    let parts = if head_dim > 2 * half {
        vec![first, second, rest]
    } else {
        vec![first, second]
    };
    Ok(Tensor::cat(&parts, D::Minus1)?)
}

/// `[T, past + T]`: 0 where token t may look, -inf where it may not.
fn causal_mask(past: usize, tokens: usize) -> Result<Tensor> {
    let seen = past + tokens;
    let mask: Vec<f32> = (0..tokens)
        .flat_map(|t| {
            (0..seen).map(move |s| {
                if s <= past + t {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
        })
        .collect();
    Ok(Tensor::from_vec(mask, (tokens, seen), &Device::Cpu)?)
}
