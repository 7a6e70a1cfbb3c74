//! `moectl plan`: what goes where, and how fast will that be?

mod describe;
mod export;
mod sweep;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::console::Console;
use super::machine::{HERE, HardwareChoice};
use super::output::OutputFile;
use super::{Failure, check_context, profile};
use crate::commands::args::{ModelArgs, PrefillArgs};
use crate::engine::footprint::footprint;
use crate::formats::document::PLACEMENT;
use crate::formats::{Document, ModelId, input};
use crate::hardware::gpu::GpuReport;
use crate::model::Source;
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::placement::{BudgetPoint, Placement, Tier};
use crate::planning::planner::{PlanError, PlanRequest, Planner, RoutingSource, plan};
use crate::planning::policy::PolicyConfig;
use crate::planning::profile::ProfileBody;
use crate::planning::trace::RoutingTrace;
use crate::planning::units::{parse_budget, parse_tokens, show_tokens};
use crate::planning::{RoutingStats, Tail, TraceReader};

pub(super) use describe::{describe, held_out};

use describe::describe_alternatives;
use sweep::SweepRange;

/// Decide what lives where within a memory budget, and predict the speed
///
/// Reads config.json, and the checkpoint's headers where they are on this machine; the weights
/// themselves are not needed. With a profile or, better, a trace of real text the expert slots
/// follow what the router picks; without, they follow a published hit curve of another model.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl plan --vram 14G
  moectl plan --vram 14G --ctx 32k --profile profile.json
  moectl plan --model org/name --vram 14G --hardware laptop-4090 --explain
  moectl plan --vram 24G --kv int8 --trace corpus.trace -o placement.json
  moectl plan --model org/name --trace corpus.trace --sweep 8G..24G
  moectl plan --vram 14G --profile profile.json --export llama.cpp")]
pub struct PlanArgs {
    /// GPU memory for everything, CUDA context included (14G = 14 GiB, 14GB = 14 * 10^9 bytes)
    /// [default: what is free; without a GPU, the dense part and a quarter of the experts]
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    vram: Option<u64>,
    /// RAM for the experts; the rest stays on disk [default: all of them]
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    ram: Option<u64>,
    /// Context to make room for, in tokens (32k = 32768) [default: 8k, or the model's longest]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = parse_tokens)]
    ctx: Option<u64>,
    /// Sequences in GPU memory at once, each of this context: what `serve --parallel` takes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    parallel: u64,
    /// Type of the KV cache
    #[arg(long, visible_alias = "kv-dtype", value_enum, value_name = "TYPE", default_value_t = Kv::F16)]
    kv: Kv,
    /// Profile of the text to plan for
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    profile: Option<PathBuf>,
    /// Trace of the text to plan for; a part of it is held out to validate the plan
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Machine to predict for: here, laptop-4090, h100, or a hardware.json of `moectl doctor -o`;
    /// `here` measures the RAM and takes a GPU that was not measured to be like a known one
    #[arg(long, value_name = "NAME|FILE", default_value = HERE)]
    hardware: HardwareChoice,
    /// Where the output matrix goes
    #[arg(long, value_enum, value_name = "TIER", default_value_t = Head::Auto)]
    head: Head,
    /// Cache policy: static, lru, lru_pinned, lru_threshold, lfu_decay or least_stale
    /// [default: the best on the trace]
    #[arg(long, value_name = "NAME")]
    policy: Option<PolicyConfig>,
    /// Also show what other choices and the next GiB would give, and policies by slots
    #[arg(long)]
    explain: bool,
    /// Also write the curve against the budget to sweep.csv, .svg and .png beside the placement
    #[arg(long, value_name = "FROM..TO[:STEP]")]
    sweep: Option<SweepRange>,
    /// Print the plan for another engine instead of the table; eplb needs a profile or a trace
    #[arg(long, value_enum, value_name = "FORMAT")]
    export: Option<Export>,
    /// Where the placement goes; - is standard output [default: placement.json]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prefill: PrefillArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kv {
    F16,
    /// Half the memory, a little less exact
    Int8,
    /// Whichever is predicted faster
    Auto,
}

impl Kv {
    fn dtypes(self) -> &'static [KvDtype] {
        match self {
            Kv::F16 => &[KvDtype::F16],
            Kv::Int8 => &[KvDtype::Int8],
            Kv::Auto => &[KvDtype::F16, KvDtype::Int8],
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Head {
    /// Whichever is predicted faster
    Auto,
    Vram,
    Ram,
}

impl Head {
    fn tiers(self) -> &'static [Tier] {
        match self {
            Head::Auto => &[Tier::Vram, Tier::Ram],
            Head::Vram => &[Tier::Vram],
            Head::Ram => &[Tier::Ram],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Export {
    /// Command lines with --n-cpu-moe and -ot
    #[value(name = "llama.cpp")]
    LlamaCpp,
    /// device_map of transformers and accelerate
    Accelerate,
    /// Logical expert loads for SGLang and vLLM
    Eplb,
}

const DEFAULT_CONTEXT: u64 = 8192;

/// Runs `moectl plan`.
///
/// # Errors
/// Bad flags, files that cannot be read or written, a budget that nothing fits.
pub fn execute(args: PlanArgs, console: &Console) -> anyhow::Result<()> {
    let output = OutputFile::new(args.output.clone(), "placement.json", console)?;
    if args.export.is_some() && output.is_stdout() {
        return Err(Failure::Usage(
            "--export and -o - both write to standard output; name a file with -o".into(),
        )
        .into());
    }
    let source = Source::resolve_os(args.model.model.as_deref())?;
    let config = source.config()?;
    let checkpoint = source.local_checkpoint()?;
    if checkpoint.is_none() {
        console.note("note: weights are not on this machine; planned from config.json alone");
    }
    let footprint = footprint(&config, checkpoint.as_ref())?;
    let model_id = source.model_id(checkpoint.as_ref())?;
    let longest = config.max_position_embeddings as u64;
    let ctx = args.ctx.unwrap_or(DEFAULT_CONTEXT.min(longest));
    check_context(&config, ctx)?;
    let hardware = args.hardware.load()?;

    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    if let (Some(profile), Some(path)) = (&profile, &args.profile) {
        profile.check_model(path, &model_id)?;
    }
    let trace = args
        .trace
        .as_deref()
        .map(|path| read_trace(path, &model_id, console))
        .transpose()?;
    let routing = match (&profile, &trace) {
        (_, Some(trace)) => RoutingSource::Trace(trace),
        (Some(profile), None) => RoutingSource::Profile(&profile.body),
        (None, None) => RoutingSource::Unknown,
    };
    let counts = match (args.export, routing) {
        (Some(Export::Eplb), routing) => Some(counts_of(routing)?),
        _ => None,
    };
    let request = PlanRequest {
        footprint: &footprint,
        hardware: &hardware,
        vram_budget_bytes: args
            .vram
            .unwrap_or_else(|| default_budget(&footprint, ctx, args.kv.dtypes()[0])),
        ram_budget_bytes: args.ram,
        ctx_tokens: ctx,
        sequences: args.parallel,
        kv_dtypes: args.kv.dtypes(),
        heads: args.head.tiers(),
        policy: args.policy,
        routing,
        prefill: args.prefill.settings(),
    };
    let planner = Planner::new(&request).map_err(refused)?;
    let document = Document::new(PLACEMENT, Some(model_id), planner.plan().map_err(refused)?);
    output.write(&document, console)?;
    if let Some(range) = args.sweep {
        write_sweep(range, &planner, &document, output.path(), console)?;
    }
    let placement = &document.body;
    match args.export {
        Some(Export::LlamaCpp) => {
            let line = export::llama_cpp(&footprint, &hardware, placement);
            match console.json {
                true => console.result_json(&line.json())?,
                false => console.result(line.text())?,
            }
        }
        Some(Export::Accelerate) => {
            console.result_json(&export::accelerate(&config, &footprint, placement))?;
        }
        Some(Export::Eplb) => {
            let model = document.model.as_ref().expect("just given");
            let counts = counts.expect("counted above");
            console.result_json(&export::eplb(&counts, model))?;
        }
        None if console.json => console.result_json(&document)?,
        None => {
            if let Some(label) = document.label() {
                console.result(label)?;
            }
            console.table(subject(&document, &args, hardware.gpu.is_some()))?;
            console.table(describe(placement, hardware.gpu.is_some()))?;
            if args.explain {
                console.table(describe_alternatives(placement, &planner.explain()))?;
            }
        }
    }
    Ok(())
}

/// Whose plan it is, and how to ask for that of another model or machine.
fn subject(document: &Document<Placement>, args: &PlanArgs, has_gpu: bool) -> String {
    let model = document
        .model
        .as_ref()
        .map_or("", |model| model.id.as_str());
    let (of, other_model) = match args.model.model {
        None => (
            " (built in, 30M parameters)",
            "; another: --model org/name, or --model synth:qwen3-next-80b-a3b",
        ),
        Some(_) => ("", ""),
    };
    let (here, other_machine) = match args.hardware {
        HardwareChoice::Here => (
            "this one, ",
            "; another: --hardware laptop-4090, h100, or a file of `moectl doctor --measure -o`",
        ),
        _ => ("", ""),
    };
    let label = &document.body.hardware;
    let mut text =
        format!("model    {model}{of}{other_model}\nmachine  {here}{label}{other_machine}\n");
    if !has_gpu {
        text += "no GPU: everything is computed from RAM, and no budget of VRAM changes that; the \
                 placement file holds what a GPU with this budget would be given\n";
    }
    text
}

/// The picks of a profile or trace.
fn counts_of(routing: RoutingSource) -> anyhow::Result<ProfileBody> {
    match routing {
        RoutingSource::Profile(profile) => Ok(profile.clone()),
        RoutingSource::Trace(trace) => {
            let h = trace.header();
            let [layers, experts, k] =
                [h.num_layers, h.num_experts, h.num_experts_per_tok].map(usize::from);
            let mut stats = RoutingStats::new(layers, experts, k);
            trace.records().iter().for_each(|record| stats.push(record));
            Ok(stats.profile(Default::default()))
        }
        RoutingSource::Unknown => Err(Failure::Usage(
            "--export eplb exports counted picks; give --profile or --trace".into(),
        )
        .into()),
    }
}

fn write_sweep(
    range: SweepRange,
    planner: &Planner,
    document: &Document<Placement>,
    output: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let points = planner.sweep(range.budgets());
    if points.is_empty() {
        return Err(Failure::DoesNotFit(format!(
            "no budget of the sweep holds {} tokens of context; raise its end or lower --ctx",
            document.body.ctx_tokens
        ))
        .into());
    }
    let folder = output.parent().unwrap_or(Path::new(""));
    sweep::write(folder, &points, &budget_curve(document, &points), console)
}

/// The picture of a placement's surroundings.
pub(super) fn budget_curve(
    document: &Document<Placement>,
    points: &[BudgetPoint],
) -> crate::report::charts::BudgetCurve {
    let placement = &document.body;
    let model = document.model.as_ref();
    let footnote = format!(
        "model {}; predicted for {}; context {}; {}",
        model.map_or("", |model| model.id.as_str()),
        placement.hardware,
        show_tokens(placement.ctx_tokens),
        document.created
    );
    let synthetic = model.is_some_and(|model| model.synthetic);
    sweep::curve(points, placement, footnote, synthetic)
}

/// Plans; what does not fit has an exit code of its own.
pub(super) fn make(request: &PlanRequest) -> anyhow::Result<Placement> {
    plan(request).map_err(refused)
}

fn refused(error: PlanError) -> anyhow::Error {
    match error {
        PlanError::DoesNotFit { .. } | PlanError::RamDoesNotFit { .. } => {
            Failure::DoesNotFit(error.to_string()).into()
        }
        other => other.into(),
    }
}

/// Free GPU memory, or what holds the dense part and a quarter of the experts.
pub(super) fn default_budget(footprint: &Footprint, ctx: u64, kv: KvDtype) -> u64 {
    let gpus = GpuReport::detect().devices;
    gpus.first()
        .and_then(|gpu| gpu.memory_free_bytes)
        .unwrap_or_else(|| {
            let kv_bytes = ctx * footprint.kv_bytes_per_token(kv);
            footprint.fixed_vram_bytes() + kv_bytes + footprint.experts_bytes() / 4
        })
}

fn read_trace(path: &Path, model: &ModelId, console: &Console) -> anyhow::Result<RoutingTrace> {
    let context = || path.display().to_string();
    let file = input::open(path).with_context(context)?;
    let reader = TraceReader::new(std::io::BufReader::new(file)).with_context(context)?;
    let recorded = &reader.header().fingerprint;
    if model
        .fingerprint
        .as_ref()
        .is_some_and(|mine| mine != recorded)
    {
        anyhow::bail!(
            "{}: recorded with another model than `{}`",
            path.display(),
            model.id
        );
    }
    let (trace, tail) = reader.read_all().with_context(context)?;
    if let Tail::Cut {
        lost_bytes,
        lost_tokens,
    } = tail
    {
        let tokens = lost_tokens.map_or(String::new(), |n| format!(" ({n} tokens)"));
        console.note(format!(
            "note: {}: cut off; the last {lost_bytes} bytes{tokens} were not used",
            path.display()
        ));
    }
    Ok(trace)
}
