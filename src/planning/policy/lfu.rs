//! Frequency with a fading past, and a pay-back test before every copy.
//!
//! The past fades slowly within a sequence, which keeps to its subject, and at once where another begins: one
//! half-life for both would forget a long text's habits, or take a chat's for the next one's.

use super::counter::DecayedPicks;
use super::slot_map::SlotMap;
use super::{Admit, LayerPolicy, LayerSlots, Offer};

/// What picks of the sequences before count for in a new one. On routing of the 80B shape an eighth with a
/// half-life of 2048 tokens needs fewer experts from RAM, copies counted in, than the best half-life for
/// short texts alone: 4% on novels after 4k tokens, 0.4% on texts of 130.
const EARLIER_SEQUENCES: f64 = 0.125;

#[derive(Debug)]
pub(super) struct LfuLayer {
    map: SlotMap,
    picks: DecayedPicks,
    margin_picks: f64,
    /// The slot to give up next. All scores fade alike, so it stays the least until its expert is
    /// picked or leaves: most misses then cost one comparison instead of a walk over the slots.
    least: Option<u16>,
    /// Scratch: a token's misses.
    missed: Vec<u16>,
}

impl LfuLayer {
    pub fn new(
        num_experts: usize,
        layer: &LayerSlots,
        half_life_tokens: f64,
        margin_picks: f64,
    ) -> Self {
        LfuLayer {
            map: SlotMap::new(num_experts, layer),
            picks: DecayedPicks::new(num_experts, half_life_tokens),
            margin_picks,
            least: None,
            missed: Vec::new(),
        }
    }

    /// Whether `expert` should have the slot of one that was picked `least` times. Ever so much more, or
    /// experts of equal picks would take turns.
    fn is_worth(&self, expert: u16, least: f64) -> bool {
        self.picks.picks(expert) > least + self.margin_picks.max(1e-9)
    }

    /// The slot to give up and how often its expert was picked; none if all are pinned.
    fn victim(&mut self) -> Option<(u16, f64)> {
        let slot = match self.least {
            Some(slot) => slot,
            None => self.map.victim(|e| self.picks.picks(e))?.0,
        };
        self.least = Some(slot);
        let expert = self.map.contents()[usize::from(slot)];
        Some((
            slot,
            expert.map_or(f64::NEG_INFINITY, |e| self.picks.picks(e)),
        ))
    }
}

impl LayerPolicy for LfuLayer {
    fn map(&self) -> &SlotMap {
        &self.map
    }

    fn access(&mut self, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>) {
        self.picks.count(topk_ids);
        let mut missed = std::mem::take(&mut self.missed);
        missed.clear();
        for &expert in topk_ids {
            match self.map.slot(expert) {
                None => missed.push(expert),
                slot if slot == self.least => self.least = None,
                Some(_) => {}
            }
        }
        // The most wanted first, so that none is copied only to make room for the next.
        missed.sort_by(|&a, &b| self.picks.picks(b).total_cmp(&self.picks.picks(a)));
        for &expert in missed.iter().take(room) {
            match self.victim() {
                Some((slot, least)) if self.is_worth(expert, least) => {
                    admits.push(self.map.place(expert, slot));
                    self.least = None;
                }
                _ => break,
            }
        }
        self.missed = missed;
    }

    fn begin_sequence(&mut self) {
        // The slot to give up stays the least: all fade alike.
        self.picks.fade(EARLIER_SEQUENCES);
    }

    fn admit_prefill(&mut self, offer: Offer<'_>, admits: &mut Vec<Admit>) {
        let outside = |&e: &u16| self.map.slot(e).is_none() && offer.has(e);
        let mut wanted: Vec<u16> = (0..self.map.num_experts() as u16).filter(outside).collect();
        // Stable: of equals the lower id first.
        wanted.sort_by(|&a, &b| self.picks.picks(b).total_cmp(&self.picks.picks(a)));
        self.least = None;
        for expert in wanted.into_iter().take(offer.at_most) {
            match self.victim() {
                Some((slot, least)) if self.is_worth(expert, least) => {
                    admits.push(self.map.place(expert, slot));
                    self.least = None;
                }
                _ => break,
            }
        }
    }

    fn worth(&self) -> Vec<f32> {
        self.picks.all()
    }

    fn restore(&mut self, contents: &[Option<u16>], worth: &[f32]) {
        self.map.set_contents(contents);
        self.picks.set_all(worth);
        self.least = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_restore_the_least_picked_of_the_restored_experts_is_evicted() {
        let layer = LayerSlots {
            slots: 2,
            pinned_experts: Vec::new(),
            initial_experts: vec![0, 1],
        };
        let mut lfu = LfuLayer::new(8, &layer, 1e6, 0.5);
        let mut admits = Vec::new();
        // A miss that is not worth a slot finds the slot to give up next: expert 0's, picked once.
        for ids in [&[0, 1][..], &[1], &[1, 7]] {
            lfu.access(ids, 8, &mut admits);
        }
        assert_eq!((&admits[..], lfu.least), (&[][..], Some(0)));
        // In the restored state the other slot holds the least picked expert.
        let mut picks = [0.0; 8];
        (picks[4], picks[5]) = (9.0, 2.0);
        lfu.restore(&[Some(4), Some(5)], &picks);
        for ids in [[6], [6], [6]] {
            lfu.access(&ids, 8, &mut admits);
        }
        let evicts_5 = Admit {
            expert: 6,
            slot: 1,
            evicted: Some(5),
        };
        assert_eq!(admits, [evicts_5]);
    }

    /// The half-life says what a pick counts for later; another sequence takes seven eighths at once.
    #[test]
    fn picks_fade_by_the_half_life_and_to_an_eighth_in_a_new_sequence() {
        let layer = LayerSlots {
            slots: 1,
            ..LayerSlots::default()
        };
        let mut lfu = LfuLayer::new(4, &layer, 2.0, 0.0);
        let mut admits = Vec::new();
        lfu.access(&[3], 0, &mut admits);
        for _ in 0..4 {
            lfu.access(&[1], 0, &mut admits);
        }
        let near = |found: f32, expected: f32| assert!((found / expected - 1.0).abs() < 1e-6);
        near(lfu.worth()[3], 0.25);
        lfu.begin_sequence();
        near(lfu.worth()[3], 0.25 / 8.0);
        lfu.access(&[3], 0, &mut admits);
        near(lfu.worth()[3], 0.25 / 8.0 * 0.5f32.sqrt() + 1.0);
    }
}
