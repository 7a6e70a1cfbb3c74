//! NVIDIA GPUs as the driver describes them, or why there are none.

use nvml_wrapper::enum_wrappers::device::PcieUtilCounter;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use serde::{Deserialize, Serialize};

use super::monitor::{GpuCounters, GpuReading, GpuSource};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuReport {
    pub devices: Vec<GpuFacts>,
    pub driver_version: Option<String>,
    /// The newest CUDA the driver can run, like `13.0`.
    pub cuda_version: Option<String>,
    /// Why `devices` is empty.
    pub none_because: Option<String>,
}

/// One GPU. What the driver does not tell is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    pub index: u32,
    pub name: String,
    /// Like `8.9`.
    pub compute_capability: Option<String>,
    pub memory_total_bytes: Option<u64>,
    pub memory_free_bytes: Option<u64>,
    /// Held by this process; absent where process ids are hidden (containers, WDDM).
    pub memory_used_by_process_bytes: Option<u64>,
    pub pcie_generation: Option<u32>,
    pub pcie_generation_max: Option<u32>,
    pub pcie_width: Option<u32>,
    pub pcie_width_max: Option<u32>,
    pub power_limit_w: Option<f64>,
}

impl GpuReport {
    pub fn detect() -> Self {
        let nvml = match Nvml::init() {
            Ok(nvml) => nvml,
            Err(error) => return Self::none(reason(&error)),
        };
        let devices: Vec<GpuFacts> = (0..nvml.device_count().unwrap_or(0))
            .filter_map(|index| Some(facts(index, &nvml.device_by_index(index).ok()?)))
            .collect();
        Self {
            none_because: devices
                .is_empty()
                .then(|| "the NVIDIA driver is loaded but shows no device".to_string()),
            devices,
            driver_version: nvml.sys_driver_version().ok(),
            cuda_version: nvml
                .sys_cuda_driver_version()
                .ok()
                .map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
        }
    }

    fn none(reason: String) -> Self {
        Self {
            none_because: Some(reason),
            ..Self::default()
        }
    }
}

fn reason(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => {
            "no NVIDIA driver is installed (its NVML library was not found)".to_string()
        }
        NvmlError::DriverNotLoaded => {
            "the NVIDIA driver is installed but not loaded; try `nvidia-smi`".to_string()
        }
        other => format!("NVML does not start: {other}"),
    }
}

fn facts(index: u32, device: &Device) -> GpuFacts {
    let memory = device.memory_info().ok();
    GpuFacts {
        index,
        name: device
            .name()
            .unwrap_or_else(|_| format!("unnamed NVIDIA GPU {index}")),
        compute_capability: device
            .cuda_compute_capability()
            .ok()
            .map(|c| format!("{}.{}", c.major, c.minor)),
        memory_total_bytes: memory.as_ref().map(|m| m.total),
        memory_free_bytes: memory.as_ref().map(|m| m.free),
        memory_used_by_process_bytes: used_by_this_process(device),
        pcie_generation: device.current_pcie_link_gen().ok(),
        pcie_generation_max: device.max_pcie_link_gen().ok(),
        pcie_width: device.current_pcie_link_width().ok(),
        pcie_width_max: device.max_pcie_link_width().ok(),
        power_limit_w: device.enforced_power_limit().ok().map(|mw| mw as f64 / 1e3),
    }
}

/// A GPU as NVML shows it while something runs.
pub struct NvmlGpu {
    nvml: Nvml,
    index: u32,
}

impl NvmlGpu {
    /// GPU `index`, if there is a driver that shows it.
    pub fn open(index: u32) -> Option<Self> {
        let nvml = Nvml::init().ok()?;
        nvml.device_by_index(index).ok()?;
        Some(Self { nvml, index })
    }
}

impl GpuSource for NvmlGpu {
    /// Takes about 40 ms where the GPU measures PCIe: each direction over a window of its own.
    fn read(&mut self) -> GpuReading {
        let Ok(gpu) = self.nvml.device_by_index(self.index) else {
            return GpuReading::default();
        };
        let utilisation = gpu.utilization_rates().ok();
        let pcie_gb_s = |way| Some(f64::from(gpu.pcie_throughput(way).ok()?) / 1e6);
        GpuReading {
            vram_bytes: used_by_this_process(&gpu)
                .or_else(|| gpu.memory_info().ok().map(|memory| memory.used)),
            utilisation_percent: utilisation.as_ref().map(|u| u.gpu),
            memory_utilisation_percent: utilisation.as_ref().map(|u| u.memory),
            power_w: gpu.power_usage().ok().map(|mw| f64::from(mw) / 1e3),
            pcie_rx_gb_s: pcie_gb_s(PcieUtilCounter::Receive),
            pcie_tx_gb_s: pcie_gb_s(PcieUtilCounter::Send),
        }
    }

    fn counters(&mut self) -> GpuCounters {
        let Ok(gpu) = self.nvml.device_by_index(self.index) else {
            return GpuCounters::default();
        };
        GpuCounters {
            energy_mj: gpu.total_energy_consumption().ok(),
        }
    }
}

fn used_by_this_process(device: &Device) -> Option<u64> {
    let pid = std::process::id();
    device
        .running_compute_processes()
        .ok()?
        .iter()
        .find(|process| process.pid == pid)
        .and_then(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_says_why() {
        let report = GpuReport::detect();
        assert_eq!(report.devices.is_empty(), report.none_because.is_some());
    }
}
