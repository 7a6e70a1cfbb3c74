//! Results for what runs builds: a job summary, JUnit, benchmark trackers and OpenMetrics.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::metrics::{Better, DECODE_TOK_S, HEADLINES, Metric, PREFILL_TOK_S};
use super::stats::{Spread, Summary};
use super::svg::escape;
use super::verdict::{Check, Outcome, Verdict};
use super::{Files, ReportError, ReportInputs, Run, units};

/// Writes all formats into `folder`; returned are the paths.
///
/// # Errors
/// [`ReportError`]: nothing to report, or a file that cannot be written.
pub fn write(inputs: &ReportInputs, folder: &Path) -> Result<Vec<PathBuf>, ReportError> {
    if inputs.runs.is_empty() {
        return Err(ReportError::Empty);
    }
    let mut files = Files::in_folder(folder)?;
    let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
    files.write("summary.md", summary(inputs).as_bytes())?;
    files.write("verdict.json", &pretty(&json!(inputs.verdicts)))?;
    files.write("junit.xml", junit(inputs).as_bytes())?;
    for (better, name) in [
        (Better::Higher, "benchmark-bigger-is-better.json"),
        (Better::Lower, "benchmark-smaller-is-better.json"),
    ] {
        files.write(name, &pretty(&benchmark_action(newest(inputs), better)))?;
    }
    files.write("bencher.json", &pretty(&bencher(newest(inputs))))?;
    files.write("openmetrics.txt", openmetrics(&inputs.runs).as_bytes())?;
    Ok(files.written)
}

/// What trackers follow: the last run, which is the one under test.
fn newest(inputs: &ReportInputs) -> &Run {
    inputs.runs.last().expect("there are runs")
}

fn figures(run: &Run) -> impl Iterator<Item = (usize, &'static Metric, Summary)> {
    run.body.contexts.iter().flat_map(|context| {
        let of = |metric: &&'static Metric| {
            Some((context.context_tokens, *metric, metric.summary(context)?))
        };
        HEADLINES.iter().filter_map(of)
    })
}

/// The verdict on top, then figures with bars of text: a job summary shows no picture that is not on
/// some server.
pub fn summary(inputs: &ReportInputs) -> String {
    let mut out = String::from("## moectl bench\n");
    for verdict in &inputs.verdicts {
        let sign = match verdict.outcome {
            Outcome::Pass => "✅",
            Outcome::Undecided => "⚠️",
            Outcome::Fail => "❌",
        };
        let _ = write!(
            out,
            "\n### {sign} {}: {} against {}\n\n",
            verdict.outcome.name(),
            text(&verdict.new),
            text(&verdict.base)
        );
        for reason in &verdict.reasons {
            let _ = writeln!(out, "- {}", text(reason));
        }
        out += "\n| | context | metric | base | new | change, 95% interval |\n|---|--:|---|--:|--:|--:|\n";
        for check in &verdict.checks {
            out += &row(check);
        }
        let _ = write!(out, "\nRule: {}.\n", text(&verdict.rule));
    }
    for metric in [&DECODE_TOK_S, &PREFILL_TOK_S] {
        out += &bars(&inputs.runs, metric);
    }
    for label in super::content::labels(&inputs.runs) {
        let _ = write!(out, "\n- {}", text(&label));
    }
    out + "\n"
}

fn row(check: &Check) -> String {
    let value = |v: Option<f64>| match (v, check.unit) {
        (Some(v), "nats") => format!("{v:.2e}"),
        (Some(v), "perplexity") => format!("{v:.4}"),
        (Some(v), unit) => units::with_unit(v, unit),
        (None, _) => "–".into(),
    };
    format!(
        "| {} | {} | {} | {} | {} | {} |\n",
        check.outcome.name(),
        check.context_tokens.map_or(String::new(), units::tokens),
        check.metric,
        value(check.base),
        value(check.new),
        check.change().unwrap_or_else(|| text(&check.reason))
    )
}

/// A bar of text per run and context, the longest 40 characters.
fn bars(runs: &[Run], metric: &Metric) -> String {
    const LONGEST: f64 = 40.0;
    let rows: Vec<(String, Summary)> = runs
        .iter()
        .flat_map(|run| {
            run.body.contexts.iter().filter_map(move |context| {
                let name = format!("{} {}", units::tokens(context.context_tokens), run.name);
                Some((name, metric.summary(context)?))
            })
        })
        .collect();
    let most = rows.iter().map(|(_, s)| s.median).fold(0.0, f64::max);
    let width = rows.iter().map(|(name, _)| name.chars().count()).max();
    let Some(width) = width.filter(|_| most > 0.0) else {
        return String::new();
    };
    let spread = Spread::describe(rows.iter().map(|(_, s)| s.samples));
    let mut out = format!(
        "\n**{}, {}** (median, {spread})\n\n```text\n",
        metric.label, metric.unit
    );
    for (name, s) in rows {
        let bar = "█".repeat((s.median / most * LONGEST).round().max(1.0) as usize);
        let _ = writeln!(
            out,
            "{name:width$} {bar:40} {} [{}, {}]",
            units::significant(s.median),
            units::significant(s.interval.low),
            units::significant(s.interval.high)
        );
    }
    out + "```\n"
}

/// Markdown's own characters in names from elsewhere.
fn text(name: &str) -> String {
    let escaped = |c: char| match c {
        '|' | '*' | '<' | '`' => format!("\\{c}"),
        '\n' | '\r' => " ".into(),
        c => c.to_string(),
    };
    name.chars().map(escaped).collect()
}

/// One test case per check; without a comparison, one per figure, which passes.
pub fn junit(inputs: &ReportInputs) -> String {
    let mut cases = String::new();
    let (mut all, mut failures, mut errors) = (0, 0, 0);
    for verdict in &inputs.verdicts {
        for check in &verdict.checks {
            all += 1;
            let (class, name) = (escape(&verdict.new), escape(&check.place()));
            let inner = match check.outcome {
                Outcome::Pass => format!("<system-out>{}</system-out>", escape(&check.to_string())),
                Outcome::Fail => {
                    failures += 1;
                    format!("<failure message=\"{}\"/>", escape(&check.to_string()))
                }
                Outcome::Undecided => {
                    errors += 1;
                    format!("<error message=\"{}\"/>", escape(&check.to_string()))
                }
            };
            let _ = writeln!(
                cases,
                "    <testcase classname=\"{class}\" name=\"{name}\">{inner}</testcase>"
            );
        }
    }
    if inputs.verdicts.is_empty() {
        for (context, metric, s) in inputs.runs.iter().flat_map(figures) {
            all += 1;
            let name = format!("{} at {} context", metric.key, units::tokens(context));
            let value = units::with_unit(s.median, metric.unit);
            let _ = writeln!(
                cases,
                "    <testcase classname=\"moectl\" name=\"{}\"><system-out>{value}</system-out></testcase>",
                escape(&name)
            );
        }
    }
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n  <testsuite name=\"moectl bench\" \
         tests=\"{all}\" failures=\"{failures}\" errors=\"{errors}\">\n{cases}  </testsuite>\n</testsuites>\n"
    )
}

/// `customBiggerIsBetter` or `customSmallerIsBetter` of github-action-benchmark.
pub fn benchmark_action(run: &Run, better: Better) -> Value {
    let entry = |(context, metric, s): (usize, &Metric, Summary)| {
        json!({
            "name": format!("{} at {} context", metric.key, units::tokens(context)),
            "unit": metric.unit,
            "value": s.median,
            "range": format!("{} to {}", units::significant(s.interval.low), units::significant(s.interval.high)),
            "extra": format!("{}, {} samples; {}", s.spread.name(), s.samples, run.body.hardware.summary()),
        })
    };
    figures(run)
        .filter(|(_, metric, _)| metric.better == better)
        .map(entry)
        .collect()
}

/// Bencher Metric Format: benchmark, measure, value with its bounds.
pub fn bencher(run: &Run) -> Value {
    let mut all = Map::new();
    for (context, metric, s) in figures(run) {
        let name = format!("context {}", units::tokens(context));
        let measures = all.entry(name).or_insert_with(|| json!({}));
        measures[metric.key.replace('_', "-")] = json!({
            "value": s.median,
            "lower_value": s.interval.low,
            "upper_value": s.interval.high,
        });
    }
    Value::Object(all)
}

/// Gauges of medians and the ends of their intervals.
pub fn openmetrics(runs: &[Run]) -> String {
    let mut out = String::new();
    for metric in HEADLINES {
        let _ = writeln!(
            out,
            "# TYPE moectl_bench_{0} gauge\n# HELP moectl_bench_{0} {1}",
            metric.key, metric.formula
        );
        for run in runs {
            let label = |text: &str| {
                text.replace('\\', "\\\\")
                    .replace('"', "\\\"")
                    .replace('\n', "\\n")
            };
            for (context, _, s) in figures(run).filter(|(_, m, _)| m.key == metric.key) {
                for (quantity, value) in [
                    ("median", s.median),
                    ("low", s.interval.low),
                    ("high", s.interval.high),
                ] {
                    let _ = writeln!(
                        out,
                        "moectl_bench_{}{{run=\"{}\",model=\"{}\",context_tokens=\"{context}\",\
                         quantity=\"{quantity}\"}} {value}",
                        metric.key,
                        label(&run.name),
                        label(&run.model)
                    );
                }
            }
        }
    }
    out + "# EOF\n"
}

/// `verdict: pass` and its reasons in one line each, for reports.
pub fn headline(verdict: &Verdict) -> String {
    let mut line = format!(
        "{}: {} against {}",
        verdict.outcome.name().to_uppercase(),
        verdict.new,
        verdict.base
    );
    for reason in &verdict.reasons {
        line += &format!("; {reason}");
    }
    line
}
