//! Recency: LRU with pinned experts and an optional admission threshold, and the static set.

use super::counter::DecayedPicks;
use super::slot_map::SlotMap;
use super::{Admit, LayerPolicy, LayerSlots};

/// What lets a miss in.
#[derive(Debug)]
pub(super) enum Admission {
    Never,
    Always,
    /// Picked as often as this of late.
    Picked(f64, DecayedPicks),
}

#[derive(Debug)]
pub(super) struct LruLayer {
    map: SlotMap,
    admission: Admission,
    /// Slots by recency, a ring through `head`: `[slots + 1]` each.
    newer: Vec<u16>,
    older: Vec<u16>,
    /// Scratch: a token's picks that move.
    picks: Vec<u16>,
}

impl LruLayer {
    pub fn new(num_experts: usize, layer: &LayerSlots, admission: Admission) -> Self {
        let slots = layer.slots as u16;
        let mut this = LruLayer {
            map: SlotMap::new(num_experts, layer),
            admission,
            newer: (0..=slots).collect(),
            older: (0..=slots).collect(),
            picks: Vec::new(),
        };
        // The first slot becomes the newest: the hottest, and the last to go. Empty ones go first.
        for slot in this.map.free_slots().rev() {
            this.link_newest(slot);
        }
        this
    }

    /// The ring's anchor: its older neighbour is the newest slot, its newer one the oldest.
    fn head(&self) -> u16 {
        self.map.contents().len() as u16
    }

    fn link_newest(&mut self, slot: u16) {
        let (head, newest) = (self.head(), self.older[usize::from(self.head())]);
        self.older[usize::from(slot)] = newest;
        self.newer[usize::from(slot)] = head;
        self.newer[usize::from(newest)] = slot;
        self.older[usize::from(head)] = slot;
    }

    fn touch(&mut self, slot: u16) {
        let (newer, older) = (self.newer[usize::from(slot)], self.older[usize::from(slot)]);
        self.older[usize::from(newer)] = older;
        self.newer[usize::from(older)] = newer;
        self.link_newest(slot);
    }

    fn admits(&self, expert: u16) -> bool {
        match &self.admission {
            Admission::Never => false,
            Admission::Always => true,
            Admission::Picked(least, picks) => picks.picks(expert) >= *least,
        }
    }
}

impl LayerPolicy for LruLayer {
    fn map(&self) -> &SlotMap {
        &self.map
    }

    /// See `stack_distance`: the picks end on top, the best foremost, and evict none of their own.
    fn access(&mut self, topk_ids: &[u16], room: usize, admits: &mut Vec<Admit>) {
        if let Admission::Picked(_, picks) = &mut self.admission {
            picks.count(topk_ids);
        }
        let slots = self.map.free_slots().len();
        if matches!(self.admission, Admission::Never) || slots == 0 {
            return;
        }
        let mut picks = std::mem::take(&mut self.picks);
        picks.clear();
        let mut left = room;
        for &expert in topk_ids.iter().filter(|&&e| !self.map.is_pinned(e)) {
            let resident = self.map.slot(expert).is_some();
            if picks.len() < slots && (resident || (left > 0 && self.admits(expert))) {
                left -= usize::from(!resident);
                picks.push(expert);
            }
        }
        // Residents first, so that the oldest slot is none of this token's while others are left.
        for &expert in &picks {
            if let Some(slot) = self.map.slot(expert) {
                self.touch(slot);
            }
        }
        for &expert in picks.iter().rev() {
            let slot = self.map.slot(expert).unwrap_or_else(|| {
                let oldest = self.newer[usize::from(self.head())];
                admits.push(self.map.place(expert, oldest));
                oldest
            });
            self.touch(slot);
        }
        self.picks = picks;
    }

    /// Recency: 0 for what is not there, rising from the oldest to the newest.
    fn worth(&self) -> Vec<f32> {
        let mut worth = vec![0.0; self.map.num_experts()];
        let (mut slot, mut rank) = (self.newer[usize::from(self.head())], 1.0);
        while slot != self.head() {
            if let Some(expert) = self.map.contents()[usize::from(slot)] {
                worth[usize::from(expert)] = rank;
            }
            rank += 1.0;
            slot = self.newer[usize::from(slot)];
        }
        worth
    }

    /// A threshold's picks are not in the state: they are counted from zero, and fill again within a
    /// half-life.
    fn restore(&mut self, contents: &[Option<u16>], worth: &[f32]) {
        if let Admission::Picked(_, picks) = &mut self.admission {
            picks.clear();
        }
        self.map.set_contents(contents);
        let mut slots: Vec<u16> = self.map.free_slots().collect();
        let recency = |slot: &u16| {
            let expert = self.map.contents()[usize::from(*slot)];
            expert.map_or(0.0, |e| worth[usize::from(e)])
        };
        slots.sort_by(|a, b| recency(a).total_cmp(&recency(b)));
        for slot in slots {
            self.touch(slot);
        }
    }
}
