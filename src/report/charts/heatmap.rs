//! Which experts the router picks, layer by layer, and which of them the plan keeps close.

use std::fmt::Write;

use super::palette::{FAINT, INK, MUTED, OUTLINE, sequential, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE};
use crate::report::svg::{Regular, Stroke, Svg, Text};
use crate::report::units::significant;

/// Router statistics of one profile, as far as the picture needs them.
#[derive(Clone, Debug, Default)]
pub struct RouterPicks {
    /// `[layer][expert]` times picked.
    pub picks: Vec<Vec<u64>>,
    /// `[layer]` ids of the experts the plan pins; empty without a plan.
    pub planned: Vec<Vec<u16>>,
    /// Model, corpus, day: the footnote.
    pub footnote: String,
    pub synthetic: bool,
}

const LAYER_NAMES: f64 = 44.0;
const SHARES: f64 = 150.0;
/// Above this many experts a cell is too small to find by its id, and layers are sorted instead.
pub(super) const IDS_UP_TO: usize = 128;
const LEVELS: usize = 24;

/// Where cells lie.
pub(super) struct Grid {
    pub experts: usize,
    pub left: f64,
    pub top: f64,
    pub cell: (f64, f64),
}

/// `None` if nothing was picked.
pub fn heatmap(router: &RouterPicks) -> Option<Chart> {
    let experts = router.picks.iter().map(Vec::len).max().filter(|&n| n > 0)?;
    let layers = router.picks.len();
    let by_id = experts <= IDS_UP_TO;
    let cell = (
        (1024.0 / experts as f64).clamp(2.0, 24.0),
        (560.0 / layers as f64).clamp(7.0, 20.0),
    );
    let planned = router.planned.iter().any(|layer| !layer.is_empty());
    let shares = if planned { SHARES } else { 0.0 };
    let grid = Grid {
        experts,
        left: MARGIN + LAYER_NAMES,
        top: TOP + 30.0,
        cell,
    };
    let rows: Vec<Vec<(usize, f64)>> = router.picks.iter().map(|l| relative(l, by_id)).collect();
    let cap = color_cap(&rows)?;

    let title = "Router picks by layer and expert";
    let subtitle = match (by_id, planned) {
        (true, true) => "Experts by id; outlined: kept in the fast tier by the plan",
        (true, false) => "Experts by id",
        (false, true) => {
            "Experts of each layer sorted by picks; outlined: kept in the fast tier by the plan"
        }
        (false, false) => "Experts of each layer sorted by picks",
    };
    let width = (grid.left + experts as f64 * cell.0 + shares + MARGIN).max(720.0);
    let mut svg = Frame {
        width,
        height: 30.0 + layers as f64 * cell.1 + 44.0,
        title,
        subtitle,
        footnote: &router.footnote,
        warning: router.synthetic.then_some(super::SYNTHETIC),
    }
    .draw();
    color_key(&mut svg, grid.left, cap);
    cells(&mut svg, &grid, &rows, cap);
    axes(&mut svg, &grid, layers, by_id);
    if planned {
        outlines(&mut svg, &grid, &rows, &router.planned);
        share_bars(&mut svg, &grid, router);
    }
    Some(Chart {
        name: "heatmap".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

/// (expert id, picks relative to an even share) of one layer, in the order of the columns.
fn relative(picks: &[u64], by_id: bool) -> Vec<(usize, f64)> {
    let total: u64 = picks.iter().sum();
    let even = total as f64 / picks.len() as f64;
    let mut row: Vec<(usize, f64)> = picks
        .iter()
        .enumerate()
        .map(|(id, &n)| (id, if total == 0 { 0.0 } else { n as f64 / even }))
        .collect();
    if !by_id {
        row.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    row
}

/// The darkest colour's value: the 99th percentile, so that a few favourites do not bleach all.
pub(super) fn color_cap(rows: &[Vec<(usize, f64)>]) -> Option<f64> {
    let values: Vec<f64> = rows.iter().flatten().map(|c| c.1).collect();
    let cap = crate::report::stats::percentile(&values, 99.0)?;
    let highest = values.iter().copied().fold(0.0, f64::max);
    (highest > 0.0).then(|| cap.max(2.0).ceil())
}

/// One path per colour: a rectangle per cell would make a file of megabytes.
pub(super) fn cells(svg: &mut Svg, grid: &Grid, rows: &[Vec<(usize, f64)>], cap: f64) {
    let mut paths = vec![String::new(); LEVELS + 1];
    let level = |value: f64| ((value / cap).min(1.0) * LEVELS as f64).round() as usize;
    for (layer, row) in rows.iter().enumerate() {
        let mut start = 0;
        for run in row.chunk_by(|a, b| level(a.1) == level(b.1)) {
            let (x, y) = grid.corner(layer, start);
            let (width, height) = (run.len() as f64 * grid.cell.0, grid.cell.1);
            let path = &mut paths[level(run[0].1)];
            let _ = write!(path, "M{x:.1} {y:.1}h{width:.1}v{height:.1}h-{width:.1}z");
            start += run.len();
        }
    }
    for (level, path) in paths
        .iter()
        .enumerate()
        .filter(|(_, path)| !path.is_empty())
    {
        svg.cells(path, &sequential(level as f64 / LEVELS as f64));
    }
}

/// Lines along the edges of planned cells only where the neighbour is not planned.
fn outlines(svg: &mut Svg, grid: &Grid, rows: &[Vec<(usize, f64)>], planned: &[Vec<u16>]) {
    let inside: Vec<Vec<bool>> = rows
        .iter()
        .enumerate()
        .map(|(layer, row)| {
            let ids = planned.get(layer).map_or(&[][..], Vec::as_slice);
            row.iter()
                .map(|&(id, _)| ids.contains(&(id as u16)))
                .collect()
        })
        .collect();
    let mut path = String::new();
    let (width, height) = grid.cell;
    for (layer, row) in inside.iter().enumerate() {
        let at = |column: usize| row.get(column).copied().unwrap_or(false);
        for column in 0..=row.len() {
            let before = column > 0 && at(column - 1);
            if before != at(column) {
                let (x, y) = grid.corner(layer, column);
                let _ = write!(path, "M{x:.1} {y:.1}v{height:.1}");
            }
        }
    }
    for edge in 0..=inside.len() {
        for column in 0..grid.experts {
            let at = |layer: Option<usize>| {
                let row = layer.and_then(|layer| inside.get(layer));
                row.is_some_and(|row| row.get(column).copied().unwrap_or(false))
            };
            if at(edge.checked_sub(1)) != at(Some(edge)) {
                let (x, y) = grid.corner(edge, column);
                let _ = write!(path, "M{x:.1} {y:.1}h{width:.1}");
            }
        }
    }
    svg.outline(&path, Stroke::solid(OUTLINE, 1.25));
}

/// How many of the picks the planned experts would have served.
fn share_bars(svg: &mut Svg, grid: &Grid, router: &RouterPicks) {
    let left = grid.left + grid.experts as f64 * grid.cell.0 + 16.0;
    let width = SHARES - 16.0 - 44.0;
    let small = Text::new(11.0, Regular, MUTED);
    svg.text((left, grid.top - 10.0), "picks covered", LABEL);
    for (layer, picks) in router.picks.iter().enumerate() {
        let ids = router.planned.get(layer).map_or(&[][..], Vec::as_slice);
        let covered: u64 = ids
            .iter()
            .filter_map(|&id| picks.get(usize::from(id)))
            .sum();
        let total: u64 = picks.iter().sum();
        let share = covered as f64 / total.max(1) as f64;
        let y = grid.corner(layer, 0).1;
        let thick = grid.cell.1 * 0.6;
        svg.rect((left, y + grid.cell.1 * 0.2), (width, thick), "#f1f3f5");
        svg.rect(
            (left, y + grid.cell.1 * 0.2),
            (width * share, thick),
            &tint(OUTLINE, 0.7),
        );
        if layer % grid.label_every() == 0 {
            let baseline = y + grid.cell.1 / 2.0 + small.size * 0.36;
            svg.text(
                (left + width + 8.0, baseline),
                &format!("{:.0}%", share * 100.0),
                small,
            );
        }
    }
}

fn axes(svg: &mut Svg, grid: &Grid, layers: usize, by_id: bool) {
    let small = Text::new(11.0, Regular, MUTED).anchored(Anchor::End);
    for layer in (0..layers).step_by(grid.label_every()) {
        let y = grid.corner(layer, 0).1 + grid.cell.1 / 2.0 + small.size * 0.36;
        svg.text((grid.left - 8.0, y), &layer.to_string(), small);
    }
    svg.text((MARGIN, grid.top - 10.0), "layer", LABEL);
    let bottom = grid.corner(layers, 0).1;
    let step = [1, 2, 4, 8, 16, 32, 64, 128]
        .into_iter()
        .find(|step| *step as f64 * grid.cell.0 >= 40.0)
        .unwrap_or(128);
    // Ids count from 0, ranks from 1.
    let first = usize::from(!by_id);
    for number in (0..=grid.experts).step_by(step).map(|n| n.max(first)) {
        let expert = number - first;
        if expert >= grid.experts {
            break;
        }
        let x = grid.corner(0, expert).0 + grid.cell.0 / 2.0;
        svg.line(
            (x, bottom + 2.0),
            (x, bottom + 6.0),
            Stroke::solid(FAINT, 1.0),
        );
        svg.text(
            (x, bottom + 19.0),
            &number.to_string(),
            LABEL.anchored(Anchor::Middle),
        );
    }
    let name = if by_id {
        "expert id"
    } else {
        "rank of the expert in its layer"
    };
    let middle = grid.left + grid.experts as f64 * grid.cell.0 / 2.0;
    svg.text(
        (middle, bottom + 38.0),
        name,
        LABEL.anchored(Anchor::Middle),
    );
}

pub(super) fn color_key(svg: &mut Svg, left: f64, cap: f64) {
    let (y, width) = (TOP - 8.0, 140.0);
    let text = "picks, as multiples of an even share";
    svg.text(
        (left, y + 9.0),
        text,
        Text {
            color: INK,
            weight: Regular,
            ..VALUE
        },
    );
    let from = left + VALUE.width(text) + 14.0;
    svg.text((from, y + 9.0), "0", LABEL);
    let ramp = from + 14.0;
    let step = width / LEVELS as f64;
    for level in 0..LEVELS {
        let at = (ramp + level as f64 * step, y);
        svg.rect(
            at,
            (step + 0.4, 11.0),
            &sequential(level as f64 / (LEVELS - 1) as f64),
        );
    }
    let end = format!("{}× and more", significant(cap).trim_end_matches(".00"));
    svg.text((ramp + width + 8.0, y + 9.0), &end, LABEL);
}

impl Grid {
    fn corner(&self, layer: usize, column: usize) -> (f64, f64) {
        (
            self.left + column as f64 * self.cell.0,
            self.top + layer as f64 * self.cell.1,
        )
    }

    fn label_every(&self) -> usize {
        (13.0 / self.cell.1).ceil() as usize
    }
}
