//! Filters of Jinja2 that minijinja lacks, or that meet numbers and texts in another way.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, ValueKind};

use minijinja::{Environment, Error, Value, filters};

use super::methods::pad;
use super::python_text::{as_float, float_value, plain, text};

pub fn add_to(environment: &mut Environment) {
    environment.add_filter("string", |value: &Value| text(value));
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("abs", |value: &Value| filters::abs(plain(value)));
    environment.add_filter("round", round);
    environment.add_filter("format", format);
    environment.add_filter("sum", sum);
    environment.add_filter("join", join);
    environment.add_filter("center", |value: &Value, width: Option<i64>| {
        pad(&text(value), "center", width.unwrap_or(80), ' ')
    });
    environment.add_filter("wordcount", wordcount);
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("truncate", truncate);
}

/// As markupsafe escapes HTML. The result is not marked as safe: nothing is escaped by itself here.
fn escape(value: &Value) -> String {
    let mut out = String::new();
    for c in text(value).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// `int(value)`, or `int(float(value))`, or `default`.
fn int(
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    options: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(options.get("default")?);
    let base = base.or(options.get("base")?).unwrap_or(10);
    options.assert_all_used()?;
    if let Some(x) = as_float(value).filter(|x| x.is_finite()) {
        return Ok(Value::from(x.trunc() as i128));
    }
    let parsed = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number => Some(value.clone()),
        ValueKind::String => parse_int(value.as_str().unwrap_or_default(), base).map(Value::from),
        _ => None,
    };
    Ok(parsed.or(default).unwrap_or(Value::from(0)))
}

/// An integer as Python's `int` reads it, with the prefix of `base`; where there is none, the whole
/// part of a float.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim().replace('_', "");
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let lower = digits.to_lowercase();
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    let digits = lower.strip_prefix(prefix).unwrap_or(&lower);
    if digits.starts_with(['+', '-']) || !(2..=36).contains(&base) {
        return None;
    }
    let whole = i128::from_str_radix(digits, base).ok();
    let float = || digits.parse().ok().filter(|x: &f64| x.is_finite());
    Some(sign * whole.or_else(|| Some(float()? as i128))?)
}

/// `float(value)`, or `default`.
fn float(value: &Value, default: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = default.or(options.get("default")?);
    options.assert_all_used()?;
    let parsed = match value.kind() {
        _ if as_float(value).is_some() => as_float(value),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => value.as_str().and_then(|text| text.trim().parse().ok()),
        _ => None,
    };
    let parsed = parsed.map(float_value);
    Ok(parsed.or(default).unwrap_or(Value::from(0.0)))
}

/// Half to even, as Python rounds; `ceil` and `floor` round one way.
fn round(
    value: &Value,
    precision: Option<i32>,
    method: Option<String>,
    options: Kwargs,
) -> Result<Value, Error> {
    let precision = precision.or(options.get("precision")?).unwrap_or(0);
    let method = method.or(options.get("method")?).unwrap_or("common".into());
    options.assert_all_used()?;
    let integer = value.kind() == ValueKind::Number && value.is_integer();
    let x = f64::try_from(plain(value))?;
    let scale = 10f64.powi(precision);
    let rounded = match method.as_str() {
        // Python rounds the decimal digits of the exact value; so does formatting.
        "common" if integer && precision >= 0 => return Ok(value.clone()),
        "common" if precision > 0 => {
            let digits = precision.min(340) as usize;
            format!("{x:.digits$}").parse().unwrap_or(x)
        }
        "common" => (x * scale).round_ties_even() / scale,
        "ceil" => (x * scale).ceil() / scale,
        "floor" => (x * scale).floor() / scale,
        other => {
            return Err(Error::new(
                minijinja::ErrorKind::InvalidOperation,
                format!("round: method `{other}`, expected common, ceil or floor"),
            ));
        }
    };
    Ok(float_value(rounded))
}

/// `format % args`, with floats that any conversion takes.
fn format(template: &str, args: Rest<Value>) -> Result<Value, Error> {
    let args: Vec<Value> = args.0.iter().map(plain).collect();
    minijinja::formatting::format(FormatStyle::Printf, template, &args).map(Value::from)
}

/// Numbers added up: integers exactly, others as floats.
fn sum(values: &Value, attribute: Option<String>, options: Kwargs) -> Result<Value, Error> {
    let attribute = attribute.or(options.get("attribute")?);
    let start: Option<Value> = options.get("start")?;
    options.assert_all_used()?;
    let start = start.unwrap_or(Value::from(0));
    let (mut whole, mut float, mut all_whole) = (0i128, 0.0, true);
    let values = values
        .try_iter()?
        .map(|value| path(value, attribute.as_deref()));
    for value in std::iter::once(Ok(start)).chain(values) {
        let value = plain(&value?);
        match i128::try_from(value.clone()) {
            Ok(n) if as_float(&value).is_none() => {
                whole += n;
                float += n as f64;
            }
            _ => {
                all_whole = false;
                float += f64::try_from(value)?;
            }
        }
    }
    Ok(match all_whole {
        true => Value::from(whole),
        false => float_value(float),
    })
}

/// What `attribute`, `a.b.c`, is of the value; the value itself without one.
fn path(value: Value, attribute: Option<&str>) -> Result<Value, Error> {
    let mut parts = attribute
        .into_iter()
        .flat_map(|attribute| attribute.split('.'));
    parts.try_fold(value, |value, part| value.get_attr(part))
}

/// The texts of the values with `separator` between them.
fn join(values: &Value, separator: Option<String>, options: Kwargs) -> Result<String, Error> {
    let separator = separator.or(options.get("d")?).unwrap_or_default();
    let attribute: Option<String> = options.get("attribute")?;
    options.assert_all_used()?;
    let texts: Vec<String> = values
        .try_iter()?
        .map(|value| Ok(text(&path(value, attribute.as_deref())?)))
        .collect::<Result<_, Error>>()?;
    Ok(texts.join(&separator))
}

/// At most `length` characters, and up to `leeway` more before anything is cut; whole words unless
/// `killwords`.
fn truncate(
    text: &str,
    length: Option<usize>,
    killwords: Option<bool>,
    end: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let length = length.or(options.get("length")?).unwrap_or(255);
    let killwords = killwords.or(options.get("killwords")?).unwrap_or(false);
    let end = end.or(options.get("end")?).unwrap_or("...".into());
    let leeway: Option<usize> = options.get("leeway")?;
    let leeway = leeway.unwrap_or(5);
    options.assert_all_used()?;
    if text.chars().count() <= length + leeway {
        return Ok(text.to_owned());
    }
    let room = length.saturating_sub(end.chars().count());
    let cut: String = text.chars().take(room).collect();
    let cut = match cut.rsplit_once(' ') {
        Some((words, _)) if !killwords => words,
        _ => &cut,
    };
    Ok(cut.to_owned() + &end)
}

/// Runs of letters, digits and underscores.
fn wordcount(value: &Value) -> usize {
    let text = text(value);
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.split(|c| !is_word(c))
        .filter(|word| !word.is_empty())
        .count()
}
