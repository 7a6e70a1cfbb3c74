//! A machine in a few numbers: the bandwidths that bound a token, measured or modelled.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Whether the numbers come from this machine or from data sheets and experience.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    Measured,
    Modelled,
}

/// Body of hardware.json. Bandwidths are attainable ones, not those of the data sheet; GB is 10^9.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hardware {
    pub label: String,
    pub basis: Basis,
    pub cpu: Cpu,
    /// Absent: everything runs on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    pub name: String,
    pub ram_bytes: u64,
    pub dram_read_gb_s: f64,
    /// Expert weights that the CPU kernels get through, all cores together, one token at a time.
    pub expert_kernel_gb_s: f64,
    /// Arithmetic of the same kernels over many tokens.
    pub expert_kernel_gflops: f64,
    pub disk_read_gb_s: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub name: String,
    pub vram_bytes: u64,
    pub vram_gb_s: f64,
    /// Host to device, pinned memory, copies of an expert's size.
    pub h2d_gb_s: f64,
    pub gemm_tflops: f64,
    pub attention_tflops: f64,
    /// Kernel boundaries of one layer in one token.
    pub launch_us_per_layer: f64,
    /// Handing a layer's misses to the CPU and waiting for its flag.
    pub handoff_us_per_layer: f64,
}

/// A machine that cannot be: a file may say anything.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("hardware `{label}`: {field} is {found}, expected a positive number; measure it again")]
pub struct HardwareError {
    pub label: String,
    pub field: &'static str,
    pub found: f64,
}

impl Hardware {
    /// # Errors
    /// Names the first bandwidth or rate that is not a positive number.
    pub fn check(&self) -> Result<(), HardwareError> {
        let cpu = &self.cpu;
        let mut fields = vec![
            ("dram_read_gb_s", cpu.dram_read_gb_s),
            ("expert_kernel_gb_s", cpu.expert_kernel_gb_s),
            ("expert_kernel_gflops", cpu.expert_kernel_gflops),
            ("disk_read_gb_s", cpu.disk_read_gb_s),
        ];
        if let Some(gpu) = &self.gpu {
            fields.extend([
                ("vram_gb_s", gpu.vram_gb_s),
                ("h2d_gb_s", gpu.h2d_gb_s),
                ("gemm_tflops", gpu.gemm_tflops),
                ("attention_tflops", gpu.attention_tflops),
                ("launch_us_per_layer", gpu.launch_us_per_layer),
                ("handoff_us_per_layer", gpu.handoff_us_per_layer),
            ]);
        }
        match fields
            .into_iter()
            .find(|(_, n)| !(n.is_finite() && *n > 0.0))
        {
            None => Ok(()),
            Some((field, found)) => Err(HardwareError {
                label: self.label.clone(),
                field,
                found,
            }),
        }
    }

    /// A laptop with a 16 GB RTX 4090 and two channels of DDR5-5600.
    pub fn laptop_4090() -> Self {
        Hardware {
            label: "laptop: RTX 4090 16 GB, dual-channel DDR5-5600".into(),
            basis: Basis::Modelled,
            cpu: Cpu {
                name: "8 performance cores, AVX2".into(),
                ram_bytes: 64 << 30,
                dram_read_gb_s: 76.0,
                expert_kernel_gb_s: 65.0,
                expert_kernel_gflops: 800.0,
                disk_read_gb_s: 5.0,
            },
            gpu: Some(Gpu {
                name: "NVIDIA GeForce RTX 4090 Laptop GPU".into(),
                vram_bytes: 16 << 30,
                vram_gb_s: 461.0,
                h2d_gb_s: 25.0,
                gemm_tflops: 40.0,
                attention_tflops: 40.0,
                launch_us_per_layer: 1000.0 / 48.0,
                handoff_us_per_layer: 400.0 / 48.0,
            }),
        }
    }

    /// A server with one H100 and eight memory channels, of which a share is ours.
    pub fn h100_box() -> Self {
        Hardware {
            label: "server: H100 80 GB, AVX-512 Xeon".into(),
            basis: Basis::Modelled,
            cpu: Cpu {
                name: "16 cores, AVX-512 VNNI".into(),
                ram_bytes: 128 << 30,
                dram_read_gb_s: 150.0,
                expert_kernel_gb_s: 125.0,
                expert_kernel_gflops: 2000.0,
                disk_read_gb_s: 3.0,
            },
            gpu: Some(Gpu {
                name: "NVIDIA H100 80GB HBM3".into(),
                vram_bytes: 80 << 30,
                vram_gb_s: 2180.0,
                h2d_gb_s: 52.0,
                gemm_tflops: 350.0,
                attention_tflops: 400.0,
                launch_us_per_layer: 1000.0 / 48.0,
                handoff_us_per_layer: 400.0 / 48.0,
            }),
        }
    }
}
