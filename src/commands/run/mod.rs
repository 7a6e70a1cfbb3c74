//! `moectl run`: generate text.

mod chat;
mod commands;
mod conversation;
mod editor;
mod prompt;
mod record;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;

use super::console::{Console, Unit};
use super::flags::{self, GpuFlags};
use super::{Failure, cache_state, check_context, expert_counts, interrupt, load};
use crate::backend::Routing;
use crate::commands::args::{CacheArgs, ComputeArgs, ModelArgs};
use crate::commands::values::{Seed, seed, whole, whole_or_all};
use crate::engine::generate::{FinishReason, GenerateOptions, Generation, Observer};
use crate::engine::sampler::SamplingParams;
use crate::engine::{Engine, TextModel};
use crate::hardware::monitor::high_water_mark;
use crate::model::{Message, ModelConfig, Source};
use crate::planning::units::{parse_tokens, show_bytes};

use record::{LARGEST_EXACT, record};

/// Generate text: one prompt, standard input, or a chat
///
/// With a chat template the prompt is one user turn; --raw continues it as plain text. Text goes
/// to standard output as it comes, the closing figures to standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl run \"What is the meaning of the noun \\\"river\\\"?\"
  moectl run --raw -n 64 --temperature 0 \"def fibonacci(n):\"
  cat notes.txt | moectl run \"Summarise this:\"
  cat notes.txt | moectl run --system \"Summarise.\" --json
  moectl run --chat --model org/name")]
pub struct RunArgs {
    /// Prompt text; what is piped in goes after it [default: standard input; a chat on a terminal]
    #[arg(conflicts_with_all = ["prompt_ids", "chat"])]
    prompt: Option<String>,
    /// The same as a flag
    #[arg(short = 'p', long = "prompt", value_name = "TEXT",
          conflicts_with_all = ["prompt", "prompt_ids", "chat"])]
    prompt_flag: Option<String>,
    /// File whose text goes after the prompt
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["prompt_ids", "chat"])]
    file: Option<PathBuf>,
    /// Prompt as token ids, taken as they are
    #[arg(
        long,
        value_name = "ID,ID,...",
        value_delimiter = ',',
        conflicts_with = "chat"
    )]
    prompt_ids: Option<Vec<u32>>,
    /// Chat: a line editor on a terminal, else one turn per line of input; /help lists its commands
    #[arg(long, visible_alias = "interactive", conflicts_with = "raw")]
    chat: bool,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long)]
    raw: bool,
    /// System message of the conversation
    #[arg(long, alias = "system-prompt", value_name = "TEXT", conflicts_with_all = ["raw", "prompt_ids"])]
    system: Option<String>,
    /// Most tokens to generate, per turn; -1 for as many as there is room for
    #[arg(short = 'n', long, visible_alias = "n-predict", alias = "max-new-tokens", value_name = "N",
          value_parser = whole_or_all, default_value = "512")]
    max_tokens: usize,
    /// Room for prompt and answer, in tokens (32k = 32768) [default: what they need; 8k in a chat]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = parse_tokens)]
    ctx: Option<u64>,
    /// End before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past end-of-text tokens, to the full -n
    #[arg(long)]
    ignore_eos: bool,
    /// Report the K best tokens of each step (with --json)
    #[arg(long, value_name = "K", value_parser = whole, default_value_t = 0, requires = "json")]
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
    #[arg(long, visible_alias = "temp", value_name = "T")]
    temperature: Option<f32>,
    /// Keep the K best tokens; 0 keeps all
    #[arg(long, value_name = "K", value_parser = whole)]
    top_k: Option<usize>,
    /// Keep the best tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least this probable relative to the best
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Weaken tokens seen before, prompt included; 1 is off
    #[arg(long, alias = "repeat-penalty", value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens generated before
    #[arg(long, value_name = "X")]
    presence_penalty: Option<f32>,
    /// Subtracted per earlier generation of a token
    #[arg(long, value_name = "X")]
    frequency_penalty: Option<f32>,
    /// Seed of the draws; -1 for a new one each run [default: a new one]
    #[arg(short, long, value_name = "N", value_parser = seed)]
    seed: Option<Seed>,
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
                Some(Seed(Some(seed))) => seed,
                // One that JSON's readers keep, so that it can be given again.
                _ => getrandom::u64().context("random seed")? % LARGEST_EXACT,
            },
        };
        params
            .validate()
            .map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(params)
    }
}

/// Runs `moectl run`.
///
/// # Errors
/// Bad flags, a model that cannot be read, the engine's.
pub fn execute(args: RunArgs, console: &Console) -> anyhow::Result<()> {
    if args.chat && console.json {
        return Err(Failure::Usage("--chat does not go with --json; use one prompt".into()).into());
    }
    let wants_chat = args.chat || args.could_chat(console);
    flags::check(&args.compute, GpuFlags::Place, console)?;
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
    if args.chat || (wants_chat && text.has_chat_template()) {
        chat::chat(&args, &source, &config, options, console)
    } else {
        let prompt_ids = prompt::prompt_ids(&args, &config, &text)?;
        one_prompt(&args, &source, &config, &prompt_ids, &options, console)
    }
}

impl RunArgs {
    /// The prompt that the command line itself holds.
    fn given_prompt(&self) -> Option<&str> {
        self.prompt.as_deref().or(self.prompt_flag.as_deref())
    }

    /// Whether there is no prompt but a person to ask for one.
    fn could_chat(&self, console: &Console) -> bool {
        let prompt = self.given_prompt().is_some() || self.file.is_some();
        let plain = self.raw || console.json || self.prompt_ids.is_some();
        !prompt && !plain && io::stdin().is_terminal()
    }
}

/// Room for an answer of any length, unless --ctx says otherwise.
const DEFAULT_ROOM: usize = 8192;

fn system_message(args: &RunArgs) -> Vec<Message> {
    args.system
        .iter()
        .map(|text| Message::new("system", text.clone()))
        .collect()
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
        None => {
            let answer = match args.max_tokens {
                usize::MAX => DEFAULT_ROOM,
                tokens => tokens,
            };
            prompt_ids.len().saturating_add(answer).min(limit)
        }
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
