//! From run records to what people read: statistics, charts, Markdown, HTML and CSV.
//!
//! A leaf: takes records and numbers, knows no model and no engine.

pub mod charts;
pub mod ci;
pub mod comparable;
pub mod comparison;
mod content;
pub mod doctor;
pub mod font;
pub mod html;
pub mod markdown;
pub mod metrics;
pub mod names;
pub mod rank;
pub mod record;
pub mod served;
pub mod stats;
pub mod svg;
pub mod tables;
pub mod terms;
pub mod units;
pub mod verdict;
mod watched;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::formats::atomic;

pub use charts::{BudgetCurve, Chart, DomainMaps, RouterPicks};
pub use doctor::doctor_report;
pub use record::RunBody;
pub use verdict::{Outcome, Rule, Verdict};

/// One run.json with what its envelope says.
#[derive(Clone, Debug)]
pub struct Run {
    /// Short, for legends and columns: the file's stem or a label.
    pub name: String,
    /// Model id and revision.
    pub model: String,
    /// SHA-256 of its config and tensors, if it is known.
    pub fingerprint: Option<String>,
    /// RFC 3339, UTC.
    pub created: String,
    pub body: RunBody,
}

/// What a report is made from.
#[derive(Clone, Debug, Default)]
pub struct ReportInputs {
    pub title: String,
    /// The first is what the others are compared with.
    pub runs: Vec<Run>,
    /// Of a profile, with the experts of a placement if there is one.
    pub router: Option<RouterPicks>,
    /// Of the same profile, domain by domain.
    pub domains: Option<DomainMaps>,
    /// Of a placement: what other budgets would give.
    pub budget: Option<BudgetCurve>,
    /// Of each later run against the first, where that was asked for.
    pub verdicts: Vec<Verdict>,
}

#[derive(Debug, Error)]
pub enum ReportError {
    #[error("nothing to report: no run, profile or placement was given")]
    Empty,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("chart `{name}`: {reason}")]
    Chart { name: String, reason: String },
    #[error("table of samples: {0}")]
    Csv(#[from] csv::Error),
}

impl Run {
    /// Whether the run could hold anything there: a CPU has no VRAM, whatever was planned.
    pub fn has_tier(&self, tier: record::Tier) -> bool {
        tier != record::Tier::Vram || self.body.labels.executed_on.contains("cuda")
    }

    /// `2025-11-23` of the time stamp.
    pub fn day(&self) -> &str {
        self.created.get(..10).unwrap_or(&self.created)
    }
}

impl ReportInputs {
    pub fn is_synthetic(&self) -> bool {
        let router = self.router.as_ref().is_some_and(|r| r.synthetic);
        let budget = self.budget.as_ref().is_some_and(|b| b.synthetic);
        router || budget || self.runs.iter().any(|run| run.body.labels.synthetic)
    }

    /// Every chart there is data for.
    pub fn charts(&self) -> Vec<Chart> {
        let mut charts = charts::of_runs(&self.runs);
        charts.extend(self.budget.as_ref().and_then(charts::budget));
        charts.extend(self.router.as_ref().and_then(charts::heatmap));
        charts.extend(self.domains.as_ref().and_then(charts::domains));
        charts
    }
}

/// Writes report.md, report.html, the CSV files and each chart as SVG and PNG into `folder`.
///
/// The folder is made if it is missing. Each file appears whole or not at all; returned are their
/// paths, the two documents first.
///
/// # Errors
/// [`ReportError`]: nothing to report, or a file that cannot be written.
pub fn write_report(inputs: &ReportInputs, folder: &Path) -> Result<Vec<PathBuf>, ReportError> {
    let charts = inputs.charts();
    if inputs.runs.is_empty() && charts.is_empty() {
        return Err(ReportError::Empty);
    }
    let mut files = Files::in_folder(folder)?;
    files.write("report.html", html::render(inputs, &charts).as_bytes())?;
    files.write("report.md", markdown::render(inputs, &charts).as_bytes())?;
    if !inputs.runs.is_empty() {
        files.write("summary.csv", &tables::summary(&inputs.runs)?)?;
        files.write("samples.csv", &tables::samples(&inputs.runs)?)?;
        if inputs.runs.iter().any(|run| run.body.monitor.is_some()) {
            files.write("monitor.csv", &tables::monitor(&inputs.runs)?)?;
        }
        if inputs.runs.iter().any(|run| run.body.endpoint.is_some()) {
            files.write("requests.csv", &tables::requests(&inputs.runs)?)?;
        }
    }
    for chart in &charts {
        let png = chart.png().map_err(|reason| ReportError::Chart {
            name: chart.name.clone(),
            reason,
        })?;
        files.write(&format!("{}.svg", chart.name), chart.svg.as_bytes())?;
        files.write(&format!("{}.png", chart.name), &png)?;
    }
    Ok(files.written)
}

struct Files<'a> {
    folder: &'a Path,
    written: Vec<PathBuf>,
}

impl<'a> Files<'a> {
    /// Makes the folder if it is missing.
    fn in_folder(folder: &'a Path) -> Result<Self, ReportError> {
        std::fs::create_dir_all(folder).map_err(|source| ReportError::Io {
            path: folder.to_path_buf(),
            source,
        })?;
        Ok(Files {
            folder,
            written: Vec::new(),
        })
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), ReportError> {
        let path = self.folder.join(name);
        atomic::write(&path, bytes).map_err(|source| ReportError::Io {
            path: path.clone(),
            source,
        })?;
        self.written.push(path);
        Ok(())
    }
}
