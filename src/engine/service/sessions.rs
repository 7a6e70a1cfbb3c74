//! Requests on the sequences of an engine: several at once, each a session of its own.
//!
//! The scheduler says whose turn it is. A turn is a piece of a prompt or a few decode steps, so nobody
//! waits for more than that. Whoever generates takes the others that do along: weights are read once for
//! all of them. Whoever has no sequence waits until one is free, or is parked in RAM where others used
//! their share.

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
use crate::engine::session::{NextToken, Session};
use crate::engine::{Engine, EngineError};
use crate::planning::PolicyConfig;

/// Requests in work for each of several sequences: those that are not resident wait in RAM for their
/// turn.
const REQUESTS_PER_SEQUENCE: usize = 2;

/// A sequence runs at least so long, in its own time, before it is parked for another.
const LEAST_RUN_S: f64 = 1.0;

/// Requests that generate in one step.
const MAX_TOGETHER: usize = 8;

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

/// What became of the logits of a request.
enum Chosen {
    /// To be fed
    Token(u32),
    End(Turn),
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

    /// Has the request whose turn it is run, if there is one, and those that go along.
    fn turn(&mut self, worker: &mut Worker) {
        self.drop_cancelled(worker);
        let Some(index) = self.next(worker) else {
            return;
        };
        let group = self.together(index);
        let mut requests: Vec<&mut Work> = (self.requests.iter_mut())
            .filter(|request| group.contains(&request.id))
            .collect();
        let start = Instant::now();
        let turns = worker.turn(&mut requests);
        // Each one's share: together they take less time than one after the other.
        let seconds = start.elapsed().as_secs_f64() / requests.len() as f64;
        let mut ended = Vec::new();
        for (request, turn) in requests.into_iter().zip(turns) {
            request.run_s += seconds;
            self.scheduler.charge(request.id, seconds);
            match turn {
                Ok(Turn::GoesOn) => continue,
                Ok(Turn::Finished(finished)) => {
                    request.job.send(Event::Finished(finished));
                }
                Ok(Turn::Cancelled) => {}
                Err(message) => {
                    request.job.send(Event::Failed(message));
                }
            }
            ended.push(request.id);
        }
        for id in ended {
            if let Some(index) = self.requests.iter().position(|request| request.id == id) {
                self.end(index, worker);
            }
        }
    }

    /// The request to run and, if it generates, others that do and have a sequence: as many as fit in a
    /// step, in the order of their turns.
    fn together(&self, index: usize) -> Vec<TaskId> {
        let first = &self.requests[index];
        let mut group = vec![first.id];
        let generates = |request: &&Work| {
            let resident = request.session.as_ref().is_some_and(Session::is_resident);
            resident && request.decode.is_some()
        };
        while first.decode.is_some() && group.len() < MAX_TOGETHER {
            let others = self.requests.iter().filter(generates);
            let others = others.map(|request| request.id);
            match (self.scheduler).first_of(others.filter(|id| !group.contains(id))) {
                Some(id) => group.push(id),
                None => break,
            }
        }
        group
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

    /// A piece of the one request's prompt, or some decode steps of all: how it ended for each.
    fn turn(&mut self, requests: &mut [&mut Work]) -> Vec<Result<Turn, String>> {
        for request in requests.iter_mut() {
            if let Err(message) = self.bring_in(request) {
                // The others' turns come again.
                let id = request.id;
                let turn = |other: &&mut Work| match other.id == id {
                    true => Err(message.clone()),
                    false => Ok(Turn::GoesOn),
                };
                return requests.iter().map(turn).collect();
            }
        }
        match requests {
            [request] if request.decode.is_none() => {
                vec![self.prefill(request).map(|()| Turn::GoesOn)]
            }
            _ => self.decode(requests),
        }
    }

    /// Some decode steps.
    fn decode(&mut self, requests: &mut [&mut Work]) -> Vec<Result<Turn, String>> {
        let mut turns: Vec<_> = requests.iter().map(|_| Ok(Turn::GoesOn)).collect();
        for _ in 0..SLICE_STEPS {
            let mut chosen = Vec::new();
            for (i, request) in requests.iter_mut().enumerate() {
                if !matches!(turns[i], Ok(Turn::GoesOn)) {
                    continue;
                }
                match self.choose(request) {
                    Ok(Chosen::Token(id)) => chosen.push((i, id)),
                    Ok(Chosen::End(turn)) => turns[i] = Ok(turn),
                    Err(message) => turns[i] = Err(message),
                }
            }
            if chosen.is_empty() {
                break;
            }
            self.feed(requests, &chosen, &mut turns);
        }
        turns
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

    /// The next token, which is told at once; it is to be fed, unless it is the last.
    fn choose(&mut self, request: &mut Work) -> Result<Chosen, String> {
        let Some((decode, next)) = &mut request.decode else {
            return Ok(Chosen::End(Turn::GoesOn));
        };
        let job = &mut request.job;
        if job.is_cancelled() {
            return Ok(Chosen::End(Turn::Cancelled));
        }
        if decode.generated >= job.request.max_tokens {
            return Ok(Chosen::End(finished(request, FinishReason::Length)));
        }
        let (id, logprob) = decode.choose(job, next)?;
        self.generated_tokens += 1;
        let end_of_text = decode.ends_text(id);
        let text = match end_of_text {
            true => String::new(),
            false => decode.stream.push(id),
        };
        if !job.send(Event::Token(Token { id, text, logprob })) {
            return Ok(Chosen::End(Turn::Cancelled));
        }
        let reason = match decode.stream.stopped_by() {
            _ if end_of_text => FinishReason::EndOfText,
            Some(stop) => FinishReason::StopString(stop.to_owned()),
            None if decode.generated >= job.request.max_tokens => FinishReason::Length,
            None => return Ok(Chosen::Token(id)),
        };
        Ok(Chosen::End(finished(request, reason)))
    }

    /// Feeds what was chosen, by number of request, as one step.
    fn feed(
        &mut self,
        requests: &mut [&mut Work],
        chosen: &[(usize, u32)],
        turns: &mut [Result<Turn, String>],
    ) {
        match (self.feed_together(requests, chosen), chosen) {
            (Ok(()), _) => {}
            (Err(EngineError::Backend(BackendError::ContextFull { .. })), &[(i, _)]) => {
                turns[i] = Ok(finished(requests[i], FinishReason::Length));
            }
            // Nothing was done: each by itself then.
            (Err(EngineError::Backend(BackendError::ContextFull { .. })), _) => {
                for one in chosen {
                    self.feed(requests, std::slice::from_ref(one), turns);
                }
            }
            (Err(error), _) => {
                let message = text_of(error);
                for &(i, _) in chosen {
                    turns[i] = Err(message.clone());
                }
            }
        }
    }

    fn feed_together(
        &mut self,
        requests: &mut [&mut Work],
        chosen: &[(usize, u32)],
    ) -> Result<(), EngineError> {
        let (mut tokens, mut own_picks, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for (i, request) in requests.iter_mut().enumerate() {
            let id = chosen.iter().find(|&&(chosen, _)| chosen == i);
            if let (Some(&(_, id)), Some(session), Some((decode, next))) =
                (id, &mut request.session, &mut request.decode)
            {
                let wanted = decode.wanted;
                tokens.push(NextToken {
                    session,
                    id,
                    wanted,
                });
                own_picks.push(request.own_picks.as_mut());
                logits.push(next);
            }
        }
        let picks = &mut self.picks;
        let on_routings = &mut |token: usize, layer: usize, _: usize, routing: &Routing| {
            count(picks, layer, routing);
            if let Some(own) = own_picks[token].as_deref_mut() {
                count(own, layer, routing);
            }
        };
        let found = self.engine.decode_together(&mut tokens, on_routings)?;
        for (next, found) in logits.into_iter().zip(found) {
            *next = found;
        }
        Ok(())
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
            CacheChange::Budget(bytes) => {
                let slots = self.engine.set_vram_budget(*bytes, &self.picks);
                return match slots.map_err(text_of)? {
                    Some(_) => Ok(()),
                    None => Err("no GPU takes part, so there is no budget to change".into()),
                };
            }
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
