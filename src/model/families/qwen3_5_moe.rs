//! The text part of Qwen3.5 and Qwen3.6 mixtures of experts: the blocks of Qwen3-Next, with other
//! names and the projections of a delta net in four matrices. Source: transformers 5.24,
//! `Qwen3_5MoeTextConfig` and `modular_qwen3_5_moe.py`.

use super::{Attention, Defaults, DeltaNetLayout, Family, Norms};

pub const FAMILY: Family = Family {
    model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
    defaults: Defaults {
        vocab_size: 248_320,
        layers: 40,
        num_experts: 256,
        num_experts_per_tok: 8,
        num_attention_heads: 16,
        num_key_value_heads: 2,
        head_dim: Some(256),
        partial_rotary_factor: 0.25,
        moe_intermediate_size: 512,
        norm_topk_prob: true,
    },
    always_norm_topk: true,
    prefix: "model.language_model",
    delta_net: Some(DeltaNetLayout::Split),
    attention: Attention::Gated,
    norms: Norms::ZeroCentred,
    shared_expert: true,
};
