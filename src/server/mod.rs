//! The HTTP server: routes, who may ask, limits. What each API looks like on the wire is in
//! [`wire`]; the model is behind [`Service`].

pub mod connection;
pub mod error;
pub mod fields;
pub mod generation;
pub mod guard;
pub mod history;
pub mod metrics;
pub mod prompt;
pub mod reader;
pub mod schema;
pub mod sse;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use connection::{ConnectionLimits, Listener};
use error::{ApiError, ApiResult};
use guard::{Keys, Origins};
use history::History;
use metrics::Metrics;
use prompt::Prompts;
use schema::Grammars;

use crate::engine::TextModel;
use crate::engine::service::{ModelFacts, Phase, Service};

/// How a server is to behave.
#[derive(Clone)]
pub struct ServerOptions {
    /// What the model is called, where a request does not say
    pub model_name: String,
    /// Refuse requests that name another model
    pub strict_model: bool,
    pub keys: Keys,
    pub origins: Origins,
    pub limits: Limits,
    /// The placement in force, as its file has it
    pub plan: Option<serde_json::Value>,
    /// A line of JSON per request on stderr: never what was asked or answered
    pub log: bool,
}

/// What a client may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: ConnectionLimits,
    pub body_bytes: usize,
    /// To send a request's body
    pub body_time: Duration,
    /// Of a request, its time in the queue included
    pub request_time: Duration,
    /// Between events while nothing else is sent
    pub ping_time: Duration,
    /// For requests in work when the server is asked to end
    pub drain_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: ConnectionLimits {
                connections: 512,
                header_time: Duration::from_secs(30),
                stall_time: Duration::from_secs(30),
                header_bytes: 64 << 10,
            },
            body_bytes: 32 << 20,
            body_time: Duration::from_secs(30),
            request_time: Duration::from_secs(3600),
            ping_time: Duration::from_secs(10),
            drain_time: Duration::from_secs(30),
        }
    }
}

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// What all requests share.
pub struct App {
    pub service: Service,
    pub text: Arc<TextModel>,
    pub prompts: Prompts,
    pub options: ServerOptions,
    pub metrics: Metrics,
    pub history: History,
    /// Seconds since 1970 at the start
    pub started: u64,
    start: Instant,
    grammars: OnceLock<Result<Grammars, String>>,
}

impl App {
    pub fn new(service: Service, text: Arc<TextModel>, options: ServerOptions) -> Self {
        App {
            prompts: Prompts::new(&text),
            metrics: Metrics::new(&options.model_name),
            history: History::default(),
            started: unix_time(),
            start: Instant::now(),
            grammars: OnceLock::new(),
            service,
            text,
            options,
        }
    }

    /// What is known of the model.
    ///
    /// # Errors
    /// 503 while it loads, or if it could not be loaded.
    pub fn facts(&self) -> ApiResult<Arc<ModelFacts>> {
        match self.service.phase() {
            Phase::Ready(facts) => Ok(facts),
            Phase::Loading { done, total } => {
                Err(crate::engine::service::Refusal::Loading { done, total }.into())
            }
            Phase::Failed(reason) => Err(crate::engine::service::Refusal::Failed(reason).into()),
        }
    }

    /// Since the server started.
    pub fn uptime(&self) -> Duration {
        self.start.elapsed()
    }

    /// Names this program and model; equal where equal seeds give equal answers.
    pub fn fingerprint(&self) -> String {
        format!("moectl-{}", env!("CARGO_PKG_VERSION"))
    }

    /// The text of ids, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> ApiResult<String> {
        let text = self.text.tokenizer.decode(ids, false);
        text.map_err(|error| ApiError::bad_request(error.to_string()))
    }

    /// Token ids of a request.
    ///
    /// # Errors
    /// 400 if one is not in the model's vocabulary.
    pub fn check_ids(&self, param: &str, ids: &[serde_json::Value]) -> ApiResult<Vec<u32>> {
        let vocab_size = self.facts()?.vocab_size as u64;
        let id = |value: &serde_json::Value| {
            let id = value.as_u64().filter(|&id| id < vocab_size);
            id.map(|id| id as u32).ok_or_else(|| {
                let last = vocab_size.saturating_sub(1);
                ApiError::invalid(
                    param,
                    format!("{param}: {value} is no token id, expected 0 to {last}"),
                )
            })
        };
        ids.iter().map(id).collect()
    }

    /// The compiler of grammars, made when first needed: a vocabulary takes a while.
    pub fn grammars(&self) -> ApiResult<&Grammars> {
        let vocab_size = self.facts()?.vocab_size;
        let made = (self.grammars)
            .get_or_init(|| Grammars::new(&self.text, vocab_size).map_err(|e| e.to_string()));
        made.as_ref()
            .map_err(|error| ApiError::internal(error.clone()))
    }
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// A random name for something that is answered, such as `chatcmpl-...`.
pub fn new_id(prefix: &str) -> String {
    let random = || getrandom::u64().unwrap_or_else(|_| unix_time());
    format!("{prefix}{:016x}{:08x}", random(), random() as u32)
}

/// A server that listens.
pub struct Server {
    app: Arc<App>,
    listener: Listener,
    address: String,
}

impl Server {
    /// Listens; requests are answered from [`run`](Server::run) on.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub async fn bind(address: &Address, app: App) -> io::Result<Self> {
        let (listener, address) = match address {
            Address::Tcp { host, port } => {
                let bare = host.trim_start_matches('[').trim_end_matches(']');
                let listener = TcpListener::bind((bare, *port)).await?;
                let local: SocketAddr = listener.local_addr()?;
                (Listener::Tcp(listener), format!("http://{local}"))
            }
            Address::Unix(path) => {
                remove_stale_socket(path)?;
                let listener = UnixListener::bind(path)?;
                let address = format!("unix:{}", path.display());
                (Listener::Unix(listener), address)
            }
        };
        Ok(Server {
            app: Arc::new(app),
            listener,
            address,
        })
    }

    /// `http://127.0.0.1:8080`, or `unix:PATH`
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Serves until `stop` becomes true and what is in work has ended, or has had its time.
    pub async fn run(self, stop: watch::Receiver<bool>) {
        let limits = self.app.options.limits;
        let service = self.app.service.clone();
        let sampler = tokio::spawn(sample(self.app.clone()));
        let router = router(self.app);
        let mut stopped = stop.clone();
        let draining = service.clone();
        tokio::spawn(async move {
            if stopped.wait_for(|stop| *stop).await.is_ok() {
                draining.drain();
            }
        });
        connection::serve(
            self.listener,
            router,
            limits.connections,
            stop,
            limits.drain_time,
        )
        .await;
        sampler.abort();
        service.abort();
        // The thread ends between two tokens or two pieces of a prompt.
        let _ = tokio::time::timeout(limits.drain_time, service.ended()).await;
    }
}

/// Keeps what the experts did in the last minute.
async fn sample(app: Arc<App>) {
    loop {
        let report = app.service.ask(|controls| controls.experts()).await;
        if let Some(report) = report {
            app.history.add(report, app.metrics.speed());
        }
        tokio::time::sleep(history::SAMPLE_EVERY).await;
    }
}

/// A socket that an ended server left behind is in the way; anything else is somebody's.
fn remove_stale_socket(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    use std::os::unix::net::UnixStream;
    match std::fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() && UnixStream::connect(path).is_err() => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}

fn router(app: Arc<App>) -> Router {
    wire::routes()
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), guard_request))
        .with_state(app)
}

async fn not_found(request: Request) -> Response {
    let path = request.uri().path();
    let message = format!("no endpoint {} {path}; see /openapi.json", request.method());
    ApiError::new(StatusCode::NOT_FOUND, "not_found_error", message).respond(path)
}

async fn wrong_method(request: Request) -> Response {
    let path = request.uri().path();
    let message = format!(
        "{path} does not take {}; see /openapi.json",
        request.method()
    );
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request_error",
        message,
    )
    .respond(path)
}

/// Lets a request through if it may pass, and logs how it went.
async fn guard_request(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let start = Instant::now();
    let response = guarded(&app, request, next, &path).await;
    if app.options.log {
        let line = serde_json::json!({
            "time": unix_time(),
            "method": method.as_str(),
            "path": path,
            "status": response.status().as_u16(),
            "ms": generation::ms(start.elapsed()),
        });
        eprintln!("{line}");
    }
    response
}

/// Host, origin and key of a request; CORS headers of origins that are listed.
async fn guarded(app: &App, mut request: Request, next: Next, path: &str) -> Response {
    let origin = match app.options.origins.check(request.headers()) {
        Ok(origin) => origin,
        Err(error) => return error.respond(path),
    };
    let preflight = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight && origin.is_some() {
        StatusCode::NO_CONTENT.into_response()
    } else if guard::is_public(request.method(), path) {
        next.run(request).await
    } else {
        match app.options.keys.owner(request.headers()) {
            Ok(owner) => {
                request.extensions_mut().insert(owner);
                next.run(request).await
            }
            Err(error) => error.respond(path),
        }
    };
    if let Some(origin) = origin {
        allow_origin(&mut response, &origin);
    }
    response
}

fn allow_origin(response: &mut Response, origin: &str) {
    let headers = response.headers_mut();
    if let Ok(origin) = HeaderValue::from_str(origin) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    let fixed: [(HeaderName, &str); 4] = [
        (header::VARY, "origin"),
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, OPTIONS"),
        (
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            "authorization, content-type, x-api-key, anthropic-version",
        ),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
}
