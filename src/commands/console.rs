//! What a person sees beside the result: notes and progress on stderr, or nothing.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::cli::OutputArgs;

/// The way to the user, as `--json`, `-q` and `-v` ask for it.
pub struct Console {
    pub json: bool,
    pub quiet: bool,
    pub verbose: bool,
}

impl Console {
    pub fn new(args: &OutputArgs) -> Self {
        Console {
            json: args.json,
            quiet: args.quiet,
            verbose: args.verbose,
        }
    }

    /// A line on stderr, unless `-q`.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// A line on stderr with `-v`.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbose {
            eprintln!("{}", text.as_ref());
        }
    }

    /// The result, on stdout.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn result(&self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{}", text.as_ref())
    }

    /// The result as one JSON object, on stdout.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn result_json(&self, value: &impl Serialize) -> io::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, value)?;
        writeln!(out)
    }

    /// A progress bar over `len` units, drawn on a terminal only.
    pub fn progress(&self, what: &'static str, len: u64, unit: Unit) -> ProgressBar {
        let hidden = self.quiet || !io::stderr().is_terminal();
        let target = if hidden {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(len), target);
        let template = match unit {
            Unit::Tokens => "{msg:10} {bar:32} {pos}/{len} tokens  {per_sec}  {eta} left",
            Unit::Bytes => "{msg:10} {bar:32} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
            Unit::Runs => "{msg:10} {bar:32} {pos}/{len} runs, {elapsed}  {prefix}",
        };
        let style = ProgressStyle::with_template(template).expect("the templates are valid");
        bar.set_style(style.progress_chars("━╸─"));
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// What a progress bar counts.
#[derive(Clone, Copy, Debug)]
pub enum Unit {
    Tokens,
    Bytes,
    Runs,
}
