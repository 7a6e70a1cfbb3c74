//! A machine for the cost model: from hardware.json, by name, or what was measured just now.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::formats::Document;
use crate::formats::document::HARDWARE;
use crate::hardware::gpu_probe::Micros;
use crate::hardware::{GpuProbe, GpuReport, HardwareBody, Rate, probe};
use crate::planning::hardware::{CopyRate, Cpu, ExpertWait, Figure, Gpu, Hardware, KNOWN};

/// hardware.json as `doctor` writes it: what the machine is, and what plans are made from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HardwareFile {
    #[serde(flatten)]
    pub facts: HardwareBody,
    /// Absent if nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Hardware>,
}

/// A machine by name or by file.
#[derive(Clone, Debug)]
pub enum HardwareChoice {
    /// This one
    Here,
    Known(&'static str),
    File(PathBuf),
}

/// Names this machine.
pub const HERE: &str = "here";

impl FromStr for HardwareChoice {
    type Err = std::convert::Infallible;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if name == HERE {
            return Ok(HardwareChoice::Here);
        }
        let known = KNOWN.iter().find(|(known, _)| *known == name);
        Ok(known.map_or_else(
            || HardwareChoice::File(name.into()),
            |(name, _)| HardwareChoice::Known(name),
        ))
    }
}

impl HardwareChoice {
    /// # Errors
    /// If the file is no hardware.json, holds no figures, or figures that cannot be.
    pub fn load(&self) -> anyhow::Result<Hardware> {
        match self {
            HardwareChoice::Here => Ok(here()),
            HardwareChoice::Known(name) => Ok(Hardware::known(name).expect("it was found")),
            HardwareChoice::File(path) => read(path),
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Hardware> {
    /// The part that plans need: a file about another machine need not have the rest.
    #[derive(Deserialize)]
    struct Part {
        machine: Option<Hardware>,
    }
    if !path.exists() {
        let names: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
        bail!(
            "{}: there is no such file, and no machine of that name; known are {}",
            path.display(),
            names.join(", ")
        );
    }
    let file = Document::<Part>::read(path, HARDWARE)?.body;
    let Some(machine) = file.machine else {
        bail!(
            "{}: holds no measured figures; write it with `moectl doctor -o {0}`",
            path.display()
        );
    };
    machine
        .check()
        .with_context(|| path.display().to_string())?;
    Ok(machine)
}

/// This machine, its RAM measured in less than a second; its GPU, if it has one, as that of the known
/// machine most like it.
pub fn here() -> Hardware {
    let hardware = HardwareBody::detect();
    let dram = probe::dram_read_all_cores(&hardware.cpu, &hardware.memory);
    let this = of_facts(&hardware, dram.as_ref());
    match hardware.gpu.devices.is_empty() {
        true => this,
        false => with_cpu_of(this),
    }
}

/// This machine without a GPU; RAM that was not measured as common ones are.
pub fn on_cpu(hardware: &HardwareBody) -> Hardware {
    Hardware {
        gpu: None,
        ..of_facts(hardware, hardware.dram.as_ref().map(|dram| &dram.all_cores))
    }
}

/// This machine, if its RAM was measured; with its GPU if that was measured too.
pub fn this_machine(hardware: &HardwareBody) -> Option<Hardware> {
    let dram = &hardware.dram.as_ref()?.all_cores;
    Some(of_facts(hardware, Some(dram)))
}

fn of_facts(hardware: &HardwareBody, dram: Option<&Rate>) -> Hardware {
    let dram_read_gb_s = dram.map_or(Figure::modelled(DRAM_GB_S), figure);
    let gpu_probe = hardware.gpu_probe.as_ref();
    let kernels = hardware.cpu_experts.as_ref().map(|probe| &probe.batches);
    let one_token = kernels.and_then(|batches| batches.first());
    let many_tokens = kernels.and_then(|batches| batches.last());
    let expert_kernel_gb_s = match (gpu_probe, one_token) {
        // Cut as decode beside a GPU cuts it.
        (Some(probe), _) => figure(&probe.cpu_experts),
        (None, Some(batch)) => figure(&batch.weights),
        // The kernels wait for memory and for nothing else.
        (None, None) => Figure::modelled(dram_read_gb_s.value),
    };
    let expert_kernel_gflops = match many_tokens {
        Some(batch) => Figure {
            mad: Some(batch.mad_gflops),
            ..Figure::measured(batch.median_gflops)
        },
        None => Figure::modelled(GFLOPS_PER_CORE * hardware.cpu.usable_cores() as f64),
    };
    Hardware {
        label: hardware.summary(),
        cpu: Cpu {
            name: hardware.cpu.model_name.clone(),
            ram_bytes: hardware.memory.usable_total_bytes(),
            dram_read_gb_s,
            expert_kernel_gb_s,
            expert_kernel_gflops,
            disk_read_gb_s: Figure::modelled(DISK_GB_S),
        },
        gpu: gpu_probe.map(measured_gpu),
    }
}

fn figure(rate: &Rate) -> Figure {
    Figure {
        mad: Some(rate.mad_gb_s),
        ..Figure::measured(rate.median_gb_s)
    }
}

fn measured_gpu(probe: &GpuProbe) -> Gpu {
    let rate = |rate: &Rate| (rate.repetitions > 0).then(|| figure(rate));
    let share = probe.expert_kernel.median_gb_s / probe.vram.median_gb_s;
    let like = like_this().gpu.expect("known machines have one");
    Gpu {
        name: probe.name.clone(),
        vram_bytes: probe.vram_bytes,
        vram_gb_s: figure(&probe.vram),
        weight_kernel_share: Figure::measured(share.min(1.0)),
        dense_gb_s: rate(&probe.dense_kernel),
        lm_head_gb_s: rate(&probe.head_kernel),
        kv_cache_gb_s: rate(&probe.kv_kernel),
        h2d: (probe.h2d.iter())
            .map(|copy| CopyRate {
                bytes: copy.bytes,
                gb_s: figure(&copy.rate),
            })
            .collect(),
        cpu_and_pcie_gb_s: Some(figure(&probe.cpu_and_pcie)),
        expert_wait: waits(probe),
        // Prefill's arithmetic is not measured.
        gemm_tflops: Figure::modelled(like.gemm_tflops.value),
        attention_tflops: Figure::modelled(like.attention_tflops.value),
        kernel_boundary_us: duration(&probe.step_kernel, 0.0),
        // The difference of two steps; a flag alone takes that much at least.
        flag_round_trip_us: duration(&probe.handoff, probe.flag_round_trip.median_us),
    }
}

fn duration(time: &Micros, at_least_us: f64) -> Figure {
    Figure {
        mad: Some(time.mad_us),
        ..Figure::measured(time.median_us.max(at_least_us))
    }
}

/// The measured waits, each a little longer than those before it: where next to nothing is missing,
/// or a neighbour was busy, the order is noise.
fn waits(probe: &GpuProbe) -> Vec<ExpertWait> {
    let mut waits: Vec<ExpertWait> = Vec::new();
    for wait in &probe.expert_wait {
        let before = waits
            .last()
            .map_or((0.0, 0.0), |w| (w.missing_bytes, w.us.value));
        if wait.missing_bytes > before.0 {
            waits.push(ExpertWait {
                missing_bytes: wait.missing_bytes,
                us: duration(&wait.time, before.1 + 0.1),
            });
        }
    }
    waits
}

/// The known machine that is most like this one, to plan for before anything is measured.
pub fn like_this() -> Hardware {
    let gpus = GpuReport::detect().devices;
    let is = |part: &str| gpus.first().is_some_and(|gpu| gpu.name.contains(part));
    match is("H100") || is("H200") || is("A100") {
        true => Hardware::h100_box(),
        false => Hardware::laptop_4090(),
    }
}

/// As [`like_this`], with the RAM of this machine as it was measured.
pub fn with_gpu(hardware: &HardwareBody) -> Hardware {
    this_machine(hardware).map_or_else(like_this, with_cpu_of)
}

/// As [`like_this`], with this CPU and RAM. What RAM and PCIe deliver together goes with the RAM.
fn with_cpu_of(this: Hardware) -> Hardware {
    let mut machine = like_this();
    let share = this.cpu.dram_read_gb_s.value / machine.cpu.dram_read_gb_s.value;
    let both = machine
        .gpu
        .as_mut()
        .and_then(|gpu| gpu.cpu_and_pcie_gb_s.as_mut());
    if let Some(both) = both {
        both.value *= share;
    }
    machine.label = format!("{}; GPU as {}", this.label, machine.label);
    machine.cpu = this.cpu;
    machine
}

/// What the int16 kernels reached in prefill: 60 on a Xeon of 16 cores, 150 on an EPYC of 2.
const GFLOPS_PER_CORE: f64 = 80.0;
/// Two channels of DDR4-3200, as far as cores get through them.
const DRAM_GB_S: f64 = 30.0;
/// A common NVMe drive.
const DISK_GB_S: f64 = 3.0;
