//! Filters that sort, group and compare values, by the rules of Python and without regard to case.
//!
//! Source: jinja2 3.1.6, `filters.py`.

use std::cmp::Ordering;

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::python_objects::GroupTuple;
use super::python_text::as_float;

pub fn add_to(environment: &mut Environment) {
    environment.add_filter("sort", sort);
    environment.add_filter("unique", unique);
    environment.add_filter("groupby", group_by);
    environment.add_filter("dictsort", dictsort);
    for (name, wanted) in [("min", Ordering::Less), ("max", Ordering::Greater)] {
        environment.add_filter(
            name,
            move |values: &Value,
                  sensitive: Option<bool>,
                  attribute: Option<Value>,
                  options: Kwargs| {
                extreme(wanted, values, sensitive, attribute, options)
            },
        );
    }
}

/// What is meant by `a.b.0` of a value; the value itself without an attribute.
///
/// # Errors
/// If a part of the path is undefined and another follows.
pub fn path(value: Value, attribute: Option<&Value>) -> Result<Value, Error> {
    match attribute {
        None => Ok(value),
        Some(attribute) => match attribute.as_str() {
            None => value.get_item(attribute),
            Some(text) => {
                text.split('.')
                    .try_fold(value, |value, part| match part.parse::<i64>() {
                        Ok(index) => value.get_item(&Value::from(index)),
                        Err(_) => value.get_attr(part),
                    })
            }
        },
    }
}

/// What a value is sorted by: a text in lower case, unless case matters.
fn key(value: Value, attribute: Option<&Value>, sensitive: bool) -> Result<Value, Error> {
    let value = path(value, attribute)?;
    Ok(match value.as_str() {
        Some(text) if !sensitive => Value::from(text.to_lowercase()),
        _ => value,
    })
}

/// `a < b` and its like.
///
/// # Errors
/// For values that Python does not order.
fn compare(a: &Value, b: &Value) -> Result<Ordering, Error> {
    let number = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => as_float(value).or_else(|| f64::try_from(value.clone()).ok()),
        _ => None,
    };
    let unordered = || {
        let detail = format!("{} and {} have no order", a.kind(), b.kind());
        Error::new(ErrorKind::InvalidOperation, detail)
    };
    match (number(a), number(b)) {
        (Some(x), Some(y)) => match (i128::try_from(a.clone()), i128::try_from(b.clone())) {
            (Ok(x), Ok(y)) if as_float(a).is_none() && as_float(b).is_none() => Ok(x.cmp(&y)),
            _ => x.partial_cmp(&y).ok_or_else(unordered),
        },
        (None, None) => match (a.as_str(), b.as_str()) {
            (Some(x), Some(y)) => Ok(x.cmp(y)),
            (None, None) if a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq => {
                for (x, y) in a.try_iter()?.zip(b.try_iter()?) {
                    if x != y {
                        return compare(&x, &y);
                    }
                }
                Ok(a.len().cmp(&b.len()))
            }
            _ => Err(unordered()),
        },
        _ => Err(unordered()),
    }
}

/// Sorts `items` by their keys, equal ones as they stand.
fn sort_by_key(
    mut items: Vec<(Value, Value)>,
    reverse: bool,
) -> Result<Vec<(Value, Value)>, Error> {
    let mut failure = None;
    items.sort_by(|(a, _), (b, _)| {
        // Python asks first whether they are equal.
        if a == b {
            return Ordering::Equal;
        }
        let order = compare(a, b).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            Ordering::Equal
        });
        if reverse { order.reverse() } else { order }
    });
    failure.map_or(Ok(items), Err)
}

fn keyed(
    values: &Value,
    attribute: Option<&Value>,
    sensitive: bool,
) -> Result<Vec<(Value, Value)>, Error> {
    let pair = |value: Value| Ok((key(value.clone(), attribute, sensitive)?, value));
    values.try_iter()?.map(pair).collect()
}

/// Whether the case of strings counts, given in its place or by name.
fn case_sensitive(given: Option<bool>, options: &Kwargs) -> Result<bool, Error> {
    Ok(given.or(options.get("case_sensitive")?).unwrap_or(false))
}

fn sort(
    values: &Value,
    reverse: Option<bool>,
    sensitive: Option<bool>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let reverse = reverse.or(options.get("reverse")?).unwrap_or(false);
    let sensitive = case_sensitive(sensitive, &options)?;
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    // By one attribute after the other, where several are named.
    let several = attribute
        .as_ref()
        .and_then(Value::as_str)
        .filter(|a| a.contains(','));
    let items = match several {
        None => keyed(values, attribute.as_ref(), sensitive)?,
        Some(names) => {
            let pair = |value: Value| {
                let parts = names
                    .split(',')
                    .map(|name| key(value.clone(), Some(&Value::from(name)), sensitive));
                Ok((parts.collect::<Result<Value, Error>>()?, value))
            };
            values.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
    };
    Ok(sort_by_key(items, reverse)?
        .into_iter()
        .map(|(_, value)| value)
        .collect())
}

fn unique(
    values: &Value,
    sensitive: Option<bool>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let sensitive = case_sensitive(sensitive, &options)?;
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    let mut seen: Vec<Value> = Vec::new();
    let mut found = Vec::new();
    for (key, value) in keyed(values, attribute.as_ref(), sensitive)? {
        if !seen.contains(&key) {
            seen.push(key);
            found.push(value);
        }
    }
    Ok(Value::make_iterable(move || found.clone().into_iter()))
}

fn group_by(
    values: &Value,
    attribute: Value,
    default: Option<Value>,
    sensitive: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(options.get("default")?);
    let sensitive = case_sensitive(sensitive, &options)?;
    options.assert_all_used()?;
    let plain = |value: &Value| {
        let found = path(value.clone(), Some(&attribute))?;
        Ok::<_, Error>(match &default {
            Some(default) if found.is_undefined() => default.clone(),
            _ => found,
        })
    };
    let mut items = Vec::new();
    for value in values.try_iter()? {
        items.push((key(plain(&value)?, None, sensitive)?, value));
    }
    let mut groups: Vec<(Value, GroupTuple)> = Vec::new();
    for (key, value) in sort_by_key(items, false)? {
        match groups.last_mut() {
            Some((last, group)) if *last == key => group.list.push(value),
            _ => {
                let grouper = if sensitive {
                    key.clone()
                } else {
                    plain(&value)?
                };
                let list = vec![value];
                groups.push((key, GroupTuple { grouper, list }));
            }
        }
    }
    Ok(groups
        .into_iter()
        .map(|(_, group)| Value::from_object(group))
        .collect())
}

fn dictsort(
    value: &Value,
    sensitive: Option<bool>,
    by: Option<String>,
    reverse: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let sensitive = case_sensitive(sensitive, &options)?;
    let by = by.or(options.get("by")?).unwrap_or("key".into());
    let reverse = reverse.or(options.get("reverse")?).unwrap_or(false);
    options.assert_all_used()?;
    if value.kind() != ValueKind::Map || !["key", "value"].contains(&&*by) {
        let detail = "dictsort: expected a mapping, and by `key` or `value`";
        return Err(Error::new(ErrorKind::InvalidOperation, detail));
    }
    let mut items = Vec::new();
    for name in value.try_iter()? {
        let item = value.get_item(&name)?;
        let sorted_by = if by == "key" { &name } else { &item };
        let sorted_by = key(sorted_by.clone(), None, sensitive)?;
        items.push((sorted_by, Value::from(Tuple::from([name, item]))));
    }
    Ok(sort_by_key(items, reverse)?
        .into_iter()
        .map(|(_, pair)| pair)
        .collect())
}

/// The least or the greatest of the values, the first of equals.
fn extreme(
    wanted: Ordering,
    values: &Value,
    sensitive: Option<bool>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let sensitive = case_sensitive(sensitive, &options)?;
    let attribute = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    let mut best: Option<(Value, Value)> = None;
    for (key, value) in keyed(values, attribute.as_ref(), sensitive)? {
        let better = match &best {
            Some((known, _)) => compare(&key, known)? == wanted,
            None => true,
        };
        if better {
            best = Some((key, value));
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, value)| value))
}
