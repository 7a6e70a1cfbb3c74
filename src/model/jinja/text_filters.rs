//! Filters of Jinja2 that make a text of a text.
//!
//! Source: jinja2 3.1.6, `filters.py`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::filters::argument;
use super::methods::{capitalize, is_space, lines};
use super::operators::number;
use super::python_objects::is_namespace;
use super::python_text::{repr, text};

pub fn add_to(environment: &mut Environment) {
    environment.add_filter("wordcount", wordcount);
    environment.add_filter("filesizeformat", filesizeformat);
    environment.add_filter("striptags", |value: &Value| {
        minijinja_contrib::filters::striptags(text(value))
    });
    environment.add_filter("upper", |value: &Value| text(value).to_uppercase());
    environment.add_filter("lower", |value: &Value| text(value).to_lowercase());
    environment.add_filter("capitalize", |value: &Value| capitalize(&text(value)));
    environment.add_filter("title", |value: &Value| title(&text(value)));
    environment.add_filter("safe", |value: &Value| Value::from_safe_string(text(value)));
    environment.add_filter("replace", replace);
    environment.add_filter("truncate", truncate);
    environment.add_filter("trim", trim);
    environment.add_filter("indent", indent);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("pprint", pprint);
}

/// Each word with a capital, where white space, hyphens and opening brackets begin words: other than
/// the method of that name.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut begins = true;
    for c in text.chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = is_space(c) || "-({[<".contains(c);
    }
    out
}

/// `old` as `new`, at most `count` times.
fn replace(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let given = |at, name| argument(&positional, at, &options, name);
    let (old, new, count) = (given(0, "old")?, given(1, "new")?, given(2, "count")?);
    options.assert_all_used()?;
    let (Some(old), Some(new)) = (old, new) else {
        return Err(Error::from(ErrorKind::MissingArgument));
    };
    let count = count.filter(|count| !count.is_none());
    let count = count.map(i64::try_from).transpose()?;
    let (found, old, new) = (text(value), text(&old), text(&new));
    Ok(match count {
        Some(count) if count >= 0 => found.replacen(&old, &new, count as usize),
        _ => found.replace(&old, &new),
    })
}

/// Runs of letters, digits and underscores.
fn wordcount(value: &Value) -> usize {
    let text = text(value);
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c| !is_word(c))
        .filter(|word| !word.is_empty())
        .count()
}

/// A size in units of 1000, or of 1024 where `binary`.
fn filesizeformat(value: &Value, binary: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let binary = binary.or(options.get("binary")?).unwrap_or(false);
    options.assert_all_used()?;
    let bytes = match value.as_str().map(|text| text.trim().parse::<f64>()) {
        Some(Ok(bytes)) => bytes,
        _ => number(value)?,
    };
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc() as i64));
    }
    let prefixes = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = base;
    let mut prefix = prefixes[0];
    for next in &prefixes[1..] {
        if bytes < unit * base {
            break;
        }
        unit *= base;
        prefix = next;
    }
    Ok(match binary {
        true => format!("{:.1} {}iB", bytes / unit, prefix.to_uppercase()),
        false => format!("{:.1} {prefix}B", bytes / unit),
    })
}

/// At most `length` characters, and up to `leeway` more before anything is cut; whole words unless
/// `killwords`.
fn truncate(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let given = |at, name| argument(&positional, at, &options, name);
    let count = |found: Option<Value>, default: i64| {
        found
            .map_or(Ok(default), i64::try_from)
            .map(|n| n.max(0) as usize)
    };
    let length = count(given(0, "length")?, 255)?;
    let killwords = given(1, "killwords")?.is_some_and(|killwords| killwords.is_true());
    let end = given(2, "end")?.map_or("...".into(), |end| text(&end));
    let leeway = count(given(3, "leeway")?.filter(|leeway| !leeway.is_none()), 5)?;
    options.assert_all_used()?;
    let Some(text) = value.as_str() else {
        return match value.len() {
            Some(found) if found <= length + leeway => Ok(value.clone()),
            None if value.is_undefined() => Ok(Value::from("")),
            _ => Err(not_text("truncate", value)),
        };
    };
    if text.chars().count() <= length + leeway {
        return Ok(value.clone());
    }
    let room = length.saturating_sub(end.chars().count());
    let cut: String = text.chars().take(room).collect();
    let cut = match cut.rsplit_once(' ') {
        Some((words, _)) if !killwords => words,
        _ => &cut,
    };
    Ok(Value::from(cut.to_owned() + &end))
}

/// Without white space, or any of `chars`, on both sides.
fn trim(value: &Value, chars: Option<Value>, options: Kwargs) -> Result<String, Error> {
    let chars = chars
        .or(options.get("chars")?)
        .filter(|chars| !chars.is_none());
    options.assert_all_used()?;
    let text = text(value);
    let chars = chars
        .as_ref()
        .map(|chars| chars.as_str().unwrap_or_default());
    let cut = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(text.trim_matches(cut).to_owned())
}

/// Every line but the first by `width` spaces, or by the text that `width` is, to the right.
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.or(options.get("width")?);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let indention = match &width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(width.clone())?.clamp(0, 1 << 16) as usize),
        },
    };
    let Some(text) = value.as_str() else {
        return Err(not_text("indent", value));
    };
    // With a last newline, so that an empty last line is a line, too.
    let text = format!("{text}\n");
    let mut out = if first {
        indention.clone()
    } else {
        String::new()
    };
    for (i, line) in lines(&text, false).into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&indention);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

/// A text for a URL, or pairs for the query of one.
fn urlencode(value: &Value) -> Result<String, Error> {
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map if !is_namespace(value) => (value.try_iter()?)
            .map(|key| Ok((key.clone(), value.get_item(&key)?)))
            .collect::<Result<_, Error>>()?,
        ValueKind::Seq | ValueKind::Iterable => (value.try_iter()?)
            .map(|pair| {
                let mut parts = pair.try_iter()?;
                match (parts.next(), parts.next(), parts.next()) {
                    (Some(key), Some(value), None) => Ok((key, value)),
                    _ => Err(Error::new(
                        ErrorKind::InvalidOperation,
                        "urlencode: expected pairs of key and value",
                    )),
                }
            })
            .collect::<Result<_, Error>>()?,
        _ => return Ok(percent_encoded(&text(value), false)),
    };
    let pairs: Vec<String> = (pairs.iter())
        .map(|(key, value)| {
            let [key, value] = [key, value].map(|part| percent_encoded(&text(part), true));
            format!("{key}={value}")
        })
        .collect();
    Ok(pairs.join("&"))
}

fn percent_encoded(text: &str, in_query: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b' ' if in_query => out.push('+'),
            b'/' if in_query => out.push_str("%2F"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// `pprint.pformat`, as far as it fits one line.
fn pprint(value: &Value) -> Result<String, Error> {
    let text = repr(&sorted(value)?);
    match text.chars().count() <= 80 {
        true => Ok(text),
        false => Err(Error::new(
            ErrorKind::InvalidOperation,
            "pprint: more than one line of 80 characters is not supported",
        )),
    }
}

/// The value with the keys of its dicts in order.
fn sorted(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Seq
            if value
                .as_object()
                .is_some_and(|o| o.type_name().contains("Vec")) =>
        {
            value.try_iter()?.map(|item| sorted(&item)).collect()
        }
        ValueKind::Map if !is_namespace(value) => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            keys.sort();
            let pairs = keys.into_iter().map(|key| {
                let item = sorted(&value.get_item(&key)?)?;
                Ok((key, item))
            });
            Ok(Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?))
        }
        _ => Ok(value.clone()),
    }
}

fn not_text(filter: &str, value: &Value) -> Error {
    let detail = format!("{filter}: {} is not a text", value.kind());
    Error::new(ErrorKind::InvalidOperation, detail)
}
