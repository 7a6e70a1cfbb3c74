//! How workers share items: parts of their own, and then each other's.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Items that workers share out among themselves: each begins with its own part of neighbouring items, the
/// same one every time and as large as its pace has it, and then helps the others, item by item.
///
/// Rounds follow each other without anybody starting them: what was taken counts for the round it was taken
/// in, and a worker that comes too late for a round finds nothing left of it.
pub struct Shares {
    /// Items taken of each worker's part
    taken: Vec<Padded<Count>>,
    paces: Paces,
}

impl Shares {
    pub fn new(paces: Paces) -> Self {
        Shares {
            taken: (0..paces.workers()).map(|_| Padded::default()).collect(),
            paces,
        }
    }

    pub fn paces(&self) -> &Paces {
        &self.paces
    }

    /// Runs `job(item)` for items below `items`, which is the same for all workers, until all are taken.
    pub fn take(&self, round: u32, worker: usize, items: usize, mut job: impl FnMut(usize)) {
        let workers = self.taken.len();
        for turn in 0..workers {
            let victim = (worker + turn) % workers;
            let part = self.paces.part(items, victim);
            let Padded(taken) = &self.taken[victim];
            while let Some(item) = taken.next(round, part.len() as u32) {
                job(part.start + item as usize);
            }
        }
    }
}

/// What each worker brings, compared with the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paces {
    /// Of each worker and all before it
    sums: Vec<usize>,
}

impl Paces {
    pub fn equal(workers: usize) -> Self {
        Paces {
            sums: (1..=workers).collect(),
        }
    }

    /// From rates in any unit, to three digits.
    pub fn of(rates: impl ExactSizeIterator<Item = f64> + Clone) -> Self {
        let fastest = rates.clone().fold(0.0, f64::max);
        if !(fastest.is_finite() && fastest > 0.0) {
            return Paces::equal(rates.len());
        }
        let share = |rate: f64| (1000.0 * rate / fastest).round().max(1.0) as usize;
        let sums = rates.scan(0, |sum, rate| {
            *sum += share(rate);
            Some(*sum)
        });
        Paces {
            sums: sums.collect(),
        }
    }

    pub fn workers(&self) -> usize {
        self.sums.len()
    }

    /// The part of `worker`, of so many items in order.
    pub fn part(&self, items: usize, worker: usize) -> Range<usize> {
        let all = self.sums.last().expect("there is a worker");
        let before = worker.checked_sub(1).map_or(0, |before| self.sums[before]);
        items * before / all..items * self.sums[worker] / all
    }
}

/// One of `parts` parts of so many items, as equal as can be, in order.
pub fn part_of(items: usize, parts: usize, part: usize) -> Range<usize> {
    part * items / parts..(part + 1) * items / parts
}

/// Counts from 0 in every round; rounds are numbered upwards, around the end of the numbers.
#[derive(Default)]
pub struct Count(AtomicU64);

impl Count {
    /// The count in `round`; `None` if a later one has begun.
    pub fn get(&self, round: u32) -> Option<u32> {
        Count::read(self.0.load(Ordering::Acquire), round)
    }

    /// Adds one, which gives the count from there.
    ///
    /// Of a round that is over nothing may be left to count.
    pub fn add(&self, round: u32) -> u32 {
        self.next(round, u32::MAX)
            .expect("a round that is not over")
            + 1
    }

    /// The count, and adds one, if it is below `end`.
    fn next(&self, round: u32, end: u32) -> Option<u32> {
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            let count = Count::read(word, round).filter(|&count| count < end)?;
            let more = u64::from(round) << 32 | u64::from(count + 1);
            match (self.0).compare_exchange_weak(word, more, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(count),
                Err(now) => word = now,
            }
        }
    }

    fn read(word: u64, round: u32) -> Option<u32> {
        let ahead = ((word >> 32) as u32).wrapping_sub(round) as i32;
        match ahead {
            0 => Some(word as u32),
            1.. => None,
            _ => Some(0),
        }
    }
}

/// Two cache lines of its own, since processors fetch lines in pairs.
#[derive(Default)]
#[repr(align(128))]
pub struct Padded<T>(pub T);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_begin_anew_in_every_round_and_late_ones_find_nothing() {
        let count = Count::default();
        for round in [1, 2, 7, u32::MAX / 2, u32::MAX, 0, 5] {
            assert_eq!(count.get(round), Some(0));
            assert_eq!([count.add(round), count.add(round)], [1, 2]);
            assert_eq!(count.get(round), Some(2));
            assert_eq!(count.get(round.wrapping_sub(1)), None);
        }
        let shares = Shares::new(Paces::equal(3));
        for round in 1..4 {
            let mut taken = Vec::new();
            shares.take(round, 1, 7, |item| taken.push(item));
            assert_eq!(taken, [2, 3, 4, 5, 6, 0, 1]);
            shares.take(round, 0, 7, |item| panic!("item {item} once more"));
            shares.take(round - 1, 0, 7, |item| {
                panic!("item {item} of a round that is over")
            });
        }
    }

    #[test]
    fn parts_are_as_large_as_paces_and_cover_all_items() {
        // Six performance cores, and eight efficiency cores at 55%.
        let rates = [[20.0; 6].as_slice(), &[11.0; 8]].concat();
        let paces = Paces::of(rates.iter().copied());
        for items in [0, 1, 13, 64, 640] {
            let parts: Vec<Range<usize>> = (0..14).map(|w| paces.part(items, w)).collect();
            assert_eq!((parts[0].start, parts[13].end), (0, items));
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start));
            for (part, rate) in parts.iter().zip(&rates) {
                let due = items as f64 * rate / rates.iter().sum::<f64>();
                assert!((part.len() as f64 - due).abs() < 1.0, "{part:?} of {items}");
            }
        }
        for workers in [1, 3, 16] {
            let equal = Paces::equal(workers);
            assert!((0..workers).all(|w| equal.part(50, w) == part_of(50, workers, w)));
            assert!((0..workers).all(
                |w| Paces::of(vec![7.5; workers].into_iter()).part(50, w) == equal.part(50, w)
            ));
        }
        assert_eq!(Paces::of([0.0, 0.0].into_iter()), Paces::equal(2));
    }

    #[test]
    fn a_slow_worker_never_loses_items_to_nobody() {
        let shares = Shares::new(Paces::of([10.0, 1.0].into_iter()));
        let mut taken = Vec::new();
        shares.take(1, 1, 22, |item| taken.push(item));
        // Its own two first, then all that the other has not begun.
        assert_eq!(taken[..3], [20, 21, 0]);
        assert_eq!(taken.len(), 22);
    }
}
