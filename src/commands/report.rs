//! `moectl report`: runs and profiles to tables and charts.

use std::path::{Path, PathBuf};

use clap::Args;

use super::console::Console;
use super::output::prepare_folder;
use super::plan::budget_curve;
use super::{Failure, profile};
use crate::formats::Document;
use crate::formats::document::{PLACEMENT, RUN};
use crate::planning::placement::Placement;
use crate::planning::profile::{DomainProfile, ProfileBody};
use crate::report::charts::DomainPicks;
use crate::report::comparable::{Aspect, differences};
use crate::report::record::RunBody;
use crate::report::{
    BudgetCurve, DomainMaps, Outcome, ReportInputs, RouterPicks, Rule, Run, Verdict, ci, names,
    write_report,
};

/// Turn run and profile files into tables and charts
///
/// Writes report.html, report.md, CSV files, and each chart as SVG and PNG. With several runs the
/// first is what the others are compared with; --fail-above makes a slowdown an error, for CI.
///
/// A run fails if at any context the median of decode, prefill, time to first token or p99 latency is
/// worse by more than PERCENT and a rank test excludes noise (p < 0.00125; with too few samples for
/// that the median alone decides, but for p99), if a context or a figure is missing, if peak memory rises by more
/// than PERCENT, perplexity by 0.1%, mean KL by PERCENT and 1e-5 nats, or if other tokens are
/// generated (exit 3). It is undecided, which is no pass, if it is that much worse and may be noise
/// (exit 1). Runs that were not measured alike are refused (exit 2); --allow-different says
/// which differences are meant. On a machine with a changing load, `moectl bench --against-binary`
/// measures both interleaved.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl report bench-out/run.json -o report
  moectl report run.json --profile profile.json --placement placement.json
  moectl report --placement placement.json -o report
  moectl report baseline.json run.json --fail-above 5% --ci ci
  moectl report f16.json int8.json --fail-above 5% --allow-different output")]
pub struct ReportArgs {
    /// run.json files; the first is the baseline of the others
    #[arg(value_name = "run.json", required_unless_present_any = ["profile", "placement"])]
    runs: Vec<PathBuf>,
    /// Profile to draw the router's picks from, in all and by domain
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Placement: its experts are outlined in the picture of the profile, and its budget is drawn
    /// beside others
    #[arg(long, value_name = "FILE")]
    placement: Option<PathBuf>,
    /// Exit with 3 if a later run is worse than the first by more than this share
    #[arg(long, value_name = "PERCENT", value_parser = parse_share)]
    fail_above: Option<f64>,
    /// Compare although these differ: model, machine, backend, threads, corpus, continuation,
    /// generated-tokens, budget, contexts, output
    #[arg(
        long,
        value_name = "NAME,...",
        value_delimiter = ',',
        requires = "fail_above"
    )]
    allow_different: Vec<Aspect>,
    /// Also write the results for CI to this folder: summary.md, verdict.json, junit.xml,
    /// github-action-benchmark and Bencher JSON, OpenMetrics
    #[arg(long, value_name = "FOLDER")]
    ci: Option<PathBuf>,
    /// Folder of the report
    #[arg(short, long, value_name = "FOLDER", default_value = "report")]
    output: PathBuf,
}

/// `5%` or `5` to 0.05.
pub(super) fn parse_share(text: &str) -> Result<f64, String> {
    let number = text.trim_end_matches('%').parse::<f64>().ok();
    number
        .filter(|percent| *percent >= 0.0 && percent.is_finite())
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "expected a percentage such as 5%".into())
}

/// Runs `moectl report`.
///
/// # Errors
/// Runs that cannot be read or compared, files that cannot be written; a regression has an exit
/// code of its own.
pub fn execute(args: ReportArgs, console: &Console) -> anyhow::Result<()> {
    let read = |path: &PathBuf| -> anyhow::Result<_> {
        Ok((path.clone(), Document::<RunBody>::read(path, RUN)?))
    };
    let documents = args
        .runs
        .iter()
        .map(read)
        .collect::<anyhow::Result<Vec<_>>>()?;
    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    let placement = args
        .placement
        .as_deref()
        .map(|path| Document::<Placement>::read(path, PLACEMENT))
        .transpose()?;
    if let (Some(profile), Some(placement), Some(path)) = (&profile, &placement, &args.placement)
        && let Some(model) = &profile.model
    {
        placement.check_model(path, model)?;
    }
    let paths: Vec<&Path> = args.runs.iter().map(PathBuf::as_path).collect();
    let names = names::distinguishing(&paths);
    let runs: Vec<Run> = (names.iter().zip(&documents))
        .map(|(name, (_, run))| named(name, run))
        .collect();
    let verdicts = match args.fail_above {
        Some(threshold) => judge(
            &runs,
            &Rule {
                threshold,
                paired: false,
                allowed: args.allow_different.clone(),
            },
        )?,
        None => Vec::new(),
    };
    let inputs = ReportInputs {
        title: "moectl report".into(),
        runs,
        router: profile
            .as_ref()
            .map(|profile| router(profile, placement.as_ref().map(|p| &p.body))),
        domains: profile.as_ref().map(domains),
        budget: placement.as_ref().map(budget),
        verdicts,
    };
    prepare_folder(&args.output, &["report.html", "report.md"], console)?;
    let mut files = write_report(&inputs, &args.output)?;
    if let Some(folder) = &args.ci {
        files.extend(ci::write(&inputs, folder)?);
    }
    tell(console, &inputs.verdicts, &args.output, &files)?;
    conclude(&inputs.verdicts)
}

fn tell(
    console: &Console,
    verdicts: &[Verdict],
    folder: &Path,
    files: &[PathBuf],
) -> anyhow::Result<()> {
    if console.json {
        console.result_json(&serde_json::json!({ "files": files, "verdicts": verdicts }))?;
        return Ok(());
    }
    for verdict in verdicts {
        console.result(verdict.to_string())?;
    }
    if !console.quiet {
        console.result(list(folder, files))?;
    }
    Ok(())
}

/// Holds later runs against the first.
///
/// # Errors
/// If there is nothing to compare, or what was not measured alike.
fn judge(runs: &[Run], rule: &Rule) -> anyhow::Result<Vec<Verdict>> {
    let (base, later) = match runs.split_first() {
        Some((base, later)) if !later.is_empty() => (base, later),
        _ => {
            let reason = format!(
                "--fail-above compares a run with the first, and {} was given; give a baseline and a run",
                match runs.len() {
                    0 => "none",
                    _ => "only one",
                }
            );
            return Err(Failure::Usage(reason).into());
        }
    };
    for run in later {
        refuse_unlike(base, run, &rule.allowed)?;
    }
    Ok(later.iter().map(|run| rule.judge(base, run)).collect())
}

/// # Errors
/// Names what differs and was not allowed to.
pub(super) fn refuse_unlike(base: &Run, run: &Run, allowed: &[Aspect]) -> anyhow::Result<()> {
    let mut found = differences(base, run);
    found.retain(|difference| !allowed.contains(&difference.aspect));
    if found.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = found.iter().map(|d| d.aspect.name()).collect();
    let lines: Vec<String> = found.iter().map(|d| format!("\n  {d}")).collect();
    Err(Failure::Usage(format!(
        "{} and {} were not measured alike:{}\nmeasure both alike, or say that this is meant with \
         --allow-different {}",
        base.name,
        run.name,
        lines.concat(),
        names.join(",")
    ))
    .into())
}

/// # Errors
/// Unless every verdict is a pass.
pub(super) fn conclude(verdicts: &[Verdict]) -> anyhow::Result<()> {
    let lines = |outcome| {
        let these = verdicts.iter().filter(move |v| v.outcome == outcome);
        let each = |v: &Verdict| {
            format!(
                "\n  {}: {}",
                v.new,
                v.reasons.join(&format!("\n  {}: ", v.new))
            )
        };
        these.map(each).collect::<String>()
    };
    match verdicts.iter().map(|v| v.outcome).max() {
        Some(Outcome::Fail) => Err(Failure::Regression(format!(
            "worse than {}:{}",
            verdicts[0].base,
            lines(Outcome::Fail)
        ))
        .into()),
        Some(Outcome::Undecided) => Err(anyhow::anyhow!(
            "undecided whether it is worse than {}:{}",
            verdicts[0].base,
            lines(Outcome::Undecided)
        )),
        _ => Ok(()),
    }
}

/// The report of one bench: tables and charts into `folder`.
pub(super) fn of_bench(
    folder: &Path,
    run: &Document<RunBody>,
    profile: Option<&Document<ProfileBody>>,
    placement: &Document<Placement>,
) -> anyhow::Result<Vec<PathBuf>> {
    // What other budgets would give says nothing of a CPU.
    let gpu = run.body.memory.peak_vram_bytes.is_some();
    let inputs = ReportInputs {
        title: "moectl bench".into(),
        runs: vec![named("this run", run)],
        router: profile.map(|profile| router(profile, Some(&placement.body))),
        domains: profile.map(domains),
        budget: gpu.then(|| budget(placement)),
        verdicts: Vec::new(),
    };
    Ok(write_report(&inputs, folder)?)
}

/// The report of a server: as [`of_bench`], without what is known of a model here alone.
pub(super) fn of_endpoint(folder: &Path, run: &Document<RunBody>) -> anyhow::Result<Vec<PathBuf>> {
    let inputs = ReportInputs {
        title: "moectl bench".into(),
        runs: vec![named("this run", run)],
        ..ReportInputs::default()
    };
    Ok(write_report(&inputs, folder)?)
}

/// Where the files are.
pub(super) fn list(folder: &Path, files: &[PathBuf]) -> String {
    let names = files.iter().filter_map(|file| file.file_name()?.to_str());
    format!(
        "wrote to {}: {}",
        folder.display(),
        names.collect::<Vec<_>>().join(", ")
    )
}

pub(super) fn named(name: &str, run: &Document<RunBody>) -> Run {
    Run {
        name: name.into(),
        model: run
            .model
            .as_ref()
            .map_or(String::new(), |model| model.id.clone()),
        fingerprint: run
            .model
            .as_ref()
            .and_then(|model| model.fingerprint.clone()),
        created: run.created.clone(),
        body: run.body.clone(),
    }
}

fn router(profile: &Document<ProfileBody>, placement: Option<&Placement>) -> RouterPicks {
    let body = &profile.body;
    RouterPicks {
        picks: (0..body.num_layers)
            .map(|layer| body.total(layer).picks)
            .collect(),
        planned: placement.map_or(Vec::new(), |placement| {
            let layers = 0..placement.layers.len();
            layers
                .map(|layer| placement.planned_experts(layer).collect())
                .collect()
        }),
        footnote: footnote(profile),
        synthetic: profile.model.as_ref().is_some_and(|model| model.synthetic),
    }
}

/// What a profile was made of, below its pictures.
fn footnote(profile: &Document<ProfileBody>) -> String {
    let body = &profile.body;
    let model = profile.model.as_ref().map_or("", |model| model.id.as_str());
    format!(
        "model {model}; {} documents of {} domains; {}",
        body.documents(),
        body.domains.len(),
        profile.created
    )
}

fn domains(profile: &Document<ProfileBody>) -> DomainMaps {
    let body = &profile.body;
    let of_domain = |(name, domain): (&String, &DomainProfile)| DomainPicks {
        name: match name.is_empty() {
            true => "(no domain)".into(),
            false => name.clone(),
        },
        tokens: domain.prefill.tokens + domain.decode.tokens,
        picks: (0..body.num_layers)
            .map(|layer| domain.picks(layer, body.num_experts))
            .collect(),
    };
    DomainMaps {
        domains: body.domains.iter().map(of_domain).collect(),
        footnote: footnote(profile),
        synthetic: profile.model.as_ref().is_some_and(|model| model.synthetic),
    }
}

fn budget(placement: &Document<Placement>) -> BudgetCurve {
    budget_curve(placement, &placement.body.budget_curve)
}
