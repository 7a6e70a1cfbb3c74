//! `moectl doctor`: what can this machine do?

use std::path::PathBuf;

use clap::Args;

use super::console::{Console, Unit};
use super::machine::{HardwareFile, this_machine};
use super::output::OutputFile;
use crate::backend::cpu::CpuPrecision;
use crate::backend::cpu::measure::measure_experts;
use crate::engine::{BackendChoice, Engine, GpuOptions, LoadOptions};
use crate::formats::Document;
use crate::formats::document::HARDWARE;
use crate::hardware::{ExpertProbe, GpuProbe, HardwareBody};
use crate::model::{Source, weights};
use crate::planning::execution::PrefillSettings;
use crate::report::doctor_report;

/// Show what this machine can do, measured
///
/// CPU features as the system grants them, cores and memory within the limits of the control
/// group, GPU and driver or why there is none, and the bandwidth of RAM, which bounds every expert
/// that is not in VRAM. Takes about two seconds; --measure adds figures of the CPU's expert kernels,
/// the GPU and the bus, by the kernels of this program, in up to a minute. The file can be planned for: `moectl plan
/// --hardware`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl doctor
  moectl doctor --json -o hardware.json
  moectl doctor --measure -o hardware.json")]
pub struct DoctorArgs {
    /// Also write the facts to this file; - is standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Leave the measurement out
    #[arg(long, conflicts_with = "measure")]
    no_measure: bool,
    /// Measure expert kernels too, and the GPU: VRAM, PCIe both ways, kernels, hand-offs to the CPU
    #[arg(long)]
    measure: bool,
    /// Synthetic model whose layers --measure runs
    #[arg(long, value_name = "MODEL", hide = true, default_value = SLICE)]
    measure_model: String,
}

/// Layers of the 80B model, with experts enough (3.4 GB) that even 300 MB of cache hold few of them.
const SLICE: &str = "synth:qwen3-next-80b-a3b?layers=8&experts=256&vocab-size=65536";
/// Room for steps, and a context whose keys and values no cache holds: 134 MB.
const MAX_TOKENS: usize = 32_768;

/// Runs `moectl doctor`.
///
/// # Errors
/// If a measurement fails, or a file cannot be written.
pub fn execute(args: DoctorArgs, console: &Console) -> anyhow::Result<()> {
    let output = (args.output.clone())
        .map(|path| OutputFile::new(Some(path), "", console))
        .transpose()?;
    let mut facts = if args.no_measure {
        HardwareBody::detect()
    } else {
        HardwareBody::measure()
    };
    if args.measure {
        facts.cpu_experts = Some(measure_cpu(&args.measure_model, console)?);
        facts.gpu_probe = measure_gpu(&args.measure_model, console)?;
    }
    let machine = this_machine(&facts);
    let document = Document::new(HARDWARE, None, HardwareFile { facts, machine });
    if let Some(output) = &output {
        output.write(&document, console)?;
    }
    if console.json {
        console.result_json(&document)?;
    } else {
        console.table(doctor_report(&document.body.facts).trim_end())?;
    }
    Ok(())
}

fn measure_cpu(model: &str, console: &Console) -> anyhow::Result<ExpertProbe> {
    let source = Source::resolve(Some(model))?;
    let config = source.config()?;
    let weights = weights::load(&source.checkpoint()?, &config)?;
    console.detail("measuring expert kernels of the CPU");
    Ok(measure_experts(source.id(), &config.shape, &weights, None)?)
}

/// `None`, after saying so, where no GPU takes part.
fn measure_gpu(model: &str, console: &Console) -> anyhow::Result<Option<GpuProbe>> {
    let backend = BackendChoice::Auto.resolve();
    let BackendChoice::Cuda(_) = backend else {
        console.note(match cfg!(feature = "cuda") {
            true => "note: there is no GPU to measure",
            false => {
                "note: this build has no kernels for a GPU, nothing of it is measured; run \
                 scripts/setup-cuda.sh and build with --features cuda"
            }
        });
        return Ok(None);
    };
    let source = Source::resolve(Some(model))?;
    let bar = console.progress("measure", 0, Unit::Bytes);
    let options = LoadOptions {
        backend,
        threads: None,
        cpu_precision: CpuPrecision::default(),
        // Given shares are not searched for.
        gpu: GpuOptions {
            split: Some(vec![0]),
            prefill: PrefillSettings {
                chunk_tokens: Some(64),
                ..PrefillSettings::default()
            },
            ..GpuOptions::default()
        },
        kv_dtype: None,
        progress: &|done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
        max_tokens: source.config()?.max_position_embeddings.min(MAX_TOKENS),
    };
    let mut engine = Engine::load(&source, &options)?;
    let probe = engine.measure_gpu();
    bar.finish_and_clear();
    Ok(probe?)
}
