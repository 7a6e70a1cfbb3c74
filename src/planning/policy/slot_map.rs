//! Which expert is in which slot of one layer.

use super::{Admit, LayerSlots};

/// Pinned experts take the first slots and never leave.
#[derive(Debug)]
pub(super) struct SlotMap {
    slot_of: Vec<Option<u16>>,
    expert_in: Vec<Option<u16>>,
    pinned: usize,
}

impl SlotMap {
    /// # Panics
    /// If the layer names experts that are not there, or more than it has slots.
    pub fn new(num_experts: usize, layer: &LayerSlots) -> Self {
        let mut map = SlotMap {
            slot_of: vec![None; num_experts],
            expert_in: vec![None; layer.slots],
            pinned: layer.pinned_experts.len(),
        };
        let content = layer.pinned_experts.iter().chain(&layer.initial_experts);
        for (slot, &expert) in (0..).zip(content) {
            map.place(expert, slot);
        }
        map
    }

    pub fn place(&mut self, expert: u16, slot: u16) -> Admit {
        let evicted = self.expert_in[usize::from(slot)].replace(expert);
        if let Some(old) = evicted {
            self.slot_of[usize::from(old)] = None;
        }
        self.slot_of[usize::from(expert)] = Some(slot);
        Admit {
            expert,
            slot,
            evicted,
        }
    }

    pub fn slot(&self, expert: u16) -> Option<u16> {
        self.slot_of[usize::from(expert)]
    }

    pub fn num_experts(&self) -> usize {
        self.slot_of.len()
    }

    /// `[slots]`
    pub fn contents(&self) -> &[Option<u16>] {
        &self.expert_in
    }

    /// Slots whose content may change.
    pub fn free_slots(&self) -> std::ops::Range<u16> {
        self.pinned as u16..self.expert_in.len() as u16
    }

    pub fn is_pinned(&self, expert: u16) -> bool {
        self.slot(expert)
            .is_some_and(|s| usize::from(s) < self.pinned)
    }

    /// Takes over the content of the slots that may change. One that held an expert pinned here stays empty.
    pub fn set_contents(&mut self, contents: &[Option<u16>]) {
        for slot in self.free_slots() {
            if let Some(old) = self.expert_in[usize::from(slot)].take() {
                self.slot_of[usize::from(old)] = None;
            }
        }
        for slot in self.free_slots() {
            match contents[usize::from(slot)] {
                Some(expert) if !self.is_pinned(expert) => _ = self.place(expert, slot),
                _ => {}
            }
        }
    }

    /// The first empty slot, else the one whose expert `worth` values least; pinned ones excepted.
    pub fn victim(&self, worth: impl Fn(u16) -> f64) -> Option<(u16, f64)> {
        let mut least: Option<(u16, f64)> = None;
        for slot in self.free_slots() {
            let Some(expert) = self.expert_in[usize::from(slot)] else {
                return Some((slot, f64::NEG_INFINITY));
            };
            let value = worth(expert);
            if least.is_none_or(|(_, lowest)| value < lowest) {
                least = Some((slot, value));
            }
        }
        least
    }
}
