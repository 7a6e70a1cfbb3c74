//! Chat and completions with the built-in model.

use serde_json::{Value, json};

use crate::client::{built_in, user};

const QUESTION: &str = "What is the meaning of the noun \"river\"?";

fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn a_streamed_answer_is_the_whole_one_in_pieces() {
    let server = built_in();
    let mut body = json!({ "messages": user(QUESTION), "temperature": 0, "max_tokens": 24, "ignore_eos": true });
    let whole = server.ask("/v1/chat/completions", &body);
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["refusal"], Value::Null);
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    assert_eq!(whole["timings"]["predicted_n"], 24);
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let events = server.stream("/v1/chat/completions", &body);
    assert_eq!(events.last().unwrap().data, "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|e| e.json())
        .collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    for chunk in &chunks {
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["created"], chunks[0]["created"]);
        assert_eq!(chunk["object"], "chat.completion.chunk");
    }
    let (usage, deltas) = chunks.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 24);
    assert!(deltas.iter().all(|chunk| chunk["usage"] == Value::Null));
    let last = deltas.last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    let pieces = deltas
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), content(&whole));
}

#[test]
fn equal_seeds_draw_equal_answers_and_choices_differ() {
    let server = built_in();
    let body = json!({
        "messages": user(QUESTION), "temperature": 1.5, "top_k": 0, "top_p": 1, "max_tokens": 16, "seed": 7, "n": 2,
    });
    let first = server.ask("/v1/chat/completions", &body);
    let second = server.ask("/v1/chat/completions", &body);
    assert_eq!(first["choices"], second["choices"]);
    let choices = first["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_ne!(choices[0]["message"], choices[1]["message"]);
    assert_eq!(first["usage"]["completion_tokens"], 32);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let server = built_in();
    let greedy =
        json!({ "prompt": QUESTION, "temperature": 0, "max_tokens": 24, "ignore_eos": true });
    let answer = server.ask("/v1/completions", &greedy);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let before = text.split(&stop).next().unwrap();
    for form in [json!(stop), json!([stop, "never written"])] {
        let mut body = greedy.clone();
        body["stop"] = form;
        let choice = server.ask("/v1/completions", &body)["choices"][0].clone();
        assert_eq!(choice["text"], before);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[test]
fn logprobs_rate_the_chosen_token_and_the_best_ones() {
    let server = built_in();
    let body = json!({
        "messages": user(QUESTION), "temperature": 0, "max_tokens": 4, "logprobs": true, "top_logprobs": 3,
    });
    let answer = server.ask("/v1/chat/completions", &body);
    let tokens = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(tokens.len(), 4);
    let mut bytes: Vec<u8> = Vec::new();
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy takes the best.
        assert_eq!(top[0]["bytes"], token["bytes"]);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        bytes.extend(
            token["bytes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|b| b.as_u64().unwrap() as u8),
        );
    }
    assert_eq!(String::from_utf8_lossy(&bytes), content(&answer));
    let body = json!({ "prompt": "def f(", "temperature": 0, "max_tokens": 3, "logprobs": 2 });
    let logprobs = server.ask("/v1/completions", &body)["choices"][0]["logprobs"].clone();
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().unwrap().len(), 3, "{field}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
}

#[test]
fn a_bias_forbids_a_token_and_forces_another() {
    let server = built_in();
    let body =
        json!({ "prompt": "a", "temperature": 0, "max_tokens": 3, "return_token_ids": true });
    let free = server.ask("/v1/completions", &body)["choices"][0]["token_ids"].clone();
    let first = free[0].as_u64().unwrap();
    let mut forced = body.clone();
    forced["logit_bias"] = json!({ "300": 100 });
    let ids = server.ask("/v1/completions", &forced)["choices"][0]["token_ids"].clone();
    assert_eq!(ids, json!([300, 300, 300]));
    let mut forbidden = body;
    forbidden["logit_bias"] = json!({ first.to_string(): -100 });
    let ids = server.ask("/v1/completions", &forbidden)["choices"][0]["token_ids"].clone();
    assert_ne!(ids[0].as_u64(), Some(first));
}

#[test]
fn a_prompt_that_goes_on_from_the_last_answer_computes_only_the_rest() {
    // Ids, so that the answer's text need not encode to the same tokens again.
    let server = crate::client::TestServer::start(crate::client::built_in_service(), |_| {});
    let prompt: Vec<u64> = (100..180).collect();
    let body =
        json!({ "prompt": prompt, "temperature": 0, "max_tokens": 4, "return_token_ids": true });
    let first = server.ask("/v1/completions", &body);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let answer = first["choices"][0]["token_ids"].as_array().unwrap().iter();
    let mut longer = prompt.clone();
    longer.extend(answer.map(|id| id.as_u64().unwrap()));
    longer.push(200);
    let mut body = body;
    body["prompt"] = longer.into();
    let cached = server.ask("/v1/completions", &body);
    // The last generated token was never fed.
    assert_eq!(
        cached["usage"]["prompt_tokens_details"]["cached_tokens"],
        83
    );
    assert_eq!(cached["timings"]["cache_n"], 83);
    let again = server.ask("/v1/completions", &body);
    assert_eq!(again["choices"], cached["choices"]);
    let cold = built_in().ask("/v1/completions", &body);
    assert_eq!(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(cold["choices"], cached["choices"]);
}

#[test]
fn what_the_context_has_no_room_for_is_refused_and_a_long_answer_is_clamped() {
    let server = built_in();
    let long: Vec<u64> = (0..2048).map(|i| 100 + i % 50).collect();
    let response = server.post("/v1/completions", &json!({ "prompt": long }));
    assert_eq!(response.status, 400);
    let error = &response.json()["error"];
    assert_eq!(error["type"], "exceed_context_size_error");
    assert_eq!(error["n_prompt_tokens"], 2048);
    assert_eq!(error["n_ctx"], 2048);
    let near = json!({ "prompt": &long[..2045], "max_tokens": 32000, "ignore_eos": true });
    let answer = server.ask("/v1/completions", &near);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_schema_is_followed_by_construction() {
    let server = built_in();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "kind": { "enum": ["fish", "bird"] },
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
    for seed in 0..3 {
        let body = json!({
            "messages": user("Invent an animal."), "response_format": format, "seed": seed, "max_tokens": 400,
        });
        let answer = server.ask("/v1/chat/completions", &body);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let animal: Value = serde_json::from_str(&content(&answer)).unwrap();
        assert!(animal["name"].as_str().unwrap().chars().count() <= 12);
        assert!((0..=120).contains(&animal["age"].as_i64().unwrap()));
        assert!(["fish", "bird"].contains(&animal["kind"].as_str().unwrap()));
    }
    let regex = json!({ "type": "regex", "pattern": "[0-9]{3}-[a-f]{2}" });
    let body = json!({ "messages": user("Code?"), "response_format": regex, "max_tokens": 50 });
    let code = content(&server.ask("/v1/chat/completions", &body));
    let (digits, letters) = code.split_once('-').unwrap();
    assert!(
        digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()),
        "{code}"
    );
    assert!(
        letters.len() == 2 && letters.bytes().all(|b| (b'a'..=b'f').contains(&b)),
        "{code}"
    );
    let choice =
        json!({ "messages": user("?"), "guided_choice": ["yes (a)", "no [b]"], "max_tokens": 50 });
    let chosen = content(&server.ask("/v1/chat/completions", &choice));
    assert!(["yes (a)", "no [b]"].contains(&chosen.as_str()), "{chosen}");
}

#[test]
fn a_required_call_is_a_valid_one_and_its_schema_is_kept() {
    let server = built_in();
    let tool = |name: &str, parameters: Value| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    let weather = json!({
        "type": "object",
        "properties": { "city": { "enum": ["Oslo", "Rome"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    // One schema that cannot be enforced does not break the other.
    let tools = json!([
        tool("weather", weather),
        tool(
            "odd",
            json!({ "type": "object", "not": { "type": "object" }, "properties": {} })
        ),
    ]);
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let body = json!({
        "messages": user("Weather?"), "tools": tools, "tool_choice": named, "max_tokens": 200, "seed": 3,
    });
    let answer = server.ask("/v1/chat/completions", &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "weather");
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()));
    assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()));
    let mut any = body;
    any["tool_choice"] = "required".into();
    any["tools"][0]["function"]["strict"] = true.into();
    let answer = server.ask("/v1/chat/completions", &any);
    assert!(
        answer["choices"][0]["message"]["tool_calls"].is_array(),
        "{answer}"
    );
}

#[test]
fn a_request_may_ask_for_its_own_routing() {
    let server = built_in();
    let body = json!({ "prompt": "one two", "max_tokens": 4, "ignore_eos": true, "moectl": { "routing": true } });
    let answer = server.ask("/v1/completions", &body);
    let layers = answer["moectl"]["routing"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 8);
    let tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap() + 3;
    for layer in layers {
        // The last generated token was never fed; each token picks eight experts.
        assert_eq!(layer["picks"].as_u64().unwrap() % 8, 0);
        assert!(layer["picks"].as_u64().unwrap() <= 8 * tokens);
        assert!(layer["entropy_bits"].as_f64().unwrap() <= 6.0);
    }
}
