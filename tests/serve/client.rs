//! A small HTTP client, and servers to try it on: loopback, a free port, no other crates.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moectl::engine::service::script::{Script, serve_script};
use moectl::engine::service::{Phase, ServeOptions, Service, serve_sessions};
use moectl::engine::{BackendChoice, Engine, GpuOptions, LoadOptions, TextModel};
use moectl::model::Source;
use moectl::server::guard::{Keys, Origins};
use moectl::server::{Address, App, Limits, Server, ServerOptions};
use serde_json::{Value, json};
use tokio::sync::watch;

/// A server that ends with its test.
pub struct TestServer {
    pub address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error}: {}", String::from_utf8_lossy(&self.body));
        })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// One server-sent event.
#[derive(Debug)]
pub struct Event {
    pub name: Option<String>,
    pub data: String,
}

impl Event {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {}", self.data))
    }
}

fn text() -> Arc<TextModel> {
    Arc::new(TextModel::load(&Source::resolve(None).unwrap()).unwrap())
}

/// The built-in model, loaded once per test that wants a server of its own.
pub fn built_in_service() -> Service {
    built_in_service_with_queue(8)
}

pub fn built_in_service_with_queue(max_waiting: usize) -> Service {
    built_in_service_of(max_waiting, 2, 2048)
}

/// With so many sequences of so many tokens.
pub fn built_in_service_of(max_waiting: usize, sequences: usize, tokens: usize) -> Service {
    Service::start(max_waiting, move |jobs| {
        let source = Source::resolve(None).unwrap();
        let options = LoadOptions {
            backend: BackendChoice::Cpu,
            threads: Some(2),
            cpu_precision: moectl::backend::cpu::CpuPrecision::Int16,
            gpu: GpuOptions::default(),
            kv_dtype: None,
            progress: &|_, _| {},
            max_tokens: tokens,
        };
        let mut engine = Engine::load(&source, &options).map_err(|e| e.to_string())?;
        engine
            .reserve(sequences, tokens)
            .map_err(|e| e.to_string())?;
        serve_sessions(engine, tokens, ServeOptions::default(), &jobs);
        Ok(())
    })
}

/// A server with the built-in model that all tests share.
pub fn built_in() -> &'static TestServer {
    static SERVER: OnceLock<TestServer> = OnceLock::new();
    SERVER.get_or_init(|| TestServer::start(built_in_service(), |_| {}))
}

/// Answers `script`, in the form of [`Script`].
pub fn scripted(script: Value, adjust: impl FnOnce(&mut ServerOptions)) -> TestServer {
    scripted_with_queue(script, 8, adjust)
}

pub fn scripted_with_queue(
    script: Value,
    max_waiting: usize,
    adjust: impl FnOnce(&mut ServerOptions),
) -> TestServer {
    let script: Script = serde_json::from_value(script).unwrap();
    let tokenizer = text().tokenizer.clone();
    let service = Service::start(max_waiting, move |jobs| {
        serve_script(&script, &tokenizer, &jobs);
        Ok(())
    });
    TestServer::start(service, adjust)
}

/// One answer to everything.
pub fn reply(text: &str) -> Value {
    json!({ "rules": [{ "reply": text }] })
}

impl TestServer {
    pub fn start(service: Service, adjust: impl FnOnce(&mut ServerOptions)) -> Self {
        let mut options = ServerOptions {
            model_name: "tiny".into(),
            strict_model: false,
            keys: Keys::default(),
            origins: Origins::default(),
            limits: Limits {
                drain_time: Duration::from_secs(10),
                ..Limits::default()
            },
            plan: None,
            tls: None,
            log: false,
        };
        adjust(&mut options);
        let (stop, stopped) = watch::channel(false);
        let (tell, told) = std::sync::mpsc::channel();
        let app = App::new(service.clone(), text(), options);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let address = Address::Tcp {
                    host: "127.0.0.1".into(),
                    port: 0,
                };
                let server = Server::bind(&address, app).await.unwrap();
                let (_, address) = server.address().split_once("://").unwrap();
                let address = address.to_owned();
                tell.send(address).unwrap();
                server.run(stopped).await;
            });
        });
        let address = told.recv().unwrap().parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !matches!(service.phase(), Phase::Ready(_)) {
            assert!(
                Instant::now() < deadline,
                "not ready: {:?}",
                service.phase()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        TestServer {
            address,
            stop,
            thread: Some(thread),
        }
    }

    /// Asks the server to end; what is in work goes on.
    pub fn ask_to_end(&self) {
        self.stop.send_replace(true);
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// Sends a request; the connection, from which nothing was read.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> TcpStream {
        let mut stream = self.connect();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\ncontent-length: {}\r\n",
            body.len()
        );
        let has = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        if !has("host") {
            head += &format!("host: {}\r\n", self.address);
        }
        if !has("content-type") && !body.is_empty() {
            head += "content-type: application/json\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "connection: close\r\n\r\n";
        // A server that refuses need not read all of it.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body));
        stream
    }

    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        read_response(self.send(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], &[])
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, &[], body.to_string().as_bytes())
    }

    /// The answer to a request that must succeed.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        let text = String::from_utf8_lossy(&response.body).into_owned();
        assert_eq!(response.status, 200, "{path}: {text}");
        response.json()
    }

    /// The events of a request that must succeed.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Event> {
        let response = self.post(path, body);
        let text = String::from_utf8(response.body.clone()).unwrap();
        assert_eq!(response.status, 200, "{path}: {text}");
        assert_eq!(response.header("content-type"), Some("text/event-stream"));
        events(&text)
    }

    /// Waits until nothing is in work or waits.
    pub fn wait_until_idle(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let health = self.get("/health").json();
            if health["requests_running"] == 0 && health["requests_waiting"] == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "still in work: {health}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until as many requests as that are in work or wait.
    pub fn wait_for_load(&self, running: u64, waiting: u64) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let health = self.get("/health").json();
            if health["requests_running"] == running && health["requests_waiting"] == waiting {
                return;
            }
            assert!(Instant::now() < deadline, "{health}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.ask_to_end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn events(text: &str) -> Vec<Event> {
    let blocks = text.split("\n\n").filter(|block| !block.is_empty());
    let event = |block: &str| {
        let field = |name: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim_start().to_owned())
        };
        let data = field("data:")?;
        Some(Event {
            name: field("event:"),
            data,
        })
    };
    // Comments keep a connection alive and say nothing.
    blocks.filter_map(event).collect()
}

pub fn read_response(stream: TcpStream) -> Response {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status line: {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let chunked = (headers.iter()).any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let mut body = Vec::new();
    match chunked {
        true => read_chunks(&mut reader, &mut body),
        false => {
            let _ = reader.read_to_end(&mut body);
        }
    }
    Response {
        status,
        headers,
        body,
    }
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) {
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap() == 0 {
            return;
        }
        let len = usize::from_str_radix(line.trim(), 16).unwrap();
        let mut chunk = vec![0; len + 2];
        reader.read_exact(&mut chunk).unwrap();
        body.extend_from_slice(&chunk[..len]);
        if len == 0 {
            return;
        }
    }
}

pub fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}
