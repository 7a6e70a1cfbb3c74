//! What a model's router does on a text, counted: the body of profile.json.
//!
//! Everything that is counted is an integer, so profiles of the parts of a corpus add up to the
//! profile of the whole, to the last digit. The summaries are computed from the counts.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::stack_distance::{DistanceHistogram, HitCurve, add_counts};
use super::trace::Phase;

/// Units of [`LayerCounts::weight_mass_q24`] in a router weight of 1.
pub const WEIGHT_ONE_Q24: f64 = 16_777_216.0;

/// A profile that cannot be used, or not together with another.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProfileError {
    #[error("profile: {what} is {found}, expected {expected}; record it again")]
    Damaged {
        what: String,
        found: usize,
        expected: usize,
    },
    #[error("profiles do not merge: {what} is {a} in one and {b} in the other")]
    Different {
        what: &'static str,
        a: usize,
        b: usize,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileBody {
    pub num_layers: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    /// Of every corpus file that went in.
    pub corpus_sha256: BTreeSet<String>,
    pub domains: BTreeMap<String, DomainProfile>,
    /// Of all domains and both phases together.
    pub layers: Vec<LayerSummary>,
    /// Of all domains, the phases apart; empty if there were no such tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefill_layers: Vec<LayerSummary>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_layers: Vec<LayerSummary>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainProfile {
    pub documents: u64,
    #[serde(default)]
    pub prefill: PhaseProfile,
    #[serde(default)]
    pub decode: PhaseProfile,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseProfile {
    pub tokens: u64,
    /// Empty if there were no tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerCounts>,
    /// What the counts come to, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub summary: Vec<LayerSummary>,
}

/// Counts of one layer, in one phase of one domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerCounts {
    /// `[E]` tokens that picked the expert.
    pub picks: Vec<u64>,
    /// `[E]` sum of its router weights, in units of 2^-24.
    pub weight_mass_q24: Vec<u64>,
    /// LRU stack distances; every document starts with an empty stack.
    pub stack_distance: DistanceHistogram,
    /// Picks of tokens that have a predecessor in their document.
    pub repeatable_picks: u64,
    /// Those among them that the predecessor picked too.
    pub repeated_picks: u64,
    /// Picks for which the layer before allowed a prediction, see [`RoutingStats`].
    ///
    /// [`RoutingStats`]: super::RoutingStats
    pub predictable_picks: u64,
    pub predicted_picks: u64,
}

/// What the counts of a layer come to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSummary {
    pub picks: u64,
    /// Of the share of picks per expert; at most log2 E.
    pub entropy_bits: f64,
    /// 0: all experts alike; towards 1: few take everything.
    pub gini: f64,
    /// Share of a token's picks that the token before it had picked.
    pub consecutive_token_reuse: f64,
    /// Share of picks foretold by the picks in the layer before; none in the first layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_by_previous_layer: Option<f64>,
    /// `[E + 1]` by number of slots, the cache carried from document to document.
    pub lru_hit_rate_by_slots: Vec<f32>,
}

impl ProfileBody {
    /// Without a token.
    pub fn new(num_layers: usize, num_experts: usize, num_experts_per_tok: usize) -> Self {
        let mut profile = ProfileBody {
            num_layers,
            num_experts,
            num_experts_per_tok,
            corpus_sha256: BTreeSet::new(),
            domains: BTreeMap::new(),
            layers: Vec::new(),
            prefill_layers: Vec::new(),
            decode_layers: Vec::new(),
        };
        profile.summarise();
        profile
    }

    pub fn tokens(&self, phase: Phase) -> u64 {
        self.domains.values().map(|d| d.phase(phase).tokens).sum()
    }

    pub fn documents(&self) -> u64 {
        self.domains.values().map(|d| d.documents).sum()
    }

    /// Counts of a layer over all domains and phases.
    pub fn total(&self, layer: usize) -> LayerCounts {
        let mut total = self.total_of(Phase::Prefill, layer);
        total.add(&self.total_of(Phase::Decode, layer));
        total
    }

    /// Counts of a layer over all domains, in one phase.
    pub fn total_of(&self, phase: Phase, layer: usize) -> LayerCounts {
        let mut total = LayerCounts::new(self.num_experts);
        for domain in self.domains.values() {
            if let Some(counts) = domain.phase(phase).layers.get(layer) {
                total.add(counts);
            }
        }
        total
    }

    /// Expected LRU hit rates by slots, layer by layer.
    pub fn hit_curves(&self) -> Vec<HitCurve> {
        let curve = |layer| self.total(layer).stack_distance.curve();
        (0..self.num_layers).map(curve).collect()
    }

    /// Experts of a layer by picks, the most picked first; of equals the lower id first.
    pub fn hottest(&self, layer: usize) -> Vec<u16> {
        let picks = self.total(layer).picks;
        let mut ids: Vec<u16> = (0..self.num_experts as u16).collect();
        ids.sort_by_key(|&e| std::cmp::Reverse(picks[usize::from(e)]));
        ids
    }

    /// Adds up two profiles; parts of a corpus give the profile of the whole.
    ///
    /// # Errors
    /// If the models differ in size or a profile is damaged.
    pub fn merge(mut self, other: &ProfileBody) -> Result<ProfileBody, ProfileError> {
        for (what, a, b) in [
            ("the number of layers", self.num_layers, other.num_layers),
            ("the number of experts", self.num_experts, other.num_experts),
            (
                "the number of experts per token",
                self.num_experts_per_tok,
                other.num_experts_per_tok,
            ),
        ] {
            if a != b {
                return Err(ProfileError::Different { what, a, b });
            }
        }
        self.check()?;
        other.check()?;
        self.corpus_sha256
            .extend(other.corpus_sha256.iter().cloned());
        for (name, theirs) in &other.domains {
            let ours = self.domains.entry(name.clone()).or_default();
            ours.documents += theirs.documents;
            ours.prefill.add(&theirs.prefill);
            ours.decode.add(&theirs.decode);
        }
        self.summarise();
        Ok(self)
    }

    /// Whether all lists have the lengths the sizes ask for; a file may say anything.
    ///
    /// # Errors
    /// [`ProfileError::Damaged`] names the first that has not.
    pub fn check(&self) -> Result<(), ProfileError> {
        let expect = |what: String, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(ProfileError::Damaged {
                what,
                found,
                expected,
            }),
        };
        for (name, domain) in &self.domains {
            for (phase, profile) in [("prefill", &domain.prefill), ("decode", &domain.decode)] {
                if profile.layers.is_empty() && profile.tokens == 0 {
                    continue;
                }
                let place = format!("{phase} of domain `{name}`");
                let found = profile.layers.len();
                expect(format!("{place}: layers"), found, self.num_layers)?;
                for (i, layer) in profile.layers.iter().enumerate() {
                    for (list, values) in [
                        ("picks", &layer.picks),
                        ("weight_mass_q24", &layer.weight_mass_q24),
                        ("reuses", &layer.stack_distance.reuses),
                        ("first_picks", &layer.stack_distance.first_picks),
                    ] {
                        let what = format!("{place}, layer {i}: length of {list}");
                        expect(what, values.len(), self.num_experts)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Computes every summary from the counts.
    pub(super) fn summarise(&mut self) {
        let layers = 0..self.num_layers;
        self.layers = layers
            .clone()
            .map(|layer| LayerSummary::of(&self.total(layer)))
            .collect();
        let of_phase = |phase| -> Vec<LayerSummary> {
            let layers = layers.clone().filter(|_| self.tokens(phase) > 0);
            let summary = |layer| LayerSummary::of(&self.total_of(phase, layer));
            layers.map(summary).collect()
        };
        (self.prefill_layers, self.decode_layers) =
            (of_phase(Phase::Prefill), of_phase(Phase::Decode));
        for domain in self.domains.values_mut() {
            for phase in [&mut domain.prefill, &mut domain.decode] {
                phase.summary = phase.layers.iter().map(LayerSummary::of).collect();
            }
        }
    }
}

impl DomainProfile {
    /// `[E]` tokens of both phases that picked each expert of a layer.
    pub fn picks(&self, layer: usize, num_experts: usize) -> Vec<u64> {
        let mut picks = vec![0; num_experts];
        for phase in [&self.prefill, &self.decode] {
            if let Some(counts) = phase.layers.get(layer) {
                add_counts(&mut picks, &counts.picks);
            }
        }
        picks
    }

    pub fn phase(&self, phase: Phase) -> &PhaseProfile {
        match phase {
            Phase::Prefill => &self.prefill,
            Phase::Decode => &self.decode,
        }
    }

    pub(super) fn phase_mut(&mut self, phase: Phase) -> &mut PhaseProfile {
        match phase {
            Phase::Prefill => &mut self.prefill,
            Phase::Decode => &mut self.decode,
        }
    }
}

impl PhaseProfile {
    fn add(&mut self, other: &PhaseProfile) {
        self.tokens += other.tokens;
        if self.layers.is_empty() {
            self.layers.clone_from(&other.layers);
        } else {
            for (ours, theirs) in self.layers.iter_mut().zip(&other.layers) {
                ours.add(theirs);
            }
        }
    }
}

impl LayerCounts {
    pub(super) fn new(num_experts: usize) -> Self {
        LayerCounts {
            picks: vec![0; num_experts],
            weight_mass_q24: vec![0; num_experts],
            stack_distance: DistanceHistogram::new(num_experts),
            ..LayerCounts::default()
        }
    }

    fn add(&mut self, other: &LayerCounts) {
        add_counts(&mut self.picks, &other.picks);
        add_counts(&mut self.weight_mass_q24, &other.weight_mass_q24);
        self.stack_distance.add(&other.stack_distance);
        self.repeatable_picks += other.repeatable_picks;
        self.repeated_picks += other.repeated_picks;
        self.predictable_picks += other.predictable_picks;
        self.predicted_picks += other.predicted_picks;
    }
}

impl LayerSummary {
    fn of(counts: &LayerCounts) -> Self {
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let curve = counts.stack_distance.curve();
        LayerSummary {
            picks: counts.picks.iter().sum(),
            entropy_bits: entropy_bits(&counts.picks),
            gini: gini(&counts.picks),
            consecutive_token_reuse: share(counts.repeated_picks, counts.repeatable_picks),
            predicted_by_previous_layer: (counts.predictable_picks > 0)
                .then(|| share(counts.predicted_picks, counts.predictable_picks)),
            lru_hit_rate_by_slots: curve.as_slice().iter().map(|&h| h as f32).collect(),
        }
    }
}

fn entropy_bits(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let bits = |&c: &u64| {
        let p = c as f64 / total as f64;
        -p * p.log2()
    };
    counts.iter().filter(|&&c| c > 0).map(bits).sum()
}

fn gini(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    let mut sorted = counts.to_vec();
    sorted.sort_unstable();
    let n = sorted.len() as f64;
    let ranked: f64 = (1..)
        .zip(&sorted)
        .map(|(i, &c)| f64::from(i) * c as f64)
        .sum();
    2.0 * ranked / (n * total as f64) - (n + 1.0) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_and_gini_of_known_distributions() {
        assert_eq!(entropy_bits(&[5, 5, 5, 5]), 2.0);
        assert_eq!(entropy_bits(&[7, 0]), 0.0);
        assert_eq!(entropy_bits(&[]), 0.0);
        assert!(gini(&[3, 3, 3]).abs() < 1e-12);
        assert!((gini(&[0, 0, 0, 8]) - 0.75).abs() < 1e-12);
        assert_eq!(gini(&[0, 0]), 0.0);
    }

    #[test]
    fn profiles_of_different_models_do_not_merge() {
        let a = ProfileBody::new(2, 8, 2);
        let error = a.merge(&ProfileBody::new(2, 16, 2)).unwrap_err();
        assert!(
            error.to_string().contains("experts is 8 in one and 16"),
            "{error}"
        );
    }

    #[test]
    fn a_profile_with_lists_of_wrong_length_is_refused() {
        let mut profile = ProfileBody::new(1, 4, 2);
        let mut counts = LayerCounts::new(4);
        counts.picks.pop();
        let prefill = PhaseProfile {
            tokens: 3,
            layers: vec![counts],
            ..PhaseProfile::default()
        };
        let domain = DomainProfile {
            prefill,
            ..DomainProfile::default()
        };
        profile.domains.insert("chat".into(), domain);
        let message = profile.check().unwrap_err().to_string();
        assert!(
            message.contains("prefill of domain `chat`, layer 0: length of picks is 3, expected 4"),
            "{message}"
        );
    }
}
