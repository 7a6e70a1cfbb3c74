//! What is kept of beginnings that sequences had, so that the next prompt computes only its rest.
//!
//! States of delta nets cannot be cut, so a beginning is of use only where a snapshot was taken. The
//! cache holds snapshots under a byte budget, drops what was used longest ago, and knows where prompts
//! parted: that is where a snapshot is missing.

use std::collections::HashMap;

use crate::backend::Snapshot;

/// Prompts that share less than this are not worth a snapshot where they part: it costs as long as
/// twenty tokens of a prompt, and as much memory as thousands.
const LEAST_SHARED_TOKENS: usize = 64;

/// Snapshots of beginnings, and the tokens they are of.
#[derive(Debug, Default)]
pub struct PrefixCache {
    budget_bytes: usize,
    held_bytes: usize,
    /// Pages that several snapshots may hold: how many do
    pages: HashMap<usize, usize>,
    kept: Vec<Kept>,
    /// Counts uses
    clock: u64,
    counts: PrefixCounts,
}

#[derive(Debug)]
struct Kept {
    salt: u64,
    /// As many as the snapshot has seen
    tokens: Vec<u32>,
    snapshot: Snapshot,
    last_use: u64,
}

/// What lookups came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixCounts {
    /// Tokens of prompts that were looked up
    pub asked_tokens: u64,
    /// Of those, the ones that a snapshot had seen
    pub found_tokens: u64,
    /// Snapshots that were dropped for others
    pub evicted: u64,
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    /// A cache that holds at most `budget_bytes`; with 0 it keeps nothing.
    pub fn new(budget_bytes: usize) -> Self {
        PrefixCache {
            budget_bytes,
            ..PrefixCache::default()
        }
    }

    /// Whether it keeps anything at all.
    pub fn keeps(&self) -> bool {
        self.budget_bytes > 0
    }

    /// Bytes held, what snapshots share counted once.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    pub fn len(&self) -> usize {
        self.kept.len()
    }

    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    pub fn counts(&self) -> PrefixCounts {
        self.counts
    }

    /// The snapshot that has seen most of `prompt`, but not all: logits come from its last token.
    /// Prompts of another salt are never found.
    pub fn find(&mut self, salt: u64, prompt: &[u32]) -> Option<Snapshot> {
        self.clock += 1;
        self.counts.asked_tokens += prompt.len() as u64;
        let fits = |kept: &&mut Kept| {
            kept.salt == salt
                && kept.tokens.len() < prompt.len()
                && prompt.starts_with(&kept.tokens)
        };
        let longest = (self.kept.iter_mut().filter(fits)).max_by_key(|kept| kept.tokens.len())?;
        longest.last_use = self.clock;
        self.counts.found_tokens += longest.tokens.len() as u64;
        Some(longest.snapshot.clone())
    }

    /// Where `prompt` parts from what came before it, if that is further than a snapshot has seen: a
    /// snapshot there serves the next prompt with this beginning.
    pub fn branch_point(&self, salt: u64, prompt: &[u32]) -> Option<usize> {
        let of_salt = self.kept.iter().filter(|kept| kept.salt == salt);
        let shared = of_salt.map(|kept| common(&kept.tokens, prompt)).max()?;
        // The same prompt once more parts at its last token, which is computed in any case.
        let shared = shared.min(prompt.len().saturating_sub(1));
        let worth = shared >= LEAST_SHARED_TOKENS && !self.has(salt, &prompt[..shared]);
        worth.then_some(shared)
    }

    /// Whether a snapshot has seen exactly `tokens`.
    pub fn has(&self, salt: u64, tokens: &[u32]) -> bool {
        let same = |kept: &Kept| kept.salt == salt && kept.tokens == tokens;
        self.kept.iter().any(same)
    }

    /// Keeps a snapshot that has seen `tokens`; others go for it, those used longest ago first. One that
    /// is larger than the budget is not kept.
    pub fn keep(&mut self, salt: u64, tokens: &[u32], snapshot: Snapshot) {
        assert_eq!(tokens.len(), snapshot.tokens());
        self.clock += 1;
        if let Some(known) = (self.kept.iter_mut()).find(|k| k.salt == salt && k.tokens == tokens) {
            known.last_use = self.clock;
            return;
        }
        self.held_bytes += snapshot.own_bytes();
        for page in snapshot.pages() {
            let holders = self.pages.entry(page.id).or_insert(0);
            *holders += 1;
            if *holders == 1 {
                self.held_bytes += page.bytes;
            }
        }
        self.kept.push(Kept {
            salt,
            tokens: tokens.to_vec(),
            snapshot,
            last_use: self.clock,
        });
        while self.held_bytes > self.budget_bytes {
            self.evict();
        }
    }

    /// Drops what was used longest ago. The newest has the latest use, so it goes last: when it alone is
    /// above the budget.
    fn evict(&mut self) {
        let oldest = (0..self.kept.len()).min_by_key(|&i| self.kept[i].last_use);
        let Some(i) = oldest else { return };
        let gone = self.kept.swap_remove(i);
        self.counts.evicted += 1;
        self.held_bytes -= gone.snapshot.own_bytes();
        for page in gone.snapshot.pages() {
            let Some(holders) = self.pages.get_mut(&page.id) else {
                continue;
            };
            *holders -= 1;
            if *holders == 0 {
                self.pages.remove(&page.id);
                self.held_bytes -= page.bytes;
            }
        }
    }

    /// Drops all snapshots.
    pub fn clear(&mut self) {
        let (budget_bytes, counts) = (self.budget_bytes, self.counts);
        *self = PrefixCache {
            counts,
            ..PrefixCache::new(budget_bytes)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SharedPage;

    /// 100 bytes, and a page of 10 bytes for each of `pages`.
    fn snapshot(tokens: usize, pages: &[usize]) -> Snapshot {
        let page = |&id: &usize| SharedPage { id, bytes: 10 };
        Snapshot::of_nothing(tokens, 100, pages.iter().map(page).collect())
    }

    fn ids(range: std::ops::Range<u32>) -> Vec<u32> {
        range.collect()
    }

    #[test]
    fn the_longest_beginning_is_found_and_never_that_of_another_salt() {
        let mut cache = PrefixCache::new(1000);
        for n in [10, 20, 30] {
            cache.keep(1, &ids(0..n), snapshot(n as usize, &[]));
        }
        cache.keep(2, &ids(0..35), snapshot(35, &[]));
        let found = |cache: &mut PrefixCache, salt, prompt: &[u32]| {
            cache.find(salt, prompt).map(|snapshot| snapshot.tokens())
        };
        assert_eq!(found(&mut cache, 1, &ids(0..40)), Some(30));
        assert_eq!(
            found(&mut cache, 1, &ids(0..30)),
            Some(20),
            "one token is left to compute"
        );
        let mut other = ids(0..40);
        other[25] = 99;
        assert_eq!(found(&mut cache, 1, &other), Some(20));
        assert_eq!(found(&mut cache, 1, &ids(5..40)), None);
        assert_eq!(found(&mut cache, 3, &ids(0..40)), None);
        let counts = cache.counts();
        assert_eq!((counts.asked_tokens, counts.found_tokens), (185, 70));
    }

    #[test]
    fn the_budget_is_held_by_dropping_what_was_used_longest_ago() {
        let mut cache = PrefixCache::new(350);
        for n in 1..=3 {
            cache.keep(0, &ids(0..n), snapshot(n as usize, &[]));
        }
        assert!(
            cache.find(0, &ids(0..2)).is_some(),
            "the first is used again"
        );
        cache.keep(0, &ids(0..4), snapshot(4, &[]));
        assert_eq!((cache.len(), cache.held_bytes()), (3, 300));
        let there: Vec<bool> = (1..=4).map(|n| cache.has(0, &ids(0..n))).collect();
        assert_eq!(there, [true, false, true, true]);
        cache.keep(0, &ids(0..9), snapshot(9, &(0..30).collect::<Vec<_>>()));
        assert_eq!(
            (cache.len(), cache.held_bytes()),
            (0, 0),
            "larger than the budget"
        );
    }

    #[test]
    fn pages_of_several_snapshots_count_once() {
        let mut cache = PrefixCache::new(330);
        cache.keep(0, &ids(0..1), snapshot(1, &[1, 2]));
        cache.keep(0, &ids(0..2), snapshot(2, &[1, 2, 3]));
        assert_eq!(cache.held_bytes(), 230);
        cache.keep(0, &ids(0..2), snapshot(2, &[1, 2, 3]));
        assert_eq!((cache.held_bytes(), cache.len()), (230, 2), "known already");
        cache.keep(0, &ids(0..3), snapshot(3, &[1, 4]));
        assert_eq!(
            (cache.held_bytes(), cache.len()),
            (240, 2),
            "the first is gone"
        );
        cache.clear();
        assert_eq!((cache.held_bytes(), cache.len()), (0, 0));
    }

    #[test]
    fn where_prompts_part_a_snapshot_is_missing_until_it_is_taken() {
        let mut cache = PrefixCache::new(1000);
        cache.keep(0, &ids(0..200), snapshot(200, &[]));
        let mut other = ids(0..300);
        other[150..].fill(7);
        assert_eq!(cache.branch_point(0, &other), Some(150));
        assert_eq!(cache.branch_point(1, &other), None);
        cache.keep(0, &other[..150], snapshot(150, &[]));
        assert_eq!(cache.branch_point(0, &other), None);
        other[20] = 3;
        assert_eq!(cache.branch_point(0, &other), None, "too short");
        assert_eq!(
            cache.branch_point(0, &ids(0..250)),
            None,
            "there is one at 200"
        );
        assert_eq!(
            cache.branch_point(0, &ids(0..200)),
            Some(199),
            "the same prompt"
        );
    }
}
