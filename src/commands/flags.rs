//! Which flags which backend heeds: none is ignored in silence.

use super::Failure;
use super::console::Console;
use crate::backend::KvDtype;
use crate::commands::args::{ComputeArgs, CpuPrecisionArg};
use crate::engine::BackendChoice;
use crate::planning::Precision;

/// What a verb does with flags about a GPU where none takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuFlags {
    /// They say where things go, and nothing else
    Place,
    /// A plan is made from them too
    Plan,
}

/// Refuses what the backend that is asked for cannot do, and says what has no effect.
///
/// # Errors
/// [`Failure::Usage`], naming flag, backend and the way out.
pub fn check(compute: &ComputeArgs, purpose: GpuFlags, console: &Console) -> anyhow::Result<()> {
    let backend = compute.backend.resolve();
    let usage = |message: String| Err(Failure::Usage(message).into());
    if let Some(reason) = impossible(compute, backend) {
        return usage(reason);
    }
    if purpose == GpuFlags::Place && compute.policy.is_some() && compute.placement.is_none() {
        return usage(
            "--policy is for the experts of a placement; give --placement, from `moectl plan`"
                .into(),
        );
    }
    if backend == BackendChoice::Reference && compute.threads.is_some() {
        console.note("note: --threads has no effect on the reference backend");
    }
    let idle = match backend {
        BackendChoice::Cuda(_) => Vec::new(),
        _ => gpu_flags(compute, purpose),
    };
    let has = match idle.len() {
        0 => return Ok(()),
        1 => format!("{} has no effect", idle[0]),
        _ => format!("{} have no effect", idle.join(", ")),
    };
    match compute.backend {
        BackendChoice::Auto => console.note(format!(
            "note: {has}: the {backend} backend computes, without a GPU"
        )),
        // Who asks for both wants something that cannot be.
        _ => {
            return usage(format!(
                "{has} with --backend {backend}, which uses no GPU; leave one of them out"
            ));
        }
    }
    Ok(())
}

/// Why `backend` cannot do what the flags ask for.
fn impossible(compute: &ComputeArgs, backend: BackendChoice) -> Option<String> {
    let kv = compute.kv_dtype;
    let precision = compute.cpu_precision;
    match backend {
        BackendChoice::Reference => {
            if let Some(dtype) = kv.filter(|&dtype| dtype != KvDtype::F32) {
                return Some(format!(
                    "--kv-dtype {dtype}: the reference backend keeps keys and values in f32; leave it \
                     out, or use --backend cpu"
                ));
            }
            precision
                .filter(|&precision| precision != CpuPrecisionArg::F32)
                .map(|_| {
                    "--cpu-precision: the reference backend computes in f32; leave it out, or use \
                 --backend cpu"
                        .into()
                })
        }
        BackendChoice::Cuda(_) if kv == Some(KvDtype::F32) => Some(
            "--kv-dtype f32: a GPU keeps keys and values in f16 or int8; leave it out, or use \
             --backend cpu"
                .into(),
        ),
        _ => None,
    }
}

/// The flags given that are about a GPU and nothing else.
fn gpu_flags(compute: &ComputeArgs, purpose: GpuFlags) -> Vec<&'static str> {
    let placed = purpose == GpuFlags::Place;
    let prefill = &compute.prefill;
    let flags = [
        ("--vram", compute.vram.is_some() && placed),
        ("--placement", compute.placement.is_some() && placed),
        ("--policy", compute.policy.is_some()),
        ("--cpu-moe", compute.cpu_moe),
        ("--gpu-reads", !compute.gpu_reads.is_empty()),
        (
            "--precision",
            prefill.precision == Precision::Exact && placed,
        ),
        ("--prefill-chunk", prefill.prefill_chunk.is_some() && placed),
    ];
    let given = flags.iter().filter(|(_, given)| *given);
    given.map(|(flag, _)| *flag).collect()
}
