//! Routing events to a profile, one chunk of one layer at a time.

use std::collections::BTreeSet;

use super::profile::{LayerCounts, ProfileBody, WEIGHT_ONE_Q24};
use super::stack_distance::LruStack;
use super::trace::{Phase, Record};

const NONE: u16 = u16::MAX;

/// Counts what the router picks; memory is bounded by the model, not by the text.
///
/// Every document stands alone: LRU stacks start empty, there is no previous token, and the
/// predictor of the next layer starts empty. That is what makes the profiles of the parts of
/// a corpus add up to that of the whole.
///
/// Next-layer predictability: for every layer and expert we remember which k experts the next
/// layer picked when this expert was picked last in the document. A token's picks in one layer
/// vote with these lists; the k experts with the most votes are the prediction for the next layer,
/// made before its picks are recorded. A pick counts as predictable if anyone could vote.
pub struct RoutingStats {
    profile: ProfileBody,
    domain: String,
    layers: Vec<LayerState>,
    votes: Votes,
    /// Layer and `[T, k]` picks of the chunk recorded last.
    last_chunk: (usize, Vec<u16>),
}

struct LayerState {
    stack: LruStack,
    /// The picks of the previous token, empty at a document's start.
    previous: Vec<u16>,
    /// `[E, k]` what the next layer picked after each expert, NONE if not seen.
    successors: Vec<u16>,
}

impl RoutingStats {
    pub fn new(num_layers: usize, num_experts: usize, num_experts_per_tok: usize) -> Self {
        let profile = ProfileBody::new(num_layers, num_experts, num_experts_per_tok);
        Self::resume(profile)
    }

    /// Goes on from a profile of whole documents: the next event is of a new one.
    pub fn resume(profile: ProfileBody) -> Self {
        let ProfileBody {
            num_layers,
            num_experts,
            num_experts_per_tok,
            ..
        } = profile;
        assert!(num_experts_per_tok >= 1 && num_experts_per_tok <= num_experts);
        assert!(num_experts < usize::from(NONE));
        let layer = |_| LayerState {
            stack: LruStack::new(num_experts),
            previous: Vec::new(),
            successors: vec![NONE; num_experts * num_experts_per_tok],
        };
        RoutingStats {
            profile,
            domain: String::new(),
            layers: (0..num_layers).map(layer).collect(),
            votes: Votes::new(num_experts, num_experts_per_tok),
            last_chunk: (usize::MAX, Vec::new()),
        }
    }

    /// A new sequence starts.
    pub fn begin_document(&mut self, domain: &str) {
        self.domain = domain.into();
        let entry = self.profile.domains.entry(domain.into()).or_default();
        entry.documents += 1;
        for layer in &mut self.layers {
            layer.stack.reset();
            layer.previous.clear();
            layer.successors.fill(NONE);
        }
        self.last_chunk = (usize::MAX, Vec::new());
    }

    /// The router's picks for a chunk of tokens; layers of one chunk come in ascending order.
    ///
    /// - `topk_ids`: `[T, k]` distinct per token, best first
    /// - `topk_weights`: `[T, k]`
    pub fn record(&mut self, phase: Phase, layer: usize, topk_ids: &[u16], topk_weights: &[f32]) {
        let k = self.profile.num_experts_per_tok;
        assert_eq!(topk_ids.len(), topk_weights.len());
        assert_eq!(topk_ids.len() % k, 0);
        let (num_layers, num_experts) = (self.profile.num_layers, self.profile.num_experts);
        // The entry is there once a document has begun, and is made for a text without one.
        if self.profile.domains.is_empty() {
            self.begin_document("");
        }
        let domain = self
            .profile
            .domains
            .get_mut(&self.domain)
            .expect("just made");
        let counts = domain.phase_mut(phase);
        if counts.layers.is_empty() {
            counts.layers = vec![LayerCounts::new(num_experts); num_layers];
        }
        if layer == 0 {
            counts.tokens += (topk_ids.len() / k) as u64;
        }
        let counts = &mut counts.layers[layer];
        let state = &mut self.layers[layer];

        for (&id, &weight) in topk_ids.iter().zip(topk_weights) {
            counts.picks[usize::from(id)] += 1;
            // To the nearest: weights are not negative.
            counts.weight_mass_q24[usize::from(id)] +=
                (f64::from(weight) * WEIGHT_ONE_Q24 + 0.5) as u64;
        }
        for picks in topk_ids.chunks_exact(k) {
            state
                .stack
                .access(picks, |d| counts.stack_distance.count(d));
            if !state.previous.is_empty() {
                counts.repeatable_picks += k as u64;
                let repeated = picks.iter().filter(|e| state.previous.contains(e));
                counts.repeated_picks += repeated.count() as u64;
            }
            state.previous.clear();
            state.previous.extend_from_slice(picks);
        }
        let (last_layer, last_ids) = &self.last_chunk;
        if layer > 0 && *last_layer == layer - 1 && last_ids.len() == topk_ids.len() {
            let successors = &mut self.layers[layer - 1].successors;
            for (before, picks) in last_ids.chunks_exact(k).zip(topk_ids.chunks_exact(k)) {
                if let Some(predicted) = self.votes.top(k, before, successors) {
                    counts.predictable_picks += k as u64;
                    let hits = picks.iter().filter(|e| predicted.contains(e));
                    counts.predicted_picks += hits.count() as u64;
                }
                for &expert in before {
                    let row = usize::from(expert) * k;
                    successors[row..row + k].copy_from_slice(picks);
                }
            }
        }
        self.last_chunk.0 = layer;
        self.last_chunk.1.clear();
        self.last_chunk.1.extend_from_slice(topk_ids);
    }

    /// [`RoutingStats::begin_document`] or [`RoutingStats::record`], as the record says.
    pub fn push(&mut self, record: &Record) {
        match record {
            Record::Document { domain } => self.begin_document(domain),
            Record::Picks(p) => {
                let weights: Vec<f32> = p.topk_weights.iter().map(|w| w.to_f32()).collect();
                self.record(p.phase, p.layer.into(), &p.topk_ids, &weights);
            }
        }
    }

    /// What was counted so far, without summaries.
    pub fn counts(&self) -> &ProfileBody {
        &self.profile
    }

    /// The profile of everything recorded so far.
    pub fn profile(&self, corpus_sha256: BTreeSet<String>) -> ProfileBody {
        let mut profile = self.profile.clone();
        profile.corpus_sha256 = corpus_sha256;
        profile.summarise();
        profile
    }
}

/// Scratch of the predictor.
struct Votes {
    /// `[E]`, all zero between two calls.
    count: Vec<u16>,
    candidates: Vec<u16>,
    /// `[k + 1]` candidates by their votes.
    with_votes: Vec<usize>,
    top: Vec<u16>,
}

impl Votes {
    fn new(num_experts: usize, num_experts_per_tok: usize) -> Self {
        Votes {
            count: vec![0; num_experts],
            candidates: Vec::new(),
            with_votes: vec![0; num_experts_per_tok + 1],
            top: Vec::new(),
        }
    }

    /// The k experts with most votes, of equals those of the first voters; none if no voter has a
    /// list.
    fn top(&mut self, k: usize, voters: &[u16], successors: &[u16]) -> Option<&[u16]> {
        self.candidates.clear();
        for &voter in voters {
            let list = &successors[usize::from(voter) * k..][..k];
            if list[0] == NONE {
                continue;
            }
            for &candidate in list {
                let count = &mut self.count[usize::from(candidate)];
                if *count == 0 {
                    self.candidates.push(candidate);
                }
                *count += 1;
            }
        }
        if self.candidates.is_empty() {
            return None;
        }
        // Votes are at most k, so counting finds the least that still belongs, without sorting.
        self.with_votes.fill(0);
        for &candidate in &self.candidates {
            self.with_votes[usize::from(self.count[usize::from(candidate)])] += 1;
        }
        let (mut enough, mut above) = (k, 0);
        while above + self.with_votes[enough] < k {
            above += self.with_votes[enough];
            enough -= 1;
        }
        let mut at_threshold = k - above;
        self.top.clear();
        for &candidate in &self.candidates {
            let votes = usize::from(std::mem::take(&mut self.count[usize::from(candidate)]));
            if votes > enough || (votes == enough && at_threshold > 0) {
                at_threshold -= usize::from(votes == enough);
                self.top.push(candidate);
            }
        }
        Some(&self.top)
    }
}

#[cfg(test)]
mod tests {
    use super::super::trace::RoutingTrace;
    use super::super::trace::tests::synthetic;
    use super::*;

    fn profile_of<'a>(
        trace: &RoutingTrace,
        documents: impl IntoIterator<Item = &'a [Record]>,
    ) -> ProfileBody {
        let h = trace.header();
        let mut stats = RoutingStats::new(
            h.num_layers.into(),
            h.num_experts.into(),
            h.num_experts_per_tok.into(),
        );
        for record in documents.into_iter().flatten() {
            stats.push(record);
        }
        stats.profile(BTreeSet::from(["c0ffee".into()]))
    }

    #[test]
    fn merged_shards_are_the_unsharded_profile() {
        let trace = synthetic(3, 24, 4, 11, 60);
        let documents = trace.documents();
        let whole = profile_of(&trace, documents.iter().copied());
        for shards in [2, 3, 5] {
            let merged = (0..shards)
                .map(|s| profile_of(&trace, documents.iter().copied().skip(s).step_by(shards)))
                .reduce(|a, b| a.merge(&b).unwrap())
                .unwrap();
            assert_eq!(merged, whole);
        }
        let text = serde_json::to_string(&whole).unwrap();
        assert_eq!(serde_json::from_str::<ProfileBody>(&text).unwrap(), whole);
    }

    #[test]
    fn a_resumed_count_is_the_whole_count() {
        let trace = synthetic(3, 24, 4, 6, 60);
        let documents = trace.documents();
        let whole = profile_of(&trace, documents.iter().copied());
        let (before, after) = documents.split_at(4);
        let first = profile_of(&trace, before.iter().copied());
        let text = serde_json::to_string(&first).unwrap();
        let mut stats = RoutingStats::resume(serde_json::from_str(&text).unwrap());
        after.iter().copied().flatten().for_each(|r| stats.push(r));
        assert_eq!(stats.profile(BTreeSet::from(["c0ffee".into()])), whole);
    }

    #[test]
    fn the_split_into_chunks_changes_nothing() {
        let ids: Vec<Vec<u16>> = vec![vec![0, 1, 2, 3, 1, 0], vec![2, 3, 0, 1, 3, 2]];
        let run = |step: usize| {
            let mut stats = RoutingStats::new(2, 4, 2);
            stats.begin_document("chat");
            for start in (0..6).step_by(step) {
                for (layer, ids) in ids.iter().enumerate() {
                    let ids = &ids[start..(start + step).min(6)];
                    stats.record(Phase::Prefill, layer, ids, &vec![0.5; ids.len()]);
                }
            }
            stats.profile(BTreeSet::new())
        };
        let whole = run(6);
        assert_eq!(whole, run(2));
        let layer = whole.total(1);
        assert_eq!(layer.picks, [1, 1, 2, 2]);
        assert_eq!(layer.weight_mass_q24[2], 1 << 24);
        // Token 2 picks in layer 0 what token 0 did, in another order, and so in layer 1.
        assert_eq!((layer.predictable_picks, layer.predicted_picks), (2, 2));
        assert_eq!((layer.repeatable_picks, layer.repeated_picks), (4, 0));
        assert_eq!(whole.tokens(Phase::Prefill), 3);
    }

    #[test]
    fn phases_and_domains_are_kept_apart() {
        let trace = synthetic(2, 8, 2, 3, 9);
        let profile = profile_of(&trace, trace.documents());
        assert_eq!(profile.domains.len(), 3);
        assert_eq!(profile.documents(), 3);
        assert_eq!(
            (
                profile.tokens(Phase::Prefill),
                profile.tokens(Phase::Decode)
            ),
            (18, 9)
        );
        let chat = &profile.domains["chat"];
        assert_eq!(chat.decode.layers[1].picks.iter().sum::<u64>(), 6);
        assert_eq!(profile.layers[0].predicted_by_previous_layer, None);
        assert!(profile.layers[1].predicted_by_previous_layer.is_some());
    }

    #[test]
    fn hottest_experts_come_first() {
        let mut stats = RoutingStats::new(1, 4, 2);
        stats.begin_document("x");
        stats.record(Phase::Decode, 0, &[3, 1, 1, 2], &[0.6, 0.4, 0.7, 0.3]);
        assert_eq!(stats.profile(BTreeSet::new()).hottest(0), [1, 2, 3, 0]);
    }
}
