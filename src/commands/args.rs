//! Flags that verbs share.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::values::whole_from_1;
use crate::backend::KvDtype;
use crate::backend::cpu::CpuPrecision;
use crate::engine::{BackendChoice, GpuOptions, Residency};
use crate::planning::execution::PrefillSettings;
use crate::planning::units::{parse_budget, parse_tokens};
use crate::planning::{PolicyConfig, Precision};

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
