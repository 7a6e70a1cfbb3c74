//! The numbers for other programs, as tidy CSV files: samples, summaries, and what was watched.

use super::Run;
use super::metrics::METRICS;
use super::served::levels;

/// One row per sample; `index` counts tokens within a repetition for `itl_ms`, else it is empty.
///
/// # Errors
/// The csv writer's; into memory it has none.
pub fn samples(runs: &[Run]) -> csv::Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "run",
        "context_tokens",
        "repetition",
        "metric",
        "index",
        "unit",
        "value",
    ])?;
    for run in runs {
        for context in &run.body.contexts {
            let tokens = context.context_tokens.to_string();
            for (i, repetition) in context.repetitions.iter().enumerate() {
                let number = i.to_string();
                let mut row = |metric: &str, index: &str, unit: &str, value: f64| {
                    let value = value.to_string();
                    out.write_record([&run.name, &tokens, &number, metric, index, unit, &value])
                };
                for metric in METRICS {
                    if let Some(value) = metric.of(repetition) {
                        row(metric.key, "", metric.unit, value)?;
                    }
                }
                for (token, &value) in repetition.itl_ms.iter().enumerate() {
                    row("itl_ms", &token.to_string(), "ms", value)?;
                }
            }
        }
    }
    finish(out)
}

/// One row per run, context and metric.
///
/// # Errors
/// The csv writer's; into memory it has none.
pub fn summary(runs: &[Run]) -> csv::Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "run",
        "model",
        "created",
        "synthetic",
        "executed_on",
        "context_tokens",
        "metric",
        "unit",
        "samples",
        "median",
        "interval_low",
        "interval_high",
        "mad",
        "min",
        "max",
    ])?;
    for run in runs {
        let labels = &run.body.labels;
        for context in &run.body.contexts {
            for metric in METRICS {
                let Some(s) = metric.summary(context) else {
                    continue;
                };
                out.write_record([
                    &run.name,
                    &run.model,
                    &run.created,
                    &labels.synthetic.to_string(),
                    &labels.executed_on,
                    &context.context_tokens.to_string(),
                    metric.key,
                    metric.unit,
                    &s.samples.to_string(),
                    &s.median.to_string(),
                    &s.interval.low.to_string(),
                    &s.interval.high.to_string(),
                    &s.mad.to_string(),
                    &s.min.to_string(),
                    &s.max.to_string(),
                ])?;
            }
        }
    }
    finish(out)
}

/// One row per request to a server, by how many there were at once.
///
/// # Errors
/// Of the writer; in memory there are none.
pub fn requests(runs: &[Run]) -> csv::Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "run",
        "context_tokens",
        "concurrency",
        "request",
        "prompt_tokens",
        "cached_tokens",
        "generated_tokens",
        "ttft_ms",
        "e2e_ms",
        "decode_tok_s",
    ])?;
    for run in runs.iter().filter(|run| run.body.endpoint.is_some()) {
        for level in run.body.contexts.iter().flat_map(levels) {
            for (i, request) in level.requests.iter().enumerate() {
                let cached = request.cached_tokens.map(|tokens| tokens.to_string());
                out.write_record([
                    run.name.clone(),
                    level.context_tokens.to_string(),
                    level.concurrency.to_string(),
                    i.to_string(),
                    request.prompt_tokens.to_string(),
                    cached.unwrap_or_default(),
                    request.generated_tokens.to_string(),
                    request.ttft_ms.to_string(),
                    request.e2e_ms.to_string(),
                    request.decode_tok_s.to_string(),
                ])?;
            }
        }
    }
    finish(out)
}

/// One row per look at the machine; what it did not tell is empty.
///
/// # Errors
/// The csv writer's; into memory it has none.
pub fn monitor(runs: &[Run]) -> csv::Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "run",
        "at_ms",
        "rss_bytes",
        "cpu_cores",
        "vram_bytes",
        "gpu_utilisation_percent",
        "gpu_memory_utilisation_percent",
        "gpu_power_w",
        "pcie_rx_gb_s",
        "pcie_tx_gb_s",
    ])?;
    fn text<T: ToString>(value: Option<T>) -> String {
        value.map_or(String::new(), |v| v.to_string())
    }
    for run in runs {
        let samples = run.body.monitor.iter().flat_map(|m| &m.samples);
        for s in samples {
            out.write_record([
                run.name.clone(),
                s.at_ms.to_string(),
                s.rss_bytes.to_string(),
                s.cpu_cores.to_string(),
                text(s.vram_bytes),
                text(s.gpu_utilisation_percent),
                text(s.gpu_memory_utilisation_percent),
                text(s.gpu_power_w),
                text(s.pcie_rx_gb_s),
                text(s.pcie_tx_gb_s),
            ])?;
        }
    }
    finish(out)
}

fn finish(out: csv::Writer<Vec<u8>>) -> csv::Result<Vec<u8>> {
    out.into_inner().map_err(|e| e.into_error().into())
}
