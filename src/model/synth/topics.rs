//! Which tokens are alike, as the built-in model was trained to have it.

use std::ops::Range;

use super::random::Stream;
use super::{SynthError, TOKENIZER_SIZE};
use crate::formats::Checkpoint;
use crate::model::source::builtin_file;

/// Width of the built-in model's embedding.
const TRAINED: usize = 256;

/// The trained embedding of the built-in model, turned into another space: tokens that text has
/// near each other, of one language or one subject, are near each other there too.
pub struct Topics {
    /// `[TOKENIZER_SIZE, TRAINED]`, each row of length 1, their mean over text 0
    embedding: Vec<f32>,
    /// `[TRAINED, width]`, random
    projection: Vec<f32>,
    width: usize,
}

impl Topics {
    /// # Errors
    /// If this build has no built-in model.
    pub fn new(seed: u64, width: usize) -> Result<Self, SynthError> {
        let file = builtin_file("model.safetensors").ok_or(SynthError::NoBuiltin)?;
        let trained = Checkpoint::from_bytes("built-in model", file.into())?;
        let shape = [TOKENIZER_SIZE, TRAINED];
        let mut embedding = trained.vector("model.embed_tokens.weight", &shape)?;
        // What all text has in common would draw it to the same experts. The second time, because
        // rows that are made equally long have another mean.
        for _ in 0..2 {
            subtract_mean(&mut embedding);
            for row in embedding.chunks_exact_mut(TRAINED) {
                let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                row.iter_mut().for_each(|v| *v /= length);
            }
        }
        let random = Stream::new(seed, "topics").normal(0);
        Ok(Topics {
            embedding,
            projection: random.take(TRAINED * width).collect(),
            width,
        })
    }

    /// Adds `share` times some columns of the token's topic, of variance 1, to `out`; false and
    /// nothing for a token without text.
    pub fn add(&self, token: usize, share: f32, columns: Range<usize>, out: &mut [f32]) -> bool {
        let Some(row) = self.embedding.chunks_exact(TRAINED).nth(token) else {
            return false;
        };
        for (v, column) in row.iter().zip(self.projection.chunks_exact(self.width)) {
            let v = share * v;
            (out.iter_mut().zip(&column[columns.clone()])).for_each(|(to, p)| *to += v * p);
        }
        true
    }
}

/// Subtracts the mean of the rows, each as often as text has its token.
fn subtract_mean(rows: &mut [f32]) {
    let mut mean = [0.0; TRAINED];
    let mut total = 0.0;
    for (token, row) in rows.chunks_exact(TRAINED).enumerate() {
        let share = log_frequency(token).exp();
        total += share;
        mean.iter_mut().zip(row).for_each(|(m, v)| *m += share * v);
    }
    for row in rows.chunks_exact_mut(TRAINED) {
        row.iter_mut().zip(mean).for_each(|(v, m)| *v -= m / total);
    }
}

/// Zipf's law over the tokens of the tokenizer, which lists them by frequency after the single
/// bytes; others, which have no text, are never generated.
pub fn log_frequency(token: usize) -> f32 {
    const FIRST_WORD: usize = 259;
    match token {
        TOKENIZER_SIZE.. => -40.0,
        FIRST_WORD.. => -((10 + token - FIRST_WORD) as f32 / 10.0).ln(),
        _ => log_frequency(1000),
    }
}
