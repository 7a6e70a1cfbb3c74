//! The verbs: flags and flow of each. Results go to stdout, everything else to stderr.

// Docs of flags are help texts, whose brackets are no links.
#![allow(rustdoc::broken_intra_doc_links)]

pub mod args;
pub mod bench;
pub mod check;
pub mod completions;
pub mod console;
pub mod doctor;
pub mod plan;
pub mod profile;
pub mod pull;
pub mod quantize;
pub mod report;
pub mod run;
pub mod serve;
pub mod synth;

mod cache_state;
mod checkpoint_folder;
mod flags;
mod interrupt;
mod load;
mod machine;
mod output;
mod ram;
pub mod values;
mod workloads;

use std::path::Path;
use std::process::ExitCode;

use thiserror::Error;

use crate::backend::{DecodeTimes, LayerPicks};
use crate::formats::atomic;
use crate::model::ModelConfig;
use crate::report::record::ExpertCounts;

/// Ends of a verb that have an exit code of their own; any other error is 1.
#[derive(Debug, Error)]
pub enum Failure {
    /// 2: the flags contradict each other or the input
    #[error("{0}")]
    Usage(String),
    /// 3: slower than the baseline allows
    #[error("{0}")]
    Regression(String),
    /// 4: the budget cannot hold it
    #[error("{0}")]
    DoesNotFit(String),
    /// 130: Ctrl-C; what there was has been printed
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            Failure::Regression(_) => 3,
            Failure::DoesNotFit(_) => 4,
            Failure::Interrupted => 130,
        }
    }
}

/// The exit code an error stands for, after telling the user.
pub fn report_error(error: &anyhow::Error) -> ExitCode {
    // A reader that closed the pipe has seen enough.
    let broken_pipe = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if broken_pipe {
        return ExitCode::SUCCESS;
    }
    match error.downcast_ref::<Failure>() {
        Some(failure) => {
            if !matches!(failure, Failure::Interrupted) {
                eprintln!("error: {failure}");
            }
            ExitCode::from(failure.exit_code())
        }
        None => {
            eprintln!("error: {}", message(error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes in one line; typed errors often quote their cause already.
fn message(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |message, cause| {
        let cause = cause.to_string();
        match message.contains(&cause) {
            true => message,
            false if message.is_empty() => cause,
            false => format!("{message}: {cause}"),
        }
    })
}

/// Finds out before the work starts whether its result can be written.
fn check_output(path: &Path) -> anyhow::Result<()> {
    atomic::check_writable(path)
        .map_err(|e| anyhow::anyhow!("{}: cannot be written: {e}", path.display()))
}

/// The experts of a run: of its decode steps, if a GPU took part, else the CPU computed all
/// `accesses`.
fn expert_counts(times: Option<&DecodeTimes>, accesses: u64, num_layers: usize) -> ExpertCounts {
    let Some(times) = times else {
        return ExpertCounts {
            misses: accesses,
            cpu_share_by_layer: vec![1.0; num_layers],
            ..ExpertCounts::default()
        };
    };
    ExpertCounts {
        hits: times.experts_vram,
        misses: times.experts_cpu + times.experts_pcie,
        promotions: times.promotions,
        moved_bytes: times.promoted_bytes,
        h2d_bytes: times.h2d_bytes,
        cpu_share_by_layer: times.layers.iter().map(LayerPicks::cpu_share).collect(),
    }
}

/// Refuses a context that the model cannot have.
fn check_context(config: &ModelConfig, ctx: u64) -> anyhow::Result<()> {
    let limit = config.max_position_embeddings as u64;
    if (1..=limit).contains(&ctx) {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "context of {ctx} tokens, the model takes 1 to {limit} (max_position_embeddings); \
         change --ctx"
    ))
    .into())
}
