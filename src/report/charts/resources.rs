//! What the machine did while the run went on: memory, CPU and GPU against time.

use super::axis::Axis;
use super::palette::{FAINT, GRID, INK, MUTED, series};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::hardware::Sample;
use crate::report::Run;
use crate::report::svg::{Regular, Stroke, Svg, Text};

const PANEL: f64 = 150.0;
const COLUMNS: usize = 2;
const GAP: f64 = 56.0;
const LEGEND: f64 = 22.0;
/// More points than this say nothing more at this width.
const MAX_POINTS: usize = 240;
const GIB: f64 = (1u64 << 30) as f64;

/// One quantity; a panel is drawn if any run has it.
struct Quantity {
    name: &'static str,
    value: fn(&Sample) -> Option<f64>,
}

const QUANTITIES: [Quantity; 8] = [
    Quantity {
        name: "CPU, cores busy",
        value: |s| Some(s.cpu_cores),
    },
    Quantity {
        name: "GPU busy, %",
        value: |s| s.gpu_utilisation_percent.map(f64::from),
    },
    Quantity {
        name: "RAM of the process, GiB",
        value: |s| Some(s.rss_bytes as f64 / GIB),
    },
    Quantity {
        name: "GPU memory, GiB",
        value: |s| s.vram_bytes.map(|bytes| bytes as f64 / GIB),
    },
    Quantity {
        name: "PCIe to the GPU, GB/s",
        value: |s| s.pcie_rx_gb_s,
    },
    Quantity {
        name: "PCIe from the GPU, GB/s",
        value: |s| s.pcie_tx_gb_s,
    },
    Quantity {
        name: "GPU power, W",
        value: |s| s.gpu_power_w,
    },
    Quantity {
        name: "GPU memory busy, %",
        value: |s| s.gpu_memory_utilisation_percent.map(f64::from),
    },
];

/// Seconds and values of one run.
struct Line<'a> {
    run: &'a str,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

/// `None` if no run was watched.
pub fn resources(runs: &[Run]) -> Option<Chart> {
    let panels: Vec<(&Quantity, Vec<Line>)> = QUANTITIES
        .iter()
        .map(|quantity| (quantity, lines(runs, quantity)))
        .filter(|(_, lines)| !lines.is_empty())
        .collect();
    let points = panels.iter().flat_map(|(_, lines)| lines);
    let seconds = points
        .filter_map(|line| Some(line.points.last()?.0))
        .fold(0.0, f64::max);
    if seconds <= 0.0 {
        return None;
    }
    let legend = if runs.len() > 1 { LEGEND } else { 0.0 };
    let title = "Memory, CPU and GPU during the run";
    let mut svg = Frame {
        width: WIDTH,
        height: legend + PANEL * panels.len().div_ceil(COLUMNS) as f64,
        title,
        subtitle: "Sampled through warm-ups and repetitions, dashed lines where a context begins; \
                   what the machine does not count is left out",
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    if runs.len() > 1 {
        draw_legend(&mut svg, &panels[0].1);
    }
    let width = (WIDTH - 2.0 * MARGIN - GAP) / COLUMNS as f64;
    for (i, (quantity, lines)) in panels.iter().enumerate() {
        let left = MARGIN + (i % COLUMNS) as f64 * (width + GAP);
        let top = TOP + legend + (i / COLUMNS) as f64 * PANEL;
        let x = draw_panel(&mut svg, quantity.name, lines, seconds, (left, top), width);
        if let [run] = runs {
            mark_contexts(&mut svg, run, &x, top);
        }
    }
    Some(Chart {
        name: "resources".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

fn lines<'a>(runs: &'a [Run], quantity: &Quantity) -> Vec<Line<'a>> {
    let line = |(i, run): (usize, &'a Run)| {
        let samples = &run.body.monitor.as_ref()?.samples;
        let values: Vec<(f64, f64)> = samples
            .iter()
            .filter_map(|s| Some((s.at_ms / 1e3, (quantity.value)(s)?)))
            .collect();
        (values.len() > 1).then(|| Line {
            run: &run.name,
            color: series(i),
            points: thinned(&values),
        })
    };
    runs.iter().enumerate().filter_map(line).collect()
}

/// Means of neighbours, so that at most [`MAX_POINTS`] are left.
fn thinned(values: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let together = values.len().div_ceil(MAX_POINTS).max(1);
    let mean = |group: &[(f64, f64)]| {
        let n = group.len() as f64;
        let sum = |of: fn(&(f64, f64)) -> f64| group.iter().map(of).sum::<f64>();
        (sum(|p| p.0) / n, sum(|p| p.1) / n)
    };
    values.chunks(together).map(mean).collect()
}

fn draw_legend(svg: &mut Svg, lines: &[Line]) {
    let mut left = MARGIN;
    for line in lines {
        svg.line(
            (left, TOP + 2.0),
            (left + 16.0, TOP + 2.0),
            Stroke::solid(line.color, 2.5),
        );
        let name = LABEL.fit(line.run, 200.0);
        svg.text((left + 22.0, TOP + 6.0), &name, LABEL);
        left += 22.0 + LABEL.width(&name) + 24.0;
    }
}

fn draw_panel(
    svg: &mut Svg,
    name: &str,
    lines: &[Line],
    seconds: f64,
    (left, top): (f64, f64),
    width: f64,
) -> Axis {
    let all = lines.iter().flat_map(|line| &line.points);
    let highest = all.map(|p| p.1).fold(0.0, f64::max);
    let (ceiling, floor) = (top + 24.0, top + PANEL - 36.0);
    let y = Axis::round(0.0, highest, (floor, ceiling), 3);
    let ticks = y.ticks();
    let gutter = ticks.iter().map(|t| LABEL.width(&t.1)).fold(0.0, f64::max) + 10.0;
    let x = Axis::exact(0.0, seconds, (left + gutter, left + width - 14.0), 5);
    svg.text((left, top + 10.0), name, VALUE);
    for (value, text) in &ticks {
        let at = y.at(*value);
        svg.line((x.from, at), (x.to, at), Stroke::solid(GRID, 1.0));
        svg.text((x.from - 8.0, at + 4.0), text, LABEL.anchored(Anchor::End));
    }
    svg.line((x.from, floor), (x.to, floor), Stroke::solid(INK, 1.0));
    for (value, text) in x.ticks() {
        let at = x.at(value);
        svg.line((at, floor), (at, floor + 4.0), Stroke::solid(INK, 1.0));
        let text = format!("{text} s");
        svg.text((at, floor + 17.0), &text, LABEL.anchored(Anchor::Middle));
    }
    for line in lines {
        let at = |p: &(f64, f64)| (x.at(p.0), y.at(p.1));
        let points: Vec<(f64, f64)> = line.points.iter().map(at).collect();
        svg.polyline(&points, Stroke::solid(line.color, 1.5));
    }
    x
}

/// Where each context began.
fn mark_contexts(svg: &mut Svg, run: &Run, x: &Axis, top: f64) {
    let style = Text::new(9.5, Regular, MUTED);
    let mut free_from = f64::NEG_INFINITY;
    for context in &run.body.contexts {
        let Some(at) = context.started_ms.map(|ms| x.at(ms / 1e3)) else {
            continue;
        };
        let floor = top + PANEL - 36.0;
        svg.line((at, top + 22.0), (at, floor), Stroke::dashed(FAINT, 1.0));
        let name = crate::report::units::tokens(context.context_tokens);
        if at >= free_from && at + style.width(&name) < x.to + 14.0 {
            svg.text((at + 3.0, top + 22.0), &name, style);
            free_from = at + style.width(&name) + 6.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_samples_become_few_points_of_the_same_mean() {
        let values: Vec<(f64, f64)> = (0..1200)
            .map(|i| (f64::from(i), f64::from(i % 5)))
            .collect();
        let points = thinned(&values);
        assert_eq!(points.len(), 240);
        assert!(points.iter().all(|p| p.1 == 2.0));
        assert_eq!(thinned(&values[..7]), values[..7]);
    }
}
