//! `moectl bench`: measure what the plan predicts.

mod against;
mod assemble;
mod endpoint;
mod gpu;
mod measure;
mod pace;
mod parallel;
mod predict;
mod quality;
mod round;
mod table;
mod text;
mod turns;
mod variants;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use pace::parse_duration;
use variants::{Rival, Variants};

use super::console::Console;
use super::flags::{self, GpuFlags};
use super::machine::HardwareChoice;
use super::output::prepare_folder;
use super::{Failure, cache_state, check_context, load, report, workloads};
use crate::backend::executor::MOST_TENTATIVE;
use crate::commands::args::{CacheArgs, ComputeArgs, ModelArgs};
use crate::commands::values::whole;
use crate::engine::Engine;
use crate::formats::Document;
use crate::formats::corpus::Corpus;
use crate::hardware::{HardwareBody, Monitor, probe};
use crate::model::Source;
use crate::planning::hardware::Hardware;
use crate::planning::placement::Placement;
use crate::planning::profile::ProfileBody;
use crate::planning::units::parse_tokens;
use crate::report::record::{Continuation, Quality, RunBody};

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
  moectl bench --ctx 32k,128k
  moectl bench --placement placement.json --against static,none
  moectl bench --placement placement.json --ctx 4k --parallel 1,2,4
  moectl bench --against-binary old/moectl --fail-above 5%
  moectl bench --against-flags '--cpu-precision int8'
  moectl bench --endpoint http://127.0.0.1:8080 --concurrency 1,4,16")]
pub struct BenchArgs {
    /// Corpus the prompts are cut from [default: the built-in long documents]
    #[arg(value_name = "CORPUS.jsonl")]
    corpus: Option<PathBuf>,
    /// Contexts to measure: prompt and generated tokens together (32k = 32768)
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS,...", value_delimiter = ',', value_parser = parse_tokens,
          default_value = "512,2k")]
    ctx: Vec<u64>,
    /// Tokens to generate per repetition
    #[arg(short = 'n', long, value_name = "N", value_parser = whole, default_value_t = 32)]
    max_tokens: usize,
    /// What decode is fed: the tokens it sampled, or the next ones of the corpus [default: text for
    /// synthetic weights, else sampled]
    ///
    /// Each step computes its logits and samples from them either way. What synthetic weights sample
    /// is noise, and so is the routing of it.
    #[arg(long, value_name = "WHICH")]
    continuation: Option<Feed>,
    /// Counted repetitions per context [default: 10, or as many as --time-limit leaves time for]
    #[arg(short, long, value_name = "N", value_parser = whole)]
    repetitions: Option<usize>,
    /// Repetitions before those, not counted
    #[arg(long, value_name = "N", value_parser = whole, default_value_t = 1)]
    warmups: usize,
    /// Begin no repetition that would end later, dealt out by the length of contexts, each of which is
    /// measured once at least [default: 6m; none with --repetitions]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    time_limit: Option<Duration>,
    /// Go through the corpus again where it has less text than the longest context; the built-in
    /// corpus always is
    #[arg(long)]
    repeat_text: bool,
    /// Machine to plan and predict with: laptop-4090, h100, or a hardware.json of `moectl doctor
    /// --measure -o` [default: the known one most like this, with the RAM measured in this run]
    #[arg(long, value_name = "NAME|FILE")]
    hardware: Option<HardwareChoice>,
    /// Held-out tokens to compare with the reference backend on; 0 skips it
    #[arg(long, value_name = "N", value_parser = whole, default_value_t = 512)]
    quality_tokens: usize,
    /// Also measure another moectl, interleaved with this one in rounds, and this one a second time for the
    /// noise of the machine; see --fail-above
    #[arg(long, value_name = "PATH", conflicts_with_all = ["against", "cache_state"])]
    against_binary: Option<PathBuf>,
    /// Also measure with these flags added, interleaved like --against-binary, such as "--threads 1"
    #[arg(
        long,
        value_name = "FLAGS",
        allow_hyphen_values = true,
        conflicts_with_all = ["against", "cache_state"]
    )]
    against_flags: Option<String>,
    /// With --against-binary or --against-flags: exit with 3 if this one is worse by more than this share
    /// and a test of the rounds excludes noise; measure on where that is undecided
    #[arg(long, value_name = "PERCENT", value_parser = report::parse_share)]
    fail_above: Option<f64>,
    /// With --against-binary or --against-flags: also write the results for CI to this folder, as
    /// `moectl report --ci` does
    #[arg(long, value_name = "FOLDER")]
    ci: Option<PathBuf>,
    /// Also measure these policies, by turns on the same loaded model: static, lru, .., or none for no
    /// expert in VRAM; their reports go to folders of these names in the output folder
    #[arg(
        long,
        value_name = "POLICY,...",
        value_delimiter = ',',
        conflicts_with_all = ["cache_state", "cpu_moe"]
    )]
    against: Vec<Rival>,
    /// Instead of that, measure the decode of so many sequences at once, each of other text, interleaved: a
    /// table, or with --json a list
    ///
    /// Repetitions are 3 unless they are given. Slots for experts get what the sequences leave.
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u8).range(1..),
        conflicts_with_all = ["against", "against_binary", "against_flags", "cache_state", "ci"]
    )]
    parallel: Vec<u8>,
    /// With --parallel, also steps of so many consecutive tokens of one sequence that may be taken back: what
    /// it takes to check guesses
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u8).range(2..=MOST_TENTATIVE as i64),
        requires = "parallel"
    )]
    consecutive: Vec<u8>,
    /// Folder for run.json, tables and charts; json, csv or md print the result in that form instead, as
    /// llama-bench does, and leave the folder at its default
    #[arg(short, long, value_name = "FOLDER", default_value = FOLDER)]
    output: PathBuf,
    #[command(flatten)]
    endpoint: endpoint::EndpointArgs,
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
/// Where results go.
const FOLDER: &str = "bench-out";
/// Repetitions, if nothing else is asked for and there is time.
const MOST_REPETITIONS: usize = 10;
/// The same of each number of sequences.
const PARALLEL_REPETITIONS: usize = 3;
/// Of all contexts together, so that a long one ends within ten minutes with all that is around it.
const TIME_LIMIT: Duration = Duration::from_secs(6 * 60);

/// Runs `moectl bench`.
///
/// # Errors
/// Bad flags, a model or text that cannot be read, the engine's, or files that cannot be written.
pub fn execute(mut args: BenchArgs, console: &Console) -> anyhow::Result<()> {
    check(&args)?;
    let form = Form::take(&mut args);
    if let Some(url) = &args.endpoint.endpoint {
        return endpoint::execute(&args, url, form, console);
    }
    if args.against_binary.is_some() || args.against_flags.is_some() {
        if form != Form::Table {
            let reason = "-o json, csv and md print what one build does; name a folder instead";
            return Err(Failure::Usage(reason.into()).into());
        }
        return against::execute(&args, console);
    }
    flags::check(&args.compute, GpuFlags::Plan, console)?;
    let mut ready = Ready::new(&args, console)?;
    let (placement, profile) = ready.placement(&args, console)?;
    if !args.parallel.is_empty() {
        let (engine, text) = (&mut ready.engine, &ready.text.ids);
        let rows = parallel::measure(engine, text, &ready.plan, &args.cases(), console)?;
        match console.json {
            true => console.result_json(&rows)?,
            false => console.table(parallel::render(&rows))?,
        }
        return Ok(());
    }
    let monitor = Monitor::start(Duration::from_millis(200), gpu::watched(&ready.engine));
    let compute = &args.compute;
    let mut variants = Variants::new(&ready.engine, &placement.body, compute, &args.against)?;
    let measured = measure::contexts(
        &mut ready.engine,
        &ready.text.ids,
        &ready.plan,
        &mut variants,
        console,
    );
    cache_state::save(args.cache.cache_state.as_deref(), &ready.engine, console)?;
    let measured = measured?;
    let monitor = monitor.stop();
    if measured.contexts.iter().all(Vec::is_empty) {
        return Err(Failure::Interrupted.into());
    }
    for reason in (0..variants.len()).filter_map(|i| variants.stopped(i)) {
        console.note(format!("note: {reason}"));
    }
    if console.verbose && !measured.interrupted {
        kernel_times(&mut ready.engine, console)?;
        if ready.text.ids.len() >= turns::LEAST_TOKENS {
            let turns = turns::measure(&mut ready.engine, &ready.text.ids)?;
            turns.lines().iter().for_each(|line| console.detail(line));
        }
    }
    let quality = match measured.interrupted {
        true => None,
        false => ready.after(&args, console)?,
    };
    ready.notes.extend(measured.notes);
    if measured.interrupted {
        ready
            .notes
            .push("interrupted: repetitions until then".into());
    }
    let results = assemble::Results {
        args: &args,
        engine: &ready.engine,
        synthetic: ready.synthetic,
        corpus: &ready.corpus,
        plan: &ready.plan,
        footprint: &ready.outline.footprint,
        placement: &placement,
        profile: profile.as_ref(),
        machine: assemble::machine(&ready.engine, ready.given, &ready.hardware),
        hardware: ready.hardware,
        variants: &variants,
        notes: ready.notes,
        quality,
        monitor,
    };
    let written = results.write(measured.contexts)?;
    match form.file() {
        Some(name) => print_file(&args.output.join(name), console)?,
        None => print(
            &written,
            &variants,
            console.json || form == Form::Json,
            console,
        )?,
    }
    match measured.interrupted {
        true => Err(Failure::Interrupted.into()),
        false => Ok(()),
    }
}

/// A loaded model, and the text to measure it with.
struct Ready {
    source: Source,
    synthetic: bool,
    plan: measure::MeasurePlan,
    /// Machine that was named to plan and predict with
    given: Option<Hardware>,
    corpus: Corpus,
    text: text::Text,
    outline: load::Outline,
    engine: Engine,
    hardware: HardwareBody,
    /// For readers of the results
    notes: Vec<String>,
}

impl Ready {
    /// # Errors
    /// Whatever can be refused before anything is planned or measured.
    fn new(args: &BenchArgs, console: &Console) -> anyhow::Result<Self> {
        let source = Source::resolve_os(args.model.model.as_deref())?;
        let config = source.config()?;
        let plan = args.measure_plan(config.synthetic);
        let longest = plan.longest();
        check_context(&config, longest as u64)?;
        let given = (args.hardware.as_ref())
            .map(HardwareChoice::load)
            .transpose()?;
        let files = ["run.json", "profile.json", "placement.json"];
        prepare_folder(&args.output, &files, console)?;
        let corpus = match &args.corpus {
            Some(path) => Corpus::open(path)?,
            None => workloads::by_name(workloads::LONG).expect("is built in")?,
        };
        let cache_file = args.cache.cache_state.as_deref();
        let mut outline = load::outline(&source, &args.compute, cache_file, console)?;
        let room = longest
            .max(PROFILE_TOKENS)
            .min(config.max_position_embeddings);
        let engine = load::engine(&source, &args.compute, &mut outline, room, console)?;
        // What a plan needs is not spent time on if there is no text to measure with.
        let repeat = args.repeat_text || args.corpus.is_none();
        let wanted = match args.parallel.iter().max() {
            Some(&most) => longest * usize::from(most),
            None => plan.text_tokens(),
        };
        let text = text::read(&engine, &corpus, wanted, repeat)?;
        let hardware = HardwareBody::detect();
        console.note(format!(
            "{} on {}, by {}",
            source.id(),
            hardware.summary(),
            assemble::executed_on(&engine)
        ));
        let notes = text.note(&corpus).into_iter();
        let notes = notes.chain(workloads::beyond_training(&source, longest));
        let notes: Vec<String> = notes.collect();
        for note in &notes {
            console.note(format!("note: {note}"));
        }
        Ok(Ready {
            synthetic: config.synthetic,
            source,
            plan,
            given,
            corpus,
            text,
            outline,
            engine,
            hardware,
            notes,
        })
    }

    /// The placement that was given, or one that is made here from a quick profile, which then stands
    /// beside it; either is carried out.
    fn placement(
        &mut self,
        args: &BenchArgs,
        console: &Console,
    ) -> anyhow::Result<(Document<Placement>, Option<Document<ProfileBody>>)> {
        if let Some(placement) = self.outline.placement.take() {
            return Ok((placement, None));
        }
        let here = || round::machine(&self.engine, &self.hardware);
        let machine = self.given.clone().unwrap_or_else(here);
        let (placement, profile) = round::plan(
            args,
            machine,
            &mut self.engine,
            &self.outline.footprint,
            self.plan.longest() as u64,
            console,
        )?;
        let cache_file = args.cache.cache_state.as_deref();
        load::place(
            &mut self.engine,
            &args.compute,
            &placement.body,
            cache_file,
            console,
        )?;
        Ok((placement, Some(profile)))
    }

    /// What is measured of machine and model after all repetitions: the bandwidth of the RAM, whose buffer
    /// would have counted as the model's memory, and quality.
    fn after(&mut self, args: &BenchArgs, console: &Console) -> anyhow::Result<Option<Quality>> {
        let hardware = &mut self.hardware;
        let threads = self.engine.backend().threads;
        hardware.dram = probe::dram_read(&hardware.cpu, &hardware.memory, threads);
        if args.quality_tokens == 0 || self.engine.backend().name == "reference" {
            return Ok(None);
        }
        let tokens = args.quality_tokens;
        quality::against_reference(&mut self.engine, &self.source, tokens, console).map(Some)
    }
}

fn kernel_times(engine: &mut Engine, console: &Console) -> anyhow::Result<()> {
    let times = engine.kernel_times()?;
    if times.decode_us.is_empty() {
        return Ok(());
    }
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
    Ok(())
}

/// What standard output gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Table,
    Json,
    Csv,
    Markdown,
}

impl Form {
    /// The form that `-o` names in place of a folder.
    fn take(args: &mut BenchArgs) -> Self {
        let form = match args.output.to_str() {
            Some("json") => Form::Json,
            Some("csv") => Form::Csv,
            Some("md") => Form::Markdown,
            _ => return Form::Table,
        };
        args.output = FOLDER.into();
        form
    }

    /// The file of the report that is printed as it is.
    fn file(self) -> Option<&'static str> {
        match self {
            Form::Table | Form::Json => None,
            Form::Csv => Some("summary.csv"),
            Form::Markdown => Some("report.md"),
        }
    }
}

/// A file of the report, as it is.
fn print_file(path: &Path, console: &Console) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    console.result(text.trim_end())?;
    Ok(())
}

fn print(
    written: &[(Document<RunBody>, String)],
    variants: &Variants,
    json: bool,
    console: &Console,
) -> anyhow::Result<()> {
    if json {
        match written {
            [(document, _)] => console.result_json(document)?,
            all => console.result_json(&all.iter().map(|(d, _)| d).collect::<Vec<_>>())?,
        }
        return Ok(());
    }
    if let Some(label) = written.first().and_then(|(document, _)| document.label()) {
        console.result(label)?;
    }
    for (i, (document, files)) in written.iter().enumerate() {
        if let Some(rival) = variants.name(i) {
            console.result(format!("\nagainst {rival}"))?;
        }
        console.table(table::render(&document.body))?;
        if !console.quiet {
            console.result(files)?;
        }
    }
    Ok(())
}

impl BenchArgs {
    /// Of --parallel and --consecutive.
    fn cases(&self) -> Vec<parallel::Case> {
        let parallel = self.parallel.iter().map(|&n| [n, 1]);
        let consecutive = self.consecutive.iter().map(|&n| [1, n]);
        let case = |[parallel, consecutive]: [u8; 2]| parallel::Case {
            parallel: usize::from(parallel),
            consecutive: usize::from(consecutive),
        };
        parallel.chain(consecutive).map(case).collect()
    }

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
            repetitions: self.repetitions.unwrap_or(match self.parallel.is_empty() {
                true => MOST_REPETITIONS,
                false => PARALLEL_REPETITIONS,
            }),
            time_limit: match self.repetitions {
                None => Some(self.time_limit.unwrap_or(TIME_LIMIT)),
                Some(_) => self.time_limit,
            },
        }
    }
}

fn check(args: &BenchArgs) -> anyhow::Result<()> {
    if args.repetitions == Some(0) {
        return Err(
            Failure::Usage("--repetitions 0 measures nothing; give 1 or more".into()).into(),
        );
    }
    if args.fail_above.is_some() && args.against_binary.is_none() && args.against_flags.is_none() {
        let reason = "--fail-above compares with --against-binary or --against-flags, and neither was \
                      given; to compare files, use `moectl report`";
        return Err(Failure::Usage(reason.into()).into());
    }
    let most = args.consecutive.iter().max().copied().unwrap_or(1);
    let least = parallel::LEAST_STEPS * usize::from(most);
    if !args.parallel.is_empty() && args.max_tokens < least {
        return Err(Failure::Usage(format!(
            "--parallel leaves out the first steps; give -n {least} or more"
        ))
        .into());
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
