//! The command line: one line per verb, and settings from the environment and files.

mod settings;
pub mod values;

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::backend::KvDtype;
use crate::backend::cpu::CpuPrecision;
use crate::commands::{
    bench, check, completions, doctor, plan, profile, pull, quantize, report, run, serve, synth,
};
use crate::engine::{BackendChoice, GpuOptions, Residency};
use crate::planning::execution::PrefillSettings;
use crate::planning::units::{parse_budget, parse_tokens};
use crate::planning::{PolicyConfig, Precision};
use values::whole_from_1;

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

/// Where output goes and how much of it.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Print the result as one JSON object
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no progress and no notes
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more about what is done
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// Which model, computed by what.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model folder, org/name[@revision] on the Hugging Face hub, synth:SHAPE[?layers=4&...] for
    /// random weights (see `moectl synth`), or `tiny` [default: tiny]
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<std::ffi::OsString>,
}

/// What computes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Compute")]
pub struct ComputeArgs {
    /// What computes: auto (the fastest there is), cuda[:N] (a GPU, the CPU beside it), cpu (SIMD
    /// kernels) or reference (f32, slow)
    #[arg(long, value_name = "NAME", default_value_t)]
    pub backend: BackendChoice,
    /// Worker threads [default: all cores the process may use]
    #[arg(short, long, value_name = "N", value_parser = whole_from_1)]
    pub threads: Option<usize>,
    /// Arithmetic of NF4 weights on the CPU [default: int16]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub cpu_precision: Option<CpuPrecisionArg>,
    /// Type of the cache of keys and values: f32, f16 or int8 [default: the placement's on a GPU, or
    /// f16; else f32]
    ///
    /// int8 keeps one f16 scale per 32 values. The reference backend has f32 only, a GPU the others.
    #[arg(long, visible_alias = "kv", value_name = "TYPE")]
    pub kv_dtype: Option<KvDtype>,
    /// GPU memory that the process may hold, CUDA context included [default: all that is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    pub vram: Option<u64>,
    /// RAM that the process may take; a model that needs more is refused [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    pub ram: Option<u64>,
    /// Keep all experts in RAM: the CPU computes them, the GPU the rest
    #[arg(long)]
    pub cpu_moe: bool,
    /// Placement of experts from `moectl plan`: what is in VRAM at first, and the policy that
    /// changes it [default: as many as fit, the same number in every layer, unchanging]
    #[arg(long, value_name = "FILE")]
    pub placement: Option<PathBuf>,
    /// Policy of the expert cache instead of the placement's, such as static, lru or lfu_decay
    #[arg(long, value_name = "NAME", conflicts_with = "cpu_moe")]
    pub policy: Option<PolicyConfig>,
    /// Of 1, 2, .. missing experts of a layer, how many the GPU reads over PCIe
    #[arg(long, value_name = "N,...", value_delimiter = ',', hide = true)]
    pub gpu_reads: Vec<i32>,
    #[command(flatten)]
    pub prefill: PrefillArgs,
}

/// How a GPU computes prompts.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Compute")]
pub struct PrefillArgs {
    /// Matrix products of prompts on a GPU: auto (the fastest that keeps the quality bar, now f16), f16
    /// (one f16 term each) or exact (two, as exact as f32)
    ///
    /// Sums are f32 in both. `bench` prints the KL divergence to the reference beside each speed.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub precision: Precision,
    /// Tokens of a prompt that a GPU computes at once, at most [default: what moves the fewest bytes,
    /// up to 16k]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    pub prefill_chunk: Option<u64>,
}

impl PrefillArgs {
    pub fn settings(&self) -> PrefillSettings {
        PrefillSettings {
            precision: self.precision,
            chunk_tokens: self.prefill_chunk.map(|tokens| tokens as usize),
            ..PrefillSettings::default()
        }
    }
}

/// Where the expert cache goes on.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Compute")]
pub struct CacheArgs {
    /// Keeps what is in the expert slots from one run to the next: read if it is there, written at
    /// the end, also after Ctrl-C
    #[arg(long, value_name = "FILE")]
    pub cache_state: Option<PathBuf>,
}

impl ComputeArgs {
    /// What the flags say of the GPU.
    pub fn gpu(&self) -> GpuOptions {
        GpuOptions {
            vram_bytes: self.vram,
            residency: match self.cpu_moe {
                true => Residency::Nothing,
                false => Residency::Fill,
            },
            split: (!self.gpu_reads.is_empty())
                .then(|| [0].iter().chain(&self.gpu_reads).copied().collect()),
            prefill: self.prefill.settings(),
            ..GpuOptions::default()
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CpuPrecisionArg {
    /// Exactly dequantised weights
    F32,
    /// 14 to 16-bit weights, 14 to 18-bit activations: 0.001 to 0.007% error
    #[default]
    Int16,
    /// 8-bit weights and activations: 1% error, for slow cores beside fast memory
    Int8,
}

impl From<CpuPrecisionArg> for CpuPrecision {
    fn from(precision: CpuPrecisionArg) -> Self {
        match precision {
            CpuPrecisionArg::F32 => CpuPrecision::F32,
            CpuPrecisionArg::Int16 => CpuPrecision::Int16,
            CpuPrecisionArg::Int8 => CpuPrecision::Int8,
        }
    }
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
