//! The rotary fields of config.json, in the three places where transformers has kept them.

use serde_json::{Map, Value};

use super::fields::{ConfigError, Fields};
use crate::backend::{Rope, RopeScaling, Yarn};

/// What config.json says about rotary embedding.
pub struct RopeConfig {
    pub rope: Rope,
    /// Share of a head that rotates
    pub partial_rotary_factor: f64,
    /// Tokens that the scaled frequencies are made for, beyond `max_position_embeddings` where that is
    /// the length in training
    pub scaled_positions: Option<usize>,
}

/// Fields that say how frequencies are scaled, or which theta they have.
const KNOWN: [&str; 15] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    // Positions of images and text; those of text alone are equal, which is ordinary rotation.
    "mrope_section",
    "mrope_interleaved",
    "finetuned",
];

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` (4), over the flat fields.
    ///
    /// # Errors
    /// A kind of scaling that is not built, fields by layer type, a number that makes no sense.
    pub fn parse(
        fields: &Fields,
        default_theta: f64,
        default_partial: f64,
    ) -> Result<Self, ConfigError> {
        let place = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|place| Some((place, fields.optional(place)?)));
        let empty = Map::new();
        let (place, inner) = match place {
            None => ("rope_parameters", &empty),
            Some((place, Value::Object(inner))) => (place, inner),
            Some((place, other)) => return Err(Fields::wrong(place, other, "an object or null")),
        };
        if let Some(field) = inner.keys().find(|key| !KNOWN.contains(&key.as_str())) {
            let known = "fields of rotary embedding; one set for all layers";
            return Err(Fields::wrong(
                &format!("{place}.{field}"),
                &inner[field],
                known,
            ));
        }
        let inner = Fields::new(inner, place);
        // Where both have it, the newer place counts.
        let over = |field: &str| match inner.optional(field) {
            Some(_) => &inner,
            None => fields,
        };
        let kind = match inner.optional("rope_type").or(inner.optional("type")) {
            None => "default",
            Some(kind) => kind.as_str().unwrap_or("not a name"),
        };
        let theta = over("rope_theta").positive("rope_theta", default_theta)?;
        let partial = over("partial_rotary_factor");
        let partial_rotary_factor = partial.positive("partial_rotary_factor", default_partial)?;
        let positions = fields.count("max_position_embeddings", 32_768)?;
        let (scaling, scaled_positions) = match kind {
            "default" | "mrope" => (RopeScaling::None, None),
            "linear" => {
                let factor = factor(&inner)?;
                (RopeScaling::Linear(factor), None)
            }
            "yarn" => {
                let yarn = yarn(&inner, positions)?;
                let scaled = yarn.factor * yarn.original_max_position_embeddings;
                (RopeScaling::Yarn(yarn), Some(scaled as usize))
            }
            _ => {
                let found = inner.optional("rope_type").or(inner.optional("type"));
                return Err(Fields::wrong(
                    &format!("{place}.rope_type"),
                    found.unwrap_or(&Value::Null),
                    "\"default\", \"linear\" or \"yarn\"",
                ));
            }
        };
        Ok(RopeConfig {
            rope: Rope { theta, scaling },
            partial_rotary_factor,
            scaled_positions,
        })
    }
}

/// How many times longer the context is; stretching by less than 1 is a mistake.
fn factor(inner: &Fields) -> Result<f64, ConfigError> {
    let Some(value) = inner.optional("factor") else {
        return Err(Fields::wrong(
            "factor",
            "missing",
            "a number from 1, beside this rope_type",
        ));
    };
    match value.as_f64() {
        Some(factor) if (1.0..=1e6).contains(&factor) => Ok(factor),
        _ => Err(Fields::wrong("factor", value, "a number from 1")),
    }
}

fn yarn(inner: &Fields, max_position_embeddings: usize) -> Result<Yarn, ConfigError> {
    let factor = factor(inner)?;
    let number = |field: &str| match inner.optional(field) {
        None => Ok(None),
        Some(_) => inner.positive(field, 1.0).map(Some),
    };
    let mscale = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
    let attention_factor = match number("attention_factor")? {
        Some(factor) => factor,
        None => match (number("mscale")?, number("mscale_all_dim")?) {
            (Some(one), Some(all)) => mscale(one) / mscale(all),
            _ => mscale(1.0),
        },
    };
    let original = number("original_max_position_embeddings")?;
    Ok(Yarn {
        factor,
        original_max_position_embeddings: original.unwrap_or(max_position_embeddings as f64),
        attention_factor,
        beta_fast: number("beta_fast")?.unwrap_or(32.0),
        beta_slow: number("beta_slow")?.unwrap_or(1.0),
        truncate: inner.flag("truncate", true)?,
    })
}
