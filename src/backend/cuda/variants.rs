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

/// The delta rule in chunks of 64 tokens, for a range of `tokens`: first what needs no state, then one
/// chunk after the other; `None` where shared memory is too small for it. `prefill_delta_rule` does the
/// same token by token.
pub fn prefill_delta_chunks(
    s: &DeltaNetShape,
    tokens: usize,
    facts: &DeviceFacts,
) -> Option<[Kernel; 2]> {
    let fits = |stages: usize| {
        let geometry = geometry::prefill_delta_chunks(s, stages);
        (geometry.shared_bytes as usize <= geometry::most_shared_bytes(facts)).then_some(geometry)
    };
    let chunks = fits(2).or_else(|| fits(1))?;
    Some([
        Kernel {
            name: "prefill_delta_prepare",
            geometry: geometry::prefill_delta_prepare(s, tokens),
        },
        Kernel {
            name: "prefill_delta_chunks",
            geometry: chunks,
        },
    ])
}

/// Products of prefill with one f16 term: on Hopper those of wgmma, which need this much shared memory.
const WGMMA_SHARED_BYTES: u32 = 99_392;

/// Of three variants the one for `precision` on this device.
fn product(
    [exact, portable, hopper]: [&'static str; 3],
    geometry: Geometry,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    match precision {
        Precision::F16 if facts.compute_capability == HOPPER => Kernel {
            name: hopper,
            geometry: Geometry {
                shared_bytes: WGMMA_SHARED_BYTES,
                ..geometry
            },
        },
        Precision::F16 => Kernel {
            name: portable,
            geometry,
        },
        Precision::Exact => Kernel {
            name: exact,
            geometry,
        },
    }
}

/// A dense product with a matrix of `rows` for `tokens`; arguments of `prefill_linear`.
pub fn prefill_linear(
    rows: usize,
    tokens: usize,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    let names = [
        "prefill_linear",
        "prefill_linear_fast",
        "prefill_linear_sm90",
    ];
    let multiprocessors = facts.multiprocessors as usize;
    let geometry = geometry::matmul(rows, tokens, multiprocessors, precision);
    product(names, geometry, precision, facts)
}

/// Gate and up of experts; arguments of `prefill_experts_up`.
pub fn prefill_experts_up(
    stride: usize,
    bound: usize,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    let names = [
        "prefill_experts_up",
        "prefill_experts_up_fast",
        "prefill_experts_up_sm90",
    ];
    let geometry = geometry::prefill_experts_up(stride, bound, precision);
    product(names, geometry, precision, facts)
}

/// Down of experts; arguments of `prefill_experts_down`.
pub fn prefill_experts_down(
    rows: usize,
    tokens: usize,
    bound: usize,
    precision: Precision,
    facts: &DeviceFacts,
) -> Kernel {
    let names = [
        "prefill_experts_down",
        "prefill_experts_down_fast",
        "prefill_experts_down_sm90",
    ];
    let geometry = geometry::prefill_experts_down(rows, tokens, bound, precision);
    product(names, geometry, precision, facts)
}
