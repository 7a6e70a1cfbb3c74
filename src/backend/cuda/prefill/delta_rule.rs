//! The recurrence of a delta net over a chunk of the prompt: in chunks of 64 tokens where there are enough.

use super::super::device::args;
use super::super::{geometry, variants};
use super::chunk::Chunk;
use crate::backend::Result;

/// Fewer tokens are faster one after the other.
const FEWEST_TOKENS: usize = 48;

/// Tokens whose scratch memory stays in the GPU's L2 between the two kernels.
const RANGE_TOKENS: usize = 2048;

impl Chunk<'_> {
    /// `out = ` the outputs for q, k, v, decay and beta of the chunk's tokens; `memory`: the state before and
    /// after it. Scratch memory is that of the block's later activations.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn delta_rule(&self, inputs: [u64; 5], memory: u64, out: u64) -> Result<()> {
        let prefill = &self.cuda.prefill;
        let s = &self.cuda.model.shape.delta_net;
        let [q, k, v, decay, beta] = inputs;
        let heads = (s.num_key_heads as i32, s.num_value_heads as i32);
        let (dk, dv) = (s.key_head_dim as i32, s.value_head_dim as i32);
        let places = &self.places;
        let scratch = self.at(places.gated);
        let scratch_bytes = places.wide_scale - places.gated;
        let chunk_bytes = geometry::delta_scratch_bytes(s);
        let range = (scratch_bytes / chunk_bytes * geometry::DELTA_CHUNK).min(RANGE_TOKENS);
        let fits = variants::prefill_delta_chunks(s, range, &prefill.facts).is_some();
        if !fits || range == 0 || self.tokens < FEWEST_TOKENS {
            let tokens = self.tokens as i32;
            return self.launch(
                "prefill_delta_rule",
                geometry::prefill_delta_rule(s),
                args![
                    q, k, v, decay, beta, memory, out, tokens, heads.0, heads.1, dk, dv
                ],
            );
        }
        for first in (0..self.tokens).step_by(range) {
            let tokens = range.min(self.tokens - first);
            let [prepare, chunks] = variants::prefill_delta_chunks(s, tokens, &prefill.facts)
                .expect("shared memory does not depend on the number of tokens");
            let (first, tokens) = (first as i32, tokens as i32);
            self.launch(
                prepare.name,
                prepare.geometry,
                args![
                    q, k, decay, beta, scratch, first, tokens, heads.0, heads.1, dk
                ],
            )?;
            self.launch(
                chunks.name,
                chunks.geometry,
                args![
                    v, scratch, memory, out, first, tokens, heads.0, heads.1, dk, dv
                ],
            )?;
        }
        Ok(())
    }
}
