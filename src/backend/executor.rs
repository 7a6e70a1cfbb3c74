//! What the engine drives: a loaded model that runs any number of sequences.
//!
//! A sequence is a value: made, fed, copied, kept in RAM as a [`Snapshot`], dropped. What a GPU adds
//! to that, slots for experts and figures of itself, are interfaces of their own beside it, which
//! other backends do not have.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{
    BackendError, BackendFacts, DecodeTimes, KernelTimes, LoadRates, ModelShape, NextLogits,
    Result, Routing, SlotChange, Tuning, VramHeld, VramMeter,
};
use crate::hardware::GpuProbe;
use crate::planning::Offer;

/// Names a sequence of one executor; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Which tokens of a piece want logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    None,
    /// Only the last token: what generation needs.
    Last,
    All,
}

impl LogitRows {
    /// Those of a piece of `tokens`.
    pub fn of(self, tokens: usize) -> Range<usize> {
        match self {
            LogitRows::None => 0..0,
            LogitRows::Last => tokens.saturating_sub(1)..tokens,
            LogitRows::All => 0..tokens,
        }
    }
}

/// What is to come of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All logits of these tokens of the piece; of none, if the range is empty
    Rows(Range<usize>),
    /// So many of the best logits of the last token: an executor that finds them itself may give only
    /// those, another gives all
    Best(usize),
}

/// Tokens that go after what a sequence has seen.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    pub sequence: SequenceId,
    /// Each below vocab_size
    pub ids: &'a [u32],
    pub wanted: Wanted,
    /// Whether [`RunEvents::admit`] is asked, as it is at the end of a prompt
    pub admits: bool,
    /// Whether its tokens count only as far as they are [kept](Executor::keep), right after: at most
    /// [`MOST_TENTATIVE`], alone in a batch
    pub tentative: bool,
}

/// Tokens of a piece that may be taken back.
pub const MOST_TENTATIVE: usize = 8;

impl<'a> Piece<'a> {
    /// A piece that changes no slots.
    pub fn new(sequence: SequenceId, ids: &'a [u32], rows: LogitRows) -> Self {
        Piece {
            sequence,
            ids,
            wanted: Wanted::Rows(rows.of(ids.len())),
            admits: false,
            tentative: false,
        }
    }

    /// A piece whose tokens may be taken back, with the logits of all of them.
    pub fn tentative(sequence: SequenceId, ids: &'a [u32]) -> Self {
        Piece {
            tentative: true,
            ..Piece::new(sequence, ids, LogitRows::All)
        }
    }

    /// Whether it is one token that stays.
    pub(super) fn is_single(&self) -> bool {
        self.ids.len() == 1 && !self.tentative
    }

    /// Whether the piece may run in a batch after `before`, on a sequence of at most `max_tokens` that
    /// has seen `position`.
    pub(super) fn check(
        &self,
        before: &[Piece<'_>],
        position: usize,
        max_tokens: usize,
    ) -> Result<()> {
        if before.iter().any(|piece| piece.sequence == self.sequence) {
            return Err(BackendError::Other(format!(
                "sequence {} is twice in a batch; feed its pieces one after the other",
                self.sequence
            )));
        }
        if let Wanted::Rows(rows) = &self.wanted
            && (rows.start > rows.end || rows.end > self.ids.len())
        {
            return Err(BackendError::Other(format!(
                "logits of tokens {} to {} of a piece of {} were asked for",
                rows.start,
                rows.end,
                self.ids.len()
            )));
        }
        let of_many = self.tentative && self.ids.len() > MOST_TENTATIVE;
        let with_others = before.iter().chain([self]).any(|piece| piece.tentative);
        if of_many || (with_others && !before.is_empty()) {
            return Err(BackendError::Other(format!(
                "tokens that may be taken back come alone, at most {MOST_TENTATIVE}; here are {} in piece \
                 {} of a batch",
                self.ids.len(),
                before.len() + 1
            )));
        }
        let needed = position + self.ids.len();
        match needed <= max_tokens {
            true => Ok(()),
            false => Err(BackendError::ContextFull {
                needed,
                capacity: max_tokens,
            }),
        }
    }
}

/// Receives what happens while a batch runs. Pieces are named by their place in the batch.
pub trait RunEvents {
    /// The router of `layer` chose for tokens of piece `piece`, the first of which is at `position`.
    fn routed(&mut self, piece: usize, layer: usize, position: usize, routing: &Routing);

    /// What the slots of `layer` shall hold from now on: changes to offered experts, which are on the
    /// device at this moment, so that they cost no copy over PCIe. Called after
    /// [`routed`](RunEvents::routed), for pieces that [`admit`](Piece::admits), where a device has slots.
    fn admit(&mut self, piece: usize, layer: usize, offer: Offer<'_>) -> Vec<SlotChange>;
}

/// Receives what the router chose: layer, position of the first token, the choice.
pub type OnRouting<'a> = dyn FnMut(usize, usize, &Routing) + 'a;

/// Memory that several sequences or snapshots may hold together, to be counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPage {
    /// No other living page of this executor has it
    pub id: usize,
    pub bytes: usize,
}

/// A sequence as it was at some moment, in RAM. Clones share it.
#[derive(Clone)]
pub struct Snapshot {
    tokens: usize,
    own_bytes: usize,
    pages: Vec<SharedPage>,
    state: Arc<dyn Any + Send + Sync>,
}

impl Snapshot {
    pub(super) fn new<S: Any + Send + Sync>(
        tokens: usize,
        own_bytes: usize,
        pages: Vec<SharedPage>,
        state: S,
    ) -> Self {
        Snapshot {
            tokens,
            own_bytes,
            pages,
            state: Arc::new(state),
        }
    }

    /// One that no executor restores, for tests of what keeps snapshots.
    #[cfg(test)]
    pub(crate) fn of_nothing(tokens: usize, own_bytes: usize, pages: Vec<SharedPage>) -> Self {
        Snapshot::new(tokens, own_bytes, pages, ())
    }

    /// Tokens the sequence had seen.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes that nothing else holds: states that cannot be cut.
    pub fn own_bytes(&self) -> usize {
        self.own_bytes
    }

    /// Keys and values, which other snapshots and sequences may hold too.
    pub fn pages(&self) -> &[SharedPage] {
        &self.pages
    }

    /// What the executor put in.
    ///
    /// # Errors
    /// If it is of another kind of executor.
    pub(super) fn state<S: Any>(&self) -> Result<&S> {
        self.state
            .downcast_ref()
            .ok_or_else(|| BackendError::Other("this snapshot was taken by another backend".into()))
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.own_bytes + self.pages.iter().map(|page| page.bytes).sum::<usize>();
        write!(f, "Snapshot of {} tokens, {bytes} bytes", self.tokens)
    }
}

/// Bytes that sequences and snapshots hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceBytes {
    /// On the GPU, whether in use or kept for sequences to come
    pub device: usize,
    /// In RAM
    pub host: usize,
}

/// A loaded model that runs sequences.
///
/// Fed in the same pieces, a sequence gives the same bits whatever happens to others, whether it was
/// forked, restored from a snapshot, or fed without interruption.
pub trait Executor: Send {
    fn shape(&self) -> &ModelShape;

    fn facts(&self) -> BackendFacts;

    /// Tokens of the pieces that a prompt of `tokens` is best fed in.
    fn prefill_chunk(&self, tokens: usize) -> usize;

    /// How fast loading was, where it is measured.
    fn load_rates(&self) -> Option<LoadRates>;

    /// Bytes of weights and state that decoding one token reads with `context` tokens seen; `None`
    /// where nothing is laid out to be read once.
    fn decode_read_bytes(&self, context: usize) -> Option<u64>;

    /// Makes room for `sequences` at once of `max_tokens` each; all there are now are dropped.
    ///
    /// # Errors
    /// If memory is short.
    fn reserve(&mut self, sequences: usize, max_tokens: usize) -> Result<()>;

    /// Sequences that are in memory now, and how many may be.
    fn resident(&self) -> (usize, usize);

    /// An empty sequence that may grow to what was [`reserve`](Executor::reserve)d.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`] if there are as many as were reserved.
    fn new_sequence(&mut self) -> Result<SequenceId>;

    /// Another sequence that has seen the same tokens.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`]; [`BackendError::UnknownSequence`].
    fn fork(&mut self, of: SequenceId) -> Result<SequenceId>;

    /// Tokens that a sequence has seen.
    ///
    /// # Errors
    /// [`BackendError::UnknownSequence`].
    fn position(&self, of: SequenceId) -> Result<usize>;

    /// Takes back all tokens from `tokens` on.
    ///
    /// # Errors
    /// [`BackendError::CannotTruncate`] of a model with delta nets, whose states cannot be cut, but to
    /// nothing; [`BackendError::UnknownSequence`].
    fn truncate(&mut self, of: SequenceId, tokens: usize) -> Result<()>;

    /// Has the first `tokens` of the last piece that was run, a [tentative](method@Piece::tentative) one of this
    /// sequence, count; the others are taken back. Without this, all of them are, whatever is done next.
    ///
    /// # Errors
    /// If there are not so many; if the backend fails, and the sequence is lost then.
    fn keep(&mut self, of: SequenceId, tokens: usize) -> Result<()>;

    /// Keeps the sequence as it is now, in RAM.
    ///
    /// # Errors
    /// If memory is short; [`BackendError::UnknownSequence`].
    fn snapshot(&mut self, of: SequenceId) -> Result<Snapshot>;

    /// A sequence that goes on from `snapshot`.
    ///
    /// # Errors
    /// [`BackendError::NoRoom`]; [`BackendError::ContextFull`] if it has seen more tokens than a
    /// sequence may now; a snapshot of another model or backend.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<SequenceId>;

    /// Moves a sequence to RAM, where it waits until it is [`restore`](Executor::restore)d.
    ///
    /// # Errors
    /// As [`snapshot`](Executor::snapshot); the sequence is then still there.
    fn park(&mut self, of: SequenceId) -> Result<Snapshot> {
        let snapshot = self.snapshot(of)?;
        self.drop_sequence(of);
        Ok(snapshot)
    }

    /// Forgets a sequence; one that is unknown is forgotten already.
    fn drop_sequence(&mut self, of: SequenceId);

    /// What sequences and snapshots hold.
    fn sequence_bytes(&self) -> SequenceBytes;

    /// Feeds pieces, at most one of each sequence; what each wanted, in order. A piece that wants
    /// rows gets `[rows, vocab_size]`.
    ///
    /// # Errors
    /// [`BackendError::UnknownSequence`] and [`BackendError::ContextFull`], before anything is done.
    /// If the backend fails, the sequences of the batch are lost: only dropping them is possible.
    fn run(&mut self, batch: &[Piece<'_>], events: &mut dyn RunEvents) -> Result<Vec<NextLogits>>;

    /// Slots for experts in VRAM, if a GPU takes part.
    fn expert_slots(&mut self) -> Option<&mut dyn ExpertSlots>;

    /// What the process holds on the GPU, if one takes part.
    fn device_memory(&self) -> Option<&dyn DeviceMemory>;

    /// Measurements of the GPU, if one takes part.
    fn diagnostics(&mut self) -> Option<&mut dyn Diagnostics>;
}

/// Slots for experts in VRAM.
pub trait ExpertSlots {
    /// Fills the slots of each layer, `[layer][slot]`, as far as they fit: the number that do.
    ///
    /// # Errors
    /// If the driver reports one.
    fn place(&mut self, contents: &[Vec<Option<u16>>]) -> Result<usize>;

    /// Starts copying experts into slots; what a slot held is forgotten at once.
    ///
    /// # Errors
    /// If the driver reports one.
    fn change(&mut self, changes: &[SlotChange]) -> Result<()>;

    /// Another ceiling for everything this process holds on the GPU. Slots that were
    /// [placed](ExpertSlots::place) are empty afterwards, to be placed again; sequences stay. The number
    /// of slots there is room for.
    ///
    /// # Errors
    /// [`BackendError::DoesNotFit`] if what must be there needs more; the old ceiling and the old slots
    /// are then in force again.
    fn set_budget(&mut self, vram_bytes: u64) -> Result<usize>;
}

/// What this process holds on a GPU, by the driver's figure.
pub trait DeviceMemory {
    /// Bytes in all.
    ///
    /// # Errors
    /// If the driver reports one.
    fn used_bytes(&self) -> Result<u64>;

    /// The same item by item.
    ///
    /// # Errors
    /// If the driver reports one.
    fn held(&self) -> Result<VramHeld>;

    /// The same figure for a thread that watches.
    fn meter(&self) -> VramMeter;
}

/// Measures a GPU with the model that is loaded, and chooses by that. Whatever runs steps to measure
/// them drops all sequences first.
pub trait Diagnostics {
    /// Where decode steps spent their time since the last call.
    fn take_times(&mut self) -> DecodeTimes;

    /// Chooses how misses are shared between CPU and GPU, for the experts that are in VRAM now, or
    /// applies `tuning` where it is known. `None` where there is no choice.
    ///
    /// # Errors
    /// If the driver reports one.
    fn tune(&mut self, tuning: Option<Tuning>) -> Result<Option<Tuning>>;

    /// What was found out about this machine while loading and tuning.
    fn notes(&self) -> Vec<String>;

    /// Prepares what the first decode step would, such as graphs.
    ///
    /// # Errors
    /// If the driver reports one.
    fn warm_up(&mut self) -> Result<()>;

    /// Measures the GPU with this model, which is called `model`.
    ///
    /// # Errors
    /// If the driver reports one.
    fn measure(&mut self, model: &str) -> Result<GpuProbe>;

    /// What each GPU kernel of a decode step and of a chunk of a prompt takes.
    ///
    /// # Errors
    /// If the driver reports one.
    fn kernel_times(&mut self) -> Result<KernelTimes>;
}
