//! Logits to one token id, by the rules of transformers, in its order.
//!
//! repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p, softmax,
//! one draw from a generator that gives the same numbers on every machine.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thiserror::Error;

use crate::backend::BestLogits;
use crate::model::{GenerationConfig, Suppressed};

/// Settings out of range, or logits no token can be drawn from.
#[derive(Debug, Error, PartialEq)]
pub enum SampleError {
    #[error("{name} {found}, expected {expected}")]
    Parameter {
        name: &'static str,
        found: f32,
        expected: &'static str,
    },
    #[error("logit of token {id} is {found}, expected a number; the weights may be damaged")]
    Logit { id: usize, found: f32 },
    #[error("no token to choose from: {vocab_size} logits, none above -inf")]
    NoCandidate { vocab_size: usize },
}

/// How to choose a token. The default is greedy, with everything else off.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the best token, the lowest id on ties
    pub temperature: f32,
    /// Keep the k best tokens and those tied with the k-th; 0 is off
    pub top_k: usize,
    /// Keep the best tokens until their probabilities sum to this; 1 is off
    pub top_p: f32,
    /// Keep tokens at least this probable relative to the best; 0 is off
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen, prompt included; 1 is off
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens generated before; 0 is off
    pub presence_penalty: f32,
    /// Subtracted per earlier generation of the token; 0 is off
    pub frequency_penalty: f32,
    pub seed: u64,
}

impl SamplingParams {
    /// Whether scores differ from logits before the temperature.
    fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// The id of the best score, the lowest on ties.
///
/// By chunks, so that the compiler can compare many at once: a vocabulary of 152k takes 20 us, not
/// 200.
fn best_of(scores: &[f32]) -> Result<u32, SampleError> {
    const CHUNK: usize = 1024;
    let mut best = None;
    let mut best_score = f32::NEG_INFINITY;
    for (i, chunk) in scores.chunks(CHUNK).enumerate() {
        let (mut max, mut all_below_infinity) = (f32::NEG_INFINITY, true);
        for &score in chunk {
            max = if score > max { score } else { max };
            // False for NaN, too.
            all_below_infinity &= score < f32::INFINITY;
        }
        if !all_below_infinity {
            let wrong = chunk.iter().position(|&s| s.is_nan() || s == f32::INFINITY);
            let at = wrong.expect("one of them is");
            return Err(SampleError::Logit {
                id: i * CHUNK + at,
                found: chunk[at],
            });
        }
        if max > best_score {
            best_score = max;
            let at = chunk
                .iter()
                .position(|&s| s == max)
                .expect("one of them is the largest");
            best = Some((i * CHUNK + at) as u32);
        }
    }
    best.ok_or(SampleError::NoCandidate {
        vocab_size: scores.len(),
    })
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

impl From<&GenerationConfig> for SamplingParams {
    /// The model's own defaults; what it leaves out is off.
    fn from(config: &GenerationConfig) -> Self {
        let off = SamplingParams::default();
        SamplingParams {
            temperature: if config.do_sample {
                config.temperature.unwrap_or(1.0)
            } else {
                0.0
            },
            top_k: config.top_k.unwrap_or(off.top_k),
            top_p: config.top_p.unwrap_or(off.top_p),
            min_p: config.min_p.unwrap_or(off.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(off.repetition_penalty),
            ..off
        }
    }
}

impl SamplingParams {
    /// # Errors
    /// [`SampleError::Parameter`] for the first setting out of its range.
    pub fn validate(&self) -> Result<(), SampleError> {
        let at_least_0 = 0.0..=f32::MAX;
        let fraction = 0.0..=1.0;
        let positive = f32::MIN_POSITIVE..=f32::MAX;
        let finite = f32::MIN..=f32::MAX;
        for (name, found, range, expected) in [
            ("temperature", self.temperature, &at_least_0, "0 or more"),
            ("top_p", self.top_p, &fraction, "0 to 1"),
            ("min_p", self.min_p, &fraction, "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                &positive,
                "more than 0",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                &finite,
                "a number",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                &finite,
                "a number",
            ),
        ] {
            if !range.contains(&found) {
                return Err(SampleError::Parameter {
                    name,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// Ids in the prompt or generated
    seen: HashSet<u32>,
    /// How often each id was generated
    generated: HashMap<u32, u32>,
    suppressed: Suppressed,
    /// The last ids of prompt and text, as many as the longest suppressed sequence has
    recent: Vec<u32>,
    /// `[vocab_size]` logits after penalties; kept to spare an allocation per token
    scores: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    /// Probability relative to the best token's
    weight: f64,
}

impl Sampler {
    /// # Errors
    /// [`SampleError::Parameter`] if a setting is out of its range.
    pub fn new(params: SamplingParams) -> Result<Self, SampleError> {
        params.validate()?;
        Ok(Sampler {
            rng: ChaCha8Rng::seed_from_u64(params.seed),
            params,
            seen: HashSet::new(),
            generated: HashMap::new(),
            suppressed: Suppressed::default(),
            recent: Vec::new(),
            scores: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// Rules out tokens that the model's generation_config.json suppresses; said before the prompt
    /// is observed.
    pub fn suppress(&mut self, suppressed: Suppressed) {
        self.suppressed = suppressed;
    }

    /// Tells repetition penalty and suppressed sequences about the prompt.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        self.seen.extend(ids);
        self.follow(ids);
    }

    fn follow(&mut self, ids: &[u32]) {
        self.recent.extend(ids);
        let kept = self.suppressed.longest_sequence();
        self.recent.drain(..self.recent.len().saturating_sub(kept));
    }

    /// Whether scores differ from logits before the temperature.
    fn changes_logits(&self) -> bool {
        self.params.penalizes() || !self.suppressed.is_empty()
    }

    /// Chooses the next token from `logits: [vocab_size]`; the penalties count it once it is
    /// [`remember`](Sampler::remember)ed.
    ///
    /// -inf rules a token out.
    ///
    /// # Errors
    /// If a logit is NaN or +inf, or every one is -inf.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let greedy = self.params.temperature == 0.0;
        let id = if greedy && !self.changes_logits() {
            best_of(logits)?
        } else {
            self.penalize(logits);
            best_of(&self.scores)?
        };
        Ok(match greedy {
            true => id,
            false => self.draw_from_scores(None, self.scores[id as usize]),
        })
    }

    /// How many of the best logits are enough for [`sample_best`](Sampler::sample_best); `None` if
    /// it takes all of them.
    pub fn wanted(&self) -> Option<usize> {
        match (self.params.temperature == 0.0, self.params.top_k) {
            _ if self.changes_logits() => None,
            (true, _) => Some(1),
            (false, 0) => None,
            (false, k) => Some(k),
        }
    }

    /// Chooses what [`sample`](Sampler::sample) would of all logits, from the best ones: at least as
    /// many as are [`wanted`](Sampler::wanted).
    ///
    /// # Errors
    /// As [`sample`](Sampler::sample).
    pub fn sample_best(&mut self, best: &BestLogits) -> Result<u32, SampleError> {
        assert!(self.wanted().is_some(), "all logits are needed");
        if best.logit.is_nan() || best.logit == f32::INFINITY {
            return Err(SampleError::Logit {
                id: best.id as usize,
                found: best.logit,
            });
        }
        if best.logit == f32::NEG_INFINITY {
            return Err(SampleError::NoCandidate {
                vocab_size: best.vocab_size,
            });
        }
        if self.params.temperature == 0.0 {
            return Ok(best.id);
        }
        let (ids, scores): (Vec<u32>, Vec<f32>) = best.candidates.iter().copied().unzip();
        self.scores = scores;
        Ok(self.draw_from_scores(Some(&ids), best.logit))
    }

    /// Tells the penalties what follows: the token that was chosen, or another one in its place.
    pub fn remember(&mut self, id: u32) {
        self.seen.insert(id);
        self.follow(&[id]);
        *self.generated.entry(id).or_default() += 1;
    }

    /// One draw from `scores`, which are those of `ids`, ascending, or of all ids.
    fn draw_from_scores(&mut self, ids: Option<&[u32]>, best_score: f32) -> u32 {
        self.keep_top_k(ids, best_score);
        if self.params.top_p < 1.0 {
            self.keep_top_p();
        }
        let min_p = f64::from(self.params.min_p);
        self.candidates.retain(|c| c.weight >= min_p);
        self.draw()
    }

    fn penalize(&mut self, logits: &[f32]) {
        let params = &self.params;
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        if params.repetition_penalty != 1.0 {
            for &id in &self.seen {
                if let Some(score) = self.scores.get_mut(id as usize) {
                    if *score < 0.0 {
                        *score *= params.repetition_penalty;
                    } else {
                        *score /= params.repetition_penalty;
                    }
                }
            }
        }
        for (&id, &count) in &self.generated {
            if let Some(score) = self.scores.get_mut(id as usize) {
                *score -= params.presence_penalty + count as f32 * params.frequency_penalty;
            }
        }
        for id in (self.suppressed).after(&self.recent, self.generated.is_empty()) {
            if let Some(score) = self.scores.get_mut(id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }

    /// Fills `candidates`, by ascending id, with the top-k tokens and their weights.
    fn keep_top_k(&mut self, ids: Option<&[u32]>, best_score: f32) {
        let threshold = match self.params.top_k {
            k if k == 0 || k >= self.scores.len() => f32::NEG_INFINITY,
            k => {
                let mut scores = self.scores.clone();
                *scores
                    .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a))
                    .1
            }
        };
        // Relative to the best, so that no temperature, however small, overflows.
        let temperature = f64::from(self.params.temperature);
        let weight = |score: f32| ((f64::from(score) - f64::from(best_score)) / temperature).exp();
        self.candidates.clear();
        self.candidates.extend(
            (0..)
                .zip(&self.scores)
                .filter(|&(_, &score)| score >= threshold)
                .map(|(at, &score)| Candidate {
                    id: ids.map_or(at as u32, |ids| ids[at]),
                    weight: weight(score),
                }),
        );
    }

    /// Keeps the best candidates until they hold top_p of the mass, at least one, by ascending id.
    ///
    /// transformers says it from below: it drops the worst whose cumulative probability is at most
    /// 1 - top_p. From above only the kept part needs sorting: it is found in growing steps,
    /// because sorting a vocabulary of 152k would cost more than all else here.
    fn keep_top_p(&mut self) {
        let candidates = &mut self.candidates;
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let enough = f64::from(self.params.top_p) * total;
        let mut mass = 0.0;
        let mut kept = 0;
        let mut step = 256;
        while kept < candidates.len() && (kept == 0 || mass < enough) {
            let rest = &mut candidates[kept..];
            let step_len = step.min(rest.len());
            if step_len < rest.len() {
                rest.select_nth_unstable_by(step_len, better_first);
            }
            rest[..step_len].sort_unstable_by(better_first);
            for candidate in &rest[..step_len] {
                if kept > 0 && mass >= enough {
                    break;
                }
                mass += candidate.weight;
                kept += 1;
            }
            step *= 4;
        }
        candidates.truncate(kept);
        candidates.sort_unstable_by_key(|c| c.id);
    }

    /// One draw by weight from `candidates`, walked by ascending id.
    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        let mut last = self.candidates[0].id;
        for candidate in self.candidates.iter().filter(|c| c.weight > 0.0) {
            last = candidate.id;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        // Rounding may leave `left` at zero after the last candidate.
        last
    }
}

fn better_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// One token as the model rates it, before penalties and temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logit: f32,
    /// Natural logarithm of the softmax probability
    pub logprob: f32,
}

/// The `k` best tokens of raw `logits: [vocab_size]`, best first, the lower id first on ties.
pub fn top_logprobs(logits: &[f32], k: usize) -> Vec<TokenLogprob> {
    let by_logit = |a: &u32, b: &u32| {
        let (left, right) = (logits[*a as usize], logits[*b as usize]);
        right.total_cmp(&left).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if k < ids.len() {
        ids.select_nth_unstable_by(k, by_logit);
        ids.truncate(k);
    }
    ids.sort_unstable_by(by_logit);
    let normalizer = log_sum_exp(logits);
    ids.into_iter()
        .map(|id| rate(logits, id, normalizer))
        .collect()
}

/// Raw logit and logprob of token `id`, which must be below the length of `logits`.
pub fn token_logprob(logits: &[f32], id: u32) -> TokenLogprob {
    rate(logits, id, log_sum_exp(logits))
}

fn rate(logits: &[f32], id: u32, normalizer: f64) -> TokenLogprob {
    let logit = logits[id as usize];
    TokenLogprob {
        id,
        logit,
        logprob: (f64::from(logit) - normalizer) as f32,
    }
}

/// `ln(sum(exp(logits)))`, without overflow; a logprob is a logit less this.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln()
}
