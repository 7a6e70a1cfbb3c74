//! Loading a model the way the flags ask, with a progress bar.

use std::cell::OnceCell;
use std::path::Path;

use anyhow::Context;

use crate::backend::cpu::Progress;
use crate::backend::{BackendError, KvDtype};
use crate::commands::args::ComputeArgs;
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, cache_state, ram};
use crate::engine::experts::ExpertManager;
use crate::engine::footprint::footprint;
use crate::engine::{BackendChoice, Engine, EngineError, GpuOptions, LoadOptions};
use crate::formats::document::PLACEMENT;
use crate::formats::{Document, ModelId};
use crate::hardware::GpuReport;
use crate::model::Source;
use crate::planning::placement::Tier;
use crate::planning::units::show_bytes;
use crate::planning::{self, Footprint, LayerSlots, Placement, Throttle};

/// What is known of a model and its placement before weights are read.
pub struct Outline {
    pub footprint: Footprint,
    pub placement: Option<Document<Placement>>,
    /// Of the placement, gone on from the saved state
    experts: Option<ExpertManager>,
}

/// Reads headers, placement and saved cache; all that can be refused of them is refused here.
///
/// # Errors
/// A checkpoint, placement or cache file that cannot be read or is of another model.
pub fn outline(
    source: &Source,
    compute: &ComputeArgs,
    cache_file: Option<&Path>,
    console: &Console,
) -> anyhow::Result<Outline> {
    let checkpoint = source.local_checkpoint()?;
    let footprint = footprint(&source.config()?, checkpoint.as_ref())?;
    let model_id = source.model_id(checkpoint.as_ref())?;
    let placement = (compute.placement.as_deref())
        .map(|path| read_placement(path, &model_id, &footprint))
        .transpose()?;
    let mut experts = (placement.as_ref()).and_then(|p| manager(compute, &p.body));
    restore(cache_file, &model_id, experts.as_mut(), console)?;
    Ok(Outline {
        footprint,
        placement,
        experts,
    })
}

fn restore(
    cache_file: Option<&Path>,
    model_id: &ModelId,
    experts: Option<&mut ExpertManager>,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(path) = cache_file else {
        return Ok(());
    };
    let used = experts.is_some();
    if cache_state::restore(path, model_id, experts)? && used {
        console.note(format!("experts go on from {}", path.display()));
    }
    Ok(())
}

/// Reads a placement that was made for this model.
///
/// # Errors
/// A file that cannot be read or is of another model.
pub fn read_placement(
    path: &Path,
    model: &ModelId,
    footprint: &Footprint,
) -> anyhow::Result<Document<Placement>> {
    let document = Document::<Placement>::read(path, PLACEMENT)?;
    document.check_model(path, model)?;
    document
        .body
        .check(footprint)
        .with_context(|| path.display().to_string())?;
    Ok(document)
}

/// Loads the model with room for `max_tokens`; says what its owner should know.
///
/// # Errors
/// As for [`Engine::load`], or a placement that does not fit.
pub fn engine(
    source: &Source,
    compute: &ComputeArgs,
    outline: &mut Outline,
    max_tokens: usize,
    console: &Console,
) -> anyhow::Result<Engine> {
    engine_watched(source, compute, outline, max_tokens, console, &|_, _| {})
}

/// As [`engine`]; `watch` is told the bytes done so far and in all.
///
/// # Errors
/// As for [`engine`].
pub fn engine_watched(
    source: &Source,
    compute: &ComputeArgs,
    outline: &mut Outline,
    max_tokens: usize,
    console: &Console,
    watch: Progress<'_>,
) -> anyhow::Result<Engine> {
    let mut gpu = compute.gpu();
    let mut kv_dtype = compute.kv_dtype;
    if let BackendChoice::Cuda(index) = compute.backend.resolve() {
        if let Some(placement) = &outline.placement {
            gpu.head_in_ram = placement.body.head != Tier::Vram;
            kv_dtype = kv_dtype.or(Some(kv_of(&placement.body)));
        }
        let devices = GpuReport::detect().devices;
        check_budget(
            compute.vram,
            devices.get(index).and_then(|gpu| gpu.memory_free_bytes),
            &gpu,
            kv_dtype,
            &outline.footprint,
            max_tokens,
        )?;
    }
    ram::check(compute, gpu.head_in_ram, &outline.footprint, max_tokens)?;
    // Begins when weights are packed: what is downloaded before has a bar and a rate of its own.
    let bar = OnceCell::new();
    let options = LoadOptions {
        backend: compute.backend,
        threads: compute.threads,
        cpu_precision: compute.cpu_precision.unwrap_or_default().into(),
        gpu,
        kv_dtype,
        progress: &|done, total| {
            bar.get_or_init(|| console.progress("load", total as u64, Unit::Bytes))
                .set_position(done as u64);
            watch(done, total);
        },
        max_tokens,
    };
    let engine = Engine::load(source, &options);
    if let Some(bar) = bar.get() {
        bar.finish_and_clear();
    }
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
    if let Some(experts) = outline.experts.take() {
        start(&mut engine, experts, console)?;
    }
    Ok(engine)
}

fn start(engine: &mut Engine, experts: ExpertManager, console: &Console) -> anyhow::Result<()> {
    let (slots, policy) = (experts.total_slots(), experts.config().label());
    let Some(fitting) = engine.place(experts)? else {
        return Ok(());
    };
    console.note(format!("experts: {slots} slots, policy {policy}"));
    if fitting < slots {
        console.note(format!(
            "note: {fitting} of the placement's {slots} slots fit; experts of the others are \
             computed in RAM; raise --vram, lower --ctx, or plan for this budget"
        ));
    }
    Ok(())
}

/// What plans call a type of keys and values. They know no f32, which no GPU keeps.
pub fn planned_kv(dtype: KvDtype) -> planning::KvDtype {
    match dtype {
        KvDtype::Int8 => planning::KvDtype::Int8,
        KvDtype::F16 | KvDtype::F32 => planning::KvDtype::F16,
    }
}

/// The type of keys and values that a placement has room for.
fn kv_of(placement: &Placement) -> KvDtype {
    match placement.kv_dtype {
        planning::KvDtype::F16 => KvDtype::F16,
        planning::KvDtype::Int8 => KvDtype::Int8,
    }
}

/// Refuses a GPU budget that cannot hold the model without experts, or that is not free.
///
/// - `vram`: the budget, all that is free if none
/// - `free`: bytes free on the GPU, as far as known
fn check_budget(
    vram: Option<u64>,
    free: Option<u64>,
    gpu: &GpuOptions,
    kv_dtype: Option<KvDtype>,
    footprint: &Footprint,
    max_tokens: usize,
) -> anyhow::Result<()> {
    let kv = planned_kv(kv_dtype.unwrap_or(KvDtype::F16));
    let kv_bytes = max_tokens as u64 * footprint.kv_bytes_per_token(kv);
    let fixed_bytes = match gpu.head_in_ram {
        true => footprint.fixed_vram_bytes_without_head(),
        false => footprint.fixed_vram_bytes(),
    };
    let needed = fixed_bytes + kv_bytes;
    if let Some(budget) = vram {
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

/// As if `placement` had been given with the flags.
///
/// # Errors
/// A cache file that cannot be read or is of another placement; the engine's.
pub fn place(
    engine: &mut Engine,
    compute: &ComputeArgs,
    placement: &Placement,
    cache_file: Option<&Path>,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(mut experts) = manager(compute, placement) else {
        return Ok(());
    };
    restore(cache_file, engine.model_id(), Some(&mut experts), console)?;
    start(engine, experts, console)
}

/// The experts of `placement` under the policy of the flags or its own. A placement that knows no
/// experts, because it was made without a profile, leaves them as they are where none ever moves, and
/// else begins with any: an expert in a slot is better than none.
pub fn manager(compute: &ComputeArgs, placement: &Placement) -> Option<ExpertManager> {
    let policy = compute.policy.unwrap_or(placement.policy);
    let knows_experts = (placement.layers.iter())
        .any(|layer| !layer.pinned_experts.is_empty() || !layer.initial_experts.is_empty());
    if compute.cpu_moe || (!policy.is_dynamic() && !knows_experts) {
        return None;
    }
    let any: Vec<u16> = (0..placement.num_experts).map(|e| e as u16).collect();
    // Another policy pins other experts of the same order.
    let layers: Vec<LayerSlots> = (placement.layers.iter())
        .map(|layer| {
            let hottest = [&layer.pinned_experts[..], &layer.initial_experts].concat();
            match compute.policy {
                _ if !knows_experts => policy.fill(layer.slots, &any),
                Some(policy) => policy.fill(layer.slots, &hottest),
                None => layer.clone(),
            }
        })
        .collect();
    let throttle = placement.throttle.unwrap_or(Throttle::NONE);
    Some(ExpertManager::new(
        policy,
        placement.num_experts,
        &layers,
        throttle,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::footprint::tests::qwen3_next_80b;

    #[test]
    fn a_gpu_budget_must_hold_weights_keys_and_values_to_the_byte() {
        let f = qwen3_next_80b();
        for (head_in_ram, kv_dtype, fixed, per_token) in [
            (false, None, f.fixed_vram_bytes(), 24_576),
            (false, Some(KvDtype::Int8), f.fixed_vram_bytes(), 13_056),
            (
                true,
                Some(KvDtype::F16),
                f.fixed_vram_bytes_without_head(),
                24_576,
            ),
        ] {
            let gpu = GpuOptions {
                head_in_ram,
                ..GpuOptions::default()
            };
            let check = |vram, free| check_budget(vram, free, &gpu, kv_dtype, &f, 5000);
            let needed = fixed + 5000 * per_token;
            for (vram, free) in [
                (Some(needed), None),
                (Some(needed), Some(needed)),
                (None, Some(needed)),
                (None, None),
            ] {
                assert!(check(vram, free).is_ok(), "{vram:?} {free:?}");
            }
            for (vram, free, part) in [
                (Some(needed - 1), None, "--vram is"),
                (Some(needed + 1), Some(needed), "another process"),
                (None, Some(needed - 1), "lower --ctx"),
            ] {
                let error = check(vram, free).unwrap_err();
                assert!(error.to_string().contains(part), "{error}");
                assert!(matches!(error.downcast_ref(), Some(Failure::DoesNotFit(_))));
            }
        }
    }
}
