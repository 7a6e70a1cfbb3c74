//! What a policy would have done on a recorded trace: hits, misses, copies.

use super::policy::{Admit, Policy};
use super::trace::Record;

/// Counts of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerOutcome {
    pub hits: u64,
    pub misses: u64,
    pub admits: u64,
}

/// Counts per layer; simulating another stretch of the trace adds to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub layers: Vec<LayerOutcome>,
}

impl Outcome {
    pub fn hits(&self) -> u64 {
        self.layers.iter().map(|l| l.hits).sum()
    }

    pub fn misses(&self) -> u64 {
        self.layers.iter().map(|l| l.misses).sum()
    }

    pub fn hit_rate(&self) -> f64 {
        self.hits() as f64 / (self.hits() + self.misses()).max(1) as f64
    }

    /// Host to device, for all admitted experts.
    pub fn moved_bytes(&self, expert_bytes: u64) -> u64 {
        self.layers.iter().map(|l| l.admits).sum::<u64>() * expert_bytes
    }
}

impl LayerOutcome {
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }
}

/// Runs `policy` over the picks in `records`, token by token in each layer.
///
/// A token's picks are looked up before the policy learns of them: what it admits serves the next
/// token. Documents follow one another without a fresh start, as in a program that keeps running.
pub fn simulate<'a>(
    policy: &mut dyn Policy,
    num_experts_per_tok: usize,
    records: impl IntoIterator<Item = &'a Record>,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut admits: Vec<Admit> = Vec::new();
    for record in records {
        let Record::Picks(picks) = record else {
            continue;
        };
        let layer = usize::from(picks.layer);
        if outcome.layers.len() <= layer {
            outcome.layers.resize(layer + 1, LayerOutcome::default());
        }
        let counts = &mut outcome.layers[layer];
        for topk_ids in picks.topk_ids.chunks_exact(num_experts_per_tok) {
            for &expert in topk_ids {
                match policy.slot(layer, expert) {
                    Some(_) => counts.hits += 1,
                    None => counts.misses += 1,
                }
            }
            admits.clear();
            policy.access(layer, topk_ids, &mut admits);
            counts.admits += admits.len() as u64;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::policy::{Clairvoyant, LayerSlots, PolicyConfig};
    use super::super::stats::RoutingStats;
    use super::super::trace::tests::synthetic;
    use super::*;

    const LFU: PolicyConfig = PolicyConfig::LfuDecay {
        half_life_tokens: 20.0,
    };

    fn empty(slots: usize, layers: usize) -> Vec<LayerSlots> {
        let layer = LayerSlots {
            slots,
            ..LayerSlots::default()
        };
        vec![layer; layers]
    }

    #[test]
    fn simulated_lru_hits_are_those_of_the_stack_distances() {
        let trace = synthetic(3, 16, 4, 5, 60);
        let mut stats = RoutingStats::new(3, 16, 4);
        trace.records().iter().for_each(|r| stats.push(r));
        let profile = stats.profile(BTreeSet::new());
        for slots in 0..=16 {
            let mut hits = [0; 3];
            for document in trace.documents() {
                let mut lru = PolicyConfig::Lru.build(16, &empty(slots, 3));
                let outcome = simulate(lru.as_mut(), 4, document);
                for (total, layer) in hits.iter_mut().zip(&outcome.layers) {
                    *total += layer.hits;
                }
            }
            for (layer, hits) in hits.into_iter().enumerate() {
                assert_eq!(
                    hits,
                    profile.total(layer).stack_distance.hits(slots),
                    "{slots} slots"
                );
            }
        }
    }

    #[test]
    fn no_policy_beats_belady() {
        let trace = synthetic(2, 20, 3, 6, 80);
        let hottest: Vec<u16> = (0..20).collect();
        for slots in 0..=20 {
            for config in [PolicyConfig::Static, PolicyConfig::Lru, LFU] {
                let layers = vec![config.fill(slots, &hottest); 2];
                let outcome = simulate(config.build(20, &layers).as_mut(), 3, trace.records());
                let same_start = vec![PolicyConfig::Lru.fill(slots, &hottest); 2];
                let mut best = Clairvoyant::new(20, 3, &same_start, trace.records());
                let bound = simulate(&mut best, 3, trace.records());
                assert!(
                    outcome.hits() <= bound.hits(),
                    "{} at {slots} slots",
                    config.name()
                );
                if slots == 20 {
                    assert_eq!(outcome.hit_rate(), 1.0);
                }
                if config == PolicyConfig::Static {
                    assert_eq!(outcome.moved_bytes(10), 0);
                }
            }
        }
    }

    #[test]
    fn decisions_never_put_two_experts_in_a_slot_or_one_in_two() {
        let trace = synthetic(1, 12, 3, 3, 60);
        for config in [PolicyConfig::Lru, LFU] {
            for (slots, pinned) in [(0, 0), (1, 0), (2, 1), (5, 0), (5, 2), (5, 5), (12, 3)] {
                let layer = LayerSlots {
                    slots,
                    pinned_experts: (0..pinned).collect(),
                    initial_experts: (6..6 + (slots as u16 - pinned) / 2).collect(),
                };
                let mut content: Vec<Option<u16>> = vec![None; slots];
                for (slot, e) in layer
                    .pinned_experts
                    .iter()
                    .chain(&layer.initial_experts)
                    .enumerate()
                {
                    content[slot] = Some(*e);
                }
                let mut policy = config.build(12, &[layer]);
                for record in trace.records() {
                    let Record::Picks(p) = record else { continue };
                    for ids in p.topk_ids.chunks_exact(3) {
                        let mut admits = Vec::new();
                        policy.access(0, ids, &mut admits);
                        for a in admits {
                            assert!(ids.contains(&a.expert) && !content.contains(&Some(a.expert)));
                            assert!(usize::from(a.slot) >= usize::from(pinned));
                            assert_eq!(content[usize::from(a.slot)].replace(a.expert), a.evicted);
                            if config == PolicyConfig::Lru && slots - usize::from(pinned) >= 3 {
                                assert!(a.evicted.is_none_or(|e| !ids.contains(&e)));
                            }
                        }
                        for e in 0..12 {
                            let slot = content.iter().position(|&c| c == Some(e));
                            assert_eq!(policy.slot(0, e).map(usize::from), slot);
                        }
                    }
                }
            }
        }
    }
}
