//! `moectl serve`: an HTTP server for agents, chat programs and dashboards.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::console::Console;
use super::flags::{self, GpuFlags};
use super::{Failure, cache_state, check_context, load};
use crate::commands::args::{CacheArgs, ComputeArgs, ModelArgs};
use crate::engine::TextModel;
use crate::engine::experts::ExpertManager;
use crate::engine::service::script::{Script, serve_script};
use crate::engine::service::{Jobs, ManagerSource, Phase, ServeOptions, Service, serve_sessions};
use crate::hardware::allocator;
use crate::model::Source;
use crate::planning::PolicyConfig;
use crate::planning::units::{parse_bytes, parse_tokens};
use crate::server::connection;
use crate::server::guard::{Keys, Origins};
use crate::server::{Address, App, Limits, Server, ServerOptions};

/// Serve OpenAI's and Anthropic's APIs over HTTP
///
/// Chat programs, agents and dashboards use it as it is: /v1/chat/completions, /v1/completions,
/// /v1/responses, /v1/messages, /v1/models, /tokenize, /metrics; /moectl/live shows the experts at work.
/// Without keys only programs on this machine can use it; web pages never, unless listed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl serve
  moectl serve --model org/name --placement placement.json --ctx 64k
  moectl serve --host 0.0.0.0 --api-key-file keys.txt")]
pub struct ServeArgs {
    /// Address to listen on; anything but this machine's own needs a key
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// Listen on this Unix socket instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["host", "port"])]
    socket: Option<PathBuf>,
    /// Room for prompt and answer, in tokens [default: 32k, or the model's limit]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "TOKENS", value_parser = parse_tokens)]
    ctx: Option<u64>,
    /// What the model is called [default: the name of --model]
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Refuse requests that name another model
    #[arg(long)]
    strict_model: bool,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    sequences: SequenceArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Answer from a script instead of a model, to try clients
    #[arg(long, value_name = "FILE", hide = true)]
    script: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Who may use the server.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
struct AccessArgs {
    /// A key that opens the server; may be given more than once
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// File of keys, one per line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Encrypt connections: certificate chain in PEM form
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key in PEM form
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// A name of this server besides localhost; may be given more than once, `*` is any
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// Origin of web pages that may use the server; may be given more than once, `*` is any
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
}

/// What is computed side by side, and kept.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sequences")]
struct SequenceArgs {
    /// Requests that are computed side by side [default: the placement's, or 4 where the memory allows]
    ///
    /// Each has a context of its own; on a GPU their keys, values and states take the memory of expert
    /// slots. More requests wait, or take turns from RAM.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: Option<u8>,
    /// RAM for beginnings of prompts that may come again, such as 2G; 0 for none
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_bytes)]
    prefix_cache: u64,
}

/// What clients may use up.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Requests that may wait; more are told to come later
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_queue: usize,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_connections: u32,
    /// Bytes of a request's body
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = parse_bytes)]
    max_body: u64,
    /// Seconds of a request, its time in the queue included
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Seconds for requests in work when the server is asked to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
}

/// Room where nothing else is asked for: agents begin with 10k to 20k tokens.
const DEFAULT_CONTEXT: usize = 32 << 10;
/// Requests that are computed side by side, where nothing else is asked for.
const PARALLEL: usize = 4;
/// How often the state of the expert cache is written.
const SAVE_EVERY: Duration = Duration::from_secs(300);

/// Runs `moectl serve`.
///
/// # Errors
/// Bad flags, a model that cannot be read, an address that cannot be listened on.
pub fn execute(args: ServeArgs, console: &Console) -> anyhow::Result<()> {
    allocator::use_few_arenas();
    flags::check(&args.compute, GpuFlags::Place, console)?;
    let keys = keys(&args.access)?;
    if keys.is_empty() && args.socket.is_none() && !is_loopback(&args.host) {
        return Err(Failure::Usage(format!(
            "--host {} can be reached from other machines; give --api-key or --api-key-file, or \
             listen on 127.0.0.1",
            args.host
        ))
        .into());
    }
    let source = Source::resolve_os(args.model.model.as_deref())?;
    let text = Arc::new(TextModel::load(&source)?);
    let defaults = text.generation_config()?;
    defaults.notes().for_each(|note| console.note(note));
    let mut options = options(&args, keys, &source, console.verbose);
    let failure = Arc::new(Mutex::new(None));
    let (service, plan) = service(&args, source, &text, failure.clone(), console)?;
    options.plan = plan;
    if let (Some(certificate), Some(key)) = (&args.access.tls_cert, &args.access.tls_key) {
        options.tls = Some(connection::tls(certificate, key)?);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // For templates, tokenizers and grammars: more would only hold memory.
        .max_blocking_threads(8)
        .thread_name("http")
        .enable_all()
        .build()
        .context("threads of the server")?;
    let address = match &args.socket {
        Some(path) => Address::Unix(path.clone()),
        None => Address::Tcp {
            host: args.host.clone(),
            port: args.port,
        },
    };
    let app = App::new(service.clone(), text, options);
    runtime.block_on(serve(&address, app, &service, console))?;
    if let Some(path) = &args.socket {
        // Nobody listens there any more.
        let _ = std::fs::remove_file(path);
    }
    let failed = failure.lock().map(|mut failure| failure.take());
    match failed {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

async fn serve(
    address: &Address,
    app: App,
    service: &Service,
    console: &Console,
) -> anyhow::Result<()> {
    let server = Server::bind(address, app)
        .await
        .with_context(|| match address {
            Address::Tcp { host, port } => format!("{host}:{port}: cannot listen"),
            Address::Unix(path) => format!("{}: cannot listen", path.display()),
        })?;
    let url = server.address().to_owned();
    match console.json {
        true => console.result_json(&serde_json::json!({ "url": url }))?,
        false => console.result(format!("listening on {url}"))?,
    }
    let (stop, stopped) = watch::channel(false);
    let watched = service.clone();
    let quiet = console.clone();
    tokio::spawn(async move {
        tell_when_ready(&watched, &quiet).await;
    });
    let ends = service.clone();
    let notes = console.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = interrupted() => {
                notes.note("ending: requests in work go on; once more ends at once");
                notify_systemd("STOPPING=1");
                let _ = stop.send(true);
                interrupted().await;
                std::process::exit(130);
            }
            // The model could not be loaded, or its thread is gone.
            () = ends.ended() => {
                let _ = stop.send(true);
            }
        }
    });
    server.run(stopped).await;
    Ok(())
}

async fn tell_when_ready(service: &Service, console: &Console) {
    loop {
        match service.phase() {
            Phase::Loading { .. } => tokio::time::sleep(Duration::from_millis(50)).await,
            Phase::Ready(facts) => {
                console.note(format!(
                    "ready: backend {}, room for {} tokens",
                    facts.backend, facts.context_tokens
                ));
                notify_systemd("READY=1");
                return;
            }
            Phase::Failed(_) => return,
        }
    }
}

/// Ctrl-C, or whoever manages services.
async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Tells systemd, if it waits to be told (`Type=notify`).
fn notify_systemd(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() {
        // Whoever set the variable and does not listen is not served worse.
        let _ = socket.send_to(state.as_bytes(), path);
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn keys(access: &AccessArgs) -> anyhow::Result<Keys> {
    let mut keys = access.api_key.clone();
    if let Some(path) = &access.api_key_file {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let lines = text.lines().map(str::trim);
        let before = keys.len();
        keys.extend(
            lines
                .filter(|l| !l.is_empty() && !l.starts_with('#'))
                .map(str::to_owned),
        );
        if keys.len() == before {
            let message = format!("{}: has no key; expected one per line", path.display());
            return Err(Failure::Usage(message).into());
        }
    }
    Ok(Keys::new(keys))
}

fn options(args: &ServeArgs, keys: Keys, source: &Source, log: bool) -> ServerOptions {
    let mut limits = Limits {
        body_bytes: args.limits.max_body as usize,
        request_time: Duration::from_secs(args.limits.timeout.clamp(1, 31_536_000)),
        drain_time: Duration::from_secs(args.limits.drain_timeout.min(86_400)),
        ..Limits::default()
    };
    limits.connections.connections = args.limits.max_connections as usize;
    let own_name = (!is_loopback(&args.host)).then(|| args.host.clone());
    ServerOptions {
        model_name: args.alias.clone().unwrap_or_else(|| source.id().to_owned()),
        strict_model: args.strict_model,
        keys,
        origins: Origins {
            hosts: args
                .access
                .allow_host
                .iter()
                .cloned()
                .chain(own_name)
                .collect(),
            cors: args.access.cors_origin.clone(),
        },
        limits,
        plan: None,
        tls: None,
        log,
    }
}

/// Starts the model's thread; what can be refused without weights is refused before. Also the placement
/// in force, as its file has it.
fn service(
    args: &ServeArgs,
    source: Source,
    text: &TextModel,
    failure: Arc<Mutex<Option<anyhow::Error>>>,
    console: &Console,
) -> anyhow::Result<(Service, Option<serde_json::Value>)> {
    if let Some(path) = &args.script {
        let script = std::fs::read(path).with_context(|| path.display().to_string())?;
        let script: Script =
            serde_json::from_slice(&script).with_context(|| path.display().to_string())?;
        let tokenizer = text.tokenizer.clone();
        let service = Service::start(args.limits.max_queue, move |jobs| {
            serve_script(&script, &tokenizer, &jobs);
            Ok(())
        });
        return Ok((service, None));
    }
    let config = source.config()?;
    let limit = config.max_position_embeddings;
    let context = args
        .ctx
        .map_or(DEFAULT_CONTEXT.min(limit), |ctx| ctx as usize);
    check_context(&config, context as u64)?;
    let cache_file = args.cache.cache_state.clone();
    let outline = load::outline(&source, &args.compute, cache_file.as_deref(), console)?;
    let plan = (outline.placement.as_ref())
        .map(|placement| serde_json::to_value(&placement.body))
        .transpose()?;
    let planned = (outline.placement.as_ref()).map(|placement| placement.body.sequences as usize);
    let parallel = args.sequences.parallel.map(usize::from);
    let parallel = parallel.or(planned.filter(|&planned| planned > 1));
    let loading = Loading {
        planned: planned.unwrap_or(usize::MAX),
        source,
        compute: args.compute.clone(),
        outline,
        context,
        parallel,
        prefix_cache: args.sequences.prefix_cache as usize,
        cache_file,
        console: console.clone(),
    };
    let service = Service::start(args.limits.max_queue, move |jobs| {
        loading.serve(&jobs).map_err(|error| {
            let message = error.to_string();
            if let Ok(mut failure) = failure.lock() {
                *failure = Some(error);
            }
            message
        })
    });
    Ok((service, plan))
}

/// What the model's thread begins with.
struct Loading {
    source: Source,
    compute: ComputeArgs,
    outline: load::Outline,
    context: usize,
    parallel: Option<usize>,
    /// Sequences that the placement has room for
    planned: usize,
    prefix_cache: usize,
    cache_file: Option<PathBuf>,
    console: Console,
}

impl Loading {
    fn serve(mut self, jobs: &Jobs) -> anyhow::Result<()> {
        let mut engine = load::engine_watched(
            &self.source,
            &self.compute,
            &mut self.outline,
            self.context,
            &self.console,
            &|done, total| jobs.loading(done as u64, total as u64),
        )?;
        engine.set_prefix_cache(self.prefix_cache);
        let sequences = reserve(&mut engine, self.parallel, self.context, &self.console)?;
        if sequences > self.planned && engine.vram_bytes().is_some() {
            self.console.note(format!(
                "note: the placement is planned for {} at once, {sequences} have room, in the memory of \
                 expert slots; `moectl plan --parallel {sequences}` counts them in",
                self.planned
            ));
        }
        let managers = managers(&self, engine.model_id().clone());
        let console = self.console;
        let cache_file = self.cache_file;
        let saves = cache_file.is_some();
        let options = ServeOptions {
            managers,
            save: saves.then(|| {
                let save = move |engine: &_| {
                    let saved = cache_state::save(cache_file.as_deref(), engine, &console);
                    saved.map_err(|error| {
                        console.note(format!("note: {error:#}"));
                        error.to_string()
                    })
                };
                Box::new(save) as _
            }),
            save_every: saves.then_some(SAVE_EVERY),
        };
        serve_sessions(engine, self.context, options, jobs);
        Ok(())
    }
}

/// Room for `parallel` sequences; where it is not given, for as many of [`PARALLEL`] as fit. Their
/// number.
fn reserve(
    engine: &mut crate::engine::Engine,
    parallel: Option<usize>,
    context: usize,
    console: &Console,
) -> anyhow::Result<usize> {
    let mut sequences = parallel.unwrap_or(PARALLEL);
    loop {
        match engine.reserve(sequences, context) {
            Ok(()) => return Ok(sequences),
            Err(error) if parallel.is_some() || sequences == 1 => return Err(error.into()),
            Err(_) => sequences /= 2,
        }
        console.note(format!("note: room for {sequences} sequences at once"));
    }
}

/// Makes the experts of the placement file anew.
fn managers(loading: &Loading, model: crate::formats::ModelId) -> Option<ManagerSource> {
    let path: PathBuf = loading.compute.placement.clone()?;
    let compute = loading.compute.clone();
    let footprint = loading.outline.footprint.clone();
    Some(Box::new(move |policy: Option<PolicyConfig>| {
        manager(&path, &compute, policy, |path| {
            Ok(load::read_placement(path, &model, &footprint)?.body)
        })
    }))
}

fn manager(
    path: &Path,
    compute: &ComputeArgs,
    policy: Option<PolicyConfig>,
    read: impl Fn(&Path) -> anyhow::Result<crate::planning::Placement>,
) -> Result<ExpertManager, String> {
    let placement = read(path).map_err(|error| format!("{error:#}"))?;
    let compute = ComputeArgs {
        policy: policy.or(compute.policy),
        ..compute.clone()
    };
    load::manager(&compute, &placement)
        .ok_or_else(|| "the placement has no experts for this policy".to_owned())
}
