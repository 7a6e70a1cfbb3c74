//! Runs side by side: every repetition shown, beside its median and interval.

use super::axis::Axis;
use super::palette::{GRID, MUTED, series, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::metrics::{Better, HEADLINES, Metric};
use crate::report::record::ContextRun;
use crate::report::stats::Summary;
use crate::report::svg::{Regular, Stroke, Svg, Text};
use crate::report::{Run, units};

const ROW: f64 = 30.0;
const HEAD: f64 = 34.0;
const NAMES: f64 = 168.0;
const FIGURES: f64 = 170.0;

/// Headline metrics at the longest context all runs share; `None` for fewer than two runs.
pub fn compare(runs: &[Run]) -> Option<Chart> {
    let context = longest_shared_context(runs)?;
    let of = |run: &Run| -> Option<ContextRun> {
        let mut contexts = run.body.contexts.iter();
        contexts.find(|c| c.context_tokens == context).cloned()
    };
    let contexts: Vec<ContextRun> = runs.iter().filter_map(of).collect();
    let blocks: Vec<&Metric> = HEADLINES
        .into_iter()
        .filter(|metric| contexts.iter().all(|c| metric.summary(c).is_some()))
        .collect();
    if blocks.is_empty() {
        return None;
    }
    let block_height = HEAD + runs.len() as f64 * ROW + 14.0;
    let title = format!(
        "{} runs compared at {}",
        runs.len(),
        super::context_label(context)
    );
    let subtitle = format!(
        "Bars are medians of {}, lines {}s, dots the repetitions; ratios are to {}",
        super::repetitions(runs),
        super::spread(runs),
        runs[0].name
    );
    let mut svg = Frame {
        width: WIDTH,
        height: block_height * blocks.len() as f64 - 14.0,
        title: &title,
        subtitle: &subtitle,
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    for (i, metric) in blocks.into_iter().enumerate() {
        let top = TOP + i as f64 * block_height;
        block(&mut svg, runs, &contexts, metric, top);
    }
    Some(Chart {
        name: "compare".to_string(),
        title,
        svg: svg.finish(),
    })
}

fn longest_shared_context(runs: &[Run]) -> Option<usize> {
    if runs.len() < 2 {
        return None;
    }
    let has = |run: &Run, tokens| run.body.contexts.iter().any(|c| c.context_tokens == tokens);
    let candidates = runs[0].body.contexts.iter().map(|c| c.context_tokens);
    candidates
        .filter(|&tokens| runs.iter().all(|run| has(run, tokens)))
        .max()
}

fn block(svg: &mut Svg, runs: &[Run], contexts: &[ContextRun], metric: &Metric, top: f64) {
    let summaries: Vec<Summary> = contexts.iter().filter_map(|c| metric.summary(c)).collect();
    let highest = summaries.iter().map(|s| s.max).fold(0.0, f64::max);
    let heading = format!("{}, {}", metric.label, metric.unit);
    svg.text((MARGIN, top + 14.0), &heading, VALUE);
    let better = match metric.better {
        Better::Higher => "higher is better",
        Better::Lower => "lower is better",
    };
    svg.text(
        (MARGIN + VALUE.width(&heading) + 12.0, top + 14.0),
        better,
        LABEL,
    );
    let x = Axis {
        low: 0.0,
        high: highest,
        from: MARGIN + NAMES,
        to: WIDTH - MARGIN - FIGURES,
        step: highest,
    };
    let bottom = top + HEAD + runs.len() as f64 * ROW - 6.0;
    svg.line(
        (x.from, top + HEAD - 8.0),
        (x.from, bottom),
        Stroke::solid(GRID, 1.0),
    );
    for (i, summary) in summaries.iter().enumerate() {
        let color = series(i);
        let bar = top + HEAD + i as f64 * ROW - 4.0;
        let middle = bar + 10.0;
        let name = LABEL.anchored(Anchor::End);
        svg.text(
            (x.from - 12.0, middle + 4.0),
            &name.fit(&runs[i].name, NAMES - 20.0),
            name,
        );
        svg.rect(
            (x.from, bar),
            (x.at(summary.median) - x.from, 20.0),
            &tint(color, 0.3),
        );
        let (low, high) = (x.at(summary.interval.low), x.at(summary.interval.high));
        svg.line((low, middle), (high, middle), Stroke::solid(color, 2.0));
        let at = x.at(summary.median);
        svg.line((at, bar), (at, bar + 20.0), Stroke::solid(color, 2.0));
        for value in metric.values(&contexts[i]) {
            svg.dot((x.at(value), middle), 3.0, color);
        }
        let text = units::with_unit(summary.median, metric.unit);
        svg.text((x.to + 16.0, middle + 4.0), &text, VALUE);
        if i > 0 {
            let ratio = format!("{:.2}×", summary.median / summaries[0].median);
            let style = Text::new(12.0, Regular, MUTED).anchored(Anchor::End);
            svg.text((WIDTH - MARGIN, middle + 4.0), &ratio, style);
        }
    }
}
