//! Takes an answer apart while it streams: reasoning, text, tool calls.
//!
//! Two families of tool calls are read, whichever the model writes: Hermes,
//! `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, and the XML of Qwen's coder models,
//! `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`. Either is
//! also recognised without its opening tag. What turns out to be no call is text, as it was written.

mod hermes;
mod xml;

use serde_json::{Map, Value};

use hermes::Hermes;
use xml::Xml;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const FUNCTION: &str = "<function=";

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Reasoning(String),
    Text(String),
    /// A call begins; `index` counts the calls of this answer
    Call {
        index: usize,
        name: String,
    },
    /// More of the arguments' JSON text of call `index`
    Arguments {
        index: usize,
        json: String,
    },
}

/// What an answer may contain.
#[derive(Clone, Debug, Default)]
pub struct ReaderOptions {
    /// The prompt opened the reasoning already
    pub in_reasoning: bool,
    /// `tool name -> JSON schema of its arguments`; none at all: calls are text
    pub tools: Map<String, Value>,
    /// Calls after the first are left out
    pub one_call: bool,
}

/// Reads one answer.
pub struct Reader {
    options: ReaderOptions,
    state: State,
    /// Text that is not certain yet
    held: String,
    calls: usize,
    /// Whether some reasoning was given out
    reasoned: bool,
    /// White space before a tag, which is text only if the tag is
    space: String,
    parts: Vec<Part>,
}

enum State {
    /// Nothing but white space yet
    Start,
    Reasoning,
    Text,
    /// After `<tool_call>`, which form it is not known
    Opened,
    /// An object that may be a call without an opening tag
    Bare,
    Hermes(Hermes),
    Xml(Xml),
    /// A call is complete; its closing tag may follow
    Closing,
}

/// Whether a step can go on with what is there.
enum Step {
    Again,
    NeedsMore,
}

impl Reader {
    pub fn new(options: ReaderOptions) -> Self {
        Reader {
            state: match options.in_reasoning {
                true => State::Reasoning,
                false => State::Start,
            },
            options,
            held: String::new(),
            calls: 0,
            reasoned: false,
            space: String::new(),
            parts: Vec::new(),
        }
    }

    /// Takes the next piece of the answer; returns what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        while !self.held.is_empty() && matches!(self.step(), Step::Again) {}
        self.take_parts()
    }

    /// Ends the answer. `complete`: the model ended it, nothing cut it off; a call that only lacks
    /// its end is then a whole one.
    pub fn finish(&mut self, complete: bool) -> Vec<Part> {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start if !self.reasoned => self.emit_held(),
            State::Start | State::Closing => self.held.clear(),
            State::Reasoning => {
                let rest = std::mem::take(&mut self.held);
                self.emit_reasoning(rest);
            }
            State::Text | State::Bare => self.emit_held(),
            State::Opened => {
                self.not_a_call();
                self.emit_held();
            }
            State::Hermes(mut hermes) => match hermes.finish(&mut self.held, complete) {
                Some(parts) => self.emit_call(parts),
                None => {
                    self.not_a_call();
                    self.emit_held();
                }
            },
            State::Xml(mut xml) => {
                let parts = xml.finish(&self.held, complete);
                self.emit_call(parts);
                self.held.clear();
            }
        }
        self.take_parts()
    }

    /// Calls so far, those that are left out not counted.
    pub fn calls(&self) -> usize {
        match self.options.one_call {
            true => self.calls.min(1),
            false => self.calls,
        }
    }

    fn step(&mut self) -> Step {
        match &mut self.state {
            State::Start => self.start(),
            State::Reasoning => self.reasoning(),
            State::Text => self.text(),
            State::Opened => self.opened(),
            State::Bare => self.bare(),
            State::Hermes(_) | State::Xml(_) => self.call(),
            State::Closing => self.closing(),
        }
    }

    fn start(&mut self) -> Step {
        let trimmed = self.held.trim_start();
        let has_tools = !self.options.tools.is_empty();
        if trimmed.is_empty() || (THINK.starts_with(trimmed) && trimmed.len() < THINK.len()) {
            return Step::NeedsMore;
        }
        if let Some(rest) = trimmed.strip_prefix(THINK) {
            self.held = rest.to_owned();
            self.state = State::Reasoning;
        } else if has_tools && trimmed.starts_with('{') {
            self.state = State::Bare;
        } else {
            if self.reasoned {
                self.held = trimmed.to_owned();
            }
            self.state = State::Text;
        }
        Step::Again
    }

    fn reasoning(&mut self) -> Step {
        if let Some(at) = self.held.find(THINK_END) {
            let rest = self.held.split_off(at + THINK_END.len());
            let mut reasoning = std::mem::replace(&mut self.held, rest);
            reasoning.truncate(at);
            self.emit_reasoning(reasoning.trim_end().to_owned());
            self.held = self.held.trim_start().to_owned();
            self.state = State::Start;
            return Step::Again;
        }
        let certain = certain_len(&self.held, &[THINK_END]);
        let rest = self.held.split_off(certain);
        let reasoning = std::mem::replace(&mut self.held, rest);
        self.emit_reasoning(reasoning);
        Step::NeedsMore
    }

    fn emit_reasoning(&mut self, text: String) {
        // The newline after `<think>` is no thought.
        let text = match self.reasoned {
            true => text,
            false => text.trim_start_matches('\n').to_owned(),
        };
        if !text.is_empty() {
            self.reasoned = true;
            self.parts.push(Part::Reasoning(text));
        }
    }

    fn text(&mut self) -> Step {
        if self.options.tools.is_empty() {
            self.emit_held();
            return Step::NeedsMore;
        }
        let found = [CALL, FUNCTION].map(|tag| self.held.find(tag));
        let Some(at) = found.into_iter().flatten().min() else {
            let certain = certain_len(&self.held, &[CALL, FUNCTION]);
            let rest = self.held.split_off(certain);
            let text = std::mem::replace(&mut self.held, rest);
            self.emit_text(text);
            return Step::NeedsMore;
        };
        let rest = self.held.split_off(at);
        let before = std::mem::replace(&mut self.held, rest);
        if !before.is_empty() {
            let text = before.trim_end();
            self.space = before[text.len()..].to_owned();
            self.emit_text(text.to_owned());
        }
        if self.held.starts_with(CALL) {
            self.held.drain(..CALL.len());
            self.state = State::Opened;
            return Step::Again;
        }
        // Without an opening tag only a known function is a call.
        let Some(end) = self.held.find('>') else {
            let name = &self.held[FUNCTION.len()..];
            return match self
                .options
                .tools
                .keys()
                .any(|known| known.starts_with(name))
            {
                true => Step::NeedsMore,
                false => self.pass_tag(),
            };
        };
        match self
            .options
            .tools
            .contains_key(&self.held[FUNCTION.len()..end])
        {
            true => {
                self.state = State::Xml(Xml::default());
                Step::Again
            }
            false => self.pass_tag(),
        }
    }

    /// A tag that begins no call is text.
    fn pass_tag(&mut self) -> Step {
        let rest = self.held.split_off(FUNCTION.len());
        let tag = std::mem::replace(&mut self.held, rest);
        let space = std::mem::take(&mut self.space);
        self.emit_text(space + &tag);
        Step::Again
    }

    fn opened(&mut self) -> Step {
        let trimmed = self.held.trim_start();
        if trimmed.is_empty() || (FUNCTION.starts_with(trimmed) && trimmed.len() < FUNCTION.len()) {
            return Step::NeedsMore;
        }
        if trimmed.starts_with(FUNCTION) {
            self.held = trimmed.to_owned();
            self.state = State::Xml(Xml::default());
        } else if trimmed.starts_with('{') {
            self.held = trimmed.to_owned();
            self.state = State::Hermes(Hermes::default());
        } else {
            self.not_a_call();
        }
        Step::Again
    }

    /// An object at the beginning is a call if it names a tool.
    fn bare(&mut self) -> Step {
        self.held = self.held.trim_start().to_owned();
        match hermes::head(&self.held) {
            hermes::Head::Incomplete => return Step::NeedsMore,
            hermes::Head::Found { name, .. } if self.options.tools.contains_key(&name) => {
                self.state = State::Hermes(Hermes::default());
            }
            _ => self.state = State::Text,
        }
        Step::Again
    }

    fn call(&mut self) -> Step {
        let mut parts = Vec::new();
        let progress = match &mut self.state {
            State::Hermes(hermes) => hermes.read(&mut self.held, &mut parts),
            State::Xml(xml) => xml.read(&mut self.held, &self.options.tools, &mut parts),
            _ => unreachable!("only calls are read here"),
        };
        self.emit_call(parts);
        match progress {
            Progress::NeedsMore => Step::NeedsMore,
            Progress::Complete => {
                self.state = State::Closing;
                Step::Again
            }
            Progress::NoCall => {
                self.not_a_call();
                Step::Again
            }
        }
    }

    fn closing(&mut self) -> Step {
        let trimmed = self.held.trim_start();
        if trimmed.is_empty() || (CALL_END.starts_with(trimmed) && trimmed.len() < CALL_END.len()) {
            return Step::NeedsMore;
        }
        match trimmed.strip_prefix(CALL_END) {
            Some(rest) => {
                // White space after a call is no text.
                self.held = rest.trim_start().to_owned();
                if self.held.is_empty() {
                    // More of it may follow; another closing tag is none of anything.
                    return Step::NeedsMore;
                }
            }
            None => {
                self.held = trimmed.to_owned();
                self.state = State::Text;
            }
        }
        Step::Again
    }

    /// What was read as a call is text after all.
    fn not_a_call(&mut self) {
        let space = std::mem::take(&mut self.space);
        self.emit_text(space + CALL);
        self.state = State::Text;
    }

    fn emit_held(&mut self) {
        let text = std::mem::take(&mut self.held);
        self.emit_text(text);
    }

    fn emit_text(&mut self, text: String) {
        if !text.is_empty() {
            self.parts.push(Part::Text(text));
        }
    }

    fn emit_call(&mut self, parts: Vec<CallPart>) {
        if !parts.is_empty() {
            self.space.clear();
        }
        for part in parts {
            let part = match part {
                CallPart::Name(name) => {
                    self.calls += 1;
                    let index = self.calls - 1;
                    Part::Call { index, name }
                }
                CallPart::Arguments(json) => Part::Arguments {
                    index: self.calls - 1,
                    json,
                },
            };
            if !(self.options.one_call && self.calls > 1) {
                self.parts.push(part);
            }
        }
    }

    fn take_parts(&mut self) -> Vec<Part> {
        let mut joined: Vec<Part> = Vec::new();
        for part in self.parts.drain(..) {
            match (joined.last_mut(), part) {
                (Some(Part::Text(last)), Part::Text(text)) => last.push_str(&text),
                (Some(Part::Reasoning(last)), Part::Reasoning(text)) => last.push_str(&text),
                (
                    Some(Part::Arguments { index: last, json }),
                    Part::Arguments { index, json: more },
                ) if *last == index => json.push_str(&more),
                (_, part) => joined.push(part),
            }
        }
        joined
    }
}

/// A piece of the call that is being read.
enum CallPart {
    Name(String),
    Arguments(String),
}

enum Progress {
    NeedsMore,
    Complete,
    /// It cannot be a call; nothing of it was given out
    NoCall,
}

/// How much of the beginning of `text` precedes white space and any beginning of `tags` at its end.
fn certain_len(text: &str, tags: &[&str]) -> usize {
    let beginnings = tags
        .iter()
        .flat_map(|tag| (1..tag.len()).map(move |n| &tag[..n]));
    let partial = beginnings
        .filter(|beginning| text.ends_with(beginning))
        .map(str::len);
    let without_tag = text.len() - partial.max().unwrap_or(0);
    text[..without_tag].trim_end().len()
}

#[cfg(test)]
mod tests;
