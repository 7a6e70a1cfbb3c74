//! `moectl bench`: measure what the plan predicts.

mod contenders;
mod gpu;
mod measure;
mod predict;
mod quality;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use sha2::{Digest, Sha256};

use contenders::{Contenders, Rival};
use predict::Situation;

use super::console::Console;
use super::machine::{self, HardwareChoice, this_machine};
use super::plan;
use super::profile::{self, Settings as ProfileSettings};
use super::{Failure, cache_state, check_output, load, report, workloads};
use crate::cli::{CacheArgs, ComputeArgs, ModelArgs};
use crate::engine::Engine;
use crate::formats::Document;
use crate::formats::corpus::Corpus;
use crate::formats::document::{PLACEMENT, RUN};
use crate::hardware::{HardwareBody, Monitor, probe};
use crate::model::Source;
use crate::planning::footprint::{Footprint, KvDtype};
use crate::planning::hardware::Hardware;
use crate::planning::placement::Placement;
use crate::planning::planner::{PlanRequest, RoutingSource};
use crate::planning::profile::ProfileBody;
use crate::planning::units::parse_tokens;
use crate::planning::{TraceReader, placement};
use crate::report::record::{
    Continuation, Labels, MemoryComponent, MemoryRecord, RunBody, Settings, SoftwareFacts, Tier,
};

/// Measure throughput, latency and memory on real text
///
/// Without a placement it does the whole round: profiles the model on the built-in workloads,
/// plans for the budget, runs the asked contexts, and draws the report. Every repetition's raw
/// samples go to run.json.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl bench
  moectl bench --model org/name --ctx 4k,32k --placement placement.json
  moectl bench corpus.jsonl --ctx 8k -n 128 --repetitions 10 -o results
  moectl bench corpus.jsonl --ctx 8k --continuation text
  moectl bench --placement placement.json --against static,none")]
pub struct BenchArgs {
    /// Corpus the prompts are cut from [default: the built-in long documents]
    #[arg(value_name = "CORPUS.jsonl")]
    corpus: Option<PathBuf>,
    /// Contexts to measure: prompt and generated tokens together (32k = 32768)
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', value_parser = parse_tokens,
          default_value = "512,2k")]
    ctx: Vec<u64>,
    /// Tokens to generate per repetition
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32)]
    max_tokens: usize,
    /// What decode is fed: the tokens it sampled, or the next ones of the corpus [default: text for
    /// synthetic weights, else sampled]
    ///
    /// Each step computes its logits and samples from them either way. What synthetic weights sample
    /// is noise, and so is the routing of it.
    #[arg(long, value_name = "WHICH")]
    continuation: Option<Feed>,
    /// Counted repetitions per context
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Repetitions before those, not counted
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmups: usize,
    /// Machine to plan and predict with: laptop-4090, h100, or a hardware.json of `moectl doctor
    /// --measure -o` [default: the known one most like this, with the RAM measured in this run]
    #[arg(long, value_name = "NAME|FILE")]
    hardware: Option<HardwareChoice>,
    /// Held-out tokens to compare with the reference backend on; 0 skips it
    #[arg(long, value_name = "N", default_value_t = 512)]
    quality_tokens: usize,
    /// Also measure these policies, by turns on the same loaded model: static, lru, .., or none for no
    /// expert in VRAM; their reports go to folders of these names in the output folder
    #[arg(
        long,
        value_name = "POLICY,...",
        value_delimiter = ',',
        conflicts_with_all = ["cache_state", "cpu_moe"]
    )]
    against: Vec<Rival>,
    /// Folder for run.json, tables and charts
    #[arg(short, long, value_name = "FOLDER", default_value = "bench-out")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Feed {
    Sampled,
    Text,
}

/// Records of each built-in corpus, and tokens of each record, that the quick profile reads.
const PROFILE_RECORDS: usize = 8;
const PROFILE_TOKENS: usize = 256;

pub fn execute(args: BenchArgs, console: &Console) -> anyhow::Result<()> {
    check(&args)?;
    let source = Source::resolve_os(args.model.model.as_deref())?;
    let config = source.config()?;
    let longest = args
        .ctx
        .iter()
        .copied()
        .max()
        .expect("clap gives one at least");
    let room = (longest as usize)
        .max(PROFILE_TOKENS)
        .min(config.max_position_embeddings);
    if longest as usize > config.max_position_embeddings {
        let limit = config.max_position_embeddings;
        return Err(Failure::Usage(format!(
            "context of {longest} tokens, the model's limit is {limit}; lower --ctx"
        ))
        .into());
    }
    let given = (args.hardware.as_ref())
        .map(HardwareChoice::load)
        .transpose()?;
    std::fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    let run_path = args.output.join("run.json");
    check_output(&run_path)?;

    let corpus = match &args.corpus {
        Some(path) => Corpus::open(path)?,
        None => workloads::by_name(workloads::LONG).expect("is built in")?,
    };
    let cache_file = args.cache.cache_state.as_deref();
    let mut outline = load::outline(&source, &args.compute, cache_file, console)?;
    let mut engine = load::engine(&source, &args.compute, &mut outline, room, console)?;
    let footprint = outline.footprint;
    let mut hardware = HardwareBody::detect();
    let facts = engine.backend();
    let executed_on = match facts.gpu() {
        Some(_) => format!("{} + cpu", facts.name),
        None => facts.name.clone(),
    };
    console.note(format!(
        "{} on {}, by {executed_on}",
        source.id(),
        hardware.summary()
    ));

    let (placement, profile) = match outline.placement {
        Some(placement) => (placement, None),
        None => {
            let (placement, profile) =
                plan_here(&args, &given, &mut engine, &footprint, longest, console)?;
            (placement, Some(profile))
        }
    };

    if profile.is_some() {
        let placement = &placement.body;
        load::place(&mut engine, &args.compute, placement, cache_file, console)?;
    }
    let monitor = Monitor::start(Duration::from_millis(200), gpu::watched(&engine));
    let plan = args.measure_plan(config.synthetic);
    let mut contenders = Contenders::new(&engine, &placement.body, &args.compute, &args.against)?;
    let contexts = measure::contexts(&mut engine, &corpus, &plan, &mut contenders, console);
    cache_state::save(cache_file, &engine, console)?;
    let contexts = contexts?;
    let monitor = monitor.stop();
    for reason in (0..contenders.len()).filter_map(|i| contenders.stopped(i)) {
        console.note(format!("note: {reason}"));
    }
    if console.verbose {
        let times = engine.kernel_times()?;
        let list = |times: &[(&str, f64)]| {
            let lines = times.iter().map(|(name, us)| format!("{name} {us:.0} us"));
            lines.collect::<Vec<_>>().join(", ")
        };
        console.detail(format!("kernels of a step: {}", list(&times.decode_us)));
        console.detail(format!(
            "kernels of a chunk of {} tokens: {}",
            times.prefill_tokens,
            list(&times.prefill_us)
        ));
    }
    // Not before: its buffer would count as the model's memory.
    let threads = engine.backend().threads;
    hardware.dram = probe::dram_read(&hardware.cpu, &hardware.memory, threads);
    let machine = match facts.gpu() {
        Some(_) => Some(given.unwrap_or_else(|| machine::with_gpu(&hardware))),
        None => given
            .map(|machine| Hardware {
                gpu: None,
                ..machine
            })
            .or_else(|| this_machine(&hardware)),
    };
    let quality = match args.quality_tokens {
        0 => None,
        _ if engine.backend().name == "reference" => None,
        tokens => Some(quality::against_reference(
            &mut engine,
            &source,
            tokens,
            console,
        )?),
    };

    let mut written = Vec::new();
    for (i, mut contexts) in contexts.into_iter().enumerate() {
        let flags = contenders.flags(i);
        let situation = match facts.gpu() {
            Some(_) => predict::situation(flags, &placement.body),
            None => Situation::on_cpu(footprint.num_layers),
        };
        for context in &mut contexts {
            let tokens = context.context_tokens;
            context.bytes_read_per_token = engine.decode_read_bytes(tokens);
            context.prediction = (machine.as_ref())
                .map(|m| predict::predict(&footprint, m, tokens as u64, &situation));
            context.compare_prediction();
        }
        let mut memory = memory(&placement.body, &monitor);
        if gpu::by_the_plan(&engine, flags, &placement.body) {
            memory.compare_vram();
        }
        let body = RunBody {
            labels: Labels {
                synthetic: config.synthetic,
                executed_on: executed_on.clone(),
                notes: notes(&engine, contenders.notes(i, &engine)),
            },
            hardware: hardware.clone(),
            software: software(&engine),
            settings: Settings {
                warmups: args.warmups,
                repetitions: args.repetitions,
                generated_tokens: args.max_tokens,
                corpus: corpus.name().into(),
                corpus_sha256: Some(corpus.sha256.clone()),
                continuation: plan.continuation,
                command: std::env::args().collect::<Vec<_>>().join(" "),
            },
            placement_sha256: Some(hash_json(&placement.body)?),
            contexts,
            memory,
            quality: quality.clone().filter(|_| i == 0),
            monitor: Some(monitor.clone()).filter(|_| i == 0),
        };
        let document = Document::new(RUN, Some(engine.model_id().clone()), body);
        let folder = match contenders.name(i) {
            None => args.output.clone(),
            Some(rival) => args.output.join(rival),
        };
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        document.write(&folder.join("run.json"))?;
        let files = report::of_bench(&folder, &document, profile.as_ref(), &placement)?;
        written.push((document, report::list(&folder, &files)));
    }
    if console.json {
        match &written[..] {
            [(document, _)] => console.result_json(document)?,
            all => console.result_json(&all.iter().map(|(d, _)| d).collect::<Vec<_>>())?,
        }
        return Ok(());
    }
    if let Some(label) = written.first().and_then(|(document, _)| document.label()) {
        console.result(label)?;
    }
    for (i, (document, files)) in written.iter().enumerate() {
        if let Some(rival) = contenders.name(i) {
            console.result(format!("\nagainst {rival}"))?;
        }
        console.result(table::render(&document.body))?;
        console.result(files)?;
    }
    Ok(())
}

impl BenchArgs {
    fn measure_plan(&self, synthetic: bool) -> measure::MeasurePlan {
        let mut contexts: Vec<usize> = self.ctx.iter().map(|&ctx| ctx as usize).collect();
        contexts.sort_unstable();
        contexts.dedup();
        measure::MeasurePlan {
            contexts,
            generated_tokens: self.max_tokens,
            continuation: match self.continuation {
                Some(Feed::Sampled) => Continuation::Sampled,
                Some(Feed::Text) => Continuation::Text,
                None if synthetic => Continuation::Text,
                None => Continuation::Sampled,
            },
            warmups: self.warmups,
            repetitions: self.repetitions,
        }
    }
}

fn check(args: &BenchArgs) -> anyhow::Result<()> {
    if args.repetitions == 0 {
        return Err(
            Failure::Usage("--repetitions 0 measures nothing; give 1 or more".into()).into(),
        );
    }
    if args.max_tokens < 2 {
        let reason = "-n below 2 has no time between tokens; give 2 or more";
        return Err(Failure::Usage(reason.into()).into());
    }
    match args
        .ctx
        .iter()
        .find(|&&ctx| ctx as usize <= args.max_tokens)
    {
        Some(ctx) => Err(Failure::Usage(format!(
            "context of {ctx} tokens leaves no prompt beside {} generated ones; raise --ctx or \
             lower -n",
            args.max_tokens
        ))
        .into()),
        None => Ok(()),
    }
}

/// A quick profile on the built-in workloads and a plan from it, both kept beside the run.
fn plan_here(
    args: &BenchArgs,
    given: &Option<Hardware>,
    engine: &mut Engine,
    footprint: &Footprint,
    ctx: u64,
    console: &Console,
) -> anyhow::Result<(Document<Placement>, Document<ProfileBody>)> {
    let corpora = workloads::all()?;
    let settings = ProfileSettings::quick(PROFILE_RECORDS, PROFILE_TOKENS);
    let mut events = Vec::new();
    let profile = profile::record(
        engine,
        &corpora,
        &settings,
        None,
        Some(&mut events),
        console,
    )?;
    profile.write(&args.output.join("profile.json"))?;
    let (trace, _) = TraceReader::new(events.as_slice())?.read_all()?;
    let hardware = given.clone().unwrap_or_else(machine::like_this);
    let footprint = &gpu::measured(footprint, engine);
    let kv = args.compute.kv_dtype.map_or(KvDtype::F16, load::planned_kv);
    let held = engine.vram_held().unwrap_or_default();
    let vram_budget_bytes = args.compute.vram.unwrap_or_else(|| {
        // What the model holds already is not free, but the plan's to give.
        let free = plan::default_budget(footprint, ctx, kv);
        free + engine.vram_bytes().unwrap_or(0)
    });
    let mut placement = plan::make(&PlanRequest {
        footprint,
        hardware: &hardware,
        // The engine leaves this much free below any budget.
        vram_budget_bytes: vram_budget_bytes.saturating_sub(held.margin_bytes),
        ram_budget_bytes: None,
        ctx_tokens: ctx,
        kv_dtypes: &[kv],
        heads: &[placement::Tier::Vram],
        policy: None,
        routing: RoutingSource::Trace(&trace),
        prefill: args.compute.prefill.settings(),
    })?;
    placement.vram_budget_bytes = vram_budget_bytes;
    let placement = Document::new(PLACEMENT, Some(engine.model_id().clone()), placement);
    placement.write(&args.output.join("placement.json"))?;
    console.note(plan::describe(&placement.body));
    Ok((placement, profile))
}

fn memory(placement: &Placement, monitor: &crate::hardware::MonitorRecord) -> MemoryRecord {
    let tier = |tier| match tier {
        placement::Tier::Vram => Tier::Vram,
        placement::Tier::Ram => Tier::Ram,
        placement::Tier::Disk => Tier::Disk,
    };
    let components = placement.memory.iter().map(|item| MemoryComponent {
        component: item.component.clone(),
        tier: tier(item.tier),
        bytes: item.bytes,
    });
    MemoryRecord {
        components: components.collect(),
        vram_budget_bytes: Some(placement.vram_budget_bytes),
        peak_rss_bytes: monitor.peak_rss_bytes,
        peak_vram_bytes: monitor.peak_vram_bytes,
        vram_prediction_error: None,
    }
}

fn notes(engine: &Engine, mut notes: Vec<String>) -> Vec<String> {
    if engine.backend().gpu().is_some() {
        return notes;
    }
    notes.push(
        "executed on the CPU: the placement's VRAM part is planned, not used, and predictions are \
         for this CPU"
            .into(),
    );
    notes
}

fn software(engine: &Engine) -> SoftwareFacts {
    let backend = engine.backend();
    SoftwareFacts {
        moectl_version: env!("CARGO_PKG_VERSION").into(),
        features: [("tiny-moe", cfg!(feature = "tiny-moe"))]
            .iter()
            .filter(|(_, on)| *on)
            .map(|(name, _)| name.to_string())
            .collect(),
        target: env!("MOECTL_TARGET").into(),
        rustc_version: env!("MOECTL_RUSTC").into(),
        backend: backend.name,
        kernels: backend.kernels,
        threads: backend.threads,
    }
}

fn hash_json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(format!("{:x}", Sha256::digest(serde_json::to_vec(value)?)))
}
