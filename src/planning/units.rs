//! Sizes as people write them: `14G`, `500MB`, `32k`.
//!
//! `G` and `GiB` are 2^30, `GB` is 10^9; K, M and T likewise. Arithmetic is exact: a budget is a
//! hard ceiling, and a rounding error would be a byte too many.

use thiserror::Error;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// A size on the command line that is not one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    #[error("size `{input}`: {reason}; expected a number of bytes such as 14G, 13.5GiB or 500MB")]
    Bytes { input: String, reason: &'static str },
    /// Only in [`parse_budget`]
    #[error("size `{input}`: that is {bytes} bytes; {input}G?")]
    NoUnit { input: String, bytes: u64 },
    #[error("token count `{input}`: {reason}; expected a number such as 4096 or 32k (32,768)")]
    Tokens { input: String, reason: &'static str },
}

/// Bytes from `14G`, `13.5GiB`, `500MB`, `4096`; a fraction of a byte is dropped.
///
/// # Errors
/// [`UnitError::Bytes`] if it is no number, the unit is unknown, or it does not fit 64 bits.
pub fn parse_bytes(input: &str) -> Result<u64, UnitError> {
    let unit = |suffix: &str| match suffix {
        "" | "b" => Some(1),
        "k" | "kib" => Some(KIB),
        "m" | "mib" => Some(MIB),
        "g" | "gib" => Some(GIB),
        "t" | "tib" => Some(TIB),
        "kb" => Some(1_000),
        "mb" => Some(1_000_000),
        "gb" => Some(1_000_000_000),
        "tb" => Some(1_000_000_000_000),
        _ => None,
    };
    scaled(input, unit)
        .map(|(whole, _)| whole)
        .map_err(|reason| UnitError::Bytes {
            input: input.into(),
            reason,
        })
}

/// As [`parse_bytes`], for amounts of memory and disk: a small number without a unit was not meant in
/// bytes.
///
/// # Errors
/// [`UnitError`].
pub fn parse_budget(input: &str) -> Result<u64, UnitError> {
    let bytes = parse_bytes(input)?;
    let unit = input.trim().ends_with(|c: char| c.is_ascii_alphabetic());
    match bytes {
        1..MIB if !unit => Err(UnitError::NoUnit {
            input: input.trim().into(),
            bytes,
        }),
        _ => Ok(bytes),
    }
}

/// Tokens from `4096`, `32k` (32,768) or `1M` (1,048,576); at least one.
///
/// # Errors
/// [`UnitError::Tokens`].
pub fn parse_tokens(input: &str) -> Result<u64, UnitError> {
    let unit = |suffix: &str| match suffix {
        "" => Some(1),
        "k" => Some(KIB),
        "m" => Some(MIB),
        _ => None,
    };
    let tokens = match scaled(input, unit) {
        Ok((0, _)) => Err("there must be at least one"),
        Ok((_, false)) => Err("not a whole number"),
        Ok((whole, true)) => Ok(whole),
        Err(reason) => Err(reason),
    };
    tokens.map_err(|reason| UnitError::Tokens {
        input: input.into(),
        reason,
    })
}

/// `13.2 GiB`, `512 B`: for tables and messages, three digits or so.
pub fn show_bytes(bytes: u64) -> String {
    match unit_of(bytes) {
        (1, _) => format!("{bytes} B"),
        (unit, name) => format!("{:.1} {name}", bytes as f64 / unit as f64),
    }
}

/// A budget to type back, such as `2.93GiB`: never less than `bytes`.
pub fn show_budget(bytes: u64) -> String {
    let (unit, name) = unit_of(bytes);
    if unit == 1 {
        return bytes.to_string();
    }
    let hundredths = (u128::from(bytes) * 100).div_ceil(u128::from(unit));
    format!("{}.{:02}{name}", hundredths / 100, hundredths % 100)
}

/// `32k` where the count is a multiple of 1,024, else the plain number.
pub fn show_tokens(tokens: u64) -> String {
    match tokens {
        0 => "0".into(),
        t if t % KIB == 0 => format!("{}k", t / KIB),
        t => t.to_string(),
    }
}

fn unit_of(bytes: u64) -> (u64, &'static str) {
    [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit)
        .unwrap_or((1, "B"))
}

/// The value rounded down, and whether it was whole.
fn scaled(input: &str, unit: impl Fn(&str) -> Option<u64>) -> Result<(u64, bool), &'static str> {
    const TOO_LARGE: &str = "too large";
    let text = input.trim().to_ascii_lowercase();
    if text.starts_with('-') {
        return Err("is negative");
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let unit = u128::from(unit(suffix.trim_start()).ok_or("unknown unit")?);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err("not a number");
    }
    // 15 digits of fraction are finer than a byte in a tebibyte, and keep u128 from overflowing.
    if whole.len() > 20 || fraction.len() > 15 {
        return Err(TOO_LARGE);
    }
    let digits = |s: &str| s.bytes().fold(0u128, |n, d| n * 10 + u128::from(d - b'0'));
    let denominator = 10u128.pow(fraction.len() as u32);
    let numerator = (digits(whole) * denominator + digits(fraction)) * unit;
    let value = u64::try_from(numerator / denominator).map_err(|_| TOO_LARGE)?;
    Ok((value, numerator.is_multiple_of(denominator)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("14G", 14 << 30),
            ("14GiB", 14 << 30),
            ("14 gib", 14 << 30),
            ("14GB", 14_000_000_000),
            ("13.5GiB", 27 << 29),
            ("500MB", 500_000_000),
            ("1.5k", 1536),
            ("2T", 2 << 40),
            ("4096", 4096),
            ("0", 0),
            (".5K", 512),
            ("7b", 7),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for text in [
            "",
            "G",
            "-1G",
            "1e9",
            "1.2.3G",
            "14X",
            "nan",
            "inf",
            ".",
            "99999999T",
            "1_000",
            "999999999999999999999",
            "1 2G",
            "½G",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        let message = parse_bytes("14X").unwrap_err().to_string();
        assert!(message.contains("`14X`: unknown unit"), "{message}");
    }

    #[test]
    fn a_budget_without_a_unit_is_asked_about() {
        assert_eq!(parse_budget("14G"), Ok(14 << 30));
        assert_eq!(parse_budget("1k"), Ok(1024));
        assert_eq!(parse_budget("0"), Ok(0));
        assert_eq!(parse_budget("15032385536"), Ok(14 << 30));
        for text in ["14", " 13.5 ", "4096"] {
            let message = parse_budget(text).unwrap_err().to_string();
            assert!(
                message.ends_with(&format!("; {}G?", text.trim())),
                "{message}"
            );
        }
    }

    #[test]
    fn tokens_are_whole_and_k_is_1024() {
        assert_eq!(parse_tokens("32k"), Ok(32_768));
        assert_eq!(parse_tokens("4096"), Ok(4096));
        assert_eq!(parse_tokens("1.5K"), Ok(1536));
        assert_eq!(parse_tokens("1M"), Ok(1 << 20));
        for text in ["0", "1.5", "k", "32kb", "-1"] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_show_in_the_largest_unit() {
        assert_eq!(show_bytes(0), "0 B");
        assert_eq!(show_bytes(1023), "1023 B");
        assert_eq!(show_bytes(14_173_392_077), "13.2 GiB");
        assert_eq!(show_bytes(1_671_168), "1.6 MiB");
        assert_eq!(show_tokens(32_768), "32k");
        assert_eq!(show_tokens(1000), "1000");
    }

    proptest! {
        #[test]
        fn a_shown_budget_is_enough_when_typed_back(bytes in 0u64..1 << 50) {
            let back = parse_bytes(&show_budget(bytes)).unwrap();
            prop_assert!(back >= bytes && back - bytes <= bytes / 100 + 11);
        }

        #[test]
        fn no_input_panics(text in "[0-9.kKmMgGtTiIbB -]{0,40}") {
            let _ = (parse_bytes(&text), parse_tokens(&text));
        }
    }
}
