//! `moectl profile`: what does the router pick on this text?

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use half::f16;

use super::console::{Console, Unit};
use super::{Failure, check_output, interrupt, load, workloads};
use crate::backend::Routing;
use crate::cli::{ComputeArgs, ModelArgs};
use crate::engine::Engine;
use crate::engine::generate::{FinishReason, GenerateOptions, Observer};
use crate::engine::sampler::SamplingParams;
use crate::formats::corpus::{Content, Corpus, Record};
use crate::formats::document::PROFILE;
use crate::formats::{Document, atomic};
use crate::model::Source;
use crate::planning::profile::ProfileBody;
use crate::planning::trace::{Phase, Picks, Record as Event, TraceHeader};
use crate::planning::units::parse_tokens;
use crate::planning::{RoutingStats, TraceWriter};

/// Record what the router picks on a corpus
///
/// Reads JSON lines with `text`, `prompt` or `messages` (and optional `id`, `domain`), feeds them
/// through the model and counts, per layer and expert, what the router picks: in prefill and,
/// with --generate, in decode. Profiles of parts of a corpus merge to exactly that of the whole.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl profile corpus.jsonl -o profile.json
  moectl profile corpus.jsonl --generate 128 --trace corpus.trace
  moectl profile corpus.jsonl --shard 1/4 -o part1.json
  moectl profile --merge part1.json part2.json -o profile.json")]
pub struct ProfileArgs {
    /// Corpus files [default: the built-in workloads]
    #[arg(value_name = "CORPUS.jsonl")]
    corpora: Vec<PathBuf>,
    /// Where the profile goes
    #[arg(short, long, value_name = "FILE", default_value = "profile.json")]
    output: PathBuf,
    /// Also write every routing event to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Tokens to generate after each prompt or conversation
    #[arg(long, value_name = "N", default_value_t = 0)]
    generate: usize,
    /// Most tokens of a record; longer ones are cut (32k = 32768)
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens, default_value = "4k")]
    ctx: u64,
    /// Only every n-th record, starting with the i-th
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Add up these profiles instead of reading a corpus
    #[arg(long, value_name = "FILE", num_args = 2.., conflicts_with_all = ["corpora", "trace", "shard"])]
    merge: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Part `index` (from 1) of `count`.
#[derive(Clone, Copy, Debug)]
struct Shard {
    index: usize,
    count: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text
            .split_once('/')
            .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
            _ => Err("expected I/N with I from 1 to N, such as 1/4".into()),
        }
    }
}

pub fn execute(args: ProfileArgs, console: &Console) -> anyhow::Result<()> {
    check_output(&args.output)?;
    let document = if args.merge.is_empty() {
        if let Some(trace) = &args.trace {
            check_output(trace)?;
        }
        let source = Source::resolve(args.model.model.as_deref())?;
        let corpora = open_corpora(&args.corpora)?;
        let limit = source.config()?.max_position_embeddings;
        let room = (args.ctx as usize + args.generate).min(limit);
        let mut engine = load::engine(&source, &args.compute, room, console)?;
        let settings = Settings {
            ctx: args.ctx as usize,
            generate: args.generate,
            shard: args.shard.unwrap_or(Shard { index: 1, count: 1 }),
            max_records: usize::MAX,
        };
        match &args.trace {
            None => record(&mut engine, &corpora, &settings, None, console)?,
            Some(path) => record_with_trace(&mut engine, &corpora, &settings, path, console)?,
        }
    } else {
        merge(&args.merge)?
    };
    document.write(&args.output)?;
    if console.json {
        console.result_json(&document)?;
    } else {
        if let Some(label) = document.label() {
            console.result(label)?;
        }
        console.result(summary(&document.body))?;
        console.note(format!("wrote {}", args.output.display()));
    }
    Ok(())
}

/// What [`record`] needs to know beside the corpora.
pub(super) struct Settings {
    ctx: usize,
    generate: usize,
    shard: Shard,
    /// Of each corpus
    max_records: usize,
}

impl Settings {
    /// The first records of each corpus, prefill only, cut at `ctx` tokens.
    pub(super) fn quick(max_records: usize, ctx: usize) -> Self {
        Settings {
            ctx,
            generate: 0,
            shard: Shard { index: 1, count: 1 },
            max_records,
        }
    }
}

/// The corpora the user names, or the built-in ones.
pub(super) fn open_corpora(paths: &[PathBuf]) -> anyhow::Result<Vec<Corpus>> {
    if paths.is_empty() {
        return Ok(workloads::all()?);
    }
    paths.iter().map(|path| Ok(Corpus::open(path)?)).collect()
}

fn record_with_trace(
    engine: &mut Engine,
    corpora: &[Corpus],
    settings: &Settings,
    path: &Path,
    console: &Console,
) -> anyhow::Result<Document<ProfileBody>> {
    let mut document = None;
    let mut failure = None;
    let written = atomic::write_with(path, |out| {
        match record(engine, corpora, settings, Some(out), console) {
            Ok(done) => document = Some(done),
            Err(error) => {
                failure = Some(error);
                return Err(io::Error::other("recording failed"));
            }
        }
        Ok(())
    });
    if let Some(error) = failure {
        return Err(error);
    }
    written.with_context(|| path.display().to_string())?;
    Ok(document.expect("recorded without an error"))
}

/// Feeds every record through the model; counts, and writes events to `trace` if there is one.
pub(super) fn record(
    engine: &mut Engine,
    corpora: &[Corpus],
    settings: &Settings,
    mut trace: Option<&mut dyn Write>,
    console: &Console,
) -> anyhow::Result<Document<ProfileBody>> {
    let moe = engine.shape().moe.clone();
    let num_layers = engine.shape().num_layers();
    let header = TraceHeader {
        num_layers: num_layers as u16,
        num_experts: moe.num_experts as u16,
        num_experts_per_tok: moe.num_experts_per_tok as u16,
        fingerprint: engine.model_id().fingerprint.clone().unwrap_or_default(),
    };
    let trace = trace
        .as_mut()
        .map(|out| TraceWriter::new(out, &header))
        .transpose()?;
    let mut sink = Sink {
        stats: RoutingStats::new(num_layers, moe.num_experts, moe.num_experts_per_tok),
        trace,
        prompt_end: 0,
        error: None,
    };
    let interrupt = interrupt::flag();
    let in_shard = |number: &usize| number % settings.shard.count == settings.shard.index - 1;
    let used = |corpus: &Corpus| corpus.records.min(settings.max_records);
    let total: usize = corpora.iter().map(used).sum();
    let total = (0..total).filter(in_shard).count();
    let bar = console.progress("profile", total as u64, Unit::Runs);
    let mut number = 0;
    for corpus in corpora {
        for record in corpus.records()?.take(settings.max_records) {
            let record = record?;
            let mine = in_shard(&number);
            number += 1;
            if mine {
                let done = feed(engine, &record, settings, interrupt, &mut sink)
                    .with_context(|| format!("{}: record `{}`", corpus.name(), record.id))?;
                if !done {
                    console.note(format!(
                        "interrupted after {} of {total} records; nothing was written",
                        bar.position()
                    ));
                    return Err(Failure::Interrupted.into());
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    let Sink { stats, trace, .. } = sink;
    if let Some(trace) = trace {
        trace.finish()?;
    }
    let hashes: BTreeSet<String> = corpora.iter().map(|corpus| corpus.sha256.clone()).collect();
    Ok(Document::new(
        PROFILE,
        Some(engine.model_id().clone()),
        stats.profile(hashes),
    ))
}

/// Where routing events go.
struct Sink<'a, 'w> {
    stats: RoutingStats,
    trace: Option<TraceWriter<'a, &'w mut dyn Write>>,
    /// Tokens from this position on are decode
    prompt_end: usize,
    /// The first failure to write; events come from where none can be returned
    error: Option<io::Error>,
}

impl Sink<'_, '_> {
    fn begin_document(&mut self, domain: &str, prompt_tokens: usize) -> io::Result<()> {
        self.prompt_end = prompt_tokens;
        self.stats.begin_document(domain);
        match &mut self.trace {
            Some(trace) => trace.push(&Event::Document {
                domain: domain.into(),
            }),
            None => Ok(()),
        }
    }

    fn record(&mut self, layer: usize, first_position: usize, routing: &Routing) {
        let phase = if first_position < self.prompt_end {
            Phase::Prefill
        } else {
            Phase::Decode
        };
        self.stats
            .record(phase, layer, &routing.topk_ids, &routing.topk_weights);
        if let (Some(trace), None) = (&mut self.trace, &self.error) {
            let event = Event::Picks(Picks {
                phase,
                layer: layer as u16,
                first_position: first_position as u32,
                topk_ids: routing.topk_ids.clone(),
                topk_weights: routing
                    .topk_weights
                    .iter()
                    .map(|&w| f16::from_f32(w))
                    .collect(),
            });
            self.error = trace.push(&event).err();
        }
    }
}

/// One record through the model; false if interrupted.
fn feed(
    engine: &mut Engine,
    record: &Record,
    settings: &Settings,
    interrupt: &AtomicBool,
    sink: &mut Sink<'_, '_>,
) -> anyhow::Result<bool> {
    let mut ids = engine.text().encode_content(&record.content)?;
    ids.truncate(settings.ctx);
    if ids.is_empty() {
        return Ok(true);
    }
    let new_tokens = match record.content {
        Content::Text(_) => 0,
        Content::Prompt(_) | Content::Messages(_) => settings.generate,
    };
    let limit = engine.config().max_position_embeddings;
    engine.reset((ids.len() + new_tokens).min(limit))?;
    sink.begin_document(&record.domain, ids.len())?;
    let mut on_routing = |layer: usize, first: usize, routing: &Routing| {
        sink.record(layer, first, routing);
    };
    let done = if new_tokens == 0 {
        let proceed = &mut |_| !interrupt.load(Ordering::Relaxed);
        engine.prefill(&ids, &mut on_routing, proceed)?.is_some()
    } else {
        let options = GenerateOptions {
            max_new_tokens: new_tokens,
            sampling: SamplingParams::from(&engine.text().generation_config),
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: 0,
        };
        let mut observer = Observer {
            on_text: &mut |_| {},
            on_prefill: &mut |_| {},
            on_routing: &mut on_routing,
        };
        let generation = engine.generate(&ids, &options, interrupt, &mut observer)?;
        generation.finish_reason != FinishReason::Interrupted
    };
    match sink.error.take() {
        Some(error) => Err(error.into()),
        None => Ok(done),
    }
}

/// The sum of several profiles of one model.
fn merge(paths: &[PathBuf]) -> anyhow::Result<Document<ProfileBody>> {
    let mut paths = paths.iter();
    let first = paths.next().expect("clap asks for two at least");
    let mut sum = read(first)?;
    for path in paths {
        let next = read(path)?;
        if let Some(model) = &sum.model {
            next.check_model(path, model)?;
        }
        sum.body = sum
            .body
            .merge(&next.body)
            .with_context(|| format!("merging {}", path.display()))?;
    }
    Ok(Document::new(PROFILE, sum.model, sum.body))
}

/// A profile whose counts are consistent.
pub(super) fn read(path: &Path) -> anyhow::Result<Document<ProfileBody>> {
    let profile = Document::<ProfileBody>::read(path, PROFILE)?;
    profile
        .body
        .check()
        .with_context(|| path.display().to_string())?;
    Ok(profile)
}

/// What a person wants to know first.
fn summary(profile: &ProfileBody) -> String {
    let (prefill, decode) = (
        profile.tokens(Phase::Prefill),
        profile.tokens(Phase::Decode),
    );
    let mut out = format!(
        "{} documents, {prefill} tokens of prefill, {decode} of decode, {} domains\n\n\
         layer  entropy  gini   reuse  LRU hits at 12.5% / 25% / 50% of {} experts",
        profile.documents(),
        profile.domains.len(),
        profile.num_experts
    );
    for (i, layer) in profile.layers.iter().enumerate() {
        let at = |share: usize| {
            let slots = profile.num_experts * share / 8;
            100.0
                * layer
                    .lru_hit_rate_by_slots
                    .get(slots)
                    .copied()
                    .unwrap_or(0.0)
        };
        out += &format!(
            "\n{i:5}  {:7.2}  {:.3}  {:5.1}%  {:5.1}% {:5.1}% {:5.1}%",
            layer.entropy_bits,
            layer.gini,
            100.0 * layer.consecutive_token_reuse,
            at(1),
            at(2),
            at(4)
        );
    }
    out
}
