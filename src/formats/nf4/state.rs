//! `quant_state.bitsandbytes__nf4`: the JSON that describes one quantised weight.

use serde::{Deserialize, Serialize};

use super::{BLOCKSIZES, NESTED_BLOCKSIZE};
use crate::formats::FormatError;

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

/// An f64 as Python's `repr`: shortest digits that round-trip, exponent below 1e-4 or from 1e16.
fn python_float(v: f64) -> String {
    let plain = v == 0.0 || (1e-4..1e16).contains(&v.abs());
    let shortest = if plain {
        format!("{v:?}")
    } else {
        format!("{v:e}")
    };
    // Where two decimals are equally near, Python's last digit is the even one; so is that of
    // Rust's formatting to a precision, but not of its shortest.
    let digits = shortest.split('e').next().expect("split gives one part");
    let precision = digits.split_once('.').map_or(0, |(_, d)| d.len());
    let even = if plain {
        format!("{v:.precision$}")
    } else {
        format!("{v:.precision$e}")
    };
    let text = if even.parse() == Ok(v) {
        even
    } else {
        shortest
    };
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let sign = if exponent.starts_with('-') { '-' } else { '+' };
            format!("{mantissa}e{sign}{:0>2}", exponent.trim_start_matches('-'))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_spelled_as_python_spells_them() {
        for (v, expected) in [
            (0.186_359_405_517_578_13, "0.18635940551757812"),
            (0.1027882918715477, "0.1027882918715477"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (7.76416015625, "7.76416015625"),
            (9.999999747378752e-05, "9.999999747378752e-05"),
            (0.0001, "0.0001"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (-2.5e-7, "-2.5e-07"),
        ] {
            assert_eq!(python_float(v), expected);
        }
    }
}
