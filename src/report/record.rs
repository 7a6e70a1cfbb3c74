//! The body of run.json: everything a run measured, raw, with units in the names.
//!
//! Statistics are never stored, only samples: whoever reads the file can compute their own.

use serde::{Deserialize, Serialize};

use crate::hardware::{HardwareBody, MonitorRecord};

/// What `moectl bench` writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunBody {
    pub labels: Labels,
    pub hardware: HardwareBody,
    pub software: SoftwareFacts,
    pub settings: Settings,
    /// SHA-256 of the placement.json the run used; absent without one.
    pub placement_sha256: Option<String>,
    /// One per context length asked for, ascending.
    pub contexts: Vec<ContextRun>,
    pub memory: MemoryRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<Quality>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<MonitorRecord>,
    /// Who was measured, if it was a server; hardware and software are then those of its client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointFacts>,
}

/// A server that was measured over HTTP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EndpointFacts {
    pub url: String,
    /// Its `server` header, where it sends one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Whether it was asked to go on past the end of a text, so that all answers are equally long.
    pub ignore_eos: bool,
}

/// What must be said beside every number of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Labels {
    /// Weights or routing were made up: the speed is real, the text is not.
    pub synthetic: bool,
    /// Where the blocks ran: `cpu`, `cuda:0`, `cuda:0 + cpu`.
    pub executed_on: String,
    /// Anything else a reader should know, one sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SoftwareFacts {
    pub moectl_version: String,
    /// Cargo features of this build.
    pub features: Vec<String>,
    /// Like `x86_64-unknown-linux-gnu`.
    pub target: String,
    pub rustc_version: String,
    /// `reference`, `cpu` or `cuda:N`.
    pub backend: String,
    /// Kernel variant picked at run time, like `avx512-vnni int16`.
    pub kernels: Option<String>,
    pub threads: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub warmups: usize,
    pub repetitions: usize,
    /// Tokens generated per repetition.
    pub generated_tokens: usize,
    /// Name of the corpus the prompts were cut from.
    pub corpus: String,
    pub corpus_sha256: Option<String>,
    /// Records from before there was a choice were sampled.
    #[serde(default)]
    pub continuation: Continuation,
    /// The command line, so that the run can be repeated.
    pub command: String,
}

/// What decode steps are fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Continuation {
    /// The tokens sampled
    #[default]
    Sampled,
    /// The tokens that follow the prompt in the corpus
    Text,
}

/// All repetitions at one context length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContextRun {
    /// Prompt and generated tokens together; in records of before 2026-12 as asked for, where the text
    /// may have run out earlier ([`ContextRun::ran_tokens`]).
    pub context_tokens: usize,
    /// One after the other.
    pub repetitions: Vec<Repetition>,
    /// The same with several requests at once, of a server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub concurrent: Vec<ConcurrentRun>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// [`prediction_error`] of decode, of the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction_error: Option<f64>,
    /// The same of prefill.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_prediction_error: Option<f64>,
    /// When its first run began, on the clock of the monitor's samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ms: Option<f64>,
    /// Weights, state and KV cache that one decode step reads, for GB/s and the roofline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_read_per_token: Option<u64>,
}

/// Requests of several clients, each of which sends its next one when the last is answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConcurrentRun {
    /// Clients.
    pub concurrency: usize,
    /// From the first request sent to the last token of the last answer.
    pub wall_ms: f64,
    pub requests: Vec<Repetition>,
    /// Requests that were refused or broke off; they are not among `requests`.
    #[serde(default)]
    pub failed: usize,
}

/// One prompt, prefilled and continued.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Repetition {
    pub prompt_tokens: usize,
    /// The first comes out of prefill, the others out of decode.
    pub generated_tokens: usize,
    /// From the prompt's ids to the first generated token.
    pub ttft_ms: f64,
    /// Time between tokens: `generated_tokens - 1` samples, or fewer where a server sends several tokens
    /// in one event.
    pub itl_ms: Vec<f64>,
    pub prefill_tok_s: f64,
    pub decode_tok_s: f64,
    pub e2e_ms: f64,
    pub experts: ExpertCounts,
    /// Where the decode steps spent their time, if a GPU took part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_split: Option<DecodeSplit>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_energy_j: Option<f64>,
    /// SHA-256 over the generated ids as little-endian u32; with a continuation of text, over its ids.
    pub output_sha256: String,
    /// Of the prompt's tokens, those that the server had computed before, as it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<usize>,
}

/// Means over decode steps, seen from the CPU that drives the GPU; the four parts follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DecodeSplit {
    pub steps: u64,
    /// Handing the step to the driver
    pub launch_ms: f64,
    /// Waiting until the GPU's routers have chosen: the GPU works, the CPU waits
    pub wait_gpu_ms: f64,
    /// Computing experts in RAM: the GPU computes its own meanwhile, then waits
    pub cpu_experts_ms: f64,
    /// From the last layer's experts to the logits on the host
    pub tail_ms: f64,
    /// Chosen experts per step that the CPU computed
    pub experts_cpu: f64,
    /// That were in VRAM
    pub experts_vram: f64,
    /// That the GPU read from RAM
    pub experts_pcie: f64,
}

/// Expert accesses of one repetition, one per token, layer and chosen expert; with a GPU those of
/// decode steps, since its prefill passes every expert by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertCounts {
    /// Found in VRAM.
    pub hits: u64,
    pub misses: u64,
    /// Experts brought into slots, and the bytes copied over PCIe for that: none for those that a
    /// prefill left there.
    #[serde(default)]
    pub promotions: u64,
    pub moved_bytes: u64,
    /// Over PCIe to the GPU: those copies, and misses that the GPU read where they lie in RAM.
    pub h2d_bytes: u64,
    /// `[layer]` share of the accesses that the CPU computed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpu_share_by_layer: Vec<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// Itemised as the placement has it.
    pub components: Vec<MemoryComponent>,
    pub vram_budget_bytes: Option<u64>,
    pub peak_rss_bytes: u64,
    pub peak_vram_bytes: Option<u64>,
    /// (planned - peak) / peak of VRAM; absent unless the run went by the plan, within its budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram_prediction_error: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryComponent {
    /// Like `expert slots`, `KV cache`.
    pub component: String,
    pub tier: Tier,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Vram,
    Ram,
    Disk,
}

/// What the plan said, as terms that add up to the time of one decode token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    pub decode_tok_s: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tok_s: Option<f64>,
    pub terms: Vec<PredictionTerm>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PredictionTerm {
    /// Like `experts in RAM`.
    pub name: String,
    pub ms_per_token: f64,
}

/// How far the fast path is from the reference backend, on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    pub reference: String,
    pub tokens: usize,
    /// KL(reference || this run), natural logarithm, per token.
    pub mean_kl_nats: f64,
    pub perplexity: f64,
    pub reference_perplexity: f64,
}

/// How far a promised speed is off, as a share of the measured one: above zero where it was promised
/// faster than it is.
pub fn prediction_error(predicted_tok_s: f64, measured_tok_s: f64) -> f64 {
    predicted_tok_s / measured_tok_s - 1.0
}

impl Continuation {
    /// Of a run, in a sentence's part.
    pub fn describe(self) -> &'static str {
        match self {
            Continuation::Sampled => "decoded what was sampled",
            Continuation::Text => "decoded the text that follows the prompt",
        }
    }
}

impl Tier {
    pub fn name(self) -> &'static str {
        match self {
            Tier::Vram => "VRAM",
            Tier::Ram => "RAM",
            Tier::Disk => "Disk",
        }
    }
}

impl MemoryRecord {
    /// All that the plan has in VRAM, the driver's context included.
    pub fn planned_vram_bytes(&self) -> u64 {
        let items = self.components.iter().filter(|c| c.tier == Tier::Vram);
        items.map(|c| c.bytes).sum()
    }

    /// Fills in `vram_prediction_error`, for a run that went by the plan.
    pub fn compare_vram(&mut self) {
        let planned = self.planned_vram_bytes() as f64;
        let peak = self.peak_vram_bytes.filter(|&peak| peak > 0);
        self.vram_prediction_error = peak.map(|peak| (planned - peak as f64) / peak as f64);
    }
}

impl ContextRun {
    /// Prompt and generated tokens of the repetitions, where that is not what the context says.
    pub fn ran_tokens(&self) -> Option<usize> {
        let tokens = self
            .repetitions
            .iter()
            .map(|r| r.prompt_tokens + r.generated_tokens);
        tokens.min().filter(|&ran| ran < self.context_tokens)
    }

    /// Time between tokens of all repetitions together.
    pub fn pooled_itl_ms(&self) -> Vec<f64> {
        self.repetitions
            .iter()
            .flat_map(|r| r.itl_ms.iter().copied())
            .collect()
    }
}

impl RunBody {
    /// Whether every repetition of a context gave the same text, and the same as in `other`; `None`
    /// also where a run was fed its text.
    pub fn same_output(&self, other: &RunBody) -> Option<bool> {
        let sampled = |body: &RunBody| body.settings.continuation == Continuation::Sampled;
        if !sampled(self) || !sampled(other) {
            return None;
        }
        let hashes = |body: &RunBody| -> Vec<(usize, Vec<String>)> {
            let of = |c: &ContextRun| {
                let mut hashes: Vec<String> = c
                    .repetitions
                    .iter()
                    .map(|r| r.output_sha256.clone())
                    .collect();
                hashes.sort();
                hashes.dedup();
                (c.context_tokens, hashes)
            };
            body.contexts.iter().map(of).collect()
        };
        let theirs = hashes(other);
        let mut compared = None;
        for (context, mine) in hashes(self) {
            if let Some((_, other)) = theirs.iter().find(|(c, _)| *c == context) {
                compared = Some(compared.unwrap_or(true) && mine == *other);
            }
        }
        compared
    }
}
