//! `moectl report`: runs and profiles to tables and charts.

use std::path::{Path, PathBuf};

use clap::Args;

use super::console::Console;
use crate::formats::Document;
use crate::planning::placement::Placement;
use crate::planning::profile::ProfileBody;
use crate::report::record::RunBody;

/// Turn run and profile files into tables and charts
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// run.json files
    runs: Vec<PathBuf>,
}

pub fn execute(_args: ReportArgs, _console: &Console) -> anyhow::Result<()> {
    Ok(())
}

pub(super) fn print_table(_run: &Document<RunBody>) -> String {
    String::new()
}

pub(super) fn write_charts(
    _folder: &Path,
    _runs: &[Document<RunBody>],
    _profile: Option<&ProfileBody>,
    _placement: Option<&Placement>,
) -> anyhow::Result<Vec<PathBuf>> {
    Ok(Vec::new())
}
