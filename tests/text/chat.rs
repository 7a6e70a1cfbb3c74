use moectl::model::{ChatError, ChatTemplate, Message};
use serde_json::{Value, json};

use crate::{GOLDEN_MODELS, golden_model, golden_text, ids, json, read, tokenizer};

fn golden_template(name: &str) -> ChatTemplate {
    let config = read(&format!("{}/tokenizer_config.json", golden_model(name)));
    ChatTemplate::from_bytes(Some(&config), None)
        .unwrap()
        .unwrap()
}

fn from_source(template: &str) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::from_bytes(None, Some(template.as_bytes())).map(Option::unwrap)
}

fn hello() -> [Message; 1] {
    [Message::new("user", "hello")]
}

#[test]
fn conversations_render_as_in_transformers() {
    for name in GOLDEN_MODELS {
        let template = golden_template(name);
        let tokenizer = tokenizer(&golden_model(name));
        for case in golden_text(name)["chat"].as_array().unwrap() {
            let rendered = template
                .render(
                    case["messages"].as_array().unwrap(),
                    case.get("tools"),
                    case["add_generation_prompt"].as_bool().unwrap(),
                )
                .unwrap();
            assert_eq!(rendered, case["rendered"], "{name} {}", case["name"]);
            assert_eq!(tokenizer.encode(&rendered).unwrap(), ids(&case["ids"]));
        }
    }
}

#[test]
fn template_features_behave_as_in_transformers() {
    let config = read(&format!("{}/tokenizer_config.json", golden_model("tiny-a")));
    for case in json("tests/data/text/chat.json").as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let template = ChatTemplate::from_bytes(Some(&config), Some(source.as_bytes()))
            .unwrap()
            .unwrap();
        let tools = case.get("tools").filter(|tools| !tools.is_null());
        let result = template.render(case["messages"].as_array().unwrap(), tools, true);
        match (result, case.get("refused")) {
            (Ok(rendered), None) => assert_eq!(rendered, case["rendered"], "{}", case["name"]),
            (Err(ChatError::Refused { message }), Some(expected)) => assert_eq!(message, *expected),
            (result, _) => panic!("{}: {result:?}", case["name"]),
        }
    }
}

#[test]
fn the_built_in_model_renders_its_chat_prompt() {
    let config = read("workloads/tiny-moe/tokenizer_config.json");
    let template = ChatTemplate::from_bytes(Some(&config), None)
        .unwrap()
        .unwrap();
    let question = Message::new("user", "What is the meaning of the noun \"river\"?");
    let prompts = json("tests/data/text/tiny-moe-prompts.json");
    assert_eq!(
        template.render(&[question], None, true).unwrap(),
        prompts["chat"]["text"]
    );
}

/// As transformers 4.57.6 renders them, whatever the roles are.
#[test]
fn the_assistants_turn_is_opened_after_any_conversation_if_asked_for() {
    let config = read("workloads/tiny-moe/tokenizer_config.json");
    let template = ChatTemplate::from_bytes(Some(&config), None)
        .unwrap()
        .unwrap();
    for roles in [
        &[][..],
        &["system"],
        &["user"],
        &["assistant"],
        &["system", "user", "assistant"],
        &["system", "system"],
    ] {
        let messages: Vec<Message> = roles
            .iter()
            .map(|role| Message::new(*role, "Hi."))
            .collect();
        let turns: String = roles
            .iter()
            .map(|role| format!("<|im_start|>{role}\nHi.<|im_end|>\n"))
            .collect();
        for (open, end) in [(true, "<|im_start|>assistant\n"), (false, "")] {
            let rendered = template.render(&messages, None, open).unwrap();
            assert_eq!(rendered, format!("{turns}{end}"), "{roles:?}");
        }
    }
}

#[test]
fn a_separate_template_file_wins_over_the_config() {
    let config = br#"{"chat_template": "config", "eos_token": {"content": "<e>"}}"#;
    let template = ChatTemplate::from_bytes(Some(config), Some(b"file {{ eos_token }}"))
        .unwrap()
        .unwrap();
    assert_eq!(template.render(&hello(), None, true).unwrap(), "file <e>");
}

#[test]
fn named_templates_are_chosen_by_use() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]});
    let template = ChatTemplate::from_bytes(Some(config.to_string().as_bytes()), None)
        .unwrap()
        .unwrap();
    assert_eq!(template.render(&hello(), None, true).unwrap(), "plain");
    let tools = json!([{"type": "function"}]);
    let rendered = template.render(&hello(), Some(&tools), true).unwrap();
    assert_eq!(rendered, "with tools");
}

#[test]
fn a_base_model_has_no_template() {
    for config in [&b"{}"[..], br#"{"chat_template": null}"#] {
        assert!(
            ChatTemplate::from_bytes(Some(config), None)
                .unwrap()
                .is_none()
        );
    }
    assert!(ChatTemplate::from_bytes(None, None).unwrap().is_none());
}

#[test]
fn bad_sources_are_errors_that_name_the_file() {
    for (config, expected) in [
        (
            json!({"chat_template": 3}),
            "tokenizer_config.json: chat_template: ",
        ),
        (
            json!({"chat_template": [{"name": "rag", "template": ""}]}),
            "tokenizer_config.json: chat_template has [\"rag\"], expected one named \"default\"",
        ),
        (
            json!({"chat_template": "", "eos_token": 3}),
            "tokenizer_config.json: a special token is neither text nor an object",
        ),
        (
            json!({"chat_template": "a\nb {% if %}"}),
            "chat template line 2: syntax error: ",
        ),
    ] {
        let error = ChatTemplate::from_bytes(Some(config.to_string().as_bytes()), None)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = ChatTemplate::from_bytes(None, Some(&[0xff])).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("chat_template.jinja: not valid UTF-8")
    );
}

#[test]
fn a_template_that_fails_says_where() {
    for (source, expected) in [
        (
            "\n\n{{ messages.x.y }}",
            "chat template line 3: undefined value",
        ),
        ("{{ nothing() }}", "chat template line 1: unknown function"),
        (
            "{{ messages | tojson(depth=1) }}",
            "chat template line 1: too many arguments",
        ),
        (
            "{{ missing | tojson }}",
            "chat template line 1: invalid operation: undefined is not JSON serializable",
        ),
        (
            "{{ strftime_now('%10d') }}",
            "chat template line 1: invalid operation: strftime_now: format `%10d` is not valid",
        ),
    ] {
        let error = from_source(source)
            .unwrap()
            .render(&hello(), None, true)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{source}: {error}");
    }
}

#[test]
fn the_date_is_available() {
    let rendered = from_source("{{ strftime_now('%Y-%m-%d') }}")
        .unwrap()
        .render::<Value>(&[], None, false)
        .unwrap();
    assert_eq!(rendered.len(), 10);
    assert!(rendered.starts_with("20"), "{rendered}");
}
