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

/// The answer for every capacity up to the one it was solved for.
#[derive(Clone, Debug)]
pub struct Solved {
    pub solution: Solution,
    layers: usize,
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    /// The layer that gets the first slot, the second, ..
    Order(Vec<u16>),
    /// `[layer][capacity + 1]` slots of the layer if the layers up to it share that capacity.
    Table(Vec<Vec<u16>>),
}

/// Slots per layer that minimise the total cost, for every capacity up to `capacity`.
///
/// - `costs`: per layer, the cost with 0, 1, .. slots; finite, not negative
/// - `capacity`: slots in all
///
/// More capacity never makes the total worse: slots that would not help stay unused.
pub fn solve(costs: &[Vec<f64>], capacity: usize) -> Solved {
    assert!(costs.iter().all(|c| !c.is_empty()));
    Solved {
        solution: Solution::Exact,
        layers: costs.len(),
        way: match costs.iter().all(|c| is_convex(c)) {
            true => Way::Order(greedy(costs, capacity)),
            false => Way::Table(dynamic_programme(costs, capacity)),
        },
    }
}

impl Solved {
    /// Slots per layer with `capacity` slots in all; more than it was solved for changes nothing.
    pub fn slots(&self, capacity: usize) -> Vec<usize> {
        let mut slots = vec![0; self.layers];
        match &self.way {
            Way::Order(order) => {
                for &layer in order.iter().take(capacity) {
                    slots[usize::from(layer)] += 1;
                }
            }
            Way::Table(choices) => {
                let mut left = capacity;
                for (slots, choice) in slots.iter_mut().zip(choices).rev() {
                    left = left.min(choice.len() - 1);
                    *slots = usize::from(choice[left]);
                    left -= *slots;
                }
            }
        }
        slots
    }
}

impl Solved {
    /// [`Solved::slots`] of 0, 1, .. `most`, in turn.
    pub fn for_each(&self, most: usize, mut visit: impl FnMut(&[usize])) {
        match &self.way {
            Way::Order(order) => {
                let mut slots = vec![0; self.layers];
                visit(&slots);
                for i in 0..most {
                    if let Some(&layer) = order.get(i) {
                        slots[usize::from(layer)] += 1;
                    }
                    visit(&slots);
                }
            }
            Way::Table(_) => (0..=most).for_each(|capacity| visit(&self.slots(capacity))),
        }
    }
}

/// Up to rounding.
fn is_convex(costs: &[f64]) -> bool {
    let tolerance = 1e-12 * costs.iter().copied().fold(0.0, f64::max);
    costs
        .windows(3)
        .all(|w| w[0] - w[1] >= w[1] - w[2] - tolerance)
}

/// One slot at a time to the layer that gains most; of equals to the one with fewest slots. Returns
/// the layers in that order.
fn greedy(costs: &[Vec<f64>], capacity: usize) -> Vec<u16> {
    let mut slots = vec![0; costs.len()];
    let mut order = Vec::new();
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
            Some((layer, _)) => {
                slots[layer] += 1;
                order.push(layer as u16);
            }
            None => break,
        }
    }
    order
}

/// Exact for any costs: layers x capacity x choices additions, 170 million for 48 layers of 512
/// experts and 7,000 slots. The inner loop is branch-free over 32-bit integers and vectorises:
/// a tenth of a second.
fn dynamic_programme(costs: &[Vec<f64>], capacity: usize) -> Vec<Vec<u16>> {
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
    choices
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
            let slots = solve(&costs, capacity).slots(capacity);
            prop_assert!(slots.iter().sum::<usize>() <= capacity);
            let best = brute_force(&costs, capacity);
            prop_assert!((total(&costs, &slots) - best).abs() <= 1e-7);
        }

        #[test]
        fn greedy_is_as_good_as_brute_force_on_convex_costs(
            costs in layers(convex_costs()), capacity in 0usize..24
        ) {
            prop_assert!(costs.iter().all(|c| is_convex(c)));
            let solved = Solved {
                solution: Solution::Exact,
                layers: costs.len(),
                way: Way::Order(greedy(&costs, capacity)),
            };
            let slots = solved.slots(capacity);
            prop_assert!(slots.iter().sum::<usize>() <= capacity);
            prop_assert!((total(&costs, &slots) - brute_force(&costs, capacity)).abs() <= 1e-9);
        }

        #[test]
        fn one_solution_answers_for_every_capacity(costs in layers(any_costs())) {
            let all = solve(&costs, 24);
            let mut in_turn = Vec::new();
            all.for_each(24, |slots| in_turn.push(slots.to_vec()));
            let mut last = f64::INFINITY;
            for (capacity, in_turn) in in_turn.iter().enumerate() {
                prop_assert_eq!(in_turn, &all.slots(capacity));
                let alone = solve(&costs, capacity).slots(capacity);
                let slots = all.slots(capacity);
                prop_assert!(slots.iter().sum::<usize>() <= capacity);
                prop_assert!((total(&costs, &slots) - total(&costs, &alone)).abs() <= 1e-7);
                let now = total(&costs, &slots);
                prop_assert!(now <= last + 1e-7);
                last = now;
            }
        }
    }

    #[test]
    fn equal_layers_share_evenly() {
        let costs = vec![(0..=8).map(|n| 1.0 - f64::from(n) / 8.0).collect(); 3];
        let solved = solve(&costs, 100);
        assert_eq!(solved.slots(13), [5, 4, 4]);
        assert_eq!(solved.slots(100), [8, 8, 8]);
    }

    #[test]
    fn the_80b_shape_is_solved_exactly_in_less_than_two_seconds() {
        // A step half way makes every layer's costs non-convex, each a little different.
        let layer = |l: usize| {
            let cost = |n: usize| {
                let step = if n < 200 + l { 0.2 } else { 0.0 };
                1.0 - 0.8 * (n as f64 / 512.0).sqrt() + step
            };
            (0..=512).map(cost).collect()
        };
        let costs: Vec<Vec<f64>> = (0..48).map(layer).collect();
        let start = std::time::Instant::now();
        let solved = solve(&costs, 48 * 512);
        // An unoptimised build is a tenth as fast, and not what anybody runs.
        if !cfg!(debug_assertions) {
            assert!(start.elapsed().as_secs_f64() < 2.0, "{:?}", start.elapsed());
        }
        assert_eq!(solved.slots(7000).iter().sum::<usize>(), 7000);
    }
}
