//! Messages and tools of OpenAI's chat API, to a conversation for the template.

use serde_json::{Map, Value, json};

use crate::server::App;
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::prompt::Tool;
use crate::server::schema::{Form, Grammar};

/// Which calls an answer may or must have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    #[default]
    Auto,
    None,
    Required,
    Named(String),
}

const MAX_TOOLS: usize = 1024;

/// The messages of a chat request.
///
/// Leading system and developer messages become one system message: templates know one.
pub fn messages(list: &[Value]) -> ApiResult<Vec<Value>> {
    let mut messages: Vec<Value> = Vec::new();
    for (index, message) in list.iter().enumerate() {
        let path = format!("messages[{index}]");
        let Some(map) = message.as_object() else {
            return Err(ApiError::invalid(
                &path,
                format!("{path}: expected an object"),
            ));
        };
        push(&mut messages, one_message(Fields::within(map, &path))?);
    }
    if messages.is_empty() {
        let message = "messages: expected at least one message";
        return Err(ApiError::invalid("messages", message));
    }
    Ok(messages)
}

/// Adds a message; a system message after a first one joins it.
pub fn push(messages: &mut Vec<Value>, message: Value) {
    if let [first] = messages.as_mut_slice()
        && first["role"] == "system"
        && message["role"] == "system"
    {
        let (before, after) = (first["content"].as_str(), message["content"].as_str());
        first["content"] = format!("{}\n\n{}", before.unwrap_or(""), after.unwrap_or("")).into();
        return;
    }
    messages.push(message);
}

fn one_message(fields: Fields<'_>) -> ApiResult<Value> {
    let roles = "system, developer, user, assistant, tool or function";
    let role = match fields.required("role", roles)?.as_str() {
        Some("developer" | "system") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => "tool",
        _ => return Err(fields.wrong("role", roles)),
    };
    let content = content(fields, "content")?;
    let mut message = json!({ "role": role });
    let calls = fields.list("tool_calls")?;
    let content = match content {
        Some(content) => content,
        None if role == "assistant" => String::new(),
        None => return Err(fields.wrong("content", "a string or a list of text parts")),
    };
    message["content"] = content.into();
    for field in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(field)? {
            message[field] = text.into();
        }
    }
    for field in ["reasoning_content", "reasoning"] {
        if let (Some(text), "assistant") = (fields.get(field).and_then(Value::as_str), role) {
            message["reasoning_content"] = text.into();
        }
    }
    if let Some(calls) = calls.filter(|calls| !calls.is_empty()) {
        let calls = calls.iter().map(|call| {
            let call = call.as_object();
            let call = call.ok_or_else(|| fields.wrong("tool_calls", "a list of objects"))?;
            let call = Fields::within(call, "tool_calls");
            let function = call.object("function")?;
            let function = function.ok_or_else(|| call.wrong("function", "an object"))?;
            let function = Fields::within(function, "tool_calls.function");
            let name = function.text("name")?;
            let name = name.ok_or_else(|| function.wrong("name", "a string"))?;
            let arguments = arguments(function.get("arguments"));
            let id = call.text("id")?.unwrap_or("");
            Ok(tool_call(id, name, arguments))
        });
        message["tool_calls"] = calls.collect::<ApiResult<Vec<_>>>()?.into();
    }
    Ok(message)
}

/// A call as templates want it: arguments as an object.
pub fn tool_call(id: &str, name: &str, arguments: Value) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

/// Arguments that clients send as text; what is no object stays as it is under a name.
pub fn arguments(value: Option<&Value>) -> Value {
    let parsed = match value {
        None => return json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => return json!({}),
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| value_of(text)),
        Some(value) => value.clone(),
    };
    match parsed {
        Value::Object(_) => parsed,
        other => json!({ "arguments": other }),
    }
}

fn value_of(text: &str) -> Value {
    text.into()
}

/// A message's text: a string, or the texts of its parts, one per line.
pub fn content(fields: Fields<'_>, field: &str) -> ApiResult<Option<String>> {
    let parts = match fields.get(field) {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text.clone())),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(fields.wrong(field, "a string or a list of text parts")),
    };
    let mut texts = Vec::new();
    for part in parts {
        let text = match part["type"].as_str() {
            Some("text" | "input_text" | "output_text") => part["text"].as_str(),
            Some("refusal") => part["refusal"].as_str(),
            Some(other) => {
                let name = fields.name(field);
                let message =
                    format!("{name}: parts of type {other:?} are not supported, only text");
                return Err(ApiError::invalid(&name, message));
            }
            None => part.as_str(),
        };
        texts.push(text.ok_or_else(|| fields.wrong(field, "a string or a list of text parts"))?);
    }
    Ok(Some(texts.join("\n")))
}

/// `tools` of a chat request, or the older `functions`.
pub fn tools(fields: Fields<'_>) -> ApiResult<Vec<Tool>> {
    let (field, list) = match fields.list("tools")? {
        Some(list) => ("tools", list),
        None => match fields.list("functions")? {
            Some(list) => ("functions", list),
            None => return Ok(Vec::new()),
        },
    };
    if list.len() > MAX_TOOLS {
        return Err(fields.wrong(field, format!("at most {MAX_TOOLS}")));
    }
    let mut tools = Vec::new();
    for (index, tool) in list.iter().enumerate() {
        let path = format!("{field}[{index}]");
        let function = match field {
            "tools" => tool.get("function"),
            _ => Some(tool),
        };
        let function = function.and_then(Value::as_object).ok_or_else(|| {
            ApiError::invalid(&path, format!("{path}: expected a function, an object"))
        })?;
        tools.push(tool_of(Fields::within(function, &path), "parameters")?);
    }
    Ok(tools)
}

/// A function's description; its schema is in `schema_field`.
pub fn tool_of(fields: Fields<'_>, schema_field: &str) -> ApiResult<Tool> {
    let expected = "1 to 128 letters, digits, or characters of _-./:";
    let name = fields.required("name", expected)?.as_str().unwrap_or("");
    let allowed = |c: char| c.is_alphanumeric() || "_-./:".contains(c);
    if !(1..=128).contains(&name.len()) || !name.chars().all(allowed) {
        return Err(fields.wrong("name", expected));
    }
    let parameters = fields.object(schema_field)?.cloned();
    Ok(Tool {
        name: name.to_owned(),
        description: fields.text("description")?.map(str::to_owned),
        parameters: match parameters {
            Some(map) if !map.is_empty() => map.into(),
            _ => json!({ "type": "object", "properties": {} }),
        },
        strict: fields.bool("strict")?.unwrap_or(false),
    })
}

/// `tool_choice` of a chat request.
pub fn tool_choice(fields: Fields<'_>, tools: &[Tool]) -> ApiResult<ToolChoice> {
    let expected = "none, auto, required, or an object that names a function";
    let choice = match fields.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" | "any" => ToolChoice::Required,
            _ => return Err(fields.wrong("tool_choice", expected)),
        },
        Some(choice) => {
            let name = choice["function"]["name"]
                .as_str()
                .or(choice["name"].as_str());
            let name = name.ok_or_else(|| fields.wrong("tool_choice", expected))?;
            ToolChoice::Named(name.to_owned())
        }
    };
    check_choice(&choice, tools)?;
    Ok(choice)
}

/// # Errors
/// 400 if a call is asked for that no tool allows.
pub fn check_choice(choice: &ToolChoice, tools: &[Tool]) -> ApiResult<()> {
    let refuse = |message: String| Err(ApiError::invalid("tool_choice", message));
    match choice {
        ToolChoice::Required if tools.is_empty() => {
            refuse("tool_choice: asks for a call, there are no tools".into())
        }
        ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
            refuse(format!("tool_choice: no tool is called `{name}`"))
        }
        _ => Ok(()),
    }
}

/// The grammar that enforces `choice`, or strict arguments where calls are free.
///
/// # Errors
/// 400 if a strict schema cannot be enforced.
pub fn call_grammar(app: &App, choice: &ToolChoice, tools: &[Tool]) -> ApiResult<Option<Grammar>> {
    let chosen: Vec<Tool> = match choice {
        ToolChoice::None => return Ok(None),
        ToolChoice::Auto if !tools.iter().any(|tool| tool.strict) => return Ok(None),
        ToolChoice::Named(name) => tools.iter().filter(|t| t.name == *name).cloned().collect(),
        ToolChoice::Auto | ToolChoice::Required => tools.to_vec(),
    };
    let grammars = app.grammars()?;
    let format = app.prompts.call_format;
    let form = |tools: Vec<Tool>| match choice {
        ToolChoice::Auto => Form::TextOrCalls(tools, format),
        _ => Form::Call(tools, format),
    };
    if let Ok(grammar) = grammars.compile(&form(chosen.clone()), "tools") {
        return Ok(Some(grammar));
    }
    // One schema that cannot be enforced must not break the others: where nothing was promised, any
    // object will do for it.
    let enforceable = |tool: Tool| match grammars.compile(&form(vec![tool.clone()]), "tools") {
        Err(error) if tool.strict => Err(error),
        Err(_) => Ok(Tool {
            parameters: json!({ "type": "object" }),
            ..tool
        }),
        Ok(_) => Ok(tool),
    };
    let tools = chosen
        .into_iter()
        .map(enforceable)
        .collect::<ApiResult<Vec<_>>>()?;
    grammars.compile(&form(tools), "tools").map(Some)
}

/// `name -> schema`, as readers of answers want tools.
pub fn schemas(tools: &[Tool]) -> Map<String, Value> {
    let pairs = tools
        .iter()
        .map(|tool| (tool.name.clone(), tool.parameters.clone()));
    pairs.collect()
}
