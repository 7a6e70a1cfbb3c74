//! How a model wants to be sampled and where it stops: generation_config.json.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::formats::json;

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
    pub suppressed: Suppressed,
    /// Fields that transformers obeys and nobody here does, with their values
    pub unheeded: Vec<(&'static str, Value)>,
}

/// Tokens that may not follow: `suppress_tokens`, `begin_suppress_tokens` and `bad_words_ids`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Suppressed {
    always: Vec<u32>,
    at_begin: Vec<u32>,
    /// Of each, the last token may not follow the others.
    sequences: Vec<Vec<u32>>,
}

impl Suppressed {
    pub fn is_empty(&self) -> bool {
        self.always.is_empty() && self.at_begin.is_empty() && self.sequences.is_empty()
    }

    /// Tokens before the next one that tell what may not follow.
    pub fn longest_sequence(&self) -> usize {
        self.sequences.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// What may not follow `recent`, the last ids of prompt and text; `first` for the first token
    /// that is generated.
    pub fn after(&self, recent: &[u32], first: bool) -> impl Iterator<Item = u32> {
        let at_begin: &[u32] = if first { &self.at_begin } else { &[] };
        let ends = self.sequences.iter().filter_map(|sequence| {
            let (last, before) = sequence.split_last()?;
            recent.ends_with(before).then_some(*last)
        });
        (self.always.iter().chain(at_begin).copied()).chain(ends)
    }
}

/// Fields of transformers' `GenerationConfig` that change which tokens are generated and are not
/// carried out, with the number that changes nothing.
const UNHEEDED: [(&str, f64); 24] = [
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("exponential_decay_length_penalty", f64::NAN),
    ("force_words_ids", f64::NAN),
    ("forced_bos_token_id", f64::NAN),
    ("forced_eos_token_id", f64::NAN),
    ("guidance_scale", 1.0),
    ("max_length", 20.0),
    ("max_new_tokens", f64::NAN),
    ("max_time", f64::NAN),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("sequence_bias", f64::NAN),
    ("stop_strings", f64::NAN),
    ("token_healing", f64::NAN),
    ("top_h", 1.0),
    ("typical_p", 1.0),
    ("watermarking_config", f64::NAN),
];

#[derive(Default, Deserialize)]
struct File {
    eos_token_id: Option<OneOrMany>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    suppress_tokens: Option<Vec<u32>>,
    begin_suppress_tokens: Option<Vec<u32>>,
    bad_words_ids: Option<Vec<Vec<u32>>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl File {
    /// A word that is only an end-of-text token is none, as in transformers.
    fn suppressed(&self, eos: &BTreeSet<u32>) -> Suppressed {
        let is_eos = |word: &[u32]| matches!(word, [id] if eos.contains(id));
        let words = self.bad_words_ids.iter().flatten();
        let words = words.filter(|word| !word.is_empty() && !is_eos(word));
        Suppressed {
            always: self.suppress_tokens.clone().unwrap_or_default(),
            at_begin: self.begin_suppress_tokens.clone().unwrap_or_default(),
            sequences: words.cloned().collect(),
        }
    }

    fn unheeded(&self) -> Vec<(&'static str, Value)> {
        let set = UNHEEDED.iter().filter_map(|&(field, off)| {
            let value = self.others.get(field)?;
            let is_off =
                value.is_null() || *value == Value::Bool(false) || value.as_f64() == Some(off);
            (!is_off).then(|| (field, value.clone()))
        });
        set.collect()
    }
}

#[derive(Deserialize)]
struct ModelFile {
    eos_token_id: Option<OneOrMany>,
    /// Of a model that also sees images
    text_config: Option<Box<ModelFile>>,
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
    fn to_vec(&self) -> Vec<u32> {
        match self {
            OneOrMany::One(id) => vec![*id],
            OneOrMany::Many(ids) => ids.clone(),
        }
    }
}

impl GenerationConfig {
    /// What a user should know: fields that transformers would obey.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let note = |(field, value): &(&str, Value)| {
            format!("note: generation_config.json: {field} is {value}, which is not carried out")
        };
        self.unheeded.iter().map(note)
    }

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
                json::from_slice(bytes).map_err(|source| GenerationConfigError::Json {
                    file: "generation_config.json",
                    source,
                })?
            }
            None => File::default(),
        };
        let model: ModelFile =
            json::from_slice(config_json).map_err(|source| GenerationConfigError::Json {
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
        let eos_token_ids = file.eos_token_id.as_ref();
        let of_text = model.text_config.as_ref();
        let eos_token_ids = eos_token_ids
            .or(model.eos_token_id.as_ref())
            .or(of_text.and_then(|text| text.eos_token_id.as_ref()));
        let eos_token_ids = eos_token_ids.map_or_else(Vec::new, OneOrMany::to_vec);
        Ok(GenerationConfig {
            suppressed: file.suppressed(&eos_token_ids.iter().copied().collect()),
            unheeded: file.unheeded(),
            eos_token_ids,
            do_sample: file.do_sample.unwrap_or(false),
            temperature: file.temperature,
            top_k: file.top_k,
            top_p: file.top_p,
            min_p: file.min_p,
            repetition_penalty: file.repetition_penalty,
        })
    }
}
