//! Jinja as transformers sets it up for chat templates: Jinja2's tests, filters and text of values,
//! Python's methods, the `generation` block.
//!
//! The engine is minijinja; what is here is where Jinja2 differs. A model has seen in training what
//! Jinja2 renders, so a space or a digit more is another prompt.
//!
//! Known differences, none of them in a published template that we know of: no `%` operator on
//! text, no `varargs` and `kwargs` in macros, no `wordwrap`, `xmlattr`, `urlize` and `random`;
//! floats below 1e-4 or from 1e16 are written as in Python, and in exchange cannot be calculated
//! with or compared.
//!
//! Source: jinja2 3.1.6, transformers 4.57.6 `utils/chat_template_utils.py`. Recorded renderings:
//! `tests/data/text/jinja.json`, by `scripts/goldens/make_templates.py`.

mod filters;
mod generation;
mod methods;
mod python_json;
mod python_text;
mod strftime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{DynObject, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use thiserror::Error as ThisError;

pub use generation::prepare;
pub use python_text::from_json;

use python_text::{as_float, text};

/// Jinja with the settings, functions and Python methods that transformers gives to templates.
///
/// # Errors
/// Never of these settings; minijinja's builder has one.
pub fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| {
        if !value.is_undefined() {
            out.write_str(&text(value)).map_err(Error::from)?;
        }
        Ok(())
    });
    environment.add_filter("tojson", python_json::tojson);
    filters::add_to(&mut environment);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("mapping", |value: &Value| {
        let namespace = |object: &DynObject| object.type_name().contains("Namespace");
        value.kind() == ValueKind::Map && !value.as_object().is_some_and(namespace)
    });
    environment.add_test("float", |value: &Value| as_float(value).is_some());
    environment.add_test("number", |value: &Value| {
        as_float(value).is_some() || matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Plain && as_float(value).is_none()
    });
    environment.add_function("cycler", |items: Rest<Value>| {
        minijinja_contrib::globals::cycler(items.0)
    });
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime::strftime_now);
    Ok(environment)
}

/// Whether Python's `iter` takes it; an undefined value is an empty list.
fn is_iterable(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined
            | ValueKind::String
            | ValueKind::Bytes
            | ValueKind::Seq
            | ValueKind::Map
            | ValueKind::Iterable
    )
}

/// Whether it has a length and items by index or key: text and mappings do in Python.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined
            | ValueKind::String
            | ValueKind::Bytes
            | ValueKind::Seq
            | ValueKind::Map
    )
}

/// Marks an error as the template's own words.
#[derive(Debug, ThisError)]
#[error("{0}")]
pub struct Raised(pub String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = text(message);
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}
