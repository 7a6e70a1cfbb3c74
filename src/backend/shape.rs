//! The sizes of a model, as a backend needs them. `model::config` makes one from config.json.

use crate::planning::ShapeNumbers;

use super::rope::Rope;

/// Sizes of every block. All fields use the names of config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub rms_norm_eps: f32,
    /// Token mixer of each layer; its length is num_hidden_layers.
    pub mixers: Vec<MixerKind>,
    pub attention: AttentionShape,
    pub delta_net: DeltaNetShape,
    pub moe: MoeShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixerKind {
    GatedDeltaNet,
    GatedAttention,
}

/// Grouped-query attention with an output gate and partial rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionShape {
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Leading dimensions of each head that rotate (head_dim * partial_rotary_factor).
    pub rotary_dim: usize,
    pub rope: Rope,
}

/// Gated delta net: causal convolution, delta rule, gated norm.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaNetShape {
    pub num_key_heads: usize,
    /// A multiple of `num_key_heads`.
    pub num_value_heads: usize,
    pub key_head_dim: usize,
    pub value_head_dim: usize,
    pub conv_kernel_dim: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MoeShape {
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    pub shared_expert_intermediate_size: usize,
    pub norm_topk_prob: bool,
}

impl ModelShape {
    pub fn num_layers(&self) -> usize {
        self.mixers.len()
    }

    /// The same as plans count with.
    pub fn numbers(&self) -> ShapeNumbers {
        let layers_of =
            |kind: MixerKind| self.mixers.iter().filter(|&&mixer| mixer == kind).count() as u64;
        let (attention, net, moe) = (&self.attention, &self.delta_net, &self.moe);
        ShapeNumbers {
            vocab_size: self.vocab_size as u64,
            hidden_size: self.hidden_size as u64,
            num_attention_layers: layers_of(MixerKind::GatedAttention),
            num_delta_net_layers: layers_of(MixerKind::GatedDeltaNet),
            num_attention_heads: attention.num_attention_heads as u64,
            num_key_value_heads: attention.num_key_value_heads as u64,
            head_dim: attention.head_dim as u64,
            linear_num_key_heads: net.num_key_heads as u64,
            linear_num_value_heads: net.num_value_heads as u64,
            linear_key_head_dim: net.key_head_dim as u64,
            linear_value_head_dim: net.value_head_dim as u64,
            linear_conv_kernel_dim: net.conv_kernel_dim as u64,
            num_experts: moe.num_experts as u64,
            num_experts_per_tok: moe.num_experts_per_tok as u64,
            moe_intermediate_size: moe.moe_intermediate_size as u64,
            shared_expert_intermediate_size: moe.shared_expert_intermediate_size as u64,
        }
    }
}

impl AttentionShape {
    /// Rows of `q_proj`: a query and a gate per head.
    pub fn q_proj_rows(&self) -> usize {
        2 * self.num_attention_heads * self.head_dim
    }

    /// Rows of `k_proj` and of `v_proj`.
    pub fn kv_rows(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Columns of `o_proj`.
    pub fn o_proj_cols(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }
}

impl DeltaNetShape {
    pub fn key_dim(&self) -> usize {
        self.num_key_heads * self.key_head_dim
    }

    pub fn value_dim(&self) -> usize {
        self.num_value_heads * self.value_head_dim
    }

    /// Channels that go through the convolution: q, k and v, not z.
    pub fn conv_dim(&self) -> usize {
        2 * self.key_dim() + self.value_dim()
    }

    /// Rows of `in_proj_qkvz`.
    pub fn qkvz_rows(&self) -> usize {
        2 * self.key_dim() + 2 * self.value_dim()
    }

    /// Rows of `in_proj_ba`.
    pub fn ba_rows(&self) -> usize {
        2 * self.num_value_heads
    }
}
