//! Whether a model fits RAM, before its weights are read.

use super::Failure;
use crate::backend::KvDtype;
use crate::commands::args::ComputeArgs;
use crate::engine::BackendChoice;
use crate::hardware::MemoryFacts;
use crate::planning::units::{show_budget, show_bytes};
use crate::planning::{self, Footprint};

/// What the process takes beside weights and keys and values: code, tokenizer, buffers of a step.
const OTHER_BYTES: u64 = 150_000_000;

/// Packed weights by stored ones: tiles are padded, and pages of what was packed linger.
const PACKED_PERCENT: u64 = 104;

/// Refuses a model that RAM cannot hold: the system would end the process halfway.
///
/// # Errors
/// [`Failure::DoesNotFit`] with what is needed, what there is, and the way out.
pub fn check(
    compute: &ComputeArgs,
    head_in_ram: bool,
    footprint: &Footprint,
    max_tokens: usize,
) -> anyhow::Result<()> {
    let backend = compute.backend.resolve();
    let Some(needed) = needed(compute, backend, head_in_ram, footprint, max_tokens) else {
        return Ok(());
    };
    let facts = MemoryFacts::detect();
    let (budget, whose) = match compute.ram {
        Some(ram) => (ram, "--ram is"),
        // What the system does not tell cannot be held against it.
        None if facts.available_bytes == 0 => return Ok(()),
        None => (facts.available_bytes, "available are"),
    };
    if needed <= budget {
        return Ok(());
    }
    let limit = match facts.cgroup_limit_bytes {
        Some(limit) if compute.ram.is_none() => {
            format!(" (the control group allows {})", show_bytes(limit))
        }
        _ => String::new(),
    };
    Err(Failure::DoesNotFit(format!(
        "the model takes {} of RAM, {whose} {}{limit}; end other programs, give a container more, or \
         take a smaller model; --ram {} tries all the same, --backend reference reads weights from \
         the file as it goes, slowly",
        show_bytes(needed),
        show_bytes(budget),
        show_budget(needed)
    ))
    .into())
}

/// RAM at the peak; `None` for a backend that keeps weights where they are.
fn needed(
    compute: &ComputeArgs,
    backend: BackendChoice,
    head_in_ram: bool,
    footprint: &Footprint,
    max_tokens: usize,
) -> Option<u64> {
    let kv = |dtype| max_tokens as u64 * footprint.kv_bytes_per_token(dtype);
    let (weights, kv) = match backend {
        BackendChoice::Reference => return None,
        BackendChoice::Cuda(_) => {
            let head = match head_in_ram {
                true => footprint.lm_head_bytes,
                false => 0,
            };
            (footprint.experts_bytes() + head, 0)
        }
        BackendChoice::Auto | BackendChoice::Cpu => {
            let kv = match compute.kv_dtype.unwrap_or_default() {
                KvDtype::F32 => 2 * kv(planning::KvDtype::F16),
                KvDtype::F16 => kv(planning::KvDtype::F16),
                KvDtype::Int8 => kv(planning::KvDtype::Int8),
            };
            let dense = footprint.dense_bytes + footprint.router_bytes + footprint.lm_head_bytes;
            (footprint.experts_bytes() + dense, kv)
        }
    };
    let packed = weights / 100 * PACKED_PERCENT;
    Some(packed + footprint.embedding_bytes + kv + OTHER_BYTES)
}
