//! The cuda backend as the engine drives it.

use std::ops::Range;

use super::Cuda;
use super::abi::MAX_BATCH;
use super::budget;
use super::decode::{Tokens, Wanted as Brings};
use super::state::StateLayout;
use crate::backend::executor::{
    DeviceMemory, Diagnostics, Executor, ExpertSlots, Piece, RunEvents, SequenceBytes, SequenceId,
    Snapshot, Wanted,
};
use crate::backend::{
    BackendError, BackendFacts, DecodeTimes, KernelTimes, LoadRates, MixerKind, ModelShape,
    NextLogits, Result, Routing, SlotChange, Tuning, VramHeld, VramMeter,
};
use crate::hardware::GpuProbe;
use crate::planning::Offer;
use crate::planning::execution::MARGIN_BYTES;

use super::saved::HostState;

impl Executor for Cuda {
    fn shape(&self) -> &ModelShape {
        &self.model.shape
    }

    fn facts(&self) -> BackendFacts {
        BackendFacts {
            name: format!("cuda:{}", self.index),
            kernels: Some(format!(
                "{}, prefill {}, {} {} for experts in RAM",
                self.device.facts().name,
                self.options.prefill.precision.name(),
                self.offload.isa().name(),
                self.options.cpu_precision.name()
            )),
            threads: self.offload.threads(),
        }
    }

    fn prefill_chunk(&self, tokens: usize) -> usize {
        let slots = self.model.store.num_slots();
        self.prefill.plan(slots, tokens).chunk_tokens
    }

    fn load_rates(&self) -> Option<LoadRates> {
        None
    }

    fn decode_read_bytes(&self, _context: usize) -> Option<u64> {
        None
    }

    /// Expert slots give their memory back first, then get what the sequences leave; they keep it where
    /// sequences of somewhat less fit the states there are.
    fn reserve(&mut self, sequences: usize, max_tokens: usize) -> Result<()> {
        // Whatever a failed step left in it: what follows waits for nothing else.
        self.model.stream.synchronize().ok();
        let capacity = self.states.layout.capacity;
        let fits = max_tokens <= capacity && 2 * max_tokens > capacity;
        if fits && sequences == self.states.capacity() {
            self.states.set_max_tokens(max_tokens);
            return self.forget_sequences();
        }
        self.tentative = None;
        self.decode.forget_graphs();
        self.prefill.forget_borrowed();
        self.model
            .store
            .set_slots(&self.device, 0, &self.model.stream)?;
        let layout = |tokens| StateLayout::new(&self.model.shape, self.kv_dtype, tokens);
        let (layout, least) = (layout(max_tokens), layout(1));
        let more = (sequences.max(1) * layout.bytes).saturating_sub(self.states.bytes());
        let resized = budget::check(&self.usage, self.options.vram_bytes, more).and_then(|()| {
            let (sizes, stream) = ([sequences, max_tokens], &self.model.stream);
            (self.states).resize(&self.device, layout, least, sizes, stream)
        });
        self.point_at_active()?;
        let filled = self.fill_slots();
        resized.and(filled)
    }

    fn resident(&self) -> (usize, usize) {
        (self.states.in_use(), self.states.capacity())
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        self.states.add(&self.model.stream)
    }

    fn fork(&mut self, of: SequenceId) -> Result<SequenceId> {
        self.states.fork(of, &self.model.stream)
    }

    fn position(&self, of: SequenceId) -> Result<usize> {
        self.states.position(of)
    }

    fn truncate(&mut self, of: SequenceId, tokens: usize) -> Result<()> {
        self.tentative = None;
        let position = self.states.position(of)?;
        let cuttable = !(self.model.shape.mixers).contains(&MixerKind::GatedDeltaNet);
        match tokens {
            _ if tokens == position => Ok(()),
            0 => self.states.clear(of, &self.model.stream),
            _ if tokens < position && cuttable => self.states.cut(of, tokens),
            _ => Err(BackendError::CannotTruncate {
                sequence: of,
                position,
                tokens,
            }),
        }
    }

    fn keep(&mut self, of: SequenceId, tokens: usize) -> Result<()> {
        self.keep_tentative(of, tokens)
    }

    fn snapshot(&mut self, of: SequenceId) -> Result<Snapshot> {
        let saved = self.states.save(of, &self.model.stream)?;
        let (own, pages) = (saved.own_bytes(), saved.shared_pages());
        Ok(Snapshot::new(saved.position, own, pages, saved))
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<SequenceId> {
        let saved: &HostState = snapshot.state()?;
        self.states.load(saved, &self.model.stream)
    }

    fn drop_sequence(&mut self, of: SequenceId) {
        self.states.remove(of);
    }

    fn sequence_bytes(&self) -> SequenceBytes {
        SequenceBytes {
            device: self.states.bytes(),
            host: self.states.host_bytes(),
        }
    }

    fn run(&mut self, batch: &[Piece<'_>], events: &mut dyn RunEvents) -> Result<Vec<NextLogits>> {
        for (i, piece) in batch.iter().enumerate() {
            let position = self.states.position(piece.sequence)?;
            piece.check(&batch[..i], position, self.states.max_tokens())?;
        }
        self.tentative = None;
        let mut outputs = Vec::with_capacity(batch.len());
        while outputs.len() < batch.len() {
            let first = outputs.len();
            let rest = &batch[first..];
            let single = rest.iter().take_while(|piece| piece.is_single()).count();
            let pieces = &rest[..single.clamp(1, MAX_BATCH)];
            // Lost, if an error leaves a state half advanced.
            match pieces {
                [piece] => outputs.push(self.run_piece(first, piece, events)?),
                _ => outputs.extend(self.run_together(first, pieces, events)?),
            }
            (pieces.iter()).for_each(|piece| self.states.set_lost(piece.sequence, false));
        }
        Ok(outputs)
    }

    fn expert_slots(&mut self) -> Option<&mut dyn ExpertSlots> {
        Some(self)
    }

    fn device_memory(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }

    fn diagnostics(&mut self) -> Option<&mut dyn Diagnostics> {
        Some(self)
    }
}

impl Cuda {
    /// Feeds one token of each of some sequences, which have room for it, in one step. The first piece is
    /// number `first` of its batch.
    fn run_together(
        &mut self,
        first: usize,
        pieces: &[Piece<'_>],
        events: &mut dyn RunEvents,
    ) -> Result<Vec<NextLogits>> {
        let wants = |piece: &Piece<'_>| match &piece.wanted {
            Wanted::Rows(rows) if rows.is_empty() => Brings::Nothing,
            Wanted::Best(wanted) if self.finds_best(*wanted) => Brings::Best,
            _ => Brings::Logits,
        };
        let wants: Vec<Brings> = pieces.iter().map(wants).collect();
        let brings = match wants.as_slice() {
            all if all.contains(&Brings::Logits) => Brings::Logits,
            all if all.contains(&Brings::Best) => Brings::Best,
            _ => Brings::Nothing,
        };
        self.give_slots_back()?;
        self.settle_slots()?;
        let ids: Vec<SequenceId> = pieces.iter().map(|piece| piece.sequence).collect();
        self.states.activate(ids[0])?;
        let at = self.states.begin(&ids)?;
        let bases: Vec<u64> = at.iter().map(|at| at.state).collect();
        self.decode.point_at(&bases, &self.model.stream)?;
        let fed: Vec<u32> = pieces.iter().map(|piece| piece.ids[0]).collect();
        let tokens = Tokens {
            at: &at,
            few: false,
            head_from: 0,
            wanted: brings,
        };
        self.step(&fed, tokens, &mut |token, layer, routing| {
            events.routed(first + token, layer, at[token].position, routing);
        })?;
        self.states.advance(&ids)?;
        let output = |(token, piece): (usize, &Piece<'_>)| match (&piece.wanted, brings) {
            (Wanted::Rows(rows), _) if rows.is_empty() => Ok(NextLogits::All(Vec::new())),
            (&Wanted::Best(wanted), Brings::Best) => {
                (self.decode).best(&self.model, &mut self.offload, token, wanted)
            }
            _ => Ok(NextLogits::All(self.decode.logits_of(token).to_vec())),
        };
        pieces.iter().enumerate().map(output).collect()
    }

    /// Feeds a piece, whose sequence has room for it.
    fn run_piece(
        &mut self,
        index: usize,
        piece: &Piece<'_>,
        events: &mut dyn RunEvents,
    ) -> Result<NextLogits> {
        self.states.activate(piece.sequence)?;
        self.point_at_active()?;
        self.states.set_lost(piece.sequence, true);
        let ids = piece.ids;
        let rows = match &piece.wanted {
            Wanted::Rows(rows) => rows.clone(),
            Wanted::Best(wanted) => match ids {
                [id] if !piece.tentative && self.finds_best(*wanted) => {
                    let on_routing = &mut |layer: usize, position: usize, routing: &Routing| {
                        events.routed(index, layer, position, routing);
                    };
                    self.give_slots_back()?;
                    self.settle_slots()?;
                    self.step_one(*id, Brings::Best, on_routing)?;
                    return (self.decode).best(&self.model, &mut self.offload, 0, *wanted);
                }
                _ => ids.len().saturating_sub(1)..ids.len(),
            },
        };
        let on_routing = &mut |layer: usize, position: usize, routing: &Routing| {
            events.routed(index, layer, position, routing);
        };
        let stepped = self.prefill.settings().stepped_tokens();
        let logits = match piece.tentative {
            true => self.run_tentative(piece.sequence, ids, rows, on_routing),
            false if ids.len() <= stepped => self.step_all(ids, rows, on_routing),
            false => self.prefill_piece(ids, rows, piece.admits, index, events),
        };
        logits.map(NextLogits::All)
    }

    /// Many tokens, in chunks.
    fn prefill_piece(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        admits: bool,
        index: usize,
        events: &mut dyn RunEvents,
    ) -> Result<Vec<f32>> {
        let admits = admits && !self.model.store.all_resident();
        let on_routing =
            &mut |layer: usize, position: usize, routing: &Routing, offer: Offer<'_>| {
                events.routed(index, layer, position, routing);
                match offer.at_most {
                    0 => Vec::new(),
                    _ => events.admit(index, layer, offer),
                }
            };
        self.prefill_all(ids, rows, admits, on_routing)
    }
}

impl ExpertSlots for Cuda {
    fn place(&mut self, contents: &[Vec<Option<u16>>]) -> Result<usize> {
        self.place_in_slots(contents)
    }

    fn change(&mut self, changes: &[SlotChange]) -> Result<()> {
        self.change_slots(changes)
    }

    fn set_budget(&mut self, vram_bytes: u64) -> Result<usize> {
        self.refill_within(vram_bytes)
    }
}

impl DeviceMemory for Cuda {
    fn used_bytes(&self) -> Result<u64> {
        self.usage.now()
    }

    fn held(&self) -> Result<VramHeld> {
        let held = VramHeld {
            context_bytes: self.context_bytes,
            sequence_bytes: self.states.bytes() as u64,
            slots_bytes: self.model.store.slots_bytes() as u64,
            other_bytes: 0,
            margin_bytes: MARGIN_BYTES,
        };
        let known = held.context_bytes + held.sequence_bytes + held.slots_bytes;
        Ok(VramHeld {
            other_bytes: self.used_bytes()?.saturating_sub(known),
            ..held
        })
    }

    fn meter(&self) -> VramMeter {
        let usage = self.usage.clone();
        Box::new(move || usage.now().ok())
    }
}

impl Diagnostics for Cuda {
    fn take_times(&mut self) -> DecodeTimes {
        std::mem::take(&mut self.decode.times)
    }

    fn tune(&mut self, tuning: Option<Tuning>) -> Result<Option<Tuning>> {
        match tuning {
            Some(tuning) => self.apply(tuning).map(|()| Some(tuning)),
            None => {
                self.forget_sequences()?;
                self.calibrate()
            }
        }
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    /// Records the graph of a step that samples.
    fn warm_up(&mut self) -> Result<()> {
        self.forget_sequences()?;
        self.give_slots_back()?;
        self.settle_slots()?;
        let brings = match self.finds_best(1) {
            true => Brings::Best,
            false => Brings::Logits,
        };
        self.step_one(0, brings, &mut |_, _, _| {})?;
        self.take_times();
        self.forget_sequences()
    }

    fn measure(&mut self, model: &str) -> Result<GpuProbe> {
        self.forget_sequences()?;
        self.measure_device(model)
    }

    fn kernel_times(&mut self) -> Result<KernelTimes> {
        self.forget_sequences()?;
        let decode_us = self.decode.kernel_times(&self.model, &self.states.layout)?;
        self.decode.forget_graphs();
        let (prefill_tokens, prefill_us) = self.prefill_kernel_times()?;
        self.give_slots_back()?;
        self.forget_sequences()?;
        Ok(KernelTimes {
            decode_us,
            prefill_tokens,
            prefill_us,
        })
    }
}
