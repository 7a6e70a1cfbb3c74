//! Belady's optimum: the bound that no policy passes.

use super::slot_map::SlotMap;
use super::{Admit, LayerSlots, Policy};
use crate::planning::trace::Record;

/// Belady's optimum: keeps what is picked again soonest. Knows one trace and can only replay it.
///
/// No policy has more hits on that trace from the same start: an upper bound to measure others by.
pub struct Clairvoyant(Vec<ClairvoyantLayer>);

struct ClairvoyantLayer {
    map: SlotMap,
    /// `[tokens, k]` the token that picks the same expert next, MAX if none.
    next_use: Vec<u32>,
    at: usize,
    /// `[E]` next use of each expert as of now.
    next_of: Vec<u32>,
}

impl Clairvoyant {
    /// Learns the future of every layer from `records`.
    pub fn new<'a>(
        num_experts: usize,
        num_experts_per_tok: usize,
        layers: &[LayerSlots],
        records: impl IntoIterator<Item = &'a Record>,
    ) -> Self {
        let mut picks: Vec<Vec<u16>> = vec![Vec::new(); layers.len()];
        for record in records {
            if let Record::Picks(p) = record {
                picks[usize::from(p.layer)].extend_from_slice(&p.topk_ids);
            }
        }
        let layer = |(slots, picks): (&LayerSlots, Vec<u16>)| {
            let mut next_of = vec![u32::MAX; num_experts];
            let mut next_use = vec![u32::MAX; picks.len()];
            for (i, &expert) in picks.iter().enumerate().rev() {
                next_use[i] = next_of[usize::from(expert)];
                next_of[usize::from(expert)] = (i / num_experts_per_tok) as u32;
            }
            ClairvoyantLayer {
                map: SlotMap::new(num_experts, slots),
                next_use,
                at: 0,
                next_of,
            }
        };
        Clairvoyant(layers.iter().zip(picks).map(layer).collect())
    }
}

impl Policy for Clairvoyant {
    fn name(&self) -> String {
        "belady".into()
    }

    fn slot(&self, layer: usize, expert: u16) -> Option<u16> {
        self.0[layer].map.slot(expert)
    }

    fn contents(&self, layer: usize) -> &[Option<u16>] {
        self.0[layer].map.contents()
    }

    fn access(&mut self, layer: usize, topk_ids: &[u16], _: usize, admits: &mut Vec<Admit>) {
        let layer = &mut self.0[layer];
        for &expert in topk_ids {
            layer.next_of[usize::from(expert)] = layer.next_use[layer.at];
            layer.at += 1;
        }
        let next = |e: u16| -f64::from(layer.next_of[usize::from(e)]);
        let mut missed: Vec<u16> = topk_ids
            .iter()
            .copied()
            .filter(|&e| layer.map.slot(e).is_none())
            .collect();
        missed.sort_by_key(|&e| layer.next_of[usize::from(e)]);
        for expert in missed {
            match layer.map.victim(next) {
                Some((slot, least)) if least < next(expert) => {
                    admits.push(layer.map.place(expert, slot));
                }
                _ => {}
            }
        }
    }
}
