//! The linear-attention mixer: projections, convolution, delta rule, gated norm, one job per head.

use std::cell::RefCell;

use super::conv::conv_silu;
use super::delta_rule::{HeadInputs, delta_rule, l2_normalize};
use super::isa::{Isa, dispatch};
use super::linear::{Linear, PanelsFrom};
use super::math::{sigmoid_f32, softplus_f32};
use super::rms_norm::gated_rms_norm;
use super::simd::{LANES, Simd};
use super::threads::{Parts, Pool};
use crate::backend::tally::{Counted, Tally};
use crate::backend::weights::DeltaNetWeights;
use crate::backend::{DeltaNetShape, Result};

/// Everything but the projections, in the order that heads read it.
pub struct DeltaNet {
    pub qkvz: Linear,
    pub ba: Linear,
    pub out: Linear,
    /// `[key_heads, taps, padded key_dim]`
    conv_q: Vec<f32>,
    conv_k: Vec<f32>,
    /// `[value_heads, taps, padded value_dim]`
    conv_v: Vec<f32>,
    /// `[value_heads]`: -exp(A_log)
    negative_a: Vec<f32>,
    dt_bias: Vec<f32>,
    /// `[padded value_dim]`
    norm: Vec<f32>,
}

/// What one sequence carries on in one layer.
#[derive(Clone)]
pub struct DeltaNetState {
    /// `[taps - 1, qkvz_rows]` projections of the last tokens, oldest first
    history: Vec<f32>,
    /// `[value_heads, key_dim, padded value_dim]`
    memory: Vec<f32>,
    counted: Counted,
}

impl DeltaNetState {
    /// The state before the first token, counted by `tally`.
    pub fn new(shape: &DeltaNetShape, tally: &Tally) -> Self {
        let value_dim = shape.value_head_dim.next_multiple_of(LANES);
        let history = vec![0.0; (shape.conv_kernel_dim - 1) * shape.qkvz_rows()];
        let memory = vec![0.0; shape.num_value_heads * shape.key_head_dim * value_dim];
        DeltaNetState {
            counted: tally.count(size_of_val(&history[..]) + size_of_val(&memory[..])),
            history,
            memory,
        }
    }

    pub fn bytes(&self) -> usize {
        self.counted.bytes()
    }
}

impl DeltaNet {
    pub fn new(
        shape: &DeltaNetShape,
        weights: &DeltaNetWeights,
        [qkvz, ba, out]: [Linear; 3],
    ) -> Self {
        let taps = shape.conv_kernel_dim;
        // conv1d is [channel, tap]; heads want [tap, channel], padded.
        let heads = |first: usize, heads: usize, dim: usize| {
            let padded = dim.next_multiple_of(LANES);
            let mut w = vec![0.0; heads * taps * padded];
            for head in 0..heads {
                for c in 0..dim {
                    for j in 0..taps {
                        let channel = first + head * dim + c;
                        w[(head * taps + j) * padded + c] = weights.conv1d[channel * taps + j];
                    }
                }
            }
            w
        };
        let mut norm = weights.norm.clone();
        norm.resize(shape.value_head_dim.next_multiple_of(LANES), 0.0);
        DeltaNet {
            qkvz,
            ba,
            out,
            conv_q: heads(0, shape.num_key_heads, shape.key_head_dim),
            conv_k: heads(shape.key_dim(), shape.num_key_heads, shape.key_head_dim),
            conv_v: heads(
                2 * shape.key_dim(),
                shape.num_value_heads,
                shape.value_head_dim,
            ),
            negative_a: weights.a_log.iter().map(|a| -a.exp()).collect(),
            dt_bias: weights.dt_bias.clone(),
            norm,
        }
    }

    /// From the projections of `tokens` tokens to the input of `out_proj`, `[tokens, value_dim]`.
    ///
    /// `projected` holds the panels of `qkvz`, then those of `ba`.
    ///
    /// # Errors
    /// If a worker thread failed.
    #[allow(clippy::too_many_arguments)]
    pub fn mix(
        &self,
        pool: &mut Pool,
        isa: Isa,
        shape: &DeltaNetShape,
        eps: f32,
        projected: PanelsFrom<'_>,
        tokens: usize,
        state: &mut DeltaNetState,
        out: &mut [f32],
    ) -> Result<()> {
        let value_dim = shape.value_dim();
        assert_eq!(out.len(), tokens * value_dim);
        let memory_len = state.memory.len() / shape.num_value_heads;
        let history = &state.history;
        let memory = Parts::new(&mut state.memory);
        let out = Parts::new(out);
        pool.run(shape.num_value_heads, &|head| {
            let job = HeadJob {
                net: self,
                isa,
                shape,
                eps,
                projected,
                tokens,
                history,
                head,
            };
            // SAFETY: each head has a state of its own, and is run once.
            let memory = unsafe { memory.slice(head * memory_len..(head + 1) * memory_len) };
            SCRATCH.with_borrow_mut(|scratch| {
                job.run(scratch, memory);
                let dim = shape.value_head_dim;
                let padded = dim.next_multiple_of(LANES);
                for (t, o) in scratch.out.chunks_exact(padded).enumerate() {
                    let start = t * value_dim + head * dim;
                    // SAFETY: each head writes its own columns.
                    unsafe { out.slice(start..start + dim) }.copy_from_slice(&o[..dim]);
                }
            });
        })?;
        self.remember(shape, projected, tokens, state);
        Ok(())
    }

    /// Moves the last tokens' projections into the history.
    fn remember(
        &self,
        shape: &DeltaNetShape,
        projected: PanelsFrom<'_>,
        tokens: usize,
        state: &mut DeltaNetState,
    ) {
        let rows = shape.qkvz_rows();
        let kept = shape.conv_kernel_dim - 1;
        let new = tokens.min(kept);
        state.history.copy_within(new * rows.., 0);
        for i in 0..new {
            let row = &mut state.history[(kept - new + i) * rows..][..rows];
            projected.copy_rows(0, tokens - new + i, 0..rows, row);
        }
    }
}

/// One value head, all tokens.
struct HeadJob<'a> {
    net: &'a DeltaNet,
    isa: Isa,
    shape: &'a DeltaNetShape,
    eps: f32,
    projected: PanelsFrom<'a>,
    tokens: usize,
    history: &'a [f32],
    head: usize,
}

/// Space of one worker, grown to the largest chunk seen.
#[derive(Default)]
struct Scratch {
    inputs: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
    gate: Vec<f32>,
    out: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl HeadJob<'_> {
    fn run(&self, scratch: &mut Scratch, memory: &mut [f32]) {
        let Scratch {
            inputs,
            q,
            k,
            v,
            decay,
            beta,
            gate,
            out,
        } = scratch;
        let shape = self.shape;
        let (dk, dv) = (shape.key_head_dim, shape.value_head_dim);
        let (dk_padded, dv_padded) = (dk.next_multiple_of(LANES), dv.next_multiple_of(LANES));
        let per_key = shape.num_value_heads / shape.num_key_heads;
        let (key_head, within) = (self.head / per_key, self.head % per_key);
        let net = self.net;

        // Rows of this key head: q, k, v of each of its value heads, z of each.
        let base = key_head * (2 * dk + 2 * per_key * dv);
        let v_row = base + 2 * dk + within * dv;
        let z_row = v_row + per_key * dv;
        // The query and key of a key head are computed again for each of its value heads: cheaper
        // than a barrier, and heads stay independent.
        self.convolve(inputs, base, dk, &net.conv_q, key_head, q);
        self.convolve(inputs, base + dk, dk, &net.conv_k, key_head, k);
        self.convolve(inputs, v_row, dv, &net.conv_v, self.head, v);
        let q_scale = (dk as f32).sqrt().recip();
        for (q, k) in q
            .chunks_exact_mut(dk_padded)
            .zip(k.chunks_exact_mut(dk_padded))
        {
            l2_normalize(self.isa, q, q_scale);
            l2_normalize(self.isa, k, 1.0);
        }

        decay.clear();
        beta.clear();
        let first_panel = net.qkvz.tile_rows();
        let b_row = key_head * 2 * per_key + within;
        for t in 0..self.tokens {
            let b = self.projected.get(first_panel, t, b_row);
            let a = self.projected.get(first_panel, t, b_row + per_key);
            let g = net.negative_a[self.head] * softplus_f32(a + net.dt_bias[self.head]);
            decay.push(g.exp());
            beta.push(sigmoid_f32(b));
        }
        out.resize(self.tokens * dv_padded, 0.0);
        let inputs = HeadInputs {
            key_dim: dk,
            q,
            k,
            stride: dk_padded,
            v,
            decay,
            beta,
        };
        delta_rule(self.isa, &inputs, dv_padded, memory, out);

        gate.clear();
        gate.resize(dv_padded, 0.0);
        for (t, out) in out.chunks_exact_mut(dv_padded).enumerate() {
            self.projected.copy_rows(0, t, z_row..z_row + dv, gate);
            gated_norm(self.isa, out, &net.norm, gate, self.eps, dv);
        }
    }

    /// Convolution of rows `first_row ..` of the projections, `dim` of them, into `out`.
    fn convolve(
        &self,
        inputs: &mut Vec<f32>,
        first_row: usize,
        dim: usize,
        weights: &[f32],
        head: usize,
        out: &mut Vec<f32>,
    ) {
        let padded = dim.next_multiple_of(LANES);
        let taps = self.shape.conv_kernel_dim;
        let rows = self.shape.qkvz_rows();
        inputs.clear();
        inputs.resize((taps - 1 + self.tokens) * padded, 0.0);
        out.resize(self.tokens * padded, 0.0);
        for (i, input) in inputs.chunks_exact_mut(padded).enumerate() {
            if i < taps - 1 {
                let start = i * rows + first_row;
                input[..dim].copy_from_slice(&self.history[start..start + dim]);
            } else {
                let range = first_row..first_row + dim;
                self.projected.copy_rows(0, i - (taps - 1), range, input);
            }
        }
        let weights = &weights[head * taps * padded..(head + 1) * taps * padded];
        conv_silu(self.isa, inputs, weights, padded, out);
    }
}

dispatch! {
    fn gated_norm(x: &mut [f32], scale: &[f32], gate: &[f32], eps: f32, len: usize)
        = gated_norm_body
}

#[inline(always)]
fn gated_norm_body<S: Simd>(
    s: S,
    x: &mut [f32],
    scale: &[f32],
    gate: &[f32],
    eps: f32,
    len: usize,
) {
    gated_rms_norm(s, x, scale, gate, eps, len);
}
