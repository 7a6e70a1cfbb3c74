//! config.json: which model this is, and whether its numbers make sense.

use serde_json::{Map, Value};

pub use super::fields::ConfigError;

use super::families::qwen3_moe::NO_SHARED_EXPERT;
use super::families::{self, Defaults, Family};
use super::fields::Fields;
use super::rope::RopeConfig;
use crate::backend::{AttentionShape, DeltaNetShape, MixerKind, ModelShape, MoeShape};
use crate::formats::json;

/// The field of config.json that marks a model with random weights, see [`synth`](super::synth).
pub const SYNTHETIC_FIELD: &str = "moectl_synthetic";

/// A checked config.json.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub model_type: String,
    pub family: &'static Family,
    pub shape: ModelShape,
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    /// The weights are random: what the model says means nothing
    pub synthetic: bool,
}

impl ModelConfig {
    /// Parses config.json and checks every number against the others.
    ///
    /// Missing fields take the defaults of the family's config class in transformers, which differ
    /// from the published models in places. Source: transformers 4.57.6 and 5.24.
    ///
    /// # Errors
    /// An unsupported `model_type`, by name; an impossible number, with what was expected.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let root: Map<String, Value> = json::from_slice(bytes)?;
        let model_type = match root.get("model_type") {
            Some(Value::String(name)) => name.clone(),
            other => {
                let found = other.map_or("(none)".into(), Value::to_string);
                return Err(ConfigError::ModelType { found });
            }
        };
        let Some(family) = families::of(&model_type) else {
            return Err(ConfigError::ModelType { found: model_type });
        };
        let whole = Fields::new(&root, "");
        // A model that also sees images keeps what its text part is in an object of its own.
        let fields = match root.get("text_config") {
            Some(Value::Object(text)) => Fields::new(text, "text_config"),
            _ => Fields::new(&root, ""),
        };
        reject_what_is_not_built(&fields)?;
        let defaults = &family.defaults;
        let mixers = mixers(&fields, family)?;
        let positions = fields.count("max_position_embeddings", 32_768)?;
        let rope = RopeConfig::parse(&fields, 10_000.0, defaults.partial_rotary_factor)?;
        let shape = ModelShape {
            vocab_size: fields.count("vocab_size", defaults.vocab_size)?,
            hidden_size: fields.count("hidden_size", 2048)?,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)? as f32,
            attention: attention(&fields, defaults, &rope)?,
            delta_net: delta_net(&fields)?,
            moe: moe(&fields, family, mixers.len())?,
            mixers,
        };
        let tied = |fields: &Fields| fields.flag("tie_word_embeddings", false);
        Ok(ModelConfig {
            model_type,
            family,
            shape,
            tie_word_embeddings: tied(&whole)? || tied(&fields)?,
            max_position_embeddings: positions.max(rope.scaled_positions.unwrap_or(0)),
            synthetic: whole.optional(SYNTHETIC_FIELD).is_some(),
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
    for flag in ["attention_bias", "use_sliding_window"] {
        if fields.flag(flag, false)? {
            return Err(Fields::wrong(flag, true, "false"));
        }
    }
    Ok(())
}

fn mixers(fields: &Fields, family: &Family) -> Result<Vec<MixerKind>, ConfigError> {
    const MOST_LAYERS: usize = 4096;
    let layers = fields.count("num_hidden_layers", family.defaults.layers)?;
    if layers > MOST_LAYERS {
        return Err(Fields::wrong(
            "num_hidden_layers",
            layers,
            format!("at most {MOST_LAYERS}"),
        ));
    }
    let Some(types) = fields.optional("layer_types") else {
        if family.delta_net.is_none() {
            return Ok(vec![MixerKind::GatedAttention; layers]);
        }
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
            Some("linear_attention") if family.delta_net.is_some() => Ok(MixerKind::GatedDeltaNet),
            Some("full_attention") => Ok(MixerKind::GatedAttention),
            _ => Err(Fields::wrong(
                "layer_types",
                name,
                "\"linear_attention\" or \"full_attention\"",
            )),
        })
        .collect()
}

fn attention(
    fields: &Fields,
    defaults: &Defaults,
    rope: &RopeConfig,
) -> Result<AttentionShape, ConfigError> {
    let num_attention_heads = fields.count("num_attention_heads", defaults.num_attention_heads)?;
    let num_key_value_heads = fields.count("num_key_value_heads", defaults.num_key_value_heads)?;
    let head_dim = match (defaults.head_dim, fields.optional("head_dim")) {
        (None, None) => fields.count("hidden_size", 2048)? / num_attention_heads,
        _ => fields.count("head_dim", defaults.head_dim.unwrap_or(0))?,
    };
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let expected = format!("a divisor of num_attention_heads = {num_attention_heads}");
        return Err(Fields::wrong(
            "num_key_value_heads",
            num_key_value_heads,
            expected,
        ));
    }
    let factor = rope.partial_rotary_factor;
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
        rope: rope.rope.clone(),
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

fn moe(fields: &Fields, family: &Family, layers: usize) -> Result<MoeShape, ConfigError> {
    let defaults = &family.defaults;
    let num_experts = fields.count("num_experts", defaults.num_experts)?;
    // Routing events carry ids as u16.
    if num_experts > usize::from(u16::MAX) + 1 {
        return Err(Fields::wrong("num_experts", num_experts, "at most 65536"));
    }
    let num_experts_per_tok = fields.count("num_experts_per_tok", defaults.num_experts_per_tok)?;
    if num_experts_per_tok > num_experts {
        let expected = format!("at most num_experts = {num_experts}");
        return Err(Fields::wrong(
            "num_experts_per_tok",
            num_experts_per_tok,
            expected,
        ));
    }
    let step = fields.count("decoder_sparse_step", 1)?;
    let dense = fields.optional("mlp_only_layers").and_then(Value::as_array);
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
        moe_intermediate_size: fields
            .count("moe_intermediate_size", defaults.moe_intermediate_size)?,
        shared_expert_intermediate_size: match family.shared_expert {
            true => fields.count("shared_expert_intermediate_size", 512)?,
            false => NO_SHARED_EXPERT,
        },
        norm_topk_prob: family.always_norm_topk
            || fields.flag("norm_topk_prob", defaults.norm_topk_prob)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Rope, RopeScaling};

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
        assert_eq!(config.shape.attention.rope, Rope::plain(10_000.0));
        assert_eq!(config.shape.attention.rotary_dim, 64);
    }

    #[test]
    fn every_family_has_the_defaults_of_its_class() {
        let shape = |json: &str| ModelConfig::parse(json.as_bytes()).unwrap().shape;
        let qwen3 = shape(r#"{"model_type": "qwen3_moe", "layer_types": null}"#);
        assert!(qwen3.mixers.iter().all(|m| *m == MixerKind::GatedAttention));
        assert_eq!(
            (qwen3.attention.head_dim, qwen3.attention.rotary_dim),
            (64, 64)
        );
        assert!(!qwen3.moe.norm_topk_prob);
        let text = r#"{"norm_topk_prob": false, "num_experts_per_tok": 4}"#;
        let qwen3_5 = shape(&format!(
            r#"{{"model_type": "qwen3_5_moe", "text_config": {text}, "num_experts": 7}}"#
        ));
        assert_eq!(qwen3_5.num_layers(), 40);
        assert_eq!(
            (qwen3_5.moe.num_experts, qwen3_5.moe.num_experts_per_tok),
            (256, 4)
        );
        assert!(qwen3_5.moe.norm_topk_prob);
    }

    #[test]
    fn rope_parameters_win_over_flat_fields() {
        let config = parse(
            r#", "rope_theta": 5.0,
            "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_type": "default"}"#,
        )
        .unwrap();
        assert_eq!(config.shape.attention.rope, Rope::plain(1e7));
        assert_eq!(config.shape.attention.rotary_dim, 128);
    }

    #[test]
    fn null_is_missing_only_where_transformers_takes_it_so() {
        let config =
            parse(r#", "layer_types": null, "rope_scaling": null, "rope_parameters": null"#);
        assert_eq!(config.unwrap().shape.num_layers(), 48);
        let config = parse(r#", "norm_topk_prob": null, "attention_bias": null"#).unwrap();
        assert!(!config.shape.moe.norm_topk_prob);
        let error = parse(r#", "hidden_size": null"#).unwrap_err().to_string();
        assert!(
            error.contains("`hidden_size` is null, expected a whole number"),
            "{error}"
        );
    }

    #[test]
    fn json_is_read_as_python_reads_it() {
        let config =
            parse(r#", "router_aux_loss_coef": NaN, "hidden_size": 64, "hidden_size": 128"#);
        assert_eq!(config.unwrap().shape.hidden_size, 128);
        let error = parse(r#", "rms_norm_eps": NaN"#).unwrap_err().to_string();
        assert!(error.contains("`rms_norm_eps` is \"NaN\""), "{error}");
    }

    #[test]
    fn yarn_is_read_in_every_place_and_lengthens_the_context() {
        for fields in [
            r#""rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                "original_max_position_embeddings": 262144}"#,
            r#""rope_scaling": {"type": "yarn", "factor": 4}"#,
            r#""rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000000,
                "partial_rotary_factor": 0.25, "original_max_position_embeddings": 262144}"#,
        ] {
            let flat = r#", "rope_theta": 1e7, "max_position_embeddings": 262144, "#;
            let config = parse(&format!("{flat}{fields}")).unwrap();
            assert_eq!(config.max_position_embeddings, 1_048_576);
            let rope = config.shape.attention.rope;
            assert_eq!(rope.theta, 1e7);
            assert!((rope.attention_factor() - 1.138_629_4).abs() < 1e-7);
            let RopeScaling::Yarn(yarn) = rope.scaling else {
                panic!("{rope:?}");
            };
            assert_eq!(yarn.original_max_position_embeddings, 262_144.0);
        }
        for plain in [
            r#", "rope_scaling": {"rope_type": "default"}"#,
            r#", "rope_scaling": {"type": "mrope", "mrope_section": [11, 11, 10]}"#,
            r#", "rope_scaling": {}"#,
        ] {
            assert_eq!(
                parse(plain).unwrap().shape.attention.rope,
                Rope::plain(10_000.0)
            );
        }
    }

    #[test]
    fn rotary_fields_that_nobody_carries_out_are_refused() {
        for (fields, expected) in [
            (
                r#", "rope_parameters": {"full_attention": {"rope_theta": 1e7}}"#,
                "`rope_parameters.full_attention` is ",
            ),
            (
                r#", "rope_scaling": {"rope_type": "longrope", "factor": 2.0}"#,
                "`rope_scaling.rope_type` is \"longrope\", expected \"default\", \"linear\"",
            ),
            (
                r#", "rope_scaling": {"rope_type": "yarn"}"#,
                "`factor` is missing",
            ),
            (
                r#", "rope_scaling": {"rope_type": "yarn", "factor": 0.5}"#,
                "`factor` is 0.5, expected a number from 1",
            ),
            (
                r#", "rope_scaling": "yarn""#,
                "`rope_scaling` is \"yarn\", expected an object",
            ),
        ] {
            let error = parse(fields).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
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
            "config.json: model_type `llama` is not supported; supported: qwen3_next, qwen3_5_moe, \
             qwen3_5_moe_text, qwen3_moe"
        );
    }
}
