//! What a report says, before it is Markdown or HTML.

use super::comparable;
use super::comparison::{comparisons, interval_text};
use super::metrics::{
    DECODE_TOK_S, EXPERT_HIT_RATE, ITL_P50_MS, ITL_P90_MS, ITL_P99_MS, METRICS, Metric, PEAK_RSS,
    PEAK_VRAM, PREFILL_TOK_S, TPOT_MS, TTFT_MS,
};
use super::record::{ContextRun, Tier, prediction_error};
use super::stats::Spread;
use super::{ReportInputs, Run, Verdict, terms, units};
use crate::hardware::HardwareBody;

/// One heading with what follows it.
#[derive(Debug)]
pub struct Section {
    pub heading: String,
    pub blocks: Vec<Block>,
}

#[derive(Debug)]
pub enum Block {
    Text(String),
    List(Vec<String>),
    Code(String),
    Table(Table),
}

#[derive(Debug)]
pub struct Table {
    pub header: Vec<String>,
    /// The first `left` columns hold text, the others numbers.
    pub left: usize,
    pub rows: Vec<Vec<String>>,
}

impl Section {
    pub(super) fn new(heading: &str, blocks: Vec<Block>) -> Self {
        Self {
            heading: heading.to_string(),
            blocks,
        }
    }
}

impl Table {
    pub(super) fn block(left: usize, header: &[&str], rows: Vec<Vec<String>>) -> Block {
        Block::Table(Self {
            header: header.iter().map(|h| h.to_string()).collect(),
            left,
            rows,
        })
    }
}

/// What stands before the charts: verdicts, and what was measured; nothing without runs.
pub fn before_charts(inputs: &ReportInputs) -> Vec<Section> {
    let runs = inputs.runs.as_slice();
    if runs.is_empty() {
        return Vec::new();
    }
    let verdicts = inputs.verdicts.iter().map(verdict);
    verdicts.chain([results(runs)]).collect()
}

/// What stands after them, in reading order; sections without data are left out.
pub fn after_charts(inputs: &ReportInputs) -> Vec<Section> {
    let runs = inputs.runs.as_slice();
    if runs.is_empty() {
        return Vec::new();
    }
    let mut sections = Vec::new();
    sections.extend(super::served::section(runs));
    sections.extend(comparison(runs));
    sections.extend(prediction(runs));
    sections.extend(memory(runs));
    sections.extend(super::watched::section(runs));
    sections.extend(reading(runs));
    sections.extend(quality(runs));
    sections.push(machines(runs));
    sections.push(software(runs));
    sections.push(formulas());
    sections
}

fn verdict(verdict: &Verdict) -> Section {
    let rows = verdict.checks.iter().map(|check| {
        vec![
            check.outcome.name().to_string(),
            check.place(),
            check.change().unwrap_or_default(),
            check.p.map_or("–".into(), |p| format!("{p:.4}")),
            check.reason.clone(),
        ]
    });
    let header = ["outcome", "figure", "change, 95% interval", "p", "reason"];
    let heading = format!("Verdict: {} against {}", verdict.new, verdict.base);
    let blocks = vec![
        Block::Text(format!("Rule: {}.", verdict.rule)),
        Table::block(5, &header, rows.collect()),
    ];
    Section::new(&heading, blocks)
}

/// What must be said before any number.
pub fn labels(runs: &[Run]) -> Vec<String> {
    let mut all = Vec::new();
    for run in runs {
        let labels = &run.body.labels;
        let name = &run.name;
        if labels.synthetic {
            all.push(format!(
                "{name}: synthetic weights, the text it generates means nothing"
            ));
        }
        all.push(format!("{name}: executed on {}", labels.executed_on));
        all.extend(labels.notes.iter().map(|note| format!("{name}: {note}")));
        // Of a server, a length is what its own tokens came to.
        let cut = (run.body.contexts.iter()).filter(|_| run.body.endpoint.is_none());
        all.extend(cut.filter_map(|context| {
            let ran = context.ran_tokens()?;
            let asked = units::tokens(context.context_tokens);
            Some(format!(
                "{name}: the text ran out: what is called {asked} ran {ran} tokens"
            ))
        }));
    }
    all
}

fn contexts(runs: &[Run]) -> impl Iterator<Item = (&Run, &ContextRun)> {
    runs.iter()
        .flat_map(|run| run.body.contexts.iter().map(move |context| (run, context)))
}

fn results(runs: &[Run]) -> Section {
    let mut columns: Vec<&Metric> = vec![
        &DECODE_TOK_S,
        &PREFILL_TOK_S,
        &TTFT_MS,
        &TPOT_MS,
        &ITL_P50_MS,
        &ITL_P90_MS,
        &ITL_P99_MS,
        &EXPERT_HIT_RATE,
    ];
    columns.retain(|metric| contexts(runs).any(|(_, c)| metric.summary(c).is_some()));
    let rows = contexts(runs)
        .map(|(run, context)| {
            let mut row = vec![
                run.name.clone(),
                units::tokens(context.context_tokens),
                context.repetitions.len().to_string(),
            ];
            row.extend(columns.iter().map(|metric| cell(metric, context)));
            row
        })
        .collect();
    let mut header = vec!["run", "context", "n"];
    header.extend(columns.iter().map(|metric| metric.key));
    let mut blocks = vec![
        Block::Text(format!(
            "Medians with their {}; every sample is in samples.csv.",
            Spread::describe(contexts(runs).map(|(_, c)| c.repetitions.len()))
        )),
        Table::block(1, &header, rows),
    ];
    let notes: Vec<String> = contexts(runs)
        .filter_map(|(run, context)| {
            let note = DECODE_TOK_S.summary(context)?.outlier_note()?;
            let context = units::tokens(context.context_tokens);
            Some(format!("{} at {context} context, decode: {note}", run.name))
        })
        .collect();
    if !notes.is_empty() {
        blocks.push(Block::List(notes));
    }
    Section::new("Results", blocks)
}

fn cell(metric: &Metric, context: &ContextRun) -> String {
    let Some(summary) = metric.summary(context) else {
        return "–".to_string();
    };
    match metric.unit {
        "" => units::with_unit(summary.median, ""),
        _ => {
            let interval = interval_text(summary.interval);
            format!("{} {interval}", units::significant(summary.median))
                .trim_end()
                .to_string()
        }
    }
}

fn comparison(runs: &[Run]) -> Option<Section> {
    let (base, others) = runs.split_first()?;
    let mut blocks = Vec::new();
    for run in others {
        let rows: Vec<Vec<String>> = comparisons(&base.body, &run.body)
            .into_iter()
            .map(|c| {
                let value = |v| units::with_unit(v, c.metric.unit);
                vec![
                    units::tokens(c.context_tokens),
                    c.metric.key.to_string(),
                    value(c.base.median),
                    value(c.new.median),
                    c.ratio().map_or("-".into(), |ratio| format!("{ratio:.2}×")),
                    c.intervals().to_string(),
                ]
            })
            .collect();
        if rows.is_empty() {
            let text = format!("{} and {} share no context length.", base.name, run.name);
            blocks.push(Block::Text(text));
            continue;
        }
        let differing = comparable::differences(base, run);
        let outputs = match base.body.same_output(&run.body) {
            // Of different prompts or models it says nothing.
            _ if !differing.is_empty() => "",
            Some(true) => "Both generated the same tokens.",
            Some(false) => "They did not generate the same tokens.",
            None => "",
        };
        let text = format!(
            "{} against {} (ratio = {0} / {1}). {outputs}",
            run.name, base.name
        );
        blocks.push(Block::Text(text.trim_end().to_string()));
        if !differing.is_empty() {
            blocks.push(Block::Text("They were not measured alike:".to_string()));
            blocks.push(Block::List(
                differing.iter().map(|d| d.to_string()).collect(),
            ));
        }
        let header = [
            "context",
            "metric",
            &base.name,
            &run.name,
            "ratio",
            "95% intervals",
        ];
        blocks.push(Table::block(2, &header, rows));
    }
    (!blocks.is_empty()).then(|| Section::new("Comparison", blocks))
}

/// Decode and prefill as predicted and as measured, each with how far off that was.
fn prediction(runs: &[Run]) -> Option<Section> {
    let error = |predicted, metric: &Metric, context: &ContextRun| {
        let measured = metric.summary(context)?.median;
        let error = prediction_error(predicted, measured);
        Some([
            units::significant(predicted),
            units::significant(measured),
            format!("{:+.1}%", 100.0 * error),
        ])
    };
    let rows: Vec<Vec<String>> = contexts(runs)
        .filter_map(|(run, context)| {
            let prediction = context.prediction.as_ref()?;
            let decode = error(prediction.decode_tok_s, &DECODE_TOK_S, context)?;
            let prefill = prediction.prefill_tok_s;
            let prefill = prefill.and_then(|tok_s| error(tok_s, &PREFILL_TOK_S, context));
            let mut row = vec![run.name.clone(), units::tokens(context.context_tokens)];
            row.extend(decode);
            row.extend(prefill.unwrap_or(["–", "–", "–"].map(String::from)));
            Some(row)
        })
        .collect();
    let header = [
        "run",
        "context",
        "decode tok/s predicted",
        "measured",
        "error",
        "prefill tok/s predicted",
        "measured",
        "error",
    ];
    let text = "Errors are predicted / measured - 1: above zero where more was promised than came.";
    let mut blocks = vec![Block::Text(text.into()), Table::block(1, &header, rows)];
    blocks.extend(predicted_terms(runs));
    blocks.extend(compared_terms(runs));
    contexts(runs)
        .any(|(_, context)| context.prediction.is_some())
        .then(|| Section::new("Prediction", blocks))
}

/// Where a prediction is off, if the measurement is split.
fn compared_terms(runs: &[Run]) -> Option<Block> {
    let rows = contexts(runs).flat_map(|(run, context)| {
        terms::compare(context).into_iter().map(|term| {
            vec![
                run.name.clone(),
                term.name.to_string(),
                units::tokens(context.context_tokens),
                units::significant(term.predicted_ms),
                units::significant(term.measured_ms),
            ]
        })
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let header = [
        "run",
        "part of a token",
        "context",
        "predicted ms",
        "measured ms",
    ];
    (!rows.is_empty()).then(|| Table::block(2, &header, rows))
}

/// What a predicted token is made of.
fn predicted_terms(runs: &[Run]) -> Option<Block> {
    let rows: Vec<Vec<String>> = contexts(runs)
        .filter_map(|(run, context)| {
            let terms = context.prediction.as_ref()?.terms.iter();
            let terms = terms.map(|t| format!("{} {}", t.name, units::significant(t.ms_per_token)));
            Some(vec![
                run.name.clone(),
                units::tokens(context.context_tokens),
                terms.collect::<Vec<_>>().join(", "),
            ])
        })
        .collect();
    let header = ["run", "context", "predicted terms, ms/token"];
    (!rows.is_empty()).then(|| Table::block(3, &header, rows))
}

fn memory(runs: &[Run]) -> Option<Section> {
    let mut rows = Vec::new();
    for run in runs {
        let memory = &run.body.memory;
        let mut row = |what: &str, tier: &str, bytes: u64| {
            let bytes_text = units::thousands(&bytes.to_string());
            rows.push(vec![
                run.name.clone(),
                what.to_string(),
                tier.to_string(),
                units::bytes(bytes),
                bytes_text,
            ]);
        };
        for part in memory
            .components
            .iter()
            .filter(|part| run.has_tier(part.tier))
        {
            row(&part.component, part.tier.name(), part.bytes);
        }
        if let Some(bytes) = memory
            .vram_budget_bytes
            .filter(|_| run.has_tier(Tier::Vram))
        {
            row("budget", "VRAM", bytes);
        }
        if let Some(bytes) = memory.peak_vram_bytes {
            row("measured peak", "VRAM", bytes);
        }
        if memory.peak_rss_bytes > 0 {
            row("measured peak (RSS)", "RAM", memory.peak_rss_bytes);
        }
    }
    let header = ["run", "component", "tier", "size", "bytes"];
    if rows.is_empty() {
        return None;
    }
    let mut blocks = vec![Table::block(3, &header, rows)];
    let compared: Vec<String> = runs.iter().filter_map(planned_and_measured).collect();
    if !compared.is_empty() {
        blocks.push(Block::List(compared));
    }
    Some(Section::new("Memory", blocks))
}

/// How far the plan's sum is from the measured peak of VRAM, where the run went by the plan.
fn planned_and_measured(run: &Run) -> Option<String> {
    let memory = &run.body.memory;
    Some(format!(
        "{}: {} of VRAM planned, measured peak {}: the plan is {:+.1}% off",
        run.name,
        units::bytes(memory.planned_vram_bytes()),
        units::bytes(memory.peak_vram_bytes?),
        100.0 * memory.vram_prediction_error?
    ))
}

/// The roofline of decode: bytes read per token against what the memory can deliver.
fn reading(runs: &[Run]) -> Option<Section> {
    let rows: Vec<Vec<String>> = contexts(runs)
        .filter_map(|(run, context)| {
            let bytes = context.bytes_read_per_token?;
            let gb_s = bytes as f64 * DECODE_TOK_S.summary(context)?.median / 1e9;
            let dram = run.body.hardware.dram.as_ref();
            Some(vec![
                run.name.clone(),
                units::tokens(context.context_tokens),
                units::bytes(bytes),
                units::significant(gb_s),
                dram.map_or("–".into(), |d| units::significant(d.all_cores.best_gb_s)),
                dram.map_or("–".into(), |d| {
                    format!("{:.0}%", gb_s / d.all_cores.best_gb_s * 100.0)
                }),
            ])
        })
        .collect();
    let header = [
        "run",
        "context",
        "read per token",
        "achieved GB/s",
        "DRAM read GB/s",
        "share",
    ];
    let text = "Bytes one decode step has to read, times tokens per second, beside the read \
                bandwidth of all cores measured on the same machine.";
    let blocks = vec![
        Block::Text(text.to_string()),
        Table::block(1, &header, rows),
    ];
    contexts(runs)
        .any(|(_, context)| context.bytes_read_per_token.is_some())
        .then(|| Section::new("Memory bandwidth", blocks))
}

fn quality(runs: &[Run]) -> Option<Section> {
    let rows: Vec<Vec<String>> = runs
        .iter()
        .filter_map(|run| {
            let quality = run.body.quality.as_ref()?;
            Some(vec![
                run.name.clone(),
                quality.reference.clone(),
                quality.tokens.to_string(),
                format!("{:.2e}", quality.mean_kl_nats),
                format!("{:.4}", quality.perplexity),
                format!("{:.4}", quality.reference_perplexity),
            ])
        })
        .collect();
    let header = [
        "run",
        "reference",
        "tokens",
        "mean KL, nats",
        "perplexity",
        "reference perplexity",
    ];
    (!rows.is_empty()).then(|| Section::new("Quality", vec![Table::block(2, &header, rows)]))
}

fn machines(runs: &[Run]) -> Section {
    let mut blocks = Vec::new();
    let mut seen: Vec<&HardwareBody> = Vec::new();
    for run in runs {
        let hardware = &run.body.hardware;
        if seen.contains(&hardware) {
            continue;
        }
        seen.push(hardware);
        if runs.len() > 1 {
            blocks.push(Block::Text(format!("{}: {}", run.name, hardware.summary())));
        }
        let facts = super::doctor::facts(hardware);
        let rows = facts
            .into_iter()
            .map(|(name, value)| vec![name.to_string(), value]);
        blocks.push(Table::block(2, &["fact", "value"], rows.collect()));
    }
    Section::new("Machine", blocks)
}

fn software(runs: &[Run]) -> Section {
    let rows = runs
        .iter()
        .map(|run| {
            let (software, settings) = (&run.body.software, &run.body.settings);
            let backend = match &software.kernels {
                Some(kernels) => format!("{} ({kernels})", software.backend),
                None => software.backend.clone(),
            };
            vec![
                run.name.clone(),
                run.model.clone(),
                settings.corpus.clone(),
                backend,
                format!(
                    "moectl {}, rustc {}",
                    software.moectl_version, software.rustc_version
                ),
                software.threads.to_string(),
                settings.warmups.to_string(),
                settings.generated_tokens.to_string(),
            ]
        })
        .collect();
    let header = [
        "run",
        "model",
        "corpus",
        "backend",
        "software",
        "threads",
        "warm-ups",
        "generated",
    ];
    let commands: Vec<&str> = runs
        .iter()
        .map(|r| r.body.settings.command.as_str())
        .collect();
    let continuations = runs.iter().map(|run| {
        let continuation = run.body.settings.continuation;
        format!("{}: {}", run.name, continuation.describe())
    });
    let blocks = vec![
        Table::block(5, &header, rows),
        Block::List(continuations.collect()),
        Block::Text("To repeat:".to_string()),
        Block::Code(commands.join("\n")),
    ];
    Section::new("Software and settings", blocks)
}

fn formulas() -> Section {
    let mut list: Vec<String> = METRICS
        .iter()
        .map(|metric| format!("{} = {}", metric.key, metric.formula))
        .collect();
    list.extend([PEAK_RSS, PEAK_VRAM].map(|(key, formula)| format!("{key} = {formula}")));
    list.push(
        "intervals: exact 95% intervals of the median from order statistics; with fewer than 6 \
         samples the range from the smallest to the largest, of which a comparison says nothing"
            .to_string(),
    );
    Section::new("Formulas", vec![Block::List(list)])
}
