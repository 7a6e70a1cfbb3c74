//! What the bytes are for: one stacked bar per tier, every component named.

use super::palette::{GRID, INK, MUTED, component, text_on, tint};
use super::{Anchor, Chart, Frame, LABEL, MARGIN, TOP, VALUE, WIDTH};
use crate::report::Run;
use crate::report::record::{MemoryComponent, MemoryRecord, Tier};
use crate::report::svg::{Regular, SemiBold, Stroke, Svg, Text};
use crate::report::units;

const BAR: f64 = 30.0;
const ENTRY: Text = Text {
    size: 11.5,
    weight: Regular,
    color: MUTED,
    anchor: Anchor::Start,
};

/// One tier of one run.
struct Stack<'a> {
    run_name: Option<&'a str>,
    tier: Tier,
    parts: Vec<&'a MemoryComponent>,
    memory: &'a MemoryRecord,
}

/// `None` if no run itemises its memory.
pub fn memory(runs: &[Run]) -> Option<Chart> {
    let stacks = stacks(runs);
    let largest = stacks.iter().map(Stack::longest_bytes).max()?;
    let colors = components(&stacks);
    let heights: Vec<f64> = stacks.iter().map(Stack::height).collect();
    let title = "Memory by component and tier";
    let mut svg = Frame {
        width: WIDTH,
        height: heights.iter().sum(),
        title,
        subtitle: "As planned, all bars on one scale; a line marks the measured peak, a dashed \
                   line the budget",
        footnote: &super::footnote(runs),
        warning: super::synthetic_warning(runs),
    }
    .draw();
    let scale = (WIDTH - 2.0 * MARGIN) / largest.max(1) as f64;
    let mut top = TOP;
    for (stack, height) in stacks.iter().zip(heights) {
        stack.draw(&mut svg, top, scale, &colors);
        top += height;
    }
    Some(Chart {
        name: "memory".to_string(),
        title: title.to_string(),
        svg: svg.finish(),
    })
}

fn stacks(runs: &[Run]) -> Vec<Stack<'_>> {
    let mut stacks = Vec::new();
    for run in runs {
        let tiers = [Tier::Vram, Tier::Ram, Tier::Disk];
        for tier in tiers.into_iter().filter(|&tier| run.has_tier(tier)) {
            let memory = &run.body.memory;
            let mut parts: Vec<&MemoryComponent> = memory
                .components
                .iter()
                .filter(|c| c.tier == tier && c.bytes > 0)
                .collect();
            parts.sort_by_key(|c| std::cmp::Reverse(c.bytes));
            if !parts.is_empty() {
                stacks.push(Stack {
                    run_name: (runs.len() > 1).then_some(run.name.as_str()),
                    tier,
                    parts,
                    memory,
                });
            }
        }
    }
    stacks
}

/// Names in the order of their size.
fn components<'a>(stacks: &[Stack<'a>]) -> Vec<&'a str> {
    let mut sizes: Vec<(&str, u64)> = Vec::new();
    for part in stacks.iter().flat_map(|s| &s.parts) {
        match sizes.iter_mut().find(|(name, _)| *name == part.component) {
            Some((_, bytes)) => *bytes += part.bytes,
            None => sizes.push((&part.component, part.bytes)),
        }
    }
    sizes.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    sizes.into_iter().map(|(name, _)| name).collect()
}

impl Stack<'_> {
    fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes).sum()
    }

    fn peak_bytes(&self) -> Option<u64> {
        match self.tier {
            Tier::Vram => self.memory.peak_vram_bytes,
            Tier::Ram => Some(self.memory.peak_rss_bytes),
            Tier::Disk => None,
        }
        .filter(|&bytes| bytes > 0)
    }

    fn budget_bytes(&self) -> Option<u64> {
        self.memory
            .vram_budget_bytes
            .filter(|_| self.tier == Tier::Vram)
    }

    fn longest_bytes(&self) -> u64 {
        let marks = [self.peak_bytes(), self.budget_bytes()];
        marks
            .into_iter()
            .flatten()
            .fold(self.total_bytes(), u64::max)
    }

    /// Legend entries in lines that fit the width.
    fn legend(&self) -> Vec<Vec<(&MemoryComponent, String, f64)>> {
        let room = WIDTH - 2.0 * MARGIN;
        let mut lines: Vec<Vec<(&MemoryComponent, String, f64)>> = vec![Vec::new()];
        let mut used = 0.0;
        for part in &self.parts {
            let text = format!("{} {}", part.component, units::bytes(part.bytes));
            let width = 16.0 + ENTRY.width(&text) + 20.0;
            if used + width > room && used > 0.0 {
                lines.push(Vec::new());
                used = 0.0;
            }
            if let Some(line) = lines.last_mut() {
                line.push((part, text, used));
            }
            used += width;
        }
        lines
    }

    fn height(&self) -> f64 {
        24.0 + BAR + 12.0 + 19.0 * self.legend().len() as f64 + 22.0
    }

    fn draw(&self, svg: &mut Svg, top: f64, scale: f64, colors: &[&str]) {
        self.heading(svg, top + 12.0);
        let bar = top + 24.0;
        let color = |name: &str| {
            let index = colors.iter().position(|c| *c == name).unwrap_or(0);
            component(name, index)
        };
        svg.rect(
            (MARGIN, bar),
            (WIDTH - 2.0 * MARGIN, BAR),
            &tint(GRID, 0.45),
        );
        let mut x = MARGIN;
        for part in &self.parts {
            let width = part.bytes as f64 * scale;
            let gap = if width > 3.0 { 1.0 } else { 0.0 };
            svg.rect(
                (x, bar),
                ((width - gap).max(0.5), BAR),
                &color(&part.component),
            );
            let inside = Text::new(11.5, SemiBold, text_on(&color(&part.component)));
            let text = units::bytes(part.bytes);
            if inside.width(&text) + 16.0 < width {
                svg.text((x + 8.0, bar + BAR / 2.0 + 4.0), &text, inside);
            }
            x += width;
        }
        let mut mark = |bytes: Option<u64>, stroke| {
            if let Some(bytes) = bytes {
                let at = MARGIN + bytes as f64 * scale;
                svg.line((at, bar - 5.0), (at, bar + BAR + 5.0), stroke);
            }
        };
        mark(self.peak_bytes(), Stroke::solid(INK, 1.75));
        mark(self.budget_bytes(), Stroke::dashed(INK, 1.25));
        for (i, line) in self.legend().into_iter().enumerate() {
            let baseline = bar + BAR + 21.0 + 19.0 * i as f64;
            for (part, text, left) in line {
                let left = MARGIN + left;
                svg.rect(
                    (left, baseline - 9.0),
                    (10.0, 10.0),
                    &color(&part.component),
                );
                svg.text((left + 16.0, baseline), &text, ENTRY);
            }
        }
    }

    fn heading(&self, svg: &mut Svg, baseline: f64) {
        let name = match self.run_name {
            Some(run) => format!("{}, {run}", self.tier.name()),
            None => self.tier.name().to_string(),
        };
        let mut facts = vec![format!("{} planned", units::bytes(self.total_bytes()))];
        facts.extend(
            self.budget_bytes()
                .map(|b| format!("budget {}", units::bytes(b))),
        );
        facts.extend(
            self.peak_bytes()
                .map(|b| format!("measured peak {}", units::bytes(b))),
        );
        let name = VALUE.fit(&name, 360.0);
        svg.text((MARGIN, baseline), &name, VALUE);
        let left = MARGIN + VALUE.width(&name) + 14.0;
        svg.text((left, baseline), &facts.join("  ·  "), LABEL);
    }
}
