//! `strftime_now` of transformers: `datetime.now().strftime(format)`.

use std::fmt::Write;

use chrono::{Local, Timelike};
use minijinja::{Error, ErrorKind};

/// The local time of now by a format of C, as Python writes it: without a time zone, which Python's
/// `now` does not have, and with microseconds for `%f`.
///
/// # Errors
/// If the format has a character that is no conversion.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    let now = Local::now();
    let mut python = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        let end = at + 1 + rest[at + 1..].chars().next().map_or(0, char::len_utf8);
        python.push_str(&rest[..at]);
        match &rest[at..end] {
            "%z" | "%Z" => {}
            "%f" => python.push_str(&format!("{:06}", now.nanosecond() / 1000 % 1_000_000)),
            conversion if conversion.len() > 1 && conversion.ends_with(is_conversion) => {
                python.push_str(conversion)
            }
            // Not of C, though chrono may know it: it stays as it is.
            other => {
                python.push('%');
                python.push_str(other);
            }
        }
        rest = &rest[end..];
    }
    python.push_str(rest);
    let mut text = String::new();
    // chrono reports an unknown format character only when writing.
    write!(text, "{}", now.format(&python)).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: format `{format}` is not valid"),
        )
    })?;
    Ok(text)
}

/// Letters that C has as conversions, and what may stand before them.
fn is_conversion(c: char) -> bool {
    "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyY%-_0^#EO123456789".contains(c)
}
