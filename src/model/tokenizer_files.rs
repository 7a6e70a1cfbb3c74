//! The small files around tokenizer.json, put together to one tokenizer_config.json as transformers
//! does when it loads a tokenizer.
//!
//! Source: transformers 4.57.6, `PreTrainedTokenizerBase.from_pretrained` and `_from_pretrained`,
//! `Qwen2TokenizerFast.__init__`.

use serde_json::{Map, Value, json};

use super::source::SourceError;
use crate::formats::json;

/// Name of the file that tells special tokens by role, in checkpoints of before 2023.
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
/// Name of the file that tells tokens beyond the vocabulary, in checkpoints of before 2023.
const ADDED_TOKENS: &str = "added_tokens.json";
/// The template of conversations.
const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The one that is used where tools are given.
const TOOL_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";
/// Tokenizer classes that give the roles of [`CLASS_ROLES`] a token of their own accord; a checkpoint
/// of these families that names no class has the first.
const CLASSES: [&str; 2] = ["Qwen2TokenizerFast", "Qwen2Tokenizer"];
const CLASS_ROLES: [&str; 3] = ["unk_token", "eos_token", "pad_token"];
const CLASS_TOKEN: &str = "<|endoftext|>";

/// Files of a tokenizer that a checkpoint may have beside tokenizer.json and tokenizer_config.json.
pub const OPTIONAL_FILES: [&str; 4] = [
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    TOOL_TEMPLATE,
];

/// A tokenizer's settings and its chat template, from whichever files have them.
#[derive(Debug, Default)]
pub struct TokenizerFiles {
    /// As tokenizer_config.json would be if it held everything
    pub config: Option<Vec<u8>>,
    /// chat_template.jinja, where no other template stands beside it
    pub chat_template: Option<Vec<u8>>,
}

/// Why these files cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerFilesError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{file}: {source}")]
    Json {
        file: &'static str,
        source: serde_json::Error,
    },
}

impl TokenizerFiles {
    /// - `read`: gives a file of the checkpoint, if there is one
    ///
    /// # Errors
    /// If a file cannot be read or is not of the form expected.
    pub fn read(
        tokenizer_json: &[u8],
        mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, SourceError>,
    ) -> Result<Self, TokenizerFilesError> {
        const CONFIG: &str = "tokenizer_config.json";
        let mut config: Map<String, Value> = match read(CONFIG)? {
            Some(bytes) => object(CONFIG, &bytes)?,
            None => Map::new(),
        };
        if !config.contains_key("added_tokens_decoder") {
            if let Some(bytes) = read(SPECIAL_TOKENS_MAP)? {
                add_roles(&mut config, object(SPECIAL_TOKENS_MAP, &bytes)?);
            }
            if let Some(bytes) = read(ADDED_TOKENS)? {
                let added = object(ADDED_TOKENS, &bytes)?;
                let decoder = added_tokens_decoder(added, tokenizer_json, &config);
                config.insert("added_tokens_decoder".into(), decoder);
            }
        }
        let class = config.get("tokenizer_class").and_then(Value::as_str);
        if class.is_none_or(|class| CLASSES.contains(&class)) {
            for role in CLASS_ROLES {
                config.entry(role).or_insert(CLASS_TOKEN.into());
            }
        }
        let mut chat_template = read(CHAT_TEMPLATE)?;
        if let Some(tools) = read(TOOL_TEMPLATE)? {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let mut named = vec![json!({"name": "tool_use", "template": text(&tools)})];
            named.extend(
                (chat_template.take())
                    .map(|main| json!({"name": "default", "template": text(&main)})),
            );
            config.insert("chat_template".into(), named.into());
        }
        Ok(TokenizerFiles {
            config: Some(Value::from(config).to_string().into_bytes()),
            chat_template,
        })
    }
}

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TokenizerFilesError> {
    json::from_slice(bytes).map_err(|source| TokenizerFilesError::Json { file, source })
}

/// Roles of special_tokens_map.json win over those of tokenizer_config.json; further special tokens
/// come after its own.
fn add_roles(config: &mut Map<String, Value>, roles: Map<String, Value>) {
    const FURTHER: &str = "additional_special_tokens";
    for (role, token) in roles {
        let token = match (config.get(FURTHER), token) {
            (Some(Value::Array(known)), Value::Array(tokens)) if role == FURTHER => {
                let mut all = known.clone();
                all.extend(tokens.into_iter().filter(|token| !known.contains(token)));
                all.into()
            }
            (_, token) => token,
        };
        config.insert(role, token);
    }
}

/// added_tokens.json, text to id, in the form of tokenizer_config.json. Where tokenizer.json has a
/// token of that id among its own added ones, that one counts.
fn added_tokens_decoder(
    added: Map<String, Value>,
    tokenizer_json: &[u8],
    config: &Map<String, Value>,
) -> Value {
    let tokenizer: Value = json::from_slice(tokenizer_json).unwrap_or_default();
    let own = tokenizer["added_tokens"].as_array();
    let own = |id: &Value| own.is_some_and(|own| own.iter().any(|token| token["id"] == *id));
    let text = |token: &Value| {
        let text = token.as_str().or(token["content"].as_str());
        text.map(str::to_owned)
    };
    let roles = config.iter().filter(|(role, _)| role.ends_with("_token"));
    let mut special: Vec<String> = roles.filter_map(|(_, token)| text(token)).collect();
    let further = config.get("additional_special_tokens");
    special.extend((further.and_then(Value::as_array).into_iter().flatten()).filter_map(text));
    let tokens = added.into_iter().filter(|(_, id)| !own(id));
    let tokens = tokens.map(|(content, id)| {
        let special = special.contains(&content);
        let token = json!({"content": content, "special": special, "normalized": !special});
        (id.to_string(), token)
    });
    Value::Object(tokens.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Tokenizer;

    fn files(files: &[(&str, Value)]) -> Value {
        let read = |name: &str| {
            let file = files.iter().find(|(file, _)| *file == name);
            Ok(file.map(|(_, json)| match json {
                Value::String(text) => text.clone().into_bytes(),
                other => other.to_string().into_bytes(),
            }))
        };
        let tokenizer = json!({"added_tokens": [{"id": 7, "content": "<seven>"}]}).to_string();
        let found = TokenizerFiles::read(tokenizer.as_bytes(), read).unwrap();
        serde_json::from_slice(&found.config.unwrap()).unwrap()
    }

    #[test]
    fn old_files_count_where_the_new_one_lists_no_tokens() {
        let map = json!({
            "eos_token": {"content": "<e>"}, "additional_special_tokens": ["<x>", "<y>"],
        });
        let added = json!({"<seven>": 7, "<x>": 8, "plain": 9});
        let old = [
            ("special_tokens_map.json", map.clone()),
            ("added_tokens.json", added.clone()),
            (
                "tokenizer_config.json",
                json!({"eos_token": "<o>", "additional_special_tokens": ["<x>"]}),
            ),
        ];
        let config = files(&old);
        assert_eq!(config["eos_token"]["content"], "<e>");
        assert_eq!(config["additional_special_tokens"], json!(["<x>", "<y>"]));
        let decoder = json!({
            "8": {"content": "<x>", "special": true, "normalized": false},
            "9": {"content": "plain", "special": false, "normalized": true},
        });
        assert_eq!(config["added_tokens_decoder"], decoder);
        let new = json!({"eos_token": "<o>", "added_tokens_decoder": {}});
        let config = files(&[
            old[0].clone(),
            old[1].clone(),
            ("tokenizer_config.json", new),
        ]);
        assert_eq!(config["eos_token"], "<o>");
        assert_eq!(config["added_tokens_decoder"], json!({}));
    }

    #[test]
    fn roles_that_no_file_names_are_those_of_the_class() {
        let config = files(&[]);
        assert_eq!(config["eos_token"], "<|endoftext|>");
        let null = json!({"eos_token": null, "tokenizer_class": "Qwen2Tokenizer"});
        let config = files(&[("tokenizer_config.json", null)]);
        assert_eq!(config["eos_token"], Value::Null);
        assert_eq!(config["pad_token"], "<|endoftext|>");
        let other = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
        let config = files(&[("tokenizer_config.json", other)]);
        assert_eq!(config.get("eos_token"), None);
    }

    #[test]
    fn a_template_for_tools_stands_beside_the_other() {
        let config = files(&[
            ("chat_template.jinja", "plain".into()),
            ("additional_chat_templates/tool_use.jinja", "tools".into()),
        ]);
        let template =
            crate::model::ChatTemplate::from_bytes(Some(config.to_string().as_bytes()), None);
        let template = template.unwrap().unwrap();
        let none: [crate::model::Message; 0] = [];
        assert_eq!(template.render(&none, None, false).unwrap(), "plain");
        assert_eq!(
            template.render(&none, Some(&json!([])), false).unwrap(),
            "tools"
        );
        assert!(Tokenizer::from_bytes(b"{}", None).is_err());
    }
}
