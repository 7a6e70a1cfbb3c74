//! Which experts are in VRAM: filled at first as the options ask, changed between tokens.
//!
//! A change takes effect in two steps. The old expert leaves the table of addresses before the next
//! token; the new one enters it before the first token that finds its copy done. Meanwhile it is
//! computed from RAM like any other.

use std::collections::VecDeque;

use super::device::Event;
use super::{Cuda, Residency};
use crate::backend::{BackendError, Result, SlotChange};
use crate::planning::execution::{Room, WorkspaceMemory, workspace_memory};

/// Slots by layer, and copies under way.
#[derive(Default)]
pub struct Slots {
    /// First slot of each layer, and how many it has; empty unless a placement is in force
    layers: Vec<(usize, usize)>,
    /// Copies that were started, the oldest first
    pending: VecDeque<Batch>,
    /// Events that no batch waits for
    events: Vec<Event>,
    /// Whether the host's table of addresses is newer than the device's
    changed: bool,
}

/// Copies that were started together.
struct Batch {
    /// Happens after the last of them
    done: Event,
    /// (layer, expert, slot)
    copies: Vec<(usize, usize, usize)>,
}

impl Slots {
    /// How many slots a layer has.
    pub fn of_layer(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |&(_, count)| count)
    }

    /// The slot that a change names among those of all layers; none if it did not fit.
    pub fn find(&self, change: &SlotChange) -> Option<usize> {
        let &(first, count) = self.layers.get(change.layer)?;
        (change.slot < count).then_some(first + change.slot)
    }
}

impl Cuda {
    /// Gives the VRAM that is left to experts, as the options ask.
    pub(super) fn fill_slots(&mut self) -> Result<()> {
        let (layers, experts) = (
            self.model.shape.num_layers(),
            self.model.shape.moe.num_experts,
        );
        self.decode.forget_graphs();
        self.prefill.forget_borrowed();
        self.slots = Slots::default();
        self.model
            .store
            .set_slots(&self.device, 0, &self.model.stream)?;
        self.prefill
            .set_workspace(WorkspaceMemory::Slots, &self.device, &self.model.stream)?;
        let room = self.take_workspace(layers * experts)?;
        let fitting = ((room / self.model.store.slot_bytes()) as usize).min(layers * experts);
        let wanted: Vec<Option<(usize, usize)>> = match &self.options.residency {
            Residency::Nothing => Vec::new(),
            Residency::Exactly(experts) => {
                if experts.len() > fitting {
                    return Err(BackendError::Other(format!(
                        "{} experts were asked to be in VRAM, {fitting} fit",
                        experts.len()
                    )));
                }
                experts.iter().copied().map(Some).collect()
            }
            Residency::Slots(contents) => {
                let (slots, experts) = in_slots(contents, fitting);
                self.slots.layers = slots;
                experts
            }
            Residency::Fill => spread(layers, experts, &[], fitting).map(Some).collect(),
            Residency::Preferred(lists) => {
                spread(layers, experts, lists, fitting).map(Some).collect()
            }
        };
        self.model
            .store
            .set_slots(&self.device, wanted.len(), &self.model.stream)?;
        for (slot, wanted) in wanted.into_iter().enumerate() {
            let Some((layer, expert)) = wanted else {
                continue;
            };
            if layer >= layers || expert >= experts {
                return Err(BackendError::Other(format!(
                    "expert {expert} of layer {layer} is not in this model of {layers} layers \
                     with {experts} experts"
                )));
            }
            self.model
                .store
                .fetch(layer, expert, slot, &self.model.stream)?;
        }
        self.model.store.publish(&self.model.stream)?;
        self.model.stream.synchronize()
    }

    /// Sets memory aside for prompts where they don't borrow it from slots: the bytes that are left.
    fn take_workspace(&mut self, all: usize) -> Result<u64> {
        let budget = self.options.vram_bytes;
        let bytes = self.usage.room(budget)?;
        let wanted_slots = match &self.options.residency {
            Residency::Nothing => 0,
            Residency::Exactly(experts) => experts.len(),
            Residency::Slots(contents) => contents.iter().map(Vec::len).sum(),
            Residency::Fill | Residency::Preferred(_) => all,
        };
        let room = Room {
            bytes,
            wanted_slots,
            slot_bytes: self.model.store.slot_bytes(),
            context_tokens: self.states.max_tokens(),
            settings: self.options.prefill,
        };
        // Refused before it is taken: the budget is a ceiling at any moment.
        let memory = workspace_memory(self.prefill.sizes(), &room).map_err(|missing| {
            let budget = budget.unwrap_or(bytes);
            BackendError::DoesNotFit {
                needed: budget + missing,
                budget,
            }
        })?;
        self.prefill
            .set_workspace(memory, &self.device, &self.model.stream)?;
        self.usage.room(budget)
    }

    /// Puts `[layer][slot]` experts into VRAM, as far as they fit: the number of slots that do.
    pub(super) fn place_in_slots(&mut self, contents: &[Vec<Option<u16>>]) -> Result<usize> {
        self.copies.synchronize()?;
        self.options.residency = Residency::Slots(contents.to_vec());
        self.fill_slots()?;
        Ok(self.slots.layers.iter().map(|&(_, count)| count).sum())
    }

    /// Fills the slots anew under another budget; placed ones stay empty, as many as fit. The number of
    /// slots there are then.
    pub(super) fn refill_within(&mut self, vram_bytes: u64) -> Result<usize> {
        self.copies.synchronize()?;
        let shape = &self.model.shape;
        let all = vec![vec![None; shape.moe.num_experts]; shape.num_layers()];
        let old_budget = self.options.vram_bytes.replace(vram_bytes);
        let old_residency = self.options.residency.clone();
        if matches!(old_residency, Residency::Slots(_)) {
            self.options.residency = Residency::Slots(all);
        }
        if let Err(error) = self.fill_slots() {
            self.options.vram_bytes = old_budget;
            self.options.residency = old_residency;
            self.fill_slots()?;
            return Err(error);
        }
        Ok(self.model.store.num_slots())
    }

    /// Starts copies into slots; changes of slots that did not fit are passed over.
    pub(super) fn change_slots(&mut self, changes: &[SlotChange]) -> Result<()> {
        if !changes.is_empty() {
            self.give_slots_back()?;
        }
        let mut copies = Vec::with_capacity(changes.len());
        for change in changes {
            let Some(slot) = self.slots.find(change) else {
                continue;
            };
            for batch in &mut self.slots.pending {
                batch.copies.retain(|&(_, _, other)| other != slot);
            }
            copies.retain(|&(_, _, other)| other != slot);
            // No kernel runs now, and the next ones get a table without the old expert.
            self.model
                .store
                .start_fetch(change.layer, change.expert, slot, &self.copies)?;
            copies.push((change.layer, change.expert, slot));
            self.slots.changed = true;
            self.note_change(change);
            let (times, bytes) = (&mut self.decode.times, self.model.store.layout.blob_bytes);
            times.promoted_bytes += bytes as u64;
            times.h2d_bytes += bytes as u64;
        }
        if !copies.is_empty() {
            let done = match self.slots.events.pop() {
                Some(event) => event,
                None => self.device.new_event()?,
            };
            self.copies.record(&done)?;
            self.slots.pending.push_back(Batch { done, copies });
        }
        Ok(())
    }

    /// Remembers what a slot is to hold: a new context fills the slots again with what the policy
    /// believes is there.
    pub(super) fn note_change(&mut self, change: &SlotChange) {
        if let Residency::Slots(contents) = &mut self.options.residency {
            contents[change.layer][change.slot] = Some(change.expert as u16);
        }
        self.decode.times.promotions += 1;
    }

    /// Makes known to the device what has changed: what left, and what has arrived.
    pub(super) fn settle_slots(&mut self) -> Result<()> {
        // Batch by batch: were all copies awaited, those of the last token would hold up the rest.
        while let Some(batch) = self.slots.pending.front() {
            if !batch.done.has_happened()? {
                break;
            }
            let Some(Batch { done, copies }) = self.slots.pending.pop_front() else {
                break;
            };
            for (layer, expert, slot) in copies {
                self.model.store.arrived(layer, expert, slot);
                self.slots.changed = true;
            }
            self.slots.events.push(done);
        }
        if std::mem::take(&mut self.slots.changed) {
            self.model.store.publish(&self.model.stream)?;
        }
        Ok(())
    }

    /// As [`settle_slots`](Cuda::settle_slots), after waiting for all copies.
    pub(super) fn finish_slots(&mut self) -> Result<()> {
        self.copies.synchronize()?;
        self.settle_slots()
    }
}

/// `count` experts, the same number in every layer as nearly as can be: of each layer those that
/// `preferred` names, then the lowest ids.
fn spread(
    layers: usize,
    experts: usize,
    preferred: &[Vec<u16>],
    count: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let orders: Vec<Vec<usize>> = (0..layers)
        .map(|layer| {
            let named = preferred.get(layer).map_or(&[][..], Vec::as_slice);
            let mut order: Vec<usize> = Vec::with_capacity(experts);
            let mut taken = vec![false; experts];
            let all = named.iter().map(|&e| usize::from(e)).chain(0..experts);
            for expert in all {
                if expert < experts && !std::mem::replace(&mut taken[expert], true) {
                    order.push(expert);
                }
            }
            order
        })
        .collect();
    (0..experts)
        .flat_map(move |rank| (0..layers).map(move |layer| (layer, rank)))
        .take(count)
        .map(move |(layer, rank)| (layer, orders[layer][rank]))
}

/// First slot and number of slots of each layer, and what each slot holds.
type LayerSlots = (Vec<(usize, usize)>, Vec<Option<(usize, usize)>>);

/// Slots one layer after the other; where fewer fit than there are, all layers lose the same share.
fn in_slots(contents: &[Vec<Option<u16>>], fitting: usize) -> LayerSlots {
    let all: usize = contents.iter().map(Vec::len).sum();
    let (mut layers, mut experts) = (Vec::new(), Vec::new());
    let mut before = 0;
    for (layer, slots) in contents.iter().enumerate() {
        let first = experts.len();
        before += slots.len();
        let end = match fitting < all {
            true => (before * fitting / all).min(first + slots.len()),
            false => before,
        };
        let kept = slots.iter().take(end - first);
        experts.extend(kept.map(|expert| expert.map(|e| (layer, usize::from(e)))));
        layers.push((first, end - first));
    }
    (layers, experts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_spread_evenly_and_preferences_come_first() {
        let all: Vec<_> = spread(3, 4, &[vec![3, 1], vec![], vec![2]], 7).collect();
        assert_eq!(
            all,
            [(0, 3), (1, 0), (2, 2), (0, 1), (1, 1), (2, 0), (0, 0)]
        );
        let contents = [vec![Some(1), Some(0)], vec![None, Some(2)], vec![]];
        let (layers, experts) = in_slots(&contents, 100);
        assert_eq!(layers, [(0, 2), (2, 2), (4, 0)]);
        assert_eq!(experts, [Some((0, 1)), Some((0, 0)), None, Some((1, 2))]);
        let (layers, experts) = in_slots(&contents, 2);
        assert_eq!(layers, [(0, 1), (1, 1), (2, 0)]);
        assert_eq!(experts, [Some((0, 1)), None]);
        assert_eq!(spread(2, 3, &[], 100).count(), 6);
    }
}
