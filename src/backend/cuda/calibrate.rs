//! How many missing experts the GPU reads over PCIe while the CPU computes the others.
//!
//! Both read the same RAM, so what it gains depends on the machine: a few steps with each share
//! tell. The share then stays as it is: results of a run do not depend on timing.

use std::time::Instant;

use super::Cuda;
use crate::backend::Result;

/// Shares of a layer's missing experts that are tried, in percent.
const SHARES: [usize; 6] = [0, 10, 20, 30, 40, 50];

/// Steps with each share, and those of them that don't count.
const STEPS: usize = 10;
const WARMUPS: usize = 3;

/// Below this many bytes of experts a step is over before timing means something.
const MIN_EXPERT_BYTES: u64 = 1 << 30;

/// Spreads token ids over the vocabulary.
const ID_STRIDE: usize = 7919;

impl Cuda {
    /// Chooses the share of misses that go over PCIe, unless it was given.
    pub(super) fn calibrate(&mut self) -> Result<()> {
        let layers = self.shape.num_layers() as u64;
        let experts = self.shape.moe.num_experts as u64;
        let bytes = layers * experts * self.store.slot_bytes();
        let room = SHARES.len() * STEPS <= self.state.max_tokens;
        let given = self.options.split.is_some();
        if given || bytes < MIN_EXPERT_BYTES || self.store.all_resident() || !room {
            return Ok(());
        }
        let mut best = (f64::INFINITY, 0);
        let mut tried = Vec::new();
        for (i, &share) in SHARES.iter().enumerate() {
            self.set_pcie_share(share)?;
            let mut times = Vec::new();
            for step in 0..STEPS {
                let id = (i * STEPS + step) * ID_STRIDE % self.shape.vocab_size;
                let start = Instant::now();
                self.step_all(&[id as u32], 0..1, &mut |_, _, _| {})?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            let mut times = times.split_off(WARMUPS);
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            tried.push(format!("{share}% {median:.2} ms"));
            if median < best.0 {
                best = (median, share);
            }
        }
        self.set_pcie_share(best.1)?;
        self.state.clear(&self.stream)?;
        self.take_times();
        self.notes = vec![format!(
            "of missing experts the GPU reads {}% over PCIe (a step took {})",
            best.1,
            tried.join(", ")
        )];
        Ok(())
    }

    fn set_pcie_share(&mut self, percent: usize) -> Result<()> {
        let k = self.shape.moe.num_experts_per_tok;
        let split: Vec<i32> = (0..=k).map(|m| ((m * percent + 50) / 100) as i32).collect();
        self.decode.set_split(&split, &self.stream)
    }
}
