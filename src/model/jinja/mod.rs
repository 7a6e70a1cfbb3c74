//! Jinja as transformers sets it up for chat templates: Jinja2's tests, filters and text of values,
//! Python's methods, the `generation` block.
//!
//! The engine is minijinja; what is here is where Jinja2 differs. A model has seen in training what
//! Jinja2 renders, so a space or a digit more is another prompt.
//!
//! `scripts/compare_text.py` compares both over every template that packages ship and over a grid of
//! expressions. What it leaves: no `varargs` and `kwargs` in macros, no `wordwrap`, `xmlattr`, `urlize`,
//! `random`, complex numbers and `pprint` of long values, which are errors; what filters make lazily can
//! be indexed and is written as a list, a text marked as safe escapes nothing that is added to it,
//! characters by name (`\N{...}`) stay as they are.
//!
//! Source: jinja2 3.1.6, transformers 4.57.6 `utils/chat_template_utils.py`. Recorded renderings:
//! `tests/data/text/jinja.json`, by `scripts/goldens/make_templates.py`.

mod expression;
mod filters;
mod generation;
mod lexer;
mod methods;
mod operators;
mod ordering;
mod python_json;
mod python_objects;
mod python_text;
mod strftime;
mod text_filters;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use thiserror::Error as ThisError;

pub use generation::prepare;
pub use python_text::from_json;

use python_objects::{Range, is_namespace};
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
    environment.set_formatter(|out, state, value| {
        let written = match state.auto_escape() {
            AutoEscape::None => text(value),
            _ if value.is_safe() => text(value),
            // Within `{% autoescape true %}`.
            _ => filters::escape(value),
        };
        out.write_str(&written).map_err(Error::from)
    });
    environment.add_filter("tojson", python_json::tojson);
    filters::add_to(&mut environment);
    text_filters::add_to(&mut environment);
    ordering::add_to(&mut environment);
    operators::add_to(&mut environment);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("mapping", |value: &Value| {
        value.kind() == ValueKind::Map && !is_namespace(value)
    });
    environment.add_test("lower", |value: &Value| {
        let text = text(value);
        text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
    });
    environment.add_test("upper", |value: &Value| {
        let text = text(value);
        text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
    });
    environment.add_test("float", |value: &Value| as_float(value).is_some());
    environment.add_test("number", |value: &Value| {
        as_float(value).is_some() || matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("callable", |value: &Value| {
        matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
    });
    environment.add_function("range", Range::call);
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
    ) && !is_namespace(value)
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
    ) && !is_namespace(value)
}

/// Marks an error as the template's own words.
#[derive(Debug, ThisError)]
#[error("{0}")]
pub struct Raised(pub String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = text(message);
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}
