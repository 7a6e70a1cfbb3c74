//! Carries out what a cache policy decides: tells it what the router picked, has the backend copy.
//!
//! The cache is the object that the simulator runs. It speaks of slots per layer; the backend keeps
//! the bytes, and until a copy is there the expert is computed from RAM.

use super::{Engine, Result};
use crate::backend::{Routing, SlotChange};
use crate::planning::ExpertCache;
use crate::planning::policy::{LayerSlots, PolicyConfig};
use crate::planning::{LayerCounts, Throttle};

/// The experts of a placement at run time.
pub struct ExpertManager {
    cache: ExpertCache,
    config: PolicyConfig,
    changes: Vec<SlotChange>,
}

impl ExpertManager {
    pub fn new(
        config: PolicyConfig,
        num_experts: usize,
        layers: &[LayerSlots],
        throttle: Throttle,
    ) -> Self {
        ExpertManager {
            cache: ExpertCache::build(config, num_experts, layers, throttle),
            config,
            changes: Vec::new(),
        }
    }

    /// `[layer][slot]`: the expert that each slot starts with.
    pub fn contents(&self, layers: usize) -> Vec<Vec<Option<u16>>> {
        (0..layers)
            .map(|layer| self.cache.contents(layer).to_vec())
            .collect()
    }

    /// Tells what the router chose in `layer`: one token is a decode step, more are prefill, which
    /// the policy only learns from.
    pub fn observe(&mut self, layer: usize, routing: &Routing, decode: bool) {
        let k = routing.num_experts_per_tok.max(1);
        for topk_ids in routing.topk_ids.chunks_exact(k) {
            if !decode {
                self.cache.learn(layer, topk_ids);
                continue;
            }
            for admit in self.cache.on_step(layer, topk_ids) {
                self.changes.push(SlotChange {
                    layer,
                    slot: usize::from(admit.slot),
                    expert: usize::from(admit.expert),
                });
            }
        }
    }

    /// What to copy since the last call.
    pub fn take_changes(&mut self) -> Vec<SlotChange> {
        std::mem::take(&mut self.changes)
    }

    pub fn config(&self) -> PolicyConfig {
        self.config
    }

    /// Hits and misses of decode steps, all layers together.
    pub fn counts(&self) -> LayerCounts {
        let mut total = LayerCounts::default();
        for counts in self.cache.counts() {
            total.hits += counts.hits;
            total.misses += counts.misses;
            total.admits += counts.admits;
        }
        total
    }

    pub fn reset_counts(&mut self) {
        self.cache.reset_counts();
    }
}

impl Engine {
    /// Puts experts where a placement says, and lets its policy change that from token to token.
    ///
    /// # Errors
    /// If the backend fails; one without a GPU ignores it.
    pub fn place(
        &mut self,
        config: PolicyConfig,
        layers: &[LayerSlots],
        throttle: Throttle,
    ) -> Result<()> {
        let num_experts = self.shape().moe.num_experts;
        let manager = ExpertManager::new(config, num_experts, layers, throttle);
        if self.runner.place(&manager.contents(layers.len()))? {
            self.experts = Some(manager);
        }
        Ok(())
    }

    /// The cache of a placement, if one was placed.
    pub fn experts(&mut self) -> Option<&mut ExpertManager> {
        self.experts.as_mut()
    }
}
