//! Requests on the sequences of an engine: several at once, each a session of its own.
//!
//! The scheduler says whose turn it is. A turn is a piece of a prompt or a few decode steps, so nobody
//! waits for more than that. Whoever has no sequence waits until one is free, or is parked in RAM where
//! others used their share.

use std::time::{Duration, Instant};

use super::decode::Decode;
use super::picks::{Picks, count, no_picks, summary};
use super::queue::Next;
use super::{
    CacheChange, Controls, Event, ExpertsReport, FinishReason, Finished, Job, Jobs, ModelFacts,
    Timings, Token, Usage,
};
use crate::backend::{BackendError, NextLogits, Routing};
use crate::engine::experts::ExpertManager;
use crate::engine::scheduler::{SLICE_STEPS, Scheduler, TaskId};
use crate::engine::session::Session;
use crate::engine::{Engine, EngineError};
use crate::planning::PolicyConfig;

/// Requests in work for each of several sequences: those that are not resident wait in RAM for their
/// turn.
const REQUESTS_PER_SEQUENCE: usize = 2;

/// A sequence runs at least so long, in its own time, before it is parked for another.
const LEAST_RUN_S: f64 = 1.0;

/// Makes the experts of the placement anew, under its policy or another.
pub type ManagerSource =
    Box<dyn FnMut(Option<PolicyConfig>) -> Result<ExpertManager, String> + Send>;

/// Writes the state of the expert cache to its file.
type Save = Box<dyn FnMut(&Engine) -> Result<(), String> + Send>;

/// What belongs to a served engine beside its model.
#[derive(Default)]
pub struct ServeOptions {
    pub managers: Option<ManagerSource>,
    pub save: Option<Save>,
    /// How often to save; never but at the end if not given
    pub save_every: Option<Duration>,
}

/// Serves until no more requests come, on the sequences that `engine` has room for, of `context_tokens`
/// each.
pub fn serve_sessions(engine: Engine, context_tokens: usize, options: ServeOptions, jobs: &Jobs) {
    let (_, sequences) = engine.resident_sessions();
    jobs.ready(facts(&engine, context_tokens), sequences);
    let save_every = options.save_every.unwrap_or(Duration::MAX / 4);
    // A year is for ever, and no overflow.
    let save_every = save_every.min(Duration::from_secs(31_536_000));
    let mut worker = Worker::new(engine, options);
    // With one sequence requests run one after the other, as was asked.
    let at_most = match sequences {
        0 | 1 => 1,
        _ => REQUESTS_PER_SEQUENCE * sequences,
    };
    let mut running = Running::default();
    let mut saved = Instant::now();
    loop {
        let idle = running.requests.is_empty();
        if idle {
            match jobs.next_within(&mut worker, save_every.saturating_sub(saved.elapsed())) {
                Next::Job(job) => running.add(job),
                Next::TimedOut => {}
                Next::End => break,
            }
        } else {
            jobs.answer(&mut worker, false);
        }
        // Who changes something between requests must not wait for ever.
        while running.requests.len() < at_most
            && !jobs.wants_a_change()
            && let Some(job) = jobs.take_waiting()
        {
            running.add(job);
        }
        running.turn(&mut worker);
        if saved.elapsed() >= save_every {
            // Told by the next call that asks for it, and at the end.
            let _ = worker.save();
            saved = Instant::now();
        }
    }
    let _ = worker.save();
}

fn facts(engine: &Engine, context_tokens: usize) -> ModelFacts {
    let shape = engine.shape();
    ModelFacts {
        backend: engine.backend().name,
        context_tokens,
        vocab_size: shape.vocab_size,
        num_layers: shape.num_layers(),
        num_experts: shape.moe.num_experts,
        num_experts_per_tok: shape.moe.num_experts_per_tok,
        synthetic: engine.config().synthetic,
        notes: engine.notes().to_vec(),
    }
}

/// Requests in work.
#[derive(Default)]
struct Running {
    scheduler: Scheduler,
    requests: Vec<Work>,
}

/// One of them.
struct Work {
    id: TaskId,
    job: Job,
    /// None before its first turn
    session: Option<Session>,
    cached_tokens: usize,
    own_picks: Option<Picks>,
    began: Instant,
    /// When the prompt was in
    prefilled: Option<Instant>,
    decode: Option<(Decode, NextLogits)>,
    /// Time of its own since it became resident
    run_s: f64,
}

/// How a turn ended.
enum Turn {
    GoesOn,
    Finished(Box<Finished>),
    Cancelled,
}

impl Running {
    fn add(&mut self, job: Job) {
        self.requests.push(Work {
            id: self.scheduler.add(job.request.owner),
            job,
            session: None,
            cached_tokens: 0,
            own_picks: None,
            began: Instant::now(),
            prefilled: None,
            decode: None,
            run_s: 0.0,
        });
    }

    /// Has the request whose turn it is run, if there is one.
    fn turn(&mut self, worker: &mut Worker) {
        self.drop_cancelled(worker);
        let Some(index) = self.next(worker) else {
            return;
        };
        let start = Instant::now();
        let turn = worker.turn(&mut self.requests[index]);
        let seconds = start.elapsed().as_secs_f64();
        let request = &mut self.requests[index];
        request.run_s += seconds;
        self.scheduler.charge(request.id, seconds);
        match turn {
            Ok(Turn::GoesOn) => return,
            Ok(Turn::Finished(finished)) => {
                request.job.send(Event::Finished(finished));
            }
            Ok(Turn::Cancelled) => {}
            Err(message) => {
                request.job.send(Event::Failed(message));
            }
        }
        self.end(index, worker);
    }

    /// The request to run next, which then has a sequence or can have one.
    fn next(&mut self, worker: &mut Worker) -> Option<usize> {
        let (resident, capacity) = worker.engine.resident_sessions();
        let is_resident =
            |request: &Work| (request.session.as_ref()).is_some_and(Session::is_resident);
        let free = resident < capacity;
        let had_enough = |request: &&Work| is_resident(request) && request.run_s >= LEAST_RUN_S;
        let parkable = self
            .requests
            .iter()
            .filter(had_enough)
            .map(|request| request.id);
        let to_park = self.scheduler.last_of(parkable);
        let may_run = |request: &&Work| {
            is_resident(request) || free || to_park.is_some_and(|park| park != request.id)
        };
        let candidates = self
            .requests
            .iter()
            .filter(may_run)
            .map(|request| request.id);
        let next = self.scheduler.first_of(candidates)?;
        let index = self
            .requests
            .iter()
            .position(|request| request.id == next)?;
        if let (false, false, Some(park)) = (is_resident(&self.requests[index]), free, to_park) {
            let parked = self
                .requests
                .iter_mut()
                .find(|request| request.id == park)?;
            if let Some(session) = &mut parked.session {
                // If RAM is short it stays, and the other fails with that reason.
                worker.engine.park(session).ok();
            }
            parked.run_s = 0.0;
        }
        Some(index)
    }

    fn drop_cancelled(&mut self, worker: &mut Worker) {
        for index in (0..self.requests.len()).rev() {
            if self.requests[index].job.is_cancelled() {
                self.end(index, worker);
            }
        }
    }

    /// What the request computed is kept.
    fn end(&mut self, index: usize, worker: &mut Worker) {
        let request = self.requests.remove(index);
        self.scheduler.remove(request.id);
        if let Some(session) = request.session {
            worker.engine.close(session);
        }
    }
}

struct Worker {
    engine: Engine,
    options: ServeOptions,
    picks: Picks,
    /// Sums of what the backend tells since its last telling
    places: Vec<[u64; 3]>,
    promoted_bytes: u64,
    h2d_bytes: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
}

fn text_of(error: EngineError) -> String {
    error.to_string()
}

impl Worker {
    fn new(engine: Engine, options: ServeOptions) -> Self {
        Worker {
            picks: no_picks(&engine),
            engine,
            options,
            places: Vec::new(),
            promoted_bytes: 0,
            h2d_bytes: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
        }
    }

    fn save(&mut self) -> Result<(), String> {
        match &mut self.options.save {
            Some(save) => save(&self.engine),
            None => Err("no file: start with --cache-state FILE".into()),
        }
    }

    /// A piece of the request's prompt, or some decode steps.
    fn turn(&mut self, request: &mut Work) -> Result<Turn, String> {
        self.bring_in(request)?;
        if request.decode.is_none() {
            self.prefill(request)?;
            return Ok(Turn::GoesOn);
        }
        for _ in 0..SLICE_STEPS {
            let turn = self.step(request)?;
            if !matches!(turn, Turn::GoesOn) {
                return Ok(turn);
            }
        }
        Ok(Turn::GoesOn)
    }

    /// Opens the request's session, or brings it back.
    fn bring_in(&mut self, request: &mut Work) -> Result<(), String> {
        if let Some(session) = &mut request.session {
            return self.engine.unpark(session).map_err(text_of);
        }
        request.began = Instant::now();
        let asked = &request.job.request;
        let session = self
            .engine
            .open(&asked.prompt, &[], asked.owner)
            .map_err(text_of)?;
        let cached_tokens = session.tokens().len();
        request.own_picks = asked.routing.then(|| no_picks(&self.engine));
        request.cached_tokens = cached_tokens;
        request.session = Some(session);
        request.job.send(Event::Started { cached_tokens });
        Ok(())
    }

    fn prefill(&mut self, request: &mut Work) -> Result<(), String> {
        let Some(session) = &mut request.session else {
            return Ok(());
        };
        let before = session.tokens().len();
        request.job.send(Event::Prefill { done: before });
        let on_routing = &mut counting(&mut self.picks, request.own_picks.as_mut());
        let prompt = &request.job.request.prompt;
        let logits = self.engine.prefill_piece(session, prompt, on_routing);
        self.prompt_tokens += (session.tokens().len() - before) as u64;
        if let Some(logits) = logits.map_err(text_of)? {
            let decode = Decode::new(&self.engine, &request.job)?;
            request.decode = Some((decode, NextLogits::All(logits)));
            request.prefilled = Some(Instant::now());
        }
        Ok(())
    }

    /// One token.
    fn step(&mut self, request: &mut Work) -> Result<Turn, String> {
        let (Some(session), Some((decode, next))) = (&mut request.session, &mut request.decode)
        else {
            return Ok(Turn::GoesOn);
        };
        let job = &mut request.job;
        if job.is_cancelled() {
            return Ok(Turn::Cancelled);
        }
        if decode.generated >= job.request.max_tokens {
            return Ok(finished(request, FinishReason::Length));
        }
        let (id, logprob) = decode.choose(job, next)?;
        self.generated_tokens += 1;
        let end_of_text = decode.ends_text(id);
        let text = match end_of_text {
            true => String::new(),
            false => decode.stream.push(id),
        };
        if !job.send(Event::Token(Token { id, text, logprob })) {
            return Ok(Turn::Cancelled);
        }
        if end_of_text {
            return Ok(finished(request, FinishReason::EndOfText));
        }
        if let Some(stop) = decode.stream.stopped_by() {
            let stop = stop.to_owned();
            return Ok(finished(request, FinishReason::StopString(stop)));
        }
        if decode.generated >= job.request.max_tokens {
            return Ok(finished(request, FinishReason::Length));
        }
        let fed = {
            let on_routing = &mut counting(&mut self.picks, request.own_picks.as_mut());
            (self.engine).decode(session, id, decode.wanted, on_routing)
        };
        match fed {
            Err(EngineError::Backend(BackendError::ContextFull { .. })) => {
                Ok(finished(request, FinishReason::Length))
            }
            Err(error) => Err(text_of(error)),
            Ok(logits) => {
                *next = logits;
                Ok(Turn::GoesOn)
            }
        }
    }
}

/// Counts what the router picks, for all and for a request that wants to know.
fn counting<'a>(
    picks: &'a mut Picks,
    mut own: Option<&'a mut Picks>,
) -> impl FnMut(usize, usize, &Routing) + 'a {
    move |layer, _, routing| {
        count(picks, layer, routing);
        if let Some(own) = own.as_deref_mut() {
            count(own, layer, routing);
        }
    }
}

/// What is told of a request that ended, and why it did.
fn finished(request: &mut Work, reason: FinishReason) -> Turn {
    let (text, completion_tokens) = match &mut request.decode {
        Some((decode, _)) => (decode.stream.finish(), decode.generated),
        None => (String::new(), 0),
    };
    let prefilled = request.prefilled.unwrap_or_else(Instant::now);
    Turn::Finished(Box::new(Finished {
        reason,
        text,
        usage: Usage {
            prompt_tokens: request.job.request.prompt.len(),
            cached_tokens: request.cached_tokens,
            completion_tokens,
        },
        timings: Timings {
            queue: request.job.waited,
            prefill: prefilled - request.began,
            decode: prefilled.elapsed(),
        },
        routing: request.own_picks.as_ref().map(summary),
    }))
}

impl Controls for Worker {
    fn experts(&mut self) -> ExpertsReport {
        if let Some(times) = self.engine.take_times() {
            let layers = times.layers.len();
            self.places.resize(self.places.len().max(layers), [0; 3]);
            for (sum, layer) in self.places.iter_mut().zip(&times.layers) {
                sum[0] += layer.vram;
                sum[1] += layer.cpu;
                sum[2] += layer.pcie;
            }
            self.promoted_bytes += times.promoted_bytes;
            self.h2d_bytes += times.h2d_bytes;
        }
        let manager = self.engine.experts();
        ExpertsReport {
            policy: manager.map(ExpertManager::config),
            stopped: manager.and_then(|m| m.stopped().map(str::to_owned)),
            picks: self.picks.clone(),
            residents: manager.map(ExpertManager::contents).unwrap_or_default(),
            counts: manager.map_or_else(Vec::new, |m| m.layer_counts().to_vec()),
            places: self.places.clone(),
            promoted_bytes: self.promoted_bytes,
            h2d_bytes: self.h2d_bytes,
            vram_bytes: self.engine.vram_bytes(),
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
        }
    }

    fn change(&mut self, change: &CacheChange) -> Result<(), String> {
        let policy = match change {
            CacheChange::Save => return self.save(),
            CacheChange::Freeze(frozen) => {
                return match self.engine.experts_mut() {
                    Some(experts) => {
                        experts.freeze(*frozen);
                        Ok(())
                    }
                    None => Err("there is no expert cache: start with --placement FILE".into()),
                };
            }
            CacheChange::Policy(policy) => Some(*policy),
            CacheChange::Reload => None,
        };
        let Some(managers) = &mut self.options.managers else {
            return Err("there is no placement: start with --placement FILE".into());
        };
        let manager = managers(policy)?;
        self.engine.place(manager).map_err(|e| e.to_string())?;
        Ok(())
    }
}
