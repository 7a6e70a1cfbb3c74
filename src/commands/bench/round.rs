//! A quick profile and a plan from it, where no placement was given.

use super::{BenchArgs, PROFILE_RECORDS, PROFILE_TOKENS, gpu};
use crate::commands::console::Console;
use crate::commands::machine;
use crate::commands::profile::{self, Settings as ProfileSettings};
use crate::commands::{load, plan, workloads};
use crate::engine::Engine;
use crate::formats::Document;
use crate::formats::document::PLACEMENT;
use crate::hardware::HardwareBody;
use crate::planning::TraceReader;
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::Hardware;
use crate::planning::placement::{self, Placement};
use crate::planning::planner::{PlanRequest, RoutingSource};
use crate::planning::profile::ProfileBody;

/// The machine to plan for, if none was named: without a GPU this CPU, its RAM not measured yet.
pub fn machine(engine: &Engine, hardware: &HardwareBody) -> Hardware {
    match engine.backend().gpu() {
        Some(_) => machine::like_this(),
        None => machine::on_cpu(hardware),
    }
}

/// A quick profile on the built-in workloads and a plan from it, both kept beside the run.
///
/// # Errors
/// The engine's, or no plan that fits.
pub fn plan(
    args: &BenchArgs,
    hardware: Hardware,
    engine: &mut Engine,
    footprint: &Footprint,
    ctx: u64,
    console: &Console,
) -> anyhow::Result<(Document<Placement>, Document<ProfileBody>)> {
    let corpora = workloads::all()?;
    let settings = ProfileSettings::quick(PROFILE_RECORDS, PROFILE_TOKENS);
    let mut events = Vec::new();
    let profile = profile::record(
        engine,
        &corpora,
        &settings,
        None,
        Some(&mut events),
        console,
    )?;
    let path = args.output.join("profile.json");
    profile.write(&path)?;
    let (trace, _) = TraceReader::new(events.as_slice())?.read_all()?;
    let footprint = &gpu::measured(footprint, engine);
    let kv = args.compute.kv_dtype.map_or(KvDtype::F16, load::planned_kv);
    let held = engine.vram_held().unwrap_or_default();
    let vram_budget_bytes = args.compute.vram.unwrap_or_else(|| {
        // What the model holds already is not free, but the plan's to give.
        let free = plan::default_budget(footprint, ctx, kv);
        free + engine.vram_bytes().unwrap_or(0)
    });
    let mut placement = plan::make(&PlanRequest {
        footprint,
        hardware: &hardware,
        // The engine leaves this much free below any budget.
        vram_budget_bytes: vram_budget_bytes.saturating_sub(held.margin_bytes),
        ram_budget_bytes: None,
        ctx_tokens: ctx,
        sequences: 1,
        kv_dtypes: &[kv],
        heads: &[placement::Tier::Vram],
        policy: None,
        routing: RoutingSource::Trace(&trace),
        prefill: args.compute.prefill.settings(),
    })?;
    placement.vram_budget_bytes = vram_budget_bytes;
    let placement = Document::new(PLACEMENT, Some(engine.model_id().clone()), placement);
    let path = args.output.join("placement.json");
    placement.write(&path)?;
    tell(&placement.body, engine, console);
    Ok((placement, profile))
}

/// The plan; where no GPU carries it out, only what it says of the routing.
fn tell(placement: &Placement, engine: &Engine, console: &Console) {
    if engine.backend().gpu().is_some() {
        console.note(plan::describe(placement, true));
        return;
    }
    if let Some(validation) = &placement.validation {
        console.note(format!(
            "no GPU: all experts are computed from RAM. A GPU with {} of {} experts in slots would hit:\n{}",
            placement.total_slots(),
            placement.num_experts * placement.layers.len(),
            plan::held_out(validation).trim()
        ));
    }
}
