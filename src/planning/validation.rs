//! Whether a plan's policy holds on text it was not made from.
//!
//! A static list looks best on the text it was counted on and fails on other text; so the slots
//! come from one part of a trace, the policy is chosen on a second, and a third tells the truth.

use serde::{Deserialize, Serialize};

use super::footprint::Footprint;
use super::policy::{Clairvoyant, PolicyConfig};
use super::simulator::{Outcome, simulate};
use super::trace::{Record, RoutingTrace};

/// Policies a plan chooses among, the default first.
pub(super) const CANDIDATES: [PolicyConfig; 3] = [
    PolicyConfig::Lru,
    PolicyConfig::LfuDecay {
        half_life_tokens: 64.0,
    },
    PolicyConfig::Static,
];

/// Hit rates on documents that neither the slots nor the choice of policy were made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    pub training_documents: usize,
    pub selection_documents: usize,
    pub held_out_documents: usize,
    pub held_out_tokens: u64,
    /// Every policy on the planned slots; `belady` knows the future and bounds the others.
    pub scores: Vec<PolicyScore>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyScore {
    pub policy: String,
    pub chosen: bool,
    pub expert_hit_rate: f64,
    pub h2d_bytes_per_token: f64,
}

/// A trace's documents dealt in turn to three uses.
pub(super) struct Split<'a> {
    trace: &'a RoutingTrace,
    pub(super) training: Vec<&'a [Record]>,
    pub(super) selection: Vec<&'a [Record]>,
    held_out: Vec<&'a [Record]>,
}

impl<'a> Split<'a> {
    pub(super) fn of(trace: &'a RoutingTrace) -> Option<Self> {
        let documents = trace.documents();
        let part = |n| documents.iter().copied().skip(n).step_by(3).collect();
        (documents.len() >= 3).then(|| Split {
            trace,
            training: part(0),
            selection: part(1),
            held_out: part(2),
        })
    }

    /// Every candidate on the planned slots.
    pub(super) fn score(
        &self,
        f: &Footprint,
        slots: &[usize],
        hottest: &[Vec<u16>],
        documents: &[&[Record]],
    ) -> Vec<Outcome> {
        let run = |config: &PolicyConfig| {
            let layers: Vec<_> = slots
                .iter()
                .zip(hottest)
                .map(|(&n, h)| config.fill(n, h))
                .collect();
            let mut policy = config.build(f.num_experts, &layers);
            let records = documents.iter().copied().flatten();
            simulate(policy.as_mut(), f.num_experts_per_tok, records)
        };
        CANDIDATES.iter().map(run).collect()
    }

    pub(super) fn validate(
        &self,
        f: &Footprint,
        slots: &[usize],
        hottest: &[Vec<u16>],
        chosen: usize,
    ) -> Validation {
        let records = || self.held_out.iter().copied().flatten();
        let tokens = self.trace.header().tokens(records());
        let score = |policy: &str, chosen, outcome: &Outcome| PolicyScore {
            policy: policy.into(),
            chosen,
            expert_hit_rate: outcome.hit_rate(),
            h2d_bytes_per_token: outcome.moved_bytes(f.expert_bytes) as f64 / tokens.max(1) as f64,
        };
        let outcomes = self.score(f, slots, hottest, &self.held_out);
        let mut scores: Vec<PolicyScore> = CANDIDATES
            .iter()
            .zip(&outcomes)
            .enumerate()
            .map(|(i, (config, outcome))| score(config.name(), i == chosen, outcome))
            .collect();
        let start: Vec<_> = slots
            .iter()
            .zip(hottest)
            .map(|(&n, h)| PolicyConfig::Lru.fill(n, h))
            .collect();
        let k = f.num_experts_per_tok;
        let mut belady = Clairvoyant::new(f.num_experts, k, &start, records());
        scores.push(score("belady", false, &simulate(&mut belady, k, records())));
        Validation {
            training_documents: self.training.len(),
            selection_documents: self.selection.len(),
            held_out_documents: self.held_out.len(),
            held_out_tokens: tokens,
            scores,
        }
    }
}
