//! What the plan promised against what was measured, in time per token, where terms add up.

use super::axis::Axis;
use super::palette::{GRID, INK, MUTED, component, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::Run;
use crate::report::metrics::DECODE_TOK_S;
use crate::report::record::{ContextRun, Prediction, prediction_error};
use crate::report::stats::Summary;
use crate::report::svg::{Regular, Stroke, Svg, Text};
use crate::report::units::significant;

const ROW: f64 = 86.0;
const BAR: f64 = 22.0;
const NAMES: f64 = 150.0;
const FIGURES: f64 = 168.0;

struct Row<'a> {
    heading: String,
    run_name: Option<&'a str>,
    prediction: &'a Prediction,
    /// Decode tok/s.
    measured: Summary,
    error: f64,
}

/// `None` if no context was predicted.
pub fn prediction(runs: &[Run]) -> Option<Chart> {
    let rows: Vec<Row> = runs
        .iter()
        .flat_map(|run| {
            let name = (runs.len() > 1).then_some(run.name.as_str());
            run.body
                .contexts
                .iter()
                .filter_map(move |context| row(context, name))
        })
        .collect();
    let longest = rows.iter().map(Row::longest_ms).reduce(f64::max)?;
    let terms = term_names(&rows);

    let title = "Predicted against measured time per decoded token";
    let legend_lines = legend(&terms);
    let legend_height = 20.0 * legend_lines.len() as f64 + 14.0;
    let mut svg = Frame {
        width: WIDTH,
        height: legend_height + rows.len() as f64 * ROW + 40.0,
        title,
        subtitle: &format!(
            "Predicted terms stacked above the measured median with its {}",
            super::spread(runs)
        ),
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    for (i, line) in legend_lines.iter().enumerate() {
        let baseline = TOP + 6.0 + 20.0 * i as f64;
        for (index, left) in line {
            svg.rect(
                (MARGIN + left, baseline - 9.0),
                (10.0, 10.0),
                &component(terms[*index], *index),
            );
            svg.text((MARGIN + left + 16.0, baseline), terms[*index], LABEL);
        }
    }
    let top = TOP + legend_height;
    let bottom = top + rows.len() as f64 * ROW;
    let pixels = (MARGIN + NAMES, WIDTH - MARGIN - FIGURES);
    let x = Axis::exact(0.0, longest * 1.02, pixels, 6);
    for (value, text) in x.ticks() {
        let at = x.at(value);
        svg.line((at, top), (at, bottom), Stroke::solid(GRID, 1.0));
        svg.text((at, bottom + 18.0), &text, LABEL.anchored(Anchor::Middle));
    }
    let middle = ((x.from + x.to) / 2.0, bottom + 37.0);
    svg.text(middle, "time per token, ms", LABEL.anchored(Anchor::Middle));
    for (i, row) in rows.iter().enumerate() {
        row.draw(&mut svg, &x, top + i as f64 * ROW, &terms);
    }
    Some(Chart {
        name: "prediction".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

fn row<'a>(context: &'a ContextRun, run_name: Option<&'a str>) -> Option<Row<'a>> {
    let prediction = context
        .prediction
        .as_ref()
        .filter(|p| p.decode_tok_s > 0.0)?;
    let measured = DECODE_TOK_S.summary(context)?;
    Some(Row {
        heading: super::context_label(context.context_tokens),
        run_name,
        prediction,
        error: prediction_error(prediction.decode_tok_s, measured.median),
        measured,
    })
}

/// Every term once, in the order the plan lists them.
fn term_names<'a>(rows: &[Row<'a>]) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for term in rows.iter().flat_map(|r| &r.prediction.terms) {
        if !names.contains(&term.name.as_str()) {
            names.push(&term.name);
        }
    }
    names
}

/// (term, left edge) per line.
fn legend(terms: &[&str]) -> Vec<Vec<(usize, f64)>> {
    let room = WIDTH - 2.0 * MARGIN;
    let mut lines = vec![Vec::new()];
    let mut used = 0.0;
    for (index, term) in terms.iter().enumerate() {
        let width = 16.0 + LABEL.width(term) + 22.0;
        if used + width > room && used > 0.0 {
            lines.push(Vec::new());
            used = 0.0;
        }
        if let Some(line) = lines.last_mut() {
            line.push((index, used));
        }
        used += width;
    }
    lines
}

impl Row<'_> {
    fn longest_ms(&self) -> f64 {
        let slowest = 1e3 / self.measured.interval.low;
        slowest.max(1e3 / self.prediction.decode_tok_s)
    }

    fn draw(&self, svg: &mut Svg, x: &Axis, top: f64, terms: &[&str]) {
        let (upper, lower) = (top + 14.0, top + 14.0 + BAR + 4.0);
        svg.text((MARGIN, upper + 15.0), &self.heading, VALUE);
        if let Some(name) = self.run_name {
            let style = Text::new(11.5, Regular, MUTED);
            svg.text(
                (MARGIN, upper + 32.0),
                &style.fit(name, NAMES - 16.0),
                style,
            );
        }

        let mut from = x.from;
        let predicted_ms = 1e3 / self.prediction.decode_tok_s;
        for term in &self.prediction.terms {
            let index = terms.iter().position(|t| *t == term.name).unwrap_or(0);
            let width = x.at(term.ms_per_token) - x.from;
            let gap = if width > 3.0 { 1.0 } else { 0.0 };
            let color = component(&term.name, index);
            svg.rect((from, upper), ((width - gap).max(0.0), BAR), &color);
            from += width;
        }
        if self.prediction.terms.is_empty() {
            svg.rect(
                (x.from, upper),
                (x.at(predicted_ms) - x.from, BAR),
                &tint(INK, 0.15),
            );
        }

        let measured_ms = 1e3 / self.measured.median;
        svg.rect(
            (x.from, lower),
            (x.at(measured_ms) - x.from, BAR),
            &tint(INK, 0.3),
        );
        let (low, high) = (self.measured.interval.low, self.measured.interval.high);
        let middle = lower + BAR / 2.0;
        let ends = (x.at(1e3 / high), x.at(1e3 / low));
        svg.line((ends.0, middle), (ends.1, middle), Stroke::solid(INK, 2.0));
        let median = x.at(measured_ms);
        svg.line(
            (median, lower),
            (median, lower + BAR),
            Stroke::solid(INK, 2.0),
        );

        let right = x.to + 16.0;
        let predicted = format!(
            "{} tok/s predicted",
            significant(self.prediction.decode_tok_s)
        );
        svg.text((right, upper + 15.0), &predicted, LABEL);
        let measured = format!("{} tok/s measured", significant(self.measured.median));
        svg.text((right, lower + 15.0), &measured, VALUE);
        let side = if self.error < 0.0 { "low" } else { "high" };
        let error = format!("predicted {:.1}% too {side}", self.error.abs() * 100.0);
        svg.text(
            (right, lower + 32.0),
            &error,
            Text::new(11.0, Regular, MUTED),
        );
    }
}
