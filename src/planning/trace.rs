//! Routing events in memory: which experts each token picked in each layer, in order.
//!
//! Records arrive as a forward pass makes them: a chunk of tokens, layer after layer. Caches are
//! per layer, so their consumers need each layer's tokens in order and nothing more.

use half::f16;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Prefill,
    Decode,
}

/// What a trace is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    pub num_layers: u16,
    pub num_experts: u16,
    pub num_experts_per_tok: u16,
    /// Of the model, as every file of ours carries it.
    pub fingerprint: String,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A new sequence starts: what follows has nothing to do with the tokens before.
    Document {
        domain: String,
    },
    Picks(Picks),
}

/// The router's picks for a run of tokens in one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Picks {
    pub phase: Phase,
    pub layer: u16,
    /// Position of the first token in its sequence.
    pub first_position: u32,
    /// `[T, k]` best first
    pub topk_ids: Vec<u16>,
    /// `[T, k]`
    pub topk_weights: Vec<f16>,
}

impl Picks {
    /// From what the router gave, `[T, k]` each; weights are rounded to f16.
    pub fn new(
        phase: Phase,
        layer: usize,
        first_position: usize,
        topk_ids: &[u16],
        topk_weights: &[f32],
    ) -> Self {
        Picks {
            phase,
            layer: layer as u16,
            first_position: first_position as u32,
            topk_ids: topk_ids.to_vec(),
            topk_weights: topk_weights.iter().map(|&w| f16::from_f32(w)).collect(),
        }
    }
}

/// A whole trace. Long ones are better read by iteration, with [`TraceReader`].
///
/// [`TraceReader`]: super::TraceReader
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingTrace {
    header: TraceHeader,
    records: Vec<Record>,
}

impl RoutingTrace {
    pub fn new(header: TraceHeader) -> Self {
        RoutingTrace {
            header,
            records: Vec::new(),
        }
    }

    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Appends what happened next.
    pub fn push(&mut self, record: Record) {
        if let Record::Picks(picks) = &record {
            self.header.assert_holds(picks);
        }
        self.records.push(record);
    }

    /// Tokens routed, counted in the first layer.
    pub fn tokens(&self) -> u64 {
        self.header.tokens(&self.records)
    }

    /// The records of each document, its marker first.
    pub fn documents(&self) -> Vec<&[Record]> {
        let starts = |r: &Record| matches!(r, Record::Document { .. });
        self.records.chunk_by(|_, next| !starts(next)).collect()
    }
}

/// Tokens of `num_experts_per_tok` picks each in `records`, counted in the first layer.
pub(super) fn count_tokens<'a>(
    records: impl IntoIterator<Item = &'a Record>,
    num_experts_per_tok: usize,
) -> usize {
    let picks = records.into_iter().map(|record| match record {
        Record::Picks(p) if p.layer == 0 => p.topk_ids.len(),
        _ => 0,
    });
    picks.sum::<usize>() / num_experts_per_tok.max(1)
}

impl TraceHeader {
    /// Tokens routed in `records`, counted in the first layer.
    pub fn tokens<'a>(&self, records: impl IntoIterator<Item = &'a Record>) -> u64 {
        count_tokens(records, self.num_experts_per_tok.into()) as u64
    }

    /// Whether `picks` can be of this model: k distinct experts that exist, for whole tokens.
    pub(super) fn holds(&self, picks: &Picks) -> bool {
        picks.layer < self.num_layers
            && picks
                .topk_ids
                .len()
                .is_multiple_of(usize::from(self.num_experts_per_tok))
            && picks.topk_ids.len() == picks.topk_weights.len()
            && picks.topk_ids.iter().all(|&e| e < self.num_experts)
            && picks
                .topk_ids
                .chunks_exact(usize::from(self.num_experts_per_tok))
                .all(|ids| (1..ids.len()).all(|i| !ids[..i].contains(&ids[i])))
    }

    pub(super) fn assert_holds(&self, picks: &Picks) {
        assert!(self.holds(picks), "picks of another model than {self:?}");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, seq::index};
    use rand_chacha::ChaCha8Rng;

    /// A trace with locality: each document favours experts of its own in every layer.
    pub(crate) fn synthetic(
        layers: u16,
        experts: u16,
        k: u16,
        documents: usize,
        tokens: usize,
    ) -> RoutingTrace {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut trace = RoutingTrace::new(TraceHeader {
            num_layers: layers,
            num_experts: experts,
            num_experts_per_tok: k,
            fingerprint: "f00d".into(),
        });
        for document in 0..documents {
            let domain = ["chat", "code", "math"][document % 3];
            trace.push(Record::Document {
                domain: domain.into(),
            });
            let favourites: Vec<Vec<u16>> = (0..layers)
                .map(|_| {
                    let some =
                        index::sample(&mut rng, experts.into(), usize::from(experts).div_ceil(2));
                    some.into_iter().map(|e| e as u16).collect()
                })
                .collect();
            let prefill = tokens * 2 / 3;
            let chunks = [(Phase::Prefill, 0, prefill)]
                .into_iter()
                .chain((prefill..tokens).map(|t| (Phase::Decode, t, 1)));
            for (phase, position, tokens) in chunks {
                for layer in 0..layers {
                    let mut ids = Vec::new();
                    for _ in 0..tokens {
                        let start = ids.len();
                        while ids.len() < start + usize::from(k) {
                            let own = &favourites[usize::from(layer)];
                            let expert = match rng.random_range(0..4) {
                                0 => rng.random_range(0..experts),
                                _ => own[rng.random_range(0..own.len())],
                            };
                            if !ids[start..].contains(&expert) {
                                ids.push(expert);
                            }
                        }
                    }
                    let weights = ids.iter().map(|_| f16::from_f32(rng.random())).collect();
                    trace.push(Record::Picks(Picks {
                        phase,
                        layer,
                        first_position: position as u32,
                        topk_ids: ids,
                        topk_weights: weights,
                    }));
                }
            }
        }
        trace
    }

    #[test]
    fn documents_start_at_their_markers() {
        let trace = synthetic(2, 8, 2, 3, 9);
        let documents = trace.documents();
        assert_eq!(documents.len(), 3);
        assert!(
            documents
                .iter()
                .all(|d| matches!(d[0], Record::Document { .. }))
        );
        assert_eq!(trace.tokens(), 27);
    }

    #[test]
    #[should_panic(expected = "another model")]
    fn picks_of_a_layer_that_is_not_there_are_a_bug() {
        let mut trace = synthetic(2, 8, 2, 0, 0);
        trace.push(Record::Picks(Picks {
            phase: Phase::Decode,
            layer: 2,
            first_position: 0,
            topk_ids: vec![],
            topk_weights: vec![],
        }));
    }
}
