//! Conversations to prompt text, by the Jinja template a model ships, as transformers renders it.

use std::fmt::Write;

use chrono::Local;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use super::python_json;
use super::tokenizer::SpecialToken;

/// A chat template that cannot be read, or a conversation it cannot render.
#[derive(Debug, Error)]
pub enum ChatError {
    #[error("tokenizer_config.json: {0}")]
    Config(serde_json::Error),
    #[error("tokenizer_config.json: {reason}")]
    Source { reason: String },
    #[error("chat_template.jinja: not valid UTF-8: {0}")]
    Encoding(#[from] std::str::Utf8Error),
    #[error("messages: {0}")]
    Messages(serde_json::Error),
    #[error("chat template{}: {reason}", at_line(*line))]
    Template { line: Option<usize>, reason: String },
    /// The template called `raise_exception`; the words are its own.
    #[error("chat template refuses the conversation: {message}")]
    Refused { message: String },
}

fn at_line(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(" line {line}"))
}

/// One turn of a plain conversation. Turns with tool calls are given as JSON instead.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// The chat template of one model, compiled, with the special tokens it may refer to.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, ... where the model has them
    special_tokens: Vec<(String, Jinja)>,
}

const DEFAULT: &str = "default";
/// The name transformers looks for, before the default, when tools are given.
const TOOL_USE: &str = "tool_use";

const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// Compiles the template of a model, given its tokenizer_config.json and chat_template.jinja.
    ///
    /// The separate file wins over the `chat_template` field, which is one template or a list of
    /// named ones. None if there is neither: a base model.
    ///
    /// # Errors
    /// If a file is not valid, the list has no template named `default`, or a template has a
    /// syntax error.
    pub fn from_bytes(
        tokenizer_config_json: Option<&[u8]>,
        chat_template_jinja: Option<&[u8]>,
    ) -> Result<Option<Self>, ChatError> {
        let mut config: Map<String, Value> = match tokenizer_config_json {
            Some(bytes) => serde_json::from_slice(bytes).map_err(ChatError::Config)?,
            None => Map::new(),
        };
        let templates = match (chat_template_jinja, config.remove("chat_template")) {
            (Some(file), _) => vec![(DEFAULT.to_owned(), std::str::from_utf8(file)?.to_owned())],
            (None, None | Some(Value::Null)) => return Ok(None),
            (None, Some(Value::String(source))) => vec![(DEFAULT.to_owned(), source)],
            (None, Some(list)) => named_templates(list)?,
        };

        let mut environment = environment()?;
        for (name, source) in templates {
            environment.add_template_owned(name, source)?;
        }
        Ok(Some(ChatTemplate {
            environment,
            special_tokens: special_tokens(&mut config)?,
        }))
    }

    /// The prompt text of a conversation.
    ///
    /// - `messages`: [`Message`]s, or JSON objects, whose key order is kept
    /// - `tools`: JSON array of function descriptions, as in the OpenAI API
    /// - `add_generation_prompt`: end with the opening of the assistant's turn
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template rejects the conversation, [`ChatError::Template`] if
    /// it cannot digest it.
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        self.render_with(messages, tools, add_generation_prompt, &Map::new())
    }

    /// As [`render`](ChatTemplate::render), with more variables, such as `enable_thinking`.
    ///
    /// # Errors
    /// As [`render`](ChatTemplate::render).
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        more: &Map<String, Value>,
    ) -> Result<String, ChatError> {
        let messages = serde_json::to_value(messages).map_err(ChatError::Messages)?;
        let name = match tools {
            Some(_) if self.environment.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let mut variables = self.special_tokens.clone();
        variables.extend(
            more.iter()
                .map(|(name, value)| (name.clone(), jinja(value))),
        );
        variables.extend([
            ("messages".to_owned(), jinja(&messages)),
            ("tools".to_owned(), tools.map_or(Jinja::from(()), jinja)),
            // transformers defines it even when unused, and templates test `is none`.
            ("documents".to_owned(), Jinja::from(())),
            (
                "add_generation_prompt".to_owned(),
                Jinja::from(add_generation_prompt),
            ),
        ]);
        let template = self.environment.get_template(name)?;
        Ok(template.render(Jinja::from_pairs(variables))?)
    }
}

fn named_templates(list: Value) -> Result<Vec<(String, String)>, ChatError> {
    let list: Vec<NamedTemplate> =
        serde_json::from_value(list).map_err(|error| ChatError::Source {
            reason: format!(
                "chat_template: {error}; expected a string or a list of {{name, template}}"
            ),
        })?;
    if !list.iter().any(|entry| entry.name == DEFAULT) {
        let names: Vec<String> = list.into_iter().map(|entry| entry.name).collect();
        return Err(ChatError::Source {
            reason: format!("chat_template has {names:?}, expected one named \"{DEFAULT}\""),
        });
    }
    Ok(list
        .into_iter()
        .map(|entry| (entry.name, entry.template))
        .collect())
}

fn special_tokens(config: &mut Map<String, Value>) -> Result<Vec<(String, Jinja)>, ChatError> {
    let mut tokens = Vec::new();
    for name in SPECIAL_TOKENS {
        let Some(value) = config.remove(name) else {
            continue;
        };
        let token: Option<SpecialToken> =
            serde_json::from_value(value).map_err(|error| ChatError::Source {
                reason: format!("{name}: {error}"),
            })?;
        if let Some(token) = token {
            tokens.push((name.to_owned(), Jinja::from(token.into_text())));
        }
    }
    if let Some(list) = config.get("additional_special_tokens") {
        tokens.push(("additional_special_tokens".to_owned(), jinja(list)));
    }
    Ok(tokens)
}

/// Jinja with the settings, functions and Python methods that transformers gives to templates.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

/// Marks an error as the template's own words.
#[derive(Debug, Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Jinja, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // chrono reports an unknown format character only when writing.
    write!(text, "{}", Local::now().format(format)).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: format `{format}` is not valid"),
        )
    })?;
    Ok(text)
}

impl From<Error> for ChatError {
    fn from(error: Error) -> Self {
        let raised = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<Raised>());
        match raised {
            Some(Raised(message)) => ChatError::Refused {
                message: message.clone(),
            },
            None => ChatError::Template {
                line: error.line(),
                reason: match error.detail() {
                    Some(detail) => format!("{}: {detail}", error.kind()),
                    None => error.kind().to_string(),
                },
            },
        }
    }
}

fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Jinja::from(n),
            (None, Some(n)) => Jinja::from(n),
            (None, None) => Jinja::from(n.as_f64()),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(items) => items.iter().map(jinja).collect(),
        Value::Object(map) => Jinja::from_pairs(map.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}
