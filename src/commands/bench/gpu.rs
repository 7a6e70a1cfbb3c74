//! GPU memory as the plan has it beside what the process holds, and the GPU's counters.

use crate::backend::VramMeter;
use crate::commands::args::ComputeArgs;
use crate::engine::Engine;
use crate::hardware::{GpuCounters, GpuReading, GpuSource, NvmlGpu};
use crate::planning::Placement;
use crate::planning::footprint::Footprint;

/// NVML's figures where there are any; of memory the engine's, which knows what is this process'.
pub struct Watched {
    nvml: Option<NvmlGpu>,
    held: VramMeter,
}

/// What to sample while `engine` runs; `None` where no GPU takes part.
pub fn watched(engine: &Engine) -> Option<Box<dyn GpuSource>> {
    Some(Box::new(Watched {
        nvml: NvmlGpu::open(engine.backend().gpu()?),
        held: engine.vram_meter()?,
    }))
}

impl GpuSource for Watched {
    fn read(&mut self) -> GpuReading {
        let reading = self.nvml.as_mut().map(|gpu| gpu.read());
        GpuReading {
            vram_bytes: (self.held)(),
            ..reading.unwrap_or_default()
        }
    }

    fn counters(&mut self) -> GpuCounters {
        let counters = self.nvml.as_mut().map(|gpu| gpu.counters());
        counters.unwrap_or_default()
    }
}

/// Context and workspace as this engine has them, in place of the estimates for machines unseen.
pub fn measured(footprint: &Footprint, engine: &Engine) -> Footprint {
    let mut footprint = footprint.clone();
    if let Some(held) = engine.vram_held() {
        footprint.context_bytes = held.context_bytes;
        let weights = footprint.always_read_bytes();
        footprint.workspace_bytes = held.other_bytes.saturating_sub(weights);
    }
    footprint
}

/// Whether what is in VRAM is what `placement` has there: its experts, or as many, in its budget.
///
/// A run with more room, or with all experts in RAM, is no test of the plan.
pub fn by_the_plan(engine: &Engine, compute: &ComputeArgs, placement: &Placement) -> bool {
    let within = match compute.vram {
        Some(budget) => budget == placement.vram_budget_bytes,
        None => engine.experts().is_some(),
    };
    engine.backend().gpu().is_some() && within && !compute.cpu_moe
}
