//! `moectl profile`: what does the router pick on this text?

mod progress;
mod record;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::console::Console;
use super::flags::{self, GpuFlags};
use super::output::OutputFile;
use super::{check_output, load, workloads};
use crate::commands::args::{ComputeArgs, ModelArgs};
use crate::commands::values::whole;
use crate::formats::corpus::Corpus;
use crate::formats::document::PROFILE;
use crate::formats::{Document, atomic};
use crate::model::Source;
use crate::planning::Phase;
use crate::planning::profile::ProfileBody;
use crate::planning::units::parse_tokens;

use progress::{Identity, Progress, TraceSink};

pub(super) use record::record;

/// Record what the router picks on a corpus
///
/// Reads JSON lines with `text`, `prompt` or `messages` (and optional `id`, `domain`), feeds them
/// through the model and counts, per layer and expert, what the router picks: in prefill and,
/// with --generate, in decode. Profiles of parts of a corpus merge to exactly that of the whole.
///
/// What is done is kept beside the output (*.partial); after an interruption, a crash or a power
/// cut the same command goes on from there.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl profile corpus.jsonl -o profile.json
  moectl profile corpus.jsonl --generate 128 --trace corpus.trace
  moectl profile corpus.jsonl --shard 1/4 -o part1.json
  moectl profile --merge part1.json part2.json -o profile.json
  zcat corpus.jsonl.gz | moectl profile - -o profile.json")]
pub struct ProfileArgs {
    /// Corpus files, - for standard input [default: the built-in workloads]
    #[arg(value_name = "CORPUS.jsonl")]
    corpora: Vec<PathBuf>,
    /// Where the profile goes; - is standard output [default: profile.json]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also write every routing event to this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Tokens to generate after each prompt or conversation
    #[arg(long, value_name = "N", value_parser = whole, default_value_t = 0)]
    generate: usize,
    /// Most tokens of a record; longer ones are cut (32k = 32768)
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS",
          value_parser = parse_tokens, default_value = "4k")]
    ctx: u64,
    /// Only every n-th record, starting with the i-th
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Add up these profiles instead of reading a corpus
    #[arg(long, value_name = "FILE", num_args = 2.., conflicts_with_all = ["corpora", "trace", "shard"])]
    merge: Vec<PathBuf>,
    /// Seconds between two savings of what is done
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    save_every: u64,
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

/// Runs `moectl profile`.
///
/// # Errors
/// Bad flags, a model or corpus that cannot be read, the engine's, files that cannot be written.
pub fn execute(args: ProfileArgs, console: &Console) -> anyhow::Result<()> {
    let output = OutputFile::new(args.output.clone(), "profile.json", console)?;
    let mut progress = None;
    let document = if args.merge.is_empty() {
        if let Some(trace) = &args.trace {
            check_output(trace)?;
            if atomic::is_stdout(trace) {
                console.keep_stdout_free();
            }
        }
        flags::check(&args.compute, GpuFlags::Place, console)?;
        let source = Source::resolve_os(args.model.model.as_deref())?;
        let corpora = open_corpora(&args.corpora)?;
        let notes = corpora.iter().flat_map(Corpus::notes);
        notes.for_each(|note| console.note(note));
        let limit = source.config()?.max_position_embeddings;
        let room = (args.ctx as usize + args.generate).min(limit);
        let mut outline = load::outline(&source, &args.compute, None, console)?;
        let mut engine = load::engine(&source, &args.compute, &mut outline, room, console)?;
        let settings = Settings {
            ctx: args.ctx as usize,
            generate: args.generate,
            shard: args.shard.unwrap_or(Shard { index: 1, count: 1 }),
            max_records: usize::MAX,
        };
        let backend = engine.backend();
        let identity = Identity {
            corpora: corpora.iter().map(|c| c.sha256.clone()).collect(),
            ctx_tokens: settings.ctx,
            generated_tokens: settings.generate,
            shard: [settings.shard.index, settings.shard.count],
            trace: args.trace.is_some(),
            backend: format!("{} {}", backend.name, backend.kernels.unwrap_or_default()),
        };
        let every = Duration::from_secs(args.save_every);
        let kept = Progress::open(output.path(), engine.model_id(), identity, every, console)?;
        let kept = progress.insert(kept);
        let mut trace = args.trace.as_deref();
        let mut trace = trace.take().map(|path| kept.open_trace(path)).transpose()?;
        let sink = trace.as_mut().map(|trace| trace as &mut dyn TraceSink);
        record(&mut engine, &corpora, &settings, Some(kept), sink, console)?
    } else {
        merge(&args.merge)?
    };
    output.write(&document, console)?;
    if let Some(progress) = progress {
        progress.finish(args.trace.as_deref())?;
    }
    if console.json {
        console.result_json(&document)?;
    } else {
        if let Some(label) = document.label() {
            console.result(label)?;
        }
        console.table(summary(&document.body))?;
    }
    Ok(())
}

/// What [`record()`] needs to know beside the corpora.
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
