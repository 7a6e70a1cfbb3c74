//! The parsers of requests under requests that are nearly right: real ones, with parts of them changed,
//! left out, doubled or taken from another. Nothing may be a server's error, hang, or end a connection.
//!
//! `MOECTL_FUZZ_SECONDS=600 cargo test --release --test serve fuzz -- --ignored` for ten minutes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::client::{TestServer, reply, scripted};

/// Requests as clients send them, with their paths.
fn seeds() -> Vec<(&'static str, Value)> {
    let tool = json!({ "type": "function", "function": { "name": "look", "description": "Looks", "strict": true, "parameters": {
        "type": "object", "required": ["at"], "additionalProperties": false, "properties": {
            "at": { "type": "string", "pattern": "^[a-z]{1,9}$", "maxLength": 9 },
            "how": { "anyOf": [{ "type": "null" }, { "enum": ["far", "near", 3] }] },
            "list": { "type": "array", "items": { "$ref": "#/$defs/n" }, "minItems": 1, "maxItems": 4 } },
        "$defs": { "n": { "type": "number", "minimum": -1.5, "exclusiveMaximum": 10, "multipleOf": 0.5 } } } } });
    let call = json!({ "id": "call_1", "type": "function", "function": { "name": "look", "arguments": "{\"at\":\"sky\"}" } });
    let flat = json!({ "type": "function", "name": "look", "parameters": tool["function"]["parameters"], "strict": true });
    let claude_tool = json!({ "name": "look", "input_schema": tool["function"]["parameters"] });
    vec![
        (
            "/v1/chat/completions",
            json!({ "model": "tiny", "messages": [
            { "role": "system", "content": "Short." }, { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
            { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "call_1", "content": "blue" }, { "role": "developer", "content": "x" } ],
            "tools": [tool], "tool_choice": { "type": "function", "function": { "name": "look" } }, "parallel_tool_calls": false,
            "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 7, "stop": ["\n", "x"],
            "logprobs": true, "top_logprobs": 2, "logit_bias": { "5": -1.5 }, "frequency_penalty": 0.1, "presence_penalty": 0.1,
            "chat_template_kwargs": { "enable_thinking": false }, "reasoning_effort": "low", "moectl": { "routing": true } }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "stream": true, "max_completion_tokens": 2,
            "stream_options": { "include_usage": true }, "return_token_ids": true, "response_format": { "type": "json_schema",
                "json_schema": { "name": "x", "strict": true, "schema": tool["function"]["parameters"] } } }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": ["Hi", [1, 2, 3]], "max_tokens": 2, "echo": true, "logprobs": 2, "best_of": 1, "suffix": "",
            "guided_choice": ["a", "b.c"], "structured_outputs": { "regex": "[a-z]+" }, "stream": false }),
        ),
        (
            "/v1/responses",
            json!({ "instructions": "Short.", "input": [
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
            { "type": "function_call", "call_id": "c", "name": "look", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c", "output": "blue" },
            { "type": "reasoning", "id": "r", "summary": [], "encrypted_content": null } ],
            "tools": [flat, { "type": "web_search" }, { "type": "namespace", "name": "n", "tools": [] }], "tool_choice": "auto",
            "text": { "format": { "type": "json_object" } }, "reasoning": { "effort": "low" }, "max_output_tokens": 3, "store": false,
            "include": ["reasoning.encrypted_content"], "metadata": { "a": "b" }, "stream": true }),
        ),
        (
            "/v1/messages",
            json!({ "system": [{ "type": "text", "text": "Short.", "cache_control": { "type": "ephemeral" } }], "messages": [
            { "role": "user", "content": "Hi" },
            { "role": "assistant", "content": [{ "type": "thinking", "thinking": "hm", "signature": "" }, { "type": "tool_use", "id": "t", "name": "look", "input": { "at": "sky" } }] },
            { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t", "content": [{ "type": "text", "text": "blue" }], "is_error": false }] } ],
            "tools": [claude_tool], "tool_choice": { "type": "any", "disable_parallel_tool_use": true }, "thinking": { "type": "enabled", "budget_tokens": 1024 },
            "max_tokens": 3, "stop_sequences": ["x"], "temperature": 1, "top_k": 3, "metadata": { "user_id": "u" }, "stream": true }),
        ),
        (
            "/v1/messages/count_tokens",
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "system": "x" }),
        ),
        (
            "/tokenize",
            json!({ "content": "Hi <|im_end|>", "with_pieces": true, "add_special": true }),
        ),
        ("/detokenize", json!({ "tokens": [1, 2, 3] })),
        (
            "/apply-template",
            json!({ "messages": [{ "role": "user", "content": "Hi" }], "tools": [tool] }),
        ),
        ("/moectl/policy", json!({ "policy": "lru" })),
        ("/moectl/budget", json!({ "vram": "10G" })),
    ]
}

/// Values that break careless readers.
fn odd(rng: &mut ChaCha8Rng) -> Value {
    let long = "ab".repeat(rng.random_range(0..3000));
    let mut values = vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(-1),
        json!(1),
        json!(2.5),
        json!(1e308),
        json!(-1e-308),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!(long),
        json!("\u{0}\u{fdd0}\u{fffd}\u{202e}<|im_start|><tool_call>"),
        json!("é".repeat(9)),
        json!("$ref"),
        json!("#/$defs/n"),
        json!("(a|b)*c{2,9}"),
        json!("["),
        json!([]),
        json!({}),
        json!([[]]),
        json!({ "": null }),
        json!({ "type": "object" }),
        json!({ "$ref": "#" }),
        json!("function"),
        json!("text"),
    ];
    let mut deep = json!(1);
    for _ in 0..rng.random_range(0..90) {
        deep = if rng.random() {
            json!([deep])
        } else {
            json!({ "a": deep })
        };
    }
    values.push(deep);
    values.swap_remove(rng.random_range(0..values.len()))
}

/// Any value inside `value`, itself included.
fn inside<'a>(value: &'a mut Value, rng: &mut ChaCha8Rng) -> &'a mut Value {
    let children = match value {
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if children == 0 || rng.random_range(0..4) == 0 {
        return value;
    }
    let at = rng.random_range(0..children);
    let child = match value {
        Value::Array(items) => items.get_mut(at),
        Value::Object(map) => map.values_mut().nth(at),
        _ => None,
    };
    inside(child.expect("is counted"), rng)
}

fn mutate(value: &mut Value, other: &Value, rng: &mut ChaCha8Rng) {
    let mut donor = other.clone();
    let taken = inside(&mut donor, rng).take();
    let new = if rng.random() { odd(rng) } else { taken };
    let place = inside(value, rng);
    match (place, rng.random_range(0..5)) {
        (Value::Object(map), 0) => remove(map, rng),
        (Value::Object(map), 1) => {
            let key =
                ["type", "role", "content", "name", "", "$ref", "items"][rng.random_range(0..7)];
            map.insert(key.into(), new);
        }
        (Value::Array(items), 0) if !items.is_empty() => {
            items.remove(rng.random_range(0..items.len()));
        }
        (Value::Array(items), 1) => {
            let copies = rng.random_range(1..40);
            items.extend(std::iter::repeat_n(new, copies));
        }
        (place, _) => *place = new,
    }
}

fn remove(map: &mut Map<String, Value>, rng: &mut ChaCha8Rng) {
    if !map.is_empty() {
        let key = map.keys().nth(rng.random_range(0..map.len())).cloned();
        key.and_then(|key| map.remove(&key));
    }
}

/// The next request: mostly JSON, now and then not quite.
fn draw(seeds: &[(&'static str, Value)], rng: &mut ChaCha8Rng) -> (&'static str, Vec<u8>) {
    let (path, mut body) = seeds[rng.random_range(0..seeds.len())].clone();
    for _ in 0..rng.random_range(1..5) {
        let other = &seeds[rng.random_range(0..seeds.len())].1;
        mutate(&mut body, other, rng);
    }
    let mut bytes = body.to_string().into_bytes();
    match rng.random_range(0..20) {
        0 => bytes.truncate(rng.random_range(0..bytes.len())),
        1 => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        _ => {}
    }
    (path, bytes)
}

/// A connection that is kept.
struct Kept {
    reader: BufReader<TcpStream>,
    host: String,
}

impl Kept {
    fn new(server: &TestServer) -> Self {
        let stream = server.connect();
        stream.set_nodelay(true).unwrap();
        Kept {
            reader: BufReader::new(stream),
            host: server.address.to_string(),
        }
    }

    /// Status and body of the answer.
    ///
    /// # Errors
    /// If the connection ends without one.
    fn ask(&mut self, path: &str, body: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\nx-api-key: k\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        let request = [head.as_bytes(), body].concat();
        self.reader.get_mut().write_all(&request)?;
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let mut length = None;
        loop {
            line.clear();
            self.reader.read_line(&mut line)?;
            if line.len() <= 2 {
                break;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse::<usize>().ok();
            }
        }
        let mut answer = Vec::new();
        loop {
            let size = match length {
                Some(size) => size,
                None => {
                    line.clear();
                    self.reader.read_line(&mut line)?;
                    usize::from_str_radix(line.trim(), 16)
                        .map_err(|_| std::io::ErrorKind::InvalidData)?
                }
            };
            let end = if length.is_some() { size } else { size + 2 };
            let mut part = vec![0; end];
            self.reader.read_exact(&mut part)?;
            answer.extend_from_slice(&part[..size]);
            if size == 0 || length.is_some() {
                return Ok((status, answer));
            }
        }
    }
}

/// Sends drawn requests for so long; how many.
fn fuzz(seed: u64, time: Duration) -> u64 {
    let server = scripted(reply("x {\"at\": \"sky\"}"), |options| {
        options.keys = moectl::server::guard::Keys::new(["k".to_owned()]);
    });
    let (seeds, mut rng) = (seeds(), ChaCha8Rng::seed_from_u64(seed));
    let mut connection = Kept::new(&server);
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed() < time {
        let (path, body) = draw(&seeds, &mut rng);
        let asked = Instant::now();
        let answer = connection.ask(path, &body);
        let shown = String::from_utf8_lossy(&body);
        let (status, answer) = answer.unwrap_or_else(|error| panic!("{error}: {path} {shown}"));
        let answer = String::from_utf8_lossy(&answer);
        assert!(status < 500, "{status}: {path} {shown}\n{answer}");
        assert!(
            status == 200 || answer.contains("\"error\""),
            "{path} {shown}\n{answer}"
        );
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}: {path} {shown}");
        sent += 1;
    }
    sent
}

#[test]
fn requests_that_are_nearly_right_are_answered_or_refused() {
    let sent = fuzz(1, Duration::from_secs(3));
    assert!(sent > 20, "{sent} requests");
}

#[test]
#[ignore = "takes minutes: MOECTL_FUZZ_SECONDS"]
fn requests_that_are_nearly_right_are_answered_or_refused_for_minutes() {
    let variable = |name: &str| std::env::var(name).ok()?.parse().ok();
    let seconds = variable("MOECTL_FUZZ_SECONDS").unwrap_or(600);
    let seed = variable("MOECTL_FUZZ_SEED").unwrap_or(2);
    let sent = fuzz(seed, Duration::from_secs(seconds));
    println!("{sent} requests in {seconds} s, seed {seed}");
}
