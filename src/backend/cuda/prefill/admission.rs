//! Prefill admission: experts that a prompt used most, copied from the stream into cache slots. It takes
//! no further copy over PCIe, and they are there for the first decoded token.
//!
//! In a prompt's last chunk the host waits for each layer's routing, while copies go on as far ahead
//! as the ring allows, and asks what the layer's slots shall hold. Kernels of that layer still read what
//! is to leave. So the new experts are kept aside, part by part as they lie in the ring, and moved
//! into their slots behind those kernels. Slots used as workspace get their new experts
//! instead of the old ones when they are given back: as many copies, one more if a slot was empty.

use super::super::Cuda;
use super::chunk::{Chunk, Parts};
use super::{Admission, Admitting, Group};
use crate::backend::{Result, Routing};
use crate::planning::Offer;

impl Chunk<'_> {
    /// Waits until the layer's routing is on the host, tells of it, and asks for changes.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn ask(&self, layer: usize, groups: &[Group], admitting: &mut Admitting<'_>) -> Result<()> {
        let Parts { prefill, model, .. } = self.cuda;
        prefill.routed.synchronize()?;
        let routing = prefill.routing(layer, self.tokens, model.shape.moe.num_experts_per_tok);
        let at_most = match groups.iter().any(|group| group.ring.is_some()) {
            true => prefill.sizes.kept_experts(),
            false => 0,
        };
        self.ask_for(layer, &routing, Offer::of_any(at_most), admitting);
        Ok(())
    }

    /// Tells of a layer's routing, and asks for changes of its slots, if it has any.
    pub fn ask_for(
        &self,
        layer: usize,
        routing: &Routing,
        offer: Offer<'_>,
        admitting: &mut Admitting<'_>,
    ) {
        let Parts {
            prefill,
            model,
            slots,
            ..
        } = self.cuda;
        let at_most = match slots.of_layer(layer) {
            0 => 0,
            _ => offer.at_most,
        };
        let offer = Offer { at_most, ..offer };
        let changes = (admitting.on_admission)(layer, self.position, routing, offer);
        admitting.kept.clear();
        for change in changes.into_iter().take(at_most) {
            assert_eq!(change.layer, layer, "slots of the layer that was asked for");
            let Some(slot) = slots.find(&change) else {
                continue;
            };
            if model.store.resident(layer, change.expert) != 0 {
                continue;
            }
            // The last slots are the workspace.
            let is_workspace = prefill.own.is_none() && model.store.slot_address(slot) >= self.base;
            if !is_workspace {
                admitting.kept.push((change.expert, slot));
            }
            admitting.admissions.push(Admission {
                change,
                slot,
                is_workspace,
            });
        }
    }

    /// Keeps aside what a ring buffer holds of new experts.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn keep(
        &self,
        group: &Group,
        part: usize,
        buffer: usize,
        admitting: &Admitting<'_>,
    ) -> Result<()> {
        let (offset, width) = self.part(part);
        let experts = group.first..group.first + group.count;
        for (place, (expert, _)) in admitting.kept.iter().enumerate() {
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

    /// Moves an expert that lies whole at `from` into the slot that is to have it, if there is one. Kernels
    /// that read what was there are launched already.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn move_whole(&self, expert: usize, from: u64, admitting: &Admitting<'_>) -> Result<()> {
        let model = &self.cuda.model;
        let bytes = model.store.layout.blob_bytes as usize;
        for &(_, slot) in admitting.kept.iter().filter(|kept| kept.0 == expert) {
            let to = model.store.slot_address(slot);
            // SAFETY: both have room for a blob, and stay until the stream is there.
            unsafe { model.stream.copy_on_device(to, from, bytes)? };
        }
        Ok(())
    }

    /// Moves what was kept into its slots, behind the kernels that read what was there.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn move_in(&self, admitting: &Admitting<'_>) -> Result<()> {
        let model = &self.cuda.model;
        let bytes = model.store.layout.blob_bytes as usize;
        for (place, &(_, slot)) in admitting.kept.iter().enumerate() {
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
    pub(super) fn note_admissions(&mut self, admissions: &[Admission]) {
        for Admission {
            change,
            slot,
            is_workspace,
        } in admissions
        {
            let expert = (change.layer, change.expert);
            if *is_workspace {
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
