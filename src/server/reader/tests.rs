use serde_json::json;

use super::*;

fn options() -> ReaderOptions {
    let tools = json!({
        "weather": { "type": "object", "properties": {
            "city": { "type": "string" }, "days": { "type": "integer" } } },
        "write": {},
    });
    ReaderOptions {
        tools: tools.as_object().unwrap().clone(),
        ..ReaderOptions::default()
    }
}

/// The whole of an answer, its pieces joined.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    text: String,
    calls: Vec<(String, String)>,
}

fn read(options: &ReaderOptions, pieces: &[&str], complete: bool) -> Answer {
    let mut reader = Reader::new(options.clone());
    let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| reader.push(piece)).collect();
    parts.extend(reader.finish(complete));
    let mut answer = Answer::default();
    for part in parts {
        match part {
            Part::Reasoning(text) => answer.reasoning += &text,
            Part::Text(text) => answer.text += &text,
            Part::Call { index, name } => {
                assert_eq!(index, answer.calls.len());
                answer.calls.push((name, String::new()));
            }
            Part::Arguments { index, json } => answer.calls[index].1 += &json,
        }
    }
    assert_eq!(reader.calls(), answer.calls.len());
    answer
}

/// Reads `text` whole, by characters, and cut in two at every place: always the same.
fn read_any_cut(options: &ReaderOptions, text: &str) -> Answer {
    let whole = read(options, &[text], true);
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(read(options, &characters, true), whole, "by characters");
    for (at, _) in text.char_indices() {
        let (left, right) = text.split_at(at);
        assert_eq!(read(options, &[left, right], true), whole, "cut at {at}");
    }
    whole
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.into(), arguments.into())
}

#[test]
fn hermes_calls_are_read_however_the_text_is_cut() {
    let text = "I look.\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln }\\\"\"}}\n\
                </tool_call>\n<tool_call>\n{\"name\": \"write\", \"arguments\": {}}\n</tool_call>\nDone.";
    let answer = read_any_cut(&options(), text);
    assert_eq!(answer.text, "I look.Done.");
    let calls = [
        call("weather", "{\"city\": \"Köln }\\\"\"}"),
        call("write", "{}"),
    ];
    assert_eq!(answer.calls, calls);
}

#[test]
fn xml_calls_are_read_however_the_text_is_cut_and_typed_by_the_schema() {
    let text = "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n\
                <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>";
    let answer = read_any_cut(&options(), text);
    assert_eq!(answer.text, "");
    let calls = [call("weather", "{\"city\": \"12\", \"days\": 3}")];
    assert_eq!(answer.calls, calls);
    let two = text.repeat(2);
    assert_eq!(read_any_cut(&options(), &two).calls.len(), 2);
}

#[test]
fn calls_without_an_opening_tag_are_read_if_they_name_a_tool() {
    let xml = "<function=write>\n</function>\n</tool_call>";
    assert_eq!(read_any_cut(&options(), xml).calls, [call("write", "{}")]);
    let hermes = "{\"name\": \"write\", \"arguments\": {\"a\": [1, {}]}}\n</tool_call>";
    let expected = [call("write", "{\"a\": [1, {}]}")];
    assert_eq!(read_any_cut(&options(), hermes).calls, expected);
    for text in [
        "{\"name\": \"Bob\", \"age\": 3}",
        "{\"name\": \"Bob\", \"arguments\": {}}",
        "see <function=other> and <functions>",
        "{}",
        "a < b <tool_",
    ] {
        let answer = read_any_cut(&options(), text);
        assert_eq!(answer.text, text);
        assert_eq!(answer.calls, []);
    }
}

#[test]
fn what_is_no_call_is_text_as_it_was_written() {
    for text in [
        "<tool_call>nothing</tool_call>",
        "<tool_call>",
        "<tool_call>\n{\"name\": 3}</tool_call>",
    ] {
        let answer = read_any_cut(&options(), text);
        assert_eq!(answer.calls, [], "{text}");
        let squeezed = |text: &str| text.split_whitespace().collect::<String>();
        assert_eq!(squeezed(&answer.text), squeezed(text));
    }
    let without_tools = ReaderOptions::default();
    let text = "<tool_call>\n{\"name\": \"write\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(read_any_cut(&without_tools, text).text, text);
}

#[test]
fn other_orders_of_keys_and_arguments_as_text_are_read() {
    let text = "<tool_call>{\"arguments\": \"{\\\"a\\\": 1}\", \"name\": \"write\"}</tool_call>";
    assert_eq!(
        read_any_cut(&options(), text).calls,
        [call("write", "{\"a\": 1}")]
    );
}

#[test]
fn a_call_that_was_cut_off_does_not_look_whole() {
    let xml = "<tool_call><function=write><parameter=a>\nhalf";
    assert_eq!(read(&options(), &[xml], false).calls, [call("write", "")]);
    let expected = [call("write", "{\"a\": \"half\"}")];
    assert_eq!(read(&options(), &[xml], true).calls, expected);
    let hermes = "<tool_call>{\"name\": \"write\", \"arguments\": {\"a\": \"ha";
    assert_eq!(
        read(&options(), &[hermes], false).calls,
        [call("write", "{\"a\": \"ha")]
    );
}

#[test]
fn reasoning_is_split_off_whether_or_not_the_prompt_opened_it() {
    let opened = read_any_cut(&options(), "<think>\nWhy </thin not?\n</think>\n\nSo.");
    assert_eq!(opened.reasoning, "Why </thin not?");
    assert_eq!(opened.text, "So.");
    let in_reasoning = ReaderOptions {
        in_reasoning: true,
        ..options()
    };
    let answer = read_any_cut(
        &in_reasoning,
        "Hm.\n</think>\n\n<tool_call>{\"name\": \"write\", \"arguments\": {}}</tool_call>",
    );
    assert_eq!(answer.reasoning, "Hm.");
    assert_eq!(answer.calls, [call("write", "{}")]);
    assert_eq!(answer.text, "");
}

#[test]
fn one_call_only_leaves_out_the_others() {
    let one = ReaderOptions {
        one_call: true,
        ..options()
    };
    let text = "<tool_call>{\"name\": \"write\", \"arguments\": {}}</tool_call>".repeat(3);
    assert_eq!(read_any_cut(&one, &text).calls, [call("write", "{}")]);
}
