//! Router, experts and the shared expert.

use candle_core::{Device, Tensor};

use super::Probe;
use super::ops::{linear, sigmoid, silu, softmax};
use crate::backend::{ExpertWeights, MoeShape, MoeWeights, Result, Routing};

/// Softmax over all experts, then the k largest; equal probabilities keep the lower id first.
///
/// `x: [T, D]`, already normed.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn route(
    shape: &MoeShape,
    weights: &MoeWeights,
    x: &Tensor,
    probe: &mut Probe,
) -> Result<Routing> {
    let k = shape.num_experts_per_tok;
    let logits = linear(x, &weights.gate)?;
    probe.see("router_logits", &logits);
    let mut routing = Routing {
        num_experts_per_tok: k,
        ..Routing::default()
    };
    for probs in softmax(&logits)?.to_vec2::<f32>()? {
        let mut order: Vec<usize> = (0..probs.len()).collect();
        order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
        order.truncate(k);
        let sum: f32 = order.iter().map(|&e| probs[e]).sum();
        let norm = if shape.norm_topk_prob { sum } else { 1.0 };
        routing.topk_ids.extend(order.iter().map(|&e| e as u16));
        routing
            .topk_weights
            .extend(order.iter().map(|&e| probs[e] / norm));
    }
    Ok(routing)
}

/// `sum_k weight_k * expert_k(x) + sigmoid(shared_expert_gate x) * shared_expert(x)`, `[T, D]`.
///
/// Experts run in ascending id, each over the tokens that picked it: one expert's weights are
/// dequantized at a time.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn forward(
    weights: &MoeWeights,
    x: &Tensor,
    routing: &Routing,
    probe: &mut Probe,
) -> Result<Tensor> {
    let (tokens, k) = (routing.tokens(), routing.num_experts_per_tok);
    let mut picks: Vec<(u16, u32, f32)> = (0..tokens * k)
        .map(|i| (routing.topk_ids[i], (i / k) as u32, routing.topk_weights[i]))
        .collect();
    picks.sort_by_key(|&(expert, token, _)| (expert, token));
    let mut routed = x.zeros_like()?;
    for group in picks.chunk_by(|a, b| a.0 == b.0) {
        let rows: Vec<u32> = group.iter().map(|&(_, token, _)| token).collect();
        let scale: Vec<f32> = group.iter().map(|&(_, _, weight)| weight).collect();
        let rows = Tensor::from_vec(rows, group.len(), &Device::Cpu)?;
        let scale = Tensor::from_vec(scale, (group.len(), 1), &Device::Cpu)?;
        let expert = &weights.experts[usize::from(group[0].0)];
        let y = expert_forward(expert, &x.index_select(&rows, 0)?)?;
        routed = routed.index_add(&rows, &y.broadcast_mul(&scale)?, 0)?;
    }
    let shared = expert_forward(&weights.shared_expert, x)?;
    probe.see("shared_expert", &shared);
    let gate = linear(x, &weights.shared_expert_gate)?;
    probe.see("shared_expert_gate", &gate);
    let out = (routed + shared.broadcast_mul(&sigmoid(&gate)?)?)?;
    probe.see("mlp", &out);
    Ok(out)
}

/// SwiGLU: `down(silu(gate x) * up x)`, `[T, D]`.
fn expert_forward(weights: &ExpertWeights, x: &Tensor) -> candle_core::Result<Tensor> {
    let gate = silu(&linear(x, &weights.gate_proj)?)?;
    let up = linear(x, &weights.up_proj)?;
    linear(&(gate * up)?, &weights.down_proj)
}
