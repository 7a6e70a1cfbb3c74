//! Repetitions: the same prompt, prefilled and continued, timed from outside the model.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::pace::{Pace, show_left};
use super::variants::Variants;
use crate::backend::{DecodeTimes, Routing};
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, expert_counts, interrupt};
use crate::engine::Engine;
use crate::engine::generate::{FinishReason, GenerateOptions, Observer};
use crate::engine::sampler::SamplingParams;
use crate::hardware::{GpuCounters, GpuSource, NvmlGpu};
use crate::planning::units::show_tokens;
use crate::report::record::{ContextRun, Continuation, DecodeSplit, Repetition};
use crate::report::stats::ENOUGH_SAMPLES;

pub struct MeasurePlan {
    /// Ascending; prompt and generated tokens together
    pub contexts: Vec<usize>,
    pub generated_tokens: usize,
    pub continuation: Continuation,
    pub warmups: usize,
    /// At most, if there is a time limit
    pub repetitions: usize,
    pub time_limit: Option<Duration>,
}

impl MeasurePlan {
    /// Tokens of the longest context.
    pub fn longest(&self) -> usize {
        self.contexts.last().copied().unwrap_or(0)
    }

    /// Tokens of text that the longest context takes: its prompt, and what is decoded if that is text.
    pub fn text_tokens(&self) -> usize {
        self.longest() - self.generated_tokens + self.forced_tokens()
    }

    fn forced_tokens(&self) -> usize {
        match self.continuation {
            Continuation::Sampled => 0,
            Continuation::Text => self.generated_tokens,
        }
    }
}

/// What was measured, and what should be said of it.
pub struct Measured {
    /// `[variant][context]`; without contexts that were not reached
    pub contexts: Vec<Vec<ContextRun>>,
    pub notes: Vec<String>,
    /// By Ctrl-C: what there was until then is kept.
    pub interrupted: bool,
}

/// Measures every context with every variant; prompts are cut from the text's start, and what is fed after
/// them, if it is text, from behind.
///
/// # Errors
/// The engine's.
pub fn contexts(
    engine: &mut Engine,
    text: &[u32],
    plan: &MeasurePlan,
    variants: &mut Variants,
    console: &Console,
) -> anyhow::Result<Measured> {
    let rounds = plan.warmups + plan.repetitions;
    let mut bench = Bench {
        plan,
        pace: Pace::new(&plan.contexts, rounds * variants.len(), plan.time_limit),
        gpu: engine.backend().gpu().and_then(NvmlGpu::open),
        bar: console.progress(
            "bench",
            (plan.contexts.len() * rounds * variants.len()) as u64,
            Unit::Runs,
        ),
        notes: Vec::new(),
        began: Instant::now(),
    };
    let mut results = vec![Vec::new(); variants.len()];
    let mut interrupted = false;
    for at in 0..plan.contexts.len() {
        match bench.context(at, engine, text, variants, &mut results) {
            Ok(()) => {}
            Err(error) if is_interrupt(&error) => {
                interrupted = true;
                break;
            }
            Err(error) => return Err(error),
        }
    }
    bench.bar.finish_and_clear();
    results
        .iter_mut()
        .for_each(|runs: &mut Vec<ContextRun>| runs.retain(|run| !run.repetitions.is_empty()));
    Ok(Measured {
        contexts: results,
        notes: bench.notes,
        interrupted,
    })
}

fn is_interrupt(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Failure::Interrupted))
}

struct Bench<'a> {
    plan: &'a MeasurePlan,
    pace: Pace,
    gpu: Option<NvmlGpu>,
    bar: ProgressBar,
    notes: Vec<String>,
    /// With the monitor, but for milliseconds
    began: Instant,
}

impl Bench<'_> {
    /// Warm-ups and repetitions at one context, as many as its share of the time allows, one at least.
    fn context(
        &mut self,
        at: usize,
        engine: &mut Engine,
        text: &[u32],
        variants: &mut Variants,
        results: &mut [Vec<ContextRun>],
    ) -> anyhow::Result<()> {
        let (plan, tokens) = (self.plan, self.plan.contexts[at]);
        let prompt_tokens = tokens - plan.generated_tokens;
        let (prompt, forced) = text[..prompt_tokens + plan.forced_tokens()].split_at(prompt_tokens);
        let run = ContextRun {
            context_tokens: tokens,
            started_ms: Some(1e3 * self.began.elapsed().as_secs_f64()),
            ..ContextRun::default()
        };
        results.iter_mut().for_each(|runs| runs.push(run.clone()));
        let (share, began) = (self.pace.share(at), Instant::now());
        let warmups = self.warmups(at, share, variants.len());
        let rounds = warmups + plan.repetitions;
        for number in 0..rounds {
            let round = Instant::now();
            for (i, runs) in results.iter_mut().enumerate() {
                variants.begin(i, engine)?;
                let started = Instant::now();
                let before = counters(&mut self.gpu);
                let mut repetition = repeat(engine, prompt, plan.generated_tokens, forced)?;
                repetition.gpu_energy_j = counters(&mut self.gpu).since(&before).energy_j();
                variants.end(i, engine);
                if let Some(run) = runs.last_mut().filter(|_| number >= warmups) {
                    run.repetitions.push(repetition);
                }
                self.pace.took(at, started.elapsed());
                self.tell(at, number * variants.len() + i + 1);
            }
            let next_ends = began.elapsed() + round.elapsed();
            if number >= warmups && share.is_some_and(|share| next_ends > share) {
                let skipped = (rounds - number - 1) * variants.len();
                self.bar.dec_length(skipped as u64);
                break;
            }
        }
        Ok(())
    }

    /// Warm-ups at a context: none where there is hardly time for the repetitions themselves, and a
    /// shorter context has warmed the process.
    fn warmups(&mut self, at: usize, share: Option<Duration>, variants: usize) -> usize {
        let round = self.pace.estimate(at).map(|s| s * variants as f64);
        let fit = match (round, share) {
            (Some(round), Some(share)) => share.as_secs_f64() / round,
            _ => return self.plan.warmups,
        };
        if at == 0 || fit >= (self.plan.warmups + ENOUGH_SAMPLES) as f64 || self.plan.warmups == 0 {
            return self.plan.warmups;
        }
        let context = show_tokens(self.plan.contexts[at] as u64);
        self.notes.push(format!(
            "context {context}: no warm-up, since a repetition takes about {:.0} s",
            round.unwrap_or(0.0)
        ));
        self.bar.dec_length((self.plan.warmups * variants) as u64);
        0
    }

    fn tell(&self, at: usize, done: usize) {
        self.bar.inc(1);
        let left = self.pace.left(at, done).map(show_left).unwrap_or_default();
        let context = show_tokens(self.plan.contexts[at] as u64);
        self.bar.set_prefix(format!("context {context}, {left}"));
    }
}

fn counters(gpu: &mut Option<NvmlGpu>) -> GpuCounters {
    gpu.as_mut().map(|gpu| gpu.counters()).unwrap_or_default()
}

/// Feeds `prompt` and decodes `new_tokens`, `forced` instead of the first ones sampled.
fn repeat(
    engine: &mut Engine,
    prompt: &[u32],
    new_tokens: usize,
    forced: &[u32],
) -> anyhow::Result<Repetition> {
    engine.reset(prompt.len() + new_tokens)?;
    let options = GenerateOptions {
        max_new_tokens: new_tokens,
        sampling: SamplingParams::default(),
        stop: Vec::new(),
        ignore_eos: true,
        logprobs: 0,
        forced: forced.to_vec(),
    };
    let mut accesses = 0;
    engine.take_times();
    let start = Instant::now();
    let generation = engine.generate(
        prompt,
        &options,
        interrupt::flag(),
        &mut Observer {
            on_text: &mut |_| {},
            on_prefill: &mut |_| {},
            on_routing: &mut |_, _, routing: &Routing| {
                accesses += routing.topk_ids.len() as u64;
            },
        },
    )?;
    let e2e = start.elapsed();
    if generation.finish_reason == FinishReason::Interrupted {
        return Err(Failure::Interrupted.into());
    }
    let times = engine.take_times();
    let experts = expert_counts(times.as_ref(), accesses, engine.shape().num_layers());
    let timings = &generation.timings;
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let mut hash = Sha256::new();
    generation
        .token_ids
        .iter()
        .for_each(|id| hash.update(id.to_le_bytes()));
    Ok(Repetition {
        prompt_tokens: prompt.len(),
        generated_tokens: generation.token_ids.len(),
        ttft_ms: ms(timings.ttft),
        itl_ms: timings.inter_token.iter().map(|&time| ms(time)).collect(),
        prefill_tok_s: timings.prefill_tok_s(),
        decode_tok_s: timings.decode_tok_s(),
        e2e_ms: ms(e2e),
        experts,
        decode_split: times.filter(|t| t.steps > 0).map(split_of),
        gpu_energy_j: None,
        output_sha256: format!("{:x}", hash.finalize()),
        cached_tokens: None,
    })
}

fn split_of(times: DecodeTimes) -> DecodeSplit {
    let per_step = |sum: f64| sum / times.steps as f64;
    DecodeSplit {
        steps: times.steps,
        launch_ms: per_step(1e3 * times.launch_s),
        wait_gpu_ms: per_step(1e3 * times.wait_gpu_s),
        cpu_experts_ms: per_step(1e3 * times.cpu_experts_s),
        tail_ms: per_step(1e3 * times.tail_s),
        experts_cpu: per_step(times.experts_cpu as f64),
        experts_vram: per_step(times.experts_vram as f64),
        experts_pcie: per_step(times.experts_pcie as f64),
    }
}
