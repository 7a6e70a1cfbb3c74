//! Whether a plan's policy holds on text it was not made from.
//!
//! A static list looks best on the text it was counted on and fails on other text; so the slots
//! come from one part of a trace, the policy is chosen on a second, and a third tells the truth.

use serde::{Deserialize, Serialize};

use super::cache::{ExpertCache, Throttle};
use super::footprint::Footprint;
use super::policy::{Clairvoyant, LayerSlots, PolicyConfig};
use super::simulator::{Outcome, simulate, simulate_prompted};
use super::trace::{Record, RoutingTrace, TraceHeader};

/// Shares of the experts in slots at which policies are compared.
pub const SHARES: [f64; 3] = [0.125, 0.25, 0.5];
/// Picks that one simulation goes through, about: 3,000 tokens of 48 layers of 10, a fraction of a second
/// each.
const MOST_PICKS: usize = 1_500_000;

/// Hit rates on documents that neither the slots nor the choice of policy were made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    pub training_documents: usize,
    pub selection_documents: usize,
    pub held_out_documents: usize,
    pub held_out_tokens: u64,
    /// The policies on the planned slots; `belady` knows the future and bounds the others.
    pub scores: Vec<PolicyScore>,
    /// The same with equal slots in every layer.
    #[serde(default)]
    pub by_share: Vec<ShareScores>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShareScores {
    /// Of the experts of each layer.
    pub share: f64,
    pub slots_per_layer: usize,
    pub scores: Vec<PolicyScore>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyScore {
    pub policy: String,
    pub chosen: bool,
    pub expert_hit_rate: f64,
    pub h2d_bytes_per_token: f64,
    /// Predicted time of a token's experts, what the policy copies included; absent where no GPU
    /// makes use of hits. The policy is the one with the least of it on the documents of the choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_ms: Option<f64>,
}

/// Milliseconds of a token's experts.
pub(super) type ExpertTime<'a> = &'a dyn Fn(&Outcome) -> Option<f64>;

/// How documents are gone through.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reading {
    /// Token by token
    Decoded,
    /// The first part of each as a prompt
    Prompted,
}

/// A trace's documents dealt in turn to three uses.
pub(super) struct Split<'a> {
    trace: &'a RoutingTrace,
    pub(super) training: Vec<&'a [Record]>,
    selection: Vec<&'a [Record]>,
    held_out: Vec<&'a [Record]>,
}

impl<'a> Split<'a> {
    pub(super) fn of(trace: &'a RoutingTrace) -> Option<Self> {
        let documents = trace.documents();
        let part = |n| documents.iter().copied().skip(n).step_by(3);
        (documents.len() >= 3).then(|| Split {
            trace,
            training: part(0).collect(),
            selection: enough(trace.header(), part(1)),
            held_out: enough(trace.header(), part(2)),
        })
    }

    pub(super) fn selection_tokens(&self) -> u64 {
        self.tokens(&self.selection)
    }

    /// A policy on the documents of the choice.
    pub(super) fn run(
        &self,
        reading: Reading,
        config: PolicyConfig,
        throttle: Option<Throttle>,
        f: &Footprint,
        slots: &[usize],
        hottest: &[Vec<u16>],
    ) -> Outcome {
        on(
            &self.selection,
            reading,
            config,
            throttle,
            f,
            slots,
            hottest,
        )
    }

    pub(super) fn validate(
        &self,
        f: &Footprint,
        slots: &[usize],
        hottest: &[Vec<u16>],
        chosen: PolicyConfig,
        throttle: Option<Throttle>,
        time: ExpertTime,
    ) -> Validation {
        let by_share = |&share: &f64| {
            let slots_per_layer = (share * f.num_experts as f64).round() as usize;
            let slots = vec![slots_per_layer; f.num_layers];
            ShareScores {
                share,
                slots_per_layer,
                scores: self.scores(f, &slots, hottest, chosen, throttle, time),
            }
        };
        Validation {
            training_documents: self.training.len(),
            selection_documents: self.selection.len(),
            held_out_documents: self.held_out.len(),
            held_out_tokens: self.tokens(&self.held_out),
            scores: self.scores(f, slots, hottest, chosen, throttle, time),
            by_share: SHARES.iter().map(by_share).collect(),
        }
    }

    /// The static set, LRU without a byte budget, the chosen policy and the optimum, held out.
    fn scores(
        &self,
        f: &Footprint,
        slots: &[usize],
        hottest: &[Vec<u16>],
        chosen: PolicyConfig,
        throttle: Option<Throttle>,
        time: ExpertTime,
    ) -> Vec<PolicyScore> {
        let tokens = self.tokens(&self.held_out).max(1) as f64;
        let score = |policy: String, is_chosen, outcome: &Outcome| PolicyScore {
            policy,
            chosen: is_chosen,
            expert_hit_rate: outcome.hit_rate(),
            h2d_bytes_per_token: outcome.moved_bytes(f.expert_bytes) as f64 / tokens,
            experts_ms: time(outcome),
        };
        let mut scores = Vec::new();
        for config in [PolicyConfig::Static, PolicyConfig::Lru] {
            if config != chosen {
                let outcome = on(
                    &self.held_out,
                    Reading::Decoded,
                    config,
                    None,
                    f,
                    slots,
                    hottest,
                );
                scores.push(score(config.label(), false, &outcome));
            }
        }
        let outcome = on(
            &self.held_out,
            Reading::Decoded,
            chosen,
            throttle,
            f,
            slots,
            hottest,
        );
        scores.push(score(chosen.label(), true, &outcome));

        let records = || self.held_out.iter().copied().flatten();
        let start = filled(PolicyConfig::Lru, slots, hottest);
        let k = f.num_experts_per_tok;
        let belady = Clairvoyant::new(f.num_experts, k, &start, records());
        let mut belady = ExpertCache::new(Box::new(belady), f.num_layers, Throttle::NONE);
        let outcome = simulate(&mut belady, k, records());
        scores.push(score("belady".into(), false, &outcome));
        scores
    }

    fn tokens(&self, documents: &[&[Record]]) -> u64 {
        self.trace
            .header()
            .tokens(documents.iter().copied().flatten())
    }
}

/// Whole documents, one at least, from all over the trace: as many as have picks enough.
fn enough<'a>(
    header: &TraceHeader,
    documents: impl Iterator<Item = &'a [Record]> + Clone,
) -> Vec<&'a [Record]> {
    let picks_per_token = usize::from(header.num_layers) * usize::from(header.num_experts_per_tok);
    let picks = header.tokens(documents.clone().flatten()) as usize * picks_per_token;
    documents
        .step_by(picks.div_ceil(MOST_PICKS).max(1))
        .collect()
}

fn filled(config: PolicyConfig, slots: &[usize], hottest: &[Vec<u16>]) -> Vec<LayerSlots> {
    let layers = slots.iter().zip(hottest);
    layers
        .map(|(&n, hottest)| config.fill(n, hottest))
        .collect()
}

fn on(
    documents: &[&[Record]],
    reading: Reading,
    config: PolicyConfig,
    throttle: Option<Throttle>,
    f: &Footprint,
    slots: &[usize],
    hottest: &[Vec<u16>],
) -> Outcome {
    let layers = filled(config, slots, hottest);
    let throttle = throttle.unwrap_or(Throttle::NONE);
    let mut cache = ExpertCache::build(config, f.num_experts, &layers, throttle);
    let k = f.num_experts_per_tok;
    match reading {
        Reading::Decoded => simulate(&mut cache, k, documents.iter().copied().flatten()),
        Reading::Prompted => simulate_prompted(&mut cache, k, documents),
    }
}
