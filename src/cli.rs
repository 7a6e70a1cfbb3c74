//! The command line: one line per verb, and settings from the environment and files.

mod settings;

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::commands::args::OutputArgs;
use crate::commands::console::Console;
use crate::commands::{
    bench, check, completions, doctor, plan, profile, pull, quantize, report, run, serve, synth,
};

/// Runs large mixture-of-experts language models on one small GPU plus system RAM, and tells
/// beforehand how fast.
///
/// Without --model every verb uses the built-in tiny MoE: a trained 30M-parameter Qwen3-Next in
/// the same NF4 format as the 80B model.
///
/// Any flag with a value may also be set by a variable (--top-p by MOECTL_TOP_P) or in a settings
/// file (`top-p = 0.9`, at the top for every verb or under `[run]`). Flags win over variables,
/// those over ./moectl.toml, that over $XDG_CONFIG_HOME/moectl/config.toml.
///
/// Exit codes: 0 done, 1 error, 2 usage, 3 regression, 4 does not fit, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "moectl", version, max_term_width = 100)]
#[command(after_help = "\
Examples:
  moectl bench
  moectl run \"What is the meaning of the noun \\\"river\\\"?\"
  moectl plan --model org/name --vram 14G --ctx 32k")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub output: OutputArgs,
}

// The verbs' help is the page of their arguments; a doc comment here would hide it.
#[derive(Debug, Subcommand)]
pub enum Command {
    Profile(profile::ProfileArgs),
    Plan(plan::PlanArgs),
    Run(run::RunArgs),
    Serve(serve::ServeArgs),
    Bench(bench::BenchArgs),
    Report(report::ReportArgs),
    Doctor(doctor::DoctorArgs),
    Quantize(quantize::QuantizeArgs),
    /// Write a checkpoint with random weights, to try a machine on
    Synth(synth::SynthArgs),
    Pull(pull::PullArgs),
    Check(check::CheckArgs),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

impl Cli {
    /// Parses the process' arguments; prints help or usage errors and exits where clap does.
    ///
    /// # Errors
    /// A settings file that cannot be read or names what no verb has.
    pub fn from_process() -> anyhow::Result<Self> {
        let settings = settings::load(&settings_files())?;
        let command = settings::as_defaults(with_variables(Cli::command()), &settings)?;
        let matches = command.get_matches();
        Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()))
    }

    /// Runs the verb that the command line names.
    ///
    /// # Errors
    /// The verb's.
    pub fn execute(self) -> anyhow::Result<()> {
        let console = Console::new(&self.output);
        match self.command {
            Command::Profile(args) => profile::execute(args, &console),
            Command::Plan(args) => plan::execute(args, &console),
            Command::Run(args) => run::execute(args, &console),
            Command::Serve(args) => serve::execute(args, &console),
            Command::Bench(args) => bench::execute(args, &console),
            Command::Report(args) => report::execute(args, &console),
            Command::Doctor(args) => doctor::execute(args, &console),
            Command::Quantize(args) => quantize::execute(args, &console),
            Command::Synth(args) => synth::execute(args, &console),
            Command::Pull(args) => pull::execute(&args, &console),
            Command::Check(args) => check::execute(&args, &console),
            Command::Completions(args) => completions::completions(&args, Cli::command()),
            Command::Man(args) => completions::man(&args, Cli::command()),
        }
    }
}

/// Lets every flag with a value be set by a variable (`--top-p` by `MOECTL_TOP_P`), and take a negative
/// number, so that the flag's own parser says what is wrong with it.
fn with_variables(command: clap::Command) -> clap::Command {
    command.mut_subcommands(|verb| {
        verb.mut_args(|arg| match arg.get_long() {
            Some(long) if arg.get_action().takes_values() => {
                let variable = format!("MOECTL_{}", long.to_uppercase().replace('-', "_"));
                let arg = arg.env(variable).hide_env(true);
                // Sizes have units, which `-1G` needs to get as far as their parser.
                let names = arg.get_value_names().unwrap_or_default();
                let size = names
                    .iter()
                    .any(|name| ["SIZE", "TOKENS"].contains(&name.as_str()));
                arg.allow_negative_numbers(!size).allow_hyphen_values(size)
            }
            _ => arg,
        })
    })
}

/// Settings files, the strongest first.
fn settings_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("moectl.toml")];
    let config_home = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let config_home = config_home
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    files.extend(config_home.map(|folder| folder.join("moectl/config.toml")));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_well_formed() {
        Cli::command().debug_assert();
    }
}
