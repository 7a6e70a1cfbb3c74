//! Multiple-choice knapsack: how many slots each layer gets.
//!
//! One number is chosen per layer, the numbers add up to at most the capacity, the sum of the
//! layers' costs is least. Hit curves need not be concave, so a greedy choice is not enough in
//! general; where all costs are convex it is exact, and spreads equal layers evenly.

use serde::{Deserialize, Serialize};

/// How good the answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solution {
    /// No other choice costs less, costs being told apart to 10^-9 of the worst choice's cost.
    Exact,
}

/// Slots per layer that minimise the total cost.
///
/// - `costs`: per layer, the cost with 0, 1, .. slots; finite, not negative
/// - `capacity`: slots in all
///
/// More capacity never makes the total worse: slots that would not help stay unused.
pub fn choose(costs: &[Vec<f64>], capacity: usize) -> (Vec<usize>, Solution) {
    assert!(costs.iter().all(|c| !c.is_empty()));
    let slots = match costs.iter().all(|c| is_convex(c)) {
        true => greedy(costs, capacity),
        false => dynamic_programme(costs, capacity),
    };
    (slots, Solution::Exact)
}

/// Up to rounding.
fn is_convex(costs: &[f64]) -> bool {
    let tolerance = 1e-12 * costs.iter().copied().fold(0.0, f64::max);
    costs
        .windows(3)
        .all(|w| w[0] - w[1] >= w[1] - w[2] - tolerance)
}

/// One slot at a time to the layer that gains most; of equals to the one with fewest slots.
fn greedy(costs: &[Vec<f64>], capacity: usize) -> Vec<usize> {
    let mut slots = vec![0; costs.len()];
    let tolerance = 1e-12 * costs.iter().flatten().copied().fold(0.0, f64::max);
    for _ in 0..capacity {
        let mut best: Option<(usize, f64)> = None;
        for (layer, cost) in costs.iter().enumerate() {
            let n = slots[layer];
            let Some(next) = cost.get(n + 1) else {
                continue;
            };
            let gain = cost[n] - next;
            let better = best.is_none_or(|(other, most)| {
                gain > most + tolerance || (gain >= most - tolerance && n < slots[other])
            });
            if gain > tolerance && better {
                best = Some((layer, gain));
            }
        }
        match best {
            Some((layer, _)) => slots[layer] += 1,
            None => break,
        }
    }
    slots
}

/// Exact for any costs: layers x capacity x choices additions, 170 million for 48 layers of 512
/// experts and 7,000 slots. The inner loop is branch-free over 32-bit integers and vectorises:
/// a tenth of a second.
fn dynamic_programme(costs: &[Vec<f64>], capacity: usize) -> Vec<usize> {
    let most: usize = costs.iter().map(|c| c.len() - 1).sum();
    let capacity = capacity.min(most);
    // Integers, so that sums are exact and the comparison of two budgets is never one of rounding.
    let worst: f64 = costs
        .iter()
        .map(|c| c.iter().copied().fold(0.0, f64::max))
        .sum();
    let scale = if worst > 0.0 {
        f64::from(1u32 << 31) / worst
    } else {
        0.0
    };

    // best[s]: the least cost of the layers so far with at most s slots.
    let mut best = vec![0u32; capacity + 1];
    let mut choices: Vec<Vec<u16>> = Vec::with_capacity(costs.len());
    for layer in costs {
        let mut next = vec![u32::MAX; capacity + 1];
        let mut choice = vec![0u32; capacity + 1];
        let mut least = u32::MAX;
        for (n, cost) in layer.iter().enumerate().take(capacity + 1) {
            let cost = (cost * scale) as u32;
            // No cheaper than with fewer slots: never needed.
            if cost >= least {
                continue;
            }
            least = cost;
            for ((next, choice), before) in next[n..].iter_mut().zip(&mut choice[n..]).zip(&best) {
                let total = before + cost;
                *choice = if total < *next { n as u32 } else { *choice };
                *next = total.min(*next);
            }
        }
        best = next;
        choices.push(choice.into_iter().map(|n| n as u16).collect());
    }

    let mut left = capacity;
    let mut slots: Vec<usize> = choices
        .iter()
        .rev()
        .map(|choice| {
            let n = usize::from(choice[left]);
            left -= n;
            n
        })
        .collect();
    slots.reverse();
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn total(costs: &[Vec<f64>], slots: &[usize]) -> f64 {
        costs.iter().zip(slots).map(|(c, &n)| c[n]).sum()
    }

    fn brute_force(costs: &[Vec<f64>], capacity: usize) -> f64 {
        let Some((first, rest)) = costs.split_first() else {
            return 0.0;
        };
        (0..first.len().min(capacity + 1))
            .map(|n| first[n] + brute_force(rest, capacity - n))
            .fold(f64::INFINITY, f64::min)
    }

    fn layers(costs: impl Strategy<Value = Vec<f64>>) -> impl Strategy<Value = Vec<Vec<f64>>> {
        proptest::collection::vec(costs, 1..5)
    }

    fn any_costs() -> impl Strategy<Value = Vec<f64>> {
        proptest::collection::vec(0.0..10.0f64, 1..7)
    }

    fn convex_costs() -> impl Strategy<Value = Vec<f64>> {
        proptest::collection::vec(0.0..3.0f64, 0..6).prop_map(|mut gains| {
            gains.sort_by(f64::total_cmp);
            let mut costs = vec![1.0];
            costs.extend(gains.iter().scan(1.0, |cost, gain| {
                *cost += gain;
                Some(*cost)
            }));
            costs.reverse();
            // Falling by less and less.
            costs.windows(3).for_each(|w| assert!(w[0] >= w[2]));
            costs
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_as_good_as_brute_force(costs in layers(any_costs()), capacity in 0usize..24) {
            let (slots, _) = choose(&costs, capacity);
            prop_assert!(slots.iter().sum::<usize>() <= capacity);
            let best = brute_force(&costs, capacity);
            prop_assert!((total(&costs, &slots) - best).abs() <= 1e-7);
        }

        #[test]
        fn greedy_is_as_good_as_brute_force_on_convex_costs(
            costs in layers(convex_costs()), capacity in 0usize..24
        ) {
            prop_assert!(costs.iter().all(|c| is_convex(c)));
            let slots = greedy(&costs, capacity);
            prop_assert!(slots.iter().sum::<usize>() <= capacity);
            prop_assert!((total(&costs, &slots) - brute_force(&costs, capacity)).abs() <= 1e-9);
        }

        #[test]
        fn more_capacity_is_never_worse(costs in layers(any_costs())) {
            let mut last = f64::INFINITY;
            for capacity in 0..24 {
                let (slots, _) = choose(&costs, capacity);
                let now = total(&costs, &slots);
                prop_assert!(now <= last + 1e-7);
                last = now;
            }
        }
    }

    #[test]
    fn equal_layers_share_evenly() {
        let costs = vec![(0..=8).map(|n| 1.0 - f64::from(n) / 8.0).collect(); 3];
        assert_eq!(choose(&costs, 13).0, [5, 4, 4]);
        assert_eq!(choose(&costs, 100).0, [8, 8, 8]);
    }
}
