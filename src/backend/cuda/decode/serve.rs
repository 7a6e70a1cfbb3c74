//! The CPU's part of a step: it answers each layer's request as the GPU gets there.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::super::abi::{Handoff, MAX_BATCH};
use super::{Decode, Model, WATCHDOG};
use crate::backend::cpu::experts::Expert;
use crate::backend::cpu::offload::{Asked, Offload, Requests};
use crate::backend::cpu::threads::part_of;
use crate::backend::{BackendError, Result, StepTimes};

/// What the layers ask in one step, in host memory that the GPU writes.
struct HandedOver<'a> {
    /// Of the step
    number: u32,
    tokens: usize,
    /// `[layer]`
    experts: Vec<&'a [Expert]>,
    /// `[layers, MAX_BATCH]`
    handoffs: *mut Handoff,
    /// What they will probably ask; absent where no router looks ahead
    predicted: Option<*mut Handoff>,
    /// `[layers, MAX_BATCH, D]`
    x: *const f32,
    dim: usize,
    /// `[layers]`
    done: *mut u32,
}

// SAFETY: the pointers are to memory that outlives the step. Of a layer the GPU writes it before it stores
// the step's number there, and not after; `done` is for atomics only.
unsafe impl Sync for HandedOver<'_> {}

impl HandedOver<'_> {
    /// What a router wrote for `layer` and `token` to the list `from`, once it has.
    fn read(&self, from: *mut Handoff, layer: usize, token: usize) -> Option<&Handoff> {
        assert!(layer < self.experts.len() && token < self.tokens);
        let at = layer * MAX_BATCH + token;
        // SAFETY: in the list. `ready` is the first field, a u32 that only the GPU stores.
        let ready = unsafe { AtomicU32::from_ptr(from.add(at).cast()) };
        let is_there = ready.load(Ordering::Acquire) == self.number;
        // SAFETY: the GPU released it with `ready`, and writes it again in the next step.
        is_there.then(|| unsafe { &*from.add(at) })
    }
}

impl Requests for HandedOver<'_> {
    fn layers(&self) -> usize {
        self.experts.len()
    }

    fn tokens(&self) -> usize {
        self.tokens
    }

    fn experts(&self, layer: usize) -> &[Expert] {
        self.experts[layer]
    }

    fn predicted(&self, layer: usize, token: usize) -> Option<&[i32]> {
        match self.predicted {
            // The first layer has none before it whose router could look ahead.
            Some(predicted) if layer > 0 => {
                (self.read(predicted, layer, token)).map(Handoff::experts)
            }
            _ => Some(&[]),
        }
    }

    fn asked(&self, layer: usize, token: usize) -> Option<Asked<'_>> {
        self.read(self.handoffs, layer, token).map(|handoff| {
            let ids = handoff.experts();
            let row = (layer * MAX_BATCH + token) * self.dim;
            // SAFETY: in the list, and written by the GPU before it asked.
            let x = unsafe { std::slice::from_raw_parts(self.x.add(row), self.dim) };
            Asked {
                ids,
                weights: &handoff.cpu_weights[..ids.len()],
                x,
            }
        })
    }

    fn answered(&self, layer: usize) {
        assert!(layer < self.experts.len());
        // SAFETY: in the list, for atomics only.
        unsafe { AtomicU32::from_ptr(self.done.add(layer)) }.store(1, Ordering::Release);
    }
}

impl Decode {
    /// Computes what each layer leaves to the CPU, as the GPU gets there, and hands over the other
    /// parts of the step: each when the GPU begins with the one before it.
    pub(super) fn serve(
        &self,
        model: &Model,
        offload: &mut Offload,
        tokens: usize,
        graphs: usize,
        times: &mut StepTimes,
    ) -> Result<()> {
        let dim = model.shape.hidden_size;
        let layers = model.shape.num_layers();
        let requests = HandedOver {
            number: self.number,
            tokens,
            experts: (model.store.layers.iter())
                .map(|layer| &layer.experts[..])
                .collect(),
            handoffs: self.handoffs.pointer(0),
            predicted: self.side.is_some().then(|| self.predicted.pointer(0)),
            x: self.handoff_x.pointer(0),
            dim,
            done: self.done.pointer(0),
        };
        let len = layers * tokens * dim;
        // SAFETY: `[layers, tokens, dim]` floats; of a layer the GPU reads them only after `done`.
        let out = unsafe { std::slice::from_raw_parts_mut(self.cpu_out.pointer(0), len) };
        let (mut part, mut next_part) = (0, 0);
        let mut asked = Instant::now();
        let mut wait = |layer: usize, fetch: &dyn Fn()| {
            let answered = Instant::now();
            if layer > 0 {
                times.cpu_experts_s += (answered - asked).as_secs_f64();
            }
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
            wait_ready(&requests, layer, model)?;
            asked = Instant::now();
            times.wait_gpu_s += (asked - answered).as_secs_f64();
            Ok(())
        };
        let k = model.shape.moe.num_experts_per_tok;
        offload.answer(&requests, k, &mut wait, out)?;
        times.cpu_experts_s += asked.elapsed().as_secs_f64();
        Ok(())
    }

    pub(super) fn set_done(&self, layer: usize, done: u32) {
        // SAFETY: a u32 that only atomics and the GPU touch.
        unsafe { AtomicU32::from_ptr(self.done.pointer(layer)) }.store(done, Ordering::Release);
    }
}

/// Spins until the router of `layer` has chosen for all tokens.
fn wait_ready(requests: &HandedOver, layer: usize, model: &Model) -> Result<()> {
    let mut spins = 0u32;
    let mut since = None;
    let asked = |token| requests.asked(layer, token).is_some();
    while !(0..requests.tokens).all(asked) {
        std::hint::spin_loop();
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(1 << 14) {
            // A kernel that failed never gets here: the stream tells.
            let idle = model.stream.is_idle()?;
            let since = *since.get_or_insert_with(Instant::now);
            if idle || since.elapsed() > WATCHDOG {
                return Err(BackendError::Other(format!(
                    "the GPU did not reach layer {layer} of step {} within {} s{}",
                    requests.number,
                    since.elapsed().as_secs(),
                    if idle { ", though it has finished" } else { "" },
                )));
            }
        }
    }
    Ok(())
}
