//! The pictures of a report. Each is drawn once, as SVG; the PNG is the same drawing.
//!
//! Rules they share: the title names what is shown, axes carry units, series are labelled where
//! they are, and the footnote says which machine, model and day the numbers come from.

mod axis;
mod budget;
mod compare;
mod concurrency;
mod domains;
mod heatmap;
mod latency;
mod memory;
mod palette;
mod prediction;
mod resources;
mod throughput;

use super::stats::Spread;
use super::svg::{self, Anchor, Regular, SemiBold, Svg, Text};
use super::{Run, units};

pub use budget::{BudgetCurve, BudgetSample, budget};
pub use compare::compare;
pub use concurrency::concurrency;
pub use domains::{DomainMaps, DomainPicks, domains};
pub use heatmap::{RouterPicks, heatmap};
pub use latency::latency;
pub use memory::memory;
pub use prediction::prediction;
pub use resources::resources;
pub use throughput::throughput;

/// A finished drawing.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Stem of its file names.
    pub name: String,
    pub title: String,
    pub svg: String,
}

impl Chart {
    /// At twice the size of the SVG: sharp on dense screens and in print.
    ///
    /// # Errors
    /// Only if there is not enough memory for the picture.
    pub fn png(&self) -> Result<Vec<u8>, String> {
        svg::rasterise(&self.svg, 2.0)
    }
}

/// All charts the runs have data for, in reading order.
pub fn of_runs(runs: &[Run]) -> Vec<Chart> {
    let mut charts = concurrency(runs);
    let single = [throughput, latency, memory, resources, prediction, compare];
    charts.extend(single.into_iter().filter_map(|draw| draw(runs)));
    charts
}

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 32.0;
/// Where the content of a frame begins.
const TOP: f64 = 92.0;
const FOOT: f64 = 52.0;
/// Between the facts of a footnote.
pub const DIVIDER: &str = " · ";

const LABEL: Text = Text {
    size: 12.0,
    weight: Regular,
    color: palette::MUTED,
    anchor: Anchor::Start,
};
const VALUE: Text = Text {
    size: 12.0,
    weight: SemiBold,
    color: palette::INK,
    anchor: Anchor::Start,
};

/// What stands around a drawing.
struct Frame<'a> {
    width: f64,
    /// Height of the content alone.
    height: f64,
    title: &'a str,
    subtitle: &'a str,
    footnote: &'a str,
    /// Set apart at the top right.
    warning: Option<&'a str>,
}

impl Frame<'_> {
    fn draw(&self) -> Svg {
        let foot = Text::new(10.5, Regular, palette::FAINT);
        let foot_lines = wrap(self.footnote, foot, self.width - 2.0 * MARGIN);
        let height = TOP + self.height + FOOT + 15.0 * foot_lines.len().saturating_sub(1) as f64;
        let mut svg = Svg::new(self.width, height);
        let room = self.width - 2.0 * MARGIN;
        let mut title_room = room;
        if let Some(text) = self.warning {
            let tag = Text::new(11.0, SemiBold, palette::WARNING).anchored(Anchor::End);
            svg.text((self.width - MARGIN, 42.0), text, tag);
            title_room -= tag.width(text) + 16.0;
        }
        let title = Text::new(19.0, SemiBold, palette::INK);
        svg.text((MARGIN, 42.0), &title.fit(self.title, title_room), title);
        let subtitle = Text::new(12.5, Regular, palette::MUTED);
        svg.text((MARGIN, 63.0), &subtitle.fit(self.subtitle, room), subtitle);
        for (i, line) in foot_lines.iter().rev().enumerate() {
            svg.text((MARGIN, height - 18.0 - 15.0 * i as f64), line, foot);
        }
        svg
    }
}

/// Lines of `parts` (divided by [`DIVIDER`]) that are as long as `room` allows.
fn wrap(parts: &str, style: Text, room: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in parts.split(DIVIDER) {
        match lines.last_mut() {
            Some(line) if style.width(&format!("{line}{DIVIDER}{part}")) <= room => {
                line.push_str(DIVIDER);
                line.push_str(part);
            }
            _ => lines.push(style.fit(part, room)),
        }
    }
    lines
}

/// Machine, model, day, and what must be said about them.
fn footnote(runs: &[Run]) -> String {
    let Some(first) = runs.first() else {
        return String::new();
    };
    let mut parts: Vec<String> = Vec::new();
    let mut add = |part: String| {
        if !part.is_empty() && !parts.contains(&part) {
            parts.push(part);
        }
    };
    add(first.body.hardware.summary());
    if runs
        .iter()
        .any(|r| r.body.hardware.summary() != first.body.hardware.summary())
    {
        add("and other machines".to_string());
    }
    for run in runs {
        add(format!("executed on {}", run.body.labels.executed_on));
    }
    for run in runs {
        add(run.model.clone());
    }
    add(first.day().to_string());
    add(format!("moectl {}", first.body.software.moectl_version));
    parts.join(DIVIDER)
}

/// Numbers of made-up weights never go without this.
fn synthetic_warning(runs: &[Run]) -> Option<&'static str> {
    let synthetic = runs.iter().filter(|run| run.body.labels.synthetic).count();
    match synthetic {
        0 => None,
        n if n == runs.len() => Some(SYNTHETIC),
        _ => Some("SOME RUNS ON SYNTHETIC WEIGHTS"),
    }
}

const SYNTHETIC: &str = "SYNTHETIC WEIGHTS";

/// `5 repetitions` or `5 to 10 repetitions`.
fn repetitions(runs: &[Run]) -> String {
    let counts = runs
        .iter()
        .flat_map(|run| &run.body.contexts)
        .map(|context| context.repetitions.len());
    let (low, high) = (counts.clone().min().unwrap_or(0), counts.max().unwrap_or(0));
    match (low, high) {
        (1, 1) => "1 repetition".to_string(),
        (low, high) if low == high => format!("{high} repetitions"),
        _ => format!("{low} to {high} repetitions"),
    }
}

/// What the lines about medians are: `95% interval` or `range`.
fn spread(runs: &[Run]) -> &'static str {
    let contexts = runs.iter().flat_map(|run| &run.body.contexts);
    Spread::describe(contexts.map(|context| context.repetitions.len()))
}

/// `4k context`.
fn context_label(tokens: usize) -> String {
    format!("{} context", units::tokens(tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_runs_give_no_charts() {
        assert!(of_runs(&[]).is_empty());
    }
}
