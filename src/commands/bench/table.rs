//! The result of a bench, for the terminal.

use crate::planning::units::{show_bytes, show_tokens};
use crate::report::metrics::{
    DECODE_TOK_S, ITL_P50_MS, ITL_P99_MS, Metric, PREFILL_TOK_S, TTFT_MS,
};
use crate::report::record::{ContextRun, RunBody};
use crate::report::terms;

const COLUMNS: [&Metric; 5] = [
    &PREFILL_TOK_S,
    &DECODE_TOK_S,
    &TTFT_MS,
    &ITL_P50_MS,
    &ITL_P99_MS,
];

/// Medians with their 95% intervals, one line per context; then what stands beside the speed.
pub fn render(run: &RunBody) -> String {
    let mut out = format!("{:>8}", "context");
    for metric in COLUMNS {
        out += &format!("  {:>22}", metric.key);
    }
    out += &format!("  {:>20}", "predicted decode");
    for context in &run.contexts {
        out += &format!("\n{:>8}", show_tokens(context.context_tokens as u64));
        for metric in COLUMNS {
            out += &format!("  {:>22}", cell(metric, context));
        }
        out += &format!("  {:>20}", predicted(context));
    }
    out += &format!(
        "\n\nmedian of {} repetitions after {} warm-up, 95% bootstrap interval in brackets; \
         {}; peak memory {}",
        run.settings.repetitions,
        run.settings.warmups,
        run.settings.continuation.describe(),
        show_bytes(run.memory.peak_rss_bytes)
    );
    out += &vram(run).unwrap_or_default();
    for context in &run.contexts {
        out += &roofline(run, context).unwrap_or_default();
        out += &decode_split(context).unwrap_or_default();
        out += &compared(context).unwrap_or_default();
    }
    if let Some(quality) = &run.quality {
        out += &format!(
            "\nagainst the {} backend on {} tokens: mean KL {:.1e} nats, perplexity {:.4} ({:.4})",
            quality.reference,
            quality.tokens,
            quality.mean_kl_nats,
            quality.perplexity,
            quality.reference_perplexity
        );
    }
    out
}

/// GPU memory as planned and as measured.
fn vram(run: &RunBody) -> Option<String> {
    let peak = run.memory.peak_vram_bytes?;
    let planned = run.memory.vram_prediction_error.map(|error| {
        format!(
            ", {} planned ({:+.1}%)",
            show_bytes(run.memory.planned_vram_bytes()),
            100.0 * error
        )
    });
    Some(format!(
        "\npeak GPU memory {}{}",
        show_bytes(peak),
        planned.unwrap_or_default()
    ))
}

fn cell(metric: &Metric, context: &ContextRun) -> String {
    metric.summary(context).map_or("-".into(), |s| {
        format!(
            "{:.1} [{:.1}, {:.1}]",
            s.median, s.interval.low, s.interval.high
        )
    })
}

fn predicted(context: &ContextRun) -> String {
    match (&context.prediction, context.prediction_error) {
        (Some(prediction), Some(error)) => {
            format!("{:.1} ({:+.0}%)", prediction.decode_tok_s, 100.0 * error)
        }
        _ => "-".into(),
    }
}

/// Bytes a token reads, and what that comes to beside the measured bandwidth of the RAM.
fn roofline(run: &RunBody, context: &ContextRun) -> Option<String> {
    let bytes = context.bytes_read_per_token?;
    let dram = run.hardware.dram.as_ref()?.all_cores.median_gb_s;
    let gb_s = bytes as f64 * DECODE_TOK_S.summary(context)?.median / 1e9;
    Some(format!(
        "\ncontext {}: {} read per token, {gb_s:.2} GB/s, {:.0}% of the RAM's {dram:.1} GB/s",
        show_tokens(context.context_tokens as u64),
        show_bytes(bytes),
        100.0 * gb_s / dram
    ))
}

/// How far the prediction is off, and in which term.
fn compared(context: &ContextRun) -> Option<String> {
    let prediction = context.prediction.as_ref()?;
    let measured_ms = 1e3 / DECODE_TOK_S.summary(context)?.median;
    let percent = |error: f64| format!("{:+.0}%", 100.0 * error);
    let predicted_ms = terms::predicted_ms(prediction);
    let mut text = format!(
        "\ncontext {}: predicted {predicted_ms:.2} ms a token, measured {measured_ms:.2} ({})",
        show_tokens(context.context_tokens as u64),
        percent((predicted_ms - measured_ms) / measured_ms)
    );
    for (i, term) in terms::compare(context).iter().enumerate() {
        text += &format!(
            "{} {} {:.2} for {:.2}",
            if i == 0 { ":" } else { "," },
            term.name,
            term.predicted_ms,
            term.measured_ms
        );
        // What is not predicted is off by all of it.
        if term.predicted_ms > 0.0 {
            text += &term
                .error()
                .map_or(String::new(), |e| format!(" ({})", percent(e)));
        }
    }
    Some(text)
}

/// Where a decode step's time goes, in the repetition of median speed.
fn decode_split(context: &ContextRun) -> Option<String> {
    let mut repetitions: Vec<_> = context.repetitions.iter().collect();
    repetitions.sort_by(|a, b| a.decode_tok_s.total_cmp(&b.decode_tok_s));
    let split = repetitions.get(repetitions.len() / 2)?.decode_split?;
    Some(format!(
        "\ncontext {}: a step is {:.2} ms launch, {:.2} ms GPU, {:.2} ms experts in RAM, {:.2} ms \
         tail; experts: {:.0} VRAM, {:.0} CPU, {:.0} PCIe",
        show_tokens(context.context_tokens as u64),
        split.launch_ms,
        split.wait_gpu_ms,
        split.cpu_experts_ms,
        split.tail_ms,
        split.experts_vram,
        split.experts_cpu,
        split.experts_pcie
    ))
}
