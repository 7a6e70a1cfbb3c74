//! An executor for backends that compute block by block: the loop over blocks lives here.

use std::collections::BTreeMap;
use std::ops::Range;

use super::executor::{
    DeviceMemory, Diagnostics, Executor, ExpertSlots, LogitRows, Piece, RunEvents, SequenceBytes,
    SequenceId, Snapshot, Wanted,
};
use super::{
    Backend, BackendError, BackendFacts, LoadRates, MixerKind, ModelShape, NextLogits, Result,
    Routing, SlotChange,
};
use crate::planning::Offer;

/// Sequences on a [`Backend`], all in RAM.
pub struct BlockExecutor<B: Backend> {
    pub backend: B,
    sequences: BTreeMap<SequenceId, Sequence<B::State>>,
    next_id: u64,
    capacity: usize,
    max_tokens: usize,
    tentative: Option<Tentative<B::State>>,
}

/// A piece that may be taken back.
struct Tentative<S> {
    sequence: SequenceId,
    ids: Vec<u32>,
    /// Of the sequence after it
    after: S,
}

/// Tells nobody.
struct Unheard;

impl RunEvents for Unheard {
    fn routed(&mut self, _: usize, _: usize, _: usize, _: &Routing) {}

    fn admit(&mut self, _: usize, _: usize, _: Offer<'_>) -> Vec<SlotChange> {
        Vec::new()
    }
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
            tentative: None,
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

    /// Feeds pieces of the same length, of sequences that are there and have room, at once. The first is
    /// number `first` of its batch.
    fn run_pieces(
        &mut self,
        first: usize,
        pieces: &[Piece<'_>],
        events: &mut dyn RunEvents,
    ) -> Result<Vec<NextLogits>> {
        let each = pieces[0].ids.len();
        if each == 0 {
            return Ok(vec![NextLogits::All(Vec::new()); pieces.len()]);
        }
        let mut all: BTreeMap<_, _> = self.sequences.iter_mut().collect();
        let sequences = pieces.iter().map(|piece| {
            let sequence = all.remove(&piece.sequence);
            sequence.ok_or(BackendError::UnknownSequence(piece.sequence))
        });
        let mut sequences = sequences.collect::<Result<Vec<_>>>()?;
        let backend = &mut self.backend;
        let positions: Vec<usize> = sequences.iter().map(|s| s.position).collect();
        let (mut states, lost): (Vec<_>, Vec<_>) = (sequences.iter_mut())
            .map(|sequence| (&mut sequence.state, &mut sequence.lost))
            .unzip();
        lost.into_iter().for_each(|lost| *lost = true);
        let ids: Vec<u32> = pieces.iter().flat_map(|piece| piece.ids).copied().collect();
        let mut hidden = backend.embed(&ids)?;
        let mut routings = Vec::new();
        for layer in 0..backend.shape().num_layers() {
            backend.mixer(layer, &mut hidden, &mut states)?;
            let routing = backend.router(layer, &hidden)?;
            backend.experts(layer, &mut hidden, &routing)?;
            routings.push(routing);
        }
        // Piece by piece, as if each had been alone.
        for (i, &position) in positions.iter().enumerate() {
            for (layer, routing) in routings.iter().enumerate() {
                let routing = routing.of_tokens(i * each..(i + 1) * each);
                events.routed(first + i, layer, position, &routing);
            }
        }
        let rows = pieces.iter().enumerate().map(|(i, piece)| {
            let rows = match &piece.wanted {
                Wanted::Rows(rows) => rows.clone(),
                Wanted::Best(_) => each - 1..each,
            };
            i * each + rows.start..i * each + rows.end
        });
        let rows: Vec<_> = rows.collect();
        let logits = heads(backend, &hidden, &rows)?;
        for sequence in sequences {
            sequence.position += each;
            sequence.lost = false;
        }
        Ok(logits.into_iter().map(NextLogits::All).collect())
    }
}

impl<B: Backend> BlockExecutor<B> {
    /// Feeds a piece, and puts the sequence back to where it was.
    fn run_tentative(
        &mut self,
        piece: &Piece<'_>,
        events: &mut dyn RunEvents,
    ) -> Result<NextLogits> {
        let before = self.sequence(piece.sequence)?.state.clone();
        let logits = self.run_as_alone(piece, events)?;
        if let Some(sequence) = self.sequences.get_mut(&piece.sequence) {
            sequence.position -= piece.ids.len();
            self.tentative = Some(Tentative {
                sequence: piece.sequence,
                ids: piece.ids.to_vec(),
                after: std::mem::replace(&mut sequence.state, before),
            });
        }
        Ok(logits)
    }

    /// Feeds a piece so that each token gets the bits that it gets alone.
    fn run_as_alone(
        &mut self,
        piece: &Piece<'_>,
        events: &mut dyn RunEvents,
    ) -> Result<NextLogits> {
        let rows = match &piece.wanted {
            Wanted::Rows(rows) => rows.clone(),
            Wanted::Best(_) => piece.ids.len().saturating_sub(1)..piece.ids.len(),
        };
        let mut logits = Vec::new();
        let mut first = 0;
        for ids in piece.ids.chunks(self.backend.most_consecutive()) {
            let within = |row: usize| row.clamp(first, first + ids.len()) - first;
            let some = Piece {
                ids,
                wanted: Wanted::Rows(within(rows.start)..within(rows.end)),
                ..piece.clone()
            };
            for found in self.run_pieces(0, &[some], events)? {
                match found {
                    NextLogits::All(found) => logits.extend(found),
                    NextLogits::Best(_) => unreachable!("blocks give all logits"),
                }
            }
            first += ids.len();
        }
        Ok(NextLogits::All(logits))
    }
}

/// The logits of some rows for each piece; the head is read once for all that lie between the first and
/// the last.
fn heads<B: Backend>(
    backend: &mut B,
    hidden: &B::Hidden,
    rows: &[Range<usize>],
) -> Result<Vec<Vec<f32>>> {
    let some = || rows.iter().filter(|rows| !rows.is_empty());
    let start = some().map(|rows| rows.start).min().unwrap_or(0);
    let end = some().map(|rows| rows.end).max().unwrap_or(0);
    let all = match start < end {
        true => backend.head(hidden, start..end)?,
        false => Vec::new(),
    };
    if let [_] = rows {
        return Ok(vec![all]);
    }
    let vocab = backend.shape().vocab_size;
    let of_piece = |rows: &Range<usize>| match rows.is_empty() {
        true => Vec::new(),
        false => all[(rows.start - start) * vocab..(rows.end - start) * vocab].to_vec(),
    };
    Ok(rows.iter().map(of_piece).collect())
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
        self.tentative = None;
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
        self.tentative = None;
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

    /// What stays is computed again on the state before, unless all of it does.
    fn keep(&mut self, of: SequenceId, tokens: usize) -> Result<()> {
        let there = self.tentative.take().filter(|t| t.sequence == of);
        let many = there.as_ref().map_or(0, |tentative| tentative.ids.len());
        if tokens > many {
            return Err(BackendError::Other(format!(
                "{tokens} tokens of sequence {of} were to be kept, of {many} that may be taken back"
            )));
        }
        self.sequence(of)?;
        let Some(Tentative { ids, after, .. }) = there else {
            return Ok(());
        };
        if tokens < ids.len() {
            let piece = Piece::new(of, &ids[..tokens], LogitRows::None);
            return self.run_as_alone(&piece, &mut Unheard).map(drop);
        }
        if let Some(sequence) = self.sequences.get_mut(&of) {
            sequence.state = after;
            sequence.position += tokens;
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
        self.tentative = None;
        let mut outputs = Vec::with_capacity(batch.len());
        while outputs.len() < batch.len() {
            let first = outputs.len();
            let rest = &batch[first..];
            let single = rest.iter().take_while(|piece| piece.is_single()).count();
            let pieces = &rest[..single.clamp(1, self.backend.most_together())];
            match pieces {
                [piece] if piece.tentative => outputs.push(self.run_tentative(piece, events)?),
                _ => outputs.extend(self.run_pieces(first, pieces, events)?),
            }
        }
        Ok(outputs)
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
