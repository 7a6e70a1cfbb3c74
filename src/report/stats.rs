//! Median, spread and an exact interval: few samples, no assumption of a normal distribution.

use serde::{Deserialize, Serialize};

/// Samples from which on the largest and the smallest of them hold the median in 95% of cases: with
/// five, both lie on one side of it in 2 * 0.5^5 = 6%.
pub const ENOUGH_SAMPLES: usize = 6;
/// A sample is an outlier if its modified Z-score is above this; 10 times the 1.4826 that makes
/// the MAD a standard deviation, so that only what is far out is named.
///
/// Source: Iglewicz and Hoaglin, How to detect and handle outliers, 1993.
const OUTLIER_Z: f64 = 14.826;

/// What a table or a chart shows of a set of samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub samples: usize,
    pub median: f64,
    /// Median absolute deviation from the median, unscaled.
    pub mad: f64,
    pub min: f64,
    pub max: f64,
    /// As `spread` says: of the median, or of the samples.
    pub interval: Interval,
    pub spread: Spread,
    pub outliers: usize,
}

/// What an interval is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spread {
    /// Holds the median of what was sampled from with at least 95% confidence
    Interval95,
    /// From the smallest to the largest sample: too few for an interval
    Range,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(samples: usize) -> Self {
        match samples {
            n if n >= ENOUGH_SAMPLES => Spread::Interval95,
            _ => Spread::Range,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Spread::Interval95 => "95% interval",
            Spread::Range => "range",
        }
    }

    /// What the intervals of several summaries are, for a caption.
    pub fn describe(samples: impl IntoIterator<Item = usize>) -> &'static str {
        let (mut few, mut enough) = (false, false);
        for n in samples {
            match Spread::of(n) {
                Spread::Range => few = true,
                Spread::Interval95 => enough = true,
            }
        }
        match (few, enough) {
            (true, false) => "range",
            (true, true) => "95% interval (below 6 samples: range)",
            _ => "95% interval",
        }
    }
}

impl Interval {
    pub fn overlaps(self, other: Interval) -> bool {
        self.low <= other.high && other.low <= self.high
    }
}

impl Summary {
    /// `None` if no sample is finite.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let median = percentile_of_sorted(&sorted, 50.0);
        let mad = mad(&sorted, median);
        let z = |x: f64| 0.6745 * (x - median).abs() / mad;
        Some(Self {
            samples: sorted.len(),
            median,
            mad,
            min,
            max,
            interval: median_interval(&sorted),
            spread: Spread::of(sorted.len()),
            outliers: match mad > 0.0 {
                true => sorted.iter().filter(|&&x| z(x) > OUTLIER_Z).count(),
                false => 0,
            },
        })
    }

    /// What to tell the reader when the samples look disturbed.
    pub fn outlier_note(&self) -> Option<String> {
        let n = self.outliers;
        (n > 0).then(|| {
            format!(
                "{n} of {} samples {} far from the others; other programs may have been running, \
                 repeat on a quiet machine or with more repetitions",
                self.samples,
                if n == 1 { "is" } else { "are" }
            )
        })
    }
}

/// Percentile `p` (0 to 100) with linear interpolation between the two nearest samples.
pub fn percentile(samples: &[f64], p: f64) -> Option<f64> {
    let sorted = sorted(samples);
    (!sorted.is_empty()).then(|| percentile_of_sorted(&sorted, p))
}

pub fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 50.0)
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|x| x.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn percentile_of_sorted(sorted: &[f64], p: f64) -> f64 {
    let position = (p / 100.0).clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * position.fract()
}

fn mad(values: &[f64], median: f64) -> f64 {
    let deviations = sorted(
        &values
            .iter()
            .map(|x| (x - median).abs())
            .collect::<Vec<_>>(),
    );
    percentile_of_sorted(&deviations, 50.0)
}

/// Exact 95% interval of the median from order statistics, or the range of fewer than
/// [`ENOUGH_SAMPLES`]: `k` samples are left out on either side, as many as keep the chance that the
/// median lies beyond at 2.5% each.
///
/// A percentile bootstrap of so few samples covers less than it claims.
///
/// Source: Conover, Practical Nonparametric Statistics, section 3.2.
fn median_interval(sorted: &[f64]) -> Interval {
    let n = sorted.len();
    let mut left_out = 0;
    let mut beyond = 0.5f64.powi(n as i32);
    let mut ways = 1.0;
    for k in 1..n / 2 {
        ways *= (n - k + 1) as f64 / k as f64;
        beyond += ways * 0.5f64.powi(n as i32);
        if beyond > 0.025 {
            break;
        }
        left_out = k;
    }
    Interval {
        low: sorted[left_out],
        high: sorted[n - 1 - left_out],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn median_and_mad_of_a_known_set() {
        let summary = Summary::of(&[1.0, 1.0, 2.0, 2.0, 4.0, 6.0, 9.0]).unwrap();
        assert_eq!((summary.median, summary.mad), (2.0, 1.0));
        assert_eq!((summary.min, summary.max), (1.0, 9.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn percentiles_interpolate_between_the_nearest_samples() {
        let samples = [10.0, 20.0, 30.0, 40.0];
        assert_eq!(percentile(&samples, 0.0), Some(10.0));
        assert_eq!(percentile(&samples, 50.0), Some(25.0));
        assert_eq!(percentile(&samples, 90.0), Some(37.0));
        assert_eq!(percentile(&samples, 100.0), Some(40.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn samples_that_are_not_numbers_are_left_out() {
        assert_eq!(Summary::of(&[f64::NAN, f64::INFINITY]), None);
        assert_eq!(Summary::of(&[f64::NAN, 3.0]).unwrap().samples, 1);
    }

    #[test]
    fn below_six_samples_the_range_is_shown_and_called_that() {
        for n in 1..=5 {
            let samples: Vec<f64> = (1..=n).map(f64::from).collect();
            let summary = Summary::of(&samples).unwrap();
            assert_eq!(summary.spread, Spread::Range);
            let (low, high) = (summary.interval.low, summary.interval.high);
            assert_eq!((low, high), (1.0, f64::from(n)));
        }
        let six = Summary::of(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        assert_eq!(six.spread, Spread::Interval95);
        assert_eq!(Spread::describe([2, 5]), "range");
        assert_eq!(Spread::describe([6, 10]), "95% interval");
        assert!(Spread::describe([5, 6]).contains("range"));
    }

    #[test]
    fn an_interval_holds_the_true_median_in_95_of_100_cases_however_few_the_samples() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for n in [6, 7, 8, 10, 15, 30] {
            let held = (0..2000).filter(|_| {
                // Skewed, as times are; the median of the exponential distribution is ln 2.
                let sample = |_| -(1.0 - rng.random::<f64>()).ln();
                let samples: Vec<f64> = (0..n).map(sample).collect();
                let interval = Summary::of(&samples).unwrap().interval;
                let median = std::f64::consts::LN_2;
                interval.low <= median && median <= interval.high
            });
            let share = held.count() as f64 / 2000.0;
            assert!(share > 0.94, "{n} samples: {share}");
        }
    }

    #[test]
    fn the_interval_of_ten_samples_leaves_out_one_on_either_side() {
        let samples: Vec<f64> = (1..=10).map(f64::from).collect();
        let interval = Summary::of(&samples).unwrap().interval;
        assert_eq!((interval.low, interval.high), (2.0, 9.0));
    }

    #[test]
    fn the_interval_narrows_with_more_samples_and_covers_the_true_median() {
        let samples = |n: usize| -> Vec<f64> {
            (0..n)
                .map(|i| 100.0 + 10.0 * ((i * 7919) % 1000) as f64 / 1000.0)
                .collect()
        };
        let few = Summary::of(&samples(10)).unwrap().interval;
        let many = Summary::of(&samples(1000)).unwrap().interval;
        assert!(many.high - many.low < few.high - few.low);
        assert!(many.low <= 105.0 && 105.0 <= many.high);
    }

    /// Of nine draws with replacement from 1 to 9 the median is at most 1, 2, 3 with probability 0.001,
    /// 0.030, 0.145: 2.5% of the medians end at 2, and 5% would at 3. From above as from below.
    #[test]
    fn the_interval_of_nine_samples_ends_where_the_binomial_distribution_says() {
        let samples: Vec<f64> = (1..=9).map(f64::from).collect();
        let interval = Summary::of(&samples).unwrap().interval;
        assert_eq!((interval.low, interval.high), (2.0, 8.0));
    }

    #[test]
    fn a_sample_is_far_from_22_median_deviations_on() {
        let outliers = |far: f64| {
            let samples = [8.0, 9.0, 10.0, 10.0, 11.0, 12.0, far];
            let summary = Summary::of(&samples).unwrap();
            assert_eq!((summary.median, summary.mad), (10.0, 1.0));
            summary.outliers
        };
        assert_eq!([outliers(31.9), outliers(32.1)], [0, 1]);
    }

    #[test]
    fn a_far_sample_is_named_and_scatter_is_not() {
        let mut samples = vec![10.0, 10.1, 9.9, 10.2, 9.8];
        assert_eq!(Summary::of(&samples).unwrap().outlier_note(), None);
        samples.push(50.0);
        let note = Summary::of(&samples).unwrap().outlier_note().unwrap();
        assert!(note.starts_with("1 of 6 samples is far"), "{note}");
    }

    #[test]
    fn intervals_that_touch_overlap() {
        let a = Interval {
            low: 1.0,
            high: 2.0,
        };
        assert!(a.overlaps(Interval {
            low: 2.0,
            high: 3.0
        }));
        assert!(!a.overlaps(Interval {
            low: 2.1,
            high: 3.0
        }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn an_interval_holds_the_median_lies_within_the_samples_and_repeats(
            samples in proptest::collection::vec(0.1f64..1e4, 1..40)
        ) {
            let summary = Summary::of(&samples).unwrap();
            prop_assert!(summary.min <= summary.interval.low);
            prop_assert!(summary.interval.low <= summary.median);
            prop_assert!(summary.median <= summary.interval.high);
            prop_assert!(summary.interval.high <= summary.max);
            prop_assert_eq!(Summary::of(&samples).unwrap(), summary);
        }
    }
}
