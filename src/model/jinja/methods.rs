//! Methods of Python's str, dict and list, as far as a sandboxed template may call them: those that
//! change a list or a dict are refused there, too.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::python_objects::{DictView, is_namespace};
use super::python_text::text as python_text;

/// Methods of str.
const OF_TEXT: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
/// Methods of list; a tuple has the first two.
const OF_LIST: [&str; 11] = [
    "count", "index", "append", "clear", "copy", "extend", "insert", "pop", "remove", "reverse",
    "sort",
];
/// Methods of dict.
const OF_DICT: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];

/// Whether something has a method of that name.
pub fn is_method(name: &str) -> bool {
    OF_TEXT.contains(&name) || OF_LIST.contains(&name) || OF_DICT.contains(&name)
}

/// `value.name`: the method where there is one of that name, even of a dict that has such a key.
///
/// # Errors
/// If the value is undefined.
pub fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    let methods: &[&str] = match value.kind() {
        ValueKind::String => &OF_TEXT,
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => &OF_LIST[..2],
        ValueKind::Seq => &OF_LIST,
        ValueKind::Map if !is_namespace(value) && !value.is_kwargs() => &OF_DICT,
        _ => &[],
    };
    match methods.contains(&name) {
        true => Ok(Value::from_object(Method(name.to_owned()))),
        false => value.get_attr(name),
    }
}

/// A method that is not called: there, true, and not for anything else.
#[derive(Debug)]
struct Method(String);

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<built-in method {}>", self.0)
    }
}

/// Calls `method` of `value`, which has none of that name by itself.
///
/// # Errors
/// [`ErrorKind::UnknownMethod`] if Python has no such method or a template may not call it.
pub fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let methods = [string_method, letter_method, search_method];
            let mut found = None;
            for try_method in methods {
                found = found.map_or_else(|| try_method(text, method, args), |f| Ok(Some(f)))?;
            }
            found
        }
        ValueKind::Seq => list_method(value, method, args)?,
        ValueKind::Map => dict_method(value, method, args)?,
        _ => None,
    };
    match found {
        Some(found) => Ok(found),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            match at {
                Some(at) => Ok(Some(Value::from(at))),
                None => Err(invalid(format!("{wanted} is not in the list"))),
            }
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        _ => Ok(None),
    }
}

fn dict_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    if is_namespace(value) {
        return Ok(None);
    }
    let view = |method, items: Result<Vec<Value>, Error>| {
        let () = from_args(args)?;
        Ok(Some(Value::from_object(DictView {
            method,
            items: items?,
        })))
    };
    let keys = || value.try_iter();
    match method {
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "keys" => view("keys", Ok(keys()?.collect())),
        "values" => view("values", keys()?.map(|key| value.get_item(&key)).collect()),
        "items" => {
            let pair = |key: Value| {
                let item = value.get_item(&key)?;
                Ok(Value::from(Tuple::from([key, item])))
            };
            view("items", keys()?.map(pair).collect())
        }
        _ => Ok(None),
    }
}

/// Methods of str that make a text or texts of it.
fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            let cut = |c: char| match characters {
                Some(characters) => characters.contains(c),
                None => is_space(c),
            };
            let text = if method == "rstrip" {
                text
            } else {
                text.trim_start_matches(cut)
            };
            Value::from(if method == "lstrip" {
                text
            } else {
                text.trim_end_matches(cut)
            })
        }
        "split" | "rsplit" => split(text, args, method == "rsplit")?,
        "splitlines" => {
            let (keepends, options): (Option<bool>, Kwargs) = from_args(args)?;
            let keepends = keepends.or(options.get("keepends")?).unwrap_or(false);
            options.assert_all_used()?;
            lines(text, keepends).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = match method {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match parts {
                Some((before, after)) => [before, separator, after],
                None if method == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            Value::from(pad(text, method, width, fill.unwrap_or(' ')))
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            let sign = &text[..text.len() - digits.len()];
            let width = width - sign.len() as i64;
            Value::from(format!("{sign}{}", pad(digits, "rjust", width, '0')))
        }
        "expandtabs" => {
            let (size, options): (Option<usize>, Kwargs) = from_args(args)?;
            let size = size.or(options.get("tabsize")?).unwrap_or(8);
            options.assert_all_used()?;
            Value::from(expand_tabs(text, size.min(1 << 16)))
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut texts = Vec::new();
            for item in items.try_iter()? {
                match item.as_str() {
                    Some(text) => texts.push(text.to_owned()),
                    None => {
                        let found = python_text(&item);
                        return Err(invalid(format!("join: {found} is not a text")));
                    }
                }
            }
            Value::from(texts.join(text))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

/// Methods of str that change the case of letters, or ask what its characters are. They take nothing.
fn letter_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "title" => Value::from(title(text)),
        "swapcase" => {
            let swap = |c: char| match (c.is_uppercase(), c.is_lowercase()) {
                (true, _) => c.to_lowercase().collect::<String>(),
                (_, true) => c.to_uppercase().collect(),
                _ => c.into(),
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss").replace('ς', "σ")),
        "isdigit" | "isdecimal" => {
            let superscript = |c| method == "isdigit" && "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉".contains(c);
            // Decimal digits are numeric characters that stand for themselves in a number; letters
            // and fractions among the numeric ones are neither.
            let digit = |c: char| c.is_ascii_digit() || superscript(c) || is_decimal(c);
            Value::from(!text.is_empty() && text.chars().all(digit))
        }
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "istitle" => {
            let cased = text.chars().any(|c| c.is_uppercase() || c.is_lowercase());
            Value::from(cased && title(text) == text)
        }
        "capitalize" => Value::from(capitalize(text)),
        "isprintable" => Value::from(text.chars().all(super::python_text::is_printable)),
        "isidentifier" => {
            let part = |c: char| c.is_alphanumeric() || c == '_';
            let digit = |c: char| c.is_numeric();
            Value::from(!text.is_empty() && text.chars().all(part) && !text.starts_with(digit))
        }
        _ => return Ok(None),
    };
    let () = from_args(args)?;
    Ok(Some(found))
}

/// Tabs as spaces up to the next multiple of `size` in the line.
fn expand_tabs(text: &str, size: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let missing = size - column % size;
                out.extend(std::iter::repeat_n(' ', missing));
                column += missing;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    out
}

/// Methods of str that look for something, in all of it or in a slice.
fn search_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let found = match method {
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let Some((offset, slice)) = slice(text, start, end) else {
                return match method {
                    "count" => Ok(Some(Value::from(0))),
                    "find" | "rfind" => Ok(Some(Value::from(-1))),
                    _ => Err(invalid("substring not found".into())),
                };
            };
            if method == "count" {
                return Ok(Some(Value::from(slice.matches(wanted).count())));
            }
            let at = match method.starts_with('r') {
                true => slice.rfind(wanted),
                false => slice.find(wanted),
            };
            match at {
                Some(at) => Value::from(offset + slice[..at].chars().count()),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(invalid("substring not found".into())),
            }
        }
        "startswith" | "endswith" if args.len() > 1 => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let wanted: Vec<Value> = match wanted.kind() {
                ValueKind::String => vec![wanted.clone()],
                _ => wanted.try_iter()?.collect(),
            };
            let slice = slice(text, start, end);
            let matches = |wanted: &Value| match (slice, wanted.as_str()) {
                (Some((_, slice)), Some(wanted)) if method == "startswith" => {
                    slice.starts_with(wanted)
                }
                (Some((_, slice)), Some(wanted)) => slice.ends_with(wanted),
                _ => false,
            };
            Value::from(wanted.iter().any(matches))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

/// Characters `start..end` by Python's rules of slices, and the first one's number; `None` where
/// they begin beyond the end.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    let length = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { (at + length).max(0) } else { at };
    let start = place(start.unwrap_or(0));
    let end = place(end.unwrap_or(length)).min(length);
    if start > end {
        return None;
    }
    let byte = |at: i64| {
        let mut places = text.char_indices().map(|(byte, _)| byte);
        places.nth(at as usize).unwrap_or(text.len())
    };
    Some((start as usize, &text[byte(start)..byte(end)]))
}

/// `split` and `rsplit`: at most `maxsplit` cuts, the latter counted from the end.
fn split(text: &str, args: &[Value], from_end: bool) -> Result<Value, Error> {
    let (separator, most, options): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(options.get("sep")?);
    let most = most.or(options.get("maxsplit")?).filter(|&most| most >= 0);
    options.assert_all_used()?;
    let most = most.map_or(usize::MAX, |most| most as usize);
    let parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("split: the separator is empty".into())),
        Some(separator) if from_end => {
            let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
            parts
        }
        Some(separator) => text.splitn(most.saturating_add(1), separator).collect(),
        None => words(text, most, from_end),
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// The words of a text; what is left after `most` cuts keeps its spaces, but for those at the cut.
fn words(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = match from_end {
        true => text.trim_end_matches(is_space),
        false => text.trim_start_matches(is_space),
    };
    while !rest.is_empty() {
        let cut = match from_end {
            // What is left keeps the white space at its far end.
            _ if parts.len() == most => None,
            true => rest.rfind(is_space),
            false => rest.find(is_space),
        };
        let Some(at) = cut else {
            parts.push(rest);
            break;
        };
        if from_end {
            parts.push(rest[at..].trim_start_matches(is_space));
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            parts.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(is_space);
        }
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// The lines of a text by every line break that Python knows.
pub fn lines(text: &str, keepends: bool) -> Vec<&str> {
    let is_break = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (end, next) = match rest.find(is_break) {
            None => (rest.len(), rest.len()),
            Some(at) if rest[at..].starts_with("\r\n") => (at, at + 2),
            Some(at) => (at, at + rest[at..].chars().next().map_or(0, char::len_utf8)),
        };
        out.push(if keepends {
            &rest[..next]
        } else {
            &rest[..end]
        });
        rest = &rest[next..];
    }
    out
}

/// Fills a text up to `width` characters, as the method of that name.
pub fn pad(text: &str, method: &str, width: i64, fill: char) -> String {
    let length = text.chars().count() as i64;
    // Far beyond any prompt; a template may not ask for all memory.
    let missing = (width - length).clamp(0, 1 << 20);
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // Where it cannot be even, Python's choice depends on both lengths.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |n: i64| std::iter::repeat_n(fill, n as usize).collect::<String>();
    fill(left) + text + &fill(missing - left)
}

/// The first letter in title case, the others in lower case.
pub fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(title_case).unwrap_or_default();
    first + &characters.as_str().to_lowercase()
}

/// Every letter after a character that is none in title case, the others in lower case.
pub fn title(text: &str) -> String {
    let mut out = String::new();
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => out.extend(c.to_lowercase()),
            false => out += &title_case(c),
        }
        in_word = c.is_uppercase() || c.is_lowercase() || TITLE_CASE.contains(&c);
    }
    out
}

/// Letters that are two in one, the first of which is a capital.
const TITLE_CASE: [char; 4] = ['\u{1c5}', '\u{1c8}', '\u{1cb}', '\u{1f2}'];

/// A letter as the first of a word: its capital, of several letters in one the first one's.
fn title_case(c: char) -> String {
    let pair = match c {
        '\u{1c4}'..='\u{1cc}' => Some(TITLE_CASE[(u32::from(c) as usize - 0x1c4) / 3]),
        '\u{1f1}'..='\u{1f3}' => Some(TITLE_CASE[3]),
        // Georgian capitals are for whole words.
        '\u{10d0}'..='\u{10ff}' => Some(c),
        _ => None,
    };
    if let Some(pair) = pair {
        return pair.into();
    }
    let mut capitals = c.to_uppercase();
    let first = capitals.next().map(String::from).unwrap_or_default();
    first + &capitals.collect::<String>().to_lowercase()
}

/// `str.isspace`: Unicode's white space and the four separators of ASCII.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// Whether it is a decimal digit of some script: those stand in runs of ten, whose values are their
/// places, so that the character nine before or after is numeric, too.
fn is_decimal(c: char) -> bool {
    const ZEROS: [u32; 24] = [
        0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66,
        0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0xa620, 0xa8d0, 0xff10,
    ];
    ZEROS
        .iter()
        .any(|zero| (*zero..zero + 10).contains(&u32::from(c)))
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
