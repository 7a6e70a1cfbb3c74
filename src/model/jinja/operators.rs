//! Operators of Python, for where minijinja's are others; see [`expression`](super::expression).

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::expression::{ATTRIBUTE, EACH, ITEM, NEGATIVE, POSITIVE, POWER, REMAINDER, SLICE};
use super::methods::attribute;
use super::python_objects::slice;
use super::python_text::as_float;

pub fn add_to(environment: &mut Environment) {
    environment.add_filter(REMAINDER, remainder);
    environment.add_filter(ITEM, item);
    environment.add_filter(ATTRIBUTE, |value: &Value, name: String| {
        attribute(value, &name)
    });
    environment.add_filter(POWER, power);
    environment.add_filter(EACH, |value: Value| match value.is_none() {
        true => {
            let detail = "none cannot be gone through";
            Err(Error::new(ErrorKind::InvalidOperation, detail))
        }
        false => Ok(value),
    });
    environment.add_filter(POSITIVE, |value: &Value| signed(value, 1));
    environment.add_filter(NEGATIVE, |value: &Value| signed(value, -1));
    environment.add_filter(
        SLICE,
        |value: &Value, start: Value, stop: Value, step: Value| {
            let place = |value: Value| match value.kind() {
                ValueKind::None => Ok(None),
                ValueKind::Bool => Ok(Some(i64::from(value.is_true()))),
                _ => i64::try_from(value).map(Some),
            };
            slice(value, place(start)?, place(stop)?, place(step)?)
        },
    );
}

/// The integer that `value` is, or is in Python: true is 1.
pub fn integer(value: &Value) -> Option<i128> {
    match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        ValueKind::Number if as_float(value).is_none() => i128::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// The number that `value` is, or is in Python: true is 1.
///
/// # Errors
/// If it is none.
pub fn number(value: &Value) -> Result<f64, Error> {
    let whole = integer(value).map(|n| n as f64);
    let found = as_float(value).or(whole);
    found.ok_or_else(|| {
        let detail = format!("{} is not a number", value.kind());
        Error::new(ErrorKind::InvalidOperation, detail)
    })
}

/// `value[key]`: nothing that is gone through has items by number, and no list has one by a float.
fn item(value: &Value, key: Value) -> Result<Value, Error> {
    let by_place = matches!(value.kind(), ValueKind::Seq | ValueKind::String);
    match value.kind() {
        ValueKind::Iterable => Ok(Value::UNDEFINED),
        _ if by_place && as_float(&key).is_some() => Ok(Value::UNDEFINED),
        _ => value.get_item(&key),
    }
}

/// `base ** exponent`.
///
/// # Errors
/// If the result is a complex number, or has more digits than any prompt needs.
fn power(base: &Value, exponent: &Value) -> Result<Value, Error> {
    let invalid = |detail: &'static str| Error::new(ErrorKind::InvalidOperation, detail);
    if let (Some(base), Some(exponent)) = (integer(base), integer(exponent))
        && exponent >= 0
    {
        let found = u32::try_from(exponent)
            .ok()
            .and_then(|n| base.checked_pow(n));
        return found
            .map(Value::from)
            .ok_or_else(|| invalid("a power beyond 38 digits"));
    }
    let (base, exponent) = (number(base)?, number(exponent)?);
    let found = base.powf(exponent);
    match found.is_finite() || !base.is_finite() || !exponent.is_finite() {
        true => Ok(Value::from(found)),
        false if base == 0.0 => Err(invalid("zero to a negative power")),
        false if found.is_nan() => Err(invalid("a power that is a complex number")),
        false => Err(invalid("a power beyond all floats")),
    }
}

fn signed(value: &Value, sign: i128) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    match integer(value) {
        Some(n) => Ok(Value::from(sign * n)),
        None => Ok(Value::from(sign as f64 * number(value)?)),
    }
}

/// `left % right`: a text formatted, or what a division leaves, with the sign of the divisor.
fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(template) = left.as_str() {
        return percent(template, right).map(Value::from);
    }
    let zero = || {
        Error::new(
            ErrorKind::InvalidOperation,
            "remainder of a division by zero",
        )
    };
    if let (Some(a), Some(b)) = (integer(left), integer(right)) {
        let rest = a.checked_rem(b).ok_or_else(zero)?;
        let other_sign = rest != 0 && (rest < 0) != (b < 0);
        return Ok(Value::from(if other_sign { rest + b } else { rest }));
    }
    let (a, b) = (number(left)?, number(right)?);
    if b == 0.0 {
        return Err(zero());
    }
    let rest = a % b;
    Ok(Value::from(match rest {
        0.0 => 0.0f64.copysign(b),
        rest if (rest < 0.0) != (b < 0.0) => rest + b,
        rest => rest,
    }))
}

/// `template % values` of Python: a tuple has one value for each conversion.
fn percent(template: &str, values: &Value) -> Result<String, Error> {
    let values = match values.downcast_object_ref::<Tuple>() {
        Some(tuple) => tuple.to_vec(),
        None => vec![values.clone()],
    };
    let wanted = conversions(template);
    let takes_none = values.len() == 1 && wanted == 0 && values[0].kind() == ValueKind::Map;
    if wanted != values.len() && !takes_none {
        let detail = format!(
            "{} values for a text with {wanted} conversions",
            values.len()
        );
        return Err(Error::new(ErrorKind::InvalidOperation, detail));
    }
    format(FormatStyle::Printf, template, &written(template, values))
}

/// How many values a template takes, by its conversions and stars.
fn conversions(template: &str) -> usize {
    let mut count = 0;
    let mut characters = template.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            continue;
        }
        for c in characters.by_ref() {
            match c {
                '*' => count += 1,
                '%' => break,
                c if c.is_ascii_alphabetic() && !"hlL".contains(c) => {
                    count += 1;
                    break;
                }
                _ => {}
            }
        }
    }
    count
}

/// The values as `format` shall see them: what is to be written by `%s` as Python writes it.
pub fn written(template: &str, values: Vec<Value>) -> Vec<Value> {
    let all_text = !template.contains(['*', '(']);
    let kinds: Vec<char> = (template.split('%').skip(1))
        .filter_map(|part| {
            part.chars()
                .find(|c| c.is_ascii_alphabetic() && !"hlL".contains(*c))
        })
        .collect();
    let is_plain = template.contains("%%");
    let text = |(i, value): (usize, Value)| match (kinds.get(i), value.kind()) {
        (Some('s'), ValueKind::String) => value,
        (Some('s'), _) if all_text && !is_plain => Value::from(super::python_text::text(&value)),
        _ => value,
    };
    values.into_iter().enumerate().map(text).collect()
}
