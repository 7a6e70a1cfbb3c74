//! The expert cache as the simulator and the run time drive it: a policy held to a byte budget.
//!
//! A step is one token in one layer:
//!
//! ```text
//! 1. look up every pick       cache.slot(layer, expert)     hit: the slot's bytes; miss: from RAM
//! 2. tell the cache           cache.on_step(layer, ids)     counts, and what to copy now
//! 3. copy what it says        before this layer's next step, over what it evicts
//! ```
//!
//! What step 2 admits serves the layer's next token. A copy that is late must be waited for, or the
//! pick computed from RAM; the counts stay those of the slot map, equal in both worlds to the last
//! hit. Prefill that does not use the cache calls [`ExpertCache::learn`] instead of step 2, and
//! [`ExpertCache::admit_prefill`] at its end.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::policy::{Admit, LayerSlots, LayerState, Offer, Policy, PolicyConfig};

/// How many experts may be copied, in the long run and at once.
///
/// Per layer, so that the order in which layers and tokens come (token by token in decode, layer by
/// layer in a chunk) changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Throttle {
    /// Experts per token and layer.
    pub admits_per_step: f64,
    /// What may be saved up for a change of topic.
    pub burst_admits: f64,
}

impl Throttle {
    pub const NONE: Throttle = Throttle {
        admits_per_step: f64::INFINITY,
        burst_admits: f64::INFINITY,
    };

    /// From bytes per token for all layers; what sixteen tokens may copy may be saved up.
    pub fn of_bytes(bytes_per_token: f64, expert_bytes: u64, num_layers: usize) -> Self {
        let per_step = bytes_per_token / (expert_bytes.max(1) as f64 * num_layers.max(1) as f64);
        Throttle {
            admits_per_step: per_step,
            burst_admits: (16.0 * per_step).max(1.0),
        }
    }
}

/// What happened in one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerCounts {
    pub hits: u64,
    pub misses: u64,
    /// Experts copied into slots.
    pub admits: u64,
}

impl LayerCounts {
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }
}

/// At the end of a prompt at most one in so many slots changes where the copies go over PCIe. On a synthetic
/// 80B model with 146 slots a layer, cold before each prompt of 4,000 tokens: 65.6% of the picks after it hit
/// without, 67.7% so, 68.0% with no limit and twice the copies; an eighth takes some 30 ms over PCIe.
const ADMITTED: usize = 8;

/// The caches of all layers with their budgets and counts.
pub struct ExpertCache {
    policy: Box<dyn Policy>,
    throttle: Throttle,
    /// Experts each layer may still copy.
    allowance: Vec<f64>,
    counts: Vec<LayerCounts>,
    /// Of the last step.
    admits: Vec<Admit>,
}

/// A saved cache that is none of this model, placement or policy.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    #[error("cache state: {what} is {found}, this run has {expected}; start without it")]
    Different {
        what: &'static str,
        found: String,
        expected: String,
    },
    #[error("cache state: layer {layer}: {reason}; start without it")]
    Layer { layer: usize, reason: String },
}

/// The body of a cache-state file: where the policy was when the program ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheState {
    pub policy: PolicyConfig,
    pub num_experts: usize,
    pub layers: Vec<LayerState>,
}

impl ExpertCache {
    pub fn new(policy: Box<dyn Policy>, num_layers: usize, throttle: Throttle) -> Self {
        ExpertCache {
            policy,
            throttle,
            allowance: vec![throttle.burst_admits; num_layers],
            counts: vec![LayerCounts::default(); num_layers],
            admits: Vec::new(),
        }
    }

    /// As a placement describes it.
    ///
    /// # Panics
    /// As [`PolicyConfig::build`]; [`super::Placement::check`] refuses such placements.
    pub fn build(
        config: PolicyConfig,
        num_experts: usize,
        layers: &[LayerSlots],
        throttle: Throttle,
    ) -> Self {
        Self::new(config.build(num_experts, layers), layers.len(), throttle)
    }

    /// The slot that holds `expert` now; none is a miss.
    pub fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.policy.slot(layer, expert)
    }

    /// `[slots]` the expert in each slot of a layer.
    pub fn contents(&self, layer: usize) -> &[Option<u16>] {
        self.policy.contents(layer)
    }

    /// One token's picks in `layer`, distinct and best first: counts hits and misses as the slots
    /// are now, then changes them. Returns what to copy, the most wanted first.
    pub fn on_step(&mut self, layer: usize, topk_ids: &[u16]) -> &[Admit] {
        let counts = &mut self.counts[layer];
        for &expert in topk_ids {
            match self.policy.slot(layer, expert) {
                Some(_) => counts.hits += 1,
                None => counts.misses += 1,
            }
        }
        let allowance = &mut self.allowance[layer];
        *allowance = (*allowance + self.throttle.admits_per_step).min(self.throttle.burst_admits);
        // A float to integer cast saturates, so no limit is no limit.
        let room = *allowance as usize;
        self.admits.clear();
        self.policy.access(layer, topk_ids, room, &mut self.admits);
        let admitted = self.admits.len();
        counts.admits += admitted as u64;
        *allowance -= admitted as f64;
        &self.admits
    }

    /// The next picks belong to another sequence.
    pub fn begin_sequence(&mut self) {
        self.policy.begin_sequence();
    }

    /// Picks that did not go through the slots, such as those of a streamed prefill: the policy
    /// learns from them, the slots stay, nothing is counted.
    pub fn learn(&mut self, layer: usize, topk_ids: &[u16]) {
        self.admits.clear();
        self.policy.access(layer, topk_ids, 0, &mut self.admits);
        assert!(self.admits.is_empty(), "a policy admitted without room");
    }

    /// After [`ExpertCache::learn`] of a prompt: what to copy into `layer` so that its slots suit what
    /// was recorded, the most wanted of the offered first. Each copy must pay back as any other.
    /// The byte budget is that of steps and does not count here.
    pub fn admit_prefill(&mut self, layer: usize, offer: Offer<'_>) -> &[Admit] {
        self.admits.clear();
        self.policy.admit_prefill(layer, offer, &mut self.admits);
        self.counts[layer].admits += self.admits.len() as u64;
        &self.admits
    }

    /// What [`ExpertCache::admit_prefill`] may copy into `layer` where the copies go over PCIe: a share of the slots.
    pub fn admitted_over_pcie(&self, layer: usize) -> usize {
        (self.policy.contents(layer).len() / ADMITTED).max(1)
    }

    /// `[layer]` since the start, or since the last [`ExpertCache::reset_counts`].
    pub fn counts(&self) -> &[LayerCounts] {
        &self.counts
    }

    pub fn reset_counts(&mut self) {
        self.counts.fill(LayerCounts::default());
    }

    /// What a later run needs to go on from here.
    ///
    /// # Panics
    /// If the policy is one of the simulator alone.
    pub fn state(&self, config: PolicyConfig) -> CacheState {
        let layer = |l| self.policy.state(l).expect("a policy of the run time");
        let layers: Vec<LayerState> = (0..self.counts.len()).map(layer).collect();
        CacheState {
            policy: config,
            num_experts: layers.first().map_or(0, |l| l.worth.len()),
            layers,
        }
    }

    /// Goes on from a saved state. The caller copies every expert of [`ExpertCache::contents`].
    ///
    /// # Errors
    /// [`StateError`] if the state is of another policy or other slots, or contradicts itself; the
    /// cache is as it was.
    pub fn restore(&mut self, config: PolicyConfig, state: &CacheState) -> Result<(), StateError> {
        state.check(config, &self.shape())?;
        for (layer, saved) in state.layers.iter().enumerate() {
            self.policy.restore(layer, saved);
        }
        self.allowance.fill(self.throttle.burst_admits);
        Ok(())
    }

    /// `[layer]` contents.
    fn shape(&self) -> Vec<&[Option<u16>]> {
        let layers = 0..self.counts.len();
        layers.map(|l| self.policy.contents(l)).collect()
    }
}

impl CacheState {
    /// Refuses a state that lacks what `layers` never let go: it is of another placement.
    ///
    /// # Errors
    /// [`StateError::Layer`], naming the first such expert.
    pub fn check_pins(&self, layers: &[LayerSlots]) -> Result<(), StateError> {
        for (layer, (saved, planned)) in self.layers.iter().zip(layers).enumerate() {
            let missing = |expert: &&u16| !saved.experts.contains(&Some(**expert));
            if let Some(expert) = planned.pinned_experts.iter().find(missing) {
                let reason = format!("this placement pins expert {expert}, which it does not hold");
                return Err(StateError::Layer { layer, reason });
            }
        }
        Ok(())
    }

    fn check(&self, config: PolicyConfig, now: &[&[Option<u16>]]) -> Result<(), StateError> {
        let different = |what, found: String, expected: String| {
            Err(StateError::Different {
                what,
                found,
                expected,
            })
        };
        if self.policy != config {
            return different("the policy", self.policy.label(), config.label());
        }
        if self.layers.len() != now.len() {
            let (found, expected) = (self.layers.len(), now.len());
            return different("layers", found.to_string(), expected.to_string());
        }
        for (layer, (saved, now)) in self.layers.iter().zip(now).enumerate() {
            let wrong = |reason| Err(StateError::Layer { layer, reason });
            if saved.experts.len() != now.len() {
                let (found, expected) = (saved.experts.len(), now.len());
                return wrong(format!("{found} slots, this run has {expected}"));
            }
            if saved.worth.len() != self.num_experts || saved.worth.iter().any(|w| !w.is_finite()) {
                return wrong("the list of experts is damaged".into());
            }
            let mut seen = vec![false; self.num_experts];
            for &expert in saved.experts.iter().flatten() {
                match seen.get_mut(usize::from(expert)) {
                    None => return wrong(format!("there is no expert {expert}")),
                    Some(true) => return wrong(format!("expert {expert} is named twice")),
                    Some(new) => *new = true,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::Record;
    use super::super::trace::tests::synthetic;
    use super::*;

    const LFU: PolicyConfig = PolicyConfig::LfuDecay {
        half_life_tokens: 20.0,
        margin_picks: 0.0,
    };
    const ALL: [PolicyConfig; 6] = [
        PolicyConfig::Static,
        PolicyConfig::Lru,
        PolicyConfig::LruPinned { pinned_share: 0.4 },
        PolicyConfig::LruThreshold {
            min_picks: 1.5,
            half_life_tokens: 20.0,
        },
        LFU,
        PolicyConfig::LeastStale,
    ];

    fn cache(config: PolicyConfig, slots: usize, throttle: Throttle) -> ExpertCache {
        let hottest: Vec<u16> = (0..16).collect();
        let layers = vec![config.fill(slots, &hottest); 3];
        ExpertCache::build(config, 16, &layers, throttle)
    }

    fn steps(records: &[Record]) -> Vec<(usize, Vec<u16>)> {
        let mut steps = Vec::new();
        for record in records {
            if let Record::Picks(p) = record {
                let tokens = p.topk_ids.chunks_exact(4);
                steps.extend(tokens.map(|ids| (usize::from(p.layer), ids.to_vec())));
            }
        }
        steps
    }

    #[test]
    fn a_budget_holds_in_the_long_run_and_at_once() {
        let trace = synthetic(3, 16, 4, 4, 90);
        let throttle = Throttle {
            admits_per_step: 0.25,
            burst_admits: 2.0,
        };
        for config in ALL {
            let mut limited = cache(config, 6, throttle);
            for (layer, ids) in steps(trace.records()) {
                assert!(limited.on_step(layer, &ids).len() <= 2, "{}", config.name());
            }
            for counts in limited.counts() {
                let steps = (counts.hits + counts.misses) / 4;
                assert!(counts.admits as f64 <= 2.0 + 0.25 * steps as f64);
                assert!(config == PolicyConfig::Static || counts.admits > 0);
            }
        }
    }

    #[test]
    fn the_order_of_layers_and_tokens_changes_nothing() {
        let trace = synthetic(3, 16, 4, 3, 60);
        let throttle = Throttle::of_bytes(30.0, 10, 3);
        for config in ALL {
            let mut as_recorded = cache(config, 5, throttle);
            let mut by_layer = cache(config, 5, throttle);
            let mut steps = steps(trace.records());
            for (layer, ids) in &steps {
                as_recorded.on_step(*layer, ids);
            }
            steps.sort_by_key(|(layer, _)| *layer);
            for (layer, ids) in &steps {
                by_layer.on_step(*layer, ids);
            }
            assert_eq!(as_recorded.counts(), by_layer.counts());
        }
    }

    #[test]
    fn a_copy_that_does_not_pay_back_is_not_made() {
        let picky = PolicyConfig::LfuDecay {
            half_life_tokens: 1e6,
            margin_picks: 2.5,
        };
        let mut cache = cache(picky, 1, Throttle::NONE);
        // Expert 0 is resident with no picks; expert 9 must be ahead by more than 2.5.
        assert!(cache.on_step(0, &[9]).is_empty());
        assert!(cache.on_step(0, &[9]).is_empty());
        let admitted = cache.on_step(0, &[9]);
        assert_eq!(
            admitted,
            [Admit {
                expert: 9,
                slot: 0,
                evicted: Some(0)
            }]
        );
        assert_eq!(cache.slot(0, 9), Some(0));
        assert_eq!(cache.slot(0, 0), None);
    }

    #[test]
    fn prefill_teaches_without_moving_anything() {
        let mut cache = cache(LFU, 2, Throttle::NONE);
        for _ in 0..5 {
            cache.learn(0, &[7, 8]);
        }
        assert_eq!(cache.contents(0), [Some(0), Some(1)]);
        assert_eq!(cache.counts()[0], LayerCounts::default());
        // What it recorded decides at the first chance.
        assert_eq!(cache.on_step(0, &[7]).len(), 1);
        assert_eq!(cache.counts()[0].misses, 1);
    }

    #[test]
    fn what_a_prompt_used_most_is_brought_in_at_its_end_if_it_pays() {
        let picky = PolicyConfig::LfuDecay {
            half_life_tokens: 1e6,
            margin_picks: 2.5,
        };
        // No budget for steps at all.
        let none = Throttle {
            admits_per_step: 0.0,
            burst_admits: 0.0,
        };
        let mut cache = cache(picky, 2, none);
        for ids in [[7, 8], [7, 8], [7, 8], [7, 9], [0, 9]] {
            cache.learn(0, &ids);
        }
        // 7 and 8 were picked 4 and 3 times; 0 and 1, which are there, once and never; 9 twice.
        let admits: Vec<(u16, Option<u16>)> = cache
            .admit_prefill(0, Offer::of_any(1))
            .iter()
            .map(|a| (a.expert, a.evicted))
            .collect();
        assert_eq!(admits, [(7, Some(1))]);
        assert_eq!(cache.counts()[0].admits, 1);
        assert!(cache.admit_prefill(0, Offer::of_any(2)).is_empty());
        assert_eq!(cache.admitted_over_pcie(0), 1);
        let mut lru = self::cache(PolicyConfig::Lru, 2, Throttle::NONE);
        lru.learn(0, &[7, 8]);
        assert!(lru.admit_prefill(0, Offer::of_any(2)).is_empty());
    }

    #[test]
    fn a_restored_cache_goes_on_as_if_it_had_never_stopped() {
        let trace = synthetic(3, 16, 4, 4, 90);
        let steps = steps(trace.records());
        let (before, after) = steps.split_at(steps.len() / 2);
        for config in ALL {
            let mut first = cache(config, 6, Throttle::NONE);
            for (layer, ids) in before {
                first.on_step(*layer, ids);
            }
            let text = serde_json::to_string(&first.state(config)).unwrap();
            let saved: CacheState = serde_json::from_str(&text).unwrap();
            let mut second = cache(config, 6, Throttle::NONE);
            second.restore(config, &saved).unwrap();
            first.reset_counts();
            for (layer, ids) in after {
                let expected = first.on_step(*layer, ids).to_vec();
                // A threshold's counters are not kept: they fill again within a half-life.
                if !matches!(config, PolicyConfig::LruThreshold { .. }) {
                    assert_eq!(second.on_step(*layer, ids), expected, "{}", config.name());
                }
            }
        }
    }

    /// What it did before the restore must not show: neither what it recorded, nor what it had saved up.
    #[test]
    fn a_restored_cache_behaves_alike_whatever_it_did_before() {
        let trace = synthetic(3, 16, 4, 4, 90);
        let steps = steps(trace.records());
        let (before, after) = steps.split_at(steps.len() / 2);
        let throttle = Throttle {
            admits_per_step: 0.25,
            burst_admits: 3.0,
        };
        for config in ALL {
            let mut saved = cache(config, 6, Throttle::NONE);
            for (layer, ids) in before {
                saved.on_step(*layer, ids);
            }
            let state = saved.state(config);
            let mut fresh = cache(config, 6, throttle);
            fresh.restore(config, &state).unwrap();
            let mut used = cache(config, 6, throttle);
            for (layer, ids) in after.iter().rev() {
                used.on_step(*layer, ids);
            }
            used.restore(config, &state).unwrap();
            for (layer, ids) in after {
                let expected = fresh.on_step(*layer, ids).to_vec();
                assert_eq!(used.on_step(*layer, ids), expected, "{}", config.name());
            }
            assert_eq!(used.state(config), fresh.state(config), "{}", config.name());
        }
    }

    #[test]
    fn a_restored_cache_keeps_a_pinned_expert_in_one_slot() {
        let config = PolicyConfig::LruPinned { pinned_share: 0.5 };
        let build = |hottest: &[u16]| {
            ExpertCache::build(config, 8, &[config.fill(2, hottest)], Throttle::NONE)
        };
        // The saved state has expert 3 in the slot that may change, this placement pins it.
        let state = build(&[5, 3]).state(config);
        let mut cache = build(&[3, 5]);
        state.check_pins(&[config.fill(2, &[3, 5])]).unwrap();
        cache.restore(config, &state).unwrap();
        assert_eq!(cache.contents(0), [Some(3), None]);
        assert_eq!(cache.slot(0, 3), Some(0));
        for expert in [1, 2] {
            cache.on_step(0, &[expert]);
            assert_eq!(cache.contents(0), [Some(3), Some(expert)]);
        }
    }

    #[test]
    fn what_is_saved_up_in_idle_steps_is_capped_and_spent_once() {
        let throttle = Throttle {
            admits_per_step: 0.5,
            burst_admits: 2.0,
        };
        let mut cache = cache(PolicyConfig::Lru, 6, throttle);
        for _ in 0..100 {
            assert!(cache.on_step(0, &[0, 1, 2, 3]).is_empty());
        }
        let mut burst = |ids: [u16; 4]| cache.on_step(0, &ids).len();
        assert_eq!(burst([6, 7, 8, 9]), 2);
        // Half an expert a step from here on.
        assert_eq!([burst([10, 11, 12, 13]), burst([10, 11, 12, 13])], [0, 1]);
    }

    #[test]
    fn a_budget_of_bytes_is_shared_by_the_layers_and_sixteen_tokens_of_it_may_be_saved_up() {
        let throttle = Throttle::of_bytes(3000.0, 100, 40);
        assert_eq!(
            (throttle.admits_per_step, throttle.burst_admits),
            (0.75, 12.0)
        );
        // However small the budget, an expert can be copied one day.
        assert_eq!(Throttle::of_bytes(1.0, 100, 40).burst_admits, 1.0);
    }

    #[test]
    fn a_state_of_other_slots_or_another_policy_is_refused() {
        let mut now = cache(LFU, 6, Throttle::NONE);
        let good = now.state(LFU);
        assert_eq!(now.restore(LFU, &good), Ok(()));
        let mut refused = |edit: &dyn Fn(&mut CacheState), part: &str| {
            let mut bad = good.clone();
            edit(&mut bad);
            let message = now.restore(LFU, &bad).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        refused(&|s| s.policy = PolicyConfig::Lru, "the policy is lru");
        refused(&|s| s.layers.truncate(2), "layers is 2, this run has 3");
        refused(
            &|s| s.layers[1].experts.truncate(5),
            "layer 1: 5 slots, this run has 6",
        );
        refused(&|s| s.layers[0].experts[2] = Some(99), "no expert 99");
        refused(&|s| s.layers[0].experts[2] = Some(0), "named twice");
        refused(&|s| s.layers[2].worth[3] = f32::NAN, "damaged");
        refused(&|s| s.layers[2].worth.truncate(3), "damaged");
    }
}
