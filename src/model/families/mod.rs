//! The families of models: what their config classes default to and how their tensors are named.

mod qwen3_5_moe;
pub mod qwen3_moe;
mod qwen3_next;

/// What tells one family from another; sizes come from config.json.
#[derive(Debug)]
pub struct Family {
    /// `model_type` values of config.json
    pub model_types: &'static [&'static str],
    pub defaults: Defaults,
    /// The weights of the chosen experts always add up to 1, whatever config.json says
    pub always_norm_topk: bool,
    /// What the names of the text model's tensors begin with
    pub prefix: &'static str,
    /// `None` if every layer has full attention
    pub delta_net: Option<DeltaNetLayout>,
    pub attention: Attention,
    pub norms: Norms,
    pub shared_expert: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// With an output gate per head, in the rows of `q_proj` after its query
    Gated,
    Plain,
}

/// What the weight of an RMSNorm says, but for the gated norm of a delta net, which is plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// The factor is `1 + w`
    ZeroCentred,
    /// The factor is `w`
    Plain,
}

/// Sizes where config.json has none and the classes of transformers differ.
#[derive(Debug)]
pub struct Defaults {
    pub vocab_size: usize,
    pub layers: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    /// `None`: what is left of hidden_size for each head
    pub head_dim: Option<usize>,
    pub partial_rotary_factor: f64,
    pub moe_intermediate_size: usize,
    pub norm_topk_prob: bool,
}

/// How the input projections of a delta net are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaNetLayout {
    /// `in_proj_qkvz` and `in_proj_ba`, interleaved per key head
    Interleaved,
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a`, each by heads
    Split,
}

const FAMILIES: [&Family; 3] = [
    &qwen3_next::FAMILY,
    &qwen3_5_moe::FAMILY,
    &qwen3_moe::FAMILY,
];

/// The family of that `model_type`, if it is supported.
pub fn of(model_type: &str) -> Option<&'static Family> {
    let mut families = FAMILIES.into_iter();
    families.find(|family| family.model_types.contains(&model_type))
}

/// Every supported `model_type`.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES
        .iter()
        .flat_map(|family| family.model_types.iter().copied())
}
