//! `/v1/completions`: text or ids are continued as they are.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::chat::add_routing;
use super::params::{self, MAX_LOGPROBS, Params};
use super::{Call, prepared, timings_json, usage_json};
use crate::engine::service::{Timings, Token};
use crate::server::error::ApiResult;
use crate::server::fields::Fields;
use crate::server::generation::{Generation, Run, TotalUsage, Update};
use crate::server::prompt::encode;
use crate::server::reader::Part;
use crate::server::sse::{self, COMMENT_PING, Gone, SseWriter};
use crate::server::{App, new_id, unix_time};

/// Prompts of one request.
const MAX_PROMPTS: usize = 16;
/// Tokens to be generated where a request does not say, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

pub async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(error) => error.respond("/v1/completions"),
    }
}

async fn answer(app: &Arc<App>, request: Request) -> ApiResult<Response> {
    let ((completion, generations), owner) = prepared(app, request, prepare).await?;
    let mut runs = Vec::new();
    for generation in generations {
        runs.push(generation.submit(app, owner)?);
    }
    if !completion.params.stream {
        return whole(app, completion, runs).await;
    }
    let ping_time = app.options.limits.ping_time;
    let app = app.clone();
    Ok(sse::respond(COMMENT_PING, ping_time, |writer| async move {
        stream(&app, completion, runs, &writer).await
    }))
}

/// What the answer needs of the request.
struct Completion {
    id: String,
    created: u64,
    params: Params,
    /// `[prompt]`: what comes before the answer
    echoes: Vec<String>,
    logprobs: Option<usize>,
}

fn prepare(app: &App, call: &Call) -> ApiResult<(Completion, Vec<Generation>)> {
    let fields = Fields::new(&call.body);
    app.facts()?;
    let mut params = Params::read(app, fields)?;
    if fields.get("suffix").is_some_and(|suffix| suffix != "") {
        return Err(fields.wrong("suffix", "nothing: filling in is not supported"));
    }
    if params.max_tokens.is_none() && fields.get("max_tokens").is_none() {
        params.max_tokens = Some(DEFAULT_MAX_TOKENS);
    }
    let logprobs = match fields.get("logprobs") {
        Some(Value::Bool(wanted)) => wanted.then_some(0),
        _ => fields
            .integer("logprobs", 0..=MAX_LOGPROBS)?
            .map(|k| k as usize),
    };
    let echo = fields.bool("echo")?.unwrap_or(false);
    if echo && logprobs.is_some() {
        return Err(fields.wrong("echo", "false: logprobs of prompts are not supported"));
    }
    let grammar = match params::form(fields)? {
        Some((form, param)) => Some(app.grammars()?.compile(&form, param)?),
        None => None,
    };
    let prompts = prompts(app, fields)?;
    let mut echoes = Vec::new();
    let mut generations = Vec::new();
    for ids in prompts {
        echoes.push(match echo {
            true => app.decode(&ids)?,
            false => String::new(),
        });
        generations.push(Generation {
            prompt: ids,
            max_tokens: params.max_tokens,
            sampling: params.sampling.clone(),
            stop: params.stop.clone(),
            ignore_eos: params.ignore_eos,
            logprobs,
            logit_bias: params.logit_bias.clone(),
            grammar: grammar.clone(),
            reader: None,
            n: params.n,
            routing: params.routing,
        });
    }
    let completion = Completion {
        id: new_id("cmpl-"),
        created: unix_time(),
        params,
        echoes,
        logprobs,
    };
    Ok((completion, generations))
}

/// A string, ids, or a list of either.
fn prompts(app: &App, fields: Fields<'_>) -> ApiResult<Vec<Vec<u32>>> {
    let expected =
        format!("a string, a list of token ids, or a list of at most {MAX_PROMPTS} of these");
    let one = |value: &Value| -> ApiResult<Option<Vec<u32>>> {
        match value {
            Value::String(text) => encode(&app.text.tokenizer, text).map(Some),
            Value::Array(ids) if !ids.is_empty() && ids.iter().all(Value::is_number) => {
                app.check_ids("prompt", ids).map(Some)
            }
            _ => Ok(None),
        }
    };
    let prompt = fields.required("prompt", &expected)?;
    if let Some(ids) = one(prompt)? {
        return Ok(vec![ids]);
    }
    match prompt {
        Value::Array(list) if (1..=MAX_PROMPTS).contains(&list.len()) => {
            let prompts = list
                .iter()
                .map(|value| one(value)?.ok_or_else(|| fields.wrong("prompt", &expected)));
            prompts.collect()
        }
        _ => Err(fields.wrong("prompt", &expected)),
    }
}

/// The text of an update's parts.
fn text_of(parts: Vec<Part>) -> String {
    let texts = parts.into_iter().filter_map(|part| match part {
        Part::Text(text) => Some(text),
        _ => None,
    });
    texts.collect()
}

/// Logprobs as the completion API has them.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    offset: usize,
}

impl Logprobs {
    fn add(&mut self, app: &App, token: &Token) {
        let Some(logprob) = &token.logprob else {
            return;
        };
        let text = |id| {
            let bytes = app.text.tokenizer.token_bytes(id).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let best = logprob.best.iter();
        let top = best.map(|t| (text(t.id), Value::from(t.logprob.max(-9999.0))));
        let own = text(token.id);
        self.text_offset.push(self.offset);
        self.offset += own.chars().count();
        self.tokens.push(own);
        self.token_logprobs
            .push(logprob.chosen.logprob.max(-9999.0));
        self.top_logprobs.push(Value::Object(top.collect()));
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

impl Completion {
    fn envelope(&self, app: &App, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.params.model,
            "system_fingerprint": app.fingerprint(),
            "choices": choices,
        })
    }
}

#[derive(Default)]
struct Text {
    text: String,
    logprobs: Logprobs,
    token_ids: Vec<u32>,
    reason: &'static str,
}

async fn whole(app: &App, completion: Completion, runs: Vec<Run>) -> ApiResult<Response> {
    let n = completion.params.n;
    let mut choices = Vec::new();
    let mut usage = TotalUsage::default();
    let mut total = crate::engine::service::Usage::default();
    let mut timings = Timings::default();
    let mut routing = None;
    for (mut run, echo) in runs.into_iter().zip(&completion.echoes) {
        let mut texts: Vec<Text> = (0..n).map(|_| Text::default()).collect();
        texts.iter_mut().for_each(|text| text.text.clone_from(echo));
        while let Some(update) = run.next().await {
            match update {
                Update::Delta {
                    choice,
                    parts,
                    token,
                } => {
                    let text = &mut texts[choice];
                    text.text += &text_of(parts);
                    if let Some(token) = token {
                        text.token_ids.push(token.id);
                        text.logprobs.add(app, &token);
                    }
                }
                Update::Finished { choice, end } => {
                    texts[choice].reason = end.reason();
                    usage.add(&end.finished.usage);
                    timings = end.finished.timings;
                    routing = routing.or(end.finished.routing);
                }
                Update::Failed(error) => return Err(error),
            }
        }
        let of_prompt = std::mem::take(&mut usage).get();
        total.prompt_tokens += of_prompt.prompt_tokens;
        total.cached_tokens += of_prompt.cached_tokens;
        total.completion_tokens += of_prompt.completion_tokens;
        for text in texts {
            let logprobs = match completion.logprobs {
                Some(_) => text.logprobs.json(),
                None => Value::Null,
            };
            let mut choice = json!({
                "index": choices.len(),
                "text": text.text,
                "logprobs": logprobs,
                "finish_reason": text.reason,
            });
            if completion.params.return_token_ids {
                choice["token_ids"] = text.token_ids.into();
            }
            choices.push(choice);
        }
    }
    let mut body = completion.envelope(app, choices.into());
    body["usage"] = usage_json(total);
    body["timings"] = timings_json(total, &timings);
    add_routing(&mut body, routing.as_ref());
    Ok(Json(body).into_response())
}

async fn stream(
    app: &App,
    completion: Completion,
    runs: Vec<Run>,
    writer: &SseWriter,
) -> Result<(), Gone> {
    let n = completion.params.n;
    let mut total = crate::engine::service::Usage::default();
    for (at, (mut run, echo)) in runs.into_iter().zip(&completion.echoes).enumerate() {
        let mut usage = TotalUsage::default();
        let mut offsets = vec![0; n];
        if !echo.is_empty() {
            for choice in 0..n {
                let index = at * n + choice;
                let one = json!({ "index": index, "text": echo, "logprobs": null, "finish_reason": null });
                writer.data(&chunk(app, &completion, one)).await?;
            }
        }
        while let Some(update) = writer.while_waiting(run.next()).await? {
            let chunk = match update {
                Update::Delta {
                    choice,
                    parts,
                    token,
                } => {
                    let text = text_of(parts);
                    let mut logprobs = Logprobs {
                        offset: offsets[choice],
                        ..Logprobs::default()
                    };
                    if let Some(token) = &token {
                        logprobs.add(app, token);
                    }
                    offsets[choice] = logprobs.offset;
                    let has_logprobs = !logprobs.tokens.is_empty();
                    let wants_ids = completion.params.return_token_ids && token.is_some();
                    if text.is_empty() && !has_logprobs && !wants_ids {
                        continue;
                    }
                    let logprobs = match has_logprobs {
                        true => logprobs.json(),
                        false => Value::Null,
                    };
                    let index = at * n + choice;
                    let mut one = json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": null });
                    if let (true, Some(token)) = (wants_ids, &token) {
                        one["token_ids"] = json!([token.id]);
                    }
                    chunk(app, &completion, one)
                }
                Update::Finished { choice, end } => {
                    let finished = &end.finished;
                    usage.add(&finished.usage);
                    let index = at * n + choice;
                    let one = json!({ "index": index, "text": "", "logprobs": null, "finish_reason": end.reason() });
                    let mut chunk = chunk(app, &completion, one);
                    chunk["timings"] = timings_json(finished.usage, &finished.timings);
                    add_routing(&mut chunk, finished.routing.as_ref());
                    chunk
                }
                Update::Failed(error) => {
                    writer.data(&error.openai()).await?;
                    return writer.done().await;
                }
            };
            writer.data(&chunk).await?;
        }
        let of_prompt = usage.get();
        total.prompt_tokens += of_prompt.prompt_tokens;
        total.cached_tokens += of_prompt.cached_tokens;
        total.completion_tokens += of_prompt.completion_tokens;
    }
    if completion.params.include_usage {
        let mut last = completion.envelope(app, json!([]));
        last["usage"] = usage_json(total);
        writer.data(&last).await?;
    }
    writer.done().await
}

fn chunk(app: &App, completion: &Completion, choice: Value) -> Value {
    let mut chunk = completion.envelope(app, json!([choice]));
    if completion.params.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}
