//! How the time between tokens is distributed: one histogram per context length.

use super::axis::Axis;
use super::palette::{GRID, INK, MUTED, series, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::Run;
use crate::report::stats::percentile;
use crate::report::svg::{Regular, Stroke, Svg, Text};
use crate::report::units::significant;

const ROW: f64 = 96.0;
const LEGEND: f64 = 196.0;
const BINS: usize = 72;

struct Row<'a> {
    run: usize,
    context_tokens: usize,
    heading: String,
    run_name: &'a str,
    samples: Vec<f64>,
    p50: f64,
    p90: f64,
    p99: f64,
}

/// `None` if no run decoded a second token.
pub fn latency(runs: &[Run]) -> Option<Chart> {
    let rows = rows(runs);
    let lowest = low_end(&rows)?;
    // A single stall must not squeeze all else into one bin: what lies beyond is counted in words.
    let beyond_p99 = rows.iter().map(|r| r.p99).fold(0.0, f64::max) * 1.15;
    let longest = rows
        .iter()
        .flat_map(|r| &r.samples)
        .copied()
        .fold(0.0, f64::max);

    let title = "Time between tokens while decoding";
    let mut svg = Frame {
        width: WIDTH,
        height: rows.len() as f64 * ROW + 40.0,
        title,
        subtitle: "Share of tokens per bin, all repetitions together; lines at the median and the \
                   99th percentile",
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    let span = (MARGIN + LEGEND, WIDTH - MARGIN - 8.0);
    let x = Axis::exact(lowest, longest.min(beyond_p99), span, 8);
    let bottom = TOP + rows.len() as f64 * ROW;
    for (value, text) in x.ticks() {
        let at = x.at(value);
        svg.line((at, TOP), (at, bottom), Stroke::solid(GRID, 1.0));
        svg.text((at, bottom + 18.0), &text, LABEL.anchored(Anchor::Middle));
    }
    let middle = (x.from + x.to) / 2.0;
    let style = LABEL.anchored(Anchor::Middle);
    svg.text((middle, bottom + 37.0), "inter-token latency, ms", style);
    for (i, row) in rows.iter().enumerate() {
        draw_row(&mut svg, row, &x, TOP + i as f64 * ROW, runs.len() > 1);
    }
    Some(Chart {
        name: "latency".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

fn rows(runs: &[Run]) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for context in &run.body.contexts {
            let samples = context.pooled_itl_ms();
            let at = |p| percentile(&samples, p);
            if let (Some(p50), Some(p90), Some(p99)) = (at(50.0), at(90.0), at(99.0)) {
                rows.push(Row {
                    run: index,
                    context_tokens: context.context_tokens,
                    heading: super::context_label(context.context_tokens),
                    run_name: &run.name,
                    samples,
                    p50,
                    p90,
                    p99,
                });
            }
        }
    }
    rows.sort_by_key(|row| (row.context_tokens, row.run));
    rows
}

/// Where the axis begins: a little below the fastest token; `None` without samples.
fn low_end(rows: &[Row]) -> Option<f64> {
    let fastest = rows
        .iter()
        .flat_map(|r| &r.samples)
        .copied()
        .reduce(f64::min)?;
    let slowest_p99 = rows.iter().map(|r| r.p99).fold(0.0, f64::max);
    let air = 0.04 * (slowest_p99 - fastest);
    // With a wide spread the axis may as well start at zero.
    Some(if fastest < slowest_p99 / 3.0 {
        0.0
    } else {
        fastest - air
    })
}

fn draw_row(svg: &mut Svg, row: &Row, x: &Axis, top: f64, several_runs: bool) {
    let color = series(row.run);
    let base = top + ROW - 8.0;
    let height = ROW - 34.0;
    let width = (x.to - x.from) / BINS as f64;
    let bins = histogram(&row.samples, x);
    let fullest = bins.iter().copied().max().unwrap_or(1).max(1) as f64;
    for (i, &count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let tall = (count as f64 / fullest * height).max(1.0);
        let left = x.from + i as f64 * width;
        svg.rect(
            (left + 0.5, base - tall),
            (width - 1.0, tall),
            &tint(color, 0.6),
        );
    }
    svg.line((x.from, base), (x.to, base), Stroke::solid(INK, 1.0));
    // The scale upwards: how many of the tokens are in the fullest bin.
    let scale = Text::new(10.0, Regular, MUTED).anchored(Anchor::End);
    let share = format!("{:.0}%", 100.0 * fullest / row.samples.len().max(1) as f64);
    svg.text((x.from - 4.0, base - height + 4.0), &share, scale);
    svg.text((x.from - 4.0, base), "0", scale);

    let small = Text::new(10.5, Regular, MUTED);
    let mark = |svg: &mut Svg, value: f64, name: &str, stroke, anchor, shift: f64| {
        let at = x.at(value);
        svg.line((at, top + 14.0), (at, base), stroke);
        svg.text((at + shift, top + 22.0), name, small.anchored(anchor));
    };
    let solid = Stroke::solid(INK, 1.25);
    mark(svg, row.p50, "p50", solid, Anchor::End, -4.0);
    let dashed = Stroke::dashed(INK, 1.25);
    mark(svg, row.p99, "p99", dashed, Anchor::Start, 4.0);

    let beyond: Vec<f64> = row
        .samples
        .iter()
        .copied()
        .filter(|&s| s > x.high)
        .collect();
    if !beyond.is_empty() {
        let longest = beyond.iter().copied().fold(0.0, f64::max);
        let note = format!(
            "+{} beyond, up to {} ms",
            beyond.len(),
            significant(longest)
        );
        // Above the bars, where no mark is drawn.
        svg.text((x.to, top + 8.0), &note, small.anchored(Anchor::End));
    }

    svg.text((MARGIN, top + 26.0), &row.heading, VALUE);
    let mut line = top + 42.0;
    if several_runs {
        let style = Text::new(11.5, Regular, color);
        svg.text(
            (MARGIN, line),
            &style.fit(row.run_name, LEGEND - 24.0),
            style,
        );
        line += 15.0;
    }
    let style = Text::new(11.0, Regular, MUTED);
    let middle = format!(
        "p50 {}  ·  p90 {}",
        significant(row.p50),
        significant(row.p90)
    );
    let tail = format!(
        "p99 {}  ·  {} tokens",
        significant(row.p99),
        row.samples.len()
    );
    svg.text((MARGIN, line), &style.fit(&middle, LEGEND - 20.0), style);
    svg.text(
        (MARGIN, line + 15.0),
        &style.fit(&tail, LEGEND - 20.0),
        style,
    );
}

fn histogram(samples: &[f64], x: &Axis) -> Vec<usize> {
    let mut bins = vec![0; BINS];
    for &sample in samples.iter().filter(|s| (x.low..=x.high).contains(*s)) {
        let bin = ((sample - x.low) / (x.high - x.low) * BINS as f64) as usize;
        bins[bin.min(BINS - 1)] += 1;
    }
    bins
}
