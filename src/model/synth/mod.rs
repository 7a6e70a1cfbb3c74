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
        weights::weights(&config, depth, self.seed, self.locality)
    }

    /// The model in memory, made by all threads of the current pool.
    ///
    /// - `constants_only`: leaves the random weights 0; they are most of the model, and planning
    ///   reads only the headers
    ///
    /// # Errors
    /// If the system has no room for it, or this build no built-in model.
    pub fn checkpoint(&self, constants_only: bool) -> Result<Checkpoint, SynthError> {
        let mut parts: Vec<Part> = self.weights()?.into_iter().flat_map(|w| w.parts).collect();
        // Constants lie together, so that without the rest few pages are touched. Wide types come
        // first: all data stays aligned.
        parts.sort_by_key(|part| {
            let width = part.tensor.dtype.size_bytes();
            (std::cmp::Reverse(width), !part.is_constant())
        });
        let planned: Vec<&Planned> = parts.iter().map(|part| &part.tensor).collect();
        let bytes = writer::in_memory(&planned, |i, out| {
            if parts[i].is_constant() || !constants_only {
                parts[i].fill(out);
            }
        })
        .map_err(SynthError::Memory)?;
        Ok(Checkpoint::from_bytes(&self.to_string(), bytes)?)
    }

    /// A small model whose router picks what the first layers of this one pick: same embeddings
    /// and routers, but few layers, narrow experts and the tokenizer's vocabulary.
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
