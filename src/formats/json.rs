//! JSON as Python's `json` module reads it, which is what wrote most model files.
//!
//! Python writes and reads `NaN`, `Infinity` and `-Infinity`, and takes the last of several equal
//! keys; the JSON standard has no such numbers, and leaves equal keys open.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The words for numbers that JSON has no form for, the longest first.
const NOT_FINITE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Parses `json` by way of a [`Value`], so that equal keys don't clash in `T`.
///
/// A number that is not finite becomes the string of its name: whoever needs a number there says
/// what was found, and nobody else minds.
///
/// # Errors
/// If it is not JSON, or not of the form of `T`.
pub fn from_slice<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    let value: Value = serde_json::from_slice(&quote_not_finite(json))?;
    T::deserialize(value)
}

/// `json` with every number that is not finite in quotes.
fn quote_not_finite(json: &[u8]) -> Cow<'_, [u8]> {
    let mut out = Vec::new();
    let (mut copied, mut at) = (0, 0);
    let mut in_string = false;
    while at < json.len() {
        match json[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'-' | b'I' | b'N' if !in_string => {
                let word = NOT_FINITE
                    .iter()
                    .find(|word| json[at..].starts_with(word.as_bytes()));
                if let Some(word) = word {
                    out.extend_from_slice(&json[copied..at]);
                    out.extend_from_slice(format!("\"{word}\"").as_bytes());
                    at += word.len();
                    copied = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.extend_from_slice(&json[copied..]);
    Cow::Owned(out)
}

/// A finite f64 as Python's `repr`: shortest digits that round-trip, exponent below 1e-4 or from 1e16.
pub fn python_float(v: f64) -> String {
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
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_that_are_not_finite_are_read_and_named() {
        let found: Value =
            from_slice(br#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" NaN", "d": -1}"#)
                .unwrap();
        let expected = json!({
            "a": "NaN", "b": ["-Infinity", "Infinity"], "c": "NaN \" NaN", "d": -1,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        #[derive(serde::Deserialize)]
        struct One {
            a: u32,
        }
        assert_eq!(from_slice::<One>(br#"{"a": 1, "a": 2}"#).unwrap().a, 2);
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for text in ["", "{", "Nan", "{\"a\": NaNa}", "\"NaN", "{\"a\\"] {
            assert!(from_slice::<Value>(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (v, expected) in [
            (0.186_359_405_517_578_13, "0.18635940551757812"),
            (0.1027882918715477, "0.1027882918715477"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (7.76416015625, "7.76416015625"),
            (9.999999747378752e-05, "9.999999747378752e-05"),
            (0.0001, "0.0001"),
            (1e15 + 0.25, "1000000000000000.2"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (-2.5e-7, "-2.5e-07"),
        ] {
            assert_eq!(python_float(v), expected);
        }
    }
}
