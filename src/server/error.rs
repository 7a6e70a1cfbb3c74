//! Errors as clients of each API read them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::engine::service::Refusal;

/// An answer that is no success.
#[derive(Clone, Debug)]
pub struct ApiError {
    pub status: StatusCode,
    /// `type` of the error object
    pub kind: &'static str,
    pub message: String,
    /// The field of the request that is meant
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// More fields of the error object
    pub extra: Map<String, Value>,
    pub retry_after_s: Option<u64>,
}

pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            extra: Map::new(),
            retry_after_s: None,
        }
    }

    /// 400: field `param` of the request cannot be taken.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = ApiError::bad_request(message);
        error.param = Some(param.into());
        error
    }

    /// 400 that no single field is to blame for.
    pub fn bad_request(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub fn forbidden(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 500: what the model's thread said.
    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable_error",
            message,
        )
    }

    /// 400: the prompt leaves no room for an answer.
    pub fn too_long(prompt_tokens: usize, context_tokens: usize) -> Self {
        let mut error = ApiError::new(
            StatusCode::BAD_REQUEST,
            "exceed_context_size_error",
            format!(
                "the prompt has {prompt_tokens} tokens, the context {context_tokens}; shorten it, \
                 or start the server with a larger --ctx"
            ),
        );
        error.code = Some("context_length_exceeded");
        error
            .extra
            .insert("n_prompt_tokens".into(), prompt_tokens.into());
        error.extra.insert("n_ctx".into(), context_tokens.into());
        error
    }

    /// The error object of OpenAI's APIs.
    pub fn openai(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        });
        let fields = error.as_object_mut().expect("an object");
        fields.extend(self.extra.clone());
        json!({ "error": error })
    }

    /// The error object of Anthropic's API.
    pub fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        };
        let message = match &self.param {
            Some(param) if !self.message.starts_with(param.as_str()) => {
                format!("{param}: {}", self.message)
            }
            _ => self.message.clone(),
        };
        json!({ "type": "error", "error": { "type": kind, "message": message } })
    }

    /// As the API at `path` has it.
    pub fn respond(&self, path: &str) -> Response {
        let body = match path.starts_with("/v1/messages") {
            true => self.anthropic(),
            false => self.openai(),
        };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after_s {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let (mut error, retry_after_s) = match refusal {
            Refusal::QueueFull { .. } => {
                let kind = "rate_limit_error";
                let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, kind, message);
                error.code = Some("queue_full");
                (error, 2)
            }
            Refusal::Loading { .. } => (ApiError::unavailable(message), 2),
            Refusal::Draining => (ApiError::unavailable(message), 10),
            Refusal::Failed(_) => (ApiError::unavailable(message), 60),
        };
        error.retry_after_s = Some(retry_after_s);
        error
    }
}
