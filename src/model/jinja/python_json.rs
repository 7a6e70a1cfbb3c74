//! JSON as Python's `json.dumps` writes it, which is what chat templates were written against.
//!
//! A model has seen `{"name": "f"}` with Python's spaces and float digits in training; JSON that
//! only means the same is a different prompt.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::filters::argument;
use super::python_text::{self, as_float};

/// The `tojson` filter of transformers: `json.dumps` with `ensure_ascii=False` and no HTML escapes.
///
/// Takes the arguments `ensure_ascii`, `indent`, `separators` and `sort_keys`, in this order or by name.
///
/// # Errors
/// If `value` holds something JSON has no form for, or an argument is unknown.
pub fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let given = |at, name| argument(&positional, at, &options, name);
    let indent = given(1, "indent")?;
    let indent = indent.filter(|indent| !indent.is_none()).map(indentation);
    let indent = indent.transpose()?;
    let separators = given(2, "separators")?;
    let separators = separators.filter(|separators| !separators.is_none());
    let separators = separators.map(|pair| {
        let texts = pair
            .try_iter()?
            .map(|text| text.as_str().map(str::to_owned));
        let texts: Option<Vec<String>> = texts.collect();
        texts.ok_or_else(|| invalid("separators must be a pair of strings".into()))
    });
    let separators: Option<Vec<String>> = separators.transpose()?;
    // Python takes any value for a yes or no.
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(given(0, "ensure_ascii")?);
    let sort_keys = is_true(given(3, "sort_keys")?);
    options.assert_all_used()?;

    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be a pair of strings".into())),
        // Lines that end in a separator carry no trailing space.
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut writer = Writer {
        out: String::new(),
        item_separator,
        key_separator,
        indent,
        depth: 0,
        ensure_ascii,
        sort_keys,
    };
    writer.value(value)?;
    Ok(writer.out)
}

/// One level of `indent`, which is a number of spaces or the text itself.
fn indentation(indent: Value) -> Result<String, Error> {
    match indent.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Ok(" ".repeat(usize::try_from(i64::try_from(indent)?.max(0)).unwrap_or(0))),
    }
}

struct Writer {
    out: String,
    item_separator: String,
    key_separator: String,
    /// What a line starts with, per level; None keeps everything on one line.
    indent: Option<String>,
    depth: usize,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        if let Some(x) = as_float(value) {
            self.out.push_str(&float(x));
            return Ok(());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', &items, |writer, item| writer.value(item))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container('{', '}', &keys, |writer, key| {
                    writer.key(key)?;
                    writer.out.push_str(&writer.key_separator);
                    writer.value(&value.get_item(key)?)
                })?;
            }
            kind => return Err(invalid(format!("{kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.value(key),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key)?;
                self.out.push('"');
                Ok(())
            }
            kind => Err(invalid(format!("{kind} cannot be a key of a JSON object"))),
        }
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        mut write_item: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        self.depth += 1;
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.line_break();
            write_item(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line_break();
        }
        self.out.push(close);
        Ok(())
    }

    fn line_break(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !matches!(c, ' '..='~')) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as `json.dumps` writes it: `repr`, with JavaScript's words for what is not finite.
fn float(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        x => python_text::float(x),
    }
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
