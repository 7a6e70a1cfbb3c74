//! The curve of hit rate and speed against the VRAM budget, as files.

use std::path::Path;
use std::str::FromStr;

use anyhow::Context;

use crate::commands::console::Console;
use crate::commands::output::tell;
use crate::formats::atomic;
use crate::planning::placement::{BudgetPoint, Placement, Tier};
use crate::planning::units::{GIB, parse_budget, show_bytes};
use crate::report::charts::{BudgetCurve, BudgetSample, budget};

/// `8G..24G`, or `8G..24G:2G` with a step.
#[derive(Clone, Copy, Debug)]
pub struct SweepRange {
    from: u64,
    to: u64,
    step: u64,
}

/// Budgets without a step given: no more than this many.
const STEPS: u64 = 32;
const MOST_POINTS: u64 = 10_000;

impl FromStr for SweepRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = "expected FROM..TO or FROM..TO:STEP, such as 8G..24G";
        let (from, rest) = text.split_once("..").ok_or(shape)?;
        let (to, step) = match rest.split_once(':') {
            Some((to, step)) => (to, Some(step)),
            None => (rest, None),
        };
        let size = |text: &str| parse_budget(text).map_err(|e| e.to_string());
        let (from, to) = (size(from)?, size(to)?);
        if from >= to {
            return Err(format!("{shape}, FROM below TO"));
        }
        let step = match step {
            Some(step) => size(step)?,
            None if to - from >= 4 * GIB && (to - from) / GIB <= STEPS => GIB,
            None => ((to - from) / STEPS).max(1),
        };
        if step == 0 || (to - from) / step > MOST_POINTS {
            return Err(format!("a step of {} is too small", show_bytes(step)));
        }
        Ok(SweepRange { from, to, step })
    }
}

impl SweepRange {
    /// Ascending, both ends included.
    pub fn budgets(&self) -> Vec<u64> {
        let steps = (self.to - self.from) / self.step;
        let mut budgets: Vec<u64> = (0..=steps).map(|i| self.from + i * self.step).collect();
        if budgets.last() != Some(&self.to) {
            budgets.push(self.to);
        }
        budgets
    }
}

/// The picture's numbers.
pub fn curve(
    points: &[BudgetPoint],
    placement: &Placement,
    footnote: String,
    synthetic: bool,
) -> BudgetCurve {
    let sample = |point: &BudgetPoint| BudgetSample {
        vram_bytes: point.vram_budget_bytes,
        expert_hit_rate: point.expert_hit_rate,
        decode_tok_s: point.decode_tok_s,
        head_in_vram: point.head == Tier::Vram,
    };
    BudgetCurve {
        samples: points.iter().map(sample).collect(),
        chosen: Some(BudgetSample {
            vram_bytes: placement.vram_budget_bytes,
            expert_hit_rate: placement.decode.expert_hit_rate,
            decode_tok_s: placement.decode.tok_s,
            head_in_vram: placement.head == Tier::Vram,
        }),
        footnote,
        synthetic,
    }
}

/// Writes sweep.csv, sweep.svg and sweep.png into `folder`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(
    folder: &Path,
    points: &[BudgetPoint],
    curve: &BudgetCurve,
    console: &Console,
) -> anyhow::Result<()> {
    let write = |name: &str, bytes: &[u8]| -> anyhow::Result<()> {
        let path = folder.join(name);
        let written = atomic::write(&path, bytes).with_context(|| path.display().to_string())?;
        tell(&path, written, false, console);
        Ok(())
    };
    write("sweep.csv", &csv(points)?)?;
    if let Some(chart) = budget(curve) {
        write("sweep.svg", chart.svg.as_bytes())?;
        write("sweep.png", &chart.png().map_err(anyhow::Error::msg)?)?;
    }
    Ok(())
}

fn csv(points: &[BudgetPoint]) -> anyhow::Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "vram_budget_bytes",
        "kv_dtype",
        "head",
        "expert_slots",
        "expert_hit_rate",
        "decode_tok_s",
        "prefill_tok_s",
    ])?;
    for point in points {
        out.write_record([
            point.vram_budget_bytes.to_string(),
            point.kv_dtype.name().into(),
            point.head.name().into(),
            point.expert_slots.to_string(),
            point.expert_hit_rate.to_string(),
            point.decode_tok_s.to_string(),
            point.prefill_tok_s.to_string(),
        ])?;
    }
    Ok(out.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_both_ends_and_whole_gibibytes_in_between() {
        let budgets = "8G..24G".parse::<SweepRange>().unwrap().budgets();
        assert_eq!(budgets.len(), 17);
        assert_eq!((budgets[0], budgets[16]), (8 * GIB, 24 * GIB));
        let budgets = "1M..2M:700k".parse::<SweepRange>().unwrap().budgets();
        assert_eq!(budgets, [1 << 20, (1 << 20) + 700 * 1024, 2 << 20]);
        for wrong in ["8G", "24G..8G", "8G..8G", "a..b", "1G..2G:0", "0..1T:1"] {
            assert!(wrong.parse::<SweepRange>().is_err(), "{wrong}");
        }
    }
}
