//! `moectl synth`: a checkpoint of full shape with random weights.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::checkpoint_folder::{CheckpointFolder, Job};
use super::console::{Console, Unit};
use super::profile::{Settings, record};
use super::{Failure, interrupt, workloads};
use crate::backend::cpu::CpuPrecision;
use crate::engine::{BackendChoice, Engine, GpuOptions, LoadOptions};
use crate::formats::writer::Planned;
use crate::formats::{Bytes, FormatError};
use crate::hardware::disk;
use crate::model::source::TEXT_FILES;
use crate::model::synth::{DEFAULT_LOCALITY, Spec, Weight};
use crate::model::{ModelConfig, Source};
use crate::planning::units::{parse_budget, show_bytes};

/// Write a checkpoint with random weights, to try a machine on
///
/// The files have the names, shapes and NF4 layout of the published checkpoint, so everything but
/// the text behaves like the model itself; routing follows topics and repeated words as a trained
/// router's does. The same seed gives the same bytes. `--model synth:SHAPE?layers=4&experts=64`
/// makes such a model in memory, without files.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl synth qwen3-next-80b-a3b model-80b
  moectl synth qwen3-next-80b-a3b slice --layers 4
  moectl run --model \"synth:qwen3-next-80b-a3b?layers=4\" \"Hello\"")]
pub struct SynthArgs {
    /// qwen3-next-80b-a3b, qwen3.6-35b-a3b, qwen3-30b-a3b or tiny (the built-in model's shape)
    shape: String,
    /// Folder to write; must not exist, or be empty
    dir: PathBuf,
    /// Another seed, another model
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How much the token and the text before it decide which experts it gets; 0 is uniform
    #[arg(long, value_name = "0..1", default_value_t = DEFAULT_LOCALITY)]
    locality: f64,
    /// Largest file of the result (5GB = 5 * 10^9 bytes)
    #[arg(long, value_name = "SIZE", value_parser = parse_budget, default_value = "5GB")]
    max_shard_size: u64,
    #[command(flatten)]
    shape_args: ShapeArgs,
}

/// Declares one flag per field that may be overridden, and what a spec calls it.
macro_rules! shape_flags {
    ($($field:ident $spec:literal $help:literal,)*) => {
        #[derive(Debug, Args)]
        #[command(next_help_heading = "Shape")]
        struct ShapeArgs {
            $(#[doc = $help] #[arg(long, value_name = "N")] $field: Option<u64>,)*
        }

        impl ShapeArgs {
            /// Name in a spec and value of the flags that are given.
            fn given(&self) -> Vec<(&'static str, String)> {
                let all = [$(($spec, self.$field),)*];
                let given = all.iter().filter_map(|(name, value)| Some((*name, (*value)?)));
                given.map(|(name, value)| (name, value.to_string())).collect()
            }
        }
    };
}

shape_flags! {
    layers "layers" "Layers",
    experts "experts" "Routed experts per layer",
    experts_per_tok "experts-per-tok" "Experts that a token is sent to",
    hidden_size "hidden-size" "Width of the residual stream",
    vocab_size "vocab-size" "Rows of embedding and head",
    moe_intermediate_size "moe-intermediate-size" "Width of a routed expert",
    shared_expert_intermediate_size "shared-expert-intermediate-size" "Width of the shared expert",
    attention_heads "attention-heads" "Query heads",
    key_value_heads "key-value-heads" "Key and value heads",
    head_dim "head-dim" "Width of an attention head",
    linear_key_heads "linear-key-heads" "Key heads of the delta net",
    linear_value_heads "linear-value-heads" "Value heads of the delta net",
    linear_key_head_dim "linear-key-head-dim" "Width of a key head of the delta net",
    linear_value_head_dim "linear-value-head-dim" "Width of a value head of the delta net",
    linear_conv_kernel_dim "linear-conv-kernel-dim" "Taps of the delta net's convolution",
    full_attention_interval "full-attention-interval" "Every n-th layer has full attention",
    max_position_embeddings "max-position-embeddings" "Longest context",
}

/// What was made, and how its router behaves.
#[derive(Debug, Serialize)]
struct SynthRecord {
    synthetic: bool,
    spec: String,
    folder: PathBuf,
    layers: usize,
    experts: usize,
    experts_per_tok: usize,
    hidden_size: usize,
    bytes: u64,
    files: usize,
    seconds: f64,
    gb_s: f64,
    routing: RoutingProbe,
}

/// LRU hit rates of short texts, each from an empty cache.
#[derive(Debug, Serialize)]
struct RoutingProbe {
    /// Layers that were measured, the first ones
    layers: usize,
    documents: u64,
    tokens: u64,
    /// Tokens of a document at most
    document_tokens: usize,
    curve: Vec<HitRate>,
}

#[derive(Debug, Serialize)]
struct HitRate {
    slots: usize,
    /// Slots by experts
    share: f64,
    lru_hit_rate: f64,
}

/// Runs `moectl synth`.
///
/// # Errors
/// Bad flags, or a folder that cannot be written.
pub fn execute(args: SynthArgs, console: &Console) -> anyhow::Result<()> {
    let spec = args.spec()?;
    let config = spec.config()?;
    let source = Source::synthetic(spec.clone());
    let folder = CheckpointFolder::create(&args.dir)?;
    let interrupt = interrupt::flag();
    let started = Instant::now();
    let weights = spec.weights()?;
    let total = weights.iter().map(Weight::bytes).sum();
    check_space(folder.path(), &args.dir, total)?;

    let bar = console.progress("synth", total, Unit::Bytes);
    let written = folder.write(weights, args.max_shard_size, &mut |weight: &Weight| {
        bar.inc(weight.bytes());
        match interrupt.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    if written.is_err() && interrupt.load(Ordering::Relaxed) {
        console.note("interrupted; nothing was written");
        return Err(Failure::Interrupted.into());
    }
    let written = written?;
    for file in TEXT_FILES.into_iter().chain(["config.json"]) {
        folder.write_file(file, &source.read_required(file)?)?;
    }
    folder.finish()?;
    let seconds = started.elapsed().as_secs_f64();

    let moe = &config.shape.moe;
    let record = SynthRecord {
        synthetic: true,
        spec: spec.to_string(),
        folder: args.dir,
        layers: config.shape.num_layers(),
        experts: moe.num_experts,
        experts_per_tok: moe.num_experts_per_tok,
        hidden_size: config.shape.hidden_size,
        bytes: written.bytes,
        files: written.files,
        seconds,
        gb_s: written.bytes as f64 / 1e9 / seconds,
        routing: probe(&spec, console)?,
    };
    if console.json {
        console.result_json(&record)?;
    } else {
        console.table(describe(&record, &config))?;
    }
    Ok(())
}

impl SynthArgs {
    fn spec(&self) -> anyhow::Result<Spec> {
        let mut pairs = self.shape_args.given();
        pairs.push(("seed", self.seed.to_string()));
        pairs.push(("locality", self.locality.to_string()));
        let pairs = pairs.iter().map(|(name, value)| (*name, value.as_str()));
        Spec::new(&self.shape, pairs).map_err(|e| Failure::Usage(e.to_string()).into())
    }
}

impl Job for Weight {
    fn planned(&self) -> (Vec<Planned>, Option<(String, usize)>) {
        let tensors = self.parts.iter().map(|part| part.tensor.clone());
        (tensors.collect(), None)
    }

    fn tensors(&self) -> Result<Vec<(String, Bytes)>, FormatError> {
        let made = self.parts.iter().map(|part| {
            let mut bytes = vec![0; part.tensor.len_bytes() as usize];
            part.fill(&mut bytes);
            (part.tensor.name.clone(), bytes.into())
        });
        Ok(made.collect())
    }
}

fn check_space(place: &Path, dst: &Path, needed: u64) -> anyhow::Result<()> {
    match disk::free_bytes(place) {
        Some(free) if free < needed => anyhow::bail!(
            "{}: needs {} of disk space, {} is free; take fewer --layers or another disk",
            dst.display(),
            show_bytes(needed),
            show_bytes(free)
        ),
        _ => Ok(()),
    }
}

/// What the router does on the first tokens of the built-in texts, measured on a small model with
/// the same embeddings and routers.
fn probe(spec: &Spec, console: &Console) -> anyhow::Result<RoutingProbe> {
    const RECORDS: usize = 4;
    const TOKENS: usize = 128;
    let options = LoadOptions {
        backend: BackendChoice::Cpu,
        threads: None,
        cpu_precision: CpuPrecision::Int16,
        gpu: GpuOptions::default(),
        kv_dtype: None,
        progress: &|_, _| {},
        max_tokens: TOKENS,
    };
    let mut engine = Engine::load(&Source::synthetic(spec.probe()?), &options)?;
    let corpora = workloads::all()?;
    let settings = Settings::quick(RECORDS, TOKENS);
    let profile = record(&mut engine, &corpora, &settings, None, None, console)?.body;
    let experts = profile.num_experts;
    let layers: Vec<_> = (0..profile.num_layers).map(|l| profile.total(l)).collect();
    let picks: u64 = layers.iter().map(|l| l.stack_distance.picks()).sum();
    let mut slots = vec![experts / 8, experts / 4, experts / 2];
    slots.retain(|&n| n > 0);
    let rate = |slots: usize| {
        let hits: u64 = layers.iter().map(|l| l.stack_distance.hits(slots)).sum();
        HitRate {
            slots,
            share: slots as f64 / experts as f64,
            lru_hit_rate: hits as f64 / picks.max(1) as f64,
        }
    };
    Ok(RoutingProbe {
        layers: profile.num_layers,
        documents: profile.documents(),
        tokens: profile.domains.values().map(|d| d.prefill.tokens).sum(),
        document_tokens: TOKENS,
        curve: slots.into_iter().map(rate).collect(),
    })
}

fn describe(record: &SynthRecord, config: &ModelConfig) -> String {
    let mut out = format!(
        "{}: {} (synthetic)\n\
         {} layers, {} experts of which {} per token, hidden size {}, {} tokens\n\
         {} in {} file(s), {:.1} s, {:.2} GB/s",
        record.folder.display(),
        record.spec,
        record.layers,
        record.experts,
        record.experts_per_tok,
        record.hidden_size,
        config.shape.vocab_size,
        show_bytes(record.bytes),
        record.files,
        record.seconds,
        record.gb_s
    );
    let routing = &record.routing;
    out += &format!(
        "\nLRU hits on {} texts of at most {} tokens, each from an empty cache, measured on the \
         first {} layers:",
        routing.documents, routing.document_tokens, routing.layers
    );
    for rate in &routing.curve {
        out += &format!(
            "\n  {:5.1}% with {} of {} experts cached ({:.1}%)",
            100.0 * rate.lru_hit_rate,
            rate.slots,
            record.experts,
            100.0 * rate.share
        );
    }
    out
}
