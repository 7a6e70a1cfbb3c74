//! Numbers as people read them.

/// `512 B`, `3.4 MiB`, `13.2 GiB`: powers of 1,024.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{} {}", significant(value), UNITS[unit]),
    }
}

/// A context length: `800`, `4k`, `32k`, `1M`; `k` is 1,024.
pub fn tokens(tokens: usize) -> String {
    match tokens {
        n if n >= 1 << 20 && n % (1 << 20) == 0 => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n % (1 << 10) == 0 => format!("{}k", n >> 10),
        n if n >= 10_000 => format!("{:.1}k", n as f64 / 1024.0),
        n => n.to_string(),
    }
}

/// Three significant digits, never an exponent: `0.0123`, `4.56`, `78.9`, `1,230`.
pub fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    // Rust's `e` format does the rounding, so that 9.996 becomes 10.0 and not 10.00.
    let scientific = format!("{value:.2e}");
    let exponent = scientific
        .split_once('e')
        .and_then(|(_, e)| e.parse::<i32>().ok());
    match (scientific.parse::<f64>(), exponent) {
        (Ok(rounded), Some(exponent)) => {
            let decimals = (2 - exponent).clamp(0, 12) as usize;
            thousands(&format!("{rounded:.decimals$}"))
        }
        _ => "–".to_string(),
    }
}

/// A value in its unit; byte counts get a binary prefix, shares become percent.
pub fn with_unit(value: f64, unit: &str) -> String {
    match unit {
        "" => format!("{:.1}%", value * 100.0),
        "bytes" => bytes(value.round() as u64),
        "bytes/token" => format!("{}/token", bytes(value.round() as u64)),
        unit => format!("{} {unit}", significant(value)),
    }
}

/// `1234.5` as `1,234.5`.
pub fn thousands(digits: &str) -> String {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |w| ("-", w));
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    match fraction {
        "" => format!("{sign}{grouped}"),
        _ => format!("{sign}{grouped}.{fraction}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_and_a_binary_prefix() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1024 * 1024), "1.00 MiB");
        assert_eq!(bytes(41_100_000_000), "38.3 GiB");
    }

    #[test]
    fn context_lengths_are_short() {
        let shown: Vec<String> = [800, 1024, 4096, 32_768, 12_345, 1 << 20]
            .into_iter()
            .map(tokens)
            .collect();
        assert_eq!(shown, ["800", "1k", "4k", "32k", "12.1k", "1M"]);
    }

    #[test]
    fn three_significant_digits_whatever_the_size() {
        let cases = [
            (0.01234, "0.0123"),
            (4.567, "4.57"),
            (9.996, "10.0"),
            (99.96, "100"),
            (78.94, "78.9"),
            (999.6, "1,000"),
            (1234.0, "1,230"),
            (1_234_567.0, "1,230,000"),
            (-5.0, "-5.00"),
        ];
        for (value, expected) in cases {
            assert_eq!(significant(value), expected, "{value}");
        }
    }
}
