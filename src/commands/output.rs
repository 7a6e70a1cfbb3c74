//! The files that a verb writes, and what its user is told of them.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::console::Console;
use super::{Failure, check_output};
use crate::formats::Document;
use crate::formats::atomic::{self, Written};

/// The file that a verb writes: the one that the user names, or the verb's own.
pub struct OutputFile {
    path: PathBuf,
    named: bool,
}

impl OutputFile {
    /// `given` by the user, or else `default`; checked for whether it can be written.
    ///
    /// If it is standard output, results go elsewhere from now on ([`Console::keep_stdout_free`]).
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(given: Option<PathBuf>, default: &str, console: &Console) -> anyhow::Result<Self> {
        let output = OutputFile {
            named: given.is_some(),
            path: given.unwrap_or_else(|| default.into()),
        };
        check_output(&output.path)?;
        if output.is_stdout() {
            console.keep_stdout_free();
        }
        Ok(output)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_stdout(&self) -> bool {
        atomic::is_stdout(&self.path)
    }

    /// Writes the document and says so.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write<T: Serialize>(
        &self,
        document: &Document<T>,
        console: &Console,
    ) -> anyhow::Result<()> {
        let written = document.write(&self.path)?;
        tell(&self.path, written, self.named, console);
        Ok(())
    }
}

/// Says that `path` was written; if it replaced a file that the user did not name, that too.
pub fn tell(path: &Path, written: Written, named: bool, console: &Console) {
    match written {
        Written::Replaced if !named => console.note(format!(
            "wrote {}, replacing the file that was there (-o names another place)",
            path.display()
        )),
        Written::New | Written::Replaced => console.note(format!("wrote {}", path.display())),
        Written::Streamed => {}
    }
}

/// Makes the folder that a verb writes its files to; says which of an earlier run they replace.
///
/// - `names`: of files that tell an earlier run
///
/// # Errors
/// If `folder` is no folder, or cannot be made or written to.
pub fn prepare_folder(folder: &Path, names: &[&str], console: &Console) -> anyhow::Result<()> {
    if atomic::is_stdout(folder) {
        let way_out = "-o - : several files are written, expected a folder";
        return Err(Failure::Usage(way_out.into()).into());
    }
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for name in names {
        check_output(&folder.join(name))?;
    }
    let replaced: Vec<&str> = (names.iter().copied())
        .filter(|name| folder.join(name).exists())
        .collect();
    if !replaced.is_empty() {
        console.note(format!(
            "note: {}: replacing {} of an earlier run (-o names another folder)",
            folder.display(),
            replaced.join(", ")
        ));
    }
    Ok(())
}
