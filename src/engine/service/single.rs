//! Requests one after the other on an engine with one sequence.
//!
//! A prompt that extends exactly what the sequence holds, of the same owner, computes only the rest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::queue::Next;
use super::{
    CacheChange, Controls, Event, ExpertsReport, FinishReason, Finished, Job, Jobs, LayerRouting,
    Logprob, ModelFacts, RoutingSummary, Timings, Token, Usage,
};
use crate::backend::{BackendError, NextLogits, Routing};
use crate::engine::LogitRows;
use crate::engine::experts::ExpertManager;
use crate::engine::sampler::{Sampler, token_logprob, top_logprobs};
use crate::engine::stream::TextStream;
use crate::engine::{Engine, EngineError};
use crate::planning::PolicyConfig;

/// Makes the experts of the placement anew, under its policy or another.
pub type ManagerSource =
    Box<dyn FnMut(Option<PolicyConfig>) -> Result<ExpertManager, String> + Send>;

/// Writes the state of the expert cache to its file.
type Save = Box<dyn FnMut(&Engine) -> Result<(), String> + Send>;

/// What belongs to the expert cache of a served engine.
#[derive(Default)]
pub struct SingleOptions {
    pub managers: Option<ManagerSource>,
    pub save: Option<Save>,
    /// How often to save; never but at the end if not given
    pub save_every: Option<Duration>,
}

/// Serves until no more requests come. `context_tokens`: what the engine has room for.
pub fn serve_one_at_a_time(
    engine: Engine,
    context_tokens: usize,
    options: SingleOptions,
    jobs: &Jobs,
) {
    jobs.ready(facts(&engine, context_tokens));
    let mut worker = Worker::new(engine, context_tokens, options);
    let save_every = worker.options.save_every.unwrap_or(Duration::MAX / 4);
    let mut saved = Instant::now();
    loop {
        let left = save_every.saturating_sub(saved.elapsed());
        // A year is for ever, and no overflow.
        match jobs.next_within(&mut worker, left.min(Duration::from_secs(31_536_000))) {
            Next::Job(job) => worker.serve(job, jobs),
            Next::TimedOut => {}
            Next::End => break,
        }
        if saved.elapsed() >= save_every {
            // Told by the next call that asks for it, and at the end.
            let _ = worker.save();
            saved = Instant::now();
        }
    }
    let _ = worker.save();
}

fn facts(engine: &Engine, context_tokens: usize) -> ModelFacts {
    let shape = engine.shape();
    ModelFacts {
        backend: engine.backend().name,
        context_tokens,
        vocab_size: shape.vocab_size,
        num_layers: shape.num_layers(),
        num_experts: shape.moe.num_experts,
        num_experts_per_tok: shape.moe.num_experts_per_tok,
        synthetic: engine.config().synthetic,
        notes: engine.notes().to_vec(),
    }
}

/// `[layer][expert]` picks of the router.
type Picks = Vec<Vec<u64>>;

fn no_picks(engine: &Engine) -> Picks {
    vec![vec![0; engine.shape().moe.num_experts]; engine.shape().num_layers()]
}

struct Worker {
    engine: Engine,
    context_tokens: usize,
    options: SingleOptions,
    /// Whose tokens the sequence holds
    owner: Option<u64>,
    picks: Picks,
    /// Sums of what the backend tells since its last telling
    places: Vec<[u64; 3]>,
    promoted_bytes: u64,
    h2d_bytes: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
}

/// How a request ended without an error.
enum Ended {
    Finished(Box<Finished>),
    Cancelled,
}

impl Worker {
    fn new(engine: Engine, context_tokens: usize, options: SingleOptions) -> Self {
        Worker {
            picks: no_picks(&engine),
            engine,
            context_tokens,
            options,
            owner: None,
            places: Vec::new(),
            promoted_bytes: 0,
            h2d_bytes: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
        }
    }

    fn save(&mut self) -> Result<(), String> {
        match &mut self.options.save {
            Some(save) => save(&self.engine),
            None => Err("no file: start with --cache-state FILE".into()),
        }
    }

    fn serve(&mut self, mut job: Job, jobs: &Jobs) {
        if job.is_cancelled() {
            return;
        }
        match self.generate(&mut job, jobs) {
            Ok(Ended::Finished(finished)) => {
                job.send(Event::Finished(finished));
            }
            Ok(Ended::Cancelled) => {}
            Err(message) => {
                // What the sequence holds is uncertain.
                self.owner = None;
                job.send(Event::Failed(message));
            }
        }
    }

    /// Makes the sequence a beginning of `prompt`; how many tokens of it are in already.
    fn prepare(&mut self, prompt: &[u32], owner: u64) -> Result<usize, EngineError> {
        let held = self.engine.tokens();
        let extends = prompt.len() > held.len() && prompt.starts_with(held);
        if self.owner == Some(owner) && extends {
            return Ok(held.len());
        }
        self.owner = None;
        self.engine.reset(self.context_tokens)?;
        self.owner = Some(owner);
        Ok(0)
    }

    fn generate(&mut self, job: &mut Job, jobs: &Jobs) -> Result<Ended, String> {
        let start = Instant::now();
        let text_of = |error: EngineError| error.to_string();
        let cached_tokens = self
            .prepare(&job.request.prompt, job.request.owner)
            .map_err(text_of)?;
        job.send(Event::Started { cached_tokens });
        let mut own_picks = job.request.routing.then(|| no_picks(&self.engine));
        let Some(logits) = self.prefill(job, cached_tokens, own_picks.as_mut())? else {
            return Ok(Ended::Cancelled);
        };
        let prefilled = Instant::now();
        let mut decode = Decode::new(&self.engine, job)?;
        let mut next = NextLogits::All(logits);
        let reason = loop {
            if job.is_cancelled() {
                return Ok(Ended::Cancelled);
            }
            if decode.generated >= job.request.max_tokens {
                break FinishReason::Length;
            }
            let (id, logprob) = decode.choose(job, &mut next)?;
            self.generated_tokens += 1;
            let end_of_text = decode.ends_text(id);
            let text = match end_of_text {
                true => String::new(),
                false => decode.stream.push(id),
            };
            let token = Token { id, text, logprob };
            if !job.send(Event::Token(token)) {
                return Ok(Ended::Cancelled);
            }
            if end_of_text {
                break FinishReason::EndOfText;
            }
            if let Some(stop) = decode.stream.stopped_by() {
                break FinishReason::StopString(stop.to_owned());
            }
            jobs.answer(self, false);
            if decode.generated >= job.request.max_tokens {
                break FinishReason::Length;
            }
            next = match self.step(id, decode.wanted, own_picks.as_mut()) {
                Err(EngineError::Backend(BackendError::ContextFull { .. })) => {
                    break FinishReason::Length;
                }
                other => other.map_err(text_of)?,
            };
        };
        Ok(Ended::Finished(Box::new(Finished {
            reason,
            text: decode.stream.finish(),
            usage: Usage {
                prompt_tokens: job.request.prompt.len(),
                cached_tokens,
                completion_tokens: decode.generated,
            },
            timings: Timings {
                queue: job.waited,
                prefill: prefilled - start,
                decode: prefilled.elapsed(),
            },
            routing: own_picks.map(|picks| summary(&picks)),
        })))
    }

    /// The logits after the prompt; `None` if the request was cancelled: what is computed stays.
    fn prefill(
        &mut self,
        job: &Job,
        cached_tokens: usize,
        mut own_picks: Option<&mut Picks>,
    ) -> Result<Option<Vec<f32>>, String> {
        let rest = &job.request.prompt[cached_tokens..];
        self.prompt_tokens += rest.len() as u64;
        let picks = &mut self.picks;
        let logits = self.engine.prefill(
            rest,
            &mut |layer, _, routing| {
                count(picks, layer, routing);
                if let Some(own) = own_picks.as_deref_mut() {
                    count(own, layer, routing);
                }
            },
            &mut |done| {
                let done = cached_tokens + done;
                job.send(Event::Prefill { done });
                !job.is_cancelled()
            },
        );
        logits.map_err(|error| error.to_string())
    }

    fn step(
        &mut self,
        id: u32,
        wanted: Option<usize>,
        mut own_picks: Option<&mut Picks>,
    ) -> Result<NextLogits, EngineError> {
        let picks = &mut self.picks;
        let on_routing = &mut |layer: usize, _: usize, routing: &Routing| {
            count(picks, layer, routing);
            if let Some(own) = own_picks.as_deref_mut() {
                count(own, layer, routing);
            }
        };
        match wanted {
            Some(wanted) => self.engine.forward_best(id, wanted, on_routing),
            None => (self.engine)
                .forward(&[id], LogitRows::Last, on_routing)
                .map(NextLogits::All),
        }
    }
}

fn count(picks: &mut Picks, layer: usize, routing: &Routing) {
    for &expert in &routing.topk_ids {
        picks[layer][usize::from(expert)] += 1;
    }
}

fn summary(picks: &Picks) -> RoutingSummary {
    let of_layer = |picks: &Vec<u64>| {
        let total: u64 = picks.iter().sum();
        let mut used: Vec<(usize, u64)> = picks.iter().copied().enumerate().collect();
        used.retain(|&(_, n)| n > 0);
        used.sort_by_key(|&(expert, n)| (std::cmp::Reverse(n), expert));
        LayerRouting {
            picks: total,
            distinct_experts: used.len(),
            entropy_bits: entropy_bits(picks),
            top_experts: used.into_iter().take(8).collect(),
        }
    };
    RoutingSummary {
        layers: picks.iter().map(of_layer).collect(),
    }
}

/// Shannon entropy of a distribution given by counts.
pub fn entropy_bits(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let share = |&n: &u64| n as f64 / total.max(1) as f64;
    let of = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
    counts.iter().map(share).map(of).sum()
}

/// The token loop's state of one request.
struct Decode {
    sampler: Sampler,
    stream: TextStream,
    /// How many best logits are enough; all are needed if `None`
    wanted: Option<usize>,
    eos: Vec<u32>,
    generated: usize,
    bias: BTreeMap<u32, f32>,
}

impl Decode {
    fn new(engine: &Engine, job: &Job) -> Result<Self, String> {
        let request = &job.request;
        let mut sampler = Sampler::new(request.sampling.clone()).map_err(|e| e.to_string())?;
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
                false => engine.text().generation_config.eos_token_ids.clone(),
            },
            generated: 0,
            bias: request.logit_bias.iter().copied().collect(),
        })
    }

    fn ends_text(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    fn choose(
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

impl Controls for Worker {
    fn experts(&mut self) -> ExpertsReport {
        if let Some(times) = self.engine.take_times() {
            let layers = times.layers.len();
            self.places.resize(self.places.len().max(layers), [0; 3]);
            for (sum, layer) in self.places.iter_mut().zip(&times.layers) {
                sum[0] += layer.vram;
                sum[1] += layer.cpu;
                sum[2] += layer.pcie;
            }
            self.promoted_bytes += times.promoted_bytes;
            self.h2d_bytes += times.h2d_bytes;
        }
        let manager = self.engine.experts();
        ExpertsReport {
            policy: manager.map(ExpertManager::config),
            stopped: manager.and_then(|m| m.stopped().map(str::to_owned)),
            picks: self.picks.clone(),
            residents: manager.map(ExpertManager::contents).unwrap_or_default(),
            counts: manager.map_or_else(Vec::new, |m| m.layer_counts().to_vec()),
            places: self.places.clone(),
            promoted_bytes: self.promoted_bytes,
            h2d_bytes: self.h2d_bytes,
            vram_bytes: self.engine.vram_bytes(),
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
        }
    }

    fn change(&mut self, change: &CacheChange) -> Result<(), String> {
        let policy = match change {
            CacheChange::Save => return self.save(),
            CacheChange::Freeze(frozen) => {
                return match self.engine.experts_mut() {
                    Some(experts) => {
                        experts.freeze(*frozen);
                        Ok(())
                    }
                    None => Err("there is no expert cache: start with --placement FILE".into()),
                };
            }
            CacheChange::Policy(policy) => Some(*policy),
            CacheChange::Reload => None,
        };
        let Some(managers) = &mut self.options.managers else {
            return Err("there is no placement: start with --placement FILE".into());
        };
        let manager = managers(policy)?;
        // What the sequence holds would be computed anew anyway where slots move under it.
        self.owner = None;
        self.engine.place(manager).map_err(|e| e.to_string())?;
        Ok(())
    }
}
