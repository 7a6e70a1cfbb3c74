//! Qwen3-Next and Qwen3-Coder-Next. Source: transformers `Qwen3NextConfig`.

use super::{Attention, Defaults, DeltaNetLayout, Family, Norms};

pub const FAMILY: Family = Family {
    model_types: &["qwen3_next"],
    defaults: Defaults {
        vocab_size: 151_936,
        layers: 48,
        num_experts: 512,
        num_experts_per_tok: 10,
        num_attention_heads: 16,
        num_key_value_heads: 2,
        head_dim: Some(256),
        partial_rotary_factor: 0.25,
        moe_intermediate_size: 512,
        norm_topk_prob: true,
    },
    always_norm_topk: false,
    prefix: "model",
    delta_net: Some(DeltaNetLayout::Interleaved),
    attention: Attention::Gated,
    norms: Norms::ZeroCentred,
    shared_expert: true,
};
