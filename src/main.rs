//! Runs the verb, prints the error, sets the exit code.

use std::process::ExitCode;

use moectl::cli::Cli;
use moectl::commands;

fn main() -> ExitCode {
    match Cli::from_process().and_then(Cli::execute) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => commands::report_error(&error),
    }
}
