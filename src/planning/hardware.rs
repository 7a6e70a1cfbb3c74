//! A machine in a few numbers: the bandwidths that bound a token, each measured or modelled.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where a number comes from: this machine, or data sheets and experience.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    Measured,
    Modelled,
    /// Of a whole machine: some of its figures are measured, the others modelled.
    Mixed,
}

/// One figure of a machine; its unit is in the name of the field that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub value: f64,
    pub basis: Basis,
    /// Median absolute deviation of the measurements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mad: Option<f64>,
}

/// The part of hardware.json that plans are made from. Bandwidths are attainable ones, not those of
/// the data sheet; GB is 10^9.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hardware {
    pub label: String,
    pub cpu: Cpu,
    /// Absent: everything runs on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    pub name: String,
    pub ram_bytes: u64,
    pub dram_read_gb_s: Figure,
    /// Expert weights that the CPU kernels get through, all cores together, one token at a time.
    pub expert_kernel_gb_s: Figure,
    /// Arithmetic of the same kernels over many tokens.
    pub expert_kernel_gflops: Figure,
    pub disk_read_gb_s: Figure,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub name: String,
    pub vram_bytes: u64,
    /// Copies within the device, bytes read.
    pub vram_gb_s: Figure,
    /// Share of that bandwidth at which the kernels read weights in a decode step.
    pub weight_kernel_share: Figure,
    /// The same kernels' rates by what they read, without the boundaries between them; where absent, as that
    /// share has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_gb_s: Option<Figure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lm_head_gb_s: Option<Figure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_gb_s: Option<Figure>,
    /// Host to device, pinned memory, by the size of one copy, ascending.
    pub h2d: Vec<CopyRate>,
    /// Missing experts read by CPU kernels and by the GPU over PCIe at once, both together.
    /// Absent: the CPU alone computes what is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_and_pcie_gb_s: Option<Figure>,
    /// What the experts of a layer and token take in whole steps, by how many bytes of them are not in
    /// VRAM, ascending. Empty: as the rates have it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_wait: Vec<ExpertWait>,
    pub gemm_tflops: Figure,
    pub attention_tflops: Figure,
    pub kernel_boundary_us: Figure,
    /// Handing a layer's misses to the CPU and waiting for its flag.
    pub flag_round_trip_us: Figure,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyRate {
    pub bytes: u64,
    pub gb_s: Figure,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertWait {
    pub missing_bytes: f64,
    pub us: Figure,
}

/// A machine that cannot be: a file may say anything.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("hardware `{label}`: {field} is {found}, expected a positive number; measure it again")]
pub struct HardwareError {
    pub label: String,
    pub field: &'static str,
    pub found: f64,
}

/// Machines that can be planned for by name: name and hardware.json.
pub const KNOWN: [(&str, &str); 2] = [
    (
        "laptop-4090",
        include_str!("../../workloads/hardware/laptop-4090.json"),
    ),
    ("h100", include_str!("../../workloads/hardware/h100.json")),
];

impl Figure {
    pub fn measured(value: f64) -> Self {
        Figure {
            value,
            basis: Basis::Measured,
            mad: None,
        }
    }

    pub fn modelled(value: f64) -> Self {
        Figure {
            basis: Basis::Modelled,
            ..Figure::measured(value)
        }
    }
}

impl Gpu {
    /// At which the kernels of a decode step read experts, and whatever has no rate of its own.
    pub fn weight_read_gb_s(&self) -> f64 {
        self.vram_gb_s.value * self.weight_kernel_share.value
    }

    /// `rate`, or that of experts.
    pub fn rate_or_weight_read(&self, rate: Option<Figure>) -> f64 {
        rate.map_or(self.weight_read_gb_s(), |figure| figure.value)
    }

    /// Microseconds that the experts of a layer and token take with so many bytes missing: on straight
    /// lines from `all_there_us` through the measured points, and on beyond them. `None` if none was
    /// measured.
    pub fn expert_wait_us(&self, missing_bytes: f64, all_there_us: f64) -> Option<f64> {
        let last = self.expert_wait.len().checked_sub(1)?;
        let point = |i: usize| match i.checked_sub(1) {
            Some(i) => (
                self.expert_wait[i].missing_bytes,
                self.expert_wait[i].us.value,
            ),
            None => (0.0, all_there_us.min(self.expert_wait[0].us.value)),
        };
        let before = (self.expert_wait).partition_point(|w| w.missing_bytes < missing_bytes);
        let ((low, from), (high, to)) = (point(before.min(last)), point(before.min(last) + 1));
        Some(from + (to - from) * (missing_bytes - low) / (high - low))
    }

    /// Copy bandwidth at a size: between two measured sizes by the logarithm, beyond them the
    /// nearest.
    pub fn h2d_gb_s(&self, bytes: u64) -> f64 {
        let after = self.h2d.partition_point(|rate| rate.bytes < bytes);
        match (
            after.checked_sub(1).map(|i| self.h2d[i]),
            self.h2d.get(after),
        ) {
            (Some(low), Some(high)) => {
                let log = |bytes: u64| (bytes.max(1) as f64).ln();
                let part = (log(bytes) - log(low.bytes)) / (log(high.bytes) - log(low.bytes));
                low.gb_s.value + part * (high.gb_s.value - low.gb_s.value)
            }
            (Some(only), None) => only.gb_s.value,
            (None, Some(only)) => only.gb_s.value,
            (None, None) => 0.0,
        }
    }
}

impl Hardware {
    /// The machine of [`KNOWN`] with that name.
    pub fn known(name: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct File {
            machine: Hardware,
        }
        let (_, text) = KNOWN.iter().find(|(known, _)| *known == name)?;
        let file: File = serde_json::from_str(text).expect("a test reads every file");
        Some(file.machine)
    }

    /// A laptop with a 16 GB RTX 4090 and two channels of DDR5-5600.
    pub fn laptop_4090() -> Self {
        Self::known("laptop-4090").expect("it is in the list")
    }

    /// A server with one H100 and 16 cores of a Xeon.
    pub fn h100_box() -> Self {
        Self::known("h100").expect("it is in the list")
    }

    /// Of all figures together.
    pub fn basis(&self) -> Basis {
        let mut figures = self.figures().into_iter().map(|(_, figure)| figure.basis);
        let first = figures.next().expect("a machine has figures");
        match figures.all(|basis| basis == first) {
            true => first,
            false => Basis::Mixed,
        }
    }

    /// Names of the measured figures.
    pub fn measured(&self) -> Vec<&'static str> {
        let figures = self.figures().into_iter();
        let measured = figures.filter(|(_, figure)| figure.basis == Basis::Measured);
        let mut names: Vec<&str> = measured.map(|(name, _)| name).collect();
        names.dedup();
        names
    }

    /// # Errors
    /// Names the first bandwidth or rate that is not a positive number.
    pub fn check(&self) -> Result<(), HardwareError> {
        let wrong = |field, found| {
            Err(HardwareError {
                label: self.label.clone(),
                field,
                found,
            })
        };
        if let Some((field, figure)) = self
            .figures()
            .into_iter()
            .find(|(_, f)| !(f.value.is_finite() && f.value > 0.0))
        {
            return wrong(field, figure.value);
        }
        match &self.gpu {
            Some(gpu) if gpu.h2d.is_empty() => wrong("length of h2d", 0.0),
            Some(gpu) if !gpu.h2d.is_sorted_by(|a, b| a.bytes < b.bytes) => {
                wrong("ascending order of h2d", 0.0)
            }
            Some(gpu) if !is_ascending(&gpu.expert_wait) => {
                wrong("ascending order of expert_wait", 0.0)
            }
            _ => Ok(()),
        }
    }

    fn figures(&self) -> Vec<(&'static str, Figure)> {
        let cpu = &self.cpu;
        let mut figures = vec![
            ("dram_read_gb_s", cpu.dram_read_gb_s),
            ("expert_kernel_gb_s", cpu.expert_kernel_gb_s),
            ("expert_kernel_gflops", cpu.expert_kernel_gflops),
            ("disk_read_gb_s", cpu.disk_read_gb_s),
        ];
        if let Some(gpu) = &self.gpu {
            figures.extend([
                ("vram_gb_s", gpu.vram_gb_s),
                ("weight_kernel_share", gpu.weight_kernel_share),
                ("gemm_tflops", gpu.gemm_tflops),
                ("attention_tflops", gpu.attention_tflops),
                ("kernel_boundary_us", gpu.kernel_boundary_us),
                ("flag_round_trip_us", gpu.flag_round_trip_us),
            ]);
            figures.extend(gpu.h2d.iter().map(|rate| ("h2d gb_s", rate.gb_s)));
            figures.extend(gpu.dense_gb_s.map(|f| ("dense_gb_s", f)));
            figures.extend(gpu.lm_head_gb_s.map(|f| ("lm_head_gb_s", f)));
            figures.extend(gpu.kv_cache_gb_s.map(|f| ("kv_cache_gb_s", f)));
            figures.extend(gpu.cpu_and_pcie_gb_s.map(|f| ("cpu_and_pcie_gb_s", f)));
            figures.extend(
                gpu.expert_wait
                    .iter()
                    .map(|wait| ("expert_wait us", wait.us)),
            );
        }
        figures
    }
}

/// From some bytes on, each more than the one before.
fn is_ascending(waits: &[ExpertWait]) -> bool {
    waits.first().is_none_or(|w| w.missing_bytes > 0.0)
        && waits.is_sorted_by(|a, b| a.missing_bytes < b.missing_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_machine_is_read_and_sound() {
        for (name, _) in KNOWN {
            let machine = Hardware::known(name).unwrap();
            assert_eq!(machine.check(), Ok(()), "{name}");
        }
        assert_eq!(Hardware::laptop_4090().basis(), Basis::Modelled);
        let h100 = Hardware::h100_box();
        assert_eq!(h100.basis(), Basis::Mixed);
        assert_eq!(
            h100.measured(),
            [
                "dram_read_gb_s",
                "vram_gb_s",
                "kernel_boundary_us",
                "flag_round_trip_us",
                "h2d gb_s"
            ]
        );
        assert_eq!(Hardware::known("toaster"), None);
    }

    #[test]
    fn copy_rates_are_interpolated_between_the_measured_sizes() {
        let gpu = Hardware::h100_box().gpu.unwrap();
        assert_eq!(gpu.h2d_gb_s(1), 50.0);
        assert_eq!(gpu.h2d_gb_s(1_700_000), 50.0);
        assert_eq!(gpu.h2d_gb_s(1 << 40), 55.0);
        let between = gpu.h2d_gb_s(5_000_000);
        assert!(between > 52.0 && between < 53.0, "{between}");
    }

    #[test]
    fn waits_lie_on_lines_through_what_was_measured() {
        let mut gpu = Hardware::laptop_4090().gpu.unwrap();
        assert_eq!(gpu.expert_wait_us(1e6, 0.0), None);
        let wait = |missing_bytes, us| ExpertWait {
            missing_bytes,
            us: Figure::measured(us),
        };
        gpu.expert_wait = vec![wait(2e6, 30.0), wait(4e6, 40.0)];
        for (bytes, us) in [
            (0.0, 10.0),
            (1e6, 20.0),
            (2e6, 30.0),
            (3e6, 35.0),
            (6e6, 50.0),
        ] {
            assert_eq!(gpu.expert_wait_us(bytes, 10.0), Some(us));
        }
        gpu.expert_wait.swap(0, 1);
        let mut machine = Hardware::laptop_4090();
        machine.gpu = Some(gpu);
        let message = machine.check().unwrap_err().to_string();
        assert!(
            message.contains("ascending order of expert_wait"),
            "{message}"
        );
    }

    #[test]
    fn a_machine_without_copy_rates_is_refused() {
        let mut machine = Hardware::laptop_4090();
        machine.gpu.as_mut().unwrap().h2d.clear();
        let message = machine.check().unwrap_err().to_string();
        assert!(message.contains("length of h2d is 0"), "{message}");
    }
}
