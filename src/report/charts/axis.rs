//! From values to pixels, and the round numbers to label.

use crate::report::units;

/// Values of `low..=high` along pixels `from..=to`; vertical axes have `from` below `to`.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub from: f64,
    pub to: f64,
    /// Distance of the labelled values.
    pub step: f64,
}

impl Axis {
    /// Exactly `low..=high`; the labelled round numbers lie inside.
    pub fn exact(low: f64, high: f64, (from, to): (f64, f64), labels: usize) -> Self {
        let span = if high > low {
            high - low
        } else {
            high.abs().max(1.0)
        };
        Self {
            low,
            high: low + span,
            from,
            to,
            step: round_step(span / labels as f64),
        }
    }

    /// Covers `low..=high`, ends moved outwards to round numbers, about `labels` of them.
    pub fn round(low: f64, high: f64, pixels: (f64, f64), labels: usize) -> Self {
        let exact = Self::exact(low, high, pixels, labels);
        Self {
            low: (exact.low / exact.step).floor() * exact.step,
            high: (exact.high / exact.step).ceil() * exact.step,
            ..exact
        }
    }

    pub fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Labelled values with their texts, all with the decimals the step needs.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        let decimals = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
        // A hair of slack: 0.3 / 0.1 is not 3.
        let first = (self.low / self.step - 1e-9).ceil() as i64;
        let last = (self.high / self.step + 1e-9).floor() as i64;
        (first..=last)
            .map(|i| {
                let value = i as f64 * self.step;
                (value, units::thousands(&format!("{value:.decimals$}")))
            })
            .collect()
    }
}

/// 1, 2 or 5 times a power of ten, at or above `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|f| f * power >= step * 0.999);
    factor.unwrap_or(10.0) * power
}

/// Moves labels wanted at `wanted` apart until neighbours are `gap` apart, keeping their order.
pub fn spread(wanted: &[f64], gap: f64, lowest: f64, highest: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]));
    let mut placed = wanted.to_vec();
    let mut next = lowest;
    for &i in &order {
        placed[i] = placed[i].max(next);
        next = placed[i] + gap;
    }
    let mut limit = highest;
    for &i in order.iter().rev() {
        placed[i] = placed[i].min(limit);
        limit = placed[i] - gap;
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let axis = Axis::round(0.0, 87.0, (200.0, 0.0), 4);
        let texts: Vec<String> = axis.ticks().into_iter().map(|t| t.1).collect();
        assert_eq!(texts, ["0", "50", "100"]);
        assert_eq!((axis.at(0.0), axis.at(100.0)), (200.0, 0.0));
        let axis = Axis::exact(970.0, 2100.0, (0.0, 1.0), 3);
        let texts: Vec<String> = axis.ticks().into_iter().map(|t| t.1).collect();
        assert_eq!(texts, ["1,000", "1,500", "2,000"]);
        let axis = Axis::round(0.31, 0.36, (0.0, 1.0), 5);
        let texts: Vec<String> = axis.ticks().into_iter().map(|t| t.1).collect();
        assert_eq!(texts.first().unwrap(), "0.31");
        assert_eq!(texts.last().unwrap(), "0.36");
    }

    #[test]
    fn equal_values_still_make_an_axis() {
        let axis = Axis::round(5.0, 5.0, (0.0, 10.0), 4);
        assert!(axis.at(5.0).is_finite() && axis.high > axis.low);
    }

    #[test]
    fn crowded_labels_are_moved_apart_in_order() {
        let placed = spread(&[50.0, 51.0, 49.0], 12.0, 0.0, 70.0);
        assert!(placed[2] + 12.0 <= placed[0] && placed[0] + 12.0 <= placed[1]);
        assert!(placed.iter().all(|y| (0.0..=70.0).contains(y)));
    }
}
