//! `quant_state.bitsandbytes__nf4`: the JSON that describes one quantised weight.

use serde::{Deserialize, Serialize};

use super::{BLOCKSIZES, NESTED_BLOCKSIZE};
use crate::formats::FormatError;
use crate::formats::json::python_float;

/// Parsed quantisation state. Field order is the order bitsandbytes writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantState {
    pub quant_type: String,
    pub blocksize: usize,
    /// dtype of the weight before quantisation: `bfloat16`, `float16` or `float32`. Very old
    /// files misspell it; nothing here depends on it.
    pub dtype: String,
    /// Original shape; three elements for fused experts.
    pub shape: Vec<usize>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub nested: Option<NestedState>,
}

/// Present where the scales are quantised too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NestedState {
    pub nested_blocksize: usize,
    pub nested_dtype: String,
    /// The shortest decimal of the f64 value of an f32: exact after a cast back.
    pub nested_offset: f64,
}

impl QuantState {
    /// Parses and checks the JSON bytes of weight `name`.
    ///
    /// # Errors
    /// [`FormatError::QuantType`] for anything but nf4, [`FormatError::QuantState`] for JSON that
    /// does not parse or block sizes no bitsandbytes file has.
    pub fn parse(name: &str, json: &[u8]) -> Result<Self, FormatError> {
        let damaged = |reason: String| FormatError::QuantState {
            name: name.into(),
            reason,
        };
        let not_expected = |e| damaged(format!("not the expected JSON: {e}"));
        let json: serde_json::Value =
            crate::formats::json::from_slice(json).map_err(not_expected)?;
        let mut state = QuantState::deserialize(&json).map_err(not_expected)?;
        // A flattened option is silently absent when one of its fields is.
        let nested = ["nested_blocksize", "nested_dtype", "nested_offset"];
        if nested.iter().any(|field| json.get(field).is_some()) {
            state.nested = Some(NestedState::deserialize(&json).map_err(not_expected)?);
        }
        if state.quant_type != "nf4" {
            return Err(FormatError::QuantType {
                name: name.into(),
                found: state.quant_type,
            });
        }
        if !BLOCKSIZES.contains(&state.blocksize) {
            return Err(damaged(format!(
                "blocksize {}, expected one of {BLOCKSIZES:?}",
                state.blocksize
            )));
        }
        if let Some(nested) = &state.nested {
            if nested.nested_blocksize != NESTED_BLOCKSIZE {
                return Err(damaged(format!(
                    "nested_blocksize {}, expected {NESTED_BLOCKSIZE}",
                    nested.nested_blocksize
                )));
            }
            if nested.nested_dtype != "float32" {
                return Err(damaged(format!(
                    "nested_dtype `{}`, expected `float32`",
                    nested.nested_dtype
                )));
            }
            if !(nested.nested_offset as f32).is_finite() {
                return Err(damaged(format!(
                    "nested_offset {:?} is not finite",
                    nested.nested_offset
                )));
            }
        }
        match state
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
        {
            Some(n) if n > 0 => Ok(state),
            _ => Err(damaged(format!("shape {:?} holds no weights", state.shape))),
        }
    }

    /// The JSON as Python's `json.dumps` writes it: `", "` and `": "` between items.
    pub fn to_json(&self) -> String {
        let mut out = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": {:?}"#,
            self.quant_type, self.blocksize, self.dtype, self.shape
        );
        if let Some(n) = &self.nested {
            out += &format!(
                r#", "nested_blocksize": {}, "nested_dtype": "{}", "nested_offset": {}"#,
                n.nested_blocksize,
                n.nested_dtype,
                python_float(n.nested_offset)
            );
        }
        out + "}"
    }
}
