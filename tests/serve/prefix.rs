//! The second request of an agent: its long beginning is known, and only what is new is computed.

use serde_json::{Value, json};

use crate::client::{TestServer, built_in_service_of};

const PREFIX: usize = 30_000;

fn ids(count: usize, seed: usize) -> Vec<usize> {
    (0..count)
        .map(|i| (i * i * 7 + i * 13 + seed) % 3900 + 50)
        .collect()
}

fn ask(server: &TestServer, prompt: &[usize]) -> Value {
    let body = json!({
        "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "return_token_ids": true,
    });
    server.ask("/v1/completions", &body)
}

fn cached(answer: &Value) -> u64 {
    let details = &answer["usage"]["prompt_tokens_details"];
    details["cached_tokens"].as_u64().unwrap()
}

#[test]
fn behind_a_beginning_of_30_000_tokens_only_what_is_new_is_computed() {
    let server = TestServer::start(built_in_service_of(4, 1, 32 << 10), |_| {});
    let prefix = ids(PREFIX, 1);
    let first = ask(&server, &prefix);
    assert_eq!(cached(&first), 0);
    // The next turn: the answer, a tool's result.
    let answer = first["choices"][0]["token_ids"].as_array().unwrap().clone();
    let answer = answer.iter().map(|id| id.as_u64().unwrap() as usize);
    let next: Vec<usize> = prefix
        .iter()
        .copied()
        .chain(answer)
        .chain(ids(200, 5))
        .collect();
    let second = ask(&server, &next);
    // The answer's last token was told, and never fed.
    assert_eq!(cached(&second), PREFIX as u64 + 3);
    assert_eq!(second["timings"]["prompt_n"], 201);
    // Another way to go on from the same beginning.
    let other = ask(&server, &[prefix, ids(300, 9)].concat());
    assert_eq!(cached(&other), PREFIX as u64);
    let speed = |answer: &Value| answer["timings"]["prompt_ms"].as_f64().unwrap();
    assert!(speed(&second) < speed(&first) / 4.0, "{second}");
}
