//! Sessions on one engine, with prefixes kept, evicted, parked and given up at random: each answers as if it
//! had begun anew, alone.

mod support;

use std::collections::{HashMap, HashSet};

use moectl::backend::{BackendError, NextLogits, Routing};
use moectl::engine::session::Session;
use moectl::engine::{BackendChoice, Engine, EngineError, GpuOptions, LoadOptions};
use moectl::model::Source;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use support::*;

const CAPACITY: usize = 3;
const MAX_TOKENS: usize = 256;

/// Snapshots that are kept at once; the prompts below make more.
const KEPT: usize = 8;

/// Pieces of other lengths add in another order.
const SAME: f32 = 2e-3;

#[derive(Clone, Debug)]
enum Action {
    /// A prompt, and whose it is
    Open(usize, u64),
    /// The next piece of a session's prompt, or a token where all of it is in
    Go(usize, u32),
    Park(usize),
    Unpark(usize),
    /// Wherever it is: a session that has not seen its prompt is cancelled
    Close(usize),
    Shrink,
}

struct Open {
    session: Session,
    prompt: Vec<u32>,
    salt: u64,
}

fn load() -> Engine {
    let source = Source::resolve(Some(data("goldens/tiny-c/nf4").to_str().unwrap())).unwrap();
    let options = LoadOptions {
        backend: BackendChoice::Cpu,
        threads: Some(2),
        cpu_precision: Default::default(),
        gpu: GpuOptions::default(),
        kv_dtype: None,
        progress: &|_, _| {},
        max_tokens: MAX_TOKENS,
    };
    Engine::load(&source, &options).unwrap()
}

/// Prompts that share beginnings: of 0, 80 and 150 tokens.
fn prompt(which: usize) -> Vec<u32> {
    let token = |i: u32, branch: usize| 3 + (i * 37 + branch as u32 * 101) % 90;
    let (first, second, third) = (which % 2, which / 2 % 2, which / 4 % 3);
    let length = 60 + 45 * (which % 4) as u32;
    (0..length)
        .map(|i| match i {
            0..80 => token(i, first),
            80..150 => token(i, 2 * first + second),
            _ => token(i, 7 + third),
        })
        .collect()
}

/// Where a prompt is cut beside the grid of chunks, which are longer than these prompts.
fn marks(prompt: &[u32]) -> Vec<usize> {
    (40..prompt.len()).step_by(40).collect()
}

fn quiet(_: usize, _: usize, _: &Routing) {}

fn all_of(logits: NextLogits) -> Vec<f32> {
    match logits {
        NextLogits::All(logits) => logits,
        NextLogits::Best(_) => panic!("rows were wanted"),
    }
}

/// The naive model: a session that is alone, and nothing kept.
struct Alone {
    engine: Engine,
    known: HashMap<Vec<u32>, Vec<f32>>,
}

impl Alone {
    /// Last logits after a prompt and the tokens that follow it.
    fn logits(&mut self, tokens: &[u32], prompt: usize) -> Vec<f32> {
        if let Some(logits) = self.known.get(tokens) {
            return logits.clone();
        }
        let (prompt, rest) = tokens.split_at(prompt);
        let mut session = self.engine.open(prompt, &[], 0).unwrap();
        assert!(session.tokens().is_empty());
        let logits = (self.engine).prefill_piece(&mut session, prompt, &mut quiet);
        let mut logits = logits.unwrap().expect("one piece");
        for &id in rest {
            let next = self.engine.decode(&mut session, id, None, &mut quiet);
            logits = all_of(next.unwrap());
        }
        self.engine.close(session);
        self.known.insert(tokens.to_vec(), logits.clone());
        logits
    }
}

struct World<'a> {
    engine: &'a mut Engine,
    alone: &'a mut Alone,
    budget_bytes: usize,
    open: Vec<Open>,
    /// What was computed for whom
    seen: HashSet<(u64, Vec<u32>)>,
    found: usize,
    evicted: u64,
}

impl World<'_> {
    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let open = self.open.len();
        match action {
            Action::Open(which, salt) => self.begin(prompt(*which), *salt)?,
            Action::Go(i, id) if open > 0 => self.go(i % open, *id)?,
            Action::Park(i) if open > 0 => {
                let open = &mut self.open[i % open];
                self.engine.park(&mut open.session).unwrap();
                prop_assert!(!open.session.is_resident());
            }
            Action::Unpark(i) if open > 0 => self.unpark(i % open)?,
            Action::Close(i) if open > 0 => {
                let open = self.open.remove(i % open);
                self.engine.close(open.session);
            }
            Action::Shrink => {
                // A new cache counts from 0.
                self.evicted += self.engine.prefix_cache().counts().evicted;
                self.engine.set_prefix_cache(self.budget_bytes);
                self.seen.clear();
                let open = self.open.iter();
                let now = open.map(|open| (open.salt, open.session.tokens().to_vec()));
                self.seen.extend(now.collect::<Vec<_>>());
            }
            _ => {}
        }
        prop_assert!(self.engine.prefix_cache().held_bytes() <= self.budget_bytes);
        let resident = self.open.iter().filter(|open| open.session.is_resident());
        let resident = resident.count();
        prop_assert_eq!(self.engine.resident_sessions(), (resident, CAPACITY));
        Ok(())
    }

    fn full(&self) -> bool {
        self.engine.resident_sessions().0 == CAPACITY
    }

    fn begin(&mut self, prompt: Vec<u32>, salt: u64) -> Result<(), TestCaseError> {
        let full = self.full();
        match self.engine.open(&prompt, &marks(&prompt), salt) {
            Ok(session) => {
                prop_assert!(!full);
                let known = session.tokens();
                prop_assert!(known.len() < prompt.len() && prompt.starts_with(known));
                // Only what was computed before, and for the same owner.
                let is_seen = known.is_empty() || self.seen.contains(&(salt, known.to_vec()));
                prop_assert!(is_seen, "{} tokens of nobody's", known.len());
                self.found += usize::from(!known.is_empty());
                self.open.push(Open {
                    session,
                    prompt,
                    salt,
                });
            }
            Err(EngineError::Backend(BackendError::NoRoom { .. })) => prop_assert!(full),
            Err(error) => prop_assert!(false, "{}", error),
        }
        Ok(())
    }

    fn go(&mut self, i: usize, id: u32) -> Result<(), TestCaseError> {
        let Open {
            session,
            prompt,
            salt,
        } = &mut self.open[i];
        let seen = session.tokens().len();
        let found = match seen < prompt.len() {
            true => self.engine.prefill_piece(session, prompt, &mut quiet),
            false => (self.engine)
                .decode(session, id, None, &mut quiet)
                .map(|logits| Some(all_of(logits))),
        };
        if !session.is_resident() {
            prop_assert!(matches!(found, Err(EngineError::Parked)));
            return Ok(());
        }
        let found = found.unwrap();
        self.seen.insert((*salt, session.tokens().to_vec()));
        if let Some(found) = found {
            let expected = self.alone.logits(session.tokens(), prompt.len());
            let diff = max_diff(&found, &expected);
            prop_assert!(diff <= SAME, "{} after {} tokens", diff, seen);
        }
        Ok(())
    }

    fn unpark(&mut self, i: usize) -> Result<(), TestCaseError> {
        let full = self.full();
        let session = &mut self.open[i].session;
        match self.engine.unpark(session) {
            Ok(()) => prop_assert!(session.is_resident()),
            Err(EngineError::Backend(BackendError::NoRoom { .. })) => prop_assert!(full),
            Err(error) => prop_assert!(false, "{}", error),
        }
        Ok(())
    }
}

/// Bytes of a snapshot of a prompt of middling length.
fn snapshot_bytes(engine: &mut Engine) -> usize {
    let prompt = prompt(2);
    engine.set_prefix_cache(usize::MAX);
    let mut session = engine.open(&prompt, &[], 0).unwrap();
    engine
        .prefill_piece(&mut session, &prompt, &mut quiet)
        .unwrap();
    engine.close(session);
    assert_eq!(engine.prefix_cache().len(), 1);
    engine.prefix_cache().held_bytes()
}

fn action() -> impl Strategy<Value = Action> {
    let which = 0..24usize;
    prop_oneof![
        4 => (which.clone(), 0..2u64).prop_map(|(which, salt)| Action::Open(which, salt)),
        12 => (which.clone(), 3..7u32).prop_map(|(i, id)| Action::Go(i, id)),
        1 => which.clone().prop_map(Action::Park),
        2 => which.clone().prop_map(Action::Unpark),
        3 => which.prop_map(Action::Close),
        1 => Just(Action::Shrink),
    ]
}

#[test]
fn sessions_with_kept_prefixes_answer_as_if_each_had_begun_anew() {
    let config = Config {
        cases: 4,
        failure_persistence: None,
        max_shrink_iters: 20,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let mut alone = load();
    alone.set_prefix_cache(0);
    alone.reserve(1, MAX_TOKENS).unwrap();
    let alone = Alone {
        engine: alone,
        known: HashMap::new(),
    };
    let mut engine = load();
    let budget_bytes = KEPT * snapshot_bytes(&mut engine);
    let engines = std::cell::RefCell::new((engine, alone, (0, 0)));
    let steps = prop::collection::vec(action(), 250);
    let outcome = runner.run(&steps, |steps| {
        let (engine, alone, (found, evicted)) = &mut *engines.borrow_mut();
        engine.set_prefix_cache(budget_bytes);
        engine.reserve(CAPACITY, MAX_TOKENS).unwrap();
        let mut world = World {
            engine,
            alone,
            budget_bytes,
            open: Vec::new(),
            seen: HashSet::new(),
            found: 0,
            evicted: 0,
        };
        let done = steps.iter().try_for_each(|action| world.act(action));
        *found += world.found;
        *evicted += world.evicted + world.engine.prefix_cache().counts().evicted;
        for open in std::mem::take(&mut world.open) {
            world.engine.close(open.session);
        }
        done?;
        prop_assert_eq!(engine.resident_sessions().0, 0);
        prop_assert!(engine.prefix_cache().held_bytes() <= budget_bytes);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let (_, _, (found, evicted)) = engines.into_inner();
    println!("{found} prompts began with what was kept, {evicted} snapshots were evicted");
    assert!(found > 20 && evicted > 5, "{found}, {evicted}");
}
