//! Repetitions: the same prompt, prefilled and continued, timed from outside the model.

use std::time::Instant;

use sha2::{Digest, Sha256};

use super::contenders::Contenders;
use crate::backend::{DecodeTimes, Routing};
use crate::commands::console::{Console, Unit};
use crate::commands::{Failure, expert_counts, interrupt};
use crate::engine::Engine;
use crate::engine::generate::{FinishReason, GenerateOptions, Observer};
use crate::engine::sampler::SamplingParams;
use crate::formats::corpus::Corpus;
use crate::hardware::{GpuCounters, GpuSource, NvmlGpu};
use crate::report::record::{ContextRun, Continuation, DecodeSplit, Repetition};

pub struct MeasurePlan {
    /// Ascending; prompt and generated tokens together
    pub contexts: Vec<usize>,
    pub generated_tokens: usize,
    pub continuation: Continuation,
    pub warmups: usize,
    pub repetitions: usize,
}

/// Measures every context with every contender, `[contender][context]`; prompts are cut from the corpus'
/// text from its start, and what is fed after them, if it is text, from behind.
pub fn contexts(
    engine: &mut Engine,
    corpus: &Corpus,
    plan: &MeasurePlan,
    contenders: &mut Contenders,
    console: &Console,
) -> anyhow::Result<Vec<Vec<ContextRun>>> {
    let longest = plan.contexts.last().copied().unwrap_or(0);
    let ids = text_of(engine, corpus, longest)?;
    let mut gpu = engine.backend().gpu().and_then(NvmlGpu::open);
    let runs = plan.contexts.len() * (plan.warmups + plan.repetitions) * contenders.len();
    let bar = console.progress("bench", runs as u64, Unit::Runs);
    let mut results = vec![Vec::new(); contenders.len()];
    for &context in &plan.contexts {
        let (name, new_tokens) = (corpus.name(), plan.generated_tokens);
        let forced = match plan.continuation {
            Continuation::Sampled => 0,
            Continuation::Text => new_tokens,
        };
        let wanted = context - new_tokens + forced;
        let held = ids.len().min(wanted);
        if forced > 0 && held <= forced {
            return Err(Failure::Usage(format!(
                "{name} holds {held} tokens: no prompt, and {new_tokens} to decode after it; lower -n, or \
                 use --continuation sampled"
            ))
            .into());
        }
        if held < wanted {
            console.note(format!(
                "note: {name} holds {held} tokens, {wanted} were asked for"
            ));
        }
        let (prompt, forced) = ids[..held].split_at(held - forced);
        let run = ContextRun {
            context_tokens: context,
            ..ContextRun::default()
        };
        results.iter_mut().for_each(|runs| runs.push(run.clone()));
        for number in 0..plan.warmups + plan.repetitions {
            for (i, runs) in results.iter_mut().enumerate() {
                contenders.begin(i, engine)?;
                let before = counters(&mut gpu);
                let mut repetition = repeat(engine, prompt, new_tokens, forced)?;
                repetition.gpu_energy_j = counters(&mut gpu).since(&before).energy_j();
                contenders.end(i, engine);
                if let Some(run) = runs.last_mut().filter(|_| number >= plan.warmups) {
                    run.repetitions.push(repetition);
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(results)
}

fn counters(gpu: &mut Option<NvmlGpu>) -> GpuCounters {
    gpu.as_mut().map(|gpu| gpu.counters()).unwrap_or_default()
}

/// The first `enough` tokens of the corpus' records, one after the other.
fn text_of(engine: &Engine, corpus: &Corpus, enough: usize) -> anyhow::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for record in corpus.records()? {
        ids.extend(engine.text().encode_content(&record?.content)?);
        if ids.len() >= enough {
            break;
        }
    }
    Ok(ids)
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
