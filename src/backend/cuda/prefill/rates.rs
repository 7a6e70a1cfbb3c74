//! At which rates a short prompt's missing experts reach the GPU, and are computed in RAM, both at once.
//!
//! Measured once, when a model is loaded, and fixed from then on: who computes an expert must not
//! depend on what else the machine does at that moment.

use std::time::Instant;

use super::super::Cuda;
use super::GROUP_EXPERTS;
use crate::backend::Result;
use crate::backend::cpu::offload::Pick;
use crate::hardware::probe::median;
use crate::planning::execution::{Streaming, Workspace};
use crate::planning::sharing::ShareRates;

/// Rounds, each with other experts, so that none is in a cache.
const ROUNDS: usize = 5;
/// Copies go on while the CPU computes: so many times the group's bytes at most.
const MAX_PASSES: usize = 64;
/// Tokens of an expert whose time is mostly that of its weights, and of one where it is mostly arithmetic.
const FEW_TOKENS: usize = 2;
const MANY_TOKENS: usize = 64;
/// The CPU computes this many experts with many tokens.
const MANY_TOKENS_EXPERTS: usize = 16;

impl Cuda {
    /// Measures [`ShareRates`] with the experts of the model's first layers.
    ///
    /// # Errors
    /// From the driver or a worker.
    pub(in super::super) fn measure_share_rates(&mut self) -> Result<()> {
        let places = Workspace::new(&self.prefill.sizes, 1, Streaming::Picked);
        let base = self.workspace(places.bytes)?;
        let ring = base + places.ring as u64;
        let [start, end] = [self.device.new_event()?, self.device.new_event()?];
        let dim = self.model.shape.hidden_size;
        let count = GROUP_EXPERTS.min(self.model.shape.moe.num_experts);
        let bytes = self.model.store.layout.blob_bytes as usize;
        let x: Vec<f32> = (0..MANY_TOKENS * dim)
            .map(|i| (i % 17) as f32 / 17.0 - 0.5)
            .collect();
        let mut out = vec![0.0; MANY_TOKENS * dim];
        let picks = |experts: usize, tokens: usize| -> Vec<Pick> {
            let of_token = |token: usize| {
                (0..experts).map(move |expert| Pick {
                    token: token as u32,
                    expert: expert as u16,
                    weight: 0.1,
                })
            };
            (0..tokens).flat_map(of_token).collect()
        };
        let [few, many] = [
            picks(count, FEW_TOKENS),
            picks(MANY_TOKENS_EXPERTS.min(count), MANY_TOKENS),
        ];
        // The first round tells how long copies must last.
        let mut passes = 1;
        // Seconds of an expert with few tokens, and with many.
        let (mut pcie, mut with_few, mut with_many) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let layer = |i: usize| (3 * round + i) % self.model.store.layers.len();
            self.copies.record(&start)?;
            for expert in (0..count).cycle().take(passes * count) {
                let (from, bytes) = self.model.store.blob(layer(0), expert);
                // SAFETY: the ring has room for an expert, and nobody uses it.
                unsafe { self.copies.copy_to_device(ring, from, bytes)? };
            }
            self.copies.record(&end)?;
            let since = Instant::now();
            let mut timed = |layer: usize, picks: &[Pick], tokens: usize| -> Result<f64> {
                let experts = &self.model.store.layers[layer].experts;
                let rows: Vec<u32> = (0..tokens as u32).collect();
                let since = Instant::now();
                let out = &mut out[..tokens * dim];
                (self.offload).compute_picks(experts, picks, &rows, &x, || Ok(()), out)?;
                Ok(since.elapsed().as_secs_f64())
            };
            with_few.push(timed(layer(1), &few, FEW_TOKENS)? / (few.len() / FEW_TOKENS) as f64);
            with_many
                .push(timed(layer(2), &many, MANY_TOKENS)? / (many.len() / MANY_TOKENS) as f64);
            let cpu_s = since.elapsed().as_secs_f64();
            self.copies.synchronize()?;
            let ms = f64::from(end.ms_since(&start)?);
            pcie.push((passes * count * bytes) as f64 / ms.max(1e-6) / 1e6);
            if round == 0 {
                passes = ((1e3 * cpu_s / ms.max(1e-3)).ceil() as usize).clamp(1, MAX_PASSES);
            }
        }
        let flops = self.prefill.sizes.expert_flops();
        let [few_s, many_s] = [median(&mut with_few), median(&mut with_many)];
        self.prefill.rates = fitted(median(&mut pcie), bytes, flops, [few_s, many_s]);
        self.give_slots_back()
    }

    /// What [`measure_share_rates`](Cuda::measure_share_rates) found, in words.
    pub(in super::super) fn share_rates_note(&self) -> String {
        let ShareRates {
            pcie_gb_s,
            cpu_gb_s,
            cpu_gflops,
        } = self.prefill.rates;
        format!(
            "short prompts: experts that are not in VRAM come at {pcie_gb_s:.1} GB/s, or are computed in RAM \
             at {cpu_gb_s:.1} GB/s and {cpu_gflops:.0} GFLOP/s"
        )
    }
}

/// Rates by which an expert takes as long as was measured, with few tokens and with many.
fn fitted(pcie_gb_s: f64, bytes: usize, flops: u64, [few_s, many_s]: [f64; 2]) -> ShareRates {
    let token_s = ((many_s - few_s) / (MANY_TOKENS - FEW_TOKENS) as f64).max(1e-9);
    let read_s = few_s - FEW_TOKENS as f64 * token_s;
    ShareRates {
        pcie_gb_s,
        cpu_gb_s: bytes as f64 / read_s.max(few_s / 10.0).max(1e-9) / 1e9,
        cpu_gflops: flops as f64 / token_s / 1e9,
    }
}
