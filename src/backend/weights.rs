//! The weights of a model, typed by role, still in the form they have on disk.
//!
//! Matrices are views into the checkpoint and cost no memory; vectors are small and widened to
//! f32. `model::weights` fills this in; a backend turns it into whatever its kernels read.

use crate::formats::Matrix;

/// All weights of one model. `D` hidden_size, `V` vocab_size.
#[derive(Clone, Debug)]
pub struct ModelWeights {
    /// `[V, D]`
    pub embed_tokens: Matrix,
    pub layers: Vec<LayerWeights>,
    /// `[D]`, zero-centred
    pub norm: Vec<f32>,
    /// `[V, D]`; the same view as `embed_tokens` where the model ties them
    pub lm_head: Matrix,
}

#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[D]`, zero-centred
    pub input_layernorm: Vec<f32>,
    pub mixer: MixerWeights,
    /// `[D]`, zero-centred
    pub post_attention_layernorm: Vec<f32>,
    pub moe: MoeWeights,
}

#[derive(Clone, Debug)]
pub enum MixerWeights {
    GatedDeltaNet(Box<DeltaNetWeights>),
    GatedAttention(Box<AttentionWeights>),
}

/// Shapes by [`DeltaNetShape`](super::DeltaNetShape).
#[derive(Clone, Debug)]
pub struct DeltaNetWeights {
    /// `[qkvz_rows, D]`, interleaved per key head: q, k, then its value heads' v, then their z
    pub in_proj_qkvz: Matrix,
    /// `[ba_rows, D]`, interleaved per key head: its value heads' b, then their a
    pub in_proj_ba: Matrix,
    /// `[conv_dim, conv_kernel_dim]`, the last tap meets the current token
    pub conv1d: Vec<f32>,
    /// `[num_value_heads]`
    pub a_log: Vec<f32>,
    /// `[num_value_heads]`
    pub dt_bias: Vec<f32>,
    /// `[value_head_dim]`, plain: not zero-centred
    pub norm: Vec<f32>,
    /// `[D, value_dim]`
    pub out_proj: Matrix,
}

/// Shapes by [`AttentionShape`](super::AttentionShape).
#[derive(Clone, Debug)]
pub struct AttentionWeights {
    /// `[q_proj_rows, D]`, per head: query, then gate
    pub q_proj: Matrix,
    /// `[kv_rows, D]`
    pub k_proj: Matrix,
    /// `[kv_rows, D]`
    pub v_proj: Matrix,
    /// `[D, o_proj_cols]`
    pub o_proj: Matrix,
    /// `[head_dim]`, zero-centred
    pub q_norm: Vec<f32>,
    /// `[head_dim]`, zero-centred
    pub k_norm: Vec<f32>,
}

/// `E` num_experts.
#[derive(Clone, Debug)]
pub struct MoeWeights {
    /// The router, `[E, D]`
    pub gate: Matrix,
    /// `E` experts of moe_intermediate_size
    pub experts: Vec<ExpertWeights>,
    /// shared_expert_intermediate_size
    pub shared_expert: ExpertWeights,
    /// `[1, D]`
    pub shared_expert_gate: Matrix,
}

/// One SwiGLU block: `down(silu(gate x) * up x)`, of intermediate size `I`.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[I, D]`
    pub gate_proj: Matrix,
    /// `[I, D]`
    pub up_proj: Matrix,
    /// `[D, I]`
    pub down_proj: Matrix,
}
