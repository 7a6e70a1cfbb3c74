//! Which variant of a kernel runs on a device: its name and geometry.
//!
//! Variants of a kernel take the same arguments, and those of one precision differ in speed alone. Those that end in `_sm90` run
//! on compute capability 9.0 only, and a portable one does the same everywhere.

use super::device::{DeviceFacts, Geometry, HOPPER};
use super::geometry;
use crate::backend::{AttentionShape, DeltaNetShape};
use crate::planning::Precision;

/// A kernel to launch.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub name: &'static str,
    pub geometry: Geometry,
}

/// Attention of a chunk of `tokens`, over keys and values of f16 or int8. All take the arguments of
/// `prefill_attention`; with one term `q_low` is not read.
pub fn prefill_attention(
    s: &AttentionShape,
    tokens: usize,
    int8: bool,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    let hopper = s.head_dim == 256 && facts.compute_capability == HOPPER;
    let (name, geometry) = match (precision, hopper, int8) {
        (Precision::F16, true, false) => (
            "prefill_attention_sm90",
            geometry::prefill_attention_sm90(s, tokens, int8),
        ),
        (Precision::F16, true, true) => (
            "prefill_attention_sm90_int8",
            geometry::prefill_attention_sm90(s, tokens, int8),
        ),
        (Precision::F16, false, _) => (
            "prefill_attention_fast",
            geometry::prefill_attention(s, tokens, precision),
        ),
        (Precision::Exact, ..) => (
            "prefill_attention",
            geometry::prefill_attention(s, tokens, precision),
        ),
    };
    Kernel { name, geometry }
}

/// From this many tokens on, a chunk of 64 costs less than one token after the other.
const FEWEST_CHUNK_TOKENS: usize = 32;

/// The recurrence of a gated delta net over `tokens`, whose state is f32 in either precision. The
/// arguments are those of `prefill_delta_rule`.
pub fn prefill_delta_rule(
    s: &DeltaNetShape,
    tokens: usize,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    let fits = |stages: usize| {
        let geometry = geometry::prefill_delta_chunks(s, precision, stages);
        (geometry.shared_bytes as usize <= geometry::most_shared_bytes(facts)).then_some(geometry)
    };
    match fits(2).or_else(|| fits(1)) {
        Some(geometry) if tokens >= FEWEST_CHUNK_TOKENS => Kernel {
            name: match precision {
                Precision::Exact => "prefill_delta_chunks",
                Precision::F16 => "prefill_delta_chunks_fast",
            },
            geometry,
        },
        _ => Kernel {
            name: "prefill_delta_rule",
            geometry: geometry::prefill_delta_rule(s),
        },
    }
}
