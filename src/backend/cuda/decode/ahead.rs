//! One layer ahead: what the next router will probably choose is brought nearer before it is asked for.
//!
//! While the experts of a layer are computed, the router of the next one runs on the same input, on a
//! branch of the graph. This thread sees its guess and has the workers fetch what the CPU would compute
//! into their caches. What the GPU would read over PCIe it has copied to the device, beside the mixer:
//! the true router then finds those experts in VRAM, and leaves the other missing ones to the CPU.
//!
//! ```text
//! graph    router l | experts l             | combine l | mixer l+1 | router l+1 | wait | experts l+1
//! branch            | router l+1, ahead  ->-'
//! copies                              | expert | expert | flag  ->----------------'
//! ```
//!
//! Who computes an expert depends on both choices and so on the text, never on what comes first.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::abi::{Handoff, MAX_COPIES};
use super::super::arena::Arena;
use super::super::device::{Device, Event, Stream};
use super::super::store::slot_bytes;
use super::{Decode, ExpertLayout, FETCHED, Model};
use crate::backend::cpu::offload::Offload;
use crate::backend::{LookAhead, Result};

/// A second branch of the graph, and a stream beside it.
pub(super) struct Side {
    pub stream: Stream,
    pub fork: Event,
    pub join: Event,
    /// For copies, if there are any
    copies: Option<Stream>,
}

/// Where copies go: `[2][MAX_COPIES]` experts, layers in turn.
#[derive(Clone, Copy)]
pub(super) struct Staging {
    address: u64,
    pub stride: i64,
}

impl Staging {
    pub fn new(arena: &mut Arena, layout: &ExpertLayout, stream: &Stream) -> Result<Self> {
        let stride = slot_bytes(layout);
        let bytes = 2 * MAX_COPIES * stride as usize;
        Ok(Staging {
            address: arena.alloc(bytes, stream)?,
            stride: stride as i64,
        })
    }

    /// Address of the copies for `layer`.
    pub fn of(&self, layer: usize) -> u64 {
        self.address + (layer % 2 * MAX_COPIES) as u64 * self.stride as u64
    }
}

/// How far the copies of a step are.
#[derive(Default)]
pub(super) struct Copied {
    /// The next layer whose copies are to be started
    next: Cell<usize>,
    pub experts: Cell<u64>,
}

impl Copied {
    pub fn from_layer(next: usize) -> Self {
        Copied {
            next: Cell::new(next),
            experts: Cell::new(0),
        }
    }
}

impl Decode {
    /// Has routers look a layer ahead, for what is asked.
    pub fn look_ahead(&mut self, wanted: LookAhead, device: &Device) -> Result<()> {
        self.forget_graphs();
        self.side = None;
        if wanted == LookAhead::Nothing {
            return Ok(());
        }
        let copies = match wanted {
            LookAhead::Copies => Some(device.new_stream()?),
            _ => None,
        };
        self.side = Some(Side {
            stream: device.new_stream()?,
            fork: device.new_event()?,
            join: device.new_event()?,
            copies,
        });
        Ok(())
    }

    /// Whether experts that the GPU will probably ask for are copied to it.
    pub(super) fn copies_ahead(&self) -> bool {
        self.copies().is_some()
    }

    fn copies(&self) -> Option<&Stream> {
        self.side.as_ref()?.copies.as_ref()
    }

    /// What `layer` will probably ask for, once its router has looked ahead in this step.
    fn foreseen(&self, layer: usize) -> Option<Handoff> {
        let foreseen = self.foreseen.pointer(layer);
        // SAFETY: `ready` is the first field, a u32 that the GPU stores.
        let known = unsafe { AtomicU32::from_ptr(foreseen.cast()) };
        // SAFETY: the GPU released it with `ready`, and writes it again in the next step.
        (known.load(Ordering::Acquire) == self.number).then(|| unsafe { foreseen.read_volatile() })
    }

    /// Starts the copies for `layer`, if they are its turn and its guess is known: whether they are
    /// started.
    pub(super) fn start_copies(
        &self,
        layer: usize,
        model: &Model,
        copied: &Copied,
    ) -> Result<bool> {
        let Some(copies) = self.copies() else {
            return Ok(true);
        };
        if copied.next.get() != layer || layer >= model.shape.num_layers() {
            return Ok(copied.next.get() > layer);
        }
        let Some(foreseen) = self.foreseen(layer) else {
            return Ok(false);
        };
        copied.next.set(layer + 1);
        let k = model.shape.moe.num_experts_per_tok;
        let cpu = cpu_ids(&foreseen);
        let store = &model.store;
        let read = (foreseen.topk_ids[..k].iter())
            .filter(|&id| store.resident(layer, *id as usize) == 0 && !cpu.contains(id));
        let mut place = 0;
        for &id in read {
            let (from, bytes) = store.blob(layer, id as usize);
            let to = self.staging.of(layer) + place as u64 * self.staging.stride as u64;
            assert!(place < MAX_COPIES, "as the table of copies says");
            // SAFETY: an expert in pinned memory that lives as long as the model, and a place for it
            // that the layer before last, which is done, was the last to use.
            unsafe { copies.copy_to_device(to, from, bytes)? };
            place += 1;
        }
        copied.experts.set(copied.experts.get() + place as u64);
        if place == 0 {
            self.set_flag(layer, FETCHED, 1);
            return Ok(true);
        }
        // SAFETY: the flag lives as long as this struct, which waits for its streams.
        unsafe { copies.write_flag(self.flag_address(layer, FETCHED), 1)? };
        Ok(true)
    }

    /// Waits for copies that an error left under way.
    pub(super) fn end_copies(&self) {
        if let Some(copies) = self.copies() {
            copies.synchronize().ok();
        }
    }

    /// Starts the copies of `layer` and fetches into caches what it will probably ask the CPU for,
    /// until it asks.
    pub(super) fn fetch_ahead(
        &self,
        layer: usize,
        model: &Model,
        offload: &mut Offload,
        copied: &Copied,
    ) -> Result<()> {
        let asked = self.ready(layer);
        let mut spins = 0u32;
        let foreseen = loop {
            if let Some(foreseen) = self.foreseen(layer) {
                break foreseen;
            }
            // A GPU that stands still is noticed by `wait_ready`.
            spins += 1;
            if asked.load(Ordering::Acquire) == self.number || spins > 1 << 20 {
                return Ok(());
            }
            std::hint::spin_loop();
        };
        self.start_copies(layer, model, copied)?;
        let experts = &model.store.layers[layer].experts;
        let number = self.number;
        let enough = move || asked.load(Ordering::Relaxed) == number;
        offload.prefetch(experts, cpu_ids(&foreseen), &enough)
    }

    /// Of what the CPU computed in `layer`, how much was foreseen.
    pub(super) fn foreseen_of(&self, layer: usize, handoff: &Handoff) -> u64 {
        let foreseen = &self.foreseen.as_slice()[layer];
        let known = cpu_ids(foreseen);
        cpu_ids(handoff)
            .iter()
            .filter(|id| known.contains(id))
            .count() as u64
    }
}

/// The experts that are the CPU's.
pub(super) fn cpu_ids(handoff: &Handoff) -> &[i32] {
    let count = (handoff.num_cpu.max(0) as usize).min(handoff.cpu_ids.len());
    &handoff.cpu_ids[..count]
}
