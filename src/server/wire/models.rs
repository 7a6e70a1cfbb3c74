//! What the server says of itself: health, models, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::service::Phase;
use crate::server::App;
use crate::server::error::ApiError;

/// What a browser or a client that tries the address sees.
pub async fn root() -> &'static str {
    "moectl: see /openapi.json, /moectl/live\n"
}

/// 200 when requests are taken; 503 while loading, with how far it is.
pub async fn health(State(app): State<Arc<App>>) -> Response {
    match app.service.phase() {
        Phase::Ready(facts) => {
            let load = app.service.load();
            Json(json!({
                "status": "ok",
                "model": app.options.model_name,
                "backend": facts.backend,
                "requests_running": load.running,
                "requests_waiting": load.waiting,
            }))
            .into_response()
        }
        Phase::Loading { done, total } => {
            let mut error = ApiError::unavailable("loading the model");
            error.extra.insert("done_bytes".into(), done.into());
            error.extra.insert("total_bytes".into(), total.into());
            let progress = done as f64 / total.max(1) as f64;
            error.extra.insert("progress".into(), progress.into());
            let mut body = error.openai();
            body["status"] = "loading".into();
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
        Phase::Failed(reason) => {
            let mut body = ApiError::unavailable(reason).openai();
            body["status"] = "failed".into();
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

fn model(app: &App) -> Value {
    let mut model = json!({
        "id": app.options.model_name,
        "object": "model",
        "created": app.started,
        "owned_by": "moectl",
    });
    if let Phase::Ready(facts) = app.service.phase() {
        model["max_model_len"] = facts.context_tokens.into();
        model["meta"] = json!({
            "n_ctx": facts.context_tokens,
            "n_vocab": facts.vocab_size,
            "num_layers": facts.num_layers,
            "num_experts": facts.num_experts,
            "num_experts_per_tok": facts.num_experts_per_tok,
            "backend": facts.backend,
            "synthetic": facts.synthetic,
        });
    }
    model
}

pub async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [model(&app)] }))
}

pub async fn one(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    if name == app.options.model_name {
        return Json(model(&app)).into_response();
    }
    let own = &app.options.model_name;
    let message = format!("no model of that name here; there is `{own}`");
    let mut error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
    error.param = Some("model".into());
    error.code = Some("model_not_found");
    error.respond("/v1/models")
}

/// Prometheus' text.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let experts = app.service.ask(|controls| controls.experts()).await;
    let text = app.metrics.text(app.service.load(), experts.as_ref());
    let media = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, media)], text).into_response()
}
