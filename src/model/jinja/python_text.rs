//! Values as Python writes them: `str`, `repr`, and the digits of floats.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::{Tuple, ValueKind};
use serde_json::Value as Json;

use super::python_objects::{DictView, GroupTuple, Range, is_namespace};
use crate::formats::json::python_float;

/// A JSON value for a template; objects keep the order of their keys.
pub fn from_json(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => n.as_f64().map_or(Value::from(()), Value::from),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), from_json(v)))),
    }
}

/// The float that `value` is; `None` for integers and anything else.
pub fn as_float(value: &Value) -> Option<f64> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// `str(value)`; nothing for an undefined value.
pub fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        ValueKind::Undefined => String::new(),
        _ => repr(value),
    }
}

/// `repr(value)`.
pub fn repr(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

/// Appends `repr(value)`.
fn write(value: &Value, out: &mut String) {
    if let Some(x) = as_float(value) {
        out.push_str(&float(x));
        return;
    }
    if let Some(range) = value.downcast_object_ref::<Range>() {
        out.push_str(&range.text());
        return;
    }
    if let Some(view) = value.downcast_object_ref::<DictView>() {
        out.push_str(&format!("dict_{}(", view.method));
        write_items('[', ']', view.items.iter().cloned(), out);
        out.push(')');
        return;
    }
    match value.kind() {
        ValueKind::Seq => {
            let is_tuple = value.downcast_object_ref::<Tuple>().is_some()
                || value.downcast_object_ref::<GroupTuple>().is_some();
            let items = value.try_iter().into_iter().flatten();
            match is_tuple {
                true => {
                    write_items('(', ')', items, out);
                    if value.len() == Some(1) {
                        out.insert(out.len() - 1, ',');
                    }
                }
                false => write_items('[', ']', items, out),
            }
        }
        ValueKind::Map if is_namespace(value) => {
            out.push_str("<Namespace ");
            write_pairs(value, out);
            out.push('>');
        }
        // Not every map is a dict: a loop, for one, writes itself.
        ValueKind::Map if (value.as_object()).is_some_and(|o| o.type_name().contains("Map")) => {
            write_pairs(value, out);
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String if value.is_safe() => {
            out.push_str("Markup(");
            string(value.as_str().unwrap_or_default(), out);
            out.push(')');
        }
        ValueKind::String => string(value.as_str().unwrap_or_default(), out),
        // Writing to a String cannot fail.
        _ => drop(write!(out, "{value}")),
    }
}

fn write_items(open: char, close: char, items: impl Iterator<Item = Value>, out: &mut String) {
    out.push(open);
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        write(&item, out);
    }
    out.push(close);
}

fn write_pairs(map: &Value, out: &mut String) {
    out.push('{');
    let object = map.as_object();
    let pairs = object
        .and_then(|o| o.try_iter_pairs())
        .into_iter()
        .flatten();
    for (i, (key, value)) in pairs.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        write(&key, out);
        out.push_str(": ");
        write(&value, out);
    }
    out.push('}');
}

/// Appends `repr(str)`.
fn string(text: &str, out: &mut String) {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                let escape = match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
                out.push_str(&escape);
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable` of one character: what Rust does not escape. A combining mark it escapes only at
/// the beginning of a text.
pub fn is_printable(c: char) -> bool {
    match c {
        ' '..='~' => true,
        '\u{a0}' | '\u{ad}' => false,
        c if c.is_control() || c.is_whitespace() => false,
        c => !format!("a{c}").escape_debug().any(|c| c == '\\'),
    }
}

/// `repr(float)`: the shortest digits that read back the same, exponents only far from 1.
pub fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    python_float(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right-hand sides are what CPython 3.11 prints.
    #[test]
    fn floats_have_the_digits_of_python() {
        for (x, python) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123456789012345.6, "123456789012345.6"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float(x), python);
        }
    }

    #[test]
    fn strings_are_quoted_as_python_quotes_them() {
        for (text, python) in [
            ("a", "'a'"),
            ("it's", "\"it's\""),
            ("it's \"q\"", "'it\\'s \"q\"'"),
            ("\\\n\r\t\0\u{7f}", "'\\\\\\n\\r\\t\\x00\\x7f'"),
            ("é\u{301}\u{a0}\u{2028}👍", "'é\u{301}\\xa0\\u2028👍'"),
        ] {
            let mut out = String::new();
            string(text, &mut out);
            assert_eq!(out, python);
        }
    }
}
