//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::messages_in::{self, ToolChoice};
use super::{Call, params, prepared, text};
use crate::engine::service::{FinishReason, Usage};
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::generation::{End, Generation, Run, Update};
use crate::server::prompt::{Conversation, Tool};
use crate::server::reader::{Part, ReaderOptions};
use crate::server::sse::{self, Gone, SseWriter};
use crate::server::{App, new_id};

const PATH: &str = "/v1/messages";
const PING: &str = "event: ping\ndata: {\"type\": \"ping\"}\n\n";
/// A client's first system block may hold a value that is another one in every request, which would
/// make every prompt a new one from its first line on.
const BILLING_HEADER: &str = "x-anthropic-billing-header";

pub async fn handle(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(error) => error.respond(PATH),
    }
}

pub async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Response {
    text::handle(app, request, |app, body| {
        let asked = read(body)?;
        let prompt = app.prompts.of_chat(&app.text, &asked.conversation)?;
        Ok(json!({ "input_tokens": prompt.ids.len() }))
    })
    .await
}

async fn answer(app: &Arc<App>, request: Request) -> ApiResult<Response> {
    let ((message, generation), owner) = prepared(app, request, prepare).await?;
    let run = generation.submit(app, owner)?;
    if !message.stream {
        return whole(message, run).await;
    }
    let ping_time = app.options.limits.ping_time;
    Ok(sse::respond(PING, ping_time, |writer| async move {
        stream(message, run, &writer).await
    }))
}

/// What the answer needs of the request.
struct Message {
    id: String,
    model: String,
    stream: bool,
    prompt_tokens: usize,
}

/// The conversation of a request.
struct Asked {
    conversation: Conversation,
    choice: ToolChoice,
    one_call: bool,
}

fn read(body: &Map<String, Value>) -> ApiResult<Asked> {
    let fields = Fields::new(body);
    let mut messages = Vec::new();
    if let Some(system) = system(fields)? {
        messages.push(json!({ "role": "system", "content": system }));
    }
    let list = fields.list("messages")?;
    let list = list.ok_or_else(|| fields.wrong("messages", "a list of messages"))?;
    if list.is_empty() {
        return Err(fields.wrong("messages", "at least one message"));
    }
    for (index, message) in list.iter().enumerate() {
        let path = format!("messages[{index}]");
        let map = message.as_object();
        let map =
            map.ok_or_else(|| ApiError::invalid(&path, format!("{path}: expected an object")))?;
        add_message(&mut messages, Fields::within(map, &path))?;
    }
    let continues = messages
        .last()
        .is_some_and(|last| last["role"] == "assistant");
    let mut tools = tools(fields)?;
    let (choice, one_call) = choice(fields, &tools)?;
    if choice == ToolChoice::None {
        tools.clear();
    }
    let mut variables = Map::new();
    if let Some(thinking) = fields.object("thinking")? {
        let enabled = thinking.get("type").is_some_and(|kind| kind != "disabled");
        variables.insert("enable_thinking".into(), enabled.into());
    }
    Ok(Asked {
        conversation: Conversation {
            messages,
            tools,
            variables,
            continues,
            closed: false,
        },
        choice,
        one_call,
    })
}

/// A string or text blocks, without what only counts requests.
fn system(fields: Fields<'_>) -> ApiResult<Option<String>> {
    let Some(Value::Array(blocks)) = fields.get("system") else {
        return Ok(fields.text("system")?.map(str::to_owned));
    };
    let mut texts = Vec::new();
    for block in blocks {
        let text = block["text"].as_str();
        let text = text.ok_or_else(|| fields.wrong("system", "a string or text blocks"))?;
        if !text.trim_start().starts_with(BILLING_HEADER) {
            texts.push(text);
        }
    }
    Ok((!texts.is_empty()).then(|| texts.join("\n")))
}

/// Adds a message; results of tools become messages of their own.
fn add_message(messages: &mut Vec<Value>, fields: Fields<'_>) -> ApiResult<()> {
    let role = match fields.text("role")? {
        Some(role @ ("user" | "assistant" | "system")) => role,
        _ => return Err(fields.wrong("role", "user or assistant")),
    };
    let blocks = match fields.get("content") {
        Some(Value::String(text)) => {
            messages_in::push(messages, json!({ "role": role, "content": text }));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        _ => return Err(fields.wrong("content", "a string or a list of blocks")),
    };
    let (mut texts, mut calls, mut reasoning) = (Vec::new(), Vec::new(), String::new());
    for block in blocks {
        let text = |field: &str| block[field].as_str().unwrap_or("");
        match block["type"].as_str() {
            Some("text") => texts.push(text("text")),
            Some("thinking") => reasoning.push_str(text("thinking")),
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let input = messages_in::arguments(block.get("input"));
                calls.push(messages_in::tool_call(text("id"), text("name"), input));
            }
            Some("tool_result") => {
                let map = block.as_object().expect("it has a type");
                let result = messages_in::content(Fields::within(map, "tool_result"), "content")?;
                messages.push(json!({
                    "role": "tool",
                    "tool_call_id": text("tool_use_id"),
                    "content": result.unwrap_or_default(),
                }));
            }
            other => {
                let name = fields.name("content");
                let kind = other.unwrap_or("none");
                let message = format!("{name}: blocks of type {kind:?} are not supported");
                return Err(ApiError::invalid(&name, message));
            }
        }
    }
    if texts.is_empty() && calls.is_empty() && reasoning.is_empty() {
        return Ok(());
    }
    let mut message = json!({ "role": role, "content": texts.join("\n") });
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    messages_in::push(messages, message);
    Ok(())
}

fn tools(fields: Fields<'_>) -> ApiResult<Vec<Tool>> {
    let mut tools = Vec::new();
    for (index, tool) in fields.list("tools")?.into_iter().flatten().enumerate() {
        let path = format!("tools[{index}]");
        let map = tool.as_object();
        let map =
            map.ok_or_else(|| ApiError::invalid(&path, format!("{path}: expected an object")))?;
        let tool = Fields::within(map, &path);
        // Tools that Anthropic's servers run have a type and no schema: there are none here.
        let own = !matches!(tool.text("type")?, None | Some("custom"));
        if !own {
            tools.push(messages_in::tool_of(tool, "input_schema")?);
        }
    }
    Ok(tools)
}

fn choice(fields: Fields<'_>, tools: &[Tool]) -> ApiResult<(ToolChoice, bool)> {
    let Some(choice) = fields.object("tool_choice")? else {
        return Ok((ToolChoice::Auto, false));
    };
    let choice = Fields::within(choice, "tool_choice");
    let one_call = choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match choice.text("type")? {
        Some("auto") => ToolChoice::Auto,
        Some("none") => ToolChoice::None,
        Some("any") => ToolChoice::Required,
        Some("tool") => match choice.text("name")? {
            Some(name) => ToolChoice::Named(name.to_owned()),
            None => return Err(choice.wrong("name", "the name of a tool")),
        },
        _ => return Err(choice.wrong("type", "auto, any, tool or none")),
    };
    messages_in::check_choice(&choice, tools)?;
    Ok((choice, one_call))
}

fn prepare(app: &App, call: &Call) -> ApiResult<(Message, Generation)> {
    let fields = Fields::new(&call.body);
    app.facts()?;
    let asked = read(&call.body)?;
    let max_tokens = fields.integer("max_tokens", 1..=i64::MAX)?;
    let max_tokens =
        max_tokens.ok_or_else(|| fields.wrong("max_tokens", "a whole number from 1"))?;
    let grammar = messages_in::call_grammar(app, &asked.choice, &asked.conversation.tools)?;
    let prompt = app.prompts.of_chat(&app.text, &asked.conversation)?;
    let message = Message {
        id: new_id("msg_"),
        model: params::model(app, fields)?,
        stream: fields.bool("stream")?.unwrap_or(false),
        prompt_tokens: prompt.ids.len(),
    };
    let generation = Generation {
        prompt: prompt.ids,
        max_tokens: Some(max_tokens as usize),
        sampling: params::sampling(fields, params::defaults(app)?)?,
        stop: params::stop(fields, "stop_sequences")?,
        ignore_eos: false,
        logprobs: None,
        logit_bias: Vec::new(),
        grammar,
        reader: Some(ReaderOptions {
            in_reasoning: prompt.text.trim_end().ends_with("<think>"),
            tools: messages_in::schemas(&asked.conversation.tools),
            one_call: asked.one_call,
        }),
        n: 1,
        routing: false,
    };
    Ok((message, generation))
}

/// What is cached does not count as input here.
fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

/// `stop_reason` and `stop_sequence`.
fn reason(end: &End) -> (&'static str, Option<&str>) {
    match &end.finished.reason {
        FinishReason::Length => ("max_tokens", None),
        _ if end.calls > 0 => ("tool_use", None),
        FinishReason::EndOfText => ("end_turn", None),
        FinishReason::StopString(stop) => ("stop_sequence", Some(stop)),
    }
}

impl Message {
    fn json(&self, content: Value, end: Option<&End>) -> Value {
        let (stop_reason, stop_sequence) = end.map(reason).unzip();
        let used = end.map(|end| end.finished.usage).unwrap_or(Usage {
            prompt_tokens: self.prompt_tokens,
            ..Usage::default()
        });
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence.flatten(),
            "usage": usage(used),
        })
    }
}

/// A content block as it grows.
enum Block {
    Thinking(String),
    Text(String),
    ToolUse {
        id: String,
        name: String,
        json: String,
    },
}

impl Block {
    /// The block that a part begins.
    fn new(part: &Part) -> Self {
        match part {
            Part::Reasoning(_) => Block::Thinking(String::new()),
            Part::Text(_) => Block::Text(String::new()),
            Part::Call { name, .. } => Block::ToolUse {
                id: new_id("toolu_"),
                name: name.clone(),
                json: String::new(),
            },
            Part::Arguments { .. } => unreachable!("arguments follow the beginning of a call"),
        }
    }

    /// Whether `part` continues this block.
    fn takes(&self, part: &Part) -> bool {
        matches!(
            (self, part),
            (Block::Thinking(_), Part::Reasoning(_))
                | (Block::Text(_), Part::Text(_))
                | (Block::ToolUse { .. }, Part::Arguments { .. })
        )
    }

    /// Adds a part; what a stream says of it.
    fn add(&mut self, part: Part) -> Option<Value> {
        match (self, part) {
            (Block::Thinking(all), Part::Reasoning(text)) => {
                all.push_str(&text);
                Some(json!({ "type": "thinking_delta", "thinking": text }))
            }
            (Block::Text(all), Part::Text(text)) => {
                all.push_str(&text);
                Some(json!({ "type": "text_delta", "text": text }))
            }
            (Block::ToolUse { json: all, .. }, Part::Arguments { json, .. }) => {
                all.push_str(&json);
                Some(json!({ "type": "input_json_delta", "partial_json": json }))
            }
            _ => None,
        }
    }

    fn json(&self) -> Value {
        match self {
            Block::Thinking(text) => {
                json!({ "type": "thinking", "thinking": text, "signature": "" })
            }
            Block::Text(text) => json!({ "type": "text", "text": text }),
            Block::ToolUse { id, name, json } => {
                // A call that was cut off has no valid input.
                let input: Value = serde_json::from_str(json).unwrap_or_else(|_| json!({}));
                json!({ "type": "tool_use", "id": id, "name": name, "input": input })
            }
        }
    }
}

async fn whole(message: Message, mut run: Run) -> ApiResult<Response> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut ended = None;
    while let Some(update) = run.next().await {
        match update {
            Update::Delta { parts, .. } => {
                for part in parts {
                    match blocks.last_mut().filter(|block| block.takes(&part)) {
                        Some(block) => {
                            block.add(part);
                        }
                        None => {
                            let mut block = Block::new(&part);
                            block.add(part);
                            blocks.push(block);
                        }
                    }
                }
            }
            Update::Finished { end, .. } => ended = Some(end),
            Update::Failed(error) => return Err(error),
        }
    }
    let content = blocks.iter().map(Block::json).collect();
    Ok(Json(message.json(content, ended.as_deref())).into_response())
}

async fn stream(message: Message, mut run: Run, writer: &SseWriter) -> Result<(), Gone> {
    let start = json!({ "type": "message_start", "message": message.json(json!([]), None) });
    writer.event("message_start", &start).await?;
    let mut open: Option<Block> = None;
    let mut index = 0;
    while let Some(update) = writer.while_waiting(run.next()).await? {
        match update {
            Update::Delta { parts, .. } => {
                for part in parts {
                    if !open.as_ref().is_some_and(|block| block.takes(&part)) {
                        if open.take().is_some() {
                            stop_block(writer, index).await?;
                            index += 1;
                        }
                        let block = Block::new(&part);
                        let begun = json!({
                            "type": "content_block_start", "index": index, "content_block": block.json(),
                        });
                        writer.event("content_block_start", &begun).await?;
                        open = Some(block);
                    }
                    if let Some(delta) = open.as_mut().and_then(|block| block.add(part)) {
                        let delta = json!({
                            "type": "content_block_delta", "index": index, "delta": delta,
                        });
                        writer.event("content_block_delta", &delta).await?;
                    }
                }
            }
            Update::Finished { end, .. } => {
                if open.take().is_some() {
                    stop_block(writer, index).await?;
                }
                let (stop_reason, stop_sequence) = reason(&end);
                let delta = json!({
                    "type": "message_delta",
                    "delta": { "stop_reason": stop_reason, "stop_sequence": stop_sequence },
                    "usage": usage(end.finished.usage),
                });
                writer.event("message_delta", &delta).await?;
                writer
                    .event("message_stop", &json!({ "type": "message_stop" }))
                    .await?;
            }
            Update::Failed(error) => return writer.event("error", &error.anthropic()).await,
        }
    }
    Ok(())
}

async fn stop_block(writer: &SseWriter, index: usize) -> Result<(), Gone> {
    let stop = json!({ "type": "content_block_stop", "index": index });
    writer.event("content_block_stop", &stop).await
}
