//! Which models the kernels in `kernels/*.cu` can compute. What is beyond is refused by name before
//! anything is loaded: a kernel itself has no way to say that its numbers are wrong.

use super::abi::MAX_TOP_K;
use crate::backend::{BackendError, MixerKind, ModelShape, Result};

/// Of `decode_router`, `prefill_topk` and `prefill_group_scan`: a thread, or a place in shared memory, for
/// each expert.
pub const MAX_EXPERTS: usize = 1024;

/// Of `decode_norm_linear` and `decode_router`, which keep a token's whole vector in a block.
pub const MAX_HIDDEN_SIZE: usize = 8192;

/// Vectors are read four floats at a time.
pub const VECTOR_FLOATS: usize = 4;

/// Of `decode_attention` and `prefill_attention`, which are compiled for these.
pub const HEAD_DIMS: &[usize] = &[32, 64, 128, 256];

/// Of `decode_delta_net` and `prefill_delta_rule`, which are compiled for these.
pub const KEY_HEAD_DIMS: &[usize] = &[32, 64, 128];

/// Of `decode_delta_out`, which takes a power of two, and `prefill_conv`, which has four channels a lane.
pub const VALUE_HEAD_DIMS: &[usize] = &[32, 64, 128];

/// Of `decode_delta_net` and `prefill_conv`: inputs that a thread keeps.
pub const MAX_TAPS: usize = 8;

/// Whether the kernels compute a model of this shape.
///
/// # Errors
/// [`BackendError::Unsupported`] with every number that they do not take, as config.json names it.
pub fn check(shape: &ModelShape) -> Result<()> {
    let mut wrong = Vec::new();
    let mut one_of = |name: &str, found: usize, allowed: &[usize]| {
        if !allowed.contains(&found) {
            let allowed: Vec<String> = allowed.iter().map(usize::to_string).collect();
            wrong.push(format!("{name} is {found}, not {}", allowed.join(", ")));
        }
    };
    if shape.mixers.contains(&MixerKind::GatedAttention) {
        one_of("head_dim", shape.attention.head_dim, HEAD_DIMS);
    }
    let net = &shape.delta_net;
    let has_nets = shape.mixers.contains(&MixerKind::GatedDeltaNet);
    if has_nets {
        one_of("linear_key_head_dim", net.key_head_dim, KEY_HEAD_DIMS);
        one_of("linear_value_head_dim", net.value_head_dim, VALUE_HEAD_DIMS);
    }
    let mut at_most = |name: &str, found: usize, most: usize| {
        if found > most {
            wrong.push(format!("{name} is {found}, at most {most}"));
        }
    };
    if has_nets {
        at_most("linear_conv_kernel_dim", net.conv_kernel_dim, MAX_TAPS);
    }
    let moe = &shape.moe;
    at_most("hidden_size", shape.hidden_size, MAX_HIDDEN_SIZE);
    at_most("num_experts", moe.num_experts, MAX_EXPERTS);
    at_most("num_experts_per_tok", moe.num_experts_per_tok, MAX_TOP_K);
    for (name, found) in [
        ("hidden_size", shape.hidden_size),
        ("moe_intermediate_size", moe.moe_intermediate_size),
        (
            "shared_expert_intermediate_size",
            moe.shared_expert_intermediate_size,
        ),
    ] {
        if !found.is_multiple_of(VECTOR_FLOATS) {
            wrong.push(format!(
                "{name} is {found}, not a multiple of {VECTOR_FLOATS}"
            ));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(BackendError::Unsupported {
            backend: "cuda",
            why: wrong.join("; "),
        }),
    }
}
