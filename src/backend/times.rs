//! Where decode steps spend their time, and where they find their experts.

/// Sums over decode steps, seen from the CPU that drives a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeTimes {
    pub steps: u64,
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
    /// Experts for the CPU that were foreseen while the GPU computed the layer before them, of those
    /// that it then had to compute
    pub foreseen: u64,
    /// Bytes of weights that went to the GPU
    pub h2d_bytes: u64,
}

impl DecodeTimes {
    pub fn add(&mut self, other: &DecodeTimes) {
        self.steps += other.steps;
        self.total_s += other.total_s;
        self.launch_s += other.launch_s;
        self.wait_gpu_s += other.wait_gpu_s;
        self.cpu_experts_s += other.cpu_experts_s;
        self.tail_s += other.tail_s;
        self.experts_cpu += other.experts_cpu;
        self.experts_vram += other.experts_vram;
        self.experts_pcie += other.experts_pcie;
        self.foreseen += other.foreseen;
        self.h2d_bytes += other.h2d_bytes;
    }
}

/// Bring `expert` into `slot` of `layer`, over what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotChange {
    pub layer: usize,
    pub slot: usize,
    pub expert: usize,
}
