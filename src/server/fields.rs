//! Reads a request's JSON field by field: what is missing or null is absent, what is wrong is named.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, ApiResult};

/// An object of a request, and where it is in it.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

/// A value as messages quote it: its kind where it is long.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.chars().count() <= 40 => format!("{text:?}"),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Fields { map, path: "" }
    }

    /// An object inside another, which is called `path` in errors.
    pub fn within(map: &'a Map<String, Value>, path: &'a str) -> Self {
        Fields { map, path }
    }

    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// What errors call the field.
    pub fn name(&self, field: &str) -> String {
        match self.path.is_empty() {
            true => field.to_owned(),
            false => format!("{}.{field}", self.path),
        }
    }

    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// That `field` is not what it should be.
    pub fn wrong(&self, field: &str, expected: impl Display) -> ApiError {
        let name = self.name(field);
        let found = self.get(field).map_or("nothing".into(), show);
        ApiError::invalid(&name, format!("{name}: found {found}, expected {expected}"))
    }

    pub fn required(&self, field: &str, expected: impl Display) -> ApiResult<&'a Value> {
        self.get(field).ok_or_else(|| self.wrong(field, expected))
    }

    pub fn text(&self, field: &str) -> ApiResult<Option<&'a str>> {
        self.typed(field, Value::as_str, "a string")
    }

    pub fn bool(&self, field: &str) -> ApiResult<Option<bool>> {
        self.typed(field, Value::as_bool, "true or false")
    }

    pub fn list(&self, field: &str) -> ApiResult<Option<&'a Vec<Value>>> {
        self.typed(field, Value::as_array, "a list")
    }

    pub fn object(&self, field: &str) -> ApiResult<Option<&'a Map<String, Value>>> {
        self.typed(field, Value::as_object, "an object")
    }

    fn typed<T>(
        &self,
        field: &str,
        read: impl Fn(&'a Value) -> Option<T>,
        expected: &str,
    ) -> ApiResult<Option<T>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| self.wrong(field, expected)),
        }
    }

    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> ApiResult<Option<f32>> {
        let number = self.typed(field, Value::as_f64, "a number")?;
        match number {
            Some(number) if !range.contains(&number) => {
                let (from, to) = (range.start(), range.end());
                Err(self.wrong(field, format!("a number from {from} to {to}")))
            }
            number => Ok(number.map(|number| number as f32)),
        }
    }

    /// A whole number, perhaps written `5.0`; what is above any i64 counts as the largest.
    pub fn integer(&self, field: &str, range: RangeInclusive<i64>) -> ApiResult<Option<i64>> {
        let whole = |value: &Value| {
            let float = || value.as_f64().filter(|f| f.fract() == 0.0);
            // The conversion saturates.
            value.as_i64().or_else(|| float().map(|f| f as i64))
        };
        let number = self.typed(field, whole, "a whole number")?;
        match number {
            Some(number) if !range.contains(&number) => {
                let expected = match (*range.start(), *range.end()) {
                    (from, i64::MAX) => format!("a whole number from {from}"),
                    (from, to) => format!("a whole number from {from} to {to}"),
                };
                Err(self.wrong(field, expected))
            }
            number => Ok(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_out_of_range_are_refused_by_name_and_huge_ones_saturate() {
        let body = json!({ "n": 1e300, "m": 2.0, "x": -1, "t": "hot", "z": null });
        let fields = Fields::new(body.as_object().unwrap());
        assert_eq!(fields.integer("n", 0..=i64::MAX).unwrap(), Some(i64::MAX));
        assert_eq!(fields.integer("m", 0..=i64::MAX).unwrap(), Some(2));
        assert_eq!(fields.integer("z", 0..=i64::MAX).unwrap(), None);
        let error = fields.integer("x", 0..=5).unwrap_err();
        assert_eq!(
            error.message,
            "x: found -1, expected a whole number from 0 to 5"
        );
        let error = fields.number("t", 0.0..=2.0).unwrap_err();
        assert_eq!(error.message, "t: found \"hot\", expected a number");
        assert_eq!(error.param.as_deref(), Some("t"));
    }
}
