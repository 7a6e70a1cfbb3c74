//! `moectl bench --endpoint`: the same measurement of any OpenAI-compatible server, from outside.

mod client;
mod load;
mod prompts;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::ProgressBar;

use client::Endpoint;
use load::Load;
use prompts::Prompts;

use super::{BenchArgs, Form};
use crate::commands::console::{Console, Unit};
use crate::commands::output::prepare_folder;
use crate::commands::values::whole_from_1;
use crate::commands::{Failure, interrupt, report, workloads};
use crate::formats::corpus::Corpus;
use crate::formats::document::RUN;
use crate::formats::{Document, ModelId};
use crate::hardware::HardwareBody;
use crate::planning::units::show_tokens;
use crate::report::record::{
    ContextRun, Continuation, EndpointFacts, Labels, MemoryRecord, RunBody, Settings, SoftwareFacts,
};
use crate::report::served;

/// Which server, and how many clients.
#[derive(Debug, Args)]
#[command(next_help_heading = "Endpoint")]
pub struct EndpointArgs {
    /// Measure this OpenAI-compatible server instead of a model here: moectl serve, llama-server, vLLM
    ///
    /// Streamed chat completions of text from the corpus, about --ctx tokens long with their answer, by
    /// as many clients as --concurrency says; each client sends its next request when its last is
    /// answered, --repetitions of them. No two prompts begin alike.
    #[arg(
        long,
        value_name = "URL",
        conflicts_with_all = ["against", "against_binary", "against_flags", "cache_state", "continuation", "hardware", "parallel"]
    )]
    pub endpoint: Option<String>,
    /// Clients at once, one level after the other
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = whole_from_1,
          default_value = "1,2,4,8", requires = "endpoint")]
    concurrency: Vec<usize>,
    /// What the server calls the model [default: the first it lists]
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    endpoint_model: Option<String>,
    /// File with the server's key; without one, the variable OPENAI_API_KEY is sent if it is set
    #[arg(long, value_name = "FILE", requires = "endpoint")]
    endpoint_key_file: Option<std::path::PathBuf>,
}

/// More clients than that would measure this program.
const MOST_CLIENTS: usize = 1024;

/// Measures the server at `url`, writes its records and prints them.
///
/// # Errors
/// If the server cannot be reached, or answers none of a level's requests.
pub fn execute(args: &BenchArgs, url: &str, form: Form, console: &Console) -> anyhow::Result<()> {
    let levels = concurrency(&args.endpoint.concurrency)?;
    tell_idle_flags(args, console);
    let corpus = match &args.corpus {
        Some(path) => Corpus::open(path)?,
        None => workloads::by_name(workloads::LONG).expect("is built in")?,
    };
    let most = levels.iter().copied().max().unwrap_or(1);
    let model = args.endpoint.endpoint_model.clone();
    let endpoint = Endpoint::connect(url, key(args)?, model, most)?;
    prepare_folder(&args.output, &["run.json"], console)?;
    console.note(format!("{} at {url}", endpoint.model()));
    let plan = args.measure_plan(false);
    let rounds = (plan.warmups + plan.repetitions) * levels.iter().sum::<usize>();
    let bar = console.progress("bench", (plan.contexts.len() * rounds) as u64, Unit::Runs);
    let sweep = Sweep {
        endpoint: &endpoint,
        prompts: Prompts::new(&corpus, format!("{:x}", now_ms()))?,
        levels: &levels,
        max_tokens: plan.generated_tokens,
        warmups: plan.warmups,
        repetitions: plan.repetitions,
        interrupted: interrupt::flag(),
        bar: &bar,
    };
    let mut notes = Vec::new();
    let ends = plan.time_limit.map(|limit| Instant::now() + limit);
    let mut contexts = Vec::new();
    for (i, &tokens) in plan.contexts.iter().enumerate() {
        let levels_left = (plan.contexts.len() - i) * levels.len();
        contexts.push(sweep.context(tokens, levels_left, ends, &mut notes)?);
    }
    bar.finish_and_clear();
    let interrupted = sweep.interrupted.load(Ordering::Relaxed);
    contexts.retain(|context| !served::levels(context).is_empty());
    if interrupted && contexts.is_empty() {
        return Err(Failure::Interrupted.into());
    }
    if interrupted {
        notes.push("interrupted: requests until then".into());
    }
    notes.extend(general_notes(&contexts, &endpoint));
    let document = document(args, url, &endpoint, &corpus, contexts, notes);
    document.write(&args.output.join("run.json"))?;
    let files = report::of_endpoint(&args.output, &document)?;
    print(
        &document,
        &report::list(&args.output, &files),
        form,
        args,
        console,
    )?;
    match interrupted {
        true => Err(Failure::Interrupted.into()),
        false => Ok(()),
    }
}

/// Ascending, each once.
fn concurrency(asked: &[usize]) -> anyhow::Result<Vec<usize>> {
    let mut levels = asked.to_vec();
    levels.sort_unstable();
    levels.dedup();
    match levels.last() {
        Some(&most) if most > MOST_CLIENTS => Err(Failure::Usage(format!(
            "--concurrency {most}: expected at most {MOST_CLIENTS}, each is a thread of this program"
        ))
        .into()),
        _ => Ok(levels),
    }
}

/// The server has its own model and settings.
fn tell_idle_flags(args: &BenchArgs, console: &Console) {
    let compute = &args.compute;
    let given = [
        ("--model", args.model.model.is_some()),
        ("--threads", compute.threads.is_some()),
        ("--cpu-precision", compute.cpu_precision.is_some()),
        ("--kv-dtype", compute.kv_dtype.is_some()),
        ("--vram", compute.vram.is_some()),
        ("--ram", compute.ram.is_some()),
        ("--cpu-moe", compute.cpu_moe),
        ("--placement", compute.placement.is_some()),
        ("--policy", compute.policy.is_some()),
        ("--repeat-text", args.repeat_text),
    ];
    let given: Vec<&str> = (given.iter().filter(|(_, given)| *given))
        .map(|(flag, _)| *flag)
        .collect();
    if !given.is_empty() {
        console.note(format!(
            "note: no effect on a server, which has its own model and settings: {}",
            given.join(", ")
        ));
    }
}

/// Never from the command line, which every user of the machine can read.
fn key(args: &BenchArgs) -> anyhow::Result<Option<String>> {
    let Some(path) = &args.endpoint.endpoint_key_file else {
        let key = std::env::var("OPENAI_API_KEY").ok();
        return Ok(key.filter(|key| !key.is_empty()));
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    let mut line = text.lines().map(str::trim);
    let key = line.find(|l| !l.is_empty() && !l.starts_with('#'));
    match key {
        Some(key) => Ok(Some(key.to_owned())),
        None => {
            let message = format!("{}: has no key; expected one line", path.display());
            Err(Failure::Usage(message).into())
        }
    }
}

/// All levels of all contexts.
struct Sweep<'a> {
    endpoint: &'a Endpoint,
    prompts: Prompts,
    levels: &'a [usize],
    max_tokens: usize,
    warmups: usize,
    /// Of each client
    repetitions: usize,
    interrupted: &'a AtomicBool,
    bar: &'a ProgressBar,
}

impl Sweep<'_> {
    /// - `levels_left`: this context's and those of later ones, which share the time until `ends`
    fn context(
        &self,
        tokens: usize,
        levels_left: usize,
        ends: Option<Instant>,
        notes: &mut Vec<String>,
    ) -> anyhow::Result<ContextRun> {
        let mut run = ContextRun {
            context_tokens: tokens,
            ..ContextRun::default()
        };
        if self.interrupted.load(Ordering::Relaxed) {
            return Ok(run);
        }
        let length = self.prompts.fit(self.endpoint, tokens - self.max_tokens)?;
        for (i, &concurrency) in self.levels.iter().enumerate() {
            let share = |at: Instant| {
                let left = at.saturating_duration_since(Instant::now());
                Instant::now() + left / (levels_left - i).max(1) as u32
            };
            let load = Load {
                endpoint: self.endpoint,
                prompts: &self.prompts,
                length,
                max_tokens: self.max_tokens,
                warmups: self.warmups,
                requests: self.repetitions * concurrency,
                concurrency,
                deadline: ends.map(share),
                interrupted: self.interrupted,
                bar: self.bar,
            };
            let measured = load.run();
            let level = format!(
                "context {}, {concurrency} at once",
                show_tokens(tokens as u64)
            );
            if let (0, Some(reason)) = (measured.run.requests.len(), measured.reasons.first()) {
                anyhow::bail!("{level}: every request failed: {reason}");
            }
            if measured.run.failed > 0 {
                let reasons = measured.reasons.join("; ");
                notes.push(format!(
                    "{level}: {} requests failed: {reasons}",
                    measured.run.failed
                ));
            }
            if measured.uncounted > 0 {
                notes.push(format!(
                    "{level}: the server doesn't count its tokens; events with text are counted instead"
                ));
            }
            match concurrency {
                1 => run.repetitions = measured.run.requests,
                _ => run.concurrent.push(measured.run),
            }
        }
        Ok(run)
    }
}

/// What a reader of all the figures should know.
fn general_notes(contexts: &[ContextRun], endpoint: &Endpoint) -> Vec<String> {
    let mut notes = vec![
        "measured over HTTP by its client: machine and software below are the client's".to_owned(),
    ];
    if !endpoint.ignores_eos() {
        notes.push(
            "the server doesn't take ignore_eos: answers end where the model ends them".into(),
        );
    }
    let levels = || contexts.iter().flat_map(served::levels);
    let requests = || levels().flat_map(|level| level.requests);
    let cached: usize = requests().filter_map(|request| request.cached_tokens).sum();
    let prompts: usize = requests().map(|request| request.prompt_tokens).sum();
    if cached > 0 {
        notes.push(format!(
            "the server had {:.1}% of the prompts' tokens in its prefix cache",
            100.0 * cached as f64 / prompts.max(1) as f64
        ));
    }
    let events: usize = requests().map(|request| request.itl_ms.len() + 1).sum();
    let tokens: usize = requests().map(|request| request.generated_tokens).sum();
    if events < tokens {
        notes.push(format!(
            "{tokens} tokens came in {events} events with text: times between tokens are times between \
             those"
        ));
    }
    notes
}

fn document(
    args: &BenchArgs,
    url: &str,
    endpoint: &Endpoint,
    corpus: &Corpus,
    contexts: Vec<ContextRun>,
    notes: Vec<String>,
) -> Document<RunBody> {
    let body = RunBody {
        labels: Labels {
            synthetic: false,
            executed_on: url.to_owned(),
            notes,
        },
        hardware: HardwareBody::detect(),
        software: SoftwareFacts {
            backend: "endpoint".into(),
            ..super::assemble::this_program()
        },
        settings: Settings {
            warmups: args.warmups,
            repetitions: args.measure_plan(false).repetitions,
            generated_tokens: args.max_tokens,
            corpus: corpus.name().into(),
            corpus_sha256: Some(corpus.sha256.clone()),
            continuation: Continuation::Sampled,
            command: std::env::args().collect::<Vec<_>>().join(" "),
        },
        placement_sha256: None,
        contexts,
        memory: MemoryRecord::default(),
        quality: None,
        monitor: None,
        endpoint: Some(EndpointFacts {
            url: url.to_owned(),
            server: endpoint.software.clone(),
            ignore_eos: endpoint.ignores_eos(),
        }),
    };
    let model = ModelId {
        id: endpoint.model().to_owned(),
        revision: None,
        fingerprint: None,
        config_sha256: String::new(),
        synthetic: false,
    };
    Document::new(RUN, Some(model), body)
}

fn print(
    document: &Document<RunBody>,
    files: &str,
    form: Form,
    args: &BenchArgs,
    console: &Console,
) -> anyhow::Result<()> {
    if let Some(name) = form.file() {
        return super::print_file(&args.output.join(name), console);
    }
    if console.json || form == Form::Json {
        console.result_json(document)?;
        return Ok(());
    }
    console.table(table(&document.body))?;
    for note in &document.body.labels.notes {
        console.note(format!("note: {note}"));
    }
    if !console.quiet {
        console.result(files)?;
    }
    Ok(())
}

/// One line per level.
fn table(run: &RunBody) -> String {
    let levels = run.contexts.iter().flat_map(served::levels);
    let mut rows = vec![served::HEADER.map(str::to_owned).to_vec()];
    rows.extend(levels.map(|level| served::row(&level)));
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..served::HEADER.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths);
        let cells = cells.map(|(cell, width)| format!("{cell:>width$}"));
        cells.collect::<Vec<_>>().join("  ")
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    lines.push(String::new());
    lines.push(served::EXPLANATION.to_owned());
    lines.join("\n")
}

fn now_ms() -> u128 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_millis()
}
