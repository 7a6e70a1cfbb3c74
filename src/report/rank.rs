//! Whether one set of times is longer than another, by ranks: exact for few samples, and no outlier
//! decides.
//!
//! Samples of two runs are compared pair by pair (Mann and Whitney); samples taken in rounds, one of
//! each side per round, by their ratios (Wilcoxon's signed ranks), so that whatever slows down a
//! whole round cancels. Both work on logarithms, so differences are ratios.

/// Samples per side up to which probabilities are counted, not approximated.
const EXACT: usize = 50;
/// Of the interval, on either side.
const TAIL: f64 = 0.025;

/// How far one side lies above the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// Median of the ratios new / base where they were taken in rounds; else ratio of the medians.
    pub ratio: f64,
    /// 95% interval of the ratio; with too few samples for one, all that they allow.
    pub low: f64,
    pub high: f64,
    /// Chance of ratios at least as far above 1 as these if there is no difference
    pub p_above: f64,
    /// and as far below.
    pub p_below: f64,
    /// The smallest value these can have with so many samples.
    pub least_p: f64,
}

/// Of samples taken apart; `None` if a side has none, or one that is not positive.
pub fn unpaired(base: &[f64], new: &[f64]) -> Option<Shift> {
    let (base, new) = (logarithms(base)?, logarithms(new)?);
    let differences = new.iter().flat_map(|n| base.iter().map(move |b| n - b));
    let ratio = (median(&new) - median(&base)).exp();
    let cdf = match base.len().max(new.len()) <= EXACT {
        true => rank_sum_cdf(base.len(), new.len()),
        false => {
            let (n, m) = (base.len() as f64, new.len() as f64);
            normal_cdf(base.len() * new.len(), n * m * (n + m + 1.0) / 12.0)
        }
    };
    Some(shift(differences.collect(), &cdf, ratio))
}

/// Of samples taken in rounds, `base[i]` and `new[i]` in one; `None` if there are none, or their
/// numbers differ.
pub fn paired(base: &[f64], new: &[f64]) -> Option<Shift> {
    let (base, new) = (logarithms(base)?, logarithms(new)?);
    if base.len() != new.len() {
        return None;
    }
    let ratios: Vec<f64> = new.iter().zip(&base).map(|(n, b)| n - b).collect();
    let n = ratios.len();
    let walsh = (0..n).flat_map(|i| {
        let ratios = &ratios;
        (i..n).map(move |j| (ratios[i] + ratios[j]) / 2.0)
    });
    let cdf = match n <= EXACT {
        true => signed_rank_cdf(n),
        false => {
            let n = n as f64;
            normal_cdf(
                ratios.len() * (ratios.len() + 1) / 2,
                n * (n + 1.0) * (2.0 * n + 1.0) / 24.0,
            )
        }
    };
    Some(shift(walsh.collect(), &cdf, median(&ratios).exp()))
}

/// `estimates` are the differences that the statistic counts the positive ones of; `cdf[i]` is the
/// chance of at most `i` of them if there is no difference.
fn shift(mut estimates: Vec<f64>, cdf: &[f64], ratio: f64) -> Shift {
    estimates.sort_by(f64::total_cmp);
    let all = estimates.len();
    let positive = estimates.iter().filter(|&&d| d > 0.0).count() as f64;
    let equal = estimates.iter().filter(|&&d| d == 0.0).count() as f64;
    let above = positive + equal / 2.0;
    let at_most = |count: f64| cdf[(count.ceil() as usize).min(all)];
    let beyond = cdf.iter().take_while(|&&p| p <= TAIL).count();
    let index = beyond.saturating_sub(1).min(all / 2);
    Shift {
        ratio,
        low: estimates[index].exp(),
        high: estimates[all - 1 - index].exp(),
        p_above: at_most(all as f64 - above),
        p_below: at_most(above),
        least_p: cdf[0],
    }
}

fn logarithms(samples: &[f64]) -> Option<Vec<f64>> {
    let positive = samples.iter().all(|&x| x > 0.0 && x.is_finite());
    (positive && !samples.is_empty()).then(|| samples.iter().map(|x| x.ln()).collect())
}

fn median(values: &[f64]) -> f64 {
    super::stats::median(values).unwrap_or(0.0)
}

/// Of the number of pairs in which the second of two sides of `n` and `m` samples is the larger.
fn rank_sum_cdf(n: usize, m: usize) -> Vec<f64> {
    // ways[k][u]: choices of k of the ranks so far whose sum is u above the smallest possible.
    let mut ways = vec![vec![0.0f64; n * m + 1]; n + 1];
    ways[0][0] = 1.0;
    for rank in 0..n + m {
        for k in (1..=n.min(rank + 1)).rev() {
            let Some(shift) = (rank + 1).checked_sub(k) else {
                continue;
            };
            for u in (shift..=n * m).rev() {
                let before = ways[k - 1][u - shift];
                ways[k][u] += before;
            }
        }
    }
    cumulated(&ways[n])
}

/// Of the sum of the positive ranks of `n` differences.
fn signed_rank_cdf(n: usize) -> Vec<f64> {
    let most = n * (n + 1) / 2;
    let mut ways = vec![0.0f64; most + 1];
    ways[0] = 1.0;
    for rank in 1..=n {
        for sum in (rank..=most).rev() {
            ways[sum] += ways[sum - rank];
        }
    }
    cumulated(&ways)
}

fn cumulated(ways: &[f64]) -> Vec<f64> {
    let total: f64 = ways.iter().sum();
    let mut sum = 0.0;
    let so_far = |ways: &f64| {
        sum += ways;
        sum / total
    };
    ways.iter().map(so_far).collect()
}

/// Of a statistic from 0 to `most` with this variance, symmetric about the middle.
fn normal_cdf(most: usize, variance: f64) -> Vec<f64> {
    let (mean, deviation) = (most as f64 / 2.0, variance.sqrt());
    (0..=most)
        .map(|i| normal((i as f64 + 0.5 - mean) / deviation))
        .collect()
}

/// Standard normal distribution, within 1e-7.
///
/// Source: Abramowitz and Stegun, 26.2.17.
fn normal(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series = [
        0.319_381_530,
        -0.356_563_782,
        1.781_477_937,
        -1.821_255_978,
        1.330_274_429,
    ];
    let tail: f64 = series.iter().rev().fold(0.0, |sum, c| (sum + c) * t);
    let tail = tail * (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if z > 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_tables() {
        // Mann-Whitney, 6 and 6: 924 orders, one of them with nothing larger; U <= 2 has 4.
        let cdf = rank_sum_cdf(6, 6);
        assert_eq!(cdf.len(), 37);
        assert!((cdf[0] - 1.0 / 924.0).abs() < 1e-12);
        assert!((cdf[2] - 4.0 / 924.0).abs() < 1e-12);
        assert!((cdf[36] - 1.0).abs() < 1e-12);
        // 5 and 3: critical value 1 at 5% two-sided.
        let cdf = rank_sum_cdf(5, 3);
        assert!((cdf[0] - 1.0 / 56.0).abs() < 1e-12 && (cdf[1] - 2.0 / 56.0).abs() < 1e-12);
        // Wilcoxon, n = 10: P(W <= 8) = 25 / 1024.
        let cdf = signed_rank_cdf(10);
        assert!((cdf[8] - 25.0 / 1024.0).abs() < 1e-12);
        assert!((normal(-1.959_964) - 0.025).abs() < 1e-6);
        // Exact and approximate distributions meet where the one takes over from the other.
        let (exact, about) = (signed_rank_cdf(50), normal_cdf(1275, 10_731.25));
        assert!((exact[434] - about[434]).abs() < 1e-3);
    }

    #[test]
    fn sides_that_lie_apart_have_the_least_p_and_equal_ones_have_none_to_speak_of() {
        let base = [1.0, 1.01, 1.02, 0.99, 0.98, 1.005];
        let slower = base.map(|x| 1.2 * x);
        let apart = unpaired(&base, &slower).unwrap();
        assert!((apart.ratio - 1.2).abs() < 1e-9);
        assert_eq!(apart.p_above, apart.least_p);
        assert!(apart.least_p < 0.00125 && apart.low > 1.1 && apart.high < 1.3);
        let same = unpaired(&base, &base).unwrap();
        assert!(same.p_above >= 0.5 && same.p_below >= 0.5);
        assert!(same.low <= 1.0 && 1.0 <= same.high);
    }

    #[test]
    fn what_slows_down_whole_rounds_cancels_in_pairs() {
        let load = [1.0, 3.0, 1.5, 2.0, 1.1, 4.0, 1.0, 2.5, 1.2, 1.7];
        let new = load.map(|x| 1.1 * x);
        let rounds = paired(&load, &new).unwrap();
        assert!((rounds.ratio - 1.1).abs() < 1e-9 && rounds.p_above < 0.00125);
        assert!(unpaired(&load, &new).unwrap().p_above > 0.2);
    }

    #[test]
    fn nothing_or_what_is_no_time_is_not_compared() {
        assert_eq!(unpaired(&[], &[1.0]), None);
        assert_eq!(unpaired(&[1.0], &[0.0]), None);
        assert_eq!(paired(&[1.0, 2.0], &[1.0]), None);
        let one = paired(&[1.0], &[2.0]).unwrap();
        assert_eq!((one.low, one.high, one.least_p), (2.0, 2.0, 0.5));
    }
}
