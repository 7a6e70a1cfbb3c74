//! The output of a response, item by item, and the events that tell of it.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::server::new_id;
use crate::server::reader::Part;

/// How calls of a tool are given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolKind {
    /// With the namespace that it was in
    Function(Option<String>),
    /// Free text in place of arguments
    Custom,
}

/// An event of the stream, but for its number.
pub struct Event {
    pub name: &'static str,
    /// An object
    pub fields: Value,
}

/// What was answered so far.
pub struct Items {
    kinds: HashMap<String, ToolKind>,
    items: Vec<Item>,
    /// The last item is not complete
    open: bool,
    reasoning_tokens: usize,
}

struct Item {
    id: String,
    body: Body,
    complete: bool,
}

enum Body {
    Reasoning(String),
    Message(String),
    Call {
        call_id: String,
        name: String,
        arguments: String,
        kind: ToolKind,
    },
}

impl Items {
    pub fn new(kinds: HashMap<String, ToolKind>) -> Self {
        Items {
            kinds,
            items: Vec::new(),
            open: false,
            reasoning_tokens: 0,
        }
    }

    /// The parts of one generated token: those of reasoning are counted.
    pub fn count_token(&mut self, parts: &[Part]) {
        let reasoning = parts.iter().any(|part| matches!(part, Part::Reasoning(_)));
        self.reasoning_tokens += usize::from(reasoning);
    }

    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// The items as the response object has them.
    pub fn json(&self) -> Value {
        self.items.iter().map(Item::json).collect()
    }

    /// Takes a part of the answer; the events that tell of it.
    pub fn add(&mut self, part: Part) -> Vec<Event> {
        let mut events = Vec::new();
        let fits = self.open
            && matches!(
                (self.items.last().map(|item| &item.body), &part),
                (Some(Body::Reasoning(_)), Part::Reasoning(_))
                    | (Some(Body::Message(_)), Part::Text(_))
                    | (Some(Body::Call { .. }), Part::Arguments { .. })
            );
        if !fits {
            events.extend(self.close());
            self.begin(&part, &mut events);
        }
        let index = self.items.len().saturating_sub(1);
        let Some(item) = self.items.last_mut() else {
            return events;
        };
        events.extend(item.grow(part, index));
        events
    }

    fn begin(&mut self, part: &Part, events: &mut Vec<Event>) {
        let (prefix, body) = match part {
            Part::Reasoning(_) => ("rs_", Body::Reasoning(String::new())),
            Part::Text(_) => ("msg_", Body::Message(String::new())),
            Part::Call { name, .. } => {
                let kind = self.kinds.get(name).cloned();
                let kind = kind.unwrap_or(ToolKind::Function(None));
                let prefix = match kind {
                    ToolKind::Custom => "ctc_",
                    ToolKind::Function(_) => "fc_",
                };
                let body = Body::Call {
                    call_id: new_id("call_"),
                    name: name.clone(),
                    arguments: String::new(),
                    kind,
                };
                (prefix, body)
            }
            Part::Arguments { .. } => return,
        };
        let item = Item {
            id: new_id(prefix),
            body,
            complete: false,
        };
        let index = self.items.len();
        let fields = json!({ "output_index": index, "item": item.json() });
        let name = "response.output_item.added";
        events.push(Event { name, fields });
        if let Some(part) = item.part() {
            let fields = json!({
                "item_id": item.id, "output_index": index, "content_index": 0, "part": part,
            });
            let name = "response.content_part.added";
            events.push(Event { name, fields });
        }
        self.items.push(item);
        self.open = true;
    }

    /// Completes the last item; the events that tell of it.
    pub fn close(&mut self) -> Vec<Event> {
        if !std::mem::take(&mut self.open) {
            return Vec::new();
        }
        let index = self.items.len() - 1;
        let item = &mut self.items[index];
        item.complete = true;
        let mut events = item.ends(index);
        let fields = json!({ "output_index": index, "item": item.json() });
        let name = "response.output_item.done";
        events.push(Event { name, fields });
        events
    }
}

impl Item {
    fn grow(&mut self, part: Part, index: usize) -> Option<Event> {
        let (name, delta) = match (&mut self.body, part) {
            (Body::Reasoning(all), Part::Reasoning(text)) => {
                all.push_str(&text);
                ("response.reasoning_text.delta", text)
            }
            (Body::Message(all), Part::Text(text)) => {
                all.push_str(&text);
                ("response.output_text.delta", text)
            }
            (
                Body::Call {
                    arguments, kind, ..
                },
                Part::Arguments { json, .. },
            ) => {
                arguments.push_str(&json);
                if *kind == ToolKind::Custom {
                    // The text inside is known at the end only.
                    return None;
                }
                ("response.function_call_arguments.delta", json)
            }
            _ => return None,
        };
        let mut fields = json!({ "item_id": self.id, "output_index": index, "delta": delta });
        if !matches!(self.body, Body::Call { .. }) {
            fields["content_index"] = 0.into();
        }
        if matches!(self.body, Body::Message(_)) {
            fields["logprobs"] = json!([]);
        }
        Some(Event { name, fields })
    }

    fn ends(&self, index: usize) -> Vec<Event> {
        let mut events = Vec::new();
        let mut push = |name, more: Value| {
            let mut fields = json!({ "item_id": self.id, "output_index": index });
            if let (Value::Object(fields), Value::Object(more)) = (&mut fields, more) {
                fields.extend(more);
            }
            events.push(Event { name, fields });
        };
        match &self.body {
            Body::Reasoning(text) => {
                push(
                    "response.reasoning_text.done",
                    json!({ "content_index": 0, "text": text }),
                );
            }
            Body::Message(text) => {
                push(
                    "response.output_text.done",
                    json!({ "content_index": 0, "text": text, "logprobs": [] }),
                );
            }
            Body::Call {
                name,
                arguments,
                kind: ToolKind::Function(_),
                ..
            } => push(
                "response.function_call_arguments.done",
                json!({ "name": name, "arguments": arguments }),
            ),
            Body::Call { .. } => {
                let input = self.input();
                push(
                    "response.custom_tool_call_input.delta",
                    json!({ "delta": input }),
                );
                push(
                    "response.custom_tool_call_input.done",
                    json!({ "input": input }),
                );
            }
        }
        if let Some(part) = self.part() {
            push(
                "response.content_part.done",
                json!({ "content_index": 0, "part": part }),
            );
        }
        events
    }

    /// The content part of a message or of reasoning.
    fn part(&self) -> Option<Value> {
        match &self.body {
            Body::Reasoning(text) => Some(json!({ "type": "reasoning_text", "text": text })),
            Body::Message(text) => Some(json!({
                "type": "output_text", "text": text, "annotations": [], "logprobs": [],
            })),
            Body::Call { .. } => None,
        }
    }

    /// The free text of a custom tool's call.
    fn input(&self) -> String {
        let Body::Call { arguments, .. } = &self.body else {
            return String::new();
        };
        let parsed: Option<Value> = serde_json::from_str(arguments).ok();
        let input = parsed.and_then(|value| Some(value.get("input")?.as_str()?.to_owned()));
        input.unwrap_or_default()
    }

    fn json(&self) -> Value {
        let status = match self.complete {
            true => "completed",
            false => "in_progress",
        };
        match &self.body {
            Body::Reasoning(text) => {
                let content = match text.is_empty() {
                    true => json!([]),
                    false => json!([{ "type": "reasoning_text", "text": text }]),
                };
                json!({
                    "id": self.id, "type": "reasoning", "summary": [], "content": content,
                    "status": status,
                })
            }
            Body::Message(_) => {
                let content = match self.complete {
                    true => json!([self.part()]),
                    false => json!([]),
                };
                json!({
                    "id": self.id, "type": "message", "status": status, "role": "assistant",
                    "content": content,
                })
            }
            Body::Call {
                call_id,
                name,
                arguments,
                kind,
            } => match kind {
                ToolKind::Custom => json!({
                    "id": self.id, "type": "custom_tool_call", "status": status, "call_id": call_id,
                    "name": name, "input": self.input(),
                }),
                ToolKind::Function(namespace) => {
                    let mut item = json!({
                        "id": self.id, "type": "function_call", "status": status,
                        "call_id": call_id, "name": name, "arguments": arguments,
                    });
                    if let Some(namespace) = namespace {
                        item["namespace"] = namespace.as_str().into();
                    }
                    item
                }
            },
        }
    }
}
