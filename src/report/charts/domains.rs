//! How differently the router picks on different text: one heat map per domain, on one scale.

use super::heatmap::{self, Grid, IDS_UP_TO};
use super::palette::MUTED;
use super::{Chart, Frame, MARGIN, SYNTHETIC, TOP, VALUE, WIDTH};
use crate::report::svg::{Regular, Text};
use crate::report::units::thousands;

/// The picks of one domain.
#[derive(Clone, Debug, Default)]
pub struct DomainPicks {
    pub name: String,
    pub tokens: u64,
    /// `[layer][expert]` times picked.
    pub picks: Vec<Vec<u64>>,
}

/// All domains of a profile.
#[derive(Clone, Debug, Default)]
pub struct DomainMaps {
    pub domains: Vec<DomainPicks>,
    /// Model, corpus, day.
    pub footnote: String,
    pub synthetic: bool,
}

const COLUMNS: usize = 2;
const GAP: f64 = 40.0;
const HEADING: f64 = 26.0;

/// `None` with fewer than two domains that picked anything.
pub fn domains(maps: &DomainMaps) -> Option<Chart> {
    let shown: Vec<&DomainPicks> = maps.domains.iter().filter(|d| d.tokens > 0).collect();
    let first = shown.first().filter(|_| shown.len() > 1)?;
    let (layers, experts) = (first.picks.len(), first.picks.first()?.len());
    let order = columns(&shown, layers, experts);
    let rows: Vec<Vec<Vec<(usize, f64)>>> = shown
        .iter()
        .map(|d| {
            let layer = |l: usize| in_order(&d.picks[l], &order[l]);
            (0..layers).map(layer).collect()
        })
        .collect();
    let cap = heatmap::color_cap(&rows.concat())?;

    let room = (WIDTH - 2.0 * MARGIN - GAP) / COLUMNS as f64;
    let cell = (
        room / experts as f64,
        (150.0 / layers as f64).clamp(2.0, 12.0),
    );
    let panel = HEADING + layers as f64 * cell.1 + 22.0;
    let title = "Router picks by domain";
    let subtitle = match experts <= IDS_UP_TO {
        true => "Rows: layers; columns: experts by id, the same in every map",
        false => {
            "Rows: layers; columns: experts by their picks on all domains, the same in every map"
        }
    };
    let mut svg = Frame {
        width: WIDTH,
        height: 30.0 + shown.len().div_ceil(COLUMNS) as f64 * panel,
        title,
        subtitle,
        footnote: &maps.footnote,
        warning: maps.synthetic.then_some(SYNTHETIC),
    }
    .draw();
    heatmap::color_key(&mut svg, MARGIN, cap);
    let small = Text::new(11.5, Regular, MUTED);
    for (i, (domain, rows)) in shown.iter().zip(&rows).enumerate() {
        let left = MARGIN + (i % COLUMNS) as f64 * (room + GAP);
        let top = TOP + 30.0 + (i / COLUMNS) as f64 * panel;
        let name = VALUE.fit(&domain.name, room / 2.0);
        svg.text((left, top + 14.0), &name, VALUE);
        let tokens = thousands(&domain.tokens.to_string());
        let share = 100.0 * concentration(&domain.picks);
        let note =
            format!("{tokens} tokens; the busiest tenth of experts takes {share:.0}% of picks");
        let at = (left + VALUE.width(&name) + 12.0, top + 14.0);
        svg.text(at, &small.fit(&note, left + room - at.0), small);
        let grid = Grid {
            experts,
            left,
            top: top + HEADING,
            cell,
        };
        heatmap::cells(&mut svg, &grid, rows, cap);
    }
    Some(Chart {
        name: "domains".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

/// `[layer][column]` expert: by id where columns are wide enough to find one, else by picks.
fn columns(domains: &[&DomainPicks], layers: usize, experts: usize) -> Vec<Vec<usize>> {
    let of_layer = |layer: usize| {
        let mut order: Vec<usize> = (0..experts).collect();
        if experts > IDS_UP_TO {
            // Shares, not counts, or the longest domain would decide alone.
            let share = |e: usize| -> f64 {
                let of = |d: &&DomainPicks| d.picks[layer][e] as f64 / d.tokens as f64;
                domains.iter().map(of).sum()
            };
            order.sort_by(|&a, &b| share(b).total_cmp(&share(a)));
        }
        order
    };
    (0..layers).map(of_layer).collect()
}

/// (expert, picks relative to an even share) by column.
fn in_order(picks: &[u64], order: &[usize]) -> Vec<(usize, f64)> {
    let even = picks.iter().sum::<u64>().max(1) as f64 / picks.len() as f64;
    order.iter().map(|&e| (e, picks[e] as f64 / even)).collect()
}

/// Share of the picks that the busiest tenth of each layer's experts takes.
fn concentration(picks: &[Vec<u64>]) -> f64 {
    let (mut top, mut all) = (0, 0);
    for layer in picks {
        let mut sorted = layer.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        top += sorted[..sorted.len().div_ceil(10)].iter().sum::<u64>();
        all += sorted.iter().sum::<u64>();
    }
    top as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_domain_has_a_map_of_its_own() {
        let domain = |name: &str, busy: usize| DomainPicks {
            name: name.into(),
            tokens: 100,
            picks: vec![(0..20).map(|e| if e == busy { 90 } else { 1 }).collect(); 3],
        };
        let mut maps = DomainMaps {
            domains: vec![domain("chat", 3), domain("code & co", 7)],
            footnote: "model x".into(),
            synthetic: false,
        };
        let chart = domains(&maps).unwrap();
        for part in ["chat", "code &amp; co", "takes 83% of picks", "model x"] {
            assert!(chart.svg.contains(part), "{part}");
        }
        maps.domains.pop();
        assert!(domains(&maps).is_none());
    }
}
