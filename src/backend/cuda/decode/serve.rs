//! The CPU's part of a step: it answers each layer's request as the GPU gets there.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::super::abi::Handoff;
use super::{Decode, Model, WATCHDOG, part_of};
use crate::backend::cpu::offload::{Asked, Offload, Request};
use crate::backend::{BackendError, Result, StepTimes};

/// What a layer asks in one step, in host memory that the GPU writes.
struct HandedOver<'a> {
    /// Of the step
    number: u32,
    handoff: *mut Handoff,
    /// What it will probably ask; absent where no router looks ahead
    foreseen: Option<*mut Handoff>,
    x: &'a [f32],
    done: &'a AtomicU32,
}

// SAFETY: the pointers are to memory that outlives the step, which the GPU writes before it stores
// the step's number there, and not after.
unsafe impl Sync for HandedOver<'_> {}

impl HandedOver<'_> {
    /// What a router wrote to `from`, once it has.
    fn read(&self, from: *mut Handoff) -> Option<&Handoff> {
        // SAFETY: `ready` is the first field, a u32 that only the GPU stores.
        let ready = unsafe { AtomicU32::from_ptr(from.cast()) };
        // SAFETY: the GPU released it with `ready`, and writes it again in the next step.
        (ready.load(Ordering::Acquire) == self.number).then(|| unsafe { &*from })
    }
}

impl Request for HandedOver<'_> {
    fn foreseen(&self) -> Option<&[i32]> {
        match self.foreseen {
            Some(foreseen) => self.read(foreseen).map(Handoff::experts),
            None => Some(&[]),
        }
    }

    fn asked(&self) -> Option<Asked<'_>> {
        self.read(self.handoff).map(|handoff| {
            let ids = handoff.experts();
            Asked {
                ids,
                weights: &handoff.cpu_weights[..ids.len()],
                x: self.x,
            }
        })
    }

    fn answered(&self) {
        self.done.store(1, Ordering::Release);
    }
}

impl Decode {
    /// Computes what each layer leaves to the CPU, as the GPU gets there, and hands over the other
    /// parts of the step: each when the GPU begins with the one before it.
    pub(super) fn serve(
        &self,
        model: &Model,
        offload: &mut Offload,
        graphs: usize,
        times: &mut StepTimes,
    ) -> Result<()> {
        let dim = model.shape.hidden_size;
        let layers = model.shape.num_layers();
        let k = model.shape.moe.num_experts_per_tok;
        let (mut part, mut next_part) = (0, 0);
        let mut now = Instant::now();
        for layer in 0..layers {
            // The first layer has none before it whose router could look ahead.
            let ahead = self.side.is_some() && layer > 0;
            let request = HandedOver {
                number: self.number,
                handoff: self.handoffs.pointer(layer),
                foreseen: ahead.then(|| self.foreseen.pointer(layer)),
                // SAFETY: `[layers, dim]` floats, which the GPU writes before it asks.
                x: unsafe { std::slice::from_raw_parts(self.handoff_x.pointer(layer * dim), dim) },
                done: self.done_flag(layer),
            };
            // SAFETY: `[layers, dim]` floats; the GPU reads them only after `done`.
            let out =
                unsafe { std::slice::from_raw_parts_mut(self.cpu_out.pointer(layer * dim), dim) };
            let mut ready = now;
            let mut wait = |fetch: &dyn Fn()| {
                // The other workers do without this one meanwhile.
                if layer == next_part {
                    part += 1;
                    let parts = &self.graphs[graphs].1;
                    if let Some(graph) = parts.get(part) {
                        // SAFETY: as in `step`.
                        unsafe { model.stream.launch_graph(graph)? };
                        next_part = part_of(layers, parts.len(), part).start;
                    }
                }
                fetch();
                self.wait_ready(layer, model)?;
                ready = Instant::now();
                Ok(())
            };
            let experts = &model.store.layers[layer].experts;
            offload.answer(experts, k, &request, &mut wait, out)?;
            times.wait_gpu_s += (ready - now).as_secs_f64();
            now = Instant::now();
            times.cpu_experts_s += (now - ready).as_secs_f64();
        }
        Ok(())
    }

    fn done_flag(&self, layer: usize) -> &AtomicU32 {
        // SAFETY: a u32 that only atomics and the GPU touch.
        unsafe { AtomicU32::from_ptr(self.done.pointer(layer)) }
    }

    pub(super) fn set_done(&self, layer: usize, done: u32) {
        self.done_flag(layer).store(done, Ordering::Release);
    }

    /// Spins until the router of `layer` has chosen.
    fn wait_ready(&self, layer: usize, model: &Model) -> Result<()> {
        let ready = self.handoffs.pointer(layer).cast::<u32>();
        // SAFETY: `ready` is the first field, a u32 that only the GPU stores.
        let ready = unsafe { AtomicU32::from_ptr(ready) };
        let mut spins = 0u32;
        let mut since = None;
        while ready.load(Ordering::Acquire) != self.number {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 14) {
                // A kernel that failed never gets here: the stream tells.
                let idle = model.stream.is_idle()?;
                let since = *since.get_or_insert_with(Instant::now);
                if idle || since.elapsed() > WATCHDOG {
                    return Err(BackendError::Other(format!(
                        "the GPU did not reach layer {layer} of step {} within {} s{}",
                        self.number,
                        since.elapsed().as_secs(),
                        if idle { ", though it has finished" } else { "" },
                    )));
                }
            }
        }
        Ok(())
    }
}
