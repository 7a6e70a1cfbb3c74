//! `/moectl/...`: where experts are, what they do, and how that is to go on.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::read_call;
use crate::engine::service::{CacheChange, ExpertsReport};
use crate::hardware::monitor::resident_bytes;
use crate::planning::PolicyConfig;
use crate::planning::units::parse_budget;
use crate::server::App;
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::history::since_start;

/// `GET /moectl/experts`, with `?heat=1` also how often each expert was picked in the last minute.
pub async fn experts(State(app): State<Arc<App>>, uri: Uri) -> Response {
    match report(&app).await {
        Ok(report) => {
            let mut pairs = uri.query().unwrap_or("").split('&');
            let heat = pairs.any(|pair| pair == "heat=1");
            Json(experts_json(&app, &report, heat)).into_response()
        }
        Err(error) => error.respond("/moectl/experts"),
    }
}

async fn report(app: &App) -> ApiResult<ExpertsReport> {
    app.facts()?;
    let report = app.service.ask(|controls| controls.experts()).await;
    report.ok_or_else(|| ApiError::unavailable("the model's thread has ended"))
}

fn experts_json(app: &App, report: &ExpertsReport, with_heat: bool) -> Value {
    let speed = app.metrics.speed();
    let (last_minute, heat) = app.history.last_minute(report, speed);
    let load = app.service.load();
    let slots: Vec<Value> = (report.residents.iter().enumerate())
        .map(|(layer, residents)| {
            let filled: Vec<u16> = residents.iter().copied().flatten().collect();
            json!({ "layer": layer, "slots": residents.len(), "residents": filled })
        })
        .collect();
    let mut answer = json!({
        "model": app.options.model_name,
        "policy": report.policy.map(|policy| policy.label()),
        "stopped": report.stopped,
        "requests_running": load.running,
        "requests_waiting": load.waiting,
        "memory": {
            "resident_bytes": resident_bytes(),
            "vram_bytes": report.vram_bytes,
        },
        "slots": slots,
        "since_start": since_start(app.uptime().as_secs_f64(), report, speed),
        "last_minute": last_minute,
    });
    if with_heat {
        answer["heat"] = json!(heat);
    }
    answer
}

/// `GET /moectl/plan`: the placement in force, and what it predicts against what is measured.
pub async fn plan(State(app): State<Arc<App>>) -> Response {
    let report = match report(&app).await {
        Ok(report) => report,
        Err(error) => return error.respond("/moectl/plan"),
    };
    let (minute, _) = app.history.last_minute(&report, app.metrics.speed());
    let plan = app.options.plan.as_ref();
    let predicted = plan.map(|plan| {
        json!({
            "decode_tok_s": plan["decode"]["tok_s"],
            "prefill_tok_s": plan["prefill"]["tok_s"],
            "hit_rate": plan["decode"]["expert_hit_rate"],
            "vram_bytes": plan["vram_budget_bytes"],
            "ctx_tokens": plan["ctx_tokens"],
        })
    });
    Json(json!({
        "placement": plan,
        "policy": report.policy.map(|policy| policy.label()),
        "stopped": report.stopped,
        "predicted": predicted,
        "measured": {
            "seconds": minute.seconds,
            "decode_tok_s": minute.decode_tok_s,
            "prefill_tok_s": minute.prefill_tok_s,
            "hit_rate": minute.hit_rate,
            "vram_bytes": report.vram_bytes,
        },
    }))
    .into_response()
}

/// `POST /moectl/policy`: one of `{"policy": NAME}`, `{"freeze": BOOL}`, `{"reload": true}`,
/// `{"save": true}`.
pub async fn policy(State(app): State<Arc<App>>, request: Request) -> Response {
    match change(&app, request).await {
        Ok(()) => Json(json!({ "status": "ok" })).into_response(),
        Err(error) => error.respond("/moectl/policy"),
    }
}

async fn change(app: &App, request: Request) -> ApiResult<()> {
    needs_key(app)?;
    let call = read_call(app, request).await?;
    let change = read_change(Fields::new(&call.body))?;
    app.facts()?;
    match app.service.change(change).await {
        Some(Ok(())) => Ok(()),
        Some(Err(reason)) => Err(conflict(reason)),
        None => Err(ApiError::unavailable("the model's thread has ended")),
    }
}

/// `POST /moectl/budget`: `{"vram": "10G"}`, another ceiling for what the process holds on the GPU.
/// Slots shrink or grow at once, between two tokens; requests in work go on.
pub async fn budget(State(app): State<Arc<App>>, request: Request) -> Response {
    match change_budget(&app, request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => error.respond("/moectl/budget"),
    }
}

async fn change_budget(app: &App, request: Request) -> ApiResult<Value> {
    needs_key(app)?;
    let call = read_call(app, request).await?;
    let fields = Fields::new(&call.body);
    let bytes = match fields.get("vram") {
        Some(Value::String(text)) => parse_budget(text)
            .map_err(|error| ApiError::invalid("vram", format!("vram: {error}")))?,
        _ => fields
            .integer("vram", 1..=i64::MAX)?
            .ok_or_else(|| fields.wrong("vram", "a size such as \"10G\", or bytes"))?
            as u64,
    };
    app.facts()?;
    let asked = app.service.ask(move |controls| {
        let changed = controls.change(&CacheChange::Budget(bytes));
        changed.map(|()| controls.experts())
    });
    let report = match asked.await {
        Some(Ok(report)) => report,
        Some(Err(reason)) => return Err(conflict(reason)),
        None => return Err(ApiError::unavailable("the model's thread has ended")),
    };
    Ok(json!({
        "status": "ok",
        "vram_budget_bytes": bytes,
        "vram_bytes": report.vram_bytes,
        "slots": report.residents.iter().map(Vec::len).sum::<usize>(),
    }))
}

fn conflict(reason: String) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, "invalid_request_error", reason)
}

fn needs_key(app: &App) -> ApiResult<()> {
    match app.options.keys.is_empty() {
        true => Err(ApiError::forbidden(
            "changes need a key: start the server with --api-key or --api-key-file",
        )),
        false => Ok(()),
    }
}

fn read_change(fields: Fields<'_>) -> ApiResult<CacheChange> {
    let expected = "expected one of policy, freeze, reload, save";
    let mut changes = Vec::new();
    if let Some(name) = fields.text("policy")? {
        let policy: Result<PolicyConfig, _> = name.parse();
        let policy =
            policy.map_err(|error| ApiError::invalid("policy", format!("policy: {error}")))?;
        changes.push(CacheChange::Policy(policy));
    }
    if let Some(frozen) = fields.bool("freeze")? {
        changes.push(CacheChange::Freeze(frozen));
    }
    if fields.bool("reload")? == Some(true) {
        changes.push(CacheChange::Reload);
    }
    if fields.bool("save")? == Some(true) {
        changes.push(CacheChange::Save);
    }
    match changes.pop() {
        Some(change) if changes.is_empty() => Ok(change),
        _ => Err(ApiError::bad_request(expected)),
    }
}

/// `GET /moectl/live`: a page that shows all of this as it changes.
pub async fn live() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        // Nothing from elsewhere, and in nobody's frame.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
             connect-src 'self'; img-src data:; frame-ancestors 'none'",
        ),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, include_str!("../live.html")).into_response()
}

/// `GET /openapi.json`
pub async fn openapi() -> Response {
    let media = [(header::CONTENT_TYPE, "application/json")];
    (media, include_str!("../openapi.json")).into_response()
}
