//! `/v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::messages_in::{self, ToolChoice};
use super::params::{self, MAX_LOGPROBS, Params};
use super::{Call, prepared, timings_json, usage_json};
use crate::engine::service::{Logprob, RoutingSummary, Timings, Token};
use crate::model::Tokenizer;
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::generation::{End, Generation, Run, TotalUsage, Update};
use crate::server::prompt::Conversation;
use crate::server::reader::{Part, ReaderOptions};
use crate::server::sse::{self, COMMENT_PING, Gone, SseWriter};
use crate::server::{App, new_id, unix_time};

pub async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(error) => error.respond("/v1/chat/completions"),
    }
}

async fn answer(app: &Arc<App>, request: Request) -> ApiResult<Response> {
    let ((chat, generation), owner) = prepared(app, request, prepare).await?;
    let run = generation.submit(app, owner)?;
    if !chat.params.stream {
        return whole(app, chat, run).await;
    }
    let ping_time = app.options.limits.ping_time;
    let app = app.clone();
    Ok(sse::respond(COMMENT_PING, ping_time, |writer| async move {
        stream(&app, chat, run, &writer).await
    }))
}

/// What the answer needs of the request.
struct Chat {
    id: String,
    created: u64,
    params: Params,
    logprobs: bool,
    /// The older API: one call, without a list
    functions: bool,
}

/// A chat request as its conversation and what enforces its form.
pub fn conversation(body: &Map<String, Value>) -> ApiResult<Conversation> {
    let fields = Fields::new(body);
    let list = fields.list("messages")?;
    let list = list.ok_or_else(|| fields.wrong("messages", "a list of messages"))?;
    let messages = messages_in::messages(list)?;
    let last_is_answer = messages
        .last()
        .is_some_and(|last| last["role"] == "assistant");
    let opens = fields.bool("add_generation_prompt")?;
    let continues = fields.bool("continue_final_message")?.unwrap_or(false);
    if continues && opens == Some(true) {
        return Err(fields.wrong(
            "add_generation_prompt",
            "false beside continue_final_message",
        ));
    }
    Ok(Conversation {
        messages,
        tools: messages_in::tools(fields)?,
        variables: params::template_variables(fields)?,
        continues: continues && last_is_answer,
        closed: opens == Some(false),
    })
}

fn prepare(app: &App, call: &Call) -> ApiResult<(Chat, Generation)> {
    let fields = Fields::new(&call.body);
    app.facts()?;
    let params = Params::read(app, fields)?;
    let mut conversation = conversation(&call.body)?;
    let choice = messages_in::tool_choice(fields, &conversation.tools)?;
    if choice == ToolChoice::None {
        conversation.tools.clear();
    }
    let logprobs = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields
        .integer("top_logprobs", 0..=MAX_LOGPROBS)?
        .unwrap_or(0);
    if top > 0 && !logprobs {
        return Err(fields.wrong("top_logprobs", "logprobs: true beside it"));
    }
    for modality in fields.list("modalities")?.into_iter().flatten() {
        if modality != "text" {
            return Err(fields.wrong("modalities", "text only"));
        }
    }
    let form = params::form(fields)?;
    let calls = messages_in::call_grammar(app, &choice, &conversation.tools)?;
    let grammar = match (form, calls) {
        (Some(_), Some(_)) => {
            let message = "response_format: does not go with required or strict tools";
            return Err(ApiError::invalid("response_format", message));
        }
        (Some((form, param)), None) => Some(app.grammars()?.compile(&form, param)?),
        (None, calls) => calls,
    };
    let prompt = app.prompts.of_chat(&app.text, &conversation)?;
    let one_call = fields.bool("parallel_tool_calls")? == Some(false);
    let generation = Generation {
        prompt: prompt.ids,
        max_tokens: params.max_tokens,
        sampling: params.sampling.clone(),
        stop: params.stop.clone(),
        ignore_eos: params.ignore_eos,
        logprobs: logprobs.then_some(top as usize),
        logit_bias: params.logit_bias.clone(),
        grammar,
        reader: Some(ReaderOptions {
            in_reasoning: prompt.text.trim_end().ends_with("<think>"),
            tools: messages_in::schemas(&conversation.tools),
            one_call,
        }),
        n: params.n,
        routing: params.routing,
    };
    let chat = Chat {
        id: new_id("chatcmpl-"),
        created: unix_time(),
        functions: call.body.contains_key("functions"),
        params,
        logprobs,
    };
    Ok((chat, generation))
}

impl Chat {
    fn envelope(&self, app: &App, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.params.model,
            "system_fingerprint": app.fingerprint(),
            "choices": choices,
        })
    }

    fn reason(&self, end: &End) -> &'static str {
        match end.reason() {
            "tool_calls" if self.functions => "function_call",
            reason => reason,
        }
    }
}

/// One choice, as it grows.
#[derive(Default)]
struct Message {
    content: String,
    reasoning: String,
    calls: Vec<(String, String, String)>,
    logprobs: Vec<Value>,
    token_ids: Vec<u32>,
    reason: &'static str,
}

impl Message {
    fn add(&mut self, part: Part) {
        match part {
            Part::Reasoning(text) => self.reasoning += &text,
            Part::Text(text) => self.content += &text,
            Part::Call { name, .. } => self.calls.push((new_id("call_"), name, String::new())),
            Part::Arguments { index, json } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.2 += &json;
                }
            }
        }
    }

    fn json(&self, index: usize, chat: &Chat) -> Value {
        let content: Value = match self.content.is_empty() && !self.calls.is_empty() {
            true => Value::Null,
            false => self.content.as_str().into(),
        };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.as_str().into();
        }
        let function =
            |(_, name, json): &(String, String, String)| json!({ "name": name, "arguments": json });
        if let (true, Some(call)) = (chat.functions, self.calls.first()) {
            message["function_call"] = function(call);
        } else if !self.calls.is_empty() {
            let call = |call| {
                let function = function(call);
                json!({ "id": call.0, "type": "function", "function": function })
            };
            message["tool_calls"] = self.calls.iter().map(call).collect();
        }
        let mut choice = json!({
            "index": index,
            "message": message,
            "logprobs": null,
            "finish_reason": self.reason,
        });
        if chat.logprobs {
            choice["logprobs"] = json!({ "content": self.logprobs, "refusal": null });
        }
        if chat.params.return_token_ids {
            choice["token_ids"] = self.token_ids.clone().into();
        }
        choice
    }
}

async fn whole(app: &App, chat: Chat, mut run: Run) -> ApiResult<Response> {
    let mut messages: BTreeMap<usize, Message> = BTreeMap::new();
    let mut usage = TotalUsage::default();
    let mut timings = Timings::default();
    let mut routing = None;
    while let Some(update) = run.next().await {
        match update {
            Update::Delta {
                choice,
                parts,
                token,
            } => {
                let message = messages.entry(choice).or_default();
                parts.into_iter().for_each(|part| message.add(part));
                if let Some(token) = token {
                    message.token_ids.push(token.id);
                    let logprob = token.logprob.as_ref();
                    (message.logprobs).extend(logprob.map(|l| token_logprob(app, &token, l)));
                }
            }
            Update::Finished { choice, end } => {
                let message = messages.entry(choice).or_default();
                message.reason = chat.reason(&end);
                usage.add(&end.finished.usage);
                timings = end.finished.timings;
                routing = routing.or(end.finished.routing);
            }
            Update::Failed(error) => return Err(error),
        }
    }
    let choices = messages
        .iter()
        .map(|(&index, message)| message.json(index, &chat));
    let mut body = chat.envelope(app, "chat.completion", choices.collect());
    body["usage"] = usage_json(usage.get());
    body["timings"] = timings_json(usage.get(), &timings);
    add_routing(&mut body, routing.as_ref());
    Ok(Json(body).into_response())
}

/// A request's own routing summary, where it asked for it.
pub fn add_routing(body: &mut Value, routing: Option<&RoutingSummary>) {
    if let Some(routing) = routing {
        body["moectl"] = json!({ "routing": routing });
    }
}

/// A token's logprobs as the chat API has them.
fn token_logprob(app: &App, token: &Token, logprob: &Logprob) -> Value {
    let tokenizer = &app.text.tokenizer;
    let mut value = rated(tokenizer, token.id, logprob.chosen.logprob);
    let best = logprob.best.iter();
    value["top_logprobs"] = best.map(|t| rated(tokenizer, t.id, t.logprob)).collect();
    value
}

fn rated(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Value {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    json!({
        "token": String::from_utf8_lossy(&bytes),
        "bytes": bytes,
        // JSON has no infinity.
        "logprob": logprob.max(-9999.0),
    })
}

/// The state of one streamed choice.
#[derive(Clone, Default)]
struct Streamed {
    begun: bool,
    calls: Vec<String>,
}

async fn stream(app: &App, chat: Chat, mut run: Run, writer: &SseWriter) -> Result<(), Gone> {
    let mut streamed = vec![Streamed::default(); chat.params.n];
    let mut usage = TotalUsage::default();
    while let Some(update) = writer.while_waiting(run.next()).await? {
        let chunk = match update {
            Update::Delta {
                choice,
                parts,
                token,
            } => {
                let logprob = token.as_ref().and_then(|token| {
                    let logprob = token.logprob.as_ref()?;
                    Some(token_logprob(app, token, logprob))
                });
                let wants_ids = chat.params.return_token_ids && token.is_some();
                if parts.is_empty() && logprob.is_none() && !wants_ids {
                    continue;
                }
                let mut deltas: Vec<Value> = Vec::new();
                for part in parts {
                    deltas.push(delta(&mut streamed[choice], part, chat.functions));
                }
                if deltas.is_empty() {
                    deltas.push(json!({ "content": "" }));
                }
                for (i, mut delta) in deltas.into_iter().enumerate() {
                    begin(&mut streamed[choice], &mut delta);
                    let logprobs = match (&logprob, i) {
                        (Some(logprob), 0) => json!({ "content": [logprob], "refusal": null }),
                        _ => Value::Null,
                    };
                    let mut one = choice_chunk(choice, delta, Value::Null);
                    one["logprobs"] = logprobs;
                    if let (true, 0, Some(token)) = (wants_ids, i, &token) {
                        one["token_ids"] = json!([token.id]);
                    }
                    send_chunk(app, &chat, one, writer).await?;
                }
                continue;
            }
            Update::Finished { choice, end } => {
                if !streamed[choice].begun {
                    let mut delta = json!({ "content": "" });
                    begin(&mut streamed[choice], &mut delta);
                    let one = choice_chunk(choice, delta, Value::Null);
                    send_chunk(app, &chat, one, writer).await?;
                }
                usage.add(&end.finished.usage);
                let reason = chat.reason(&end).into();
                let one = choice_chunk(choice, json!({}), reason);
                let mut chunk = chunk(app, &chat, one);
                let finished = &end.finished;
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
    if chat.params.include_usage {
        let mut last = chat.envelope(app, "chat.completion.chunk", json!([]));
        last["usage"] = usage_json(usage.get());
        writer.data(&last).await?;
    }
    writer.done().await
}

/// The first delta of a choice carries the role.
fn begin(streamed: &mut Streamed, delta: &mut Value) {
    if !streamed.begun {
        streamed.begun = true;
        delta["role"] = "assistant".into();
        if delta.get("content").is_none() {
            delta["content"] = Value::Null;
        }
    }
}

fn delta(streamed: &mut Streamed, part: Part, functions: bool) -> Value {
    match part {
        Part::Reasoning(text) => json!({ "reasoning_content": text }),
        Part::Text(text) => json!({ "content": text }),
        Part::Call { name, .. } if functions => {
            json!({ "function_call": { "name": name, "arguments": "" } })
        }
        Part::Arguments { json, .. } if functions => {
            json!({ "function_call": { "arguments": json } })
        }
        Part::Call { index, name } => {
            let id = new_id("call_");
            streamed.calls.push(id.clone());
            let function = json!({ "name": name, "arguments": "" });
            json!({ "tool_calls": [
                { "index": index, "id": id, "type": "function", "function": function }
            ] })
        }
        Part::Arguments { index, json } => {
            json!({ "tool_calls": [{ "index": index, "function": { "arguments": json } }] })
        }
    }
}

fn choice_chunk(index: usize, delta: Value, reason: Value) -> Value {
    json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": reason })
}

fn chunk(app: &App, chat: &Chat, choice: Value) -> Value {
    let mut chunk = chat.envelope(app, "chat.completion.chunk", json!([choice]));
    if chat.params.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}

async fn send_chunk(app: &App, chat: &Chat, choice: Value, writer: &SseWriter) -> Result<(), Gone> {
    writer.data(&chunk(app, chat, choice)).await
}
