//! Which variant of a kernel runs on a device: its name and geometry.
//!
//! Variants of a kernel take the same arguments and differ in speed alone. Those that end in `_sm90` run
//! on compute capability 9.0 only, and a portable one does the same everywhere.

use super::device::{DeviceFacts, Geometry, HOPPER};
use super::geometry;
use crate::backend::AttentionShape;

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
