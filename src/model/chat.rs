//! Conversations to prompt text, by the Jinja template a model ships, as transformers renders it.

use minijinja::{Environment, Error, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use super::jinja::{self, Raised};
use super::tokenizer_config::TokenizerConfig;
use crate::formats::json;

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

/// What a template gets beside the messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct TemplateInputs<'a> {
    /// JSON array of function descriptions, as in the OpenAI API
    pub tools: Option<&'a Value>,
    /// JSON array of objects with `title` and `text`
    pub documents: Option<&'a Value>,
    /// Further variables by name (`chat_template_kwargs`), such as `enable_thinking`
    pub variables: Option<&'a Map<String, Value>>,
    /// End with the opening of the assistant's turn
    pub add_generation_prompt: bool,
}

const DEFAULT: &str = "default";
/// The name transformers looks for, before the default, when tools are given.
const TOOL_USE: &str = "tool_use";

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
        let mut fields: Map<String, Value> = match tokenizer_config_json {
            Some(bytes) => json::from_slice(bytes).map_err(ChatError::Config)?,
            None => Map::new(),
        };
        let templates = match (chat_template_jinja, fields.remove("chat_template")) {
            (Some(file), _) => vec![(DEFAULT.to_owned(), std::str::from_utf8(file)?.to_owned())],
            (None, None | Some(Value::Null)) => return Ok(None),
            (None, Some(Value::String(source))) => vec![(DEFAULT.to_owned(), source)],
            (None, Some(list)) => named_templates(list)?,
        };
        let config =
            TokenizerConfig::deserialize(Value::Object(fields)).map_err(ChatError::Config)?;

        let mut environment = jinja::environment()?;
        for (name, source) in templates {
            environment.add_template_owned(name, jinja::prepare(&source)?)?;
        }
        let special_tokens = config.template_variables().into_iter();
        Ok(Some(ChatTemplate {
            environment,
            special_tokens: special_tokens
                .map(|(name, value)| (name, jinja::from_json(&value)))
                .collect(),
        }))
    }

    /// The prompt text of a conversation, without further variables; see
    /// [`render_with`](Self::render_with).
    ///
    /// # Errors
    /// As for [`render_with`](Self::render_with).
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let inputs = TemplateInputs {
            tools,
            add_generation_prompt,
            ..TemplateInputs::default()
        };
        self.render_with(messages, &inputs)
    }

    /// The prompt text of a conversation.
    ///
    /// - `messages`: [`Message`]s, or JSON objects, whose key order is kept
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template rejects the conversation, [`ChatError::Template`] if
    /// it cannot digest it.
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        inputs: &TemplateInputs,
    ) -> Result<String, ChatError> {
        let messages = serde_json::to_value(messages).map_err(ChatError::Messages)?;
        let name = match inputs.tools {
            Some(_) if self.environment.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let or_none = |value: Option<&Value>| value.map_or(Jinja::from(()), jinja::from_json);
        let mut variables = self.special_tokens.clone();
        // Later ones win: over special tokens, not over the conversation.
        let further = inputs.variables.into_iter().flatten();
        variables.extend(further.map(|(name, value)| (name.clone(), jinja::from_json(value))));
        variables.extend([
            ("messages".to_owned(), jinja::from_json(&messages)),
            ("tools".to_owned(), or_none(inputs.tools)),
            // transformers defines it even when unused, and templates test `is none`.
            ("documents".to_owned(), or_none(inputs.documents)),
            (
                "add_generation_prompt".to_owned(),
                Jinja::from(inputs.add_generation_prompt),
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
