//! A few tokens of one sequence as one step: short pieces of prompts, and tokens that may be taken back.

use std::ops::Range;

use super::Cuda;
use super::abi::MAX_BATCH;
use super::decode::{Tokens, Wanted};
use super::state::TokenAt;
use crate::backend::{BackendError, Result, Routing, SequenceId};

/// Tokens that were fed, but do not count until they are kept.
#[derive(Clone, Copy)]
pub struct Tentative {
    sequence: SequenceId,
    tokens: usize,
}

impl Cuda {
    /// Feeds tokens to the active sequence, which has room for them: a few in each step. The logits of
    /// `rows`.
    pub(super) fn step_all(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        let mut logits = Vec::with_capacity(rows.len() * self.model.shape.vocab_size);
        let mut first = 0;
        for ids in ids.chunks(MAX_BATCH) {
            let within = |row: usize| row.clamp(first, first + ids.len()) - first;
            let rows = within(rows.start)..within(rows.end);
            let few = ids.len() > 1;
            logits.extend(self.step_few(ids, rows, few, on_routing)?);
            if few {
                self.decode
                    .keep(&self.model, &self.states.layout, ids.len())?;
            }
            self.states.active_mut().position += ids.len();
            first += ids.len();
        }
        Ok(logits)
    }

    /// One step of up to [`MAX_BATCH`] tokens of the active sequence, whose position stays as it is, and
    /// if they are a `few`, its states too. The logits of `rows`.
    fn step_few(
        &mut self,
        ids: &[u32],
        rows: Range<usize>,
        few: bool,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        self.give_slots_back()?;
        self.settle_slots()?;
        let first = TokenAt::next_of(self.states.active());
        let at: Vec<TokenAt> = (0..ids.len())
            .map(|i| TokenAt {
                position: first.position + i,
                ..first
            })
            .collect();
        (self.decode).point_at(&vec![first.state; ids.len()], &self.model.stream)?;
        let wanted = match rows.is_empty() {
            true => Wanted::Nothing,
            false => Wanted::Logits,
        };
        let tokens = Tokens {
            at: &at,
            few,
            head_from: if rows.is_empty() { 0 } else { rows.start },
            wanted,
        };
        self.step(ids, tokens, &mut |token, layer, routing| {
            on_routing(layer, first.position + token, routing);
        })?;
        let vocab_size = self.model.shape.vocab_size;
        let mut logits = Vec::with_capacity(rows.len() * vocab_size);
        (0..rows.len()).for_each(|row| logits.extend_from_slice(self.decode.logits_of(row)));
        Ok(logits)
    }

    /// Feeds tokens to the active sequence that count only once they are [kept](Cuda::keep_tentative).
    pub(super) fn run_tentative(
        &mut self,
        sequence: SequenceId,
        ids: &[u32],
        rows: Range<usize>,
        on_routing: &mut dyn FnMut(usize, usize, &Routing),
    ) -> Result<Vec<f32>> {
        assert!(ids.len() <= MAX_BATCH, "pieces were checked");
        let logits = match ids.is_empty() {
            true => Vec::new(),
            false => self.step_few(ids, rows, true, on_routing)?,
        };
        self.tentative = Some(Tentative {
            sequence,
            tokens: ids.len(),
        });
        Ok(logits)
    }

    /// Has the first `tokens` of the last piece, which could be taken back, count; the others are.
    pub(super) fn keep_tentative(&mut self, of: SequenceId, tokens: usize) -> Result<()> {
        let position = self.states.position(of)?;
        let there = self.tentative.take().filter(|t| t.sequence == of);
        let there = there.map_or(0, |tentative| tentative.tokens);
        if tokens > there {
            return Err(BackendError::Other(format!(
                "{tokens} tokens of sequence {of} were to be kept, of {there} that may be taken back"
            )));
        }
        self.states.activate(of)?;
        self.states.set_lost(of, true);
        self.decode.keep(&self.model, &self.states.layout, tokens)?;
        self.states.active_mut().position = position + tokens;
        self.states.set_lost(of, false);
        Ok(())
    }
}
