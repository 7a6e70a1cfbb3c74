//! `moectl plan`: what goes where, and how fast will that be?

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::console::Console;
use super::{Failure, check_context, check_output, profile};
use crate::cli::ModelArgs;
use crate::engine::footprint::footprint;
use crate::formats::document::{HARDWARE, PLACEMENT};
use crate::formats::{Document, ModelId};
use crate::hardware::gpu::GpuReport;
use crate::model::Source;
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::{Basis, Hardware};
use crate::planning::knapsack::Solution;
use crate::planning::placement::{CurveSource, Placement, Tier};
use crate::planning::planner::{Alternative, PlanError, PlanRequest, RoutingSource, explain, plan};
use crate::planning::trace::RoutingTrace;
use crate::planning::units::{parse_bytes, parse_tokens, show_bytes, show_tokens};
use crate::planning::{Tail, TraceReader};

/// Decide what lives where within a memory budget, and predict the speed
///
/// Reads config.json, and the checkpoint's headers where they are on this machine; the weights
/// themselves are not needed. With a profile or, better, a trace of real text the expert slots
/// follow what the router picks; without, every expert counts alike.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl plan --vram 14G --ctx 32k --profile profile.json
  moectl plan --model org/name --vram 14G --hardware laptop-4090 --explain
  moectl plan --vram 24G --kv int8 --trace corpus.trace -o placement.json")]
pub struct PlanArgs {
    /// GPU memory for everything, CUDA context included (14G = 14 GiB, 14GB = 14 * 10^9 bytes)
    /// [default: what is free; without a GPU, the dense part and a quarter of the experts]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    vram: Option<u64>,
    /// RAM for the experts; the rest stays on disk [default: all of them]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    ram: Option<u64>,
    /// Context to make room for, in tokens (32k = 32768) [default: 8k, or the model's longest]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    ctx: Option<u64>,
    /// Type of the KV cache
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Kv::Bf16)]
    kv: Kv,
    /// Profile of the text to plan for
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    profile: Option<PathBuf>,
    /// Trace of the text to plan for; a part of it is held out to validate the plan
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Machine to predict for: laptop-4090, h100, or a hardware.json
    #[arg(long, value_name = "NAME|FILE", default_value = "laptop-4090")]
    hardware: HardwareChoice,
    /// Also show what other choices would give
    #[arg(long)]
    explain: bool,
    /// Where the placement goes
    #[arg(short, long, value_name = "FILE", default_value = "placement.json")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kv {
    Bf16,
    Int8,
}

impl From<Kv> for KvDtype {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::Bf16 => KvDtype::Bf16,
            Kv::Int8 => KvDtype::Int8,
        }
    }
}

/// A machine by name or by file.
#[derive(Clone, Debug)]
pub enum HardwareChoice {
    Laptop4090,
    H100,
    File(PathBuf),
}

impl FromStr for HardwareChoice {
    type Err = std::convert::Infallible;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "laptop-4090" => HardwareChoice::Laptop4090,
            "h100" => HardwareChoice::H100,
            path => HardwareChoice::File(path.into()),
        })
    }
}

impl HardwareChoice {
    pub fn load(&self) -> anyhow::Result<Hardware> {
        Ok(match self {
            HardwareChoice::Laptop4090 => Hardware::laptop_4090(),
            HardwareChoice::H100 => Hardware::h100_box(),
            HardwareChoice::File(path) => Document::<Hardware>::read(path, HARDWARE)?.body,
        })
    }
}

const DEFAULT_CONTEXT: u64 = 8192;

pub fn execute(args: PlanArgs, console: &Console) -> anyhow::Result<()> {
    check_output(&args.output)?;
    let source = Source::resolve(args.model.model.as_deref())?;
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
    let request = PlanRequest {
        footprint: &footprint,
        hardware: &hardware,
        vram_budget_bytes: args
            .vram
            .unwrap_or_else(|| default_budget(&footprint, ctx, args.kv)),
        ram_budget_bytes: args.ram,
        ctx_tokens: ctx,
        kv_dtype: args.kv.into(),
        routing: match (&profile, &trace) {
            (_, Some(trace)) => RoutingSource::Trace(trace),
            (Some(profile), None) => RoutingSource::Profile(&profile.body),
            (None, None) => RoutingSource::Unknown,
        },
    };
    let placement = make(&request)?;
    let document = Document::new(PLACEMENT, Some(model_id), placement);
    document.write(&args.output)?;
    if console.json {
        console.result_json(&document)?;
    } else {
        if let Some(label) = document.label() {
            console.result(label)?;
        }
        console.result(describe(&document.body))?;
        if args.explain {
            console.result(describe_alternatives(&explain(&request)))?;
        }
        console.note(format!("wrote {}", args.output.display()));
    }
    Ok(())
}

/// Plans; what does not fit has an exit code of its own.
pub(super) fn make(request: &PlanRequest) -> anyhow::Result<Placement> {
    plan(request).map_err(|error| match error {
        PlanError::DoesNotFit { .. } | PlanError::RamDoesNotFit { .. } => {
            Failure::DoesNotFit(error.to_string()).into()
        }
        other => other.into(),
    })
}

/// Reads a placement that was made for this model.
pub(super) fn read(
    path: &Path,
    model: &ModelId,
    footprint: &Footprint,
) -> anyhow::Result<Document<Placement>> {
    let document = Document::<Placement>::read(path, PLACEMENT)?;
    document.check_model(path, model)?;
    document
        .body
        .check(footprint)
        .with_context(|| path.display().to_string())?;
    Ok(document)
}

/// Free GPU memory, or what holds the dense part and a quarter of the experts.
pub(super) fn default_budget(footprint: &Footprint, ctx: u64, kv: Kv) -> u64 {
    let gpus = GpuReport::detect().devices;
    gpus.first()
        .and_then(|gpu| gpu.memory_free_bytes)
        .unwrap_or_else(|| {
            let kv_bytes = ctx * footprint.kv_bytes_per_token(kv.into());
            footprint.fixed_vram_bytes() + kv_bytes + footprint.experts_bytes() / 4
        })
}

fn read_trace(path: &Path, model: &ModelId, console: &Console) -> anyhow::Result<RoutingTrace> {
    let context = || path.display().to_string();
    let file = std::fs::File::open(path).with_context(context)?;
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

/// The placement as a person reads it.
pub(super) fn describe(placement: &Placement) -> String {
    let mut out = String::from("component          tier        size\n");
    for item in &placement.memory {
        let tier = match item.tier {
            Tier::Vram => "VRAM",
            Tier::Ram => "RAM",
            Tier::Disk => "disk",
        };
        out += &format!(
            "{:18} {tier:5} {:>11}\n",
            item.component,
            show_bytes(item.bytes)
        );
    }
    out += &format!(
        "{:18} VRAM  {:>11} of {}\n",
        "total",
        show_bytes(placement.bytes_in(Tier::Vram)),
        show_bytes(placement.vram_budget_bytes)
    );
    let slots: Vec<usize> = placement.layers.iter().map(|layer| layer.slots).collect();
    let (least, most) = (slots.iter().min(), slots.iter().max());
    let curves = match placement.curves_from {
        CurveSource::Uniform => "no profile: every expert alike",
        CurveSource::Profile => "hit curves of the profile",
        CurveSource::Trace => "hit curves of the trace",
    };
    let Solution::Exact = placement.solution;
    out += &format!(
        "\n{} expert slots of {}: {} to {} per layer, policy {}; {curves}; solved exactly\n",
        placement.total_slots(),
        placement.num_experts * placement.layers.len(),
        least.unwrap_or(&0),
        most.unwrap_or(&0),
        placement.policy.name(),
    );
    let basis = match placement.hardware_basis {
        Basis::Measured => "measured",
        Basis::Modelled => "modelled",
    };
    out += &format!(
        "\npredicted for {} ({basis}), context {}\n",
        placement.hardware,
        show_tokens(placement.ctx_tokens)
    );
    out += &format!(
        "decode   {:8.1} tok/s   hit rate {:.1}%\n",
        placement.decode.tok_s,
        100.0 * placement.decode.expert_hit_rate
    );
    for term in &placement.decode.terms {
        out += &format!("  {:20} {:8.3} ms\n", term.name, term.ms);
    }
    out += &format!("prefill  {:8.0} tok/s", placement.prefill.tok_s);
    if let Some(validation) = &placement.validation {
        out += &format!(
            "\n\nheld out: {} documents, {} tokens\npolicy         hit rate   bytes/token\n",
            validation.held_out_documents, validation.held_out_tokens
        );
        for score in &validation.scores {
            let mark = if score.chosen { "  <- chosen" } else { "" };
            out += &format!(
                "{:14} {:7.1}%  {:>11}{mark}\n",
                score.policy,
                100.0 * score.expert_hit_rate,
                show_bytes(score.h2d_bytes_per_token as u64)
            );
        }
    }
    out.trim_end().to_string()
}

fn describe_alternatives(alternatives: &[Alternative]) -> String {
    let mut out = String::from("\nalternative             decode      slots\n");
    for alternative in alternatives {
        out += &match &alternative.plan {
            Some(plan) => format!(
                "{:20} {:7.1} tok/s {:6}\n",
                alternative.change,
                plan.decode.tok_s,
                plan.total_slots()
            ),
            None => format!("{:20} does not fit\n", alternative.change),
        };
    }
    out.trim_end().to_string()
}
