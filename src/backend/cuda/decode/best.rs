//! The best logits of each token of a step: found on the GPU, so that a few KB come back instead of all
//! of them.

use super::super::abi::{Best, MAX_BATCH, MAX_CANDIDATES};
use super::super::arena::Arena;
use super::super::device::{Device, Pinned, Stream, args};
use super::super::geometry;
use super::{Decode, Model};
use crate::backend::cpu::offload::Offload;
use crate::backend::{BestLogits, ModelShape, NextLogits, Result};

/// Every token as good as this one, counted from the best, is brought back; more are rarely asked for.
pub const MAX_WANTED: usize = 64;

/// Addresses are the device's.
pub struct BestBuffers {
    vocab_size: usize,
    maxima: u64,
    counter: u64,
    best: u64,
    host: Pinned<Best>,
}

impl BestBuffers {
    /// Buffers for a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// If memory is short on either side.
    pub fn new(
        device: &Device,
        arena: &mut Arena,
        vocab_size: usize,
        stream: &Stream,
    ) -> Result<Self> {
        let chunks = vocab_size.div_ceil(geometry::sample_chunk(vocab_size));
        Ok(BestBuffers {
            vocab_size,
            maxima: arena.alloc(4 * MAX_BATCH * chunks, stream)?,
            counter: arena.alloc(4 * MAX_BATCH, stream)?,
            best: arena.alloc(MAX_BATCH * size_of::<Best>(), stream)?,
            host: device.alloc_host(MAX_BATCH)?,
        })
    }

    /// Finds the best of each row of `logits`, `[tokens, vocab_size]`, and brings them to the host.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn record(&self, logits: u64, tokens: usize, stream: &Stream) -> Result<()> {
        let vocab_size = self.vocab_size;
        // SAFETY: arguments are those of the kernel; buffers have the sizes it asks for and live as
        // long as this struct.
        unsafe {
            stream.launch(
                "sample_best",
                geometry::sample_best(vocab_size).for_tokens(tokens),
                args![
                    logits,
                    vocab_size as i32,
                    geometry::sample_chunk(vocab_size) as i32,
                    MAX_WANTED as i32,
                    self.maxima,
                    self.counter,
                    self.best
                ],
                true,
            )?;
            let to = self.host.pointer(0).cast::<u8>();
            stream.copy_to_host(to, self.best, tokens * size_of::<Best>())
        }
    }
}

impl Decode {
    /// The best logits of a token of the last step, if it was to find them; all of them where more than
    /// the best one is `wanted` and too many are equally good.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn best(
        &mut self,
        model: &Model,
        offload: &mut Offload,
        token: usize,
        wanted: usize,
    ) -> Result<NextLogits> {
        let &Best {
            count, id, logit, ..
        } = &self.best.host.as_slice()[token];
        if wanted > 1 && count as usize > MAX_CANDIDATES {
            self.fetch_logits(model, offload, token + 1)?;
            return Ok(NextLogits::All(self.logits_of(token).to_vec()));
        }
        let mut candidates = vec![(id as u32, logit)];
        if wanted > 1 {
            let found = &self.best.host.as_slice()[token];
            let both = found.ids.iter().zip(&found.logits).take(count as usize);
            candidates = both.map(|(&id, &logit)| (id as u32, logit)).collect();
            candidates.sort_unstable_by_key(|&(id, _)| id);
        }
        Ok(NextLogits::Best(BestLogits {
            vocab_size: self.best.vocab_size,
            id: id as u32,
            logit,
            candidates,
        }))
    }
}

/// Whether the GPU looks for so many of a model's best logits.
pub fn finds(shape: &ModelShape, wanted: usize) -> bool {
    (1..=MAX_WANTED.min(shape.vocab_size)).contains(&wanted)
}
