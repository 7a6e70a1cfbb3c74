//! What `doctor --measure` finds out about a GPU and the bus before it.

use serde::{Deserialize, Serialize};

use super::Rate;

/// Measured with the engine's own kernels and hand-offs on a few layers of a synthetic model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuProbe {
    pub name: String,
    pub vram_bytes: u64,
    /// The synthetic model
    pub model: String,
    /// Pinned memory to the device and back, by the size of one copy, ascending
    pub h2d: Vec<CopyRate>,
    pub d2h: Vec<CopyRate>,
    /// Both directions together, each on a stream of its own
    pub both_ways: Rate,
    /// Copies within the device, bytes read and bytes written
    pub vram: Rate,
    /// Chosen experts read from VRAM by the kernels of a decode step; of these and the next three rates, what
    /// a kernel takes at least is left out: `step_kernel`
    pub expert_kernel: Rate,
    /// Weights of mixers and routers, and delta-net states read and written
    #[serde(default)]
    pub dense_kernel: Rate,
    /// The output head
    #[serde(default)]
    pub head_kernel: Rate,
    /// Keys and values of a long context
    #[serde(default)]
    pub kv_kernel: Rate,
    /// The same kernels reading the experts where they lie in RAM
    pub expert_kernel_over_pcie: Rate,
    /// Experts computed by the CPU
    pub cpu_experts: Rate,
    /// The same while copies to the device run, and those copies
    pub cpu_experts_beside_h2d: Rate,
    pub h2d_beside_cpu_experts: Rate,
    /// Missing experts shared out between both, in whole decode steps, best share
    pub cpu_and_pcie: Rate,
    /// What the experts of a layer take in whole decode steps, by how much of them is missing
    #[serde(default)]
    pub expert_wait: Vec<ExpertWait>,
    /// A kernel tells the CPU, which sets the flag that the next one waits for
    pub flag_round_trip: Micros,
    /// A kernel of a captured graph that has next to nothing to do
    pub kernel_node: Micros,
    /// The same where it may start while the one before it ends, as in a decode step
    pub step_kernel: Micros,
    /// What a layer takes longer if the CPU is asked, though it has nothing to compute
    pub handoff: Micros,
    pub seconds: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CopyRate {
    pub bytes: u64,
    pub rate: Rate,
}

/// Some of a token's experts in VRAM, the others in RAM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertWait {
    /// Of a layer and token in RAM, mean
    pub missing_bytes: f64,
    /// Of those, percent that the GPU read over PCIe
    #[serde(default)]
    pub pcie_percent: usize,
    /// Of those that the CPU computed, percent that it had predicted and fetched ahead
    #[serde(default, rename = "foreseen_percent")]
    pub predicted_percent: u64,
    /// All experts of the layer
    pub time: Micros,
}

/// Repetitions of one short thing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Micros {
    pub median_us: f64,
    /// Median absolute deviation from the median
    pub mad_us: f64,
    pub repetitions: usize,
}

impl Micros {
    pub fn of(mut us: Vec<f64>) -> Self {
        let repetitions = us.len();
        let (median_us, mad_us) = super::probe::median_and_mad(&mut us);
        Micros {
            median_us,
            mad_us,
            repetitions,
        }
    }
}

impl GpuProbe {
    /// Every rate by name.
    pub fn rates(&self) -> Vec<(String, &Rate)> {
        let mut rates: Vec<(String, &Rate)> = Vec::new();
        for (name, copies) in [("h2d", &self.h2d), ("d2h", &self.d2h)] {
            for CopyRate { bytes, rate } in copies {
                rates.push((format!("{name} of {:.1} MB", *bytes as f64 / 1e6), rate));
            }
        }
        for (name, rate) in [
            ("both ways", &self.both_ways),
            ("vram", &self.vram),
            ("expert kernel", &self.expert_kernel),
            ("dense kernels", &self.dense_kernel),
            ("head", &self.head_kernel),
            ("keys and values", &self.kv_kernel),
            ("expert kernel over PCIe", &self.expert_kernel_over_pcie),
            ("CPU experts", &self.cpu_experts),
            ("CPU experts beside copies", &self.cpu_experts_beside_h2d),
            ("copies beside CPU experts", &self.h2d_beside_cpu_experts),
            ("CPU and PCIe together", &self.cpu_and_pcie),
        ] {
            rates.push((name.to_string(), rate));
        }
        rates
    }

    /// Every duration by name.
    pub fn durations(&self) -> Vec<(String, &Micros)> {
        let mut durations = vec![
            ("flag round trip".to_string(), &self.flag_round_trip),
            ("kernel in a graph".into(), &self.kernel_node),
            ("kernel of a step".into(), &self.step_kernel),
            ("hand-off of a layer".into(), &self.handoff),
        ];
        for wait in &self.expert_wait {
            let name = format!(
                "experts of a layer, {:.1} MB missing, {}% over PCIe, {}% of the others predicted",
                wait.missing_bytes / 1e6,
                wait.pcie_percent,
                wait.predicted_percent
            );
            durations.push((name, &wait.time));
        }
        durations
    }
}
