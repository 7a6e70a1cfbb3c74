//! A loaded model behind a handle: requests go in, events come out, statistics can be asked for.
//!
//! The thread behind the handle owns the model. What it does inside, one request after the other or
//! many at a time, is its own affair: it takes [`Job`]s from [`Jobs`] and sends [`Event`]s.
//!
//! ```text
//! Service::submit(Request) -> Events        bounded queue, fair between owners
//!                 |                   ^
//!               Jobs::next -> Job::send(Event)   on the model's thread
//! ```

mod decode;
mod picks;
mod queue;
pub mod script;
mod sessions;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::sampler::{SamplingParams, TokenLogprob};
use crate::planning::{LayerCounts, PolicyConfig};
pub use picks::entropy_bits;
use queue::Shared;
pub use queue::{Job, Jobs};
pub use sessions::{ManagerSource, ServeOptions, serve_sessions};

/// One prompt to be continued.
pub struct Request {
    pub prompt: Vec<u32>,
    /// At most so many new tokens; the room that the context leaves is another bound
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Text ends before any of these
    pub stop: Vec<String>,
    /// Go on past end-of-text tokens
    pub ignore_eos: bool,
    /// Report the logprob of each token, and of so many best ones
    pub logprobs: Option<usize>,
    /// Added to logits before anything else of sampling
    pub logit_bias: Vec<(u32, f32)>,
    /// Rules out tokens step by step
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whose request it is: owners take turns in the queue, and share no cached prefix
    pub owner: u64,
    /// Count what the router picks for this request
    pub routing: bool,
}

/// What may come next, decided token by token on the model's thread.
pub trait Constraint: Send {
    /// Sets the logits of all tokens that may not come next to -inf; `logits: [vocab_size]`.
    ///
    /// # Errors
    /// If the rule cannot be enforced any more: the request then fails.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Tells which token was chosen.
    ///
    /// # Errors
    /// As [`mask`](Constraint::mask).
    fn accept(&mut self, id: u32) -> Result<(), String>;
}

/// What happens to a request, in this order; the last is `Finished` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// Its turn has come; `cached_tokens` of the prompt need not be computed
    Started {
        cached_tokens: usize,
    },
    /// So many of the prompt's tokens are in, cached ones included
    Prefill {
        done: usize,
    },
    Token(Token),
    Finished(Box<Finished>),
    /// Nothing more will come; the message is for whoever asked
    Failed(String),
}

/// One generated token.
#[derive(Clone, Debug)]
pub struct Token {
    pub id: u32,
    /// The text that is certain now, often empty: never half a character or part of a stop string
    pub text: String,
    pub logprob: Option<Logprob>,
}

/// How the model rates a token, before penalties, bias and temperature.
#[derive(Clone, Debug)]
pub struct Logprob {
    pub chosen: TokenLogprob,
    /// Best first
    pub best: Vec<TokenLogprob>,
}

/// Why and how a request ended.
#[derive(Clone, Debug)]
pub struct Finished {
    pub reason: FinishReason,
    /// Text that was held back for a stop string that never came
    pub text: String,
    pub usage: Usage,
    pub timings: Timings,
    pub routing: Option<RoutingSummary>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token
    EndOfText,
    StopString(String),
    /// The asked tokens are there, or the context is full
    Length,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

/// Wall-clock times of one request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// From submission to its turn
    pub queue: Duration,
    /// From its turn to the logits of the prompt's last token
    pub prefill: Duration,
    /// From there to the last token
    pub decode: Duration,
}

/// What the router picked for one request.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoutingSummary {
    /// `[layer]`
    pub layers: Vec<LayerRouting>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerRouting {
    pub picks: u64,
    pub distinct_experts: usize,
    /// Of the picks' distribution over experts, in bits
    pub entropy_bits: f64,
    /// Up to eight most picked experts with their picks, most first
    pub top_experts: Vec<(usize, u64)>,
}

/// What is known of a model once it is loaded.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModelFacts {
    pub backend: String,
    /// Prompt and answer of one request together
    pub context_tokens: usize,
    pub vocab_size: usize,
    pub num_layers: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    /// The weights are random, the text means nothing
    pub synthetic: bool,
    /// What a user should know about this model and did not ask
    pub notes: Vec<String>,
}

/// Counts since the start of everything that experts did, and where they are now.
#[derive(Clone, Debug, Default)]
pub struct ExpertsReport {
    /// Of the cache, if there is one
    pub policy: Option<PolicyConfig>,
    /// Why slots stay as they are, if a cache was stopped or frozen
    pub stopped: Option<String>,
    /// `[layer][expert]`: how often the router picked it, in prefill and decode
    pub picks: Vec<Vec<u64>>,
    /// `[layer][slot]`
    pub residents: Vec<Vec<Option<u16>>>,
    /// `[layer]`, of decode steps
    pub counts: Vec<LayerCounts>,
    /// `[layer]`: decode picks found in VRAM, computed by the CPU, read over PCIe
    pub places: Vec<[u64; 3]>,
    /// Bytes of experts copied into slots
    pub promoted_bytes: u64,
    /// All bytes of experts over PCIe
    pub h2d_bytes: u64,
    pub vram_bytes: Option<u64>,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
}

/// How the expert cache shall go on.
#[derive(Clone, Debug, PartialEq)]
pub enum CacheChange {
    /// Slots stay as they are, or follow the policy again
    Freeze(bool),
    /// Another policy on the placement's slots
    Policy(PolicyConfig),
    /// As the placement has it
    Reload,
    /// Write the state to the file of `--cache-state`
    Save,
    /// Another ceiling for what the process holds on the GPU, in bytes; sequences stay
    Budget(u64),
}

/// What the model's thread answers between tokens.
pub trait Controls {
    fn experts(&mut self) -> ExpertsReport;

    /// # Errors
    /// Why it is impossible here, and the way out.
    fn change(&mut self, change: &CacheChange) -> Result<(), String>;
}

/// Why a request was not taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    #[error("loading the model: {done} of {total} bytes; try again later")]
    Loading { done: u64, total: u64 },
    #[error("{waiting} requests wait already; try again later")]
    QueueFull { waiting: usize },
    #[error("shutting down")]
    Draining,
    #[error("the model cannot be used: {0}")]
    Failed(String),
}

/// How far the model is.
#[derive(Clone, Debug)]
pub enum Phase {
    Loading { done: u64, total: u64 },
    Ready(Arc<ModelFacts>),
    Failed(String),
}

/// Requests that are in work, and that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub running: usize,
    pub waiting: usize,
}

/// The handle. Cloning shares the model.
#[derive(Clone)]
pub struct Service {
    shared: Arc<Shared>,
}

/// What is known so far of a request; dropping it cancels the request, wherever it is.
pub struct Events {
    receiver: mpsc::UnboundedReceiver<Event>,
}

impl Events {
    /// As [`next`](Events::next), for whoever waits for several.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.receiver.poll_recv(context)
    }

    /// The next event; `None` after the last, or if the model's thread is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }
}

impl Service {
    /// Starts the thread that owns the model: `work` loads it, says so through [`Jobs`], and serves
    /// until [`Jobs::next`] has no more.
    ///
    /// `max_waiting`: requests beyond those in work that may wait.
    pub fn start(
        max_waiting: usize,
        work: impl FnOnce(Jobs) -> Result<(), String> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::new(max_waiting));
        let jobs = Jobs::new(shared.clone());
        let guard = shared.clone();
        let spawned = std::thread::Builder::new()
            .name("model".into())
            .spawn(move || {
                // Whatever ends the thread, nobody waits for it any more.
                let _end = queue::EndOnDrop(guard.clone());
                if let Err(reason) = work(jobs) {
                    guard.fail(reason);
                }
            });
        if let Err(error) = spawned {
            shared.fail(format!("the model's thread could not be started: {error}"));
        }
        Service { shared }
    }

    /// Queues a request. Its events are unbounded, but no more than its tokens.
    ///
    /// # Errors
    /// [`Refusal`] at once, if it cannot be served now.
    pub fn submit(&self, request: Request) -> Result<Events, Refusal> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.submit(request, sender)?;
        Ok(Events { receiver })
    }

    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    pub fn load(&self) -> Load {
        self.shared.load()
    }

    /// Has the model's thread answer between two tokens; `None` if it is gone or still loads.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut dyn Controls) -> T + Send + 'static,
    ) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        let ask: Question = Box::new(move |controls| {
            let _ = answer.send(question(controls));
        });
        if !self.shared.ask(ask, false) {
            return None;
        }
        answered.await.ok()
    }

    /// As [`ask`](Service::ask), but between two requests: for what must not happen within one.
    pub async fn change(&self, change: CacheChange) -> Option<Result<(), String>> {
        let (answer, answered) = oneshot::channel();
        let ask: Question = Box::new(move |controls| {
            let _ = answer.send(controls.change(&change));
        });
        if !self.shared.ask(ask, true) {
            return None;
        }
        answered.await.ok()
    }

    /// Takes no more requests; those accepted go on.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Waits until the model's thread has ended after [`drain`](Service::drain).
    pub async fn ended(&self) {
        self.shared.ended().await;
    }

    /// Ends what is in work, too.
    pub fn abort(&self) {
        self.shared.abort();
    }
}

/// Something to be asked on the model's thread.
type Question = Box<dyn FnOnce(&mut dyn Controls) + Send>;
type Questions = VecDeque<Question>;
