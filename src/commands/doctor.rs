//! `moectl doctor`: what can this machine do?

use std::path::PathBuf;

use clap::Args;

use super::check_output;
use super::console::Console;
use super::machine::{HardwareFile, this_machine};
use crate::formats::Document;
use crate::formats::document::HARDWARE;
use crate::hardware::HardwareBody;
use crate::report::doctor_report;

/// Show what this machine can do, measured
///
/// CPU features as the system grants them, cores and memory within the limits of the control
/// group, GPU and driver or why there is none, and the bandwidth of RAM, which bounds every expert
/// that is not in VRAM. Takes about two seconds. The file can be planned for: `moectl plan --hardware`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl doctor
  moectl doctor --json -o hardware.json")]
pub struct DoctorArgs {
    /// Also write the facts to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave the measurement out
    #[arg(long)]
    no_measure: bool,
}

pub fn execute(args: DoctorArgs, console: &Console) -> anyhow::Result<()> {
    if let Some(path) = &args.output {
        check_output(path)?;
    }
    let facts = if args.no_measure {
        HardwareBody::detect()
    } else {
        HardwareBody::measure()
    };
    let machine = this_machine(&facts);
    let document = Document::new(HARDWARE, None, HardwareFile { facts, machine });
    if let Some(path) = &args.output {
        document.write(path)?;
        console.note(format!("wrote {}", path.display()));
    }
    if console.json {
        console.result_json(&document)?;
    } else {
        console.result(doctor_report(&document.body.facts).trim_end())?;
    }
    Ok(())
}
