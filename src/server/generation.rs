//! A request on its way: submitted once per choice, read part by part, counted in the metrics.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::App;
use super::error::{ApiError, ApiResult};
use super::guard::Owner;
use super::reader::{Part, Reader, ReaderOptions};
use super::schema::Grammar;
use crate::engine::sampler::SamplingParams;
use crate::engine::service::{
    Constraint, Event, Events, FinishReason, Finished, Request, Token, Usage,
};

/// What a wire file asks for, whichever API it serves.
pub struct Generation {
    pub prompt: Vec<u32>,
    /// As asked; the room that the context leaves is another bound
    pub max_tokens: Option<usize>,
    pub sampling: SamplingParams,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub logprobs: Option<usize>,
    pub logit_bias: Vec<(u32, f32)>,
    pub grammar: Option<Grammar>,
    /// How the answer is taken apart; `None`: all of it is text
    pub reader: Option<ReaderOptions>,
    pub n: usize,
    pub routing: bool,
}

/// What happened to one of the choices.
#[derive(Debug)]
pub enum Update {
    Delta {
        choice: usize,
        parts: Vec<Part>,
        token: Option<Token>,
    },
    Finished {
        choice: usize,
        end: Box<End>,
    },
    /// The request as a whole failed
    Failed(ApiError),
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub struct End {
    pub finished: Finished,
    /// Tool calls in the answer
    pub calls: usize,
}

impl End {
    /// As OpenAI's APIs name it.
    pub fn reason(&self) -> &'static str {
        match self.finished.reason {
            FinishReason::Length => "length",
            _ if self.calls > 0 => "tool_calls",
            FinishReason::EndOfText | FinishReason::StopString(_) => "stop",
        }
    }
}

/// All choices of a request; dropping it cancels them.
pub struct Run {
    app: Arc<App>,
    choices: Vec<Choice>,
    ready: VecDeque<Update>,
    /// First to be looked at, so that no choice starves another
    turn: usize,
    deadline: Instant,
}

struct Choice {
    events: Option<Events>,
    reader: Option<Reader>,
    submitted: Instant,
    last_token: Option<Instant>,
}

impl Generation {
    /// Queues the request.
    ///
    /// # Errors
    /// The prompt is empty or too long, the queue is full, a grammar cannot be had.
    pub fn submit(self, app: &Arc<App>, owner: Owner) -> ApiResult<Run> {
        let facts = app.facts()?;
        if self.prompt.is_empty() {
            return Err(ApiError::invalid("prompt", "the prompt is empty"));
        }
        if self.prompt.len() >= facts.context_tokens {
            return Err(ApiError::too_long(self.prompt.len(), facts.context_tokens));
        }
        let room = facts.context_tokens - self.prompt.len();
        let max_tokens = self.max_tokens.unwrap_or(room).min(room);
        let mut choices = Vec::new();
        for index in 0..self.n {
            let grammar = self.grammar.as_ref();
            let mut sampling = self.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index as u64);
            let request = Request {
                prompt: self.prompt.clone(),
                max_tokens,
                sampling,
                stop: self.stop.clone(),
                ignore_eos: self.ignore_eos,
                logprobs: self.logprobs,
                logit_bias: self.logit_bias.clone(),
                constraint: grammar.map(|g| Box::new(g.clone()) as Box<dyn Constraint>),
                owner,
                routing: self.routing,
            };
            let refused = |error| {
                app.metrics.refused();
                ApiError::from(error)
            };
            choices.push(Choice {
                events: Some(app.service.submit(request).map_err(refused)?),
                reader: self.reader.clone().map(Reader::new),
                submitted: Instant::now(),
                last_token: None,
            });
        }
        Ok(Run {
            app: app.clone(),
            choices,
            ready: VecDeque::new(),
            turn: 0,
            deadline: Instant::now() + app.options.limits.request_time,
        })
    }
}

impl Run {
    /// What happens next; `None` when all choices have ended.
    pub async fn next(&mut self) -> Option<Update> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Some(update);
            }
            let deadline = tokio::time::Instant::from_std(self.deadline);
            let event = tokio::time::timeout_at(deadline, self.next_event()).await;
            let Ok(event) = event else {
                self.choices.clear();
                let seconds = self.app.options.limits.request_time.as_secs();
                let message = format!("the request took more than {seconds} s (--timeout)");
                let status = axum::http::StatusCode::GATEWAY_TIMEOUT;
                return Some(Update::Failed(ApiError::new(
                    status,
                    "timeout_error",
                    message,
                )));
            };
            let (choice, event) = event?;
            self.take(choice, event);
        }
    }

    /// The next event of any choice; an end without an event is a failure.
    async fn next_event(&mut self) -> Option<(usize, Event)> {
        let count = self.choices.len();
        let turn = self.turn;
        let choices = &mut self.choices;
        let (choice, event) = poll_fn(|context| {
            let mut alive = false;
            for at in (0..count).map(|i| (turn + i) % count) {
                let Some(events) = &mut choices[at].events else {
                    continue;
                };
                alive = true;
                if let Poll::Ready(event) = events.poll_next(context) {
                    return Poll::Ready(Some((at, event)));
                }
            }
            match alive {
                true => Poll::Pending,
                false => Poll::Ready(None),
            }
        })
        .await?;
        self.turn = (choice + 1) % count;
        let gone = || Event::Failed("the request was cut off: the server is shutting down".into());
        Some((choice, event.unwrap_or_else(gone)))
    }

    fn take(&mut self, index: usize, event: Event) {
        let choice = &mut self.choices[index];
        let metrics = &self.app.metrics;
        match event {
            Event::Started { cached_tokens } => metrics.started(cached_tokens),
            Event::Prefill { .. } => {}
            Event::Token(token) => {
                let now = Instant::now();
                match choice.last_token.replace(now) {
                    None => metrics.first_token(now - choice.submitted),
                    Some(last) => metrics.inter_token(now - last),
                }
                let parts = match &mut choice.reader {
                    Some(reader) => reader.push(&token.text),
                    None => text_part(&token.text),
                };
                self.ready.push_back(Update::Delta {
                    choice: index,
                    parts,
                    token: Some(token),
                });
            }
            Event::Finished(finished) => {
                let complete = finished.reason != FinishReason::Length;
                let mut calls = 0;
                let parts = match &mut choice.reader {
                    Some(reader) => {
                        let mut parts = reader.push(&finished.text);
                        parts.extend(reader.finish(complete));
                        calls = reader.calls();
                        parts
                    }
                    None => text_part(&finished.text),
                };
                if !parts.is_empty() {
                    self.ready.push_back(Update::Delta {
                        choice: index,
                        parts,
                        token: None,
                    });
                }
                choice.events = None;
                let end = End {
                    finished: *finished,
                    calls,
                };
                metrics.finished(&end, choice.submitted.elapsed());
                self.ready.push_back(Update::Finished {
                    choice: index,
                    end: Box::new(end),
                });
            }
            Event::Failed(message) => {
                metrics.failed();
                self.choices.clear();
                self.ready
                    .push_back(Update::Failed(ApiError::internal(message)));
            }
        }
    }
}

fn text_part(text: &str) -> Vec<Part> {
    match text.is_empty() {
        true => Vec::new(),
        false => vec![Part::Text(text.to_owned())],
    }
}

/// Usage of all choices together: the prompt counts once.
#[derive(Clone, Copy, Debug, Default)]
pub struct TotalUsage {
    usage: Usage,
    choices: usize,
}

impl TotalUsage {
    pub fn add(&mut self, usage: &Usage) {
        if self.choices == 0 {
            self.usage.cached_tokens = usage.cached_tokens;
        }
        self.choices += 1;
        self.usage.prompt_tokens = usage.prompt_tokens;
        self.usage.completion_tokens += usage.completion_tokens;
    }

    pub fn get(&self) -> Usage {
        self.usage
    }
}

/// Milliseconds as clients read them.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
