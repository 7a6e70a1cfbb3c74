//! The seam between the model and the hardware: the block, not the tensor op.
//!
//! A model is embed, then per layer a token mixer and a mixture of experts, then the head. Inside
//! a block a backend fuses as it likes; between blocks it only promises the shapes below. Every
//! backend is held to [`reference`](mod@reference) by the same conformance tests.
//!
//! Shapes: `T` tokens of one chunk, `D` hidden_size, `E` num_experts, `k` num_experts_per_tok.

pub mod block;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod cuda;
pub mod executor;
pub mod kv;
pub mod reference;
mod residency;
pub mod rope;
pub mod shape;
pub mod tally;
mod times;
pub mod weights;

use std::ops::Range;

use thiserror::Error;

pub use block::BlockExecutor;
pub use executor::{
    DeviceMemory, Diagnostics, Executor, ExpertSlots, LogitRows, OnRouting, Piece, RunEvents,
    SequenceBytes, SequenceId, SharedPage, Snapshot, Wanted,
};
pub use kv::KvDtype;
pub use residency::Residency;
pub use rope::{Rope, RopeScaling, Yarn};
pub use shape::{AttentionShape, DeltaNetShape, MixerKind, ModelShape, MoeShape};
pub use times::{DecodeTimes, KernelTimes, LayerPicks, OnAdmission, SlotChange, StepTimes, Tuning};
pub use weights::{ExpertWeights, LayerWeights, MixerWeights, ModelWeights, MoeWeights};

/// Why a block could not be computed. None of these is the user's input: that was checked before.
#[derive(Debug, Error)]
pub enum BackendError {
    #[error("reference backend: {0}")]
    Candle(#[from] candle_core::Error),
    #[error("context is full: {needed} tokens needed, room for {capacity}; raise --ctx")]
    ContextFull { needed: usize, capacity: usize },
    #[error(
        "the model without experts takes {needed} bytes on the GPU, the budget is {budget}; raise \
         --vram, or lower --ctx"
    )]
    DoesNotFit { needed: u64, budget: u64 },
    #[error("the {backend} backend cannot compute this model: {why}; use --backend cpu")]
    Unsupported { backend: &'static str, why: String },
    #[error("all {capacity} sequences that there is room for are in use; drop or park one")]
    NoRoom { capacity: usize },
    #[error("sequence {0} is not there: it was dropped, or never made")]
    UnknownSequence(SequenceId),
    #[error("sequence {0} was lost with an earlier error; drop it and start a new one")]
    SequenceLost(SequenceId),
    #[error(
        "sequence {sequence} has seen {position} tokens and cannot be cut to {tokens}: states of \
         delta nets only go forward; restore a snapshot"
    )]
    CannotTruncate {
        sequence: SequenceId,
        position: usize,
        tokens: usize,
    },
    #[error("{0}")]
    Other(String),
}

pub type Result<T> = std::result::Result<T, BackendError>;

/// A backend as reports name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendFacts {
    /// `reference`, `cpu` or `cuda:N`
    pub name: String,
    /// Kernels picked at run time, such as `avx512, int16`
    pub kernels: Option<String>,
    /// CPU threads that compute
    pub threads: usize,
}

/// What loading took, all workers at once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadRates {
    /// Stored bytes
    pub bytes: u64,
    pub seconds: f64,
    /// Of `seconds`, waiting for the file
    pub read_seconds: f64,
    /// Of `seconds`, rewriting into the kernels' layout
    pub pack_seconds: f64,
}

/// What the next token can be chosen from.
#[derive(Clone, Debug, PartialEq)]
pub enum NextLogits {
    /// `[rows, vocab_size]`, usually of one row
    All(Vec<f32>),
    Best(BestLogits),
}

/// The best logits of a token, where its backend found them; see [`NextLogits`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BestLogits {
    pub vocab_size: usize,
    /// The best token, the lowest id among equals; if a logit is NaN or +inf, the first such
    pub id: u32,
    /// Its logit; -inf if all are
    pub logit: f32,
    /// Ids and logits, by ascending id, of all that are at least as good as the n-th best, for any n
    /// up to what was asked for; some others may be among them
    pub candidates: Vec<(u32, f32)>,
}

/// What a process holds on the GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VramHeld {
    /// By the driver before anything was put there: the context
    pub context_bytes: u64,
    /// Keys, values and states of the sequence
    pub sequence_bytes: u64,
    pub slots_bytes: u64,
    /// All else by the driver's figure: dense weights, buffers of steps, what the driver added
    pub other_bytes: u64,
    /// Left free below a budget, in case the driver grows: not held
    pub margin_bytes: u64,
}

/// Tells from any thread what the process holds on the GPU now, by the driver's figure.
pub type VramMeter = Box<dyn Fn() -> Option<u64> + Send>;

impl BackendFacts {
    /// The number of the GPU that takes part, if one does.
    pub fn gpu(&self) -> Option<u32> {
        self.name.strip_prefix("cuda:")?.parse().ok()
    }
}

/// What the router chose for a chunk of tokens in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// k, the experts of each token.
    pub num_experts_per_tok: usize,
    /// `[T, k]` expert ids, best first; equal probabilities keep the lower id first.
    pub topk_ids: Vec<u16>,
    /// `[T, k]` weights, renormalised to sum 1 where the model says so.
    pub topk_weights: Vec<f32>,
}

impl Routing {
    /// The choice for some of the tokens.
    pub fn of_tokens(&self, tokens: Range<usize>) -> Self {
        let k = self.num_experts_per_tok;
        let picks = tokens.start * k..tokens.end * k;
        Routing {
            num_experts_per_tok: k,
            topk_ids: self.topk_ids[picks.clone()].to_vec(),
            topk_weights: self.topk_weights[picks].to_vec(),
        }
    }

    /// T, the number of tokens routed.
    pub fn tokens(&self) -> usize {
        self.topk_ids.len() / self.num_experts_per_tok.max(1)
    }
}

/// The blocks of a model on one kind of hardware, weights included.
///
/// One instance serves any number of sequences; what a sequence has seen is in its [`State`].
/// A sequence may be fed in chunks of any length: the split must not change the result.
///
/// [`State`]: Backend::State
pub trait Backend: Send {
    /// Activations of one chunk, `[T, D]`, wherever the backend keeps them.
    type Hidden;
    /// What one sequence carries on: conv and delta-rule states, keys and values.
    /// A clone is another sequence that has seen the same.
    type State: Clone + Send + Sync + 'static;

    /// What a report says of this backend.
    fn facts(&self) -> BackendFacts;

    /// Tokens that a prompt is best fed in at once. Large enough that weights are read for several
    /// tokens, small enough that Ctrl-C and progress bars answer soon.
    fn prefill_chunk(&self) -> usize;

    /// How fast loading was, where it is measured.
    fn load_rates(&self) -> Option<LoadRates>;

    /// Bytes of weights and state that decoding one token reads with `context` tokens seen: what
    /// its memory bandwidth bounds. `None` where nothing is laid out to be read once.
    fn decode_read_bytes(&self, context: usize) -> Option<u64>;

    fn shape(&self) -> &ModelShape;

    /// An empty sequence that can grow to `max_tokens`.
    fn new_state(&self, max_tokens: usize) -> Result<Self::State>;

    /// Takes back all tokens from `tokens` on; only asked of models without delta nets.
    fn truncate(&self, state: &mut Self::State, tokens: usize) -> Result<()>;

    /// Bytes of a state that nothing else holds, and those it may share with its clones.
    fn state_bytes(&self, state: &Self::State) -> (usize, Vec<SharedPage>);

    /// Bytes of all living states, what they share counted once.
    fn held_bytes(&self) -> usize;

    /// Token ids (each below vocab_size) to `[T, D]`.
    fn embed(&mut self, ids: &[u32]) -> Result<Self::Hidden>;

    /// Sequences whose tokens this backend computes together, reading weights once, with the same bits as
    /// each alone.
    fn most_together(&self) -> usize;

    /// Consecutive tokens of a sequence that this backend computes together with the same bits as one by
    /// one.
    fn most_consecutive(&self) -> usize;

    /// `hidden += mixer(rms_norm(hidden))`, advancing layer `layer` of each state by its tokens: T are dealt
    /// out to the states in order, the same number to each.
    fn mixer(
        &mut self,
        layer: usize,
        hidden: &mut Self::Hidden,
        states: &mut [&mut Self::State],
    ) -> Result<()>;

    /// Norm, router logits, softmax and top-k of the tokens in `hidden`, which stays as it is.
    fn router(&mut self, layer: usize, hidden: &Self::Hidden) -> Result<Routing>;

    /// `hidden += sum_k weight_k * expert_k(rms_norm(hidden)) + shared expert`.
    fn experts(&mut self, layer: usize, hidden: &mut Self::Hidden, routing: &Routing)
    -> Result<()>;

    /// Final norm and output head of the tokens `rows`: `[rows.len(), vocab_size]` logits.
    fn head(&mut self, hidden: &Self::Hidden, rows: Range<usize>) -> Result<Vec<f32>>;
}
