//! `moectl quantize`: bf16 to bitsandbytes NF4.

mod convert;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use clap::Args;

use super::console::{Console, Unit};
use super::{Failure, interrupt};
use crate::planning::units::{parse_budget, show_bytes};

pub use convert::{QuantizeOptions, Summary, quantize_checkpoint};

/// Write a bf16 checkpoint as bitsandbytes NF4
///
/// Byte for byte what bitsandbytes 0.50.2 makes on a CPU; transformers 4.57 loads the result.
/// Every Linear is quantised but the skipped ones; embeddings, norms and convolutions never are.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl quantize Qwen3-Next-80B-A3B-Instruct qwen3-next-nf4
  moectl quantize SRC DST --skip lm_head --max-shard-size 10GB")]
pub struct QuantizeArgs {
    /// Folder of the bf16, f16 or f32 checkpoint
    src: PathBuf,
    /// Folder to write; must not exist, or be empty
    dst: PathBuf,
    /// Modules to leave as they are, by last name or full name
    #[arg(
        long,
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = "lm_head,gate"
    )]
    skip: Vec<String>,
    /// Keep the scales in f32: 4.5 bits per weight in place of 4.127
    #[arg(long)]
    no_double_quant: bool,
    /// Largest file of the result (5GB = 5 * 10^9 bytes)
    #[arg(long, value_name = "SIZE", value_parser = parse_budget, default_value = "5GB")]
    max_shard_size: u64,
}

/// Runs `moectl quantize`.
///
/// # Errors
/// A checkpoint that cannot be read, or a folder that cannot be written.
pub fn execute(args: QuantizeArgs, console: &Console) -> anyhow::Result<()> {
    let options = QuantizeOptions {
        skip: args.skip,
        double_quant: !args.no_double_quant,
        max_shard_bytes: args.max_shard_size,
    };
    let interrupt = interrupt::flag();
    let bar = console.progress("quantise", 0, Unit::Bytes);
    let result = quantize_checkpoint(&args.src, &args.dst, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        match interrupt.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    if result.is_err() && interrupt.load(Ordering::Relaxed) {
        console.note("interrupted; nothing was written");
        return Err(Failure::Interrupted.into());
    }
    let summary = result?;
    if summary.mtp_dropped > 0 {
        let n = summary.mtp_dropped;
        console.note(format!(
            "note: left out {n} multi-token-prediction tensors (mtp.*)"
        ));
    }
    if console.json {
        console.result_json(&summary)?;
    } else {
        console.result(format!(
            "{}: {} weights in NF4, {} tensors as they were; {} -> {} in {} file(s)",
            args.dst.display(),
            summary.quantized,
            summary.kept,
            show_bytes(summary.source_bytes),
            show_bytes(summary.output_bytes),
            summary.files
        ))?;
    }
    Ok(())
}
