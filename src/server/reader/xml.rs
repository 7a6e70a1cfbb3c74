//! Calls written as `<function=NAME><parameter=KEY>VALUE</parameter></function>`.

use serde_json::{Map, Value};

use super::{CallPart, FUNCTION, Progress};

const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
const FUNCTION_END: &str = "</function>";

/// The call that is being read.
#[derive(Default)]
pub struct Xml {
    state: State,
    /// JSON schema of the arguments
    schema: Value,
    parameters: usize,
}

#[derive(Default)]
enum State {
    #[default]
    Name,
    Between,
    Value {
        key: String,
    },
}

impl Xml {
    /// Takes from `held` what can be understood.
    pub fn read(
        &mut self,
        held: &mut String,
        tools: &Map<String, Value>,
        parts: &mut Vec<CallPart>,
    ) -> Progress {
        loop {
            match &self.state {
                State::Name => {
                    let Some(end) = held.find('>') else {
                        return Progress::NeedsMore;
                    };
                    let name = held[FUNCTION.len()..end].trim().to_owned();
                    held.drain(..=end);
                    self.schema = tools.get(&name).cloned().unwrap_or_default();
                    parts.push(CallPart::Name(name));
                    self.state = State::Between;
                }
                State::Between => {
                    *held = held.trim_start().to_owned();
                    if let Some(rest) = held.strip_prefix(FUNCTION_END) {
                        *held = rest.to_owned();
                        parts.push(CallPart::Arguments(self.end()));
                        return Progress::Complete;
                    }
                    if held.starts_with(PARAMETER) {
                        let Some(end) = held.find('>') else {
                            return Progress::NeedsMore;
                        };
                        let key = held[PARAMETER.len()..end].trim().to_owned();
                        held.drain(..=end);
                        self.state = State::Value { key };
                        continue;
                    }
                    let tags = [FUNCTION_END, PARAMETER];
                    if tags.iter().any(|tag| tag.starts_with(held.as_str())) {
                        return Progress::NeedsMore;
                    }
                    // Something else: the call ends without its tag.
                    parts.push(CallPart::Arguments(self.end()));
                    return Progress::Complete;
                }
                State::Value { key } => {
                    let Some(end) = held.find(PARAMETER_END) else {
                        return Progress::NeedsMore;
                    };
                    let json = self.argument(key, &held[..end]);
                    held.drain(..end + PARAMETER_END.len());
                    self.parameters += 1;
                    self.state = State::Between;
                    parts.push(CallPart::Arguments(json));
                }
            }
        }
    }

    /// The answer ends. A call that was cut off stays incomplete: half a file must not look whole.
    pub fn finish(&mut self, held: &str, complete: bool) -> Vec<CallPart> {
        let json = match &self.state {
            State::Between if complete => self.end(),
            State::Value { key } if complete => {
                let argument = self.argument(key, held);
                self.parameters += 1;
                argument + &self.end()
            }
            _ => return Vec::new(),
        };
        vec![CallPart::Arguments(json)]
    }

    fn end(&self) -> String {
        match self.parameters {
            0 => "{}".into(),
            _ => "}".into(),
        }
    }

    /// The next key and value of the arguments' object.
    fn argument(&self, key: &str, text: &str) -> String {
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let value = self.value(key, text);
        let opening = match self.parameters {
            0 => "{",
            _ => ", ",
        };
        format!("{opening}{}: {value}", Value::from(key))
    }

    /// Text is text where the schema says so; elsewhere it is JSON if it can be.
    fn value(&self, key: &str, text: &str) -> Value {
        let schema = self.schema.get("properties").and_then(|p| p.get(key));
        let kind = schema.and_then(|schema| schema.get("type"));
        if kind.and_then(Value::as_str) == Some("string") {
            return text.into();
        }
        // Python's words for these.
        match text.trim() {
            "None" => return Value::Null,
            "True" => return true.into(),
            "False" => return false.into(),
            _ => {}
        }
        serde_json::from_str(text.trim()).unwrap_or_else(|_| text.into())
    }
}
