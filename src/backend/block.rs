//! An executor for backends that compute block by block: the loop over blocks lives here.

use std::collections::BTreeMap;

use super::executor::{
    DeviceMemory, Diagnostics, Executor, ExpertSlots, Piece, RunEvents, SequenceBytes, SequenceId,
    Snapshot, Wanted,
};
use super::{
    Backend, BackendError, BackendFacts, LoadRates, MixerKind, ModelShape, NextLogits, Result,
};

/// Sequences on a [`Backend`], all in RAM.
pub struct BlockExecutor<B: Backend> {
    pub backend: B,
    sequences: BTreeMap<SequenceId, Sequence<B::State>>,
    next_id: u64,
    capacity: usize,
    max_tokens: usize,
}

struct Sequence<S> {
    state: S,
    position: usize,
    /// An error left its state half advanced
    lost: bool,
}

/// What a snapshot holds. The shape tells whose it is.
struct Saved<S> {
    shape: ModelShape,
    state: S,
}

impl<B: Backend> BlockExecutor<B> {
    /// An executor with room for one sequence of `max_tokens`.
    pub fn new(backend: B, max_tokens: usize) -> Self {
        BlockExecutor {
            backend,
            sequences: BTreeMap::new(),
            next_id: 0,
            capacity: 1,
            max_tokens,
        }
    }

    /// What a sequence carries on.
    ///
    /// # Errors
    /// [`BackendError::UnknownSequence`], [`BackendError::SequenceLost`].
    pub fn state(&self, of: SequenceId) -> Result<&B::State> {
        Ok(&self.sequence(of)?.state)
    }

    fn sequence(&self, of: SequenceId) -> Result<&Sequence<B::State>> {
        match self.sequences.get(&of) {
            None => Err(BackendError::UnknownSequence(of)),
            Some(sequence) if sequence.lost => Err(BackendError::SequenceLost(of)),
            Some(sequence) => Ok(sequence),
        }
    }

    fn check_room(&self) -> Result<()> {
        match self.sequences.len() < self.capacity {
            true => Ok(()),
            false => Err(BackendError::NoRoom {
                capacity: self.capacity,
            }),
        }
    }

    fn insert(&mut self, state: B::State, position: usize) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence {
            state,
            position,
            lost: false,
        };
        self.sequences.insert(id, sequence);
        id
    }

    /// Feeds one piece, whose sequence is there and has room.
    fn run_piece(
        &mut self,
        index: usize,
        piece: &Piece<'_>,
        events: &mut dyn RunEvents,
    ) -> Result<NextLogits> {
        let ids = piece.ids;
        let Some(sequence) = self.sequences.get_mut(&piece.sequence) else {
            return Err(BackendError::UnknownSequence(piece.sequence));
        };
        if ids.is_empty() {
            return Ok(NextLogits::All(Vec::new()));
        }
        let backend = &mut self.backend;
        sequence.lost = true;
        let mut hidden = backend.embed(ids)?;
        for layer in 0..backend.shape().num_layers() {
            backend.mixer(layer, &mut hidden, &mut sequence.state)?;
            let routing = backend.router(layer, &hidden)?;
            events.routed(index, layer, sequence.position, &routing);
            backend.experts(layer, &mut hidden, &routing)?;
        }
        sequence.position += ids.len();
        let rows = match &piece.wanted {
            Wanted::Rows(rows) => rows.clone(),
            Wanted::Best(_) => ids.len() - 1..ids.len(),
        };
        let logits = match rows.is_empty() {
            true => Vec::new(),
            false => backend.head(&hidden, rows)?,
        };
        sequence.lost = false;
        Ok(NextLogits::All(logits))
    }
}

impl<B: Backend> Executor for BlockExecutor<B> {
    fn shape(&self) -> &ModelShape {
        self.backend.shape()
    }

    fn facts(&self) -> BackendFacts {
        self.backend.facts()
    }

    fn prefill_chunk(&self, _tokens: usize) -> usize {
        self.backend.prefill_chunk()
    }

    fn load_rates(&self) -> Option<LoadRates> {
        self.backend.load_rates()
    }

    fn decode_read_bytes(&self, context: usize) -> Option<u64> {
        self.backend.decode_read_bytes(context)
    }

    /// Memory is taken as sequences grow.
    fn reserve(&mut self, sequences: usize, max_tokens: usize) -> Result<()> {
        self.sequences.clear();
        self.capacity = sequences;
        self.max_tokens = max_tokens;
        Ok(())
    }

    fn resident(&self) -> (usize, usize) {
        (self.sequences.len(), self.capacity)
    }

    fn new_sequence(&mut self) -> Result<SequenceId> {
        self.check_room()?;
        let state = self.backend.new_state(self.max_tokens)?;
        Ok(self.insert(state, 0))
    }

    fn fork(&mut self, of: SequenceId) -> Result<SequenceId> {
        self.check_room()?;
        let sequence = self.sequence(of)?;
        let (state, position) = (sequence.state.clone(), sequence.position);
        Ok(self.insert(state, position))
    }

    fn position(&self, of: SequenceId) -> Result<usize> {
        Ok(self.sequence(of)?.position)
    }

    fn truncate(&mut self, of: SequenceId, tokens: usize) -> Result<()> {
        let position = self.position(of)?;
        let cuttable = !(self.backend.shape().mixers).contains(&MixerKind::GatedDeltaNet);
        if tokens > position || (tokens < position && tokens > 0 && !cuttable) {
            return Err(BackendError::CannotTruncate {
                sequence: of,
                position,
                tokens,
            });
        }
        if tokens < position {
            // A sequence whose states allow it is cut by the backend; any other begins anew.
            let sequence = self.sequences.get_mut(&of).expect("its position is known");
            match tokens {
                0 => sequence.state = self.backend.new_state(self.max_tokens)?,
                _ => self.backend.truncate(&mut sequence.state, tokens)?,
            }
            sequence.position = tokens;
        }
        Ok(())
    }

    fn snapshot(&mut self, of: SequenceId) -> Result<Snapshot> {
        let sequence = self.sequence(of)?;
        let (own_bytes, pages) = self.backend.state_bytes(&sequence.state);
        let saved = Saved {
            shape: self.backend.shape().clone(),
            state: sequence.state.clone(),
        };
        Ok(Snapshot::new(sequence.position, own_bytes, pages, saved))
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<SequenceId> {
        self.check_room()?;
        let saved: &Saved<B::State> = snapshot.state()?;
        if saved.shape != *self.backend.shape() {
            return Err(BackendError::Other(
                "this snapshot was taken of another model".into(),
            ));
        }
        if snapshot.tokens() > self.max_tokens {
            return Err(BackendError::ContextFull {
                needed: snapshot.tokens(),
                capacity: self.max_tokens,
            });
        }
        let state = saved.state.clone();
        Ok(self.insert(state, snapshot.tokens()))
    }

    fn drop_sequence(&mut self, of: SequenceId) {
        self.sequences.remove(&of);
    }

    fn sequence_bytes(&self) -> SequenceBytes {
        SequenceBytes {
            device: 0,
            host: self.backend.held_bytes(),
        }
    }

    fn run(&mut self, batch: &[Piece<'_>], events: &mut dyn RunEvents) -> Result<Vec<NextLogits>> {
        for (i, piece) in batch.iter().enumerate() {
            piece.check(&batch[..i], self.position(piece.sequence)?, self.max_tokens)?;
        }
        let pieces = batch.iter().enumerate();
        pieces
            .map(|(index, piece)| self.run_piece(index, piece, events))
            .collect()
    }

    fn expert_slots(&mut self) -> Option<&mut dyn ExpertSlots> {
        None
    }

    fn device_memory(&self) -> Option<&dyn DeviceMemory> {
        None
    }

    fn diagnostics(&mut self) -> Option<&mut dyn Diagnostics> {
        None
    }
}
