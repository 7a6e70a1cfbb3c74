//! From logits to a token of one request.

use std::collections::BTreeMap;

use super::{Job, Logprob};
use crate::backend::NextLogits;
use crate::engine::Engine;
use crate::engine::sampler::{Sampler, token_logprob, top_logprobs};
use crate::engine::stream::TextStream;

/// The token loop's state of one request.
pub(super) struct Decode {
    sampler: Sampler,
    pub stream: TextStream,
    /// How many best logits are enough; all are needed if `None`
    pub wanted: Option<usize>,
    eos: Vec<u32>,
    pub generated: usize,
    bias: BTreeMap<u32, f32>,
}

impl Decode {
    /// What a request's tokens are chosen and written with.
    ///
    /// # Errors
    /// What is wrong with the model's generation defaults or the request's sampling.
    pub fn new(engine: &Engine, job: &Job) -> Result<Self, String> {
        let request = &job.request;
        let config = engine.text().generation_config();
        let config = config.map_err(|e| e.to_string())?;
        let mut sampler = Sampler::new(request.sampling.clone()).map_err(|e| e.to_string())?;
        sampler.suppress(config.suppressed.clone());
        sampler.observe_prompt(&request.prompt);
        let changes_logits = request.logprobs.is_some()
            || request.constraint.is_some()
            || !request.logit_bias.is_empty();
        let ignores_eos = request.ignore_eos && request.constraint.is_none();
        Ok(Decode {
            wanted: sampler.wanted().filter(|_| !changes_logits),
            sampler,
            stream: TextStream::new(engine.tokenizer(), true, &request.stop),
            eos: match ignores_eos {
                true => Vec::new(),
                false => config.eos_token_ids.clone(),
            },
            generated: 0,
            bias: request.logit_bias.iter().copied().collect(),
        })
    }

    pub fn ends_text(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// The next token, and its log probability where the request wants it.
    ///
    /// # Errors
    /// What is wrong with the request's grammar.
    pub fn choose(
        &mut self,
        job: &mut Job,
        next: &mut NextLogits,
    ) -> Result<(u32, Option<Logprob>), String> {
        let request = &mut job.request;
        let (id, logprob) = match next {
            NextLogits::Best(best) => (self.sampler.sample_best(best), None),
            NextLogits::All(logits) => {
                let raw = request.logprobs.map(|k| (k, logits.clone()));
                for (&id, bias) in &self.bias {
                    if let Some(logit) = logits.get_mut(id as usize) {
                        *logit += bias;
                    }
                }
                if let Some(constraint) = &mut request.constraint {
                    constraint.mask(logits)?;
                }
                let id = self.sampler.sample(logits);
                let logprob = match (&id, raw) {
                    (Ok(id), Some((k, raw))) => Some(Logprob {
                        chosen: token_logprob(&raw, *id),
                        best: top_logprobs(&raw, k),
                    }),
                    _ => None,
                };
                (id, logprob)
            }
        };
        let id = id.map_err(|error| error.to_string())?;
        self.sampler.remember(id);
        if let Some(constraint) = &mut request.constraint {
            constraint.accept(id)?;
        }
        self.generated += 1;
        Ok((id, logprob))
    }
}
