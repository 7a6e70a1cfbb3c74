//! Runs side by side at every context they share: each repetition shown, beside median and interval.

use super::axis::Axis;
use super::palette::{GRID, MUTED, series, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::metrics::{Better, HEADLINES, Metric};
use crate::report::record::ContextRun;
use crate::report::stats::Summary;
use crate::report::svg::{Regular, Stroke, Svg, Text};
use crate::report::{Run, units};

const ROW: f64 = 24.0;
const BAR: f64 = 16.0;
/// Heading of a block, and what stands below its rows: the axis and air.
const HEAD: f64 = 30.0;
const FOOT: f64 = 42.0;
/// Air between contexts.
const APART: f64 = 8.0;
const NAMES: f64 = 200.0;
const FIGURES: f64 = 170.0;

/// One run at one context.
struct Row<'a> {
    run: usize,
    name: &'a str,
    context: &'a ContextRun,
}

/// Headline metrics at all contexts that the runs share; `None` for fewer than two runs.
pub fn compare(runs: &[Run]) -> Option<Chart> {
    let groups = shared_contexts(runs);
    let blocks: Vec<&Metric> = HEADLINES
        .into_iter()
        .filter(|metric| {
            let mut rows = groups.iter().flatten();
            rows.all(|row| metric.summary(row.context).is_some())
        })
        .collect();
    if blocks.is_empty() || groups.is_empty() {
        return None;
    }
    let rows: usize = groups.iter().map(Vec::len).sum();
    let height = HEAD + rows as f64 * ROW + (groups.len() - 1) as f64 * APART + FOOT;
    let title = format!("{} runs compared", runs.len());
    let subtitle = format!(
        "Bars are medians of {}, lines {}s, dots the repetitions; ratios are to {}",
        super::repetitions(runs),
        super::spread(runs),
        runs[0].name
    );
    let mut svg = Frame {
        width: WIDTH,
        height: height * blocks.len() as f64,
        title: &title,
        subtitle: &subtitle,
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    for (i, metric) in blocks.into_iter().enumerate() {
        block(&mut svg, &groups, metric, TOP + i as f64 * height);
    }
    Some(Chart {
        name: "compare".to_string(),
        title,
        svg: svg.finish(),
    })
}

/// `[context][run]`, for the contexts that all runs have.
fn shared_contexts(runs: &[Run]) -> Vec<Vec<Row<'_>>> {
    if runs.len() < 2 {
        return Vec::new();
    }
    let at = |tokens: usize| -> Option<Vec<Row>> {
        let row = |(run, r): (usize, &'_ Run)| {
            let context = r
                .body
                .contexts
                .iter()
                .position(|c| c.context_tokens == tokens)?;
            Some((run, context))
        };
        let places: Option<Vec<_>> = runs.iter().enumerate().map(row).collect();
        Some(
            places?
                .into_iter()
                .map(|(run, context)| Row {
                    run,
                    name: &runs[run].name,
                    context: &runs[run].body.contexts[context],
                })
                .collect(),
        )
    };
    let contexts = runs[0].body.contexts.iter();
    contexts.filter_map(|c| at(c.context_tokens)).collect()
}

fn block(svg: &mut Svg, groups: &[Vec<Row>], metric: &Metric, top: f64) {
    let summaries = || {
        groups
            .iter()
            .flatten()
            .filter_map(|r| metric.summary(r.context))
    };
    let highest = summaries().map(|s| s.max).fold(0.0, f64::max);
    let heading = format!("{}, {}", metric.label, metric.unit);
    svg.text((MARGIN, top + 14.0), &heading, VALUE);
    let better = match metric.better {
        Better::Higher => "higher is better",
        Better::Lower => "lower is better",
    };
    let beside = MARGIN + VALUE.width(&heading) + 12.0;
    svg.text((beside, top + 14.0), better, LABEL);
    let pixels = (MARGIN + NAMES, WIDTH - MARGIN - FIGURES);
    let x = Axis::exact(0.0, highest * 1.02, pixels, 6);
    let rows: usize = groups.iter().map(Vec::len).sum();
    let bottom = top + HEAD + rows as f64 * ROW + (groups.len() - 1) as f64 * APART;
    for (value, text) in x.ticks() {
        let at = x.at(value);
        svg.line(
            (at, top + HEAD - 4.0),
            (at, bottom),
            Stroke::solid(GRID, 1.0),
        );
        svg.text((at, bottom + 15.0), &text, LABEL.anchored(Anchor::Middle));
    }
    let mut line = top + HEAD;
    for group in groups {
        let context = units::tokens(group[0].context.context_tokens);
        svg.text((MARGIN, line + 13.0), &context, VALUE);
        let base = metric.summary(group[0].context).map(|s| s.median);
        for row in group {
            draw_row(svg, row, metric, base, &x, line);
            line += ROW;
        }
        line += APART;
    }
}

fn draw_row(svg: &mut Svg, row: &Row, metric: &Metric, base: Option<f64>, x: &Axis, top: f64) {
    let Some(Summary {
        median, interval, ..
    }) = metric.summary(row.context)
    else {
        return;
    };
    let color = series(row.run);
    let middle = top + BAR / 2.0;
    let name = LABEL.anchored(Anchor::End);
    let shown = name.fit(row.name, NAMES - 60.0);
    svg.text((x.from - 10.0, middle + 4.0), &shown, name);
    let length = x.at(median) - x.from;
    svg.rect((x.from, top), (length, BAR), &tint(color, 0.3));
    let ends = (x.at(interval.low), x.at(interval.high));
    svg.line(
        (ends.0, middle),
        (ends.1, middle),
        Stroke::solid(color, 2.0),
    );
    let at = x.at(median);
    svg.line((at, top), (at, top + BAR), Stroke::solid(color, 2.0));
    for value in metric.values(row.context) {
        svg.dot((x.at(value), middle), 2.4, color);
    }
    let text = units::with_unit(median, metric.unit);
    svg.text((x.to + 16.0, middle + 4.0), &text, VALUE);
    if let Some(base) = base.filter(|&base| row.run > 0 && base > 0.0) {
        let ratio = format!("{:.2}×", median / base);
        let style = Text::new(12.0, Regular, MUTED).anchored(Anchor::End);
        svg.text((WIDTH - MARGIN, middle + 4.0), &ratio, style);
    }
}
