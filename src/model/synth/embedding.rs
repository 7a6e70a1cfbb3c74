//! The embedding: what a token is, and what it says of its text.

use super::random::Stream;
use super::regions::Regions;
use super::topics::{Topics, log_frequency};
use super::{SynthError, TOKENIZER_SIZE};

/// The first elements of every embedding. The head adds the log-frequency of tokens there, so that
/// generated text repeats tokens as text does, and the delta net that remembers the text has keys
/// and gates that are the same for all tokens. Two, as a byte holds two codes.
pub const CONSTANTS: usize = 2;
pub const CONSTANT: f32 = std::f32::consts::SQRT_2;

/// How much of the variance comes from the trained embedding, the rest from the token alone: tokens
/// that are alike get some of their experts in common, but each has its own.
const TOKEN_TOPIC: f32 = 0.5;
const SUBJECT_TOPIC: f32 = 0.3;

/// Mean square of a token's subject over text: see [`weight_of_subject`].
pub const SUBJECT_VARIANCE: f64 = 0.15;

/// The embeddings of all tokens.
pub struct Embedding {
    own: Stream,
    topics: Topics,
    regions: Regions,
}

impl Embedding {
    /// # Errors
    /// If this build has no built-in model.
    pub fn new(seed: u64, regions: Regions) -> Result<Self, SynthError> {
        Ok(Embedding {
            own: Stream::new(seed, "embedding"),
            topics: Topics::new(seed, 2 * regions.len())?,
            regions,
        })
    }

    /// The embedding of a token, `[hidden_size]`.
    pub fn row(&self, token: usize, out: &mut [f32]) {
        out.fill(0.0);
        self.add_token(token, 1.0, out);
        let subject = &mut out[self.regions.subject()];
        let weight = weight_of_subject(token);
        self.add(token, 1, SUBJECT_TOPIC, weight, subject);
        out[..CONSTANTS].fill(CONSTANT);
    }

    /// Adds `share` times what the token is to a row of `[hidden_size]`.
    pub fn add_token(&self, token: usize, share: f32, out: &mut [f32]) {
        let to = &mut out[self.regions.token()];
        self.add(token, 0, TOKEN_TOPIC, share, to);
    }

    fn add(&self, token: usize, part: usize, topic: f32, share: f32, out: &mut [f32]) {
        let columns = part * out.len()..(part + 1) * out.len();
        let has_topic = (self.topics).add(token, share * topic.sqrt(), columns, out);
        let rest = if has_topic { 1.0 - topic } else { 1.0 };
        let share = share * rest.sqrt();
        let own = self.own.normal(((2 * token + part) * out.len()) as u64);
        out.iter_mut().zip(own).for_each(|(to, v)| *to += share * v);
    }
}

/// The rarer a token, the more it says of the subject; 1 for the rarest.
fn weight_of_subject(token: usize) -> f32 {
    let rarest = log_frequency(TOKENIZER_SIZE - 1);
    ((rarest - log_frequency(token)) / 2.0).exp().min(1.0)
}
