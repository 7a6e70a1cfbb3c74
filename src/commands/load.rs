//! Loading a model the way the flags ask, with a progress bar.

use crate::backend::{BackendError, KvDtype};
use crate::cli::ComputeArgs;
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, plan};
use crate::engine::footprint::footprint;
use crate::engine::{BackendChoice, Engine, EngineError, LoadOptions};
use crate::hardware::GpuReport;
use crate::model::Source;
use crate::planning::units::show_bytes;
use crate::planning::{self, Footprint, LayerSlots, Placement, Throttle};

/// Loads the model with room for `max_tokens`; says what its owner should know.
pub fn engine(
    source: &Source,
    compute: &ComputeArgs,
    max_tokens: usize,
    console: &Console,
) -> anyhow::Result<Engine> {
    // All that can be refused is refused before the weights are loaded.
    let checkpoint = source.local_checkpoint()?;
    let footprint = footprint(&source.config()?, checkpoint.as_ref())?;
    let placement = match &compute.placement {
        Some(path) => {
            let model_id = source.model_id(checkpoint.as_ref())?;
            Some(plan::read(path, &model_id, &footprint)?.body)
        }
        None => None,
    };
    drop(checkpoint);
    if let BackendChoice::Cuda(index) = compute.backend.resolve() {
        check_budget(compute, index, &footprint, max_tokens)?;
    }
    let bar = console.progress("load", 0, Unit::Bytes);
    let options = LoadOptions {
        backend: compute.backend,
        threads: compute.threads,
        cpu_precision: compute.cpu_precision.into(),
        gpu: compute.gpu(),
        kv_dtype: compute.kv_dtype,
        progress: &|done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
        max_tokens,
    };
    let engine = Engine::load(source, &options);
    bar.finish_and_clear();
    let mut engine = engine.map_err(|error| match error {
        EngineError::Backend(error @ BackendError::DoesNotFit { .. }) => {
            Failure::DoesNotFit(error.to_string()).into()
        }
        error => anyhow::Error::from(error),
    })?;
    engine
        .notes()
        .iter()
        .for_each(|note| console.note(format!("note: {note}")));
    if let Some(load) = engine.load_rates() {
        let gb_s = |seconds: f64| load.bytes as f64 / seconds.max(1e-9) / 1e9;
        console.detail(format!(
            "loaded {:.2} GB in {:.1} s, {:.2} GB/s: reading alone {:.2} GB/s, packing alone {:.2} GB/s",
            load.bytes as f64 / 1e9,
            load.seconds,
            gb_s(load.seconds),
            gb_s(load.read_seconds),
            gb_s(load.pack_seconds),
        ));
    }
    console.detail(format!(
        "model {} on backend {}, room for {max_tokens} tokens",
        source.id(),
        engine.backend().name
    ));
    if let Some(placement) = placement {
        place(&mut engine, compute, &placement, console)?;
    }
    Ok(engine)
}

/// Refuses a GPU budget that cannot hold the model without experts, or that is not free.
fn check_budget(
    compute: &ComputeArgs,
    index: usize,
    footprint: &Footprint,
    max_tokens: usize,
) -> anyhow::Result<()> {
    let kv = match compute.kv_dtype {
        Some(KvDtype::Int8) => planning::KvDtype::Int8,
        _ => planning::KvDtype::F16,
    };
    let kv_bytes = max_tokens as u64 * footprint.kv_bytes_per_token(kv);
    let needed = footprint.fixed_vram_bytes() + kv_bytes;
    let free = GpuReport::detect()
        .devices
        .get(index)
        .and_then(|gpu| gpu.memory_free_bytes);
    if let Some(budget) = compute.vram {
        if budget < needed {
            return Err(Failure::DoesNotFit(format!(
                "the model without experts needs {} of GPU memory, {} of it for {max_tokens} \
                 tokens of context; --vram is {}; raise it, or lower --ctx",
                show_bytes(needed),
                show_bytes(kv_bytes),
                show_bytes(budget)
            ))
            .into());
        }
        if let Some(free) = free.filter(|&free| free < budget) {
            return Err(Failure::DoesNotFit(format!(
                "--vram is {}, {} is free on the GPU: another process holds the rest",
                show_bytes(budget),
                show_bytes(free)
            ))
            .into());
        }
    }
    match free {
        Some(free) if free < needed => Err(Failure::DoesNotFit(format!(
            "the model without experts needs {} of GPU memory, {} is free; lower --ctx, or use \
             --backend cpu",
            show_bytes(needed),
            show_bytes(free)
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Puts experts where `placement` says, under the policy of the flags or its own. A placement that
/// knows no experts, because it was made without a profile, leaves them as they are.
pub fn place(
    engine: &mut Engine,
    compute: &ComputeArgs,
    placement: &Placement,
    console: &Console,
) -> anyhow::Result<()> {
    let policy = compute.policy.unwrap_or(placement.policy);
    let knows_experts = (placement.layers.iter())
        .any(|layer| !layer.pinned_experts.is_empty() || !layer.initial_experts.is_empty());
    if compute.cpu_moe || (!policy.is_dynamic() && !knows_experts) {
        return Ok(());
    }
    // Another policy pins other experts of the same order.
    let layers: Vec<LayerSlots> = (placement.layers.iter())
        .map(|layer| {
            let hottest = [&layer.pinned_experts[..], &layer.initial_experts].concat();
            match compute.policy {
                Some(policy) => policy.fill(layer.slots, &hottest),
                None => layer.clone(),
            }
        })
        .collect();
    engine.place(
        policy,
        &layers,
        placement.throttle.unwrap_or(Throttle::NONE),
    )?;
    if engine.experts().is_some() {
        let slots: usize = layers.iter().map(|layer| layer.slots).sum();
        console.note(format!("experts: {slots} slots, policy {}", policy.label()));
    }
    Ok(())
}
