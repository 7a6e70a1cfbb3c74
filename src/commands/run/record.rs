//! The object that `moectl run --json` prints.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::engine::Engine;
use crate::engine::generate::{GenerateOptions, Generation};
use crate::engine::sampler::TokenLogprob;
use crate::formats::ModelId;
use crate::hardware::monitor::high_water_mark;
use crate::report::record::ExpertCounts;

/// The object that `--json` prints.
#[derive(Serialize)]
pub struct RunRecord<'a> {
    model: &'a ModelId,
    /// The weights are random, the text means nothing
    synthetic: bool,
    backend: String,
    #[serde(serialize_with = "exactly")]
    seed: u64,
    prompt_ids: &'a [u32],
    token_ids: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<Vec<LogprobRecord>>,
    timings: TimingsRecord,
    experts: ExpertCounts,
    peak_rss_bytes: Option<u64>,
    /// Held on the GPU at the end, by the driver's figure
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_bytes: Option<u64>,
}

#[derive(Serialize)]
struct LogprobRecord {
    id: u32,
    logit: f32,
    logprob: f32,
}

#[derive(Serialize)]
struct TimingsRecord {
    prompt_tokens: usize,
    generated_tokens: usize,
    prefill_ms: f64,
    ttft_ms: f64,
    decode_ms: f64,
    prefill_tok_s: f64,
    decode_tok_s: f64,
}

pub fn record<'a>(
    engine: &'a Engine,
    options: &GenerateOptions,
    prompt_ids: &'a [u32],
    generation: &'a Generation,
    experts: ExpertCounts,
) -> RunRecord<'a> {
    let timings = &generation.timings;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    RunRecord {
        model: engine.model_id(),
        synthetic: engine.config().synthetic,
        backend: engine.backend().name,
        seed: options.sampling.seed,
        prompt_ids,
        token_ids: &generation.token_ids,
        text: &generation.text,
        finish_reason: generation.finish_reason.name(),
        logprobs: generation
            .logprobs
            .iter()
            .map(|best| {
                let record = |t: &TokenLogprob| LogprobRecord {
                    id: t.id,
                    logit: t.logit,
                    logprob: t.logprob,
                };
                best.iter().map(record).collect()
            })
            .collect(),
        timings: TimingsRecord {
            prompt_tokens: timings.prompt_tokens,
            generated_tokens: generation.token_ids.len(),
            prefill_ms: ms(timings.prefill),
            ttft_ms: ms(timings.ttft),
            decode_ms: ms(timings.inter_token.iter().sum()),
            prefill_tok_s: timings.prefill_tok_s(),
            decode_tok_s: timings.decode_tok_s(),
        },
        experts,
        peak_rss_bytes: high_water_mark(),
        vram_bytes: engine.vram_bytes(),
    }
}

/// The greatest whole number up to which a reader that keeps numbers as f64, such as jq or a browser,
/// tells each from the next.
pub const LARGEST_EXACT: u64 = 1 << 53;

/// A number, or a string where a number would be rounded by its reader.
fn exactly<S: Serializer>(seed: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    match *seed <= LARGEST_EXACT {
        true => serializer.serialize_u64(*seed),
        false => serializer.collect_str(seed),
    }
}
