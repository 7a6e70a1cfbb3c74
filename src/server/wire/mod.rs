//! The APIs as they are on the wire, one file each.

mod anthropic;
mod chat;
mod completions;
mod experts;
mod messages_in;
mod models;
mod params;
mod response_items;
mod responses;
mod text;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::{get, post};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Map, Value, json};

use super::App;
use super::error::{ApiError, ApiResult};
use super::generation::ms;
use super::guard::Owner;
use crate::engine::service::{Timings, Usage};

/// All endpoints.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(models::root))
        .route("/health", get(models::health))
        .route("/v1/health", get(models::health))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/metrics", get(models::metrics))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/responses", post(responses::handle))
        .route("/v1/messages", post(anthropic::handle))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/openapi.json", get(experts::openapi))
        .route("/moectl/experts", get(experts::experts))
        .route("/moectl/plan", get(experts::plan))
        .route("/moectl/policy", post(experts::policy))
        .route("/moectl/budget", post(experts::budget))
        .route("/moectl/live", get(experts::live))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/apply-template", post(text::apply_template))
}

/// A request's body as an object, and whose request it is.
struct Call {
    body: Map<String, Value>,
    owner: Owner,
}

/// Reads a request within the limits of the server.
async fn read_call(app: &App, request: Request) -> ApiResult<Call> {
    let (parts, body) = request.into_parts();
    check_media_type(&parts.headers)?;
    let bytes = read_body(app, body).await?;
    // Megabytes take a while; other connections go on meanwhile.
    let body: Value = tokio::task::block_in_place(|| serde_json::from_slice(&bytes))
        .map_err(|error| ApiError::bad_request(format!("the body is no JSON: {error}")))?;
    let Value::Object(body) = body else {
        return Err(ApiError::bad_request("the body is no JSON object"));
    };
    let owner = parts.extensions.get::<Owner>().copied().unwrap_or(0);
    Ok(Call { body, owner })
}

/// Reads a request and has `prepare` make of it what the answer needs, on a thread of its own:
/// templates, tokenizers and grammars take their time.
async fn prepared<T: Send + 'static>(
    app: &Arc<App>,
    request: Request,
    prepare: impl FnOnce(&App, &Call) -> ApiResult<T> + Send + 'static,
) -> ApiResult<(T, Owner)> {
    let call = read_call(app, request).await?;
    let owner = call.owner;
    let app = app.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare(&app, &call)).await;
    let prepared = prepared.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok((prepared?, owner))
}

fn check_media_type(headers: &HeaderMap) -> ApiResult<()> {
    let unsupported = |message: String| {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Err(ApiError::new(status, "invalid_request_error", message))
    };
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    // Nothing is unpacked: a small body could be a huge one.
    if let Some(encoding) = text(header::CONTENT_ENCODING).filter(|e| *e != "identity") {
        return unsupported(format!(
            "content-encoding {encoding}: send the body as it is"
        ));
    }
    // A web page may send other types without asking first.
    let media = text(header::CONTENT_TYPE).unwrap_or("application/json");
    let essence = media.split(';').next().unwrap_or("").trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => unsupported(format!(
            "content-type {essence}: expected application/json (curl: -H 'content-type: application/json')"
        )),
    }
}

async fn read_body(app: &App, body: Body) -> ApiResult<Bytes> {
    let limits = &app.options.limits;
    let collected = Limited::new(body, limits.body_bytes).collect();
    match tokio::time::timeout(limits.body_time, collected).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!(
                "the body has more than {} bytes (--max-body)",
                limits.body_bytes
            ),
        )),
        Ok(Err(error)) => Err(ApiError::bad_request(format!(
            "the body broke off: {error}"
        ))),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout_error",
            format!("the body took more than {} s", limits.body_time.as_secs()),
        )),
    }
}

/// Usage as OpenAI's chat and completion APIs have it.
fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// Timings under llama-server's names.
fn timings_json(usage: Usage, timings: &Timings) -> Value {
    let computed = usage.prompt_tokens - usage.cached_tokens;
    let (prompt_ms, predicted_ms) = (ms(timings.prefill), ms(timings.decode));
    let per_token = |ms: f64, n: usize| if n == 0 { 0.0 } else { ms / n as f64 };
    let per_second = |ms: f64, n: usize| if ms > 0.0 { n as f64 * 1e3 / ms } else { 0.0 };
    let predicted = usage.completion_tokens;
    json!({
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": per_token(prompt_ms, computed),
        "prompt_per_second": per_second(prompt_ms, computed),
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": per_token(predicted_ms, predicted),
        "predicted_per_second": per_second(predicted_ms, predicted),
        "queue_ms": ms(timings.queue),
    })
}
