//! Filters of Jinja2 that minijinja lacks, or that meet numbers and texts in another way.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, Value};

use super::methods::pad;
use super::operators::{integer, number, written};
use super::ordering::path;
use super::python_objects::is_namespace;
use super::python_text::{as_float, text};

pub fn add_to(environment: &mut Environment) {
    environment.add_filter("string", |value: &Value| text(value));
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("abs", |value: &Value| match integer(value) {
        Some(n) => Ok(Value::from(n.abs())),
        None => number(value).map(|x| Value::from(x.abs())),
    });
    environment.add_filter("round", round);
    environment.add_filter("format", format);
    environment.add_filter("sum", sum);
    environment.add_filter("join", join);
    environment.add_filter("center", |value: &Value, width: Option<i64>| {
        pad(&text(value), "center", width.unwrap_or(80), ' ')
    });
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    environment.add_filter("attr", attr);
}

/// The argument at that place, or of that name.
///
/// # Errors
/// If the named one is of another type.
pub fn argument(
    positional: &[Value],
    at: usize,
    options: &Kwargs,
    name: &str,
) -> Result<Option<Value>, Error> {
    match positional.get(at) {
        Some(found) => Ok(Some(found.clone())),
        None if options.has(name) => options.get(name).map(Some),
        None => Ok(None),
    }
}

/// `value`, or `default_value` where it is undefined; with `boolean`, where it is false in Python's
/// sense.
fn default(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = argument(&positional, 0, &options, "default_value")?;
    let boolean = argument(&positional, 1, &options, "boolean")?;
    options.assert_all_used()?;
    let boolean = boolean.is_some_and(|boolean| boolean.is_true());
    Ok(
        match value.is_undefined() || (boolean && !value.is_true()) {
            true => default.unwrap_or(Value::from("")),
            false => value.clone(),
        },
    )
}

/// An attribute in Python's sense: keys of a dict are none.
fn attr(value: &Value, name: String) -> Result<Value, Error> {
    match (value.kind(), is_namespace(value)) {
        (ValueKind::Undefined, _) => Err(Error::from(minijinja::ErrorKind::UndefinedError)),
        (ValueKind::Map, false) => Ok(Value::UNDEFINED),
        _ => value.get_attr(&name),
    }
}

/// As markupsafe escapes HTML. The result is not marked as safe: nothing is escaped by itself here.
pub fn escape(value: &Value) -> String {
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
    let parsed = parsed.map(Value::from);
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
    let whole = integer(value);
    let x = number(value)?;
    let scale = 10f64.powi(precision);
    let rounded = match method.as_str() {
        // Python rounds the decimal digits of the exact value; so does formatting.
        "common" if precision >= 0 && whole.is_some() => {
            return Ok(Value::from(whole.unwrap_or(0)));
        }
        "common" if whole.is_some() => {
            let scale = 10i128.checked_pow(precision.unsigned_abs());
            let rounded = scale.and_then(|scale| round_to(whole.unwrap_or(0), scale));
            return Ok(Value::from(rounded.unwrap_or(0)));
        }
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
    Ok(Value::from(rounded))
}

/// The multiple of `scale` next to `n`, of two the even one.
fn round_to(n: i128, scale: i128) -> Option<i128> {
    let (below, rest) = (n.div_euclid(scale), n.rem_euclid(scale));
    let up = match (2 * rest).cmp(&scale) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Equal => below.rem_euclid(2),
        std::cmp::Ordering::Greater => 1,
    };
    (below + up).checked_mul(scale)
}

/// `format % args`, with floats that any conversion takes.
fn format(template: &str, args: Rest<Value>) -> Result<Value, Error> {
    let args = written(template, args.0);
    minijinja::formatting::format(FormatStyle::Printf, template, &args).map(Value::from)
}

/// Numbers added up: integers exactly, others as floats.
fn sum(values: &Value, attribute: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let attribute = attribute.or(options.get("attribute")?);
    let start: Option<Value> = options.get("start")?;
    options.assert_all_used()?;
    let start = start.unwrap_or(Value::from(0));
    let (mut whole, mut float, mut all_whole) = (0i128, 0.0, true);
    let values = values
        .try_iter()?
        .map(|value| path(value, attribute.as_ref()));
    for value in std::iter::once(Ok(start)).chain(values) {
        let value = value?;
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
        false => Value::from(float),
    })
}

/// The texts of the values with `separator` between them.
fn join(
    values: &Value,
    separator: Option<String>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let separator = separator.or(options.get("d")?).unwrap_or_default();
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    let texts: Vec<String> = values
        .try_iter()?
        .map(|value| Ok(text(&path(value, attribute.as_ref())?)))
        .collect::<Result<_, Error>>()?;
    Ok(texts.join(&separator))
}
