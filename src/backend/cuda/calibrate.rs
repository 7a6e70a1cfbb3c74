//! How many missing experts the GPU reads over PCIe while the CPU computes the others, whether the
//! CPU fetches experts ahead, and into how many graphs a step is cut.
//!
//! GPU and CPU read the same RAM, so what that gains depends on the machine, and so does what a graph
//! costs: a few steps of each kind tell.
//! The choice then stays as it is: results of a run do not depend on timing.

use std::time::Instant;

use super::Cuda;
use crate::backend::Result;
use crate::hardware::probe::median;

/// Shares of a layer's missing experts that are tried, in percent.
pub(super) const SHARES: [usize; 6] = [0, 10, 20, 30, 40, 50];

/// Graphs that a step may be cut into: the first is handed to the driver sooner than the whole, but
/// between two of them the GPU stands still for a moment.
const PARTS: [usize; 2] = [4, 8];

/// Steps with each share, and those of them that don't count.
const STEPS: usize = 10;
const WARMUPS: usize = 3;

/// Below this many bytes of experts a step is over before timing means something.
const MIN_EXPERT_BYTES: u64 = 1 << 30;

/// Spreads token ids over the vocabulary.
pub(super) const ID_STRIDE: usize = 7919;

impl Cuda {
    /// Chooses what was not given: the share of misses that go over PCIe, and the rest.
    pub(super) fn calibrate(&mut self) -> Result<()> {
        let layers = self.model.shape.num_layers() as u64;
        let experts = self.model.shape.moe.num_experts as u64;
        let bytes = layers * experts * self.model.store.slot_bytes();
        let room = (SHARES.len() + 2 + PARTS.len()) * STEPS <= self.state.max_tokens;
        let given = self.options.split.is_some()
            || self.options.look_ahead.is_some()
            || self.options.parts.is_some();
        if given || bytes < MIN_EXPERT_BYTES || self.model.store.all_resident() || !room {
            return Ok(());
        }
        let mut tried = Vec::new();
        let mut best = self.time_steps(&mut tried, 0, "nothing over PCIe, nothing ahead")?;
        let (mut share, mut ahead) = (0, true);
        self.decode.look_ahead(true, &self.device)?;
        for percent in SHARES {
            self.set_pcie_share(percent)?;
            let name = format!("{percent}% over PCIe, fetching ahead");
            let ms = self.time_steps(&mut tried, percent + 1, &name)?;
            if ms < best {
                (best, share) = (ms, percent);
            }
        }
        self.set_pcie_share(share)?;
        self.decode.look_ahead(false, &self.device)?;
        let name = format!("{share}% over PCIe, nothing ahead");
        let ms = self.time_steps(&mut tried, 99, &name)?;
        if ms < best {
            (best, ahead) = (ms, false);
        }
        self.decode.look_ahead(ahead, &self.device)?;
        let mut parts = 1;
        for cut in PARTS {
            self.decode.cut_into(cut);
            let ms = self.time_steps(&mut tried, 100 + cut, &format!("in {cut} graphs"))?;
            if ms < best {
                (best, parts) = (ms, cut);
            }
        }
        self.decode.cut_into(parts);
        self.state.clear(&self.model.stream)?;
        self.take_times();
        self.notes = vec![format!(
            "of missing experts the GPU reads {share}% over PCIe{}; graphs of a step: {parts} \
             (median of steps: {})",
            if ahead {
                ", the CPU fetches its own ahead"
            } else {
                ""
            },
            tried.join("; ")
        )];
        Ok(())
    }

    /// Median time of a step as things are set, ms.
    fn time_steps(&mut self, tried: &mut Vec<String>, seed: usize, name: &str) -> Result<f64> {
        let mut times = Vec::new();
        self.take_times();
        for step in 0..STEPS {
            let id = (seed * STEPS + step) * ID_STRIDE % self.model.shape.vocab_size;
            let start = Instant::now();
            self.step_all(&[id as u32], 0..1, &mut |_, _, _| {})?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let median = median(&mut times[WARMUPS..]);
        let split = self.take_times();
        let foreseen = 100 * split.foreseen / split.experts_cpu.max(1);
        tried.push(format!("{name} {median:.2} ms, {foreseen}% foreseen"));
        Ok(median)
    }

    /// Of `m` missing experts the GPU reads this share over PCIe.
    pub(super) fn set_pcie_share(&mut self, percent: usize) -> Result<()> {
        let k = self.model.shape.moe.num_experts_per_tok;
        let split: Vec<i32> = (0..=k).map(|m| ((m * percent + 50) / 100) as i32).collect();
        self.decode.set_split(&split, &self.model.stream)
    }
}
