//! How a model wants to be sampled and where it stops: generation_config.json.

use serde::Deserialize;
use thiserror::Error;

/// A generation_config.json or config.json with a field that makes no sense.
#[derive(Debug, Error)]
pub enum GenerationConfigError {
    #[error("{file}: {source}")]
    Json {
        file: &'static str,
        source: serde_json::Error,
    },
    #[error("generation_config.json: {field} {found}, expected {expected}")]
    Value {
        field: &'static str,
        found: f32,
        expected: &'static str,
    },
}

/// Sampling defaults and stop tokens of a model. A field the files leave out is None.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Any of these ends the text.
    pub eos_token_ids: Vec<u32>,
    /// False means greedy, whatever the fields below say.
    pub do_sample: bool,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

#[derive(Default, Deserialize)]
struct File {
    eos_token_id: Option<OneOrMany>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

#[derive(Deserialize)]
struct ModelFile {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "eos_token_id: expected a token id or a list of them"
)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

impl GenerationConfig {
    /// Reads generation_config.json, which may be missing, over config.json.
    ///
    /// Only the stop tokens fall back to config.json. transformers would set top_k to 50 where the
    /// file has none; here it stays off.
    ///
    /// # Errors
    /// If a file is not valid JSON of the expected form, or a number is out of range.
    pub fn from_bytes(
        generation_config_json: Option<&[u8]>,
        config_json: &[u8],
    ) -> Result<Self, GenerationConfigError> {
        let file: File = match generation_config_json {
            Some(bytes) => {
                serde_json::from_slice(bytes).map_err(|source| GenerationConfigError::Json {
                    file: "generation_config.json",
                    source,
                })?
            }
            None => File::default(),
        };
        let model: ModelFile =
            serde_json::from_slice(config_json).map_err(|source| GenerationConfigError::Json {
                file: "config.json",
                source,
            })?;
        for (field, value, range, expected) in [
            ("temperature", file.temperature, 0.0..=f32::MAX, "0 or more"),
            ("top_p", file.top_p, 0.0..=1.0, "0 to 1"),
            ("min_p", file.min_p, 0.0..=1.0, "0 to 1"),
            (
                "repetition_penalty",
                file.repetition_penalty,
                f32::MIN_POSITIVE..=f32::MAX,
                "more than 0",
            ),
        ] {
            if let Some(found) = value.filter(|value| !range.contains(value)) {
                return Err(GenerationConfigError::Value {
                    field,
                    found,
                    expected,
                });
            }
        }
        Ok(GenerationConfig {
            eos_token_ids: file
                .eos_token_id
                .or(model.eos_token_id)
                .map_or_else(Vec::new, OneOrMany::into_vec),
            do_sample: file.do_sample.unwrap_or(false),
            temperature: file.temperature,
            top_k: file.top_k,
            top_p: file.top_p,
            min_p: file.min_p,
            repetition_penalty: file.repetition_penalty,
        })
    }
}
