//! `/v1/responses`: OpenAI's newer API, without a store: each request brings all of its input.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::messages_in::{self, ToolChoice};
use super::response_items::{Event, Items, ToolKind};
use super::{Call, params, prepared};
use crate::engine::sampler::SamplingParams;
use crate::engine::service::{FinishReason, Usage};
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::generation::{End, Generation, Run, Update};
use crate::server::prompt::{Conversation, Tool};
use crate::server::reader::ReaderOptions;
use crate::server::sse::{self, COMMENT_PING, Gone, SseWriter};
use crate::server::{App, new_id, unix_time};

pub async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(error) => error.respond("/v1/responses"),
    }
}

async fn answer(app: &Arc<App>, request: Request) -> ApiResult<Response> {
    let ((response, kinds, generation), owner) = prepared(app, request, prepare).await?;
    let run = generation.submit(app, owner)?;
    let items = Items::new(kinds);
    if !response.stream {
        return whole(response, items, run).await;
    }
    let ping_time = app.options.limits.ping_time;
    Ok(sse::respond(COMMENT_PING, ping_time, |writer| async move {
        stream(response, items, run, &writer).await
    }))
}

/// What the answer needs of the request.
struct Answer {
    stream: bool,
    /// The response object but for its status, output and usage
    object: Value,
}

/// Tools of a request; `kinds`: how calls of each are given back.
struct Tools {
    tools: Vec<Tool>,
    kinds: HashMap<String, ToolKind>,
}

fn prepare(app: &App, call: &Call) -> ApiResult<(Answer, HashMap<String, ToolKind>, Generation)> {
    let fields = Fields::new(&call.body);
    app.facts()?;
    for field in ["previous_response_id", "conversation", "prompt"] {
        if fields.get(field).is_some() {
            let expected = "nothing: responses are not stored here; send the whole input";
            return Err(fields.wrong(field, expected));
        }
    }
    if fields.bool("background")? == Some(true) {
        return Err(fields.wrong("background", "false: responses are not stored here"));
    }
    let Tools { mut tools, kinds } = tools(fields)?;
    let choice = messages_in::tool_choice(fields, &tools)?;
    if choice == ToolChoice::None {
        tools.clear();
    }
    let format = match fields.object("text")? {
        Some(text) => Fields::within(text, "text").object("format")?,
        None => None,
    };
    let form = format
        .map(|format| params::response_format(Fields::within(format, "text.format")))
        .transpose()?
        .flatten();
    let calls = messages_in::call_grammar(app, &choice, &tools)?;
    let grammar = match (form, calls) {
        (Some(form), None) => Some(app.grammars()?.compile(&form, "text.format")?),
        (Some(_), Some(_)) => {
            let message = "text.format: does not go with required or strict tools";
            return Err(ApiError::invalid("text.format", message));
        }
        (None, calls) => calls,
    };
    let mut variables = params::template_variables(fields)?;
    if let Some(reasoning) = fields.object("reasoning")?
        && let Some(effort) = Fields::within(reasoning, "reasoning").text("effort")?
    {
        params::set_effort(&mut variables, effort);
    }
    let conversation = Conversation {
        messages: input(fields)?,
        tools,
        variables,
        continues: false,
        closed: false,
    };
    let prompt = app.prompts.of_chat(&app.text, &conversation)?;
    let max_tokens = fields.integer("max_output_tokens", 1..=i64::MAX)?;
    let sampling = params::sampling(fields, params::defaults(app)?)?;
    let answer = Answer {
        stream: fields.bool("stream")?.unwrap_or(false),
        object: object(app, fields, &sampling)?,
    };
    let generation = Generation {
        prompt: prompt.ids,
        max_tokens: max_tokens.map(|n| n as usize),
        sampling,
        stop: Vec::new(),
        ignore_eos: false,
        logprobs: None,
        logit_bias: Vec::new(),
        grammar,
        reader: Some(ReaderOptions {
            in_reasoning: prompt.text.trim_end().ends_with("<think>"),
            tools: messages_in::schemas(&conversation.tools),
            one_call: fields.bool("parallel_tool_calls")? == Some(false),
        }),
        n: 1,
        routing: false,
    };
    Ok((answer, kinds, generation))
}

/// The response object as the request fixes it.
fn object(app: &App, fields: Fields<'_>, sampling: &SamplingParams) -> ApiResult<Value> {
    let or = |field: &str, other: Value| fields.get(field).cloned().unwrap_or(other);
    let mut object = json!({
        "id": new_id("resp_"),
        "object": "response",
        "created_at": unix_time(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": or("instructions", Value::Null),
        "max_output_tokens": or("max_output_tokens", Value::Null),
        "model": params::model(app, fields)?,
        "output": [],
        "parallel_tool_calls": or("parallel_tool_calls", true.into()),
        "previous_response_id": null,
        "reasoning": or("reasoning", json!({ "effort": null, "summary": null })),
        "store": false,
        "temperature": sampling.temperature,
        "text": or("text", json!({ "format": { "type": "text" } })),
        "tool_choice": or("tool_choice", "auto".into()),
        "tools": or("tools", json!([])),
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "metadata": or("metadata", json!({})),
    });
    // A string or nothing, as usage before the end: null is not in OpenAI's schema.
    if let Some(user) = fields.text("user")? {
        object["user"] = user.into();
    }
    Ok(object)
}

fn tools(fields: Fields<'_>) -> ApiResult<Tools> {
    let mut found = Tools {
        tools: Vec::new(),
        kinds: HashMap::new(),
    };
    for (index, tool) in fields.list("tools")?.into_iter().flatten().enumerate() {
        let path = format!("tools[{index}]");
        let map = tool.as_object();
        let map =
            map.ok_or_else(|| ApiError::invalid(&path, format!("{path}: expected an object")))?;
        let tool = Fields::within(map, &path);
        match tool.text("type")? {
            Some("function") => found.add(
                messages_in::tool_of(tool, "parameters")?,
                ToolKind::Function(None),
            ),
            Some("custom") => {
                let format = tool.object("format")?.and_then(|format| format.get("type"));
                if format.is_some_and(|kind| kind == "grammar") {
                    let message =
                        format!("{path}.format: grammars of custom tools are not supported");
                    return Err(ApiError::invalid(&path, message));
                }
                let mut custom = messages_in::tool_of(tool, "parameters")?;
                custom.parameters = json!({
                    "type": "object",
                    "properties": { "input": { "type": "string" } },
                    "required": ["input"],
                });
                found.add(custom, ToolKind::Custom);
            }
            // Functions under a common name, as codex groups those of one server.
            Some("namespace") => {
                let name = tool.text("name")?;
                let name = name
                    .ok_or_else(|| tool.wrong("name", "a string"))?
                    .to_owned();
                for inner in tool.list("tools")?.into_iter().flatten() {
                    let map = inner.as_object();
                    let map = map.ok_or_else(|| tool.wrong("tools", "a list of functions"))?;
                    let inner = messages_in::tool_of(Fields::within(map, &path), "parameters")?;
                    found.add(inner, ToolKind::Function(Some(name.clone())));
                }
            }
            // Tools that OpenAI's servers run, such as web_search: there are none here.
            Some(_) => {}
            None => return Err(tool.wrong("type", "function or custom")),
        }
    }
    Ok(found)
}

impl Tools {
    /// A second tool of one name is left out: calls could not tell them apart.
    fn add(&mut self, tool: Tool, kind: ToolKind) {
        if !self.kinds.contains_key(&tool.name) {
            self.kinds.insert(tool.name.clone(), kind);
            self.tools.push(tool);
        }
    }
}

/// `instructions` and `input` as messages.
fn input(fields: Fields<'_>) -> ApiResult<Vec<Value>> {
    let mut messages = Vec::new();
    if let Some(instructions) = fields.text("instructions")? {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    match fields.required("input", "a string or a list of items")? {
        Value::String(text) => messages.push(json!({ "role": "user", "content": text })),
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("input[{index}]");
                let map = item.as_object();
                let map = map.ok_or_else(|| {
                    ApiError::invalid(&path, format!("{path}: expected an object"))
                })?;
                add_item(&mut messages, Fields::within(map, &path))?;
            }
        }
        _ => return Err(fields.wrong("input", "a string or a list of items")),
    }
    if messages.iter().all(|message| message["role"] == "system") {
        return Err(fields.wrong("input", "at least one message"));
    }
    Ok(messages)
}

fn add_item(messages: &mut Vec<Value>, fields: Fields<'_>) -> ApiResult<()> {
    let text = |field: &str| fields.get(field).and_then(Value::as_str).unwrap_or("");
    match fields.text("type")?.unwrap_or("message") {
        "message" => {
            let role = match fields.text("role")? {
                Some("developer" | "system") => "system",
                Some("user") => "user",
                Some("assistant") => "assistant",
                _ => return Err(fields.wrong("role", "user, assistant, system or developer")),
            };
            let content = messages_in::content(fields, "content")?;
            let content = content
                .ok_or_else(|| fields.wrong("content", "a string or a list of text parts"))?;
            messages_in::push(messages, json!({ "role": role, "content": content }));
        }
        "function_call" => {
            let arguments = messages_in::arguments(fields.get("arguments"));
            add_call(
                messages,
                messages_in::tool_call(text("call_id"), text("name"), arguments),
            );
        }
        "custom_tool_call" => {
            let arguments = json!({ "input": text("input") });
            add_call(
                messages,
                messages_in::tool_call(text("call_id"), text("name"), arguments),
            );
        }
        "function_call_output" | "custom_tool_call_output" => {
            let output = match fields.get("output") {
                Some(Value::Object(map)) => {
                    let map = Fields::within(map, "output");
                    messages_in::content(map, "content")?
                }
                _ => messages_in::content(fields, "output")?,
            };
            messages.push(json!({
                "role": "tool",
                "tool_call_id": text("call_id"),
                "content": output.unwrap_or_default(),
            }));
        }
        // Thoughts of earlier turns; what OpenAI's servers did.
        "reasoning" | "web_search_call" => {}
        other => {
            let name = fields.name("type");
            let message = format!("{name}: items of type {other:?} are not supported");
            return Err(ApiError::invalid(&name, message));
        }
    }
    Ok(())
}

/// Calls belong to the assistant's turn before them.
fn add_call(messages: &mut Vec<Value>, call: Value) {
    match messages.last_mut() {
        Some(last) if last["role"] == "assistant" => match last["tool_calls"].as_array_mut() {
            Some(calls) => calls.push(call),
            None => last["tool_calls"] = json!([call]),
        },
        _ => messages.push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
    }
}

fn usage(usage: Usage, reasoning_tokens: usize) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": { "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0 },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": { "reasoning_tokens": reasoning_tokens },
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

impl Answer {
    /// The finished response.
    fn finished(&self, items: &Items, end: &End) -> Value {
        let mut object = self.object.clone();
        object["status"] = "completed".into();
        if end.finished.reason == FinishReason::Length {
            object["status"] = "incomplete".into();
            object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        object["output"] = items.json();
        object["usage"] = usage(end.finished.usage, items.reasoning_tokens());
        object
    }
}

async fn whole(answer: Answer, mut items: Items, mut run: Run) -> ApiResult<Response> {
    let mut object = answer.object.clone();
    while let Some(update) = run.next().await {
        match update {
            Update::Delta { parts, .. } => {
                items.count_token(&parts);
                for part in parts {
                    items.add(part);
                }
            }
            Update::Finished { end, .. } => {
                items.close();
                object = answer.finished(&items, &end);
            }
            Update::Failed(error) => return Err(error),
        }
    }
    Ok(Json(object).into_response())
}

/// Numbers events as they go out.
struct Numbered<'a> {
    writer: &'a SseWriter,
    number: u64,
}

impl Numbered<'_> {
    async fn send(&mut self, event: Event) -> Result<(), Gone> {
        let mut fields = Map::new();
        fields.insert("type".into(), event.name.into());
        fields.insert("sequence_number".into(), self.number.into());
        if let Value::Object(more) = event.fields {
            fields.extend(more);
        }
        self.number += 1;
        self.writer.event(event.name, &fields.into()).await
    }

    async fn send_all(&mut self, events: Vec<Event>) -> Result<(), Gone> {
        for event in events {
            self.send(event).await?;
        }
        Ok(())
    }
}

async fn stream(
    answer: Answer,
    mut items: Items,
    mut run: Run,
    writer: &SseWriter,
) -> Result<(), Gone> {
    let mut out = Numbered { writer, number: 0 };
    for name in ["response.created", "response.in_progress"] {
        let fields = json!({ "response": answer.object });
        out.send(Event { name, fields }).await?;
    }
    while let Some(update) = writer.while_waiting(run.next()).await? {
        match update {
            Update::Delta { parts, .. } => {
                items.count_token(&parts);
                for part in parts {
                    out.send_all(items.add(part)).await?;
                }
            }
            Update::Finished { end, .. } => {
                out.send_all(items.close()).await?;
                let object = answer.finished(&items, &end);
                let name = match object["status"] == "completed" {
                    true => "response.completed",
                    false => "response.incomplete",
                };
                let fields = json!({ "response": object });
                out.send(Event { name, fields }).await?;
            }
            Update::Failed(error) => {
                let mut object = answer.object.clone();
                object["status"] = "failed".into();
                object["error"] = json!({ "code": "server_error", "message": error.message });
                object["output"] = items.json();
                let fields = json!({ "response": object });
                let name = "response.failed";
                out.send(Event { name, fields }).await?;
            }
        }
    }
    Ok(())
}
