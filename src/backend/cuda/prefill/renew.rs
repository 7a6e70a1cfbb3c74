//! What a prompt taught, kept in slots as it streams by: no further copy over PCIe, and there for the
//! first decoded token.
//!
//! In a prompt's last chunk the host waits for each layer's routing, while copies go on as far ahead
//! as the ring allows, and asks what the layer's slots shall hold. Kernels of that layer still read what
//! is to leave. So the new experts are kept aside, part by part as they lie in the ring, and moved
//! into their slots behind those kernels. Slots that are lent as workspace get their new experts
//! instead of the old ones when they are given back: as many copies, one more if a slot was empty.

use super::super::Cuda;
use super::Group;
use super::chunk::{Chunk, Parts};
use crate::backend::{OnRenewing, Result, Routing, SlotChange};

/// A slot's new expert.
pub struct Renewal {
    change: SlotChange,
    /// Among the slots of all layers
    slot: usize,
    /// Whether the slot is lent as workspace, so that nothing was copied
    lent: bool,
}

/// The changes of slots in one chunk.
pub struct Renewing<'a> {
    on_renewing: &'a mut OnRenewing<'a>,
    pub renewals: Vec<Renewal>,
    /// Experts of the present layer and their slots, in the order of their places aside
    pub kept: Vec<(usize, usize)>,
}

impl<'a> Renewing<'a> {
    pub fn new(on_renewing: &'a mut OnRenewing<'a>) -> Self {
        Renewing {
            on_renewing,
            renewals: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl Chunk<'_> {
    /// Waits until the layer's routing is on the host, tells of it, and asks for changes.
    pub fn ask(&self, layer: usize, groups: &[Group], renewing: &mut Renewing<'_>) -> Result<()> {
        let Parts { prefill, model, .. } = self.cuda;
        prefill.routed.synchronize()?;
        let routing = prefill.routing(layer, self.tokens, model.shape.moe.num_experts_per_tok);
        let streams = groups.iter().any(|group| group.ring.is_some());
        self.ask_for(layer, &routing, streams, renewing);
        Ok(())
    }

    /// Tells of a layer's routing, and asks for changes if its missing experts stream in.
    pub fn ask_for(
        &self,
        layer: usize,
        routing: &Routing,
        streams: bool,
        renewing: &mut Renewing<'_>,
    ) {
        let Parts {
            prefill,
            model,
            slots,
            ..
        } = self.cuda;
        let at_most = match streams && slots.of_layer(layer) > 0 {
            true => prefill.sizes.kept_experts(),
            false => 0,
        };
        let changes = (renewing.on_renewing)(layer, self.position, routing, at_most);
        renewing.kept.clear();
        for change in changes.into_iter().take(at_most) {
            assert_eq!(change.layer, layer, "slots of the layer that was asked for");
            let Some(slot) = slots.find(&change) else {
                continue;
            };
            if model.store.resident(layer, change.expert) != 0 {
                continue;
            }
            // What is lent are the last slots.
            let lent = prefill.own.is_none() && model.store.slot_address(slot) >= self.base;
            if !lent {
                renewing.kept.push((change.expert, slot));
            }
            renewing.renewals.push(Renewal { change, slot, lent });
        }
    }

    /// Keeps aside what a ring buffer holds of new experts.
    pub fn keep(
        &self,
        group: &Group,
        part: usize,
        buffer: usize,
        renewing: &Renewing<'_>,
    ) -> Result<()> {
        let (offset, width) = self.part(part);
        let experts = group.first..group.first + group.count;
        for (place, (expert, _)) in renewing.kept.iter().enumerate() {
            if experts.contains(expert) {
                let from = self.in_ring(buffer, group, *expert, width);
                let to = self.aside(place) + offset as u64;
                // SAFETY: the expert is missing, so the buffer holds it until its `free` is recorded; all
                // in the workspace, where each place has room for a blob.
                unsafe { self.cuda.model.stream.copy_on_device(to, from, width)? };
            }
        }
        Ok(())
    }

    /// Keeps aside an expert that lies whole at `from`, if a slot is to have it.
    pub fn keep_whole(&self, expert: usize, from: u64, renewing: &Renewing<'_>) -> Result<()> {
        let bytes = self.cuda.model.store.layout.blob_bytes as usize;
        for (place, _) in renewing
            .kept
            .iter()
            .enumerate()
            .filter(|(_, k)| k.0 == expert)
        {
            // SAFETY: both in the workspace, where each place has room for a blob.
            unsafe { (self.cuda.model.stream).copy_on_device(self.aside(place), from, bytes)? };
        }
        Ok(())
    }

    /// Moves what was kept into its slots, behind the kernels that read what was there.
    pub fn move_in(&self, renewing: &Renewing<'_>) -> Result<()> {
        let model = &self.cuda.model;
        let bytes = model.store.layout.blob_bytes as usize;
        for (place, &(_, slot)) in renewing.kept.iter().enumerate() {
            let to = model.store.slot_address(slot);
            // SAFETY: both are `bytes` long, and neither is used by what is on its way elsewhere.
            unsafe { model.stream.copy_on_device(to, self.aside(place), bytes)? };
        }
        Ok(())
    }

    pub fn aside(&self, place: usize) -> u64 {
        let bytes = self.cuda.model.store.layout.blob_bytes as usize;
        self.at(self.places.kept + place * bytes)
    }
}

impl Cuda {
    /// Makes known on the host what slots hold now, or will hold once they are given back.
    pub(super) fn note_renewals(&mut self, renewals: &[Renewal]) {
        for Renewal { change, slot, lent } in renewals {
            let expert = (change.layer, change.expert);
            if *lent {
                let borrowed = self
                    .prefill
                    .borrowed
                    .as_mut()
                    .expect("its slots are in use");
                borrowed.held.retain(|(other, _)| other != slot);
                borrowed.held.push((*slot, expert));
            } else {
                self.model.store.evict(*slot);
                self.model.store.arrived(change.layer, change.expert, *slot);
            }
            self.note_change(change);
        }
    }
}
