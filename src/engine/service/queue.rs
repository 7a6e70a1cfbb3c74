//! The queue between the handle and the model's thread: bounded, fair, and rid of who left.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::{Controls, Event, Load, ModelFacts, Phase, Question, Questions, Refusal, Request};

/// What handle and thread share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    aborted: AtomicBool,
    ended: watch::Sender<bool>,
    max_waiting: usize,
}

struct State {
    /// Requests that can be in work at once without waiting for each other
    at_once: usize,
    phase: Phase,
    waiting: VecDeque<Waiting>,
    running: usize,
    draining: bool,
    ended: bool,
    /// To be answered between tokens
    questions: Questions,
    /// To be answered between requests
    changes: Questions,
    /// When each owner was last served, in turns
    served: HashMap<u64, u64>,
    turn: u64,
}

struct Waiting {
    request: Request,
    events: UnboundedSender<Event>,
    since: Instant,
}

impl Shared {
    pub fn new(max_waiting: usize) -> Self {
        Shared {
            state: Mutex::new(State {
                at_once: 1,
                phase: Phase::Loading { done: 0, total: 0 },
                waiting: VecDeque::new(),
                running: 0,
                draining: false,
                ended: false,
                questions: VecDeque::new(),
                changes: VecDeque::new(),
                served: HashMap::new(),
                turn: 0,
            }),
            changed: Condvar::new(),
            aborted: AtomicBool::new(false),
            ended: watch::channel(false).0,
            max_waiting,
        }
    }

    /// The state is valid between any two statements that change it, so a panic elsewhere does not
    /// spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request, whose events go to `events`.
    ///
    /// # Errors
    /// [`Refusal`] while the model is loading, once it failed or is about to end, or if no place is
    /// left.
    pub fn submit(&self, request: Request, events: UnboundedSender<Event>) -> Result<(), Refusal> {
        let mut state = self.lock();
        if let Phase::Failed(reason) = &state.phase {
            return Err(Refusal::Failed(reason.clone()));
        }
        if state.draining || state.ended {
            return Err(Refusal::Draining);
        }
        if let Phase::Loading { done, total } = state.phase {
            return Err(Refusal::Loading { done, total });
        }
        state.forget_who_left();
        // A request that is taken at once needs no place in the queue.
        let places = self.max_waiting + state.at_once.saturating_sub(state.running);
        if state.waiting.len() >= places {
            let waiting = state.waiting.len();
            return Err(Refusal::QueueFull { waiting });
        }
        state.waiting.push_back(Waiting {
            request,
            events,
            since: Instant::now(),
        });
        self.changed.notify_all();
        Ok(())
    }

    pub fn phase(&self) -> Phase {
        self.lock().phase.clone()
    }

    pub fn load(&self) -> Load {
        let mut state = self.lock();
        state.forget_who_left();
        Load {
            running: state.running,
            waiting: state.waiting.len(),
        }
    }

    /// Whether there is somebody to answer.
    pub fn ask(&self, question: Question, between_requests: bool) -> bool {
        let mut state = self.lock();
        if state.ended || !matches!(state.phase, Phase::Ready(_)) {
            return false;
        }
        match between_requests {
            true => state.changes.push_back(question),
            false => state.questions.push_back(question),
        }
        self.changed.notify_all();
        true
    }

    pub fn drain(&self) {
        self.lock().draining = true;
        self.changed.notify_all();
    }

    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        let mut state = self.lock();
        state.draining = true;
        state.waiting.clear();
        self.changed.notify_all();
    }

    pub async fn ended(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as `self`.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    pub fn fail(&self, reason: String) {
        let mut state = self.lock();
        state.phase = Phase::Failed(reason);
        state.waiting.clear();
        self.changed.notify_all();
    }

    fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.waiting.clear();
        state.questions.clear();
        state.changes.clear();
        if let Phase::Ready(_) | Phase::Loading { .. } = state.phase
            && !state.draining
        {
            state.phase = Phase::Failed("its thread ended".into());
        }
        drop(state);
        self.ended.send_replace(true);
    }
}

impl State {
    /// Takes requests whose events nobody reads out of the queue.
    fn forget_who_left(&mut self) {
        self.waiting.retain(|waiting| !waiting.events.is_closed());
    }

    /// The oldest request of the owner who was served longest ago.
    fn take_next(&mut self) -> Option<Waiting> {
        self.forget_who_left();
        let last_served = |w: &Waiting| self.served.get(&w.request.owner).copied().unwrap_or(0);
        let next = (0..self.waiting.len()).min_by_key(|&i| (last_served(&self.waiting[i]), i))?;
        let waiting = self.waiting.remove(next)?;
        self.turn += 1;
        self.served.insert(waiting.request.owner, self.turn);
        Some(waiting)
    }
}

/// Tells everybody that the thread has ended, however it did.
pub(super) struct EndOnDrop(pub Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The model's side of the queue.
pub struct Jobs {
    shared: Arc<Shared>,
}

impl Jobs {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Jobs { shared }
    }

    /// Tells how far loading is.
    pub fn loading(&self, done: u64, total: u64) {
        self.shared.lock().phase = Phase::Loading { done, total };
    }

    /// From now on requests are taken; so many can be in work at once.
    pub fn ready(&self, facts: ModelFacts, at_once: usize) {
        let mut state = self.shared.lock();
        state.phase = Phase::Ready(Arc::new(facts));
        state.at_once = at_once;
    }

    /// Whether somebody waits for the time between requests.
    pub fn wants_a_change(&self) -> bool {
        !self.shared.lock().changes.is_empty()
    }

    /// The next request, if one waits.
    pub fn take_waiting(&self) -> Option<Job> {
        match self.take(self.shared.lock()) {
            Taken::Job(job) => Some(*job),
            Taken::End | Taken::Nothing(_) => None,
        }
    }

    /// Waits for the next request, answering questions meanwhile. `None` when no more will come.
    pub fn next(&self, controls: &mut dyn Controls) -> Option<Job> {
        loop {
            match self.next_within(controls, Duration::from_secs(3600)) {
                Next::Job(job) => return Some(job),
                Next::TimedOut => {}
                Next::End => return None,
            }
        }
    }

    /// As [`next`](Jobs::next), but does not wait past `timeout`.
    pub fn next_within(&self, controls: &mut dyn Controls, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        loop {
            self.answer(controls, true);
            let state = self.shared.lock();
            let state = match self.take(state) {
                Taken::Job(job) => return Next::Job(*job),
                Taken::End => return Next::End,
                Taken::Nothing(state) => state,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::TimedOut;
            }
            if state.questions.is_empty() && state.changes.is_empty() {
                drop(self.shared.changed.wait_timeout(state, left));
            }
        }
    }

    fn take<'a>(&self, mut state: MutexGuard<'a, State>) -> Taken<'a> {
        match state.take_next() {
            Some(waiting) => {
                state.running += 1;
                drop(state);
                Taken::Job(Box::new(Job {
                    request: waiting.request,
                    events: waiting.events,
                    waited: waiting.since.elapsed(),
                    shared: self.shared.clone(),
                }))
            }
            None if state.draining => Taken::End,
            None => Taken::Nothing(state),
        }
    }

    /// Answers what was asked; with `between_requests` also what may not happen within one.
    pub fn answer(&self, controls: &mut dyn Controls, between_requests: bool) {
        loop {
            let question = {
                let mut state = self.shared.lock();
                match state.questions.pop_front() {
                    None if between_requests => state.changes.pop_front(),
                    question => question,
                }
            };
            match question {
                Some(question) => question(controls),
                None => return,
            }
        }
    }
}

/// What [`Jobs::next_within`] found.
pub enum Next {
    Job(Job),
    TimedOut,
    End,
}

enum Taken<'a> {
    Job(Box<Job>),
    End,
    Nothing(MutexGuard<'a, State>),
}

/// A request whose turn has come; it counts as running until it is dropped.
pub struct Job {
    pub request: Request,
    events: UnboundedSender<Event>,
    /// In the queue
    pub waited: Duration,
    shared: Arc<Shared>,
}

impl Job {
    /// Tells what happened; whether anybody still wants to know.
    pub fn send(&self, event: Event) -> bool {
        self.events.send(event).is_ok()
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed() || self.shared.aborted.load(Ordering::Relaxed)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.shared.lock().running -= 1;
    }
}
