//! Conversations to prompt ids: the model's template, tools for templates that know none, and text
//! that stays text.

use serde_json::{Map, Value, json};

use super::error::{ApiError, ApiResult};
use crate::engine::TextModel;
use crate::model::{ChatError, TemplateInputs, Tokenizer};

/// A function that the model may call.
#[derive(Clone, Debug)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// JSON schema of the arguments
    pub parameters: Value,
    /// Arguments must be valid by the schema
    pub strict: bool,
}

impl Tool {
    /// As templates and OpenAI's chat API have it.
    fn json(&self) -> Value {
        let mut function = json!({ "name": self.name });
        if let Some(description) = &self.description {
            function["description"] = description.as_str().into();
        }
        function["parameters"] = self.parameters.clone();
        json!({ "type": "function", "function": function })
    }
}

/// A conversation in the shape of OpenAI's chat API, whichever API it came by.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// `role`, `content` (a string), and `tool_calls` with arguments as objects
    pub messages: Vec<Value>,
    pub tools: Vec<Tool>,
    /// More variables of the template
    pub variables: Map<String, Value>,
    /// The last message is the beginning of the answer
    pub continues: bool,
    /// The prompt ends with the last message, without the beginning of an answer
    pub closed: bool,
}

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `{"name": .., "arguments": ..}`
    Hermes,
    /// `<function=..><parameter=..>`
    Xml,
}

/// A prompt as text and ids.
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
}

/// What a model's template can do, found out by trying it.
#[derive(Clone, Debug)]
pub struct Prompts {
    pub call_format: CallFormat,
    knows_tools: bool,
    /// Special tokens as they are written
    specials: Vec<String>,
}

impl Prompts {
    pub fn new(text: &TextModel) -> Self {
        let probe = Tool {
            name: "probe_of_tools".into(),
            description: None,
            parameters: json!({ "type": "object", "properties": { "key": { "type": "string" } } }),
            strict: false,
        };
        let tools = Value::Array(vec![probe.json()]);
        let messages = [json!({ "role": "user", "content": "x" })];
        let rendered = (text.chat_template().ok())
            .and_then(|template| template.render(&messages, Some(&tools), true).ok())
            .unwrap_or_default();
        Prompts {
            knows_tools: rendered.contains(&probe.name),
            call_format: match rendered.contains("<function=") {
                true => CallFormat::Xml,
                false => CallFormat::Hermes,
            },
            specials: special_tokens(&text.tokenizer),
        }
    }

    /// The prompt of a conversation, up to where the assistant begins to answer.
    ///
    /// Special tokens that are written in it stay text: who can write a message cannot end it.
    ///
    /// # Errors
    /// 400 if the template refuses the conversation.
    pub fn of_chat(&self, text: &TextModel, conversation: &Conversation) -> ApiResult<Prompt> {
        if !text.has_chat_template() {
            return Err(ApiError::bad_request(
                "this model has no chat template; use /v1/completions",
            ));
        }
        let template = text.chat_template();
        let template = template.map_err(|error| ApiError::bad_request(error.to_string()))?;
        let mut messages = conversation.messages.clone();
        let mut tools = conversation
            .tools
            .iter()
            .map(Tool::json)
            .collect::<Vec<_>>();
        let mark = self.mark(&messages, &tools)?;
        for value in messages.iter_mut().chain(&mut tools) {
            self.defuse(value, mark);
        }
        if !self.knows_tools {
            messages = without_tools(messages, &tools);
            tools.clear();
        }
        let tools = (!tools.is_empty()).then(|| Value::Array(tools));
        let last = conversation.continues.then(|| messages.pop()).flatten();
        let inputs = TemplateInputs {
            tools: tools.as_ref(),
            variables: Some(&conversation.variables),
            add_generation_prompt: conversation.continues || !conversation.closed,
            ..TemplateInputs::default()
        };
        let rendered = template.render_with(&messages, &inputs);
        let mut rendered = rendered
            .map_err(|error: ChatError| ApiError::invalid("messages", error.to_string()))?;
        if let Some(content) = last.as_ref().and_then(|last| last["content"].as_str()) {
            rendered.push_str(content);
        }
        let mut ids = Vec::new();
        for piece in rendered.split(mark) {
            ids.extend(encode(&text.tokenizer, piece)?);
        }
        Ok(Prompt {
            text: rendered.replace(mark, ""),
            ids,
        })
    }

    /// A character that the conversation does not have: Unicode keeps 32 for uses like this.
    fn mark(&self, messages: &[Value], tools: &[Value]) -> ApiResult<char> {
        let all = format!("{}{}", Value::from(messages), Value::from(tools));
        ('\u{fdd0}'..='\u{fdef}')
            .find(|&mark| !all.contains(mark))
            .ok_or_else(|| ApiError::invalid("messages", "messages: has all noncharacters"))
    }

    /// Puts `mark` into every special token that is written in the strings of `value`.
    fn defuse(&self, value: &mut Value, mark: char) {
        match value {
            Value::String(text) => {
                for special in &self.specials {
                    if !text.contains(special.as_str()) {
                        continue;
                    }
                    let first = special.chars().next().map_or(0, char::len_utf8);
                    let (head, tail) = special.split_at(first);
                    *text = text.replace(special.as_str(), &format!("{head}{mark}{tail}"));
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.defuse(item, mark)),
            Value::Object(map) => {
                let old = std::mem::take(map);
                for (key, mut value) in old {
                    let mut key = Value::String(key);
                    self.defuse(&mut key, mark);
                    self.defuse(&mut value, mark);
                    if let Value::String(key) = key {
                        map.insert(key, value);
                    }
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

/// The ids of text; special tokens that are written in it count as such.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> ApiResult<Vec<u32>> {
    let ids = tokenizer.encode(text);
    ids.map_err(|error| ApiError::bad_request(error.to_string()))
}

fn special_tokens(tokenizer: &Tokenizer) -> Vec<String> {
    let ids = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id));
    let texts = ids.filter_map(|id| String::from_utf8(tokenizer.token_bytes(id)?).ok());
    // A token of one character cannot be taken apart.
    texts.filter(|text| text.chars().count() > 1).collect()
}

/// The conversation for a template that knows no tools: they are told in the system message, calls
/// and results are turns of text.
fn without_tools(messages: Vec<Value>, tools: &[Value]) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::new();
    for message in messages {
        let content = message["content"].as_str().unwrap_or("");
        let (role, content) = match message["role"].as_str().unwrap_or("user") {
            "tool" => {
                let result = format!("<tool_response>\n{content}\n</tool_response>");
                ("user", result)
            }
            "assistant" => ("assistant", with_calls(content, &message["tool_calls"])),
            role => (role, content.to_owned()),
        };
        plain.push(json!({ "role": role, "content": content }));
    }
    if tools.is_empty() {
        return plain;
    }
    let mut told = String::from(
        "You can call these functions, each given as JSON with its parameters' schema:\n<tools>\n",
    );
    for tool in tools {
        told.push_str(&tool.to_string());
        told.push('\n');
    }
    told.push_str(
        "</tools>\nTo call one, write:\n<tool_call>\n{\"name\": NAME, \"arguments\": OBJECT}\n\
         </tool_call>",
    );
    match plain.first_mut() {
        Some(first) if first["role"] == "system" => {
            let content = first["content"].as_str().unwrap_or("");
            first["content"] = format!("{content}\n\n{told}").into();
        }
        _ => plain.insert(0, json!({ "role": "system", "content": told })),
    }
    plain
}

fn with_calls(content: &str, calls: &Value) -> String {
    let mut text = content.to_owned();
    for call in calls.as_array().into_iter().flatten() {
        if !text.is_empty() {
            text.push('\n');
        }
        let function = &call["function"];
        let body = json!({ "name": function["name"], "arguments": function["arguments"] });
        text.push_str(&format!("<tool_call>\n{body}\n</tool_call>"));
    }
    text
}
