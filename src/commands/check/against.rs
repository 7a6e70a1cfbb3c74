//! A checkpoint computed by another program beside us.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::super::Failure;
use super::super::console::Console;
use crate::model::Source;

/// Part of the program, so that it is there wherever the program is.
const COMPARE: &str = include_str!("../../../scripts/compare_transformers.py");

/// Runs scripts/compare_transformers.py on the model's folder; what it prints is the result.
///
/// # Errors
/// If the model has no folder, Python cannot be run, the comparison cannot be made, or the two differ.
pub fn transformers(
    source: &Source,
    python: Option<&Path>,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(folder) = source.folder()? else {
        let way_out = "has no folder that transformers could read; write one with `moectl synth`";
        return Err(Failure::Usage(format!("{}: {way_out}", source.id())).into());
    };
    let python = python.unwrap_or(Path::new("python3"));
    let mut script = tempfile::Builder::new()
        .prefix("compare_transformers-")
        .suffix(".py")
        .tempfile()?;
    script.write_all(COMPARE.as_bytes())?;
    let mut command = Command::new(python);
    command
        .arg(script.path())
        .arg(&folder)
        .arg("--moectl")
        .arg(std::env::current_exe()?);
    if console.json {
        // The record is on standard output; the table is for people.
        command.stdout(std::io::stderr());
    }
    let status = command.status().with_context(|| {
        format!(
            "{}: cannot be run; --python names another",
            python.display()
        )
    })?;
    match status.code() {
        Some(0) => Ok(()),
        Some(1) => anyhow::bail!("{}: moectl and transformers differ", source.id()),
        _ => anyhow::bail!("{}: the comparison could not be made", source.id()),
    }
}
