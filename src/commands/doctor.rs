//! `moectl doctor`: what can this machine do?

use clap::Args;

use super::console::Console;
use crate::hardware::HardwareBody;

/// Show what this machine can do, measured
#[derive(Debug, Args)]
pub struct DoctorArgs {}

pub fn execute(_args: DoctorArgs, console: &Console) -> anyhow::Result<()> {
    let hardware = HardwareBody::measure();
    console.result_json(&hardware)?;
    Ok(())
}
