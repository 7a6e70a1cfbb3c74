//! Calls written as JSON objects: `{"name": "f", "arguments": {...}}`.

use serde_json::Value;

use super::{CALL_END, CallPart, Progress};

/// The call that is being read.
#[derive(Default)]
pub struct Hermes {
    state: State,
    /// Of the arguments: open brackets, whether in a string, whether after a backslash
    depth: usize,
    in_string: bool,
    escaped: bool,
}

#[derive(Default)]
enum State {
    #[default]
    Head,
    /// Arguments are given out as they come
    Arguments,
    /// After the arguments
    Tail,
    /// An order of keys that needs all of it
    Whole,
}

/// What is before the arguments.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    Incomplete,
    /// `arguments_at`: where the object of the arguments begins
    Found {
        name: String,
        arguments_at: usize,
    },
    /// A call perhaps, but not with name and arguments in this order
    Other,
}

/// Looks at the beginning of an object up to its arguments.
pub fn head(text: &str) -> Head {
    head_of(text).unwrap_or(Head::Incomplete)
}

/// `None` if more is needed.
fn head_of(text: &str) -> Option<Head> {
    let mut rest = text.trim_start().strip_prefix('{')?.trim_start();
    let mut name = None;
    loop {
        if rest.is_empty() {
            return None;
        }
        let Some((key, after)) = string(rest)? else {
            return Some(Head::Other);
        };
        let after = after.trim_start();
        if after.is_empty() {
            return None;
        }
        let Some(value) = after.strip_prefix(':') else {
            return Some(Head::Other);
        };
        rest = value.trim_start();
        if rest.is_empty() {
            return None;
        }
        match (key.as_str(), &name) {
            ("arguments" | "parameters", Some(name)) if rest.starts_with('{') => {
                return Some(Head::Found {
                    name: String::clone(name),
                    arguments_at: text.len() - rest.len(),
                });
            }
            ("name" | "id" | "type", _) => {
                let Some((value, after)) = string(rest)? else {
                    return Some(Head::Other);
                };
                if key == "name" {
                    name = Some(value);
                }
                let after = after.trim_start();
                if after.is_empty() {
                    return None;
                }
                let Some(next) = after.strip_prefix(',') else {
                    return Some(Head::Other);
                };
                rest = next.trim_start();
            }
            _ => return Some(Head::Other),
        }
    }
}

/// The JSON string at the beginning of `text` and what follows it: `None` if it is incomplete,
/// `Some(None)` if there is none.
fn string(text: &str) -> Option<Option<(String, &str)>> {
    if !text.starts_with('"') {
        return Some(None);
    }
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => {
                let parsed = serde_json::from_str(&text[..=at]).ok();
                return Some(parsed.map(|value| (value, &text[at + 1..])));
            }
            _ => {}
        }
    }
    None
}

impl Hermes {
    /// Takes from `held` what can be understood.
    pub fn read(&mut self, held: &mut String, parts: &mut Vec<CallPart>) -> Progress {
        loop {
            match self.state {
                State::Head => match head(held) {
                    Head::Incomplete if held.contains(CALL_END) => return Progress::NoCall,
                    Head::Incomplete => return Progress::NeedsMore,
                    Head::Other => self.state = State::Whole,
                    Head::Found { name, arguments_at } => {
                        held.drain(..arguments_at);
                        parts.push(CallPart::Name(name));
                        self.state = State::Arguments;
                    }
                },
                State::Arguments => {
                    let end = self.arguments_end(held);
                    let taken: String = held.drain(..end.unwrap_or(held.len())).collect();
                    if !taken.is_empty() {
                        parts.push(CallPart::Arguments(taken));
                    }
                    if end.is_none() {
                        return Progress::NeedsMore;
                    }
                    self.state = State::Tail;
                }
                State::Tail => {
                    let trimmed = held.trim_start();
                    if trimmed.is_empty() {
                        return Progress::NeedsMore;
                    }
                    // A model may forget the object's end.
                    *held = trimmed.strip_prefix('}').unwrap_or(trimmed).to_owned();
                    return Progress::Complete;
                }
                State::Whole => {
                    let Some(at) = held.find(CALL_END) else {
                        return Progress::NeedsMore;
                    };
                    let Some(call) = whole(&held[..at]) else {
                        return Progress::NoCall;
                    };
                    parts.extend(call);
                    held.drain(..at);
                    return Progress::Complete;
                }
            }
        }
    }

    /// The answer ends; `None` if this was no call.
    pub fn finish(&mut self, held: &mut String, complete: bool) -> Option<Vec<CallPart>> {
        match self.state {
            State::Head => None,
            State::Whole => {
                let call = whole(held).filter(|_| complete)?;
                held.clear();
                Some(call)
            }
            State::Arguments | State::Tail => {
                held.clear();
                Some(Vec::new())
            }
        }
    }

    /// Where the arguments end in `text`, which continues what was seen of them.
    fn arguments_end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// A whole call, its keys in any order, its arguments an object or the text of one.
fn whole(text: &str) -> Option<Vec<CallPart>> {
    let call: Value = serde_json::from_str(text).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    let arguments = call.get("arguments").or_else(|| call.get("parameters"));
    let json = match arguments {
        None => "{}".to_owned(),
        Some(Value::String(text)) => {
            serde_json::from_str::<Value>(text).ok()?;
            text.clone()
        }
        Some(value @ Value::Object(_)) => value.to_string(),
        Some(_) => return None,
    };
    Some(vec![CallPart::Name(name), CallPart::Arguments(json)])
}
