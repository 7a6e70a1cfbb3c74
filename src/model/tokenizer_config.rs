//! tokenizer_config.json: the tokens that it adds to tokenizer.json, and the special ones by role.
//!
//! Source: transformers 4.57.6, `PreTrainedTokenizerBase._from_pretrained` and
//! `PreTrainedTokenizerFast.__init__`.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokenizers::AddedToken;

/// The fields of tokenizer_config.json that tell which tokens there are.
#[derive(Default, Deserialize)]
pub(super) struct TokenizerConfig {
    /// By id, which says only in which order they are added
    #[serde(default, deserialize_with = "null_is_default")]
    added_tokens_decoder: BTreeMap<u32, TokenFields>,
    split_special_tokens: Option<bool>,
    add_prefix_space: Option<bool>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    sep_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    cls_token: Option<SpecialToken>,
    mask_token: Option<SpecialToken>,
    #[serde(default, deserialize_with = "null_is_default")]
    additional_special_tokens: Vec<SpecialToken>,
    /// What transformers 5 calls `additional_special_tokens`; in 4 a map of further roles
    #[serde(default, deserialize_with = "null_is_default")]
    extra_special_tokens: ExtraTokens,
}

/// A special token: its text, or an object that has the text inside.
#[derive(Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "a special token is neither text nor an object with `content`"
)]
enum SpecialToken {
    Text(String),
    Object(TokenFields),
}

#[derive(Clone, Deserialize)]
struct TokenFields {
    content: String,
    single_word: Option<bool>,
    lstrip: Option<bool>,
    rstrip: Option<bool>,
    normalized: Option<bool>,
    special: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ExtraTokens {
    List(Vec<SpecialToken>),
    Named(BTreeMap<String, SpecialToken>),
}

impl Default for ExtraTokens {
    fn default() -> Self {
        ExtraTokens::List(Vec::new())
    }
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    value: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

impl SpecialToken {
    fn text(&self) -> &str {
        match self {
            SpecialToken::Text(text) => text,
            SpecialToken::Object(token) => &token.content,
        }
    }

    fn added_token(&self) -> AddedToken {
        match self {
            SpecialToken::Text(text) => AddedToken::from(text.as_str(), true),
            SpecialToken::Object(token) => token.added_token(true),
        }
    }
}

impl TokenFields {
    fn added_token(&self, special: bool) -> AddedToken {
        let mut token = AddedToken::from(self.content.as_str(), special);
        token.single_word = self.single_word.unwrap_or(token.single_word);
        token.lstrip = self.lstrip.unwrap_or(token.lstrip);
        token.rstrip = self.rstrip.unwrap_or(token.rstrip);
        token.normalized = self.normalized.unwrap_or(token.normalized);
        token
    }
}

impl TokenizerConfig {
    /// Special tokens with the name of their role, in the order of transformers.
    fn roles(&self) -> [(&'static str, Option<&SpecialToken>); 7] {
        [
            ("bos_token", self.bos_token.as_ref()),
            ("eos_token", self.eos_token.as_ref()),
            ("unk_token", self.unk_token.as_ref()),
            ("sep_token", self.sep_token.as_ref()),
            ("pad_token", self.pad_token.as_ref()),
            ("cls_token", self.cls_token.as_ref()),
            ("mask_token", self.mask_token.as_ref()),
        ]
    }

    fn special(&self) -> impl Iterator<Item = &SpecialToken> {
        let extra: Vec<&SpecialToken> = match &self.extra_special_tokens {
            ExtraTokens::List(tokens) => tokens.iter().collect(),
            ExtraTokens::Named(tokens) => tokens.values().collect(),
        };
        let roles = self.roles().into_iter().filter_map(|(_, token)| token);
        roles.chain(&self.additional_special_tokens).chain(extra)
    }

    /// The tokens of `added_tokens_decoder`, in the order of their ids. One that has a role is
    /// special, whatever its entry says.
    pub fn added_tokens(&self) -> Vec<AddedToken> {
        let special = |token: &TokenFields| {
            token.special == Some(true) || self.special().any(|s| s.text() == token.content)
        };
        self.added_tokens_decoder
            .values()
            .map(|token| token.added_token(special(token)))
            .collect()
    }

    /// Every token that has a role.
    pub fn special_tokens(&self) -> impl Iterator<Item = AddedToken> {
        self.special().map(SpecialToken::added_token)
    }

    /// Special tokens written out in a text are text.
    pub fn split_special_tokens(&self) -> bool {
        self.split_special_tokens.unwrap_or(false)
    }

    /// A text begins with a space more.
    pub fn add_prefix_space(&self) -> bool {
        self.add_prefix_space.unwrap_or(false)
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_ref().map(SpecialToken::text)
    }

    /// What a chat template may refer to: each role's token as text, and the list of the others.
    pub fn template_variables(&self) -> Vec<(String, Value)> {
        let mut variables: Vec<(String, Value)> = (self.roles().into_iter())
            .filter_map(|(name, token)| Some((name.to_owned(), token?.text().into())))
            .collect();
        if let ExtraTokens::Named(tokens) = &self.extra_special_tokens {
            let named = tokens.iter();
            variables.extend(named.map(|(name, token)| (name.clone(), token.text().into())));
        }
        if !self.additional_special_tokens.is_empty() {
            let texts = self.additional_special_tokens.iter();
            let texts: Vec<Value> = texts.map(|token| token.text().into()).collect();
            variables.push(("additional_special_tokens".into(), texts.into()));
        }
        variables
    }
}
