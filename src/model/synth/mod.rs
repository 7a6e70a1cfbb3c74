//! Models with random weights: full-size shapes to measure on, without a download.
//!
//! A [`Spec`] gives the same bytes for any number of threads, whether they go to a file or straight
//! to memory. What such a model says means nothing, and everything that
//! is reported of it says that it is synthetic.

mod codes;
mod embedding;
mod memory;
mod random;
mod regions;
mod spec;
mod topics;
mod weights;

pub use spec::{DEFAULT_LOCALITY, FIELDS, PREFIX, Spec, SpecError};
pub use weights::{Part, Weight};

use std::sync::Arc;

use thiserror::Error;

use super::config::ConfigError;
use crate::formats::nf4::BLOCKSIZE;
use crate::formats::writer::{self, Planned};
use crate::formats::{Checkpoint, FormatError};

/// Tokens of the built-in tokenizer, which synthetic models use. The vocabulary may be larger: the
/// ids beyond have no text, and no text has them.
pub const TOKENIZER_SIZE: usize = 8192;

/// Layers of a [`Spec::probe`]: routing in the others is made by the same rule.
const PROBE_LAYERS: usize = 4;

impl Spec {
    /// Every weight of the model, in the order of its layers.
    ///
    /// # Errors
    /// [`SynthError::NoBuiltin`].
    pub fn weights(&self) -> Result<Vec<Weight>, SynthError> {
        let config = self.config()?;
        let depth = self.depth.unwrap_or(config.shape.num_layers());
        let remembers = memory::remembering_layer(&config.shape);
        weights::weights(&config, depth, self.seed, self.locality, remembers)
    }

    /// The model in memory, whose tensors are made when they are read: planning reads only the headers,
    /// and a loader that releases what it packed never holds the whole beside it.
    ///
    /// # Errors
    /// If the system has no room for it, or this build no built-in model.
    pub fn checkpoint(&self) -> Result<Checkpoint, SynthError> {
        let mut parts: Vec<Part> = self.weights()?.into_iter().flat_map(|w| w.parts).collect();
        // Wide types come first: all data stays aligned. Small constants lie together and leave whole
        // pages to the rest.
        parts.sort_by_key(|part| {
            let width = part.tensor.dtype.size_bytes();
            (std::cmp::Reverse(width), !part.is_constant())
        });
        let contents = Arc::new(parts);
        let planned: Vec<&Planned> = contents.iter().map(|part| &part.tensor).collect();
        let makers = Makers::new().map_err(SynthError::Memory)?;
        let parts = Arc::clone(&contents);
        let bytes = writer::in_memory(&planned, move |i, out| makers.fill(&parts[i], out))
            .map_err(SynthError::Memory)?;
        Ok(Checkpoint::from_bytes(&self.to_string(), bytes)?)
    }

    /// A small model whose router picks what the first layers of this one pick: same embeddings
    /// and routers, but few layers, narrow experts and the tokenizer's vocabulary.
    ///
    /// # Errors
    /// A spec whose config.json would be wrong.
    pub fn probe(&self) -> Result<Spec, SpecError> {
        let config = self.config()?;
        let layers = config.shape.num_layers();
        let mut probe = self.clone();
        probe.depth = Some(layers);
        probe.set("num_hidden_layers", PROBE_LAYERS.min(layers))?;
        probe.set("vocab_size", TOKENIZER_SIZE)?;
        probe.set("moe_intermediate_size", BLOCKSIZE)?;
        Ok(probe)
    }
}

/// Threads of their own that make tensors: whoever waits for one must not be handed other work
/// meanwhile, which may wait for the same tensor.
struct Makers(rayon::ThreadPool);

impl Makers {
    fn new() -> std::io::Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().build();
        pool.map(Makers).map_err(std::io::Error::other)
    }

    fn fill(&self, part: &Part, out: &mut [u8]) {
        if part.is_constant() {
            part.fill(out);
        } else if rayon::current_thread_index().is_none() {
            self.0.install(|| part.fill(out));
        } else {
            // A worker of another pool would go on with that pool's work while it waits.
            std::thread::scope(|scope| {
                scope.spawn(|| self.0.install(|| part.fill(out)));
            });
        }
    }
}

/// A synthetic model that cannot be made.
#[derive(Debug, Error)]
pub enum SynthError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "synthetic model: this build has no built-in model (feature `tiny-moe` is off), whose \
         tokenizer and embedding it needs"
    )]
    NoBuiltin,
    #[error("synthetic model: no memory for it: {0}; take fewer layers or experts")]
    Memory(std::io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
}
