//! config.json: which model this is, and whether its numbers make sense.

use serde_json::{Map, Value};
use thiserror::Error;

use crate::backend::{AttentionShape, DeltaNetShape, MixerKind, ModelShape, MoeShape};

/// `model_type` values this program runs.
pub const SUPPORTED: &[&str] = &["qwen3_next"];

/// The field of config.json that marks a model with random weights, see [`synth`](super::synth).
pub const SYNTHETIC_FIELD: &str = "moectl_synthetic";

/// A checked config.json.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub model_type: String,
    pub shape: ModelShape,
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    /// The weights are random: what the model says means nothing
    pub synthetic: bool,
}

/// Why a config.json cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("config.json: not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "config.json: model_type `{found}` is not supported; supported: {}",
        SUPPORTED.join(", ")
    )]
    ModelType { found: String },
    #[error("config.json: `{field}` is {found}, expected {expected}")]
    Field {
        field: String,
        found: String,
        expected: String,
    },
}

/// A field with its name, for errors that point at it.
struct Fields<'a> {
    root: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn wrong(field: &str, found: impl ToString, expected: impl ToString) -> ConfigError {
        ConfigError::Field {
            field: field.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// transformers 5.x moved the rotary fields into `rope_parameters`; look there first.
    fn get(&self, field: &str) -> Option<&Value> {
        let moved = self
            .root
            .get("rope_parameters")
            .and_then(|rope| rope.get(field));
        moved
            .or_else(|| self.root.get(field))
            .filter(|v| !v.is_null())
    }

    /// A count of at least one. Bounded far above any real model, so that products of a few
    /// cannot overflow.
    fn count(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        const LIMIT: u64 = 1 << 24;
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_u64() {
            Some(n) if (1..=LIMIT).contains(&n) => Ok(n as usize),
            _ => Err(Self::wrong(
                field,
                value,
                format!("a whole number from 1 to {LIMIT}"),
            )),
        }
    }

    fn positive(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_f64() {
            Some(v) if v > 0.0 && v.is_finite() => Ok(v),
            _ => Err(Self::wrong(field, value, "a number above 0")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| Self::wrong(field, value, "true or false"))
    }
}

impl ModelConfig {
    /// Parses config.json and checks every number against the others.
    ///
    /// Missing fields take the defaults of transformers' `Qwen3NextConfig`, which differ from the
    /// published model in places. Source: transformers 4.57.6 and 5.23.0.
    ///
    /// # Errors
    /// An unsupported `model_type`, by name; an impossible number, with what was expected.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        let root: Map<String, Value> = serde_json::from_slice(json)?;
        let model_type = match root.get("model_type") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => {
                return Err(ConfigError::ModelType {
                    found: other.to_string(),
                });
            }
            None => {
                return Err(ConfigError::ModelType {
                    found: "(none)".into(),
                });
            }
        };
        if !SUPPORTED.contains(&model_type.as_str()) {
            return Err(ConfigError::ModelType { found: model_type });
        }
        let fields = Fields { root: &root };
        reject_what_is_not_built(&fields)?;
        let mixers = mixers(&fields)?;
        let shape = ModelShape {
            vocab_size: fields.count("vocab_size", 151_936)?,
            hidden_size: fields.count("hidden_size", 2048)?,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)? as f32,
            attention: attention(&fields)?,
            delta_net: delta_net(&fields)?,
            moe: moe(&fields, mixers.len())?,
            mixers,
        };
        Ok(ModelConfig {
            model_type,
            shape,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            max_position_embeddings: fields.count("max_position_embeddings", 32_768)?,
            synthetic: fields.get(SYNTHETIC_FIELD).is_some(),
        })
    }
}

/// Variants the family's code allows and no published checkpoint uses.
fn reject_what_is_not_built(fields: &Fields) -> Result<(), ConfigError> {
    if let Some(act) = fields
        .get("hidden_act")
        .filter(|act| act.as_str() != Some("silu"))
    {
        return Err(Fields::wrong("hidden_act", act, "\"silu\""));
    }
    if fields.flag("attention_bias", false)? {
        return Err(Fields::wrong("attention_bias", true, "false"));
    }
    if let Some(scaling) = fields.get("rope_scaling") {
        return Err(Fields::wrong(
            "rope_scaling",
            scaling,
            "null: scaled rotary is not built",
        ));
    }
    let rope_type = fields
        .get("rope_type")
        .filter(|kind| kind.as_str() != Some("default"));
    if let Some(kind) = rope_type {
        return Err(Fields::wrong(
            "rope_parameters.rope_type",
            kind,
            "\"default\"",
        ));
    }
    Ok(())
}

fn mixers(fields: &Fields) -> Result<Vec<MixerKind>, ConfigError> {
    const MOST_LAYERS: usize = 4096;
    let layers = fields.count("num_hidden_layers", 48)?;
    if layers > MOST_LAYERS {
        return Err(Fields::wrong(
            "num_hidden_layers",
            layers,
            format!("at most {MOST_LAYERS}"),
        ));
    }
    let Some(types) = fields.get("layer_types") else {
        let interval = fields.count("full_attention_interval", 4)?;
        return Ok((1..=layers)
            .map(|i| match i % interval {
                0 => MixerKind::GatedAttention,
                _ => MixerKind::GatedDeltaNet,
            })
            .collect());
    };
    let list = types
        .as_array()
        .ok_or_else(|| Fields::wrong("layer_types", types, "a list with one name per layer"))?;
    if list.len() != layers {
        let found = format!("a list of {}", list.len());
        return Err(Fields::wrong(
            "layer_types",
            found,
            format!("num_hidden_layers = {layers}"),
        ));
    }
    list.iter()
        .map(|name| match name.as_str() {
            Some("linear_attention") => Ok(MixerKind::GatedDeltaNet),
            Some("full_attention") => Ok(MixerKind::GatedAttention),
            _ => Err(Fields::wrong(
                "layer_types",
                name,
                "\"linear_attention\" or \"full_attention\"",
            )),
        })
        .collect()
}

fn attention(fields: &Fields) -> Result<AttentionShape, ConfigError> {
    let num_attention_heads = fields.count("num_attention_heads", 16)?;
    let num_key_value_heads = fields.count("num_key_value_heads", 2)?;
    let head_dim = fields.count("head_dim", 256)?;
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let expected = format!("a divisor of num_attention_heads = {num_attention_heads}");
        return Err(Fields::wrong(
            "num_key_value_heads",
            num_key_value_heads,
            expected,
        ));
    }
    let factor = fields.positive("partial_rotary_factor", 0.25)?;
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let expected = format!("a share of head_dim = {head_dim} that is a positive even number");
        return Err(Fields::wrong("partial_rotary_factor", factor, expected));
    }
    Ok(AttentionShape {
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rotary_dim,
        rope_theta: fields.positive("rope_theta", 10_000.0)?,
    })
}

fn delta_net(fields: &Fields) -> Result<DeltaNetShape, ConfigError> {
    let shape = DeltaNetShape {
        num_key_heads: fields.count("linear_num_key_heads", 16)?,
        num_value_heads: fields.count("linear_num_value_heads", 32)?,
        key_head_dim: fields.count("linear_key_head_dim", 128)?,
        value_head_dim: fields.count("linear_value_head_dim", 128)?,
        conv_kernel_dim: fields.count("linear_conv_kernel_dim", 4)?,
    };
    if !shape.num_value_heads.is_multiple_of(shape.num_key_heads) {
        let expected = format!(
            "a multiple of linear_num_key_heads = {}",
            shape.num_key_heads
        );
        return Err(Fields::wrong(
            "linear_num_value_heads",
            shape.num_value_heads,
            expected,
        ));
    }
    Ok(shape)
}

fn moe(fields: &Fields, layers: usize) -> Result<MoeShape, ConfigError> {
    let num_experts = fields.count("num_experts", 512)?;
    // Routing events carry ids as u16.
    if num_experts > usize::from(u16::MAX) + 1 {
        return Err(Fields::wrong("num_experts", num_experts, "at most 65536"));
    }
    let num_experts_per_tok = fields.count("num_experts_per_tok", 10)?;
    if num_experts_per_tok > num_experts {
        let expected = format!("at most num_experts = {num_experts}");
        return Err(Fields::wrong(
            "num_experts_per_tok",
            num_experts_per_tok,
            expected,
        ));
    }
    let step = fields.count("decoder_sparse_step", 1)?;
    let dense = fields.get("mlp_only_layers").and_then(Value::as_array);
    if let Some(layer) = dense.and_then(|list| list.first()) {
        let expected = "no dense layers: every published checkpoint has experts in each";
        return Err(Fields::wrong("mlp_only_layers", layer, expected));
    }
    if step != 1 && layers > 1 {
        return Err(Fields::wrong(
            "decoder_sparse_step",
            step,
            "1: experts in every layer",
        ));
    }
    Ok(MoeShape {
        num_experts,
        num_experts_per_tok,
        moe_intermediate_size: fields.count("moe_intermediate_size", 512)?,
        shared_expert_intermediate_size: fields.count("shared_expert_intermediate_size", 512)?,
        norm_topk_prob: fields.flag("norm_topk_prob", true)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &str) -> Result<ModelConfig, ConfigError> {
        ModelConfig::parse(format!(r#"{{"model_type": "qwen3_next"{fields}}}"#).as_bytes())
    }

    #[test]
    fn missing_fields_take_the_class_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.shape.hidden_size, 2048);
        assert_eq!(config.shape.num_layers(), 48);
        let full: Vec<usize> = (0..48)
            .filter(|&i| config.shape.mixers[i] == MixerKind::GatedAttention)
            .collect();
        assert_eq!(full, (0..12).map(|i| 4 * i + 3).collect::<Vec<_>>());
        assert_eq!(config.shape.attention.rope_theta, 10_000.0);
        assert_eq!(config.shape.attention.rotary_dim, 64);
    }

    #[test]
    fn rope_parameters_win_over_flat_fields() {
        let config = parse(
            r#", "rope_theta": 5.0,
            "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_type": "default"}"#,
        )
        .unwrap();
        assert_eq!(config.shape.attention.rope_theta, 1e7);
        assert_eq!(config.shape.attention.rotary_dim, 128);
    }

    #[test]
    fn impossible_numbers_are_named() {
        for (fields, expected) in [
            (
                r#", "num_hidden_layers": 0"#,
                "`num_hidden_layers` is 0, expected a whole number",
            ),
            (
                r#", "num_experts": 8, "num_experts_per_tok": 9"#,
                "`num_experts_per_tok` is 9",
            ),
            (
                r#", "num_key_value_heads": 3"#,
                "`num_key_value_heads` is 3, expected a divisor",
            ),
            (
                r#", "linear_num_value_heads": 17"#,
                "expected a multiple of linear_num_key_heads",
            ),
            (r#", "hidden_size": -4"#, "`hidden_size` is -4"),
            (r#", "hidden_size": "big""#, "`hidden_size` is \"big\""),
            (
                r#", "layer_types": ["linear_attention"]"#,
                "`layer_types` is a list of 1",
            ),
            (r#", "mlp_only_layers": [3]"#, "`mlp_only_layers` is 3"),
            (
                r#", "partial_rotary_factor": 2.0"#,
                "`partial_rotary_factor` is 2",
            ),
            (r#", "rms_norm_eps": 0"#, "`rms_norm_eps` is 0"),
        ] {
            let error = parse(fields).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let error = ModelConfig::parse(br#"{"model_type": "llama"}"#)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "config.json: model_type `llama` is not supported; supported: qwen3_next"
        );
    }
}
