//! The states of several sequences, of one layout, and which of them kernels work on.

use std::sync::Arc;

use super::device::{Buffer, Device, Stream};
use super::saved::{HostPage, HostState, HostStore};
use crate::backend::executor::SequenceId;
use crate::backend::{BackendError, Result};

pub use super::layout::{LayerState, StateLayout, kv_token_bytes};

/// One sequence.
pub struct SequenceState {
    /// Addresses
    pub layers: Vec<LayerState>,
    /// Tokens seen
    pub position: usize,
    buffer: Buffer,
    /// Keys and values that a snapshot already has in RAM: whole pages, from the first token on
    saved: Vec<Arc<HostPage>>,
}

impl SequenceState {
    fn new(device: &Device, layout: &StateLayout, stream: &Stream) -> Result<Self> {
        let buffer = device.alloc(layout.bytes, stream)?;
        let base = buffer.address();
        Ok(SequenceState {
            layers: layout.layers.iter().map(|layer| layer.at(base)).collect(),
            position: 0,
            buffer,
            saved: Vec::new(),
        })
    }

    /// Its address.
    pub fn base(&self) -> u64 {
        self.buffer.address()
    }

    /// Starts over in the same memory.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn clear(&mut self, stream: &Stream) -> Result<()> {
        self.position = 0;
        self.saved.clear();
        self.buffer.fill_zero(stream)
    }
}

/// A token of a step: how many its sequence has seen before it, and where its states lie.
#[derive(Clone, Copy, Debug)]
pub struct TokenAt {
    pub position: usize,
    pub state: u64,
}

impl TokenAt {
    /// The next token of a sequence.
    pub fn next_of(state: &SequenceState) -> Self {
        TokenAt {
            position: state.position,
            state: state.base(),
        }
    }
}

/// Who has a state.
#[derive(Clone, Copy)]
struct Owner {
    id: SequenceId,
    /// An error left it in an unknown state
    lost: bool,
}

fn new_states(
    device: &Device,
    layout: &StateLayout,
    count: usize,
    stream: &Stream,
) -> Result<Vec<SequenceState>> {
    let states = (0..count.max(1)).map(|_| SequenceState::new(device, layout, stream));
    states.collect()
}

/// Sequences that are on the device, and room for more: `capacity` states of one layout.
pub struct StatePool {
    pub layout: StateLayout,
    states: Vec<SequenceState>,
    owners: Vec<Option<Owner>>,
    active: usize,
    max_tokens: usize,
    next_id: u64,
    host: Arc<HostStore>,
}

impl StatePool {
    /// Room for `sequences` of the layout, at least one, each of up to `max_tokens`.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub fn new(
        device: &Device,
        layout: StateLayout,
        [sequences, max_tokens]: [usize; 2],
        stream: &Stream,
    ) -> Result<Self> {
        let states = new_states(device, &layout, sequences, stream)?;
        Ok(StatePool {
            owners: vec![None; states.len()],
            states,
            active: 0,
            max_tokens,
            next_id: 0,
            host: Arc::new(HostStore::new(device, &layout)),
            layout,
        })
    }

    /// The same in place of what there is, all sequences of which are forgotten; snapshots stay.
    /// Memory is given back before more is taken.
    ///
    /// # Errors
    /// As [`new`](StatePool::new); there is then room for one short sequence.
    pub fn resize(
        &mut self,
        device: &Device,
        layout: StateLayout,
        least: StateLayout,
        [sequences, max_tokens]: [usize; 2],
        stream: &Stream,
    ) -> Result<()> {
        stream.synchronize()?;
        self.states.clear();
        self.owners.clear();
        let (states, failed) = match new_states(device, &layout, sequences, stream) {
            Ok(states) => (states, None),
            Err(error) => (new_states(device, &least, 1, stream)?, Some(error)),
        };
        (self.layout, self.max_tokens) = match failed {
            None => (layout, max_tokens),
            Some(_) => (least, 1),
        };
        self.owners = vec![None; states.len()];
        self.states = states;
        self.active = 0;
        failed.map_or(Ok(()), Err)
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.states.len() * self.layout.bytes
    }

    /// Bytes of snapshots, in RAM.
    pub fn host_bytes(&self) -> usize {
        self.host.bytes()
    }

    /// Sequences that there is room for.
    pub fn capacity(&self) -> usize {
        self.states.len()
    }

    pub fn in_use(&self) -> usize {
        self.owners.iter().flatten().count()
    }

    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Sequences may now grow to `max_tokens`, for which there is room.
    pub fn set_max_tokens(&mut self, max_tokens: usize) {
        assert!(max_tokens <= self.layout.capacity);
        self.max_tokens = max_tokens;
    }

    /// The state that kernels work on.
    pub fn active(&self) -> &SequenceState {
        &self.states[self.active]
    }

    pub fn active_mut(&mut self) -> &mut SequenceState {
        &mut self.states[self.active]
    }

    /// Where the next tokens of some sequences are. They count as lost until they are told not to be: an
    /// error may leave them half advanced.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn begin(&mut self, ids: &[SequenceId]) -> Result<Vec<TokenAt>> {
        let found = ids.iter().map(|&id| self.find(id));
        let found = found.collect::<Result<Vec<_>>>()?;
        ids.iter().for_each(|&id| self.set_lost(id, true));
        let at = |&index: &usize| TokenAt::next_of(&self.states[index]);
        Ok(found.iter().map(at).collect())
    }

    /// These sequences have seen another token, and are not lost.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn advance(&mut self, ids: &[SequenceId]) -> Result<()> {
        for &id in ids {
            self.set_lost(id, false);
            let index = self.find(id)?;
            self.states[index].position += 1;
        }
        Ok(())
    }

    /// The state of a sequence is the one that kernels work on from now on.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn activate(&mut self, id: SequenceId) -> Result<()> {
        self.active = self.find(id)?;
        Ok(())
    }

    /// Whether an error may have left a sequence's state half advanced.
    pub fn set_lost(&mut self, id: SequenceId, lost: bool) {
        let named = |owner: &&mut Owner| owner.id == id;
        if let Some(owner) = self.owners.iter_mut().flatten().find(named) {
            owner.lost = lost;
        }
    }

    /// # Errors
    /// If there is no such sequence, or it was lost.
    pub fn position(&self, id: SequenceId) -> Result<usize> {
        Ok(self.states[self.find(id)?].position)
    }

    fn find(&self, id: SequenceId) -> Result<usize> {
        let named = |owner: &Option<Owner>| owner.is_some_and(|owner| owner.id == id);
        match self.owners.iter().position(named) {
            None => Err(BackendError::UnknownSequence(id)),
            Some(index) if self.owners[index].is_some_and(|owner| owner.lost) => {
                Err(BackendError::SequenceLost(id))
            }
            Some(index) => Ok(index),
        }
    }

    /// A state that nobody has, for a new sequence.
    fn take(&mut self) -> Result<(usize, SequenceId)> {
        let Some(index) = self.owners.iter().position(Option::is_none) else {
            return Err(BackendError::NoRoom {
                capacity: self.states.len(),
            });
        };
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.owners[index] = Some(Owner { id, lost: false });
        Ok((index, id))
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`].
    pub fn add(&mut self, stream: &Stream) -> Result<SequenceId> {
        let (index, id) = self.take()?;
        self.states[index].clear(stream)?;
        Ok(id)
    }

    /// Another sequence with the same state.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`]; if there is no such sequence.
    pub fn fork(&mut self, of: SequenceId, stream: &Stream) -> Result<SequenceId> {
        let from = self.find(of)?;
        let (index, id) = self.take()?;
        let source = &self.states[from];
        let (base, position, saved) = (source.base(), source.position, source.saved.clone());
        let state = &mut self.states[index];
        (state.position, state.saved) = (position, saved);
        // SAFETY: both buffers have this size, and freeing them waits for the device.
        unsafe { stream.copy_on_device(state.base(), base, self.layout.bytes)? };
        Ok(id)
    }

    /// The sequence has seen nothing.
    ///
    /// # Errors
    /// [`BackendError::UnknownSequence`]; if the driver reports one.
    pub fn clear(&mut self, id: SequenceId, stream: &Stream) -> Result<()> {
        let index = self.find(id)?;
        self.states[index].clear(stream)
    }

    /// Forgets keys and values from `position` on, of a sequence that has nothing else.
    ///
    /// # Errors
    /// [`BackendError::UnknownSequence`].
    pub fn cut(&mut self, id: SequenceId, position: usize) -> Result<()> {
        let index = self.find(id)?;
        let state = &mut self.states[index];
        state.position = position;
        state.saved.truncate(position / super::saved::PAGE_TOKENS);
        Ok(())
    }

    /// Copies a sequence to RAM.
    ///
    /// # Errors
    /// If there is no such sequence, or no memory.
    pub fn save(&mut self, id: SequenceId, stream: &Stream) -> Result<HostState> {
        let index = self.find(id)?;
        let state = &mut self.states[index];
        let (base, position) = (state.base(), state.position);
        let saved = HostState::save(
            &self.host,
            &self.layout,
            base,
            position,
            &state.saved,
            stream,
        )?;
        state.saved = saved.whole_pages().to_vec();
        Ok(saved)
    }

    /// A sequence that goes on from what was saved.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`], or if it was saved of another layout of states.
    pub fn load(&mut self, saved: &HostState, stream: &Stream) -> Result<SequenceId> {
        if saved.position > self.max_tokens {
            return Err(BackendError::ContextFull {
                needed: saved.position,
                capacity: self.max_tokens,
            });
        }
        let (index, id) = self.take()?;
        let state = &mut self.states[index];
        let loaded =
            (state.clear(stream)).and_then(|()| saved.load(&self.layout, state.base(), stream));
        if let Err(error) = loaded {
            self.owners[index] = None;
            return Err(error);
        }
        state.position = saved.position;
        state.saved = saved.whole_pages().to_vec();
        Ok(id)
    }

    pub fn remove(&mut self, id: SequenceId) {
        let named = |owner: &Option<Owner>| owner.is_some_and(|owner| owner.id == id);
        if let Some(index) = self.owners.iter().position(named) {
            self.owners[index] = None;
            self.states[index].saved.clear();
        }
    }

    /// Forgets all sequences; the state that kernels work on is then an empty one.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn remove_all(&mut self, stream: &Stream) -> Result<()> {
        self.owners.fill(None);
        self.states.iter_mut().for_each(|state| state.saved.clear());
        self.active_mut().clear(stream)
    }
}
