//! Carries out what a cache policy decides: tells it what the router picked, has the backend copy.
//!
//! The cache is the object that the simulator runs. It speaks of slots per layer; the backend keeps
//! the bytes, and until a copy is there the expert is computed from RAM. A cache that costs more
//! than it brings is stopped: what is in the slots then stays.
//!
//! At its end a prompt changes slots: they admit the experts it used most. A backend past whose GPU all experts stream in the
//! prompt's last chunk asks for that layer by layer, and keeps what it then has at hand anyway; where
//! none asked, a share of the slots is copied.

use crate::backend::{Routing, SlotChange};
use crate::planning::policy::{Admit, LayerSlots, PolicyConfig};
use crate::planning::{CacheState, ExpertCache, LayerCounts, Offer, StateError, Throttle};

/// Decode steps after which a cache must have paid for its copies, again and again. On a text of another
/// subject it copies half of its slots in the first hundred, which pays in those after them.
const TRIAL_STEPS: u64 = 256;

/// The experts of a placement at run time.
pub struct ExpertManager {
    cache: ExpertCache,
    config: PolicyConfig,
    throttle: Throttle,
    /// `[layer]` as the placement has them
    layers: Vec<LayerSlots>,
    changes: Vec<SlotChange>,
    /// `[layer]`: whether the backend already asked what this prompt admits
    admitted: Vec<bool>,
    /// `[layer][expert]`: whether it was in a slot at first
    at_first: Vec<Vec<bool>>,
    trial: Trial,
    /// Why the slots stay as they are, once the cache did not pay
    stopped: Option<String>,
    /// Where it began
    start: CacheState,
}

/// The cache against the slots left as they were, over some steps.
#[derive(Clone, Copy, Default)]
struct Trial {
    steps: u64,
    hits: u64,
    hits_at_first: u64,
    copies: u64,
}

impl Trial {
    /// A copied expert is read from RAM once more, like a miss: it must bring a hit at least.
    fn pays(&self) -> bool {
        self.hits >= self.hits_at_first + self.copies
    }
}

impl ExpertManager {
    pub fn new(
        config: PolicyConfig,
        num_experts: usize,
        layers: &[LayerSlots],
        throttle: Throttle,
    ) -> Self {
        let cache = ExpertCache::build(config, num_experts, layers, throttle);
        ExpertManager {
            start: cache.state(config),
            at_first: in_slots(&cache, layers.len(), num_experts),
            cache,
            config,
            throttle,
            layers: layers.to_vec(),
            changes: Vec::new(),
            admitted: vec![false; layers.len()],
            trial: Trial::default(),
            stopped: None,
        }
    }

    /// Goes on from where an earlier run ended, before any step.
    ///
    /// # Errors
    /// [`StateError`] if the state is of another model, placement or policy; the manager is as it
    /// was.
    pub fn restore(&mut self, state: &CacheState) -> std::result::Result<(), StateError> {
        let num_experts = self.at_first.first().map_or(0, Vec::len);
        state.check_pins(&self.layers)?;
        self.cache.restore(self.config, state)?;
        self.at_first = in_slots(&self.cache, self.layers.len(), num_experts);
        self.start = state.clone();
        Ok(())
    }

    /// The same policy on another number of slots, shared out as these are. They begin with what is in
    /// slots now and then what was picked most; what the policy recorded is forgotten.
    ///
    /// - `picks`: `[layer][expert]`, of the router so far
    #[must_use]
    pub fn resized(&self, slots: usize, picks: &[Vec<u64>]) -> Self {
        let num_experts = self.at_first.first().map_or(0, Vec::len);
        let all = self.total_slots().max(1);
        let (mut before, mut given) = (0, 0);
        let layers: Vec<LayerSlots> = (self.layers.iter().enumerate())
            .map(|(layer, old)| {
                before += old.slots;
                // Rounded over the sum, so that the layers' slots add up.
                let wanted = (before * slots / all).saturating_sub(given);
                given += wanted;
                let hottest = self.hottest(layer, picks.get(layer).map_or(&[], Vec::as_slice));
                self.config.fill(wanted.min(num_experts), &hottest)
            })
            .collect();
        let mut resized = ExpertManager::new(self.config, num_experts, &layers, self.throttle);
        resized.stopped.clone_from(&self.stopped);
        resized
    }

    /// The experts of `layer` that are in slots, the most picked first, then the others that were picked.
    fn hottest(&self, layer: usize, picks: &[u64]) -> Vec<u16> {
        let picked = |expert: u16| picks.get(usize::from(expert)).copied().unwrap_or(0);
        let mut inside: Vec<u16> = self
            .cache
            .contents(layer)
            .iter()
            .flatten()
            .copied()
            .collect();
        let others = (0..picks.len()).map(|expert| expert as u16);
        let others = others.filter(|expert| picked(*expert) > 0 && !inside.contains(expert));
        let mut others: Vec<u16> = others.collect();
        let by_picks = |expert: &u16| (std::cmp::Reverse(picked(*expert)), *expert);
        inside.sort_by_key(by_picks);
        others.sort_by_key(by_picks);
        [inside, others].concat()
    }

    /// Forgets what it recorded since the start, but not its counts.
    pub fn start_over(&mut self) {
        (self.cache.restore(self.config, &self.start)).expect("a state of this very cache");
        self.changes.clear();
        self.admitted.fill(false);
        self.trial = Trial::default();
        self.stopped = None;
    }

    /// What a later run needs to go on from here.
    pub fn state(&self) -> CacheState {
        self.cache.state(self.config)
    }

    /// Slots of all layers.
    pub fn total_slots(&self) -> usize {
        self.layers.iter().map(|layer| layer.slots).sum()
    }

    /// `[layer][slot]`: the expert that each slot holds.
    pub fn contents(&self) -> Vec<Vec<Option<u16>>> {
        let layers = 0..self.at_first.len();
        layers
            .map(|layer| self.cache.contents(layer).to_vec())
            .collect()
    }

    /// Tells what the router chose in `layer`: one token is a decode step, more are prefill, which
    /// the policy only learns from.
    pub fn observe(&mut self, layer: usize, routing: &Routing, decode: bool) {
        let k = routing.num_experts_per_tok.max(1);
        for topk_ids in routing.topk_ids.chunks_exact(k) {
            if self.stopped.is_some() {
                return;
            }
            if !decode {
                self.cache.learn(layer, topk_ids);
                continue;
            }
            let here = &self.at_first[layer];
            let hits = topk_ids
                .iter()
                .filter(|&&e| self.cache.slot(layer, e).is_some());
            self.trial.hits += hits.count() as u64;
            let hits = topk_ids.iter().filter(|&&e| here[usize::from(e)]);
            self.trial.hits_at_first += hits.count() as u64;
            let admits = self.cache.on_step(layer, topk_ids);
            self.trial.copies += admits.len() as u64;
            self.changes.extend(admits.iter().map(|a| change(layer, a)));
            if layer + 1 == self.at_first.len() {
                self.judge();
            }
        }
    }

    /// The next tokens belong to another sequence.
    pub fn begin_sequence(&mut self) {
        self.cache.begin_sequence();
    }

    /// Whether a prompt can change slots.
    pub fn admits_prefill(&self) -> bool {
        self.stopped.is_none() && self.config.admits_prefill()
    }

    /// What a backend that has every expert at hand shall leave in the slots of `layer`, after what the
    /// whole prompt chose there, of what it offers. None at all is no question.
    pub fn admit_prefill(&mut self, layer: usize, offer: Offer<'_>) -> Vec<SlotChange> {
        if offer.at_most == 0 || !self.admits_prefill() {
            return Vec::new();
        }
        self.admitted[layer] = true;
        // Bounded, and no sign of a cache that copies for ever: not on trial.
        let admits = self.cache.admit_prefill(layer, offer);
        admits.iter().map(|a| change(layer, a)).collect()
    }

    /// At the end of a prompt: brings in the experts it used most, where the backend has not asked for it.
    pub fn prompt_ended(&mut self) {
        for layer in 0..self.at_first.len() {
            if !self.admitted[layer] {
                let at_most = self.cache.admitted_over_pcie(layer);
                let changes = self.admit_prefill(layer, Offer::of_any(at_most));
                self.changes.extend(changes);
            }
        }
        self.admitted.fill(false);
    }

    /// At the end of a step: stops a cache that has not paid.
    fn judge(&mut self) {
        self.trial.steps += 1;
        if self.trial.steps < TRIAL_STEPS {
            return;
        }
        let trial = std::mem::take(&mut self.trial);
        // Empty slots fill before they can pay.
        let filled = (0..self.at_first.len())
            .all(|layer| self.cache.contents(layer).iter().all(Option::is_some));
        if filled && !trial.pays() {
            self.stopped = Some(format!(
                "the expert cache was stopped: in {} tokens it copied {} experts for {} hits, the \
                 slots left alone would have had {}; experts stay where they are",
                trial.steps, trial.copies, trial.hits, trial.hits_at_first
            ));
        }
    }

    /// What to copy since the last call.
    pub fn take_changes(&mut self) -> Vec<SlotChange> {
        std::mem::take(&mut self.changes)
    }

    pub fn config(&self) -> PolicyConfig {
        self.config
    }

    /// Leaves slots as they are from now on, or has them follow the policy again.
    pub fn freeze(&mut self, frozen: bool) {
        self.trial = Trial::default();
        self.stopped = frozen.then(|| "the expert cache is frozen, as was asked".into());
    }

    /// Why the cache was stopped, if it was.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// `[layer]` hits, misses and copies of decode steps.
    pub fn layer_counts(&self) -> &[LayerCounts] {
        self.cache.counts()
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
}

fn change(layer: usize, admit: &Admit) -> SlotChange {
    SlotChange {
        layer,
        slot: usize::from(admit.slot),
        expert: usize::from(admit.expert),
    }
}

/// `[layer][expert]`: whether it is in a slot.
fn in_slots(cache: &ExpertCache, layers: usize, num_experts: usize) -> Vec<Vec<bool>> {
    let of_layer = |layer| {
        let mut here = vec![false; num_experts];
        for expert in cache.contents(layer).iter().flatten() {
            here[usize::from(*expert)] = true;
        }
        here
    };
    (0..layers).map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing(ids: &[u16]) -> Routing {
        Routing {
            num_experts_per_tok: ids.len(),
            topk_ids: ids.to_vec(),
            topk_weights: vec![0.5; ids.len()],
        }
    }

    fn lru(initial: &[u16]) -> ExpertManager {
        let layer = LayerSlots {
            slots: 2,
            pinned_experts: Vec::new(),
            initial_experts: initial.to_vec(),
        };
        ExpertManager::new(
            PolicyConfig::Lru,
            8,
            &[layer.clone(), layer],
            Throttle::NONE,
        )
    }

    #[test]
    fn a_cache_that_only_copies_is_stopped_and_says_so() {
        let mut manager = lru(&[0, 1]);
        for step in 0..2 * TRIAL_STEPS as u16 {
            let still = manager.stopped().is_some() || step < 2;
            for layer in 0..2 {
                manager.observe(layer, &routing(&[step % 8]), true);
            }
            assert_eq!(manager.take_changes().is_empty(), still, "step {step}");
        }
        assert!(manager.stopped().unwrap().contains("stopped"));
    }

    /// Each group of picks over and over for a trial, on slots that at first hold none of them.
    fn stopped_by(picks: &[u16]) -> bool {
        let mut manager = lru(&[0, 1]);
        for &expert in picks.iter().cycle().take(TRIAL_STEPS as usize) {
            for layer in 0..2 {
                manager.observe(layer, &routing(&[expert]), true);
            }
        }
        manager.stopped().is_some()
    }

    #[test]
    fn a_cache_must_bring_as_many_more_hits_as_it_copies_experts() {
        // Each copy brings one hit.
        assert!(!stopped_by(&[2, 2, 3, 3, 4, 4, 5, 5]));
        // Many hits more than without copies, but fewer than copies.
        assert!(stopped_by(&[2, 2, 3, 3, 4, 4, 5, 6]));
        let trial = |copies| Trial {
            steps: TRIAL_STEPS,
            hits: 110,
            hits_at_first: 100,
            copies,
        };
        assert!(trial(10).pays() && !trial(11).pays());
    }

    fn lfu() -> ExpertManager {
        let config = PolicyConfig::LfuDecay {
            half_life_tokens: 64.0,
            margin_picks: 0.0,
        };
        let layer = config.fill(2, &[0, 1]);
        ExpertManager::new(config, 8, &[layer.clone(), layer], Throttle::NONE)
    }

    /// `[layer]` the experts that are copied after a prompt of six tokens with these picks.
    fn prompt(manager: &mut ExpertManager, picks: [u16; 2]) -> [Vec<usize>; 2] {
        for layer in 0..2 {
            manager.observe(layer, &routing(&picks.repeat(6)), false);
        }
        manager.prompt_ended();
        let mut copied = [Vec::new(), Vec::new()];
        for change in manager.take_changes() {
            copied[change.layer].push(change.expert);
        }
        copied
    }

    #[test]
    fn every_prompt_admits_what_it_used_most_also_where_the_backend_asked_in_the_one_before() {
        let mut manager = lfu();
        // Over PCIe one slot of two changes.
        assert_eq!(prompt(&mut manager, [2, 3]), [[2], [2]]);
        assert_eq!(prompt(&mut manager, [4, 4]), [[4], [4]]);
        manager.observe(0, &routing(&[5, 5, 5, 5, 5, 5, 5, 5]), false);
        assert_eq!(manager.admit_prefill(0, Offer::of_any(2)).len(), 1);
        // Layer 0 has had its turn in this prompt, and has one again in the next.
        assert_eq!(prompt(&mut manager, [5, 5])[0], [0; 0]);
        assert_eq!(prompt(&mut manager, [6, 6])[0], [6]);
        // A backend that allows nothing has not had its turn.
        assert!(manager.admit_prefill(0, Offer::of_any(0)).is_empty());
        assert_eq!(prompt(&mut manager, [7, 7])[0], [7]);
    }

    #[test]
    fn another_sequence_leaves_an_eighth_of_what_was_recorded() {
        let mut manager = lfu();
        manager.observe(0, &routing(&[3, 3, 3, 3]), false);
        let picks = |manager: &ExpertManager| manager.state().layers[0].worth[3];
        let before = picks(&manager);
        manager.begin_sequence();
        assert!(before > 1.0 && (picks(&manager) / before - 0.125).abs() < 1e-6);
    }

    /// Nothing of what came before may show: copies not yet made, whether a backend has asked, the trial.
    #[test]
    fn a_cache_that_starts_over_is_as_it_was_at_first() {
        let long = 2 * TRIAL_STEPS as u16 - 1;
        for (mut manager, steps) in [(lru(&[0, 1]), long), (lru(&[0, 1]), 3), (lfu(), 3)] {
            let first = manager.state();
            for step in 0..steps {
                for layer in 0..2 {
                    manager.observe(layer, &routing(&[2 + step % 6]), true);
                }
            }
            assert_eq!(manager.stopped().is_some(), steps == long);
            manager.admit_prefill(1, Offer::of_any(1));
            manager.start_over();
            assert_eq!(manager.state(), first);
            assert!(manager.stopped().is_none() && manager.take_changes().is_empty());
            assert_eq!((manager.trial.steps, manager.trial.copies), (0, 0));
            assert_eq!((manager.trial.hits, manager.trial.hits_at_first), (0, 0));
            if manager.admits_prefill() {
                assert_eq!(prompt(&mut manager, [6, 6]), [[6], [6]]);
            }
        }
    }

    #[test]
    fn a_restored_cache_starts_with_what_it_held_and_is_judged_by_that() {
        let mut warm = lru(&[0, 1]);
        for _ in 0..3 {
            for layer in 0..2 {
                warm.observe(layer, &routing(&[6, 7]), true);
            }
        }
        let mut cold = lru(&[0, 1]);
        cold.restore(&warm.state()).unwrap();
        assert_eq!(cold.contents(), warm.contents());
        // Slots left alone would have the same hits: no copies, nothing to pay.
        for _ in 0..2 * TRIAL_STEPS {
            for layer in 0..2 {
                cold.observe(layer, &routing(&[6, 7]), true);
            }
        }
        assert!(cold.stopped().is_none());
        assert_eq!(cold.counts().misses, 0);
    }

    #[test]
    fn a_state_without_the_experts_that_this_placement_pins_is_refused() {
        let pinned = |expert| {
            let config = PolicyConfig::LruPinned { pinned_share: 0.5 };
            let layer = config.fill(2, &[expert, 5]);
            ExpertManager::new(config, 8, &[layer], Throttle::NONE)
        };
        let state = pinned(3).state();
        pinned(3).restore(&state).unwrap();
        let error = pinned(4).restore(&state).unwrap_err().to_string();
        assert!(error.contains("pins expert 4"), "{error}");
    }

    #[test]
    fn a_cache_that_follows_the_topic_goes_on() {
        let mut manager = lru(&[0, 1]);
        for _ in 0..3 * TRIAL_STEPS {
            for layer in 0..2 {
                manager.observe(layer, &routing(&[6, 7]), true);
            }
        }
        assert!(manager.stopped().is_none());
        assert_eq!(manager.counts().admits, 4);
        assert_eq!(manager.contents()[0].len(), 2);
    }
}
