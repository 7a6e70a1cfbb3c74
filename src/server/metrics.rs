//! Counters and histograms for Prometheus, under vLLM's names where it has them: its dashboards work.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::generation::End;
use super::history::Speed;
use crate::engine::service::{ExpertsReport, FinishReason, Load};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LayerLabels {
    model_name: String,
    layer: u32,
}

type GaugeF64 = Gauge<f64, AtomicU64>;

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    model_name: String,
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    prefix_queries: Counter,
    prefix_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: Family<ReasonLabels, Counter>,
    failures: Counter,
    refusals: Counter,
    ttft: Histogram,
    inter_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    layer_hits: Family<LayerLabels, GaugeF64>,
    layer_misses: Family<LayerLabels, GaugeF64>,
    promoted_bytes: GaugeF64,
    h2d_bytes: GaugeF64,
    vram_bytes: GaugeF64,
    frozen: Gauge<i64, AtomicI64>,
    speed: Mutex<Speed>,
}

/// Seconds, from a fast GPU's token to a long document.
const SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    20.0, 40.0, 160.0, 640.0,
];
const TOKENS: [f64; 16] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5,
];

impl Metrics {
    /// `model_name` is a label of all; it may be any text.
    pub fn new(model_name: &str) -> Self {
        let seconds = || Histogram::new(SECONDS);
        let tokens = || Histogram::new(TOKENS);
        let mut metrics = Metrics {
            registry: Registry::default(),
            model_name: model_name.to_owned(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            success: Family::default(),
            failures: Counter::default(),
            refusals: Counter::default(),
            ttft: seconds(),
            inter_token: seconds(),
            e2e: seconds(),
            queue: seconds(),
            prefill: seconds(),
            decode: seconds(),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            layer_hits: Family::default(),
            layer_misses: Family::default(),
            promoted_bytes: GaugeF64::default(),
            h2d_bytes: GaugeF64::default(),
            vram_bytes: GaugeF64::default(),
            frozen: Gauge::default(),
            speed: Mutex::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let labels = [("model_name".into(), self.model_name.clone().into())];
        let own = registry.sub_registry_with_labels(labels.into_iter());
        macro_rules! register {
            ($($name:literal, $help:literal, $metric:ident;)*) => {
                $(own.register($name, $help, self.$metric.clone());)*
            };
        }
        register! {
            "vllm:num_requests_running", "Requests in work", running;
            "vllm:num_requests_waiting", "Requests that wait", waiting;
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", prefix_queries;
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", prefix_hits;
            "vllm:prompt_tokens", "Prompt tokens of finished requests", prompt_tokens;
            "vllm:generation_tokens", "Generated tokens", generation_tokens;
            "vllm:time_to_first_token_seconds", "From submission to the first token", ttft;
            "vllm:inter_token_latency_seconds", "From one token to the next", inter_token;
            "vllm:e2e_request_latency_seconds", "From submission to the end", e2e;
            "vllm:request_queue_time_seconds", "Waiting in the queue", queue;
            "vllm:request_prefill_time_seconds", "Computing the prompt", prefill;
            "vllm:request_decode_time_seconds", "Generating", decode;
            "vllm:request_prompt_tokens", "Prompt tokens of a request", request_prompt_tokens;
            "vllm:request_generation_tokens", "Generated tokens of a request", request_generation_tokens;
            "moectl:requests_failed", "Requests that failed", failures;
            "moectl:requests_refused", "Requests that were not taken", refusals;
            "moectl:expert_promoted_bytes", "Bytes of experts copied into slots", promoted_bytes;
            "moectl:expert_h2d_bytes", "All bytes of experts over PCIe", h2d_bytes;
            "moectl:vram_bytes", "Held on the GPU", vram_bytes;
            "moectl:expert_cache_frozen", "1 where slots stay as they are", frozen;
        }
        // These carry the model's name in labels of their own.
        registry.register(
            "vllm:request_success",
            "Requests that finished, by reason",
            self.success.clone(),
        );
        registry.register(
            "moectl:expert_hits",
            "Picks in decode that were in a slot",
            self.layer_hits.clone(),
        );
        registry.register(
            "moectl:expert_misses",
            "Picks in decode that were in no slot",
            self.layer_misses.clone(),
        );
    }

    /// A request's turn has come.
    pub fn started(&self, cached_tokens: usize) {
        self.prefix_hits.inc_by(cached_tokens as u64);
    }

    pub fn first_token(&self, since_submission: Duration) {
        self.ttft.observe(since_submission.as_secs_f64());
        self.generation_tokens.inc();
    }

    pub fn inter_token(&self, time: Duration) {
        self.inter_token.observe(time.as_secs_f64());
        self.generation_tokens.inc();
    }

    pub fn finished(&self, end: &End, e2e: Duration) {
        let finished = &end.finished;
        let finished_reason = match finished.reason {
            FinishReason::Length => "length",
            FinishReason::EndOfText | FinishReason::StopString(_) => "stop",
        };
        let labels = ReasonLabels {
            model_name: self.model_name.clone(),
            finished_reason,
        };
        self.success.get_or_create(&labels).inc();
        let usage = &finished.usage;
        self.prefix_queries.inc_by(usage.prompt_tokens as u64);
        self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        self.request_prompt_tokens
            .observe(usage.prompt_tokens as f64);
        self.request_generation_tokens
            .observe(usage.completion_tokens as f64);
        let timings = &finished.timings;
        self.queue.observe(timings.queue.as_secs_f64());
        self.prefill.observe(timings.prefill.as_secs_f64());
        self.decode.observe(timings.decode.as_secs_f64());
        self.e2e.observe(e2e.as_secs_f64());
        let mut speed = self.speed.lock().unwrap_or_else(PoisonError::into_inner);
        speed.prefill_tokens += (usage.prompt_tokens - usage.cached_tokens) as f64;
        speed.prefill_s += timings.prefill.as_secs_f64();
        // The first token comes with the prompt.
        speed.decode_tokens += usage.completion_tokens.saturating_sub(1) as f64;
        speed.decode_s += timings.decode.as_secs_f64();
    }

    /// Sums over finished requests.
    pub fn speed(&self) -> Speed {
        *self.speed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn failed(&self) {
        self.failures.inc();
    }

    pub fn refused(&self) {
        self.refusals.inc();
    }

    /// Prometheus' text, with gauges as they are now.
    pub fn text(&self, load: Load, experts: Option<&ExpertsReport>) -> String {
        self.running.set(load.running as i64);
        self.waiting.set(load.waiting as i64);
        if let Some(report) = experts {
            for (layer, counts) in (0..).zip(&report.counts) {
                let labels = LayerLabels {
                    model_name: self.model_name.clone(),
                    layer,
                };
                let hits = self.layer_hits.get_or_create(&labels);
                hits.set(counts.hits as f64);
                let misses = self.layer_misses.get_or_create(&labels);
                misses.set(counts.misses as f64);
            }
            self.promoted_bytes.set(report.promoted_bytes as f64);
            self.h2d_bytes.set(report.h2d_bytes as f64);
            self.vram_bytes.set(report.vram_bytes.unwrap_or(0) as f64);
            self.frozen.set(i64::from(report.stopped.is_some()));
        }
        let mut text = String::new();
        // A string takes everything.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
