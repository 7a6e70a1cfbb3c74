//! Where decode steps spend their time, and where they find their experts.

use super::Routing;
use crate::planning::Offer;

/// Sums over decode steps, seen from the CPU that drives a GPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecodeTimes {
    pub steps: u64,
    /// Of all steps: as many, where each was of one sequence
    pub tokens: u64,
    pub total_s: f64,
    /// Handing the step to the driver
    pub launch_s: f64,
    /// Waiting for the GPU to reach the next router
    pub wait_gpu_s: f64,
    /// Computing experts in RAM; the GPU computes its own meanwhile, then waits
    pub cpu_experts_s: f64,
    /// From the last layer's experts to the logits
    pub tail_s: f64,
    /// Chosen experts that the CPU computed
    pub experts_cpu: u64,
    /// That were in VRAM
    pub experts_vram: u64,
    /// That the GPU read from RAM
    pub experts_pcie: u64,
    /// Experts for the CPU that were predicted while the GPU computed the layer before them, of those
    /// that it then had to compute
    pub predicted: u64,
    /// Experts that were brought into slots
    pub promotions: u64,
    /// Bytes copied over PCIe for those; none for what a prefill left there as it streamed by
    pub promoted_bytes: u64,
    /// Bytes of experts that went over PCIe: copies into slots, and what the GPU read where it lay in
    /// RAM. What a prefill streams by is not counted.
    pub h2d_bytes: u64,
    /// `[layer]`
    pub layers: Vec<LayerPicks>,
}

/// Where one layer's chosen experts were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerPicks {
    pub vram: u64,
    pub cpu: u64,
    pub pcie: u64,
}

impl LayerPicks {
    /// Of all picks, those that the CPU computed.
    pub fn cpu_share(&self) -> f64 {
        self.cpu as f64 / (self.vram + self.cpu + self.pcie).max(1) as f64
    }
}

impl DecodeTimes {
    /// One layer's choice in a step; what the GPU reads over PCIe is `blob_bytes` each.
    pub fn add_picks(&mut self, layer: usize, picks: LayerPicks, blob_bytes: u64) {
        self.experts_cpu += picks.cpu;
        self.experts_vram += picks.vram;
        self.experts_pcie += picks.pcie;
        self.h2d_bytes += picks.pcie * blob_bytes;
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, LayerPicks::default());
        }
        let sum = &mut self.layers[layer];
        sum.vram += picks.vram;
        sum.cpu += picks.cpu;
        sum.pcie += picks.pcie;
    }

    /// The times of one more step.
    pub fn add_step(&mut self, step: &StepTimes) {
        self.steps += 1;
        self.tokens += step.tokens as u64;
        self.total_s += step.total_s;
        self.launch_s += step.launch_s;
        self.wait_gpu_s += step.wait_gpu_s;
        self.cpu_experts_s += step.cpu_experts_s;
        self.tail_s += step.tail_s;
    }
}

/// One step of [`DecodeTimes`].
#[derive(Clone, Copy, Debug, Default)]
pub struct StepTimes {
    pub tokens: usize,
    pub total_s: f64,
    pub launch_s: f64,
    pub wait_gpu_s: f64,
    pub cpu_experts_s: f64,
    pub tail_s: f64,
}

/// How a backend shares missing experts between CPU and GPU, as calibration chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Of a layer's missing experts, how many the GPU reads over PCIe
    pub pcie_percent: usize,
    /// Whether the CPU fetches experts ahead
    pub look_ahead: bool,
    /// Graphs that a step is cut into
    pub graphs: usize,
}

/// Bring `expert` into `slot` of `layer`, over what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotChange {
    pub layer: usize,
    pub slot: usize,
    pub expert: usize,
}

/// Receives what the router chose in a prompt's last chunk (layer, position of the first token, the
/// choice) and answers with changes of that layer's slots, to experts that the last argument offers: none
/// where they are not at hand on the device.
pub type OnAdmission<'a> = dyn FnMut(usize, usize, &Routing, Offer<'_>) -> Vec<SlotChange> + 'a;

/// What each GPU kernel takes, in microseconds, all its launches together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelTimes {
    /// Of a decode step
    pub decode_us: Vec<(&'static str, f64)>,
    /// Of a chunk of so many tokens at the end of the context
    pub prefill_tokens: usize,
    pub prefill_us: Vec<(&'static str, f64)>,
}
