//! The token loop: prefill, sample, stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::sampler::{Sampler, SamplingParams, TokenLogprob, top_logprobs};
use super::stream::TextStream;
use super::{Engine, EngineError, Result};
use crate::backend::{LogitRows, NextLogits, OnRouting};

/// How to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub max_new_tokens: usize,
    pub sampling: SamplingParams,
    /// Text ends before any of these
    pub stop: Vec<String>,
    /// Go on past end-of-text tokens
    pub ignore_eos: bool,
    /// Best tokens to report per generated token; 0 for none
    pub logprobs: usize,
    /// Ids that take the place of the first sampled ones: logits are computed and sampled as ever, and
    /// what was sampled is dropped
    pub forced: Vec<u32>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token or a stop string
    Stop,
    /// `max_new_tokens`, or the context is full
    Length,
    Interrupted,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Interrupted => "interrupted",
        }
    }
}

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Ends with the end-of-text token, if one ended it
    pub token_ids: Vec<u32>,
    pub text: String,
    pub finish_reason: FinishReason,
    /// Per generated token the best ones, by raw logit
    pub logprobs: Vec<Vec<TokenLogprob>>,
    pub timings: Timings,
}

/// Wall-clock times of one generation.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    pub prompt_tokens: usize,
    /// First token of the prompt in, logits of the last out
    pub prefill: Duration,
    /// From the start to the first generated token
    pub ttft: Duration,
    /// From each generated token to the next
    pub inter_token: Vec<Duration>,
}

impl Timings {
    pub fn prefill_tok_s(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Tokens per second after the first.
    pub fn decode_tok_s(&self) -> f64 {
        rate(self.inter_token.len(), self.inter_token.iter().sum())
    }
}

fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        count as f64 / time.as_secs_f64()
    }
}

/// Receives what happens while it happens.
pub struct Observer<'a> {
    /// New text, never half a character
    pub on_text: &'a mut dyn FnMut(&str),
    /// Prompt tokens done so far
    pub on_prefill: &'a mut dyn FnMut(usize),
    pub on_routing: &'a mut OnRouting<'a>,
}

impl Engine {
    /// Continues the sequence: feeds `prompt_ids`, then samples up to `max_new_tokens`, the first of
    /// which `forced` replaces.
    ///
    /// The sequence may already hold tokens (an earlier turn); the prompt goes after them. All
    /// generated tokens but the last have then been fed. `interrupt` ends it between tokens and
    /// between prefill chunks with what there is.
    ///
    /// # Errors
    /// An empty prompt, an id outside the vocabulary, or one that does not fit the context.
    pub fn generate(
        &mut self,
        prompt_ids: &[u32],
        options: &GenerateOptions,
        interrupt: &AtomicBool,
        observer: &mut Observer<'_>,
    ) -> Result<Generation> {
        let interrupted = || interrupt.load(Ordering::Relaxed);
        let eos = self.text().generation_config.eos_token_ids.clone();
        let mut stream = TextStream::new(self.tokenizer(), true, &options.stop);
        let mut sampler = Sampler::new(options.sampling.clone())?;
        sampler.observe_prompt(self.tokens());
        sampler.observe_prompt(prompt_ids);
        let mut generation = Generation {
            token_ids: Vec::new(),
            text: String::new(),
            finish_reason: FinishReason::Length,
            logprobs: Vec::new(),
            timings: Timings {
                prompt_tokens: prompt_ids.len(),
                ..Timings::default()
            },
        };

        let start = Instant::now();
        let on_prefill = &mut *observer.on_prefill;
        let logits = self.prefill(prompt_ids, observer.on_routing, &mut |done| {
            on_prefill(done);
            !interrupted()
        })?;
        generation.timings.prefill = start.elapsed();
        let Some(logits) = logits else {
            generation.finish_reason = FinishReason::Interrupted;
            return Ok(generation);
        };
        let mut next = NextLogits::All(logits);
        let wanted = sampler.wanted().filter(|_| options.logprobs == 0);
        (observer.on_prefill)(prompt_ids.len());

        let mut emit = |text: String, generation: &mut Generation| {
            if !text.is_empty() {
                (observer.on_text)(&text);
                generation.text.push_str(&text);
            }
        };
        let mut last_token = Instant::now();
        while generation.token_ids.len() < options.max_new_tokens {
            if interrupted() {
                generation.finish_reason = FinishReason::Interrupted;
                break;
            }
            let sampled = match &next {
                NextLogits::All(logits) => sampler.sample(logits)?,
                NextLogits::Best(best) => sampler.sample_best(best)?,
            };
            let forced = options.forced.get(generation.token_ids.len());
            let id = forced.copied().unwrap_or(sampled);
            sampler.remember(id);
            let now = Instant::now();
            match generation.token_ids.is_empty() {
                true => generation.timings.ttft = now - start,
                false => generation.timings.inter_token.push(now - last_token),
            }
            last_token = now;
            if let (NextLogits::All(logits), true) = (&next, options.logprobs > 0) {
                let best = top_logprobs(logits, options.logprobs);
                generation.logprobs.push(best);
            }
            generation.token_ids.push(id);
            if eos.contains(&id) && !options.ignore_eos {
                generation.finish_reason = FinishReason::Stop;
                break;
            }
            emit(stream.push(id), &mut generation);
            if stream.stopped_by().is_some() {
                generation.finish_reason = FinishReason::Stop;
                break;
            }
            if generation.token_ids.len() == options.max_new_tokens {
                break;
            }
            let fed = match wanted {
                Some(wanted) => self.forward_best(id, wanted, observer.on_routing),
                None => self
                    .forward(&[id], LogitRows::Last, observer.on_routing)
                    .map(NextLogits::All),
            };
            next = match fed {
                Err(EngineError::Backend(crate::backend::BackendError::ContextFull { .. })) => {
                    break;
                }
                other => other?,
            };
        }
        emit(stream.finish(), &mut generation);
        Ok(generation)
    }
}
