//! Which synthetic model: a shape by name, fields that differ, a seed, and how local routing is.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::TOKENIZER_SIZE;
use crate::formats::nf4::BLOCKSIZE;
use crate::model::config::{ConfigError, ModelConfig, SYNTHETIC_FIELD};

/// How a model spec of this kind begins.
pub const PREFIX: &str = "synth:";

/// Version of the generator: another one makes other bytes from the same seed.
const VERSION: u32 = 3;

/// Calibrated on the built-in workloads, see `tests/synth.rs`.
pub const DEFAULT_LOCALITY: f64 = 0.6;

/// Shapes by name and what config.json says of them.
const SHAPES: [(&str, &str); 4] = [
    (
        "qwen3-next-80b-a3b",
        include_str!("qwen3-next-80b-a3b.json"),
    ),
    ("qwen3.6-35b-a3b", include_str!("qwen3.6-35b-a3b.json")),
    ("qwen3-30b-a3b", include_str!("qwen3-30b-a3b.json")),
    ("tiny", include_str!("tiny.json")),
];

/// Fields that may be overridden: as a spec and flags spell them, and as config.json does.
pub const FIELDS: [(&str, &str); 17] = [
    ("layers", "num_hidden_layers"),
    ("experts", "num_experts"),
    ("experts-per-tok", "num_experts_per_tok"),
    ("hidden-size", "hidden_size"),
    ("vocab-size", "vocab_size"),
    ("moe-intermediate-size", "moe_intermediate_size"),
    (
        "shared-expert-intermediate-size",
        "shared_expert_intermediate_size",
    ),
    ("attention-heads", "num_attention_heads"),
    ("key-value-heads", "num_key_value_heads"),
    ("head-dim", "head_dim"),
    ("linear-key-heads", "linear_num_key_heads"),
    ("linear-value-heads", "linear_num_value_heads"),
    ("linear-key-head-dim", "linear_key_head_dim"),
    ("linear-value-head-dim", "linear_value_head_dim"),
    ("linear-conv-kernel-dim", "linear_conv_kernel_dim"),
    ("full-attention-interval", "full_attention_interval"),
    ("max-position-embeddings", "max_position_embeddings"),
];

/// A synthetic model, checked: same spec, same bytes.
#[derive(Clone, Debug)]
pub struct Spec {
    shape: &'static str,
    /// In the order of [`FIELDS`]: config.json's name, value
    overrides: Vec<(&'static str, u64)>,
    pub seed: u64,
    /// Share of routing that the token and its topic decide; the rest varies with the context
    pub locality: f64,
    /// Layers of the model that this one is the beginning of, if it is
    pub(super) depth: Option<usize>,
}

/// A spec of no model.
#[derive(Debug, Error)]
pub enum SpecError {
    #[error("synthetic model: no shape `{found}`; shapes: {}", SHAPES.map(|s| s.0).join(", "))]
    Shape { found: String },
    #[error(
        "synthetic model: no field `{found}`; fields: seed, locality, {}",
        FIELDS.map(|f| f.0).join(", ")
    )]
    Field { found: String },
    #[error("synthetic model: {field} is `{found}`, expected {expected}")]
    Value {
        field: String,
        found: String,
        expected: String,
    },
    #[error("synthetic model: {0}")]
    Config(#[from] ConfigError),
}

impl FromStr for Spec {
    type Err = SpecError;

    /// Reads `SHAPE` or `SHAPE?field=value&…`.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (shape, query) = text.split_once('?').unwrap_or((text, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Spec::new(shape, pairs)
    }
}

impl fmt::Display for Spec {
    /// The spec that names this model, with the prefix: what differs from the defaults, in order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.shape)?;
        let spelled = |field| FIELDS.iter().find(|(_, name)| *name == field);
        let mut pairs: Vec<String> = self
            .overrides
            .iter()
            .filter_map(|(field, value)| Some(format!("{}={value}", spelled(*field)?.0)))
            .collect();
        if self.seed != 0 {
            pairs.push(format!("seed={}", self.seed));
        }
        if self.locality != DEFAULT_LOCALITY {
            pairs.push(format!("locality={}", self.locality));
        }
        match pairs.is_empty() {
            true => Ok(()),
            false => write!(f, "?{}", pairs.join("&")),
        }
    }
}

impl Spec {
    /// A shape and what differs from it; of a field given twice the last counts.
    ///
    /// # Errors
    /// An unknown shape or field, or a value that is impossible, by name.
    pub fn new<'a>(
        shape: &str,
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, SpecError> {
        let Some((shape, _)) = SHAPES.iter().find(|(name, _)| *name == shape) else {
            let found = shape.into();
            return Err(SpecError::Shape { found });
        };
        let (mut seed, mut locality) = (0, DEFAULT_LOCALITY);
        let mut given = Map::new();
        for (key, value) in pairs {
            let wrong = |expected: &str| SpecError::Value {
                field: key.into(),
                found: value.into(),
                expected: expected.into(),
            };
            match key {
                "seed" => seed = value.parse().map_err(|_| wrong("a whole number"))?,
                "locality" => {
                    let parsed = value.parse().ok().filter(|v| (0.0..=1.0).contains(v));
                    locality = parsed.ok_or_else(|| wrong("a number from 0 to 1"))?;
                }
                _ => {
                    let dashed = key.replace('_', "-");
                    let known = FIELDS.iter().find(|(a, b)| *a == dashed || *b == key);
                    let Some((_, field)) = known else {
                        let found = key.into();
                        return Err(SpecError::Field { found });
                    };
                    let number = value.parse::<u64>().ok().filter(|n| *n > 0);
                    let number = number.ok_or_else(|| wrong("a whole number from 1"))?;
                    given.insert(field.to_string(), number.into());
                }
            }
        }
        let overrides = FIELDS
            .iter()
            .filter_map(|(_, field)| Some((*field, given.get(*field)?.as_u64()?)))
            .collect();
        let spec = Spec {
            shape,
            overrides,
            seed,
            locality,
            depth: None,
        };
        check(&spec.config()?)?;
        Ok(spec)
    }

    /// Overrides a field of config.json.
    pub(super) fn set(&mut self, field: &'static str, value: usize) -> Result<(), SpecError> {
        self.overrides.retain(|(name, _)| *name != field);
        self.overrides.push((field, value as u64));
        check(&self.config()?)
    }

    /// The checked config.json.
    ///
    /// # Errors
    /// None after [`Spec::new`].
    pub fn config(&self) -> Result<ModelConfig, ConfigError> {
        ModelConfig::parse(&self.config_json())
    }

    /// The config.json of this model, which is marked as synthetic.
    pub fn config_json(&self) -> Vec<u8> {
        let shape = SHAPES.iter().find(|(name, _)| *name == self.shape);
        let (_, shape) = shape.expect("only made with a shape of the list");
        let mut config: Map<String, Value> =
            serde_json::from_str(shape).expect("the shapes are valid JSON");
        for (field, value) in &self.overrides {
            config.insert(field.to_string(), (*value).into());
        }
        let mark = json!({"version": VERSION, "seed": self.seed, "locality": self.locality});
        config.insert(SYNTHETIC_FIELD.into(), mark);
        let mut json = serde_json::to_vec_pretty(&config).expect("a map of JSON values");
        json.push(b'\n');
        json
    }
}

/// What the published layout and the tokenizer ask for beyond what any config.json must fulfil.
fn check(config: &ModelConfig) -> Result<(), SpecError> {
    let wrong = |field: &str, found: usize, expected: String| {
        Err(SpecError::Value {
            field: field.into(),
            found: found.to_string(),
            expected,
        })
    };
    let shape = &config.shape;
    if shape.vocab_size < TOKENIZER_SIZE {
        let expected = format!("at least {TOKENIZER_SIZE}, what the tokenizer has");
        return wrong("vocab-size", shape.vocab_size, expected);
    }
    let inputs = [
        ("hidden-size", shape.hidden_size),
        ("moe-intermediate-size", shape.moe.moe_intermediate_size),
        (
            "shared-expert-intermediate-size",
            shape.moe.shared_expert_intermediate_size,
        ),
        (
            "attention-heads times head-dim",
            shape.attention.o_proj_cols(),
        ),
        (
            "linear-value-heads times linear-value-head-dim",
            shape.delta_net.value_dim(),
        ),
    ];
    // Else blocks of weights that share a scale would cross row ends, as no published file has.
    match inputs.iter().find(|(_, n)| !n.is_multiple_of(BLOCKSIZE)) {
        Some((field, n)) => wrong(field, *n, format!("a multiple of {BLOCKSIZE}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(spec: &str, expected: &str) {
        let error = spec.parse::<Spec>().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn bad_specs_are_refused_by_field() {
        refused(
            "foo",
            "no shape `foo`; shapes: qwen3-next-80b-a3b, qwen3.6-35b-a3b, qwen3-30b-a3b, \
             tiny",
        );
        refused("tiny?layers=0", "layers is `0`, expected a whole number");
        refused("tiny?layers", "layers is ``, expected a whole number");
        refused(
            "tiny?colour=3",
            "no field `colour`; fields: seed, locality, layers",
        );
        refused(
            "tiny?locality=2",
            "locality is `2`, expected a number from 0 to 1",
        );
        refused("tiny?seed=x", "seed is `x`");
        refused("tiny?experts=4", "`num_experts_per_tok` is 8");
        refused(
            "tiny?hidden-size=96",
            "hidden-size is `96`, expected a multiple of 64",
        );
        refused(
            "tiny?vocab-size=100",
            "vocab-size is `100`, expected at least 8192",
        );
    }

    #[test]
    fn a_spec_is_spelled_by_what_differs_from_its_shape() {
        for (spec, spelled) in [
            ("tiny", "synth:tiny"),
            ("tiny?seed=0", "synth:tiny"),
            (
                "tiny?locality=0.25&num_experts=32&seed=4&layers=9&layers=3",
                "synth:tiny?layers=3&experts=32&seed=4&locality=0.25",
            ),
        ] {
            assert_eq!(spec.parse::<Spec>().unwrap().to_string(), spelled);
        }
    }

    #[test]
    fn the_shapes_are_those_of_their_models() {
        let shape = |spec: &str| spec.parse::<Spec>().unwrap().config().unwrap().shape;
        assert_eq!(shape("qwen3-next-80b-a3b").num_layers(), 48);
        assert_eq!(shape("qwen3-next-80b-a3b").moe.num_experts, 512);
        assert_eq!(shape("qwen3.6-35b-a3b").num_layers(), 40);
        assert_eq!(shape("qwen3.6-35b-a3b").moe.num_experts_per_tok, 8);
        assert_eq!(shape("qwen3-30b-a3b").attention.rotary_dim, 128);
        let builtin = include_bytes!("../../../workloads/tiny-moe/config.json");
        assert_eq!(shape("tiny"), ModelConfig::parse(builtin).unwrap().shape);
    }
}
