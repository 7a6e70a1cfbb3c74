//! Tokens per second against context length: decode and prefill side by side.

use super::axis::{Axis, spread};
use super::palette::{GRID, INK, series, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::Run;
use crate::report::metrics::{DECODE_TOK_S, Metric, PREFILL_TOK_S};
use crate::report::stats::Summary;
use crate::report::svg::{Stroke, Svg};
use crate::report::units;

const HEIGHT: f64 = 320.0;
const GAP: f64 = 56.0;
/// Between the intervals of several runs at one context.
const DODGE: f64 = 9.0;

/// Median, interval and every repetition; `None` without a single rate.
pub fn throughput(runs: &[Run]) -> Option<Chart> {
    let panels: Vec<&Metric> = [&DECODE_TOK_S, &PREFILL_TOK_S]
        .into_iter()
        .filter(|metric| runs.iter().any(|run| !points(run, metric).is_empty()))
        .collect();
    if panels.is_empty() {
        return None;
    }
    let title = "Throughput against context length";
    let subtitle = match super::repetitions(runs).as_str() {
        "1 repetition" => "A single repetition, so there is no interval".to_string(),
        several => format!(
            "Median of {several} with its {}; small dots are the repetitions",
            super::spread(runs)
        ),
    };
    let mut svg = Frame {
        width: WIDTH,
        height: HEIGHT,
        title,
        subtitle: &subtitle,
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    let count = panels.len() as f64;
    let width = (WIDTH - 2.0 * MARGIN - GAP * (count - 1.0)) / count;
    for (i, metric) in panels.into_iter().enumerate() {
        let left = MARGIN + i as f64 * (width + GAP);
        panel(&mut svg, runs, metric, left, width);
    }
    Some(Chart {
        name: "throughput".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

struct Point {
    context_tokens: usize,
    summary: Summary,
    values: Vec<f64>,
}

fn points(run: &Run, metric: &Metric) -> Vec<Point> {
    let mut points: Vec<Point> = run
        .body
        .contexts
        .iter()
        .filter_map(|context| {
            Some(Point {
                context_tokens: context.context_tokens.max(1),
                summary: metric.summary(context)?,
                values: metric.values(context),
            })
        })
        .collect();
    points.sort_by_key(|p| p.context_tokens);
    points
}

fn panel(svg: &mut Svg, runs: &[Run], metric: &Metric, left: f64, width: f64) {
    let lines: Vec<Vec<Point>> = runs.iter().map(|run| points(run, metric)).collect();
    let every = || lines.iter().flatten();
    let several = runs.len() > 1;
    let highest = every().map(|p| p.summary.max).fold(0.0, f64::max);
    let name_room = if several { 150.0 } else { 12.0 };
    let (top, bottom) = (TOP + 34.0, TOP + HEIGHT - 40.0);
    // A little air above the highest point holds its label.
    let y = Axis::round(0.0, highest * 1.08, (bottom, top), 5);
    let ticks = y.ticks();
    let gutter = ticks.iter().map(|t| LABEL.width(&t.1)).fold(0.0, f64::max) + 10.0;
    let (x0, x1) = (left + gutter, left + width - name_room);
    let x = context_axis(every().map(|p| p.context_tokens), x0, x1);

    svg.text(
        (left, TOP + 10.0),
        &format!("{}, {}", metric.label, metric.unit),
        VALUE,
    );
    for (value, text) in &ticks {
        let at = y.at(*value);
        svg.line((x0, at), (x1, at), Stroke::solid(GRID, 1.0));
        svg.text((x0 - 8.0, at + 4.0), text, LABEL.anchored(Anchor::End));
    }
    context_labels(svg, &x, every().map(|p| p.context_tokens), bottom);

    for (index, line) in lines.iter().enumerate() {
        let color = series(index);
        // Side by side, or the intervals of several runs would hide each other.
        let aside = DODGE * (index as f64 - (lines.len() - 1) as f64 / 2.0);
        let at = |p: &Point, value| {
            let along = x.at((p.context_tokens as f64).log2());
            (along + aside, y.at(value))
        };
        let medians: Vec<(f64, f64)> = line.iter().map(|p| at(p, p.summary.median)).collect();
        svg.polyline(&medians, Stroke::solid(&tint(color, 0.55), 1.5));
        for point in line {
            for &value in &point.values {
                let (px, py) = at(point, value);
                let beside = if several { 0.0 } else { 9.0 };
                svg.dot((px + beside, py), 2.2, &tint(color, 0.45));
            }
            let ends = point.summary.interval;
            svg.line(
                at(point, ends.low),
                at(point, ends.high),
                Stroke::solid(color, 2.0),
            );
        }
        for (point, &median) in line.iter().zip(&medians) {
            svg.dot(median, 4.5, color);
            if !several {
                let above = at(point, point.summary.max).1 - 9.0;
                let text = units::significant(point.summary.median);
                svg.text((median.0, above), &text, VALUE.anchored(Anchor::Middle));
            }
        }
    }
    if several {
        name_lines(svg, runs, &lines, &x, &y, name_room);
    }
}

/// The name of each run beside its last point, with its value there.
fn name_lines(svg: &mut Svg, runs: &[Run], lines: &[Vec<Point>], x: &Axis, y: &Axis, room: f64) {
    let named: Vec<(usize, &Point)> = lines
        .iter()
        .enumerate()
        .filter_map(|(i, line)| Some((i, line.last()?)))
        .collect();
    let wanted: Vec<f64> = named
        .iter()
        .map(|(_, p)| y.at(p.summary.median) + 4.0)
        .collect();
    let placed = spread(&wanted, 15.0, y.to, y.from);
    for ((i, _), at) in named.iter().zip(placed) {
        let style = crate::report::svg::Text {
            color: series(*i),
            ..VALUE
        };
        let value = lines[*i].last().map_or(String::new(), |point| {
            format!("  {}", units::significant(point.summary.median))
        });
        let name = style.fit(&runs[*i].name, room - style.width(&value) - 8.0);
        svg.text((x.to + 6.0, at), &(name + &value), style);
    }
}

/// Powers of two, with half an octave of air on either side.
fn context_axis(contexts: impl Iterator<Item = usize>, from: f64, to: f64) -> Axis {
    let octaves: Vec<f64> = contexts.map(|c| (c as f64).log2()).collect();
    let low = octaves.iter().copied().fold(f64::INFINITY, f64::min) - 0.5;
    let high = octaves.iter().copied().fold(f64::NEG_INFINITY, f64::max) + 0.5;
    Axis {
        low,
        high,
        from,
        to,
        step: 1.0,
    }
}

/// Labels the contexts that were measured, leaving out those that would touch.
fn context_labels(svg: &mut Svg, x: &Axis, contexts: impl Iterator<Item = usize>, bottom: f64) {
    let mut contexts: Vec<usize> = contexts.collect();
    contexts.sort_unstable();
    contexts.dedup();
    svg.line((x.from, bottom), (x.to, bottom), Stroke::solid(INK, 1.0));
    let mut free_from = f64::NEG_INFINITY;
    for context in contexts {
        let at = x.at((context as f64).log2());
        svg.line((at, bottom), (at, bottom + 4.0), Stroke::solid(INK, 1.0));
        let text = units::tokens(context);
        let half = LABEL.width(&text) / 2.0;
        if at - half >= free_from {
            svg.text((at, bottom + 18.0), &text, LABEL.anchored(Anchor::Middle));
            free_from = at + half + 6.0;
        }
    }
    let middle = (x.from + x.to) / 2.0;
    let style = LABEL.anchored(Anchor::Middle);
    svg.text(
        (middle, bottom + 36.0),
        "context, tokens (log scale)",
        style,
    );
}
