//! `--model org/name`: fetched from a hub, kept in its cache layout, found there offline.

#[path = "cli/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use program::{Outcome, Sandbox, finish, small_model};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REVISIONS: [&str; 3] = ["main", "v1", COMMIT];
const FOLDER: &str = "hf/hub/models--org--name";

/// One request: its path and its headers, names in lower case.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

/// Answers as the hub does, with the small model as `org/name` and nothing else.
///
/// Weights are redirected to another path with the commit in the first answer, as the hub does
/// with large files.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (base, seen) = (endpoint.clone(), requests.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let request = receive(stream.as_ref().unwrap());
                seen.lock().unwrap().push(request.clone());
                // A client that hung up has what it wanted.
                let _ = stream.unwrap().write_all(&answer(&base, &request));
            }
        });
        Hub { endpoint, requests }
    }

    fn paths(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|r| r.path.clone()).collect()
    }

    /// `moectl run` of a model of this hub, with a cache in the sandbox.
    fn run(&self, sandbox: &Sandbox, model: &str, variables: &[(&str, &str)]) -> Outcome {
        let args = "run --json -n 2 --temperature 0 hello --model".split(' ');
        let args: Vec<&str> = args.chain([model]).collect();
        let mut command = sandbox.command(&args);
        command
            .env("HF_HOME", sandbox.path("hf"))
            .env("HF_ENDPOINT", &self.endpoint)
            .envs(variables.iter().copied());
        finish(&mut command)
    }
}

fn receive(stream: &TcpStream) -> Request {
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let first = lines.next().unwrap();
    let headers = lines.take_while(|line| !line.is_empty()).map(|line| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.to_lowercase(), value.to_string())
    });
    Request {
        path: first.split(' ').nth(1).unwrap().into(),
        headers: headers.collect(),
    }
}

fn answer(base: &str, request: &Request) -> Vec<u8> {
    let parts: Vec<&str> = request.path.split('/').skip(1).collect();
    let (file, redirect) = match parts[..] {
        ["org", "name", "resolve", revision, file] if REVISIONS.contains(&revision) => {
            (file, file.ends_with(".safetensors"))
        }
        ["large", file] => (file, false),
        _ => return response("404 Not Found", "x-error-code: EntryNotFound\r\n", b""),
    };
    let Ok(bytes) = std::fs::read(small_model().join(file)) else {
        return response("404 Not Found", "x-error-code: EntryNotFound\r\n", b"");
    };
    let identity = format!("x-repo-commit: {COMMIT}\r\netag: \"etag-of-{file}\"\r\n");
    if redirect {
        let headers = format!("{identity}location: {base}/large/{file}\r\n");
        return response("302 Found", &headers, b"");
    }
    let Some(range) = request.headers.get("range") else {
        return response("200 OK", &identity, &bytes);
    };
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |last: usize| last + 1);
    let content_range = format!(
        "content-range: bytes {start}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    let headers = identity + &content_range;
    response("206 Partial Content", &headers, &bytes[start..end])
}

fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// What the same run says with the model's folder in place of its name.
fn token_ids_of_folder(sandbox: &Sandbox) -> serde_json::Value {
    let model = small_model();
    let line = format!(
        "run --json -n 2 --temperature 0 hello -m {}",
        model.display()
    );
    sandbox.run(&line).ok().json()["token_ids"].clone()
}

#[test]
fn a_model_is_fetched_into_the_cache_once_and_then_runs_offline() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    let fetched = hub.run(&sandbox, "org/name", &[]).ok().json();
    assert_eq!(fetched["model"]["id"], "org/name");
    assert_eq!(fetched["token_ids"], token_ids_of_folder(&sandbox));
    let snapshot = sandbox.path(&format!("{FOLDER}/snapshots/{COMMIT}"));
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let expected = std::fs::read(small_model().join(file)).unwrap();
        assert_eq!(
            std::fs::read(snapshot.join(file)).unwrap(),
            expected,
            "{file}"
        );
    }
    let main = std::fs::read_to_string(sandbox.path(&format!("{FOLDER}/refs/main"))).unwrap();
    assert_eq!(main, COMMIT);

    // Again: only the commit of the branch is asked for.
    let requests = hub.paths().len();
    hub.run(&sandbox, "org/name", &[]).ok();
    let again = hub.paths().split_off(requests);
    assert_eq!(again, ["/org/name/resolve/main/config.json"]);

    let requests = hub.paths().len();
    let offline = hub.run(&sandbox, "org/name", &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.ok().json()["token_ids"], fetched["token_ids"]);
    assert_eq!(hub.paths().len(), requests);
}

#[test]
fn a_revision_is_a_branch_a_tag_or_a_commit() {
    let hub = Hub::start();
    for revision in ["v1", COMMIT] {
        let sandbox = Sandbox::new();
        let model = format!("org/name@{revision}");
        let record = hub.run(&sandbox, &model, &[]).ok().json();
        assert_eq!(record["model"]["id"], "org/name");
        assert_eq!(record["model"]["revision"], revision);
        let path = format!("/org/name/resolve/{revision}/config.json");
        assert!(hub.paths().contains(&path), "{:?}", hub.paths());
        hub.run(&sandbox, &model, &[("HF_HUB_OFFLINE", "1")]).ok();
    }
    let sandbox = Sandbox::new();
    let outcome = hub.run(&sandbox, "org/name@v2", &[]);
    outcome.fails(1, &["org/name", "v2", "not found on the hub"]);
}

#[test]
fn offline_without_a_cache_is_an_error_that_says_so() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    let outcome = hub.run(&sandbox, "org/name", &[("HF_HUB_OFFLINE", "1")]);
    let parts = [
        "org/name",
        "config.json",
        "not in the cache",
        "HF_HUB_OFFLINE",
    ];
    outcome.fails(1, &parts);
    assert!(hub.paths().is_empty());
}

#[test]
fn a_model_that_the_hub_lacks_is_named_with_the_way_out() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    let outcome = hub.run(&sandbox, "org/nothing", &[]);
    let parts = ["org/nothing", "not found on the hub", "HF_TOKEN"];
    outcome.fails(1, &parts);
}

#[test]
fn a_hub_that_does_not_answer_is_named_once() {
    let (sandbox, mut hub) = (Sandbox::new(), Hub::start());
    // A port that nobody listens on.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    hub.endpoint = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let outcome = hub.run(&sandbox, "org/name", &[]);
    let outcome = outcome.fails(1, &["org/name", "config.json", "refused"]);
    assert_eq!(outcome.stderr.matches("refused").count(), 1, "{outcome:?}");
}

#[test]
fn a_whole_cache_needs_no_hub() {
    let (sandbox, mut hub) = (Sandbox::new(), Hub::start());
    let fetched = hub.run(&sandbox, "org/name", &[]).ok().json();
    // Nobody listens at the first; the second takes connections and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", listener.local_addr().unwrap());
    for endpoint in ["http://127.0.0.1:9".to_string(), silent] {
        hub.endpoint = endpoint;
        let start = std::time::Instant::now();
        let timeout = [("HF_HUB_ETAG_TIMEOUT", "1")];
        let again = hub.run(&sandbox, "org/name", &timeout).ok().json();
        assert_eq!(again["token_ids"], fetched["token_ids"]);
        assert!(start.elapsed().as_secs() < 20);
    }
}

#[test]
fn a_run_uses_one_commit() {
    let (sandbox, mut hub) = (Sandbox::new(), Hub::start());
    hub.run(&sandbox, "org/name", &[]).ok();
    // Commit A is what the cache had; of its weights nothing is left.
    let folder = sandbox.path(FOLDER);
    let a = "a".repeat(40);
    let [old, new] = [&a[..], COMMIT].map(|commit| folder.join("snapshots").join(commit));
    std::fs::rename(&new, &old).unwrap();
    std::fs::remove_file(old.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("refs/main"), &a).unwrap();
    hub.run(&sandbox, "org/name", &[]).ok();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        assert!(new.join(file).exists(), "{file}");
    }
    // With nobody to ask, what the cache has of the branch is not mixed with another commit.
    std::fs::write(folder.join("refs/main"), &a).unwrap();
    hub.endpoint = "http://127.0.0.1:9".into();
    let outcome = hub.run(&sandbox, "org/name", &[]);
    outcome.fails(1, &["org/name", "model.safetensors", "not in the cache"]);
}

#[test]
fn cache_and_token_are_found_as_huggingface_hub_finds_them() {
    let sandbox = Sandbox::new();
    let cache = sandbox.path("elsewhere").display().to_string();
    let token = sandbox.path("saved").display().to_string();
    std::fs::write(&token, "hf_saved\n").unwrap();
    for (variables, sent) in [
        (vec![("HF_TOKEN", "hf_abc\n")], Some("Bearer hf_abc")),
        (vec![("HF_TOKEN", " hf_abc ")], Some("Bearer hf_abc")),
        (
            vec![("HF_TOKEN", ""), ("HUGGING_FACE_HUB_TOKEN", "hf_old")],
            Some("Bearer hf_old"),
        ),
        (
            vec![("HF_TOKEN", ""), ("HF_TOKEN_PATH", &token)],
            Some("Bearer hf_saved"),
        ),
        (
            vec![
                ("HF_TOKEN_PATH", &token),
                ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
            ],
            None,
        ),
    ] {
        let hub = Hub::start();
        let mut variables = variables;
        // What transformers calls it counts before what the hub's own library does.
        let (name, other) = match variables.len() {
            1 => ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"),
            _ => ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
        };
        variables.extend([(name, &*cache), (other, "/nowhere")]);
        hub.run(&sandbox, "org/name", &variables).ok();
        for request in hub.requests.lock().unwrap().iter() {
            let found = request.headers.get("authorization").map(String::as_str);
            assert_eq!(found, sent, "{variables:?}");
        }
        assert!(
            Path::new(&cache)
                .join("models--org--name/refs/main")
                .exists()
        );
        std::fs::remove_dir_all(&cache).unwrap();
    }
}

#[test]
fn the_token_is_sent_to_the_hub() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    hub.run(&sandbox, "org/name", &[("HF_TOKEN", "hf_secret")])
        .ok();
    for request in hub.requests.lock().unwrap().iter() {
        let sent = request.headers.get("authorization").map(String::as_str);
        assert_eq!(sent, Some("Bearer hf_secret"), "{request:?}");
    }
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    hub.run(&sandbox, "org/name", &[]).ok();
    let requests = hub.requests.lock().unwrap();
    assert!(
        requests
            .iter()
            .all(|r| !r.headers.contains_key("authorization"))
    );
}

#[test]
fn a_plan_of_a_hub_model_fetches_no_weights() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    let mut command = sandbox.command(&["plan", "--model", "org/name", "--ctx", "1k"]);
    command
        .env("HF_HOME", sandbox.path("hf"))
        .env("HF_ENDPOINT", &hub.endpoint);
    let outcome = finish(&mut command).ok();
    assert!(outcome.stderr.contains("planned from config.json alone"));
    assert!(!hub.paths().iter().any(|path| path.contains("safetensors")));
}

#[test]
fn pull_says_the_size_first_goes_on_where_it_was_and_leaves_the_model_to_every_verb() {
    let (sandbox, hub) = (Sandbox::new(), Hub::start());
    let pull = |flags: &[&str]| {
        let mut command = sandbox.command(&[&["pull", "--json"], flags].concat());
        command
            .env("HF_HOME", sandbox.path("hf"))
            .env("HF_ENDPOINT", &hub.endpoint);
        finish(&mut command)
    };
    let weights = std::fs::read(small_model().join("model.safetensors")).unwrap();
    let dry = pull(&["org/name", "--dry-run"]).ok();
    assert!(
        dry.stderr.contains("244.7 KiB of weights in 1 file; "),
        "{}",
        dry.stderr
    );
    assert!(dry.stderr.contains(" free in "), "{}", dry.stderr);
    assert_eq!(dry.json()["bytes"], weights.len());
    assert_eq!(dry.json()["here_bytes"], 0);

    // What an interrupted download leaves behind.
    let part = format!("{FOLDER}/blobs/etag-of-model.part");
    sandbox.write(&part, &weights[..100_000]);
    let requests = hub.paths().len();
    let pulled = pull(&["org/name"]).ok();
    assert!(
        pulled.stderr.contains("97.7 KiB of it here"),
        "{}",
        pulled.stderr
    );
    let folder = sandbox.path(&format!("{FOLDER}/snapshots/{COMMIT}"));
    assert_eq!(pulled.json()["folder"], folder.to_str().unwrap());
    assert_eq!(
        std::fs::read(folder.join("model.safetensors")).unwrap(),
        weights
    );
    let large = hub.requests.lock().unwrap().split_off(requests);
    let ranges = large.iter().filter(|r| r.path.starts_with("/large/"));
    let ranges: Vec<&String> = ranges.filter_map(|r| r.headers.get("range")).collect();
    assert!(
        ranges.iter().any(|range| *range == "bytes=100000-"),
        "{ranges:?}"
    );
    assert!(
        !ranges.iter().any(|range| *range == "bytes=0-"),
        "{ranges:?}"
    );

    let offline = hub.run(&sandbox, "org/name", &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(
        offline.ok().json()["token_ids"],
        token_ids_of_folder(&sandbox)
    );
    let again = pull(&["org/name"]).ok();
    assert!(again.stderr.contains("all of it here"), "{}", again.stderr);
    pull(&["org/nothing"]).fails(1, &["org/nothing", "not found on the hub"]);
    pull(&["tiny"]).fails(2, &["is on this machine"]);
}
