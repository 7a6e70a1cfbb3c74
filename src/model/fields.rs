//! Fields of config.json, read with errors that name them.

use serde_json::{Map, Value};
use thiserror::Error;

use super::families;

/// Why a config.json cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("config.json: not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "config.json: model_type `{found}` is not supported; supported: {}",
        families::model_types().collect::<Vec<_>>().join(", ")
    )]
    ModelType { found: String },
    #[error("config.json: `{field}` is {found}, expected {expected}")]
    Field {
        field: String,
        found: String,
        expected: String,
    },
}

/// Fields of config.json or of an object in it, with their names, for errors that point at them.
pub struct Fields<'a> {
    root: &'a Map<String, Value>,
    /// What an error writes before the name: where the object stands
    place: &'a str,
}

impl<'a> Fields<'a> {
    pub fn new(root: &'a Map<String, Value>, place: &'a str) -> Self {
        Fields { root, place }
    }

    pub fn wrong(field: &str, found: impl ToString, expected: impl ToString) -> ConfigError {
        ConfigError::Field {
            field: field.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn named(&self, field: &str) -> String {
        match self.place {
            "" => field.into(),
            place => format!("{place}.{field}"),
        }
    }

    /// The field, unless it is missing or null: for those where transformers takes null for missing.
    pub fn optional(&self, field: &str) -> Option<&'a Value> {
        self.root.get(field).filter(|value| !value.is_null())
    }

    /// The field, unless it is missing: elsewhere null is a value of its own, and rarely a good one.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.root.get(field)
    }

    /// A count of at least one. Bounded far above any real model, so that products of a few
    /// cannot overflow.
    ///
    /// # Errors
    /// Of another type, or beyond the bounds.
    pub fn count(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        const LIMIT: u64 = 1 << 24;
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_u64() {
            Some(n) if (1..=LIMIT).contains(&n) => Ok(n as usize),
            _ => Err(Self::wrong(
                &self.named(field),
                value,
                format!("a whole number from 1 to {LIMIT}"),
            )),
        }
    }

    /// A number above zero.
    ///
    /// # Errors
    /// Of another type, or not above zero.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_f64() {
            Some(v) if v > 0.0 && v.is_finite() => Ok(v),
            _ => Err(Self::wrong(&self.named(field), value, "a number above 0")),
        }
    }

    /// A flag; null is false, as Python has it.
    ///
    /// # Errors
    /// Of another type.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value {
            Value::Bool(flag) => Ok(*flag),
            Value::Null => Ok(false),
            other => Err(Self::wrong(&self.named(field), other, "true or false")),
        }
    }
}
