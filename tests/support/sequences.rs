//! Many sequences on one executor against the naive model: each history of pieces, fed anew to a
//! sequence that is alone.
#![allow(dead_code)] // each test binary uses its part

use std::collections::HashMap;

use moectl::backend::{
    BackendError, Executor, LogitRows, MixerKind, NextLogits, Piece, SequenceId, Snapshot,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::{Quiet, all, max_diff, run_one};

/// Tokens a sequence may have.
pub const MAX_TOKENS: usize = 160;

/// Sequences at once.
pub const CAPACITY: usize = 3;

/// The pieces that a sequence was fed.
pub type History = Vec<Fed>;

/// A piece, and how many of its tokens were not taken back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fed {
    pub ids: Vec<u32>,
    pub kept: usize,
}

impl Fed {
    fn whole(ids: &[u32]) -> Self {
        Fed {
            ids: ids.to_vec(),
            kept: ids.len(),
        }
    }
}

/// Takes back what `history` has from `tokens` on.
fn cut(history: &mut History, tokens: usize) {
    let mut before = 0;
    history.retain_mut(|fed| {
        fed.kept = fed.kept.min(tokens.saturating_sub(before));
        before += fed.kept;
        fed.kept > 0
    });
}

/// Largest difference of a logit where pieces were cut and the naive model is fed what is left of them:
/// other kernels may compute shorter pieces.
const SAME_WHEN_CUT: f32 = 1e-2;

/// What is done next. Numbers choose among what there is.
#[derive(Clone, Debug)]
pub enum Action {
    New,
    Feed(usize, Vec<u32>),
    /// One token each of as many sequences
    Decode(Vec<(usize, u32)>),
    /// Tokens, of which as many stay
    Try(usize, Vec<u32>, usize),
    Fork(usize),
    Truncate(usize, usize),
    /// A prompt in pieces of so many tokens, given up after some of them
    Cancel(usize, usize, usize),
    Snapshot(usize),
    Park(usize),
    Restore(usize),
    Drop(usize),
    Forget(usize),
}

/// Sequences under test, and what each was fed.
pub struct World<'a> {
    executor: &'a mut dyn Executor,
    alone: Alone<'a>,
    live: Vec<(SequenceId, History)>,
    kept: Vec<(Snapshot, History)>,
}

/// The naive model.
pub struct Alone<'a> {
    pub executor: &'a mut dyn Executor,
    /// What is known already
    pub known: HashMap<History, Vec<u32>>,
}

impl Alone<'_> {
    /// Bits of the last token's logits.
    fn logits(&mut self, history: &History) -> Vec<u32> {
        if let Some(logits) = self.known.get(history) {
            return logits.clone();
        }
        let logits = self.fed(history);
        if history.iter().any(|fed| fed.kept < fed.ids.len()) {
            let rest: History = (history.iter())
                .map(|fed| Fed::whole(&fed.ids[..fed.kept]))
                .collect();
            let diff = max_diff(&self.fed(&rest), &logits);
            assert!(diff <= SAME_WHEN_CUT, "{history:?}: {diff}");
        }
        let logits = bits(&logits);
        self.known.insert(history.clone(), logits.clone());
        logits
    }

    /// The last logits of a fresh sequence.
    fn fed(&mut self, history: &History) -> Vec<f32> {
        let (id, logits) = self.replay(history);
        self.executor.drop_sequence(id);
        logits
    }

    /// A fresh sequence with this history, and its last logits.
    fn replay(&mut self, history: &History) -> (SequenceId, Vec<f32>) {
        let id = self.executor.new_sequence().unwrap();
        let (mut logits, mut tokens) = (Vec::new(), 0);
        for fed in history {
            logits = feed(self.executor, id, &fed.ids).unwrap();
            tokens += fed.kept;
            if fed.kept < fed.ids.len() {
                self.executor.truncate(id, tokens).unwrap();
            }
        }
        (id, logits)
    }

    /// Bits of the logits after each of some more tokens, one by one.
    fn each(&mut self, history: &History, more: &[u32]) -> Vec<Vec<u32>> {
        let (id, _) = self.replay(history);
        let mut history = history.clone();
        let mut found = Vec::new();
        for next in more.chunks(1) {
            history.push(Fed::whole(next));
            found.push(bits(&feed(self.executor, id, next).unwrap()));
            (self.known).insert(history.clone(), found[found.len() - 1].clone());
        }
        self.executor.drop_sequence(id);
        found
    }
}

pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Feeds a piece; the logits of its last token.
pub fn feed(
    executor: &mut dyn Executor,
    id: SequenceId,
    ids: &[u32],
) -> Result<Vec<f32>, BackendError> {
    let piece = Piece::new(id, ids, LogitRows::Last);
    run_one(executor, piece, &mut Quiet(&mut |_, _, _| {})).map(all)
}

fn tokens(history: &History) -> usize {
    history.iter().map(|fed| fed.kept).sum()
}

impl World<'_> {
    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let live = self.live.len();
        let full = live == CAPACITY;
        match action {
            Action::New => {
                let made = self.executor.new_sequence();
                self.enter(made, Vec::new(), full)
            }
            Action::Fork(i) if live > 0 => {
                let (id, history) = self.live[i % live].clone();
                let made = self.executor.fork(id);
                self.enter(made, history, full)
            }
            Action::Restore(i) if !self.kept.is_empty() => {
                let (snapshot, history) = self.kept[i % self.kept.len()].clone();
                prop_assert_eq!(snapshot.tokens(), tokens(&history));
                let made = self.executor.restore(&snapshot);
                self.enter(made, history, full)
            }
            Action::Feed(i, ids) if live > 0 => self.feed(i % live, ids),
            Action::Decode(some) if live > 0 => self.decode(some),
            Action::Try(i, ids, kept) if live > 0 => self.try_tokens(i % live, ids, *kept),
            Action::Truncate(i, to) if live > 0 => self.truncate(i % live, *to),
            Action::Cancel(i, piece, pieces) if live > 0 => {
                let ids: Vec<u32> = (0..(piece * pieces) as u32).map(|t| t % 7).collect();
                ids.chunks(*piece)
                    .try_for_each(|ids| self.feed(i % live, ids))
            }
            Action::Snapshot(i) if live > 0 => {
                let (id, history) = self.live[i % live].clone();
                let snapshot = self.executor.snapshot(id).unwrap();
                self.kept.push((snapshot, history));
                Ok(())
            }
            Action::Park(i) if live > 0 => {
                let (id, history) = self.live.remove(i % live);
                let snapshot = self.executor.park(id).unwrap();
                self.kept.push((snapshot, history));
                let gone = self.executor.position(id);
                prop_assert!(matches!(gone, Err(BackendError::UnknownSequence(_))));
                Ok(())
            }
            Action::Drop(i) if live > 0 => {
                let (id, _) = self.live.remove(i % live);
                self.executor.drop_sequence(id);
                Ok(())
            }
            Action::Forget(i) if !self.kept.is_empty() => {
                self.kept.remove(i % self.kept.len());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A sequence that was made, unless there was no room.
    fn enter(
        &mut self,
        made: Result<SequenceId, BackendError>,
        history: History,
        full: bool,
    ) -> Result<(), TestCaseError> {
        match made {
            Err(BackendError::NoRoom { capacity }) if full => prop_assert_eq!(capacity, CAPACITY),
            Ok(id) if !full => {
                prop_assert_eq!(self.executor.position(id).unwrap(), tokens(&history));
                prop_assert!(self.live.iter().all(|(other, _)| *other != id));
                self.live.push((id, history));
            }
            other => prop_assert!(false, "{:?} with {} live", other, self.live.len()),
        }
        Ok(())
    }

    /// Of states of delta nets nothing can be taken back but all.
    fn truncate(&mut self, i: usize, to: usize) -> Result<(), TestCaseError> {
        let nets = (self.executor.shape().mixers).contains(&MixerKind::GatedDeltaNet);
        let (id, history) = &mut self.live[i];
        let position = tokens(history);
        // Often nothing, all, or the last few.
        let to = match to % 4 {
            0 => 0,
            1 => position + to % 3,
            2 => position.saturating_sub(to % 5),
            _ => to % (position + 1),
        };
        let allowed = to <= position && (!nets || to == 0 || to == position);
        match self.executor.truncate(*id, to) {
            Ok(()) => {
                prop_assert!(allowed, "{} of {}", to, position);
                cut(history, to);
            }
            Err(BackendError::CannotTruncate { tokens, .. }) if !allowed => {
                prop_assert_eq!(tokens, to)
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
        prop_assert_eq!(self.executor.position(*id).unwrap(), tokens(history));
        Ok(())
    }

    fn feed(&mut self, i: usize, ids: &[u32]) -> Result<(), TestCaseError> {
        let (id, history) = &mut self.live[i];
        let fed = feed(self.executor, *id, ids);
        let needed = tokens(history) + ids.len();
        if needed > MAX_TOKENS {
            let refused = matches!(fed, Err(BackendError::ContextFull { capacity, .. })
                if capacity == MAX_TOKENS);
            prop_assert!(refused, "{:?}", fed);
            prop_assert_eq!(self.executor.position(*id).unwrap(), tokens(history));
            return Ok(());
        }
        history.push(Fed::whole(ids));
        prop_assert_eq!(self.executor.position(*id).unwrap(), needed);
        let expected = self.alone.logits(history);
        prop_assert!(bits(&fed.unwrap()) == expected, "{:?}", history);
        Ok(())
    }

    fn decode(&mut self, some: &[(usize, u32)]) -> Result<(), TestCaseError> {
        let mut chosen: Vec<(usize, [u32; 1])> = Vec::new();
        for &(i, id) in some {
            let i = i % self.live.len();
            let room = tokens(&self.live[i].1) < MAX_TOKENS;
            if room && chosen.iter().all(|(other, _)| *other != i) {
                chosen.push((i, [id]));
            }
        }
        let pieces = chosen
            .iter()
            .map(|(i, ids)| Piece::new(self.live[*i].0, ids, LogitRows::Last));
        let pieces: Vec<_> = pieces.collect();
        let found = self.executor.run(&pieces, &mut Quiet(&mut |_, _, _| {}));
        for ((i, ids), found) in chosen.iter().zip(found.unwrap()) {
            let NextLogits::All(found) = found else {
                return Err(TestCaseError::fail("rows were wanted"));
            };
            let history = &mut self.live[*i].1;
            history.push(Fed::whole(ids));
            let expected = self.alone.logits(history);
            prop_assert!(bits(&found) == expected, "{:?} in {:?}", history, chosen);
        }
        Ok(())
    }
}

impl World<'_> {
    /// Tokens that may be taken back: each one's logits are those of feeding it alone.
    fn try_tokens(&mut self, i: usize, ids: &[u32], kept: usize) -> Result<(), TestCaseError> {
        let (id, history) = self.live[i].clone();
        if tokens(&history) + ids.len() > MAX_TOKENS {
            return Ok(());
        }
        let piece = Piece::tentative(id, ids);
        let found = run_one(self.executor, piece, &mut Quiet(&mut |_, _, _| {}));
        let found = all(found.unwrap());
        prop_assert_eq!(self.executor.position(id).unwrap(), tokens(&history));
        let vocab = found.len() / ids.len();
        let expected = self.alone.each(&history, ids);
        for (n, (found, expected)) in found.chunks_exact(vocab).zip(&expected).enumerate() {
            prop_assert!(
                bits(found) == *expected,
                "{} of {:?} after {:?}",
                n,
                ids,
                history
            );
        }
        // One in four is taken back by what comes next.
        let kept = kept % (ids.len() + 1);
        if kept > 0 || ids.len().is_multiple_of(2) {
            self.executor.keep(id, kept).unwrap();
            let too_many = self.executor.keep(id, ids.len() - kept + 1);
            prop_assert!(too_many.is_err(), "only once");
        }
        let history = &mut self.live[i].1;
        history.extend(ids[..kept].chunks(1).map(Fed::whole));
        prop_assert_eq!(self.executor.position(id).unwrap(), tokens(history));
        Ok(())
    }
}

fn action(vocab: u32, long: usize) -> impl Strategy<Value = Action> {
    // Few ids and lengths: the naive model knows many histories already.
    let ids = |max: usize| prop::collection::vec(0..vocab.min(9), 1..=max);
    let which = 0..60usize;
    prop_oneof![
        3 => Just(Action::New),
        3 => (which.clone(), ids(5)).prop_map(|(i, ids)| Action::Feed(i, ids)),
        2 => (which.clone(), Just(long)).prop_map(move |(i, long)| {
            Action::Feed(i, (0..long as u32).map(|t| (t * 7 + 3) % vocab).collect())
        }),
        5 => prop::collection::vec((which.clone(), 0..vocab.min(9)), 1..=CAPACITY)
            .prop_map(Action::Decode),
        3 => (which.clone(), ids(8), 0..9usize).prop_map(|(i, ids, kept)| Action::Try(i, ids, kept)),
        2 => which.clone().prop_map(Action::Fork),
        2 => (which.clone(), which.clone()).prop_map(|(i, to)| Action::Truncate(i, to)),
        1 => (which.clone(), 3..=long / 2, 1..=3usize)
            .prop_map(|(i, piece, pieces)| Action::Cancel(i, piece, pieces)),
        2 => which.clone().prop_map(Action::Snapshot),
        2 => which.clone().prop_map(Action::Park),
        3 => which.clone().prop_map(Action::Restore),
        2 => which.clone().prop_map(Action::Drop),
        1 => which.prop_map(Action::Forget),
    ]
}

/// Runs `cases` times `steps` random actions, always the same, on an executor that has room for
/// [`CAPACITY`] sequences; long pieces have `long` tokens. Nothing is left over in the end.
pub fn check_against_fresh_sequences(
    tested: &mut dyn Executor,
    naive: &mut dyn Executor,
    [cases, steps, long]: [usize; 3],
) {
    let config = Config {
        cases: cases as u32,
        failure_persistence: None,
        max_shrink_iters: 50,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let vocab = tested.shape().vocab_size as u32;
    let actions = prop::collection::vec(action(vocab, long), steps);
    let known = std::cell::RefCell::new(HashMap::new());
    let executors = std::cell::RefCell::new((tested, naive));
    let outcome = runner.run(&actions, |actions| {
        let (tested, naive) = &mut *executors.borrow_mut();
        tested.reserve(CAPACITY, MAX_TOKENS).unwrap();
        naive.reserve(1, MAX_TOKENS).unwrap();
        let device = tested.sequence_bytes().device;
        let mut world = World {
            executor: &mut **tested,
            alone: Alone {
                executor: &mut **naive,
                known: std::mem::take(&mut *known.borrow_mut()),
            },
            live: Vec::new(),
            kept: Vec::new(),
        };
        let done = actions.iter().try_for_each(|action| world.act(action));
        for (id, _) in std::mem::take(&mut world.live) {
            world.executor.drop_sequence(id);
        }
        let World { alone, kept, .. } = world;
        drop(kept);
        *known.borrow_mut() = alone.known;
        done?;
        let left = tested.sequence_bytes();
        prop_assert_eq!((left.host, left.device), (0, device), "bytes left over");
        prop_assert_eq!(tested.resident(), (0, CAPACITY));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    assert!(known.borrow().len() > 5);
}
