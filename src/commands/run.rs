//! `moectl run`: generate text.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::console::{Console, Unit};
use super::{Failure, cache_state, check_context, expert_counts, interrupt, load};
use crate::backend::Routing;
use crate::cli::{CacheArgs, ComputeArgs, ModelArgs};
use crate::engine::generate::{FinishReason, GenerateOptions, Generation, Observer};
use crate::engine::sampler::SamplingParams;
use crate::engine::{Engine, TextModel};
use crate::formats::ModelId;
use crate::hardware::monitor::high_water_mark;
use crate::model::{Message, ModelConfig, Source};
use crate::planning::units::{parse_tokens, show_bytes};
use crate::report::record::ExpertCounts;

/// Generate text: one prompt, standard input, or a chat
///
/// With a chat template the prompt is one user turn; --raw continues it as plain text. Text goes
/// to standard output as it comes, the closing figures to standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl run \"What is the meaning of the noun \\\"river\\\"?\"
  moectl run --raw -n 64 --temperature 0 \"def fibonacci(n):\"
  cat notes.txt | moectl run --system \"Summarise.\" --json
  moectl run --chat --model org/name")]
pub struct RunArgs {
    /// Prompt text [default: standard input]
    #[arg(conflicts_with_all = ["prompt_ids", "chat"])]
    prompt: Option<String>,
    /// Prompt as token ids, taken as they are
    #[arg(
        long,
        value_name = "ID,ID,...",
        value_delimiter = ',',
        conflicts_with = "chat"
    )]
    prompt_ids: Option<Vec<u32>>,
    /// Chat: one turn per line of input, with history
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long)]
    raw: bool,
    /// System message of the conversation
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "prompt_ids"])]
    system: Option<String>,
    /// Most tokens to generate, per turn
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Room for prompt and answer, in tokens (32k = 32768) [default: what they need; 8k in a chat]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    ctx: Option<u64>,
    /// End before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past end-of-text tokens, to the full -n
    #[arg(long)]
    ignore_eos: bool,
    /// Report the K best tokens of each step (with --json)
    #[arg(long, value_name = "K", default_value_t = 0, requires = "json")]
    logprobs: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// How tokens are drawn; what is not given is the model's generation_config.json.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling (defaults: the model's generation_config.json)")]
struct SamplingArgs {
    /// Randomness; 0 always takes the best token
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep the K best tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the best tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least this probable relative to the best
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Weaken tokens seen before, prompt included; 1 is off
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens generated before
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted per earlier generation of a token
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Seed of the draws [default: a new one each run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The model's defaults with these flags over them.
    fn over(&self, defaults: SamplingParams) -> anyhow::Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: match self.seed {
                Some(seed) => seed,
                None => getrandom::u64().context("random seed")?,
            },
        };
        params
            .validate()
            .map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(params)
    }
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct RunRecord<'a> {
    model: &'a ModelId,
    /// The weights are random, the text means nothing
    synthetic: bool,
    backend: String,
    seed: u64,
    prompt_ids: &'a [u32],
    token_ids: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<Vec<LogprobRecord>>,
    timings: TimingsRecord,
    experts: ExpertCounts,
    peak_rss_bytes: Option<u64>,
    /// Held on the GPU at the end, by the driver's figure
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_bytes: Option<u64>,
}

#[derive(Serialize)]
struct LogprobRecord {
    id: u32,
    logit: f32,
    logprob: f32,
}

#[derive(Serialize)]
struct TimingsRecord {
    prompt_tokens: usize,
    generated_tokens: usize,
    prefill_ms: f64,
    ttft_ms: f64,
    decode_ms: f64,
    prefill_tok_s: f64,
    decode_tok_s: f64,
}

pub fn execute(args: RunArgs, console: &Console) -> anyhow::Result<()> {
    if args.chat && console.json {
        return Err(Failure::Usage("--chat does not go with --json; use one prompt".into()).into());
    }
    let source = Source::resolve_os(args.model.model.as_deref())?;
    let config = source.config()?;
    if let Some(ctx) = args.ctx {
        check_context(&config, ctx)?;
    }
    let text = TextModel::load(&source)?;
    text.generation_config()?
        .notes()
        .for_each(|note| console.note(note));
    let options = GenerateOptions {
        max_new_tokens: args.max_tokens,
        sampling: args
            .sampling
            .over(SamplingParams::from(text.generation_config()?))?,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        logprobs: args.logprobs,
        forced: Vec::new(),
    };
    if args.chat {
        chat(&args, &source, &config, options, console)
    } else {
        let prompt_ids = prompt_ids(&args, &config, &text)?;
        one_prompt(&args, &source, &config, &prompt_ids, &options, console)
    }
}

fn one_prompt(
    args: &RunArgs,
    source: &Source,
    config: &ModelConfig,
    prompt_ids: &[u32],
    options: &GenerateOptions,
    console: &Console,
) -> anyhow::Result<()> {
    let limit = config.max_position_embeddings;
    let max_tokens = match args.ctx {
        Some(ctx) => ctx as usize,
        None => (prompt_ids.len() + args.max_tokens).min(limit),
    };
    if prompt_ids.len() >= max_tokens.max(1) && args.max_tokens > 0 {
        return Err(Failure::Usage(format!(
            "the prompt has {} tokens, the context {max_tokens}; raise --ctx (the model's limit is \
             {limit}) or shorten the prompt",
            prompt_ids.len()
        ))
        .into());
    }
    let mut engine = load(args, source, max_tokens, console)?;
    let interrupt = interrupt::flag();
    let mut accesses = 0;
    let show = !console.json;
    let generation = generate(
        &mut engine,
        prompt_ids,
        options,
        interrupt,
        show,
        &mut accesses,
        console,
    )?;
    cache_state::save(args.cache.cache_state.as_deref(), &engine, console)?;
    let times = engine.take_times();
    let experts = expert_counts(times.as_ref(), accesses, engine.shape().num_layers());
    if console.json {
        console.result_json(&record(&engine, options, prompt_ids, &generation, experts))?;
    } else {
        writeln!(io::stdout())?;
    }
    closing_line(&engine, &generation, console);
    match generation.finish_reason {
        FinishReason::Interrupted => Err(Failure::Interrupted.into()),
        _ => Ok(()),
    }
}

fn load(
    args: &RunArgs,
    source: &Source,
    max_tokens: usize,
    console: &Console,
) -> anyhow::Result<Engine> {
    let cache_file = args.cache.cache_state.as_deref();
    let mut outline = load::outline(source, &args.compute, cache_file, console)?;
    load::engine(source, &args.compute, &mut outline, max_tokens, console)
}

/// The prompt's token ids, from wherever the flags say.
fn prompt_ids(args: &RunArgs, config: &ModelConfig, text: &TextModel) -> anyhow::Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        let vocab_size = config.shape.vocab_size;
        return match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(Failure::Usage(format!(
                "--prompt-ids: {id} is not in the model's vocabulary; expected 0 to {}",
                vocab_size - 1
            ))
            .into()),
            None => Ok(ids.clone()),
        };
    }
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None if io::stdin().is_terminal() => {
            let way_out = "no prompt: give one, pipe one in, or use --chat";
            return Err(Failure::Usage(way_out.into()).into());
        }
        None => {
            let mut prompt = String::new();
            io::stdin()
                .read_to_string(&mut prompt)
                .context("standard input")?;
            prompt
        }
    };
    // A system message needs a template; without one, that is an error of encoding.
    let templated = text.has_chat_template() || args.system.is_some();
    let ids = match templated && !args.raw {
        true => {
            let mut messages = system_message(args);
            messages.push(Message::new("user", prompt));
            text.encode_chat(&messages)?
        }
        false => text.tokenizer.encode_document(&prompt)?,
    };
    if ids.is_empty() {
        return Err(Failure::Usage("the prompt is empty".into()).into());
    }
    Ok(ids)
}

fn system_message(args: &RunArgs) -> Vec<Message> {
    args.system
        .iter()
        .map(|text| Message::new("system", text.clone()))
        .collect()
}

fn generate(
    engine: &mut Engine,
    prompt_ids: &[u32],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    show: bool,
    accesses: &mut u64,
    console: &Console,
) -> anyhow::Result<Generation> {
    let bar = console.progress("prefill", prompt_ids.len() as u64, Unit::Tokens);
    let mut stdout_error = None;
    let generation = engine.generate(
        prompt_ids,
        options,
        interrupt,
        &mut Observer {
            on_prefill: &mut |done| match done == prompt_ids.len() {
                true => bar.finish_and_clear(),
                false => bar.set_position(done as u64),
            },
            on_text: &mut |text| {
                if show && stdout_error.is_none() {
                    let mut out = io::stdout().lock();
                    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                    if let Err(e) = written {
                        // Nobody reads any more: end the generation as Ctrl-C would.
                        interrupt.store(true, Ordering::Relaxed);
                        stdout_error = Some(e);
                    }
                }
            },
            on_routing: &mut |_, _, routing: &Routing| {
                *accesses += routing.topk_ids.len() as u64;
            },
        },
    )?;
    bar.finish_and_clear();
    match stdout_error {
        Some(error) => Err(error.into()),
        None => Ok(generation),
    }
}

fn record<'a>(
    engine: &'a Engine,
    options: &GenerateOptions,
    prompt_ids: &'a [u32],
    generation: &'a Generation,
    experts: ExpertCounts,
) -> RunRecord<'a> {
    let timings = &generation.timings;
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    RunRecord {
        model: engine.model_id(),
        synthetic: engine.config().synthetic,
        backend: engine.backend().name,
        seed: options.sampling.seed,
        prompt_ids,
        token_ids: &generation.token_ids,
        text: &generation.text,
        finish_reason: generation.finish_reason.name(),
        logprobs: generation
            .logprobs
            .iter()
            .map(|best| {
                let record = |t: &crate::engine::sampler::TokenLogprob| LogprobRecord {
                    id: t.id,
                    logit: t.logit,
                    logprob: t.logprob,
                };
                best.iter().map(record).collect()
            })
            .collect(),
        timings: TimingsRecord {
            prompt_tokens: timings.prompt_tokens,
            generated_tokens: generation.token_ids.len(),
            prefill_ms: ms(timings.prefill),
            ttft_ms: ms(timings.ttft),
            decode_ms: ms(timings.inter_token.iter().sum()),
            prefill_tok_s: timings.prefill_tok_s(),
            decode_tok_s: timings.decode_tok_s(),
        },
        experts,
        peak_rss_bytes: high_water_mark(),
        vram_bytes: engine.vram_bytes(),
    }
}

fn closing_line(engine: &Engine, generation: &Generation, console: &Console) {
    let timings = &generation.timings;
    let memory = high_water_mark().map_or(String::new(), |bytes| {
        format!(", {} memory", show_bytes(bytes))
    });
    let synthetic = match engine.config().synthetic {
        true => "; synthetic weights",
        false => "",
    };
    console.note(format!(
        "[prompt {} tokens, {:.1} tok/s; generated {} tokens, {:.1} tok/s{memory}{synthetic}]",
        timings.prompt_tokens,
        timings.prefill_tok_s(),
        generation.token_ids.len(),
        timings.decode_tok_s(),
    ));
    if let Some(reason) = engine.experts().and_then(|experts| experts.stopped()) {
        console.note(format!("note: {reason}"));
    }
}

/// One turn per line, the conversation so far always in context.
fn chat(
    args: &RunArgs,
    source: &Source,
    config: &ModelConfig,
    options: GenerateOptions,
    console: &Console,
) -> anyhow::Result<()> {
    const DEFAULT_CONTEXT: usize = 8192;
    let limit = config.max_position_embeddings;
    let max_tokens = args
        .ctx
        .map_or(DEFAULT_CONTEXT.min(limit), |ctx| ctx as usize);
    let mut engine = load(args, source, max_tokens, console)?;
    let ended = turns(args, &mut engine, limit, max_tokens, &options, console);
    cache_state::save(args.cache.cache_state.as_deref(), &engine, console)?;
    ended
}

fn turns(
    args: &RunArgs,
    engine: &mut Engine,
    limit: usize,
    max_tokens: usize,
    options: &GenerateOptions,
    console: &Console,
) -> anyhow::Result<()> {
    let mut messages = system_message(args);
    // A template that cannot be used is told before the first line is typed.
    engine.text().encode_chat(&[Message::new("user", "")])?;
    let prompting = io::stdin().is_terminal();
    if prompting {
        console.note("chat: one line per turn; /reset starts over, Ctrl-D ends");
    }
    loop {
        if prompting {
            eprint!("> ");
        }
        let mut line = String::new();
        if io::stdin()
            .lock()
            .read_line(&mut line)
            .context("standard input")?
            == 0
        {
            return Ok(());
        }
        let line = line.trim_end_matches(['\r', '\n']);
        if line == "/reset" {
            messages = system_message(args);
            continue;
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(Message::new("user", line));
        let ids = engine.text().encode_chat(&messages)?;
        // What the sequence has seen is kept where the new conversation begins with it.
        let seen = match ids.strip_prefix(engine.tokens()) {
            Some(rest) if !rest.is_empty() => engine.tokens().len(),
            _ => {
                engine.reset(max_tokens)?;
                0
            }
        };
        if ids.len() >= max_tokens {
            return Err(Failure::Usage(format!(
                "the conversation has {} tokens, the context {max_tokens}; raise --ctx (the \
                 model's limit is {limit}) or start over with /reset",
                ids.len()
            ))
            .into());
        }
        let interrupt = interrupt::flag();
        let generation = generate(
            engine,
            &ids[seen..],
            options,
            interrupt,
            true,
            &mut 0,
            console,
        )?;
        writeln!(io::stdout())?;
        closing_line(engine, &generation, console);
        if generation.finish_reason == FinishReason::Interrupted {
            return Err(Failure::Interrupted.into());
        }
        messages.push(Message::new("assistant", generation.text));
    }
}
