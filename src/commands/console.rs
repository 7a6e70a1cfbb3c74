//! What a person sees beside the result: notes and progress on stderr, or nothing.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::commands::args::OutputArgs;

/// The way to the user, as `--json`, `-q` and `-v` ask for it.
#[derive(Clone)]
pub struct Console {
    pub json: bool,
    pub quiet: bool,
    pub verbose: bool,
    /// A file was asked for on standard output
    stdout_taken: Arc<AtomicBool>,
}

impl Console {
    pub fn new(args: &OutputArgs) -> Self {
        Console {
            json: args.json,
            quiet: args.quiet,
            verbose: args.verbose,
            stdout_taken: Arc::default(),
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

    /// Leaves stdout to a file that goes there: tables go to stderr, `--json` prints nothing more.
    pub fn keep_stdout_free(&self) {
        self.stdout_taken.store(true, Ordering::Relaxed);
    }

    /// The result, on stdout.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn result(&self, text: impl AsRef<str>) -> io::Result<()> {
        if self.stdout_taken.load(Ordering::Relaxed) {
            self.note(text);
            return Ok(());
        }
        writeln!(io::stdout().lock(), "{}", text.as_ref())
    }

    /// The result as a person reads it: on a terminal, lines are broken at its width.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn table(&self, text: impl AsRef<str>) -> io::Result<()> {
        match Term::stdout().size_checked() {
            Some((_, columns)) => self.result(wrapped(text.as_ref(), usize::from(columns))),
            None => self.result(text),
        }
    }

    /// The result as one JSON object, on stdout.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn result_json(&self, value: &impl Serialize) -> io::Result<()> {
        if self.stdout_taken.load(Ordering::Relaxed) {
            return Ok(());
        }
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

/// `text` with lines of at most `columns`, broken at spaces. What goes on in the next line stands under
/// the second column of a table, or two further than its line begins.
fn wrapped(text: &str, columns: usize) -> String {
    let mut out = Vec::new();
    for line in text.lines() {
        let indent = hanging_indent(line).min(columns / 2);
        let mut rest = line.to_owned();
        while rest.chars().count() > columns {
            let end = rest
                .char_indices()
                .nth(columns + 1)
                .map_or(rest.len(), |(at, _)| at);
            // Never in the indentation of the line itself.
            let from = rest.len() - rest.trim_start().len();
            let Some(at) = rest[from..end].rfind(' ').map(|at| from + at) else {
                break;
            };
            out.push(rest[..at].trim_end().to_owned());
            rest = " ".repeat(indent) + rest[at..].trim_start();
        }
        out.push(rest);
    }
    out.join("\n")
}

/// Where the second column of `line` begins, if it has several; else two after its first letter.
fn hanging_indent(line: &str) -> usize {
    let start = line.chars().take_while(|c| *c == ' ').count();
    let label: String = line.chars().skip(start).collect();
    match label.split_once("  ") {
        Some((label, rest)) => {
            let gap = rest.chars().take_while(|c| *c == ' ').count();
            start + label.chars().count() + 2 + gap
        }
        None => start + 2,
    }
}

#[cfg(test)]
mod tests {
    use super::wrapped;

    #[test]
    fn long_lines_go_on_under_their_column() {
        let table = "cores         2 usable, 2 allowed\nplain\n  one two three four five six";
        let expected = [
            "cores         2 usable, 2",
            "            allowed",
            "plain",
            "  one two three four five",
            "    six",
        ];
        assert_eq!(wrapped(table, 25), expected.join("\n"));
        assert_eq!(wrapped(table, 80), table);
        let unbroken = "a".repeat(30);
        assert_eq!(wrapped(&unbroken, 25), unbroken);
    }
}
