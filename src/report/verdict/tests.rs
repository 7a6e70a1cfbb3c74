//! Power and false alarms of the rule, on simulated machines.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::report::metrics::{DECODE_TOK_S, TTFT_MS};

fn rule(paired: bool) -> Rule {
    Rule {
        threshold: 0.05,
        paired,
        allowed: Vec::new(),
    }
}

/// Times of `n` rounds on a machine with a load that drifts, stalls now and then, and shakes each
/// sample by `noise`; the second side takes `slower` times as long.
fn rounds(n: usize, noise: f64, slower: f64, rng: &mut ChaCha8Rng) -> (Vec<f64>, Vec<f64>) {
    let mut load: f64 = 1.0;
    let sample = |load: f64, rng: &mut ChaCha8Rng| {
        let stall = if rng.random_bool(0.05) { 1.5 } else { 1.0 };
        load * stall * (1.0 + noise * (rng.random::<f64>() + rng.random::<f64>() - 1.0))
    };
    (0..n)
        .map(|_| {
            load = (load * (0.8 + 0.4 * rng.random::<f64>())).clamp(0.5, 3.0);
            (sample(load, rng), slower * sample(load, rng))
        })
        .unzip()
}

/// Outcomes of `comparisons` of eight metrics each.
fn outcomes(rule: &Rule, n: usize, noise: f64, slower: f64, comparisons: usize) -> [usize; 3] {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut found = [0; 3];
    for _ in 0..comparisons {
        let checks = (0..8).filter_map(|_| {
            let (base, new) = rounds(n, noise, slower, &mut rng);
            rule.metric(&TTFT_MS, 4096, &base, &new)
        });
        let worst = checks.map(|check| check.outcome).max().unwrap();
        found[worst as usize] += 1;
    }
    found
}

#[test]
fn a_comparison_with_itself_fails_at_most_once_in_a_hundred_however_noisy_the_machine() {
    for noise in [0.02, 0.1, 0.4] {
        for n in [10, 20] {
            let fails = outcomes(&rule(true), n, noise, 1.0, 1000)[Outcome::Fail as usize];
            assert!(fails <= 10, "noise {noise}, {n} rounds: {fails} of 1000");
        }
    }
}

#[test]
fn ten_percent_slower_is_found_in_rounds_although_the_load_changes_by_more() {
    let fails = outcomes(&rule(true), 12, 0.06, 1.1, 300)[Outcome::Fail as usize];
    assert!(fails >= 297, "{fails} of 300");
}

#[test]
fn twenty_percent_slower_never_passes_where_intervals_overlap() {
    // Overlapping samples, as on a busy machine.
    let base = [100.0, 96.0, 112.0, 99.0, 104.0, 121.0];
    let new = [120.0, 118.0, 131.0, 119.0, 111.0, 126.0];
    let check = rule(false).metric(&TTFT_MS, 512, &base, &new).unwrap();
    assert!(check.worse_by.unwrap() > 0.15);
    assert_eq!(check.outcome, Outcome::Undecided);
    assert!(check.reason.contains("may be noise"), "{check}");
    // Fewer samples than any test can decide on: the median does.
    let check = rule(false)
        .metric(&TTFT_MS, 512, &base[..3], &new[..3])
        .unwrap();
    assert_eq!(check.outcome, Outcome::Fail);
    assert!(check.reason.contains("too few"), "{check}");
}

#[test]
fn slower_is_worse_for_rates_and_for_times() {
    let base = [10.0, 10.1, 9.9, 10.2, 9.8, 10.05];
    let half = base.map(|x| x / 2.0);
    let of = |metric, new| rule(false).metric(metric, 512, &base, new).unwrap();
    assert_eq!(of(&DECODE_TOK_S, &half).outcome, Outcome::Fail);
    assert_eq!(of(&TTFT_MS, &half).outcome, Outcome::Pass);
    assert!((of(&DECODE_TOK_S, &half).worse_by.unwrap() - 0.5).abs() < 1e-9);
}
