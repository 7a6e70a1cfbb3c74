//! What a policy would have done on a recorded trace: hits, misses, copies.

use super::cache::{ExpertCache, LayerCounts};
use super::policy::Offer;
use super::trace::{Record, count_tokens};

/// Counts per layer of one or several stretches of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub layers: Vec<LayerCounts>,
}

impl Outcome {
    pub fn hits(&self) -> u64 {
        self.layers.iter().map(|l| l.hits).sum()
    }

    pub fn misses(&self) -> u64 {
        self.layers.iter().map(|l| l.misses).sum()
    }

    pub fn admits(&self) -> u64 {
        self.layers.iter().map(|l| l.admits).sum()
    }

    pub fn hit_rate(&self) -> f64 {
        self.hits() as f64 / (self.hits() + self.misses()).max(1) as f64
    }

    /// Host to device, for all admitted experts.
    pub fn moved_bytes(&self, expert_bytes: u64) -> u64 {
        self.admits() * expert_bytes
    }
}

/// Drives `cache` with the picks in `records`, token by token in each layer, as the run time does.
///
/// A token's picks are looked up before the policy learns of them: what it admits serves the next
/// token. Documents follow one another without a fresh start, as sequences in a program that keeps
/// running.
pub fn simulate<'a>(
    cache: &mut ExpertCache,
    num_experts_per_tok: usize,
    records: impl IntoIterator<Item = &'a Record>,
) -> Outcome {
    for record in records {
        match record {
            Record::Document { .. } => cache.begin_sequence(),
            Record::Picks(picks) => {
                for topk_ids in picks.topk_ids.chunks_exact(num_experts_per_tok) {
                    cache.on_step(usize::from(picks.layer), topk_ids);
                }
            }
        }
    }
    Outcome {
        layers: cache.counts().to_vec(),
    }
}

/// Of a document, what is taken for its prompt, where nothing says.
const PROMPT_SHARE: f64 = 0.75;

/// As [`simulate`], each document's first part a prompt: the policy learns from it, and slots admit what
/// it used most at its end, without cost, since a prefill has every expert at hand. Only the rest is decoded, and counted.
pub fn simulate_prompted(
    cache: &mut ExpertCache,
    num_experts_per_tok: usize,
    documents: &[&[Record]],
) -> Outcome {
    let mut admitted = vec![0; cache.counts().len()];
    for document in documents {
        cache.begin_sequence();
        let tokens = count_tokens(*document, num_experts_per_tok);
        let prompt = (PROMPT_SHARE * tokens as f64) as usize;
        for record in *document {
            let Record::Picks(picks) = record else {
                continue;
            };
            let layer = usize::from(picks.layer);
            let tokens = picks.topk_ids.chunks_exact(num_experts_per_tok);
            for (position, topk_ids) in (picks.first_position as usize..).zip(tokens) {
                if position == prompt {
                    admitted[layer] +=
                        cache.admit_prefill(layer, Offer::of_any(usize::MAX)).len() as u64;
                }
                if position < prompt {
                    cache.learn(layer, topk_ids);
                } else {
                    cache.on_step(layer, topk_ids);
                }
            }
        }
    }
    let paid = |(counts, admitted): (&LayerCounts, u64)| LayerCounts {
        admits: counts.admits - admitted,
        ..*counts
    };
    Outcome {
        layers: cache.counts().iter().zip(admitted).map(paid).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::cache::Throttle;
    use super::super::policy::{Clairvoyant, LayerSlots, PolicyConfig};
    use super::super::stats::RoutingStats;
    use super::super::trace::tests::synthetic;
    use super::*;

    const LFU: PolicyConfig = PolicyConfig::LfuDecay {
        half_life_tokens: 20.0,
        margin_picks: 0.0,
    };
    const PINNED: PolicyConfig = PolicyConfig::LruPinned { pinned_share: 0.3 };
    const THRESHOLD: PolicyConfig = PolicyConfig::LruThreshold {
        min_picks: 1.5,
        half_life_tokens: 20.0,
    };

    fn run(
        config: PolicyConfig,
        experts: usize,
        k: usize,
        layers: &[LayerSlots],
        records: &[Record],
    ) -> Outcome {
        let mut cache = ExpertCache::build(config, experts, layers, Throttle::NONE);
        simulate(&mut cache, k, records)
    }

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
                let outcome = run(PolicyConfig::Lru, 16, 4, &empty(slots, 3), document);
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
    fn of_prompted_documents_only_what_follows_the_prompt_counts() {
        let (experts, k, layers) = (16, 4, 2);
        let trace = synthetic(layers as u16, experts as u16, k as u16, 5, 40);
        let documents = trace.documents();
        let slots = vec![LFU.fill(5, &(0..16).collect::<Vec<u16>>()); layers];
        let mut cache = ExpertCache::build(LFU, experts, &slots, Throttle::NONE);
        let outcome = simulate_prompted(&mut cache, k, &documents);

        // The same by hand: whole prompts first, as a prefill has them.
        let mut by_hand = ExpertCache::build(LFU, experts, &slots, Throttle::NONE);
        let (mut picks, mut admitted) = (0, 0);
        for document in documents {
            by_hand.begin_sequence();
            for layer in 0..layers {
                let ids: Vec<u16> = (document.iter())
                    .filter_map(|record| match record {
                        Record::Picks(p) if usize::from(p.layer) == layer => Some(&p.topk_ids),
                        _ => None,
                    })
                    .flatten()
                    .copied()
                    .collect();
                let prompt = (ids.len() / k) * 3 / 4;
                for (position, ids) in ids.chunks_exact(k).enumerate() {
                    if position < prompt {
                        by_hand.learn(layer, ids);
                        continue;
                    }
                    if position == prompt {
                        admitted += by_hand
                            .admit_prefill(layer, Offer::of_any(usize::MAX))
                            .len() as u64;
                    }
                    by_hand.on_step(layer, ids);
                    picks += k as u64;
                }
            }
        }
        assert_eq!(outcome.hits() + outcome.misses(), picks);
        for (a, b) in outcome.layers.iter().zip(by_hand.counts()) {
            assert_eq!((a.hits, a.misses), (b.hits, b.misses));
        }
        let admits: u64 = by_hand.counts().iter().map(|l| l.admits).sum();
        assert!(admitted > 0);
        assert_eq!(outcome.admits() + admitted, admits);
    }

    #[test]
    fn a_new_sequence_soon_outweighs_those_before() {
        let slow = PolicyConfig::LfuDecay {
            half_life_tokens: 1e6,
            margin_picks: 0.5,
        };
        let recorded = |of_another: bool| {
            let mut cache = ExpertCache::build(slow, 4, &empty(1, 1), Throttle::NONE);
            (0..8).for_each(|_| cache.learn(0, &[1]));
            cache.admit_prefill(0, Offer::of_any(1));
            if of_another {
                cache.begin_sequence();
            }
            (0..2).for_each(|_| cache.learn(0, &[2]));
            cache.admit_prefill(0, Offer::of_any(1));
            cache.contents(0).to_vec()
        };
        assert_eq!(recorded(false), [Some(1)]);
        assert_eq!(recorded(true), [Some(2)]);
    }

    #[test]
    fn no_policy_beats_belady() {
        let trace = synthetic(2, 20, 3, 6, 80);
        let hottest: Vec<u16> = (0..20).collect();
        for slots in 0..=20 {
            for config in [
                PolicyConfig::Static,
                PolicyConfig::Lru,
                PolicyConfig::LeastStale,
                PINNED,
                THRESHOLD,
                LFU,
            ] {
                let layers = vec![config.fill(slots, &hottest); 2];
                let outcome = run(config, 20, 3, &layers, trace.records());
                let same_start = vec![PolicyConfig::Lru.fill(slots, &hottest); 2];
                let best = Clairvoyant::new(20, 3, &same_start, trace.records());
                let mut best = ExpertCache::new(Box::new(best), 2, Throttle::NONE);
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
        for config in [PolicyConfig::Lru, PolicyConfig::LeastStale, THRESHOLD, LFU] {
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
                        policy.access(0, ids, usize::MAX, &mut admits);
                        for a in admits {
                            assert!(ids.contains(&a.expert) && !content.contains(&Some(a.expert)));
                            assert!(usize::from(a.slot) >= usize::from(pinned));
                            assert_eq!(content[usize::from(a.slot)].replace(a.expert), a.evicted);
                            assert_eq!(policy.contents(0).len(), slots);
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

    /// LFU with decay by its definition: all picks kept, weights from their ages and sequences.
    fn naive_lfu(tokens: &[(usize, &[u16])], slots: usize, half_life: f64) -> u64 {
        let mut history: Vec<Vec<(usize, usize)>> = vec![Vec::new(); 12];
        let mut cache: Vec<u16> = Vec::new();
        let mut hits = 0;
        for (now, (sequence, picks)) in tokens.iter().enumerate() {
            hits += picks.iter().filter(|e| cache.contains(e)).count() as u64;
            picks
                .iter()
                .for_each(|&e| history[usize::from(e)].push((now, *sequence)));
            let score = |e: u16| -> f64 {
                let picks = history[usize::from(e)].iter();
                let faded = |(then, of): &(usize, usize)| {
                    let age = (now - then) as f64;
                    0.5f64.powf(age / half_life) * 0.125f64.powi((sequence - of) as i32)
                };
                picks.map(faded).sum()
            };
            let mut missed: Vec<u16> = picks.to_vec();
            missed.retain(|e| !cache.contains(e));
            missed.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            for expert in missed {
                if cache.len() < slots {
                    cache.push(expert);
                    continue;
                }
                let worst =
                    (0..cache.len()).min_by(|&a, &b| score(cache[a]).total_cmp(&score(cache[b])));
                match worst {
                    Some(i) if score(cache[i]) + 1e-9 < score(expert) => cache[i] = expert,
                    _ => break,
                }
            }
        }
        hits
    }

    /// Admission order by its definition.
    fn naive_least_stale(tokens: &[&[u16]], slots: usize) -> u64 {
        let mut queue: Vec<u16> = Vec::new();
        let mut hits = 0;
        for picks in tokens {
            hits += picks.iter().filter(|e| queue.contains(e)).count() as u64;
            for &expert in *picks {
                if queue.contains(&expert) {
                    continue;
                }
                if queue.len() == slots {
                    match queue.iter().position(|e| !picks.contains(e)) {
                        Some(oldest) => queue.remove(oldest),
                        None => break,
                    };
                }
                queue.push(expert);
            }
        }
        hits
    }

    #[test]
    fn policies_hit_as_often_as_their_definitions_say() {
        let trace = synthetic(1, 12, 3, 5, 90);
        let mut sequences = Vec::new();
        for (sequence, document) in trace.documents().into_iter().enumerate() {
            for record in document {
                if let Record::Picks(p) = record {
                    let tokens = p.topk_ids.chunks_exact(3);
                    sequences.extend(tokens.map(|picks| (sequence, picks)));
                }
            }
        }
        let tokens: Vec<&[u16]> = sequences.iter().map(|(_, picks)| *picks).collect();
        for slots in 1..=12 {
            let hits = |config| run(config, 12, 3, &empty(slots, 1), trace.records()).hits();
            assert_eq!(
                hits(LFU),
                naive_lfu(&sequences, slots, 20.0),
                "{slots} slots"
            );
            assert_eq!(
                hits(PolicyConfig::LeastStale),
                naive_least_stale(&tokens, slots),
                "{slots} slots"
            );
            // A threshold that everyone meets is none.
            let open = PolicyConfig::LruThreshold {
                min_picks: 0.5,
                half_life_tokens: 20.0,
            };
            assert_eq!(hits(open), hits(PolicyConfig::Lru));
        }
    }
}
