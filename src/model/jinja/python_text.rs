//! Values as Python writes them: `str`, `repr`, and the digits of floats.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{DynObject, Object, ObjectRepr, ValueKind};
use serde_json::Value as Json;

/// A JSON value for a template; objects keep the order of their keys.
pub fn from_json(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => n.as_f64().map_or(Value::from(()), float_value),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), from_json(v)))),
    }
}

/// A float for a template. Where minijinja would write other digits than Python, which matters in
/// `~` and inside of lists, it is an object that writes itself.
pub fn float_value(x: f64) -> Value {
    let plain = x == 0.0 || (1e-4..1e16).contains(&x.abs());
    match plain {
        true => Value::from(x),
        false => Value::from_object(PythonFloat(x)),
    }
}

/// A float far from 1, which Python writes with an exponent.
#[derive(Debug)]
struct PythonFloat(f64);

impl Object for PythonFloat {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }

    fn custom_cmp(self: &Arc<Self>, other: &DynObject) -> Option<std::cmp::Ordering> {
        self.0.partial_cmp(&other.downcast_ref::<PythonFloat>()?.0)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&float(self.0))
    }
}

/// The float that `value` is; `None` for integers and anything else.
pub fn as_float(value: &Value) -> Option<f64> {
    if let Some(float) = value.downcast_object_ref::<PythonFloat>() {
        return Some(float.0);
    }
    match value.kind() {
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// The same value for arithmetic: a plain number where it is a float of ours.
pub fn plain(value: &Value) -> Value {
    match value.downcast_object_ref::<PythonFloat>() {
        Some(float) => Value::from(float.0),
        None => value.clone(),
    }
}

/// `str(value)`; nothing for an undefined value.
pub fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => {
            let mut out = String::new();
            write(value, &mut out);
            out
        }
    }
}

/// Appends `repr(value)`.
fn write(value: &Value, out: &mut String) {
    if let Some(x) = as_float(value) {
        out.push_str(&float(x));
        return;
    }
    let object = value.as_object();
    match value.kind() {
        ValueKind::Seq => {
            let tuple = value.downcast_object_ref::<minijinja::value::Tuple>();
            let (open, close) = if tuple.is_some() {
                ('(', ')')
            } else {
                ('[', ']')
            };
            out.push(open);
            let items: Vec<Value> = value.try_iter().into_iter().flatten().collect();
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write(item, out);
            }
            if tuple.is_some() && items.len() == 1 {
                out.push(',');
            }
            out.push(close);
        }
        // Not every map is a dict: a namespace, for one, writes itself.
        ValueKind::Map if object.is_some_and(|o| o.type_name().contains("Map")) => {
            out.push('{');
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
        ValueKind::Undefined => {}
        ValueKind::String => string(value.as_str().unwrap_or_default(), out),
        // Writing to a String cannot fail.
        _ => drop(write!(out, "{value}")),
    }
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
fn is_printable(c: char) -> bool {
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
    // `{:e}` gives the same shortest digits as `repr`.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').expect("`{:e}` has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is an integer");
    if (-4..16).contains(&exponent) {
        format!("{x:?}")
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    }
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
