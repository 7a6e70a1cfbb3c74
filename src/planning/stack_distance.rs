//! LRU hits for every cache size in one pass: stack distances.
//!
//! What one token does to a layer's cache of n slots, here and in the simulator:
//! 1. All its picks are looked up at once, in the cache as the previous token left it.
//! 2. Then the picks move to the front, the best pick foremost; what falls off the end is evicted.
//!
//! So a token's picks never evict one another while n >= k, and with n < k the best n stay. The
//! cache of n slots is always the top n of one stack, hence a pick hits exactly if fewer than n
//! experts lie above it before its token: its stack distance. (Mattson et al., 1970.)
//!
//! Distances come from a Fenwick tree over the times of last use, O(log E) per pick: 0.12 us with
//! E = 512. Searching a move-to-front list took six times as long on a trace of poor locality.

use serde::{Deserialize, Serialize};

/// The LRU stack of one layer.
#[derive(Clone, Debug)]
pub struct LruStack {
    /// `[E]` time of the last pick, from 1; 0: not picked yet.
    last: Vec<u32>,
    /// Fenwick tree, 1-based, over times: 1 where some expert was last picked.
    marks: Vec<u32>,
    now: usize,
    distinct: usize,
}

/// How far a pick lay down the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// So many other experts were above it: a hit in more slots than that.
    Reuse(usize),
    /// Never picked before; so many experts had been.
    First(usize),
}

impl LruStack {
    pub fn new(num_experts: usize) -> Self {
        LruStack {
            last: vec![0; num_experts],
            // Room for three rounds of all experts between two compactions keeps them rare.
            marks: vec![0; 4 * num_experts + 1],
            now: 0,
            distinct: 0,
        }
    }

    /// Forgets everything: the next pick of any expert is its first.
    pub fn reset(&mut self) {
        self.last.fill(0);
        self.marks.fill(0);
        self.now = 0;
        self.distinct = 0;
    }

    /// One token's picks, distinct and best first; `found` gets the distance of each, in order.
    pub fn access(&mut self, topk_ids: &[u16], mut found: impl FnMut(Distance)) {
        for &expert in topk_ids {
            found(match self.last[usize::from(expert)] {
                0 => Distance::First(self.distinct),
                time => Distance::Reuse(self.distinct - self.marked_up_to(time as usize)),
            });
        }
        if self.now + topk_ids.len() >= self.marks.len() {
            self.compact();
        }
        for &expert in topk_ids.iter().rev() {
            let expert = usize::from(expert);
            match self.last[expert] {
                0 => self.distinct += 1,
                time => self.mark(time as usize, u32::MAX),
            }
            self.now += 1;
            self.last[expert] = self.now as u32;
            self.mark(self.now, 1);
        }
    }

    fn marked_up_to(&self, mut time: usize) -> usize {
        let mut count = 0;
        while time > 0 {
            count += self.marks[time] as usize;
            time &= time - 1;
        }
        count
    }

    /// Adds `delta`, modulo 2^32, at `time`.
    fn mark(&mut self, mut time: usize, delta: u32) {
        while time < self.marks.len() {
            self.marks[time] = self.marks[time].wrapping_add(delta);
            time += time & time.wrapping_neg();
        }
    }

    /// Renumbers the times 1, 2, .. in the same order.
    fn compact(&mut self) {
        let mut order: Vec<usize> = (0..self.last.len()).filter(|&e| self.last[e] > 0).collect();
        order.sort_unstable_by_key(|&e| self.last[e]);
        self.marks.fill(0);
        self.now = order.len();
        for (time, expert) in (1..).zip(order) {
            self.last[expert] = time as u32;
            self.mark(time, 1);
        }
    }
}

/// Stack distances of a layer's picks, counted; sums of these are exact, so profiles merge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DistanceHistogram {
    /// `[E]` picks by the number of experts above them.
    pub reuses: Vec<u64>,
    /// `[E]` first picks in a document by the number of experts picked before.
    pub first_picks: Vec<u64>,
}

impl DistanceHistogram {
    pub fn new(num_experts: usize) -> Self {
        DistanceHistogram {
            reuses: vec![0; num_experts],
            first_picks: vec![0; num_experts],
        }
    }

    pub fn count(&mut self, distance: Distance) {
        match distance {
            Distance::Reuse(d) => self.reuses[d] += 1,
            Distance::First(d) => self.first_picks[d] += 1,
        }
    }

    pub fn add(&mut self, other: &DistanceHistogram) {
        add_counts(&mut self.reuses, &other.reuses);
        add_counts(&mut self.first_picks, &other.first_picks);
    }

    pub fn picks(&self) -> u64 {
        self.reuses.iter().chain(&self.first_picks).sum()
    }

    /// Hits of an LRU cache of `slots` that is empty at the start of every document.
    pub fn hits(&self, slots: usize) -> u64 {
        self.reuses.iter().take(slots).sum()
    }

    /// Hit rate by slots of a cache that keeps its content from one document to the next.
    ///
    /// Reuses are exact. At a document's first pick of an expert, after s others, the n - s least
    /// recent slots still hold experts of earlier documents; taken as unrelated to this one, the
    /// pick is among them with probability (n - s) / (E - s). Without picks: [`HitCurve::uniform`].
    pub fn curve(&self) -> HitCurve {
        let experts = self.reuses.len();
        let picks = self.picks();
        if picks == 0 {
            return HitCurve::uniform(experts);
        }
        // The expected hits among first picks grow by `slope` from n to n + 1 slots.
        let (mut hits, mut slope) = (0.0, 0.0);
        let mut curve = vec![0.0];
        for n in 0..experts {
            slope += self.first_picks[n] as f64 / (experts - n) as f64;
            hits += self.reuses[n] as f64 + slope;
            curve.push((hits / picks as f64).min(1.0));
        }
        HitCurve(curve)
    }
}

/// Expected hit rate of a layer by its number of slots, 0 to E; never falls.
#[derive(Clone, Debug, PartialEq)]
pub struct HitCurve(Vec<f64>);

impl HitCurve {
    /// Nothing known: every expert is picked alike, n of E slots hit n / E of the picks.
    pub fn uniform(num_experts: usize) -> Self {
        let experts = num_experts.max(1) as f64;
        HitCurve((0..=num_experts).map(|n| n as f64 / experts).collect())
    }

    /// Straight lines through points of ascending slots, from no hits in none to all in all; a
    /// point below the one before counts as much as that.
    pub fn through(points: impl IntoIterator<Item = (usize, f64)>, num_experts: usize) -> Self {
        let mut curve = vec![0.0];
        let all = [(num_experts, 1.0)];
        for (slots, hit_rate) in points.into_iter().chain(all) {
            let (from, last) = (curve.len() - 1, curve[curve.len() - 1]);
            let hit_rate = hit_rate.clamp(last, 1.0);
            for n in from + 1..=slots.min(num_experts) {
                let part = (n - from) as f64 / (slots - from) as f64;
                curve.push(last + part * (hit_rate - last));
            }
        }
        HitCurve(curve)
    }

    /// What LRU attains on a model with 512 experts of which 10 are picked, as others measured it
    /// on short cold texts (performance.md, section 4): 43.5% at 93 slots, 62% at 186; by the
    /// share of experts that are in slots.
    pub fn published(num_experts: usize) -> Self {
        let at = |slots: f64| (slots / 512.0 * num_experts as f64).round() as usize;
        Self::through([(at(93.0), 0.435), (at(186.0), 0.62)], num_experts)
    }

    pub fn hit_rate(&self, slots: usize) -> f64 {
        self.0[slots]
    }

    /// `[E + 1]`
    pub fn as_slice(&self) -> &[f64] {
        &self.0
    }
}

pub(super) fn add_counts(into: &mut [u64], from: &[u64]) {
    assert_eq!(into.len(), from.len());
    for (a, b) in into.iter_mut().zip(from) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tokens of k distinct picks among `experts`.
    pub(crate) fn tokens(
        experts: u16,
        k: usize,
        most: usize,
    ) -> impl Strategy<Value = Vec<Vec<u16>>> {
        let all: Vec<u16> = (0..experts).collect();
        let token = proptest::sample::subsequence(all, k).prop_shuffle();
        proptest::collection::vec(token, 0..most)
    }

    /// An LRU cache of one size, by its definition.
    fn naive_hits(tokens: &[Vec<u16>], slots: usize) -> u64 {
        let mut cache: Vec<u16> = Vec::new();
        let mut hits = 0;
        for picks in tokens {
            hits += picks.iter().filter(|e| cache.contains(e)).count() as u64;
            cache.retain(|e| !picks.contains(e));
            cache.splice(0..0, picks.iter().copied());
            cache.truncate(slots);
        }
        hits
    }

    fn histogram(tokens: &[Vec<u16>], experts: usize) -> DistanceHistogram {
        let mut stack = LruStack::new(experts);
        let mut counted = DistanceHistogram::new(experts);
        for picks in tokens {
            stack.access(picks, |d| counted.count(d));
        }
        counted
    }

    proptest! {
        #[test]
        fn distances_give_the_hits_of_every_cache_size(tokens in tokens(11, 3, 120)) {
            let counted = histogram(&tokens, 11);
            for slots in 0..=11 {
                prop_assert_eq!(counted.hits(slots), naive_hits(&tokens, slots));
            }
            prop_assert_eq!(counted.picks(), 3 * tokens.len() as u64);
        }

        #[test]
        fn curves_rise_from_none_to_all(tokens in tokens(9, 2, 40)) {
            let curve = histogram(&tokens, 9).curve();
            prop_assert_eq!(curve.hit_rate(0), 0.0);
            prop_assert!((curve.hit_rate(9) - 1.0).abs() < 1e-12);
            prop_assert!(curve.as_slice().windows(2).all(|w| w[0] <= w[1]));
        }
    }

    #[test]
    fn a_cache_carried_over_hits_more_than_an_empty_one() {
        let tokens = vec![vec![0, 1], vec![0, 2], vec![1, 2]];
        let counted = histogram(&tokens, 4);
        // reuses: 0 at distance 0, then 2 at 1 and 1 at 2; first: 0, 0, 2
        assert_eq!(counted.reuses, [1, 1, 1, 0]);
        assert_eq!(counted.first_picks, [2, 0, 1, 0]);
        // two slots: 2 reuses, and each of the first two picks with probability 2/4
        assert!((counted.curve().hit_rate(2) - 3.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn a_curve_goes_through_its_points_and_never_falls() {
        let curve = HitCurve::through([(2, 0.5), (4, 0.4)], 6);
        assert_eq!(curve.as_slice(), [0.0, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0]);
        let published = HitCurve::published(512);
        assert_eq!(published.hit_rate(93), 0.435);
        assert_eq!(published.hit_rate(186), 0.62);
        for experts in 1..20 {
            let curve = HitCurve::published(experts);
            assert_eq!(curve.as_slice().len(), experts + 1);
            assert_eq!(curve.hit_rate(experts), 1.0);
        }
    }
}
