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
use crate::report::record::RunBody;
use crate::report::{
    BudgetCurve, DomainMaps, ReportInputs, RouterPicks, Run, compare, write_report,
};

/// Turn run and profile files into tables and charts
///
/// Writes report.html, report.md, CSV files, and each chart as SVG and PNG. With several runs the
/// first is what the others are compared with; --fail-above makes a slowdown an error, for CI.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl report bench-out/run.json -o report
  moectl report run.json --profile profile.json --placement placement.json
  moectl report --placement placement.json -o report
  moectl report baseline.json run.json --fail-above 5%")]
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
    /// Folder of the report
    #[arg(short, long, value_name = "FOLDER", default_value = "report")]
    output: PathBuf,
}

/// `5%` or `5` to 0.05.
fn parse_share(text: &str) -> Result<f64, String> {
    let number = text.trim_end_matches('%').parse::<f64>().ok();
    number
        .filter(|percent| *percent >= 0.0 && percent.is_finite())
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "expected a percentage such as 5%".into())
}

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
    let inputs = ReportInputs {
        title: "moectl report".into(),
        runs: documents
            .iter()
            .map(|(path, run)| named(&name_of(path), run))
            .collect(),
        router: profile
            .as_ref()
            .map(|profile| router(profile, placement.as_ref().map(|p| &p.body))),
        domains: profile.as_ref().map(domains),
        budget: placement.as_ref().map(budget),
    };
    prepare_folder(&args.output, &["report.html", "report.md"], console)?;
    let files = write_report(&inputs, &args.output)?;
    if console.json {
        console.result_json(&serde_json::json!({ "files": files }))?;
    } else {
        console.result(list(&args.output, &files))?;
    }
    match (args.fail_above, documents.split_first()) {
        (Some(threshold), Some(((_, base), later))) => fail_on_regression(base, later, threshold),
        _ => Ok(()),
    }
}

fn fail_on_regression(
    base: &Document<RunBody>,
    later: &[(PathBuf, Document<RunBody>)],
    threshold: f64,
) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for (path, run) in later {
        let worse = compare(&base.body, &run.body, threshold);
        lines.extend(
            worse
                .iter()
                .map(|regression| format!("{}: {regression}", path.display())),
        );
    }
    if lines.is_empty() {
        return Ok(());
    }
    Err(Failure::Regression(format!(
        "worse than the baseline by more than {:.1}%:\n  {}",
        100.0 * threshold,
        lines.join("\n  ")
    ))
    .into())
}

/// The report of one bench: tables and charts into `folder`.
pub(super) fn of_bench(
    folder: &Path,
    run: &Document<RunBody>,
    profile: Option<&Document<ProfileBody>>,
    placement: &Document<Placement>,
) -> anyhow::Result<Vec<PathBuf>> {
    let inputs = ReportInputs {
        title: "moectl bench".into(),
        runs: vec![named("this run", run)],
        router: profile.map(|profile| router(profile, Some(&placement.body))),
        domains: profile.map(domains),
        budget: Some(budget(placement)),
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

fn named(name: &str, run: &Document<RunBody>) -> Run {
    Run {
        name: name.into(),
        model: run
            .model
            .as_ref()
            .map_or(String::new(), |model| model.id.clone()),
        created: run.created.clone(),
        body: run.body.clone(),
    }
}

fn name_of(path: &Path) -> String {
    path.file_stem()
        .map_or(String::new(), |stem| stem.to_string_lossy().into_owned())
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
