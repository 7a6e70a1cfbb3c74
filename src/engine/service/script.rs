//! A model that answers from a list: clients and agents can be tried without weights that know tools.

use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{
    CacheChange, Controls, Event, ExpertsReport, FinishReason, Finished, Job, Jobs, ModelFacts,
    Timings, Token, Usage,
};
use crate::engine::stream::TextStream;
use crate::model::Tokenizer;

/// What to answer to which prompt.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The first that fits answers; a prompt that none fits gets an empty answer
    pub rules: Vec<Rule>,
    #[serde(default = "default_context")]
    pub context_tokens: usize,
    /// From one token to the next
    #[serde(default)]
    pub token_ms: u64,
    /// Before the first token
    #[serde(default)]
    pub prefill_ms: u64,
}

fn default_context() -> usize {
    262_144
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// All of these are in the prompt's text
    pub contains: Vec<String>,
    /// None of these is
    pub lacks: Vec<String>,
    pub reply: String,
}

impl Script {
    fn reply(&self, prompt: &str) -> &str {
        let fits = |rule: &&Rule| {
            rule.contains.iter().all(|text| prompt.contains(text))
                && !rule.lacks.iter().any(|text| prompt.contains(text))
        };
        (self.rules.iter().find(fits)).map_or("", |rule| rule.reply.as_str())
    }
}

/// Serves until no more requests come. Constraints are not applied: the script is what it says.
pub fn serve_script(script: &Script, tokenizer: &Tokenizer, jobs: &Jobs) {
    jobs.ready(
        ModelFacts {
            backend: "script".into(),
            context_tokens: script.context_tokens,
            vocab_size: tokenizer.vocab_size(),
            notes: vec!["answers come from a script, not from a model".into()],
            ..ModelFacts::default()
        },
        1,
    );
    while let Some(job) = jobs.next(&mut NoExperts) {
        answer(script, tokenizer, &job, jobs);
    }
}

fn answer(script: &Script, tokenizer: &Tokenizer, job: &Job, jobs: &Jobs) {
    let start = Instant::now();
    let request = &job.request;
    let ids = (tokenizer.decode(&request.prompt, false))
        .and_then(|prompt| tokenizer.encode(script.reply(&prompt)));
    let ids = match ids {
        Ok(ids) => ids,
        Err(error) => {
            job.send(Event::Failed(error.to_string()));
            return;
        }
    };
    job.send(Event::Started { cached_tokens: 0 });
    if !pause(job, script.prefill_ms) {
        return;
    }
    let prefilled = Instant::now();
    let mut stream = TextStream::new(tokenizer, true, &request.stop);
    let mut completion_tokens = 0;
    let mut reason = FinishReason::EndOfText;
    for id in ids {
        if completion_tokens == request.max_tokens {
            reason = FinishReason::Length;
            break;
        }
        jobs.answer(&mut NoExperts, false);
        let text = stream.push(id);
        completion_tokens += 1;
        let token = Token {
            id,
            text,
            logprob: None,
        };
        if !job.send(Event::Token(token)) || !pause(job, script.token_ms) {
            return;
        }
        if let Some(stop) = stream.stopped_by() {
            reason = FinishReason::StopString(stop.to_owned());
            break;
        }
    }
    job.send(Event::Finished(Box::new(Finished {
        reason,
        text: stream.finish(),
        usage: Usage {
            prompt_tokens: request.prompt.len(),
            cached_tokens: 0,
            completion_tokens,
        },
        timings: Timings {
            queue: job.waited,
            prefill: prefilled - start,
            decode: prefilled.elapsed(),
        },
        routing: None,
    })));
}

/// Waits; whether somebody still wants the answer.
fn pause(job: &Job, ms: u64) -> bool {
    let end = Instant::now() + Duration::from_millis(ms);
    loop {
        if job.is_cancelled() {
            return false;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(Duration::from_millis(5)));
    }
}

struct NoExperts;

impl Controls for NoExperts {
    fn experts(&mut self) -> ExpertsReport {
        ExpertsReport::default()
    }

    fn change(&mut self, _: &CacheChange) -> Result<(), String> {
        Err("a script has no experts".into())
    }
}
