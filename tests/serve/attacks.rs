//! What others' servers fell to: each is refused or harmless, never a crash, a 5xx or growth.

use serde_json::{Value, json};

use crate::client::{built_in, reply, scripted, user};

const CHAT: &str = "/v1/chat/completions";

/// The built-in model, with `fields` added to a small request.
fn chat(fields: Value) -> (u16, Value) {
    let mut body = json!({ "messages": user("Hi"), "max_tokens": 2 });
    let map = body.as_object_mut().unwrap();
    map.extend(fields.as_object().unwrap().clone());
    let response = built_in().post(CHAT, &body);
    (response.status, response.json())
}

/// Refused with 400 and the field's name.
fn refused(fields: Value) {
    let param = fields
        .as_object()
        .unwrap()
        .keys()
        .next_back()
        .unwrap()
        .clone();
    let (status, answer) = chat(fields);
    assert_eq!(status, 400, "{param}: {answer}");
    let named = answer["error"]["param"].as_str().unwrap();
    assert!(named.starts_with(&param), "{param}: {answer}");
    // The strict error object.
    for field in ["message", "type", "param", "code"] {
        assert!(answer["error"].get(field).is_some(), "{field}: {answer}");
    }
}

#[test]
fn huge_and_negative_counts_are_refused_or_clamped() {
    refused(json!({ "n": 1_000_000_000 }));
    refused(json!({ "n": -1 }));
    refused(json!({ "n": 0 }));
    refused(json!({ "best_of": 1_000_000_000 }));
    refused(json!({ "logprobs": true, "top_logprobs": 1_000_000 }));
    refused(json!({ "top_logprobs": -1 }));
    refused(json!({ "max_tokens": -2 }));
    refused(json!({ "max_tokens": 1.5 }));
    refused(json!({ "max_tokens": "many" }));
    refused(json!({ "stop": vec!["x"; 1_000_000] }));
    refused(json!({ "stop": "x".repeat(1 << 20) }));
    refused(json!({ "stop": [1, 2] }));
    refused(json!({ "temperature": -1 }));
    refused(json!({ "top_p": 2 }));
    refused(json!({ "top_k": -7 }));
    refused(json!({ "repetition_penalty": 0 }));
    for max_tokens in [
        json!(9_223_372_036_854_775_808u64),
        json!(1e300),
        json!(i64::MAX),
    ] {
        let (status, answer) = chat(json!({ "max_tokens": max_tokens, "stop": "e" }));
        assert_eq!(status, 200, "{answer}");
    }
    for seed in [json!(u64::MAX), json!(i64::MIN), json!(-1)] {
        assert_eq!(chat(json!({ "seed": seed })).0, 200);
    }
}

#[test]
fn a_bias_of_many_or_of_no_tokens_is_refused() {
    let many: serde_json::Map<String, Value> =
        (0..8000).map(|i| (i.to_string(), 1.into())).collect();
    refused(json!({ "logit_bias": many }));
    for key in ["-1", "99999999999999999999", "8192", "x", ""] {
        refused(json!({ "logit_bias": { key: 1 } }));
    }
    refused(json!({ "logit_bias": { "5": 1e9 } }));
    refused(json!({ "logit_bias": { "5": "x" } }));
}

#[test]
fn templates_and_their_inner_variables_are_not_for_clients() {
    refused(json!({ "chat_template": "{{ ''.__class__ }}" }));
    refused(json!({ "chat_template_kwargs": { "messages": [] } }));
    refused(json!({ "chat_template_kwargs": { "enable_thinking": "{{ x }}" } }));
    assert_eq!(
        chat(json!({ "chat_template_kwargs": { "enable_thinking": false } })).0,
        200
    );
}

#[test]
fn deep_json_is_refused_also_in_fields_that_are_ignored() {
    let server = built_in();
    for open in ["[", "{\"a\":"] {
        let deep = open.repeat(100_000);
        let body = format!("{{\"messages\": [], \"ignored\": {deep}");
        let response = server.request("POST", CHAT, &[], body.as_bytes());
        assert_eq!(response.status, 400);
    }
    for body in [
        "",
        "null",
        "[]",
        "{",
        "\"x\"",
        "{\"messages\": 1}",
        "\u{feff}{}",
        "{}\0",
    ] {
        let response = server.request("POST", CHAT, &[], body.as_bytes());
        assert_eq!(response.status, 400, "{body:?}");
    }
    let response = server.request("POST", CHAT, &[], b"{\"messages\": \"\xff\xfe\"}");
    assert_eq!(response.status, 400);
    let number = server.request("POST", CHAT, &[], b"{\"messages\": [], \"seed\": 1e999}");
    assert_eq!(number.status, 400);
}

fn schema(schema: Value) -> (u16, Value) {
    chat(
        json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } }),
    )
}

#[test]
fn schemas_that_cannot_be_enforced_are_refused() {
    let mut nested = json!({ "type": "string" });
    for _ in 0..40 {
        nested = json!({ "type": "object", "properties": { "a": nested } });
    }
    for (name, bad) in [
        ("nested", nested),
        ("number", json!(7)),
        ("unknown reference", json!({ "$ref": "#/$defs/none" })),
        ("file", json!({ "$ref": "file:///etc/passwd" })),
        ("remote", json!({ "$ref": "http://127.0.0.1:1/x" })),
        ("pattern", json!({ "type": "string", "pattern": "(" })),
        (
            "look-behind",
            json!({ "type": "string", "pattern": "(?<=a)b" }),
        ),
        (
            "impossible",
            json!({ "type": "integer", "minimum": 5, "maximum": 4 }),
        ),
        ("type", json!({ "type": "unheard-of" })),
    ] {
        let (status, answer) = schema(bad);
        assert_eq!(status, 400, "{name}: {answer}");
        assert_eq!(answer["error"]["param"], "response_format", "{name}");
    }
    refused(json!({ "response_format": { "type": "xml" } }));
    refused(json!({ "response_format": { "type": "regex", "pattern": "[" } }));
    refused(json!({ "grammar": "root ::= x" }));
}

#[test]
fn large_and_circular_schemas_end_in_time() {
    for large in [
        json!({ "type": "array", "items": { "type": "integer" }, "maxItems": u64::MAX }),
        json!({ "type": "string", "maxLength": 1_000_000 }),
        json!({ "type": "array", "items": {}, "minItems": 100_000 }),
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }),
        json!({ "$ref": "#/$defs/a", "$defs": { "a": { "type": "object", "properties": { "a": { "$ref": "#/$defs/a" } } } } }),
        json!({ "enum": (0..20_000).map(|i| i.to_string()).collect::<Vec<_>>() }),
    ] {
        let (status, answer) = schema(large);
        assert!(matches!(status, 200 | 400), "{status}: {answer}");
    }
    let pattern = "(a{1000}){1000}".repeat(20);
    let format = json!({ "type": "regex", "pattern": pattern });
    let (status, answer) = chat(json!({ "response_format": format }));
    assert!(matches!(status, 200 | 400), "{status}: {answer}");
}

#[test]
fn images_and_other_parts_are_refused_and_nothing_is_fetched() {
    for part in [
        json!({ "type": "image_url", "image_url": { "url": "file:///etc/passwd" } }),
        json!({ "type": "image_url", "image_url": { "url": "http://127.0.0.1:1/x" } }),
        json!({ "type": "input_audio", "input_audio": {} }),
        json!({ "type": "file", "file": { "file_id": "../../x" } }),
        json!({ "type": 5 }),
        json!(null),
    ] {
        let body = json!({ "messages": [{ "role": "user", "content": [part] }] });
        let response = built_in().post(CHAT, &body);
        assert_eq!(response.status, 400, "{part}");
    }
}

#[test]
fn bodies_that_are_packed_huge_or_of_another_type_are_refused() {
    let server = scripted(reply("x"), |options| options.limits.body_bytes = 1 << 16);
    let body = json!({ "messages": user("Hi") }).to_string();
    let status = |headers: &[(&str, &str)], body: &str| {
        server
            .request("POST", CHAT, headers, body.as_bytes())
            .status
    };
    assert_eq!(status(&[("content-encoding", "gzip")], &body), 415);
    assert_eq!(status(&[("content-type", "text/plain")], &body), 415);
    assert_eq!(
        status(
            &[("content-type", "application/x-www-form-urlencoded")],
            &body
        ),
        415
    );
    assert_eq!(
        status(
            &[("content-type", "application/json; charset=utf-8")],
            &body
        ),
        200
    );
    assert_eq!(
        status(&[], &format!("{{\"x\": \"{}\"}}", "y".repeat(1 << 17))),
        413
    );
}

#[test]
fn paths_and_names_reach_no_files() {
    let server = built_in();
    for path in [
        "/../../etc/passwd",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc",
        "//etc/passwd",
    ] {
        let response = server.get(path);
        assert!(
            matches!(response.status, 400 | 404),
            "{path}: {}",
            response.status
        );
    }
    let (status, answer) = chat(json!({ "model": "../../etc/passwd\r\nx-injected: 1" }));
    assert_eq!(status, 200);
    assert_eq!(answer["model"], "../../etc/passwd\r\nx-injected: 1");
    refused(json!({ "model": "x".repeat(100_000) }));
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(!metrics.contains("etc/passwd"));
}

#[test]
fn odd_conversations_are_answered_or_refused() {
    let server = built_in();
    for messages in [
        json!([]),
        json!([{}]),
        json!([{ "role": "wizard", "content": "x" }]),
        json!([{ "role": "user" }]),
        json!([{ "role": "user", "content": { "a": 1 } }]),
        json!([5]),
        json!([{ "role": "assistant", "tool_calls": [{ "function": {} }] }]),
    ] {
        let response = server.post(CHAT, &json!({ "messages": messages }));
        assert_eq!(response.status, 400, "{messages}");
    }
    for messages in [
        json!([{ "role": "assistant", "content": null }]),
        json!([{ "role": "tool", "content": "x", "tool_call_id": "no such" }]),
        json!([{ "role": "system", "content": "x" }, { "role": "developer", "content": "y" }]),
        json!([{ "role": "user", "content": "\u{fdd0}\u{0}\u{202e}" }]),
        json!([{ "role": "assistant", "content": "", "tool_calls": [
            { "id": "1", "type": "function", "function": { "name": "f", "arguments": "not json" } } ] }]),
    ] {
        let response = server.post(CHAT, &json!({ "messages": messages, "max_tokens": 1 }));
        assert_eq!(response.status, 200, "{messages}: {}", response.json());
    }
}

/// Values that a field may be given by somebody who means harm, or by mistake.
fn odd_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1.5),
        json!(1e308),
        json!(u64::MAX),
        json!(""),
        json!("\u{0}\u{fffd}<|im_end|>\r\n"),
        json!([]),
        json!([[], {}, null, 1]),
        json!({}),
        json!({ "type": "function", "name": "f", "function": {} }),
        json!({ "type": "json_schema", "schema": { "type": "object" }, "json_schema": {} }),
        json!([{ "type": "text" }]),
        json!([{ "role": "user", "content": "x", "type": "message" }]),
    ]
}

#[test]
fn no_combination_of_odd_fields_is_a_server_error() {
    let server = scripted(reply("x"), |_| {});
    let fields = [
        "messages",
        "prompt",
        "input",
        "model",
        "max_tokens",
        "max_output_tokens",
        "n",
        "stop",
        "seed",
        "stream",
        "tools",
        "tool_choice",
        "functions",
        "response_format",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "system",
        "instructions",
        "text",
        "reasoning",
        "thinking",
        "stop_sequences",
        "stream_options",
        "moectl",
        "content",
        "tokens",
        "with_pieces",
        "guided_json",
        "guided_choice",
        "structured_outputs",
        "chat_template_kwargs",
        "echo",
        "best_of",
        "modalities",
        "policy",
        "freeze",
        "parallel_tool_calls",
        "temperature",
    ];
    let paths = [
        CHAT,
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/moectl/policy",
        "/moectl/budget",
    ];
    let values = odd_values();
    let mut state = 1u64;
    // A linear congruential generator, Knuth's constants: the same requests on every run.
    let mut draw = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..800 {
        let mut body = json!({
            "messages": user("Hi"), "prompt": "x", "input": "x", "content": "x", "tokens": [1], "max_tokens": 3,
        });
        for _ in 0..1 + draw(3) {
            body[fields[draw(fields.len())]] = values[draw(values.len())].clone();
        }
        let path = paths[draw(paths.len())];
        let mut bytes = body.to_string().into_bytes();
        if draw(8) == 0 {
            bytes.truncate(draw(bytes.len()));
        } else if draw(8) == 0 {
            let at = draw(bytes.len());
            bytes[at] = draw(256) as u8;
        }
        let response = server.request("POST", path, &[], &bytes);
        let sent = String::from_utf8_lossy(&bytes).into_owned();
        assert!(response.status < 500, "{path} {sent}: {}", response.status);
        let answer = String::from_utf8_lossy(&response.body);
        assert!(
            response.status == 200 || answer.contains("error"),
            "{path} {sent}: {answer}"
        );
    }
}
