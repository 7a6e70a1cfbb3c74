//! Who may use the server, who leaves, who waits, and how it ends.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use moectl::server::guard::Keys;
use serde_json::{Value, json};

use crate::client::{TestServer, read_response, reply, scripted, scripted_with_queue, user};

/// Answers that take longer than any test.
fn slow() -> Value {
    json!({ "rules": [{ "reply": "word ".repeat(2000) }], "token_ms": 20 })
}

fn chat(stream: bool) -> Vec<u8> {
    json!({ "messages": user("Hi"), "stream": stream })
        .to_string()
        .into_bytes()
}

const CHAT: &str = "/v1/chat/completions";
const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_client_that_leaves_in_any_way_ends_its_request() {
    let server = scripted(slow(), |_| {});
    for stream in [true, false] {
        // FIN after closing, a half-close, and RST because data was left unread.
        for way in ["close", "half-close", "reset"] {
            let mut connection = server.send("POST", CHAT, &[], &chat(stream));
            server.wait_for_load(1, 0);
            if stream {
                let mut some = [0; 256];
                connection.read_exact(&mut some).unwrap();
            }
            match way {
                "half-close" => connection.shutdown(Shutdown::Write).unwrap(),
                "reset" => std::thread::sleep(Duration::from_millis(100)),
                _ => connection.shutdown(Shutdown::Both).unwrap(),
            }
            let kept = (way == "half-close").then_some(connection);
            server.wait_until_idle(SOON);
            drop(kept);
        }
    }
}

#[test]
fn a_request_that_is_left_while_it_waits_or_is_prefilled_is_forgotten() {
    let script = json!({ "rules": [{ "reply": "word" }], "prefill_ms": 60000 });
    let server = scripted(script, |_| {});
    let first = server.send("POST", CHAT, &[], &chat(true));
    server.wait_for_load(1, 0);
    let second = server.send("POST", CHAT, &[], &chat(false));
    server.wait_for_load(1, 1);
    drop(second);
    server.wait_for_load(1, 0);
    drop(first);
    server.wait_until_idle(SOON);
}

#[test]
fn a_full_queue_says_when_to_come_again_and_forgets_nobody() {
    let server = scripted_with_queue(slow(), 1, |_| {});
    let running = server.send("POST", CHAT, &[], &chat(true));
    server.wait_for_load(1, 0);
    let waiting = server.send("POST", CHAT, &[], &chat(true));
    server.wait_for_load(1, 1);
    let refused = server.request("POST", CHAT, &[], &chat(true));
    assert_eq!(refused.status, 429);
    assert!(
        refused
            .header("retry-after")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            >= 1
    );
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    drop(running);
    server.wait_for_load(1, 0);
    drop(waiting);
    server.wait_until_idle(SOON);
}

#[test]
fn pings_come_while_nothing_else_does() {
    let script = json!({ "rules": [{ "reply": "word" }], "prefill_ms": 400 });
    let server = scripted(script, |options| {
        options.limits.ping_time = Duration::from_millis(50);
    });
    let response = server.request("POST", CHAT, &[], &chat(true));
    let text = String::from_utf8(response.body).unwrap();
    assert!(text.matches(": ping\n\n").count() >= 3, "{text}");
    let body = json!({ "messages": user("Hi"), "max_tokens": 9, "stream": true });
    let response = server.post("/v1/messages", &body);
    let text = String::from_utf8(response.body).unwrap();
    assert!(text.matches("event: ping\n").count() >= 3, "{text}");
}

#[test]
fn an_asked_end_waits_for_what_is_in_work_and_takes_nothing_more() {
    let script = json!({ "rules": [{ "reply": "one two three four five" }], "token_ms": 50 });
    let server = scripted(script, |_| {});
    let answered = server.send("POST", CHAT, &[], &chat(true));
    let queued = server.send("POST", CHAT, &[], &chat(false));
    server.wait_for_load(1, 1);
    let address = server.address;
    server.ask_to_end();
    let text = String::from_utf8(read_response(answered).body).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let whole = read_response(queued).json();
    assert_eq!(
        whole["choices"][0]["message"]["content"],
        "one two three four five"
    );
    drop(server);
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn an_end_does_not_wait_for_ever() {
    let server = scripted(slow(), |options| {
        options.limits.drain_time = Duration::from_millis(200);
    });
    let left = server.send("POST", CHAT, &[], &chat(true));
    server.wait_for_load(1, 0);
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(left);
}

#[test]
fn keys_open_everything_but_health_and_the_page() {
    let server = scripted(reply("x"), |options| {
        options.keys = Keys::new(["one".to_owned(), "two".to_owned()]);
    });
    let ask = |headers: &[(&str, &str)]| server.request("POST", CHAT, headers, &chat(false)).status;
    assert_eq!(ask(&[("authorization", "Bearer one")]), 200);
    assert_eq!(ask(&[("Authorization", "bearer two")]), 200);
    assert_eq!(ask(&[("x-api-key", "two")]), 200);
    for headers in [
        vec![],
        vec![("authorization", "Bearer three")],
        vec![("authorization", "one")],
        vec![("x-api-key", "")],
        vec![("authorization", "Bearer ö")],
    ] {
        assert_eq!(ask(&headers), 401, "{headers:?}");
    }
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.get("/metrics").status, 401);
    let error = server.get("/v1/models").json();
    assert_eq!(error["error"]["code"], "invalid_api_key");
    assert_eq!(
        server.get("/v1/messages").json()["error"]["type"],
        "authentication_error"
    );
}

#[test]
fn other_names_and_other_pages_are_refused_unless_listed() {
    let server = scripted(reply("x"), |options| {
        options.origins.cors = vec!["https://chat.example".into()];
        options.origins.hosts = vec!["box.example".into()];
    });
    let status =
        |headers: &[(&str, &str)]| server.request("GET", "/v1/models", headers, &[]).status;
    assert_eq!(status(&[("host", "evil.example")]), 403);
    assert_eq!(status(&[("host", "box.example:8080")]), 200);
    assert_eq!(status(&[("origin", "https://evil.example")]), 403);
    assert_eq!(status(&[("origin", "null")]), 403);
    let listed = [("origin", "https://chat.example")];
    let response = server.request("GET", "/v1/models", &listed, &[]);
    assert_eq!(
        response.header("access-control-allow-origin"),
        Some("https://chat.example")
    );
    let preflight = [
        ("origin", "https://chat.example"),
        ("access-control-request-method", "POST"),
    ];
    let response = server.request("OPTIONS", CHAT, &preflight, &[]);
    assert_eq!(response.status, 204);
    let allowed = response.header("access-control-allow-headers").unwrap();
    assert!(allowed.contains("authorization"));
}

#[test]
fn another_model_is_refused_only_if_that_is_asked_for() {
    let body = json!({ "messages": user("Hi"), "model": "gpt-x" });
    let server = scripted(reply("x"), |_| {});
    assert_eq!(server.ask(CHAT, &body)["model"], "gpt-x");
    let strict = scripted(reply("x"), |options| options.strict_model = true);
    let refused = strict.post(CHAT, &body);
    assert_eq!(refused.status, 404);
    assert_eq!(refused.json()["error"]["code"], "model_not_found");
}

#[test]
fn owners_take_turns_in_the_queue() {
    let script = json!({ "rules": [{ "reply": "a b c" }], "token_ms": 30 });
    let server = scripted(script, |options| {
        options.keys = Keys::new(["one".to_owned(), "two".to_owned()]);
    });
    let send = |key: &str| {
        let headers = [("x-api-key", key)];
        server.send("POST", CHAT, &headers, &chat(false))
    };
    // The first is in work; two of one owner wait before one of another.
    let first = send("one");
    server.wait_for_load(1, 0);
    let second = send("one");
    server.wait_for_load(1, 1);
    let third = send("one");
    server.wait_for_load(1, 2);
    let other = send("two");
    server.wait_for_load(1, 3);
    let ended = |connection| {
        read_response(connection);
        Instant::now()
    };
    let threads = [first, second, third, other].map(|c| std::thread::spawn(move || ended(c)));
    let times = threads.map(|thread| thread.join().unwrap());
    assert!(times[3] < times[1] && times[1] < times[2], "{times:?}");
}

#[test]
fn a_reader_that_takes_nothing_stops_nobody_and_is_cut_off() {
    let server = scripted(
        json!({ "rules": [
        { "contains": ["Long"], "reply": "w ".repeat(100_000) }, { "reply": "short" } ] }),
        |options| {
            options.limits.connections.stall_time = Duration::from_millis(300);
        },
    );
    let long = json!({ "messages": user("Long"), "stream": true, "logprobs": false });
    let stalled = server.send("POST", CHAT, &[], long.to_string().as_bytes());
    let answer = server.ask(CHAT, &json!({ "messages": user("Hi") }));
    assert_eq!(answer["choices"][0]["message"]["content"], "short");
    server.wait_until_idle(Duration::from_secs(20));
    drop(stalled);
}

fn raw(server: &TestServer, bytes: &[u8]) -> String {
    let mut connection = server.connect();
    let _ = connection.write_all(bytes);
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn slow_and_huge_heads_are_cut_off() {
    let server = scripted(reply("x"), |options| {
        options.limits.connections.header_time = Duration::from_millis(200);
        options.limits.body_time = Duration::from_millis(200);
    });
    let start = Instant::now();
    raw(
        &server,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
    );
    assert!(start.elapsed() < SOON);
    let huge = format!(
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    let answer = raw(&server, huge.as_bytes());
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    let many = format!(
        "GET /health HTTP/1.1\r\nhost: localhost\r\n{}\r\n",
        "a: b\r\n".repeat(5000)
    );
    let answer = raw(&server, many.as_bytes());
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    let start = Instant::now();
    let slow_body = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{";
    let answer = raw(&server, slow_body.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(start.elapsed() < SOON);
    assert_eq!(server.get("/health").status, 200);
}
