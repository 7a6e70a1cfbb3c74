//! Text to token ids and back, exactly as transformers does it.
//!
//! Only byte-level BPE is accepted: there every token is a fixed string of bytes, which is what
//! lets a stream of tokens be decoded exactly, one at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::Value;
use thiserror::Error;
use tokenizers::{DecoderWrapper, PreTokenizerWrapper};

use super::tokenizer_config::TokenizerConfig;
use crate::formats::json;

/// A tokenizer.json or tokenizer_config.json that cannot be used, or text it cannot encode.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error("tokenizer.json: {0}")]
    Tokenizer(tokenizers::Error),
    #[error(
        "tokenizer.json: decoder {found}, expected ByteLevel; only byte-level BPE is supported"
    )]
    Decoder { found: String },
    #[error("tokenizer_config.json: {0}")]
    Config(serde_json::Error),
    #[error("text cannot be encoded: {0}")]
    Encode(tokenizers::Error),
    #[error("text cannot be encoded: the tokenizer's pattern fails on it: {reason}")]
    Pattern { reason: String },
    #[error("tokens cannot be decoded: {0}")]
    Decode(tokenizers::Error),
}

/// A byte-level BPE tokenizer. Cloning shares the vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    eos_id: Option<u32>,
}

impl Tokenizer {
    /// Reads tokenizer.json and, for further special tokens, tokenizer_config.json.
    ///
    /// Tokens that only the second file has are added, as transformers adds them: in the order of
    /// their ids, each with the id it has in the vocabulary or else the next one. Truncation and
    /// padding stored in the file are switched off, as in a plain `tok(text)`.
    ///
    /// # Errors
    /// If either file is not valid, or the decoder is not ByteLevel.
    pub fn from_bytes(
        tokenizer_json: &[u8],
        tokenizer_config_json: Option<&[u8]>,
    ) -> Result<Self, TokenizerError> {
        let mut inner = parse(tokenizer_json)?;
        inner
            .with_truncation(None)
            .map_err(TokenizerError::Tokenizer)?;
        inner.with_padding(None);
        match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            other => {
                return Err(TokenizerError::Decoder {
                    found: decoder_name(other),
                });
            }
        }

        let config: TokenizerConfig = match tokenizer_config_json {
            Some(bytes) => json::from_slice(bytes).map_err(TokenizerError::Config)?,
            None => TokenizerConfig::default(),
        };
        // As transformers has it: of a pre-tokenizer that is nothing else, this file decides.
        if let Some(PreTokenizerWrapper::ByteLevel(found)) = inner.get_pre_tokenizer() {
            let found = found.add_prefix_space(config.add_prefix_space());
            inner.with_pre_tokenizer(Some(found));
        }
        inner
            .add_tokens(config.added_tokens())
            .map_err(TokenizerError::Tokenizer)?;
        let known = inner.get_added_vocabulary().get_vocab().clone();
        let special = config.special_tokens();
        let missing = special.filter(|token| !known.contains_key(&token.content));
        inner
            .add_tokens(missing)
            .map_err(TokenizerError::Tokenizer)?;
        inner.set_encode_special_tokens(config.split_special_tokens());
        let eos_id = config
            .eos_token()
            .and_then(|token| inner.token_to_id(token));
        Ok(Tokenizer {
            inner: Arc::new(inner),
            eos_id,
        })
    }

    /// Token ids of `text`. Special tokens written out in the text become their ids, unless
    /// `split_special_tokens` is set; none is added.
    ///
    /// # Errors
    /// If the model has no token for some part of the text, or the pattern that splits it takes
    /// more steps than its engine allows.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    /// As [`encode`](Self::encode), for a text that stands alone: with the tokens that the
    /// tokenizer puts around every text, if it has such. A chat template writes its own.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, true)
    }

    fn encode_with(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        // The pattern engine's own errors reach us as panics: its iterator has no other way.
        let encode = AssertUnwindSafe(|| self.inner.encode_fast(text, add_special));
        let encoding = catch_unwind(encode)
            .map_err(|panic| TokenizerError::Pattern {
                reason: panic
                    .downcast::<String>()
                    .map_or_else(|_| "its engine gave up".into(), |message| *message),
            })?
            .map_err(TokenizerError::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    ///
    /// With `skip_special`, tokens marked special (not `<think>` or `<tool_call>`) are left out.
    ///
    /// # Errors
    /// Whatever the decoder says; a ByteLevel decoder accepts any ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(TokenizerError::Decode)
    }

    /// The bytes that token `id` stands for, perhaps part of a character; None outside the
    /// vocabulary, which may be smaller than the model's `vocab_size`.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        // As the decoder has it: a token with any character outside the byte alphabet is text.
        let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
        Some(bytes.unwrap_or_else(|| token.into_bytes()))
    }

    /// Whether decoding with `skip_special` leaves `id` out.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| added.is_special_token(&token.content))
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of the token written `token`, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The `eos_token` of tokenizer_config.json; generation_config.json may name others.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }
}

/// The library's tokenizer of tokenizer.json.
///
/// What is not JSON, and some of what is, makes the library panic in parts that it parses again.
fn parse(tokenizer_json: &[u8]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    serde_json::from_slice::<IgnoredAny>(tokenizer_json)
        .map_err(|error| TokenizerError::Tokenizer(Box::new(error)))?;
    let parse = || tokenizers::Tokenizer::from_bytes(tokenizer_json);
    match catch_unwind(parse) {
        Ok(parsed) => parsed.map_err(TokenizerError::Tokenizer),
        Err(_) => Err(TokenizerError::Tokenizer(
            "a part of it is not of any form that is known".into(),
        )),
    }
}

fn decoder_name(decoder: Option<&DecoderWrapper>) -> String {
    let name = decoder
        .and_then(|decoder| serde_json::to_value(decoder).ok())
        .and_then(|json| json.get("type").and_then(Value::as_str).map(str::to_owned));
    name.unwrap_or_else(|| "none".to_owned())
}

/// The byte that a character of a byte-level vocabulary stands for.
///
/// Printable Latin-1 stands for itself; the 68 other bytes follow from U+0100 in ascending order.
///
/// Source: GPT-2 `bytes_to_unicode`.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of;

    #[test]
    fn every_byte_has_exactly_one_character() {
        let mut bytes: Vec<u8> = (0..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
