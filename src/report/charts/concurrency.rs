//! A server under load: throughput and latencies against the number of requests at once.

use super::axis::{Axis, spread};
use super::palette::{GRID, INK, series};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::served::{Level, Tail, levels};
use crate::report::stats::percentile;
use crate::report::svg::{Stroke, Svg, Text};
use crate::report::{Run, units};

const HEIGHT: f64 = 320.0;
const GAP: f64 = 40.0;
const NAMES: f64 = 92.0;

/// One line of a panel.
struct Line {
    run: usize,
    name: String,
    dashed: bool,
    /// Requests at once, value
    points: Vec<(usize, f64)>,
}

struct Panel {
    heading: &'static str,
    lines: Vec<Line>,
}

/// One picture per context that was measured with several requests at once.
pub fn concurrency(runs: &[Run]) -> Vec<Chart> {
    let mut contexts: Vec<usize> = (runs.iter())
        .flat_map(|run| &run.body.contexts)
        .filter(|context| !context.concurrent.is_empty())
        .map(|context| context.context_tokens)
        .collect();
    contexts.sort_unstable();
    contexts.dedup();
    let several = contexts.len() > 1;
    let of = |tokens: &usize| {
        let name = match several {
            true => format!("concurrency-{tokens}"),
            false => "concurrency".to_string(),
        };
        draw(runs, *tokens, name)
    };
    contexts.iter().map(of).collect()
}

fn draw(runs: &[Run], context_tokens: usize, name: String) -> Chart {
    let title = format!("Requests at once, {}", super::context_label(context_tokens));
    let mut svg = Frame {
        width: WIDTH,
        height: HEIGHT,
        title: &title,
        subtitle: "Closed loop: every client sends its next request when its last is answered; p99, or \
                   the largest of fewer than 100 samples, dashed",
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    let panels = panels(runs, context_tokens);
    let count = panels.len() as f64;
    let width = (WIDTH - 2.0 * MARGIN - GAP * (count - 1.0)) / count;
    for (i, panel) in panels.iter().enumerate() {
        draw_panel(&mut svg, panel, MARGIN + i as f64 * (width + GAP), width);
    }
    Chart {
        name,
        title,
        svg: svg.finish(),
    }
}

fn panels(runs: &[Run], context_tokens: usize) -> [Panel; 3] {
    let line = |run: usize, what: &str, dashed, value: &dyn Fn(&Level) -> Option<f64>| {
        let contexts = runs[run].body.contexts.iter();
        let here = contexts.filter(|context| context.context_tokens == context_tokens);
        let point = |level: Level| Some((level.concurrency, value(&level)?));
        let name = match (runs.len() > 1, what) {
            (false, what) => what.to_string(),
            (true, _) => runs[run].name.clone(),
        };
        Line {
            run,
            name,
            dashed,
            points: here.flat_map(levels).filter_map(point).collect(),
        }
    };
    let each = |lines: &dyn Fn(usize) -> Vec<Line>| -> Vec<Line> {
        let lines = (0..runs.len()).flat_map(lines);
        lines.filter(|line| !line.points.is_empty()).collect()
    };
    let pair = |run, samples: &dyn Fn(&Level) -> Vec<f64>| {
        let tail = |level: &Level| Tail::of(&samples(level)).map(Tail::value);
        vec![
            line(run, "p50", false, &|level| {
                percentile(&samples(level), 50.0)
            }),
            line(run, "p99", true, &tail),
        ]
    };
    [
        Panel {
            heading: "Generated, all together, tok/s",
            lines: each(&|run| {
                let total = |level: &Level| Some(level.total_tok_s());
                vec![line(run, "", false, &total)]
            }),
        },
        Panel {
            heading: "Time to first token, ms",
            lines: each(&|run| pair(run, &|level| level.ttft_ms())),
        },
        Panel {
            heading: "Time between tokens, ms",
            lines: each(&|run| pair(run, &|level| level.itl_ms())),
        },
    ]
}

fn draw_panel(svg: &mut Svg, panel: &Panel, left: f64, width: f64) {
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let highest = points().map(|point| point.1).fold(0.0, f64::max);
    let (top, bottom) = (TOP + 34.0, TOP + HEIGHT - 40.0);
    let y = Axis::round(0.0, highest * 1.05, (bottom, top), 5);
    let ticks = y.ticks();
    let gutter = ticks.iter().map(|t| LABEL.width(&t.1)).fold(0.0, f64::max) + 10.0;
    let named = panel.lines.iter().any(|line| !line.name.is_empty());
    let room = if named { NAMES } else { 12.0 };
    let (x0, x1) = (left + gutter, left + width - room);
    svg.text((left, TOP + 10.0), panel.heading, VALUE);
    for (value, text) in &ticks {
        let at = y.at(*value);
        svg.line((x0, at), (x1, at), Stroke::solid(GRID, 1.0));
        svg.text((x0 - 8.0, at + 4.0), text, LABEL.anchored(Anchor::End));
    }
    let octave = |concurrency: usize| (concurrency as f64).log2();
    let most = points().map(|point| octave(point.0)).fold(0.0, f64::max);
    let x = Axis {
        low: -0.3,
        high: most + 0.3,
        from: x0,
        to: x1,
        step: 1.0,
    };
    let mut counts: Vec<usize> = points().map(|point| point.0).collect();
    counts.sort_unstable();
    counts.dedup();
    svg.line((x0, bottom), (x1, bottom), Stroke::solid(INK, 1.0));
    let mut free_from = f64::NEG_INFINITY;
    for count in counts {
        let (at, text) = (x.at(octave(count)), count.to_string());
        let half = LABEL.width(&text) / 2.0;
        svg.line((at, bottom), (at, bottom + 4.0), Stroke::solid(INK, 1.0));
        if at - half >= free_from {
            svg.text((at, bottom + 18.0), &text, LABEL.anchored(Anchor::Middle));
            free_from = at + half + 6.0;
        }
    }
    let style = LABEL.anchored(Anchor::Middle);
    svg.text(((x0 + x1) / 2.0, bottom + 36.0), "requests at once", style);
    let mut ends = Vec::new();
    for line in &panel.lines {
        let color = series(line.run);
        let at = |point: &(usize, f64)| (x.at(octave(point.0)), y.at(point.1));
        let path: Vec<(f64, f64)> = line.points.iter().map(at).collect();
        let stroke = match line.dashed {
            true => Stroke::dashed(color, 1.5),
            false => Stroke::solid(color, 2.0),
        };
        svg.polyline(&path, stroke);
        path.iter().for_each(|&at| svg.dot(at, 3.5, color));
        ends.extend(path.last().map(|end| end.1 + 4.0));
    }
    for (line, at) in panel.lines.iter().zip(spread(&ends, 15.0, y.to, y.from)) {
        let style = Text {
            color: series(line.run),
            ..VALUE
        };
        let value = line.points.last().map_or(0.0, |point| point.1);
        let value = format!("  {}", units::significant(value));
        let name = style.fit(&line.name, NAMES - style.width(&value) - 8.0);
        svg.text((x1 + 6.0, at), &(name + &value), style);
    }
}
