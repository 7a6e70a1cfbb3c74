//! Objects of Python that minijinja has no like of: what a dict's methods give, ranges, groups.

use std::sync::Arc;

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Rest, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Whether it is what `namespace()` makes.
pub fn is_namespace(value: &Value) -> bool {
    let named = |object: &DynObject| object.type_name().contains("Namespace");
    value.as_object().is_some_and(named)
}

/// What `keys()`, `values()` and `items()` of a dict give: something to go through, without an index.
#[derive(Debug)]
pub struct DictView {
    pub method: &'static str,
    pub items: Vec<Value>,
}

impl Object for DictView {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(self.items.clone().into_iter()))
    }
}

/// What `range` gives.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    start: i64,
    stop: i64,
    step: i64,
}

impl Range {
    /// As Jinja2's sandbox limits it.
    const LONGEST: i64 = 100_000;

    /// The function `range(stop)`, `range(start, stop)` or `range(start, stop, step)`.
    ///
    /// # Errors
    /// If the step is zero, or the range longer than a template may have.
    pub fn call(arguments: Rest<i64>) -> Result<Value, Error> {
        let range = match arguments.0[..] {
            [stop] => Range {
                start: 0,
                stop,
                step: 1,
            },
            [start, stop] => Range {
                start,
                stop,
                step: 1,
            },
            [start, stop, step] if step != 0 => Range { start, stop, step },
            [_, _, _] => return Err(invalid("range: the step is zero")),
            _ => return Err(invalid("range: expected one to three whole numbers")),
        };
        match range.len() > Self::LONGEST {
            true => Err(invalid("range: too many numbers, at most 100000 allowed")),
            false => Ok(Value::from_object(range)),
        }
    }

    fn len(self) -> i64 {
        let (distance, step) = match self.step > 0 {
            true => (self.stop.saturating_sub(self.start), self.step),
            false => (
                self.start.saturating_sub(self.stop),
                -self.step.max(-i64::MAX),
            ),
        };
        distance.max(0).saturating_add(step - 1) / step
    }

    /// `repr(range)`.
    pub fn text(self) -> String {
        match self.step {
            1 => format!("range({}, {})", self.start, self.stop),
            step => format!("range({}, {}, {step})", self.start, self.stop),
        }
    }

    /// `range[start:stop:step]`, all within its length.
    pub fn slice(self, start: i64, stop: i64, step: i64) -> Value {
        Value::from_object(Range {
            start: self.start + start * self.step,
            stop: self.start + stop * self.step,
            step: self.step * step,
        })
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = key.as_i64().filter(|at| (0..self.len()).contains(at))?;
        Some(Value::from(self.start + at * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.len() as usize)
    }
}

/// One group of `groupby`: a pair, whose parts have names.
#[derive(Debug)]
pub struct GroupTuple {
    pub grouper: Value,
    pub list: Vec<Value>,
}

impl Object for GroupTuple {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_str(), key.as_usize()) {
            (Some("grouper"), _) | (_, Some(0)) => Some(self.grouper.clone()),
            (Some("list"), _) | (_, Some(1)) => Some(Value::from(self.list.clone())),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}

/// `value[start:stop:step]`; undefined for what has no slices.
///
/// # Errors
/// If the step is zero.
pub fn slice(
    value: &Value,
    start: Option<i64>,
    stop: Option<i64>,
    step: Option<i64>,
) -> Result<Value, Error> {
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(invalid("the step of a slice is zero"));
    }
    let is_text = value.kind() == ValueKind::String;
    let Some(length) = value
        .len()
        .filter(|_| is_text || value.kind() == ValueKind::Seq)
    else {
        return match value.kind() {
            ValueKind::Undefined => Err(Error::from(ErrorKind::UndefinedError)),
            _ => Ok(Value::UNDEFINED),
        };
    };
    let length = length as i64;
    // The rules of Python's `slice.indices`.
    let (low, high) = if step > 0 {
        (0, length)
    } else {
        (-1, length - 1)
    };
    let place = |at: i64| match at < 0 {
        true => (at + length).max(low),
        false => at.min(high),
    };
    let start = start.map_or(if step > 0 { low } else { high }, place);
    let stop = stop.map_or(if step > 0 { high } else { low }, place);
    if let Some(range) = value.downcast_object_ref::<Range>() {
        return Ok(range.slice(start, stop, step));
    }
    let places = std::iter::successors(Some(start), |at| at.checked_add(step));
    let places = places.take_while(|at| if step > 0 { *at < stop } else { *at > stop });
    if let Some(text) = value.as_str() {
        let characters: Vec<char> = text.chars().collect();
        return Ok(Value::from(
            places.map(|at| characters[at as usize]).collect::<String>(),
        ));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    let items = places.map(|at| items[at as usize].clone());
    match value.downcast_object_ref::<Tuple>() {
        Some(_) => Ok(Value::from(Tuple::from(items.collect::<Vec<Value>>()))),
        None => Ok(items.collect()),
    }
}

fn invalid(detail: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
