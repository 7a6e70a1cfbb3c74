//! What more VRAM buys: predicted speed and hit rate against the budget, the plan marked.

use super::axis::Axis;
use super::palette::{GRID, INK, OUTLINE, series, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, SYNTHETIC, TOP, VALUE, WIDTH};
use crate::report::svg::{Stroke, Svg};
use crate::report::units::significant;

const HEIGHT: f64 = 320.0;
const GAP: f64 = 56.0;

/// Predictions for a range of budgets.
#[derive(Clone, Debug, Default)]
pub struct BudgetCurve {
    /// Ascending budgets.
    pub samples: Vec<BudgetSample>,
    /// The plan itself.
    pub chosen: Option<BudgetSample>,
    /// Model, machine, context, day.
    pub footnote: String,
    pub synthetic: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetSample {
    pub vram_bytes: u64,
    pub expert_hit_rate: f64,
    pub decode_tok_s: f64,
    /// Whether the output matrix is in VRAM too.
    pub head_in_vram: bool,
}

struct Panel {
    name: &'static str,
    value: fn(&BudgetSample) -> f64,
    show: fn(f64) -> String,
}

/// `None` with fewer than two budgets.
pub fn budget(curve: &BudgetCurve) -> Option<Chart> {
    let (first, last) = (curve.samples.first()?, curve.samples.last()?);
    if first.vram_bytes >= last.vram_bytes {
        return None;
    }
    let title = "Predicted speed and hit rate against GPU memory";
    let mut subtitle = String::from("Every point is a plan of its own");
    if curve.chosen.is_some() {
        subtitle += "; marked: the plan that was made";
    }
    if curve
        .samples
        .iter()
        .any(|s| s.head_in_vram != first.head_in_vram)
    {
        subtitle += "; hits drop where the output matrix moves into GPU memory";
    }
    let mut svg = Frame {
        width: WIDTH,
        height: HEIGHT,
        title,
        subtitle: &subtitle,
        footnote: &curve.footnote,
        warning: curve.synthetic.then_some(SYNTHETIC),
    }
    .draw();
    let width = (WIDTH - 2.0 * MARGIN - GAP) / 2.0;
    let panels = [
        Panel {
            name: "decode, tok/s",
            value: |s| s.decode_tok_s,
            show: significant,
        },
        Panel {
            name: "expert hit rate, %",
            value: |s| 100.0 * s.expert_hit_rate,
            show: |v| format!("{v:.1}%"),
        },
    ];
    for (i, panel) in panels.iter().enumerate() {
        let left = MARGIN + i as f64 * (width + GAP);
        panel.draw(&mut svg, curve, left, width, series(i));
    }
    Some(Chart {
        name: "budget".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

impl Panel {
    fn draw(&self, svg: &mut Svg, curve: &BudgetCurve, left: f64, width: f64, color: &str) {
        let all = || curve.samples.iter().chain(&curve.chosen);
        let highest = all().map(self.value).fold(0.0, f64::max);
        let (top, bottom) = (TOP + 34.0, TOP + HEIGHT - 40.0);
        let y = Axis::round(0.0, highest * 1.08, (bottom, top), 5);
        let ticks = y.ticks();
        let gutter = ticks.iter().map(|t| LABEL.width(&t.1)).fold(0.0, f64::max) + 10.0;
        let (unit, unit_name) = unit_of(all().map(|s| s.vram_bytes).max().unwrap_or(0));
        let in_unit = |s: &BudgetSample| s.vram_bytes as f64 / unit;
        let low = all().map(in_unit).fold(f64::INFINITY, f64::min);
        let high = all().map(in_unit).fold(0.0, f64::max);
        let x = Axis::exact(low, high, (left + gutter, left + width - 14.0), 6);

        svg.text((left, TOP + 10.0), self.name, VALUE);
        for (value, text) in &ticks {
            let at = y.at(*value);
            svg.line((x.from, at), (x.to, at), Stroke::solid(GRID, 1.0));
            svg.text((x.from - 8.0, at + 4.0), text, LABEL.anchored(Anchor::End));
        }
        svg.line((x.from, bottom), (x.to, bottom), Stroke::solid(INK, 1.0));
        for (value, text) in x.ticks() {
            let at = x.at(value);
            svg.line((at, bottom), (at, bottom + 4.0), Stroke::solid(INK, 1.0));
            svg.text((at, bottom + 18.0), &text, LABEL.anchored(Anchor::Middle));
        }
        let middle = ((x.from + x.to) / 2.0, bottom + 36.0);
        let name = format!("GPU memory, {unit_name}");
        svg.text(middle, &name, LABEL.anchored(Anchor::Middle));

        let at = |s: &BudgetSample| (x.at(in_unit(s)), y.at((self.value)(s)));
        let points: Vec<(f64, f64)> = curve.samples.iter().map(at).collect();
        svg.polyline(&points, Stroke::solid(&tint(color, 0.6), 2.0));
        for &point in &points {
            svg.dot(point, 3.0, color);
        }
        if let Some(chosen) = &curve.chosen {
            let (px, py) = at(chosen);
            svg.line((px, py), (px, bottom), Stroke::dashed(OUTLINE, 1.0));
            svg.dot((px, py), 6.0, OUTLINE);
            let text = (self.show)((self.value)(chosen));
            let half = VALUE.width(&text) / 2.0;
            let label = (px.clamp(x.from + half, x.to - half), (py - 12.0).max(top));
            svg.text(label, &text, VALUE.anchored(Anchor::Middle));
        }
    }
}

/// The largest unit that leaves whole numbers to label.
fn unit_of(bytes: u64) -> (f64, &'static str) {
    match bytes {
        b if b >= 4 << 30 => ((1u64 << 30) as f64, "GiB"),
        b if b >= 4 << 20 => ((1u64 << 20) as f64, "MiB"),
        _ => (1024.0, "KiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_is_marked_with_its_values() {
        let sample = |gib: u64| BudgetSample {
            vram_bytes: gib << 30,
            expert_hit_rate: gib as f64 / 40.0,
            decode_tok_s: 40.0 + gib as f64,
            head_in_vram: gib > 9,
        };
        let curve = BudgetCurve {
            samples: (8..=24).map(sample).collect(),
            chosen: Some(sample(14)),
            footnote: "model x".into(),
            synthetic: true,
        };
        let chart = budget(&curve).unwrap();
        for part in [
            "54.0",
            "35.0%",
            "GPU memory, GiB",
            "hits drop",
            "SYNTHETIC",
            "model x",
        ] {
            assert!(chart.svg.contains(part), "{part}");
        }
        assert!(chart.png().unwrap().starts_with(b"\x89PNG"));
        assert!(budget(&BudgetCurve::default()).is_none());
    }
}
