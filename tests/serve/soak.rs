//! Many clients at once, some of which leave, stall or send nonsense; then an end with all of them in
//! work. `scripts/conformance/soak.py` does the same for minutes, and watches the memory.

use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Response, TestServer, built_in_service_with_queue, events, read_response};

const COMPLETIONS: &str = "/v1/completions";
const CLIENTS: u64 = 16;
const ACTIONS: usize = 5;

fn body(prompt: usize, stream: bool) -> Value {
    json!({
        "prompt": format!("The number {prompt} is"), "max_tokens": 6, "temperature": 0,
        "ignore_eos": true, "stream": stream,
    })
}

fn send(server: &TestServer, body: &Value) -> TcpStream {
    server.send("POST", COMPLETIONS, &[], body.to_string().as_bytes())
}

fn text(response: &Response, stream: bool) -> String {
    let sent = String::from_utf8_lossy(&response.body);
    assert_eq!(response.status, 200, "{sent}");
    if !stream {
        return response.json()["choices"][0]["text"]
            .as_str()
            .unwrap()
            .into();
    }
    let events = events(&sent);
    assert_eq!(events.last().unwrap().data, "[DONE]", "a whole stream");
    let texts = events[..events.len() - 1].iter().map(|event| {
        let text = &event.json()["choices"][0]["text"];
        text.as_str().unwrap().to_owned()
    });
    texts.collect()
}

/// One client: what it does is drawn from its number.
fn client(server: &TestServer, number: u64, expected: &[String]) {
    // A linear congruential generator, Knuth's constants.
    let mut state = number + 1;
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..ACTIONS {
        let (prompt, stream) = (draw(expected.len()), draw(2) == 0);
        match draw(10) {
            0 => {
                let left = send(server, &body(prompt, stream));
                std::thread::sleep(Duration::from_millis(draw(40) as u64));
                left.shutdown(Shutdown::Both).unwrap();
            }
            1 => {
                let mut stalled = send(server, &body(prompt, true));
                let mut some = [0; 16];
                stalled.read_exact(&mut some).unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
            2 => {
                let nonsense: [&[u8]; 4] = [
                    b"{",
                    b"\xff\xfe",
                    b"{\"prompt\": \"x\", \"n\": 1000000}",
                    &[b'['; 5000],
                ];
                let answer = server.request("POST", COMPLETIONS, &[], nonsense[draw(4)]);
                assert_eq!(answer.status, 400);
            }
            _ => {
                let response = read_response(send(server, &body(prompt, stream)));
                assert_eq!(text(&response, stream), expected[prompt]);
            }
        }
    }
}

/// The value of a metric, whatever its labels.
fn metric(server: &TestServer, name: &str) -> f64 {
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    let line = metrics
        .lines()
        .find(|line| line.starts_with(&format!("{name}{{")));
    let line = line.unwrap_or_else(|| panic!("{name}: {metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn whoever_leaves_stalls_or_sends_nonsense_changes_no_answer_and_nothing_is_left_behind() {
    let server = TestServer::start(built_in_service_with_queue(64), |_| {});
    let alone = |prompt| text(&server.post(COMPLETIONS, &body(prompt, false)), false);
    let expected: Vec<String> = (0..8).map(alone).collect();
    // Events of some kilobytes each, of which nobody takes any: its socket is full soon.
    let fat = json!({
        "messages": [{ "role": "user", "content": "Go on" }], "max_tokens": 1500, "ignore_eos": true,
        "stream": true, "logprobs": true, "top_logprobs": 20,
    });
    let unread = server.send(
        "POST",
        "/v1/chat/completions",
        &[],
        fat.to_string().as_bytes(),
    );
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || client(server, number, expected));
        }
    });
    drop(unread);
    server.wait_until_idle(Duration::from_secs(10));
    for gauge in ["vllm:num_requests_running", "vllm:num_requests_waiting"] {
        assert_eq!(metric(&server, gauge), 0.0, "{gauge}");
    }
    let begun: Vec<_> = (0..12)
        .map(|i| (i % expected.len(), i % 2 == 0))
        .map(|(prompt, stream)| (prompt, stream, send(&server, &body(prompt, stream))))
        .collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    let taken = || {
        let health = server.get("/health").json();
        let of = |name: &str| health[name].as_u64().unwrap();
        of("requests_running") + of("requests_waiting")
    };
    // Some may be answered already, and then were taken.
    while taken() < 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(100));
    server.ask_to_end();
    for (prompt, stream, connection) in begun {
        let response = read_response(connection);
        assert_eq!(text(&response, stream), expected[prompt], "none is lost");
    }
}
