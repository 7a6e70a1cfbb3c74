//! The numbers for other programs: one tidy CSV file of samples, one of summaries.

use super::Run;
use super::metrics::METRICS;

/// One row per sample; `index` counts tokens within a repetition for `itl_ms`, else it is empty.
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

fn finish(out: csv::Writer<Vec<u8>>) -> csv::Result<Vec<u8>> {
    out.into_inner().map_err(|e| e.into_error().into())
}
