//! Tool calls and reasoning as they stream, by scripts.

use serde_json::{Value, json};

use crate::client::{reply, scripted, user};

fn tools() -> Value {
    json!([{ "type": "function", "function": {
        "name": "write", "parameters": { "type": "object", "properties": { "text": { "type": "string" } } } } }])
}

#[test]
fn calls_stream_with_a_name_first_and_arguments_after_it() {
    let text = "<think>\nWhy?\n</think>\n\nNow.\n<tool_call>\n<function=write>\n<parameter=text>\na \"b\"\n</parameter>\n\
                </function>\n</tool_call>\n<tool_call>\n{\"name\": \"write\", \"arguments\": {\"text\": \"c\"}}\n</tool_call>";
    let server = scripted(reply(text), |_| {});
    let body = json!({ "messages": user("Go"), "tools": tools(), "stream": true });
    let events = server.stream("/v1/chat/completions", &body);
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|e| e.json())
        .collect();
    let deltas: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"])
        .collect();
    let text = |field: &str| {
        deltas
            .iter()
            .filter_map(|d| d[field].as_str())
            .collect::<String>()
    };
    assert_eq!(text("reasoning_content"), "Why?");
    assert_eq!(text("content"), "Now.");
    let calls: Vec<&Value> = deltas
        .iter()
        .filter_map(|d| d["tool_calls"].get(0))
        .collect();
    for index in 0..2 {
        let own: Vec<&&Value> = calls.iter().filter(|call| call["index"] == index).collect();
        assert_eq!(own[0]["function"]["name"], "write");
        assert_eq!(own[0]["type"], "function");
        assert!(own[0]["id"].as_str().unwrap().starts_with("call_"));
        assert!(own[1..].iter().all(|call| call["id"].is_null()));
        let arguments: String = own
            .iter()
            .filter_map(|c| c["function"]["arguments"].as_str())
            .collect();
        let written = ["a \"b\"", "c"][index];
        let expected = json!({ "text": written });
        assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), expected);
    }
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
}

#[test]
fn one_call_at_most_and_none_at_all_are_kept() {
    let call = "<tool_call>\n{\"name\": \"write\", \"arguments\": {}}\n</tool_call>\n";
    let server = scripted(reply(&call.repeat(2)), |_| {});
    let mut body =
        json!({ "messages": user("Go"), "tools": tools(), "parallel_tool_calls": false });
    let answer = server.ask("/v1/chat/completions", &body);
    assert_eq!(
        answer["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    body["tool_choice"] = "none".into();
    let answer = server.ask("/v1/chat/completions", &body);
    assert!(answer["choices"][0]["message"].get("tool_calls").is_none());
    assert!(
        answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .contains("<tool_call>")
    );
}

#[test]
fn results_and_earlier_calls_reach_the_model() {
    let server = scripted(
        json!({ "rules": [
            { "contains": ["<tool_response>\n42\n</tool_response>", "\"name\":\"write\""], "reply": "It is 42." },
            { "contains": ["write"], "reply": "<tool_call>\n{\"name\": \"write\", \"arguments\": {}}\n</tool_call>" },
        ] }),
        |_| {},
    );
    let mut messages = user("Go");
    let body = |messages: &Value| json!({ "messages": messages, "tools": tools() });
    let first = server.ask("/v1/chat/completions", &body(&messages));
    let message = first["choices"][0]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let list = messages.as_array_mut().unwrap();
    list.push(message);
    list.push(json!({ "role": "tool", "tool_call_id": id, "content": "42" }));
    let second = server.ask("/v1/chat/completions", &body(&messages));
    assert_eq!(second["choices"][0]["message"]["content"], "It is 42.");
    assert_eq!(second["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_call_for_no_tool_is_refused() {
    let server = scripted(reply("x"), |_| {});
    for choice in [
        json!("required"),
        json!({ "type": "function", "function": { "name": "none" } }),
        json!("x"),
    ] {
        let body = json!({ "messages": user("Go"), "tool_choice": choice });
        let response = server.post("/v1/chat/completions", &body);
        assert_eq!(response.status, 400);
        assert_eq!(response.json()["error"]["param"], "tool_choice");
    }
}
