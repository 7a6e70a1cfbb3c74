//! `/tokenize`, `/detokenize`, `/apply-template`: what a prompt becomes, for llama-server's clients
//! and vLLM's.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::{chat, prepared};
use crate::server::App;
use crate::server::error::ApiResult;
use crate::server::fields::Fields;
use crate::server::prompt::encode;

/// Has `answer` made of a request's body, on a thread that may take its time.
pub async fn handle(
    app: Arc<App>,
    request: Request,
    answer: fn(&App, &Map<String, Value>) -> ApiResult<Value>,
) -> Response {
    let path = request.uri().path().to_owned();
    let answered = prepared(&app, request, move |app, call| answer(app, &call.body));
    match answered.await {
        Ok((value, _)) => Json(value).into_response(),
        Err(error) => error.respond(&path),
    }
}

pub async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    handle(app, request, tokens_of).await
}

pub async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Response {
    handle(app, request, text_of).await
}

pub async fn apply_template(State(app): State<Arc<App>>, request: Request) -> Response {
    handle(app, request, prompt_of).await
}

/// Of `content` (llama-server), `prompt` or `messages` (vLLM).
fn tokens_of(app: &App, body: &Map<String, Value>) -> ApiResult<Value> {
    let fields = Fields::new(body);
    let content = match fields.text("content")? {
        None => fields.text("prompt")?,
        some => some,
    };
    let ids = match content {
        Some(text) => encode(&app.text.tokenizer, text)?,
        None if body.contains_key("messages") => {
            app.prompts
                .of_chat(&app.text, &chat::conversation(body)?)?
                .ids
        }
        None => return Err(fields.wrong("content", "a string")),
    };
    let tokens: Value = match fields.bool("with_pieces")?.unwrap_or(false) {
        false => ids.clone().into(),
        true => ids
            .iter()
            .map(|&id| json!({ "id": id, "piece": piece(app, id) }))
            .collect(),
    };
    let mut answer = json!({ "tokens": tokens, "count": ids.len() });
    if let Ok(facts) = app.facts() {
        answer["max_model_len"] = facts.context_tokens.into();
    }
    Ok(answer)
}

/// A token's text, or its bytes where they are no text alone.
fn piece(app: &App, id: u32) -> Value {
    let bytes = app.text.tokenizer.token_bytes(id).unwrap_or_default();
    match String::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(error) => error.into_bytes().into(),
    }
}

fn text_of(app: &App, body: &Map<String, Value>) -> ApiResult<Value> {
    let fields = Fields::new(body);
    let tokens = fields.list("tokens")?;
    let tokens = tokens.ok_or_else(|| fields.wrong("tokens", "a list of token ids"))?;
    let text = app.decode(&app.check_ids("tokens", tokens)?)?;
    Ok(json!({ "content": text, "prompt": text }))
}

fn prompt_of(app: &App, body: &Map<String, Value>) -> ApiResult<Value> {
    let prompt = app.prompts.of_chat(&app.text, &chat::conversation(body)?)?;
    Ok(json!({ "prompt": prompt.text }))
}
