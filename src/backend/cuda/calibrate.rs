//! How many missing experts the GPU reads over PCIe while the CPU computes the others, whether the
//! CPU fetches experts ahead, and into how many graphs a step is cut.
//!
//! GPU and CPU read the same RAM, so what that gains depends on the machine, and so does what a graph
//! costs: steps of each kind, by turns, tell.
//! The choice then stays as it is: results of a run do not depend on timing.

use std::time::Instant;

use super::Cuda;
use crate::backend::{Diagnostics, Result, Tuning};
use crate::hardware::probe::median;

/// Shares of a layer's missing experts that are tried, in percent. They come to whole experts: between two
/// that are near, those of layers with some numbers of misses change.
const SHARES: [usize; 9] = [0, 10, 15, 20, 25, 30, 35, 40, 50];

/// Graphs that a step may be cut into: the first is handed to the driver sooner than the whole, but
/// between two of them the GPU stands still for a moment.
const PARTS: [usize; 3] = [1, 4, 8];

/// Rounds in which all candidates have a turn, and steps of a turn: a machine that is slower for a while is
/// so for all of them.
const ROUNDS: usize = 5;
const STEPS: usize = 4;

/// A candidate must be faster than those before it by this, or noise would choose.
const GAIN: f64 = 0.98;

/// Below this many bytes of experts a step is over before timing means something.
const MIN_EXPERT_BYTES: u64 = 1 << 30;

/// Spreads token ids over the vocabulary.
const ID_STRIDE: usize = 7919;

impl Cuda {
    /// Chooses what was not given: the share of misses that go over PCIe, and the rest.
    ///
    /// `None` where all was given, or there is nothing to choose.
    pub(super) fn calibrate(&mut self) -> Result<Option<Tuning>> {
        let given = self.options.split.is_some()
            || self.options.look_ahead.is_some()
            || self.options.parts.is_some();
        if given || self.is_too_small_to_time() || self.model.store.all_resident() {
            return Ok(None);
        }
        let mut tried = Vec::new();
        let share = self.calibrate_share(&mut tried)?;
        let names = [true, false].map(|on| {
            let what = if on { "fetching" } else { "nothing" };
            format!("{share}% over PCIe, {what} ahead")
        });
        let best = self.race(&mut tried, &names, |cuda, i| {
            cuda.decode.look_ahead(i == 0, &cuda.device)
        })?;
        let ahead = best == 0;
        self.decode.look_ahead(ahead, &self.device)?;
        let names = PARTS.map(|parts| format!("{parts} graphs"));
        let best = self.race(&mut tried, &names, |cuda, i| {
            cuda.decode.cut_into(PARTS[i]);
            Ok(())
        })?;
        let parts = PARTS[best];
        let tuning = Tuning {
            pcie_percent: share,
            look_ahead: ahead,
            graphs: parts,
        };
        self.apply(tuning)?;
        self.forget_sequences()?;
        self.take_times();
        self.notes = vec![self.share_rates_note()];
        self.notes.push(format!(
            "of missing experts the GPU reads {share}% over PCIe{}; graphs of a step: {parts} \
             (median of steps: {})",
            if ahead {
                ", the CPU fetches its own ahead"
            } else {
                ""
            },
            tried.join("; ")
        ));
        Ok(Some(tuning))
    }

    pub(super) fn is_too_small_to_time(&self) -> bool {
        let layers = self.model.shape.num_layers() as u64;
        let experts = self.model.shape.moe.num_experts as u64;
        layers * experts * self.model.store.slot_bytes() < MIN_EXPERT_BYTES
    }

    /// The share over PCIe with which steps take the least time, routers looking ahead; it is set then.
    /// None of a model too small to tell.
    pub(super) fn calibrate_share(&mut self, tried: &mut Vec<String>) -> Result<usize> {
        self.decode.look_ahead(true, &self.device)?;
        let best = match self.is_too_small_to_time() {
            true => 0,
            false => {
                let names = SHARES.map(|percent| format!("{percent}% over PCIe, fetching ahead"));
                self.race(tried, &names, |cuda, i| cuda.set_pcie_share(SHARES[i]))?
            }
        };
        self.set_pcie_share(SHARES[best])?;
        Ok(SHARES[best])
    }

    pub(super) fn apply(&mut self, tuning: Tuning) -> Result<()> {
        self.set_pcie_share(tuning.pcie_percent)?;
        self.decode.look_ahead(tuning.look_ahead, &self.device)?;
        self.decode.cut_into(tuning.graphs);
        Ok(())
    }

    /// The fastest of some candidates, which `set` sets by number, or one about as fast before it. They
    /// take turns, all with the same tokens.
    fn race(
        &mut self,
        tried: &mut Vec<String>,
        names: &[String],
        mut set: impl FnMut(&mut Self, usize) -> Result<()>,
    ) -> Result<usize> {
        let mut times = vec![Vec::new(); names.len()];
        let mut predicted = vec![0; names.len()];
        for round in 0..ROUNDS {
            for i in 0..names.len() {
                set(self, i)?;
                // The first step of a turn records its graph.
                self.timed_step(round * (1 + STEPS))?;
                self.take_times();
                for step in 1..=STEPS {
                    times[i].push(1e3 * self.timed_step(round * (1 + STEPS) + step)?);
                }
                let split = self.take_times();
                predicted[i] = 100 * split.predicted / split.experts_cpu.max(1);
            }
        }
        let mut best = (0, f64::INFINITY);
        for (i, name) in names.iter().enumerate() {
            let ms = median(&mut times[i]);
            tried.push(format!("{name} {ms:.2} ms, {}% predicted", predicted[i]));
            if ms < best.1 * GAIN || i == 0 {
                best = (i, ms);
            }
        }
        Ok(best.0)
    }

    /// Seconds of a step, logits included, with token number `number` of those that measurements use;
    /// where the context is full, the sequence starts over.
    pub(super) fn timed_step(&mut self, number: usize) -> Result<f64> {
        if self.states.active().position + 1 >= self.states.max_tokens() {
            self.forget_sequences()?;
        }
        let id = number * ID_STRIDE % self.model.shape.vocab_size;
        let start = Instant::now();
        self.step_all(&[id as u32], 0..1, &mut |_, _, _| {})?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Of `m` missing experts the GPU reads this share over PCIe.
    pub(super) fn set_pcie_share(&mut self, percent: usize) -> Result<()> {
        let k = self.model.shape.moe.num_experts_per_tok;
        let split: Vec<i32> = (0..=k).map(|m| ((m * percent + 50) / 100) as i32).collect();
        self.decode.set_split(&split, &self.model.stream)
    }
}
