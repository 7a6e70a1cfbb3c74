//! What this machine can really do: facts the system grants, and a few that are measured.
//!
//! A leaf: knows no model and no file format. Nothing here fails: a fact that cannot be read is
//! absent, and a machine without a GPU or without Linux is still described.

pub mod allocator;
pub mod cores;
pub mod cpu;
pub mod disk;
pub mod gpu;
pub mod gpu_probe;
pub mod memory;
pub mod monitor;
pub mod probe;
mod root;

use serde::{Deserialize, Serialize};

pub use cpu::{CpuFacts, CpuFeature};
pub use gpu::{GpuFacts, GpuReport, NvmlGpu};
pub use gpu_probe::GpuProbe;
pub use memory::{MemoryFacts, NumaNode};
pub use monitor::{GpuCounters, GpuReading, GpuSource, Monitor, MonitorRecord, Sample};
pub use probe::{DramProbe, ExpertProbe, Rate};

/// The body of hardware.json, and the machine part of run.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HardwareBody {
    /// Like `Linux (Debian GNU/Linux 12), kernel 6.1.0`.
    pub os: String,
    pub cpu: CpuFacts,
    pub memory: MemoryFacts,
    pub gpu: GpuReport,
    /// Only where it was measured; takes up to two seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dram: Option<DramProbe>,
    /// Only where it was asked for; takes some seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_experts: Option<ExpertProbe>,
    /// Only where it was asked for; takes up to a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_probe: Option<GpuProbe>,
}

impl HardwareBody {
    /// Everything that can be read in milliseconds, without measuring.
    pub fn detect() -> Self {
        let root = root::Root::system();
        Self {
            os: operating_system(),
            cpu: CpuFacts::read(&root),
            memory: MemoryFacts::read(&root),
            gpu: GpuReport::detect(),
            dram: None,
            cpu_experts: None,
            gpu_probe: None,
        }
    }

    /// [`detect`](Self::detect), then measures DRAM.
    pub fn measure() -> Self {
        let mut body = Self::detect();
        body.dram = probe::dram_read(&body.cpu, &body.memory, body.cpu.usable_cores());
        body
    }

    /// One line for footnotes: `AMD EPYC 9654, 2 cores, 23.4 GiB RAM, no GPU`.
    pub fn summary(&self) -> String {
        let cores = self.cpu.usable_cores();
        let gpu = match self.gpu.devices.as_slice() {
            [] => "no GPU".to_string(),
            [one] => one.name.clone(),
            [first, ..] => format!("{} × {}", self.gpu.devices.len(), first.name),
        };
        format!(
            "{}, {cores} {}, {:.0} GiB RAM, {gpu}",
            self.cpu.model_name,
            if cores == 1 { "core" } else { "cores" },
            self.memory.usable_total_bytes() as f64 / (1u64 << 30) as f64,
        )
    }
}

fn operating_system() -> String {
    let system = sysinfo::System::long_os_version().unwrap_or(std::env::consts::OS.to_string());
    let kernel = sysinfo::System::kernel_version().unwrap_or("unknown".to_string());
    format!("{system}, kernel {kernel}")
}
