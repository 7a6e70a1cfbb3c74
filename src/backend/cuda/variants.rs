//! Which variant of a kernel runs on a device: its name and geometry.
//!
//! Variants of a kernel take the same arguments, and those of one precision differ in speed alone. Those that end in `_sm90` run
//! on compute capability 9.0 only, and a portable one does the same everywhere.

use super::device::{DeviceFacts, Geometry, HOPPER};
use super::geometry;
use crate::backend::{AttentionShape, DeltaNetShape};

/// A kernel to launch.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub name: &'static str,
    pub geometry: Geometry,
}

/// Attention of a chunk of `tokens` with one f16 per query and probability: the arguments are those of
/// `prefill_attention`, whose `q_low` is not read.
pub fn prefill_attention_f16(
    s: &AttentionShape,
    tokens: usize,
    int8: bool,
    facts: &DeviceFacts,
) -> Kernel {
    if s.head_dim == 256 && facts.compute_capability == HOPPER {
        return Kernel {
            name: match int8 {
                false => "prefill_attention_sm90",
                true => "prefill_attention_sm90_int8",
            },
            geometry: geometry::prefill_attention_sm90(s, tokens, int8),
        };
    }
    Kernel {
        name: "prefill_attention_fast",
        geometry: geometry::prefill_attention_fast(s, tokens),
    }
}

/// From this many tokens on, a chunk of 64 costs less than one token after the other.
const FEWEST_CHUNK_TOKENS: usize = 32;

/// The recurrence of a gated delta net over `tokens`; `exact`: as exact as f32, else with one f16 per
/// factor. The arguments are those of `prefill_delta_rule`.
pub fn prefill_delta_rule(
    s: &DeltaNetShape,
    tokens: usize,
    exact: bool,
    facts: &DeviceFacts,
) -> Kernel {
    let fits = |stages: usize| {
        let geometry = geometry::prefill_delta_chunks(s, exact, stages);
        (geometry.shared_bytes as usize <= geometry::most_shared_bytes(facts)).then_some(geometry)
    };
    match fits(2).or_else(|| fits(1)) {
        Some(geometry) if tokens >= FEWEST_CHUNK_TOKENS => Kernel {
            name: match exact {
                true => "prefill_delta_chunks",
                false => "prefill_delta_chunks_fast",
            },
            geometry,
        },
        _ => Kernel {
            name: "prefill_delta_rule",
            geometry: geometry::prefill_delta_rule(s),
        },
    }
}
