//! The result of a bench, for the terminal.

use crate::planning::units::{show_bytes, show_tokens};
use crate::report::metrics::{
    DECODE_TOK_S, ITL_P50_MS, ITL_P99_MS, Metric, PREFILL_TOK_S, TTFT_MS,
};
use crate::report::record::{ContextRun, RunBody};
use crate::report::stats::Spread;
use crate::report::terms;

const COLUMNS: [&Metric; 5] = [
    &PREFILL_TOK_S,
    &DECODE_TOK_S,
    &TTFT_MS,
    &ITL_P50_MS,
    &ITL_P99_MS,
];

/// Medians with their intervals, one line per context; then what stands beside the speed.
pub fn render(run: &RunBody) -> String {
    let mut out = format!("{:>8}  {:>3}", "context", "n");
    for metric in COLUMNS {
        out += &format!("  {:>22}", metric.key);
    }
    for context in &run.contexts {
        let tokens = show_tokens(context.context_tokens as u64);
        out += &format!("\n{tokens:>8}  {:>3}", context.repetitions.len());
        for metric in COLUMNS {
            out += &format!("  {:>22}", cell(metric, context));
        }
    }
    let samples = run.contexts.iter().map(|context| context.repetitions.len());
    out += &format!(
        "\n\nmedian of n repetitions after {} warm-up, {} in brackets; {}; peak memory {}",
        run.settings.warmups,
        Spread::describe(samples),
        run.settings.continuation.describe(),
        show_bytes(run.memory.peak_rss_bytes)
    );
    for context in &run.contexts {
        out += &predicted(context).unwrap_or_default();
    }
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

/// Promised speeds, and how far off they are: above zero where promised faster than measured.
fn predicted(context: &ContextRun) -> Option<String> {
    let prediction = context.prediction.as_ref()?;
    let decode = context.prediction_error?;
    let prefill = prediction
        .prefill_tok_s
        .zip(context.prefill_prediction_error);
    Some(format!(
        "\ncontext {}: predicted decode {:.1} tok/s ({:+.0}% of measured){}",
        show_tokens(context.context_tokens as u64),
        prediction.decode_tok_s,
        100.0 * decode,
        prefill.map_or(String::new(), |(tok_s, error)| {
            format!(", prefill {tok_s:.1} tok/s ({:+.0}%)", 100.0 * error)
        })
    ))
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

/// Predicted and measured time of a token, term by term.
fn compared(context: &ContextRun) -> Option<String> {
    let prediction = context.prediction.as_ref()?;
    let measured_ms = 1e3 / DECODE_TOK_S.summary(context)?.median;
    let terms = terms::compare(context).into_iter().map(|term| {
        format!(
            "{} {:.2} / {:.2}",
            term.name, term.predicted_ms, term.measured_ms
        )
    });
    let terms: Vec<String> = terms.collect();
    Some(format!(
        "\ncontext {}: predicted / measured ms of a token {:.2} / {measured_ms:.2}{}{}",
        show_tokens(context.context_tokens as u64),
        terms::predicted_ms(prediction),
        if terms.is_empty() { "" } else { ": " },
        terms.join(", ")
    ))
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
