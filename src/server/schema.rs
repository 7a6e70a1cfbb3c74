//! Grammars that answers must follow, by llguidance on the model's own vocabulary.
//!
//! What cannot be enforced is refused when the request comes, or fails it; it is never loosened.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::prompt::{CallFormat, Tool};
use crate::engine::TextModel;
use crate::engine::service::Constraint;

/// Bytes of a schema or pattern as it is written.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Objects and lists within each other.
const MAX_DEPTH: usize = 64;

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

/// What an answer must be.
#[derive(Clone, Debug)]
pub enum Form {
    /// Any JSON object
    JsonObject,
    JsonSchema(Value),
    Regex(String),
    /// A call of one of these, and nothing else
    Call(Vec<Tool>, CallFormat),
    /// Text, and calls of these whose arguments follow their schemas
    TextOrCalls(Vec<Tool>, CallFormat),
}

impl Grammars {
    /// `vocab_size`: of the model's logits, which may be more than the tokenizer has.
    ///
    /// # Errors
    /// If the tokenizer has no vocabulary that grammars can be checked with.
    pub fn new(text: &TextModel, vocab_size: usize) -> anyhow::Result<Self> {
        let tokenizer = &text.tokenizer;
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| match tokenizer.is_special(id) {
                // A special token is no text: its bytes alone must not allow it.
                true => {
                    let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                    marked.extend(tokenizer.token_bytes(id).unwrap_or_default());
                    marked
                }
                false => tokenizer.token_bytes(id).unwrap_or_default(),
            })
            .collect();
        let eos = &text.generation_config()?.eos_token_ids;
        let first = eos.first().copied().unwrap_or(0);
        let mut trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, first), &words);
        if eos.len() > 1 {
            trie = trie.with_eos_tokens(eos);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[])?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 50_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Grammars { factory })
    }

    /// Compiles `form`; takes up to a second, so not on a thread that others wait for.
    ///
    /// # Errors
    /// 400 if it cannot be enforced; `param` is the field that is to blame.
    pub fn compile(&self, form: &Form, param: &str) -> ApiResult<Grammar> {
        let refuse = |reason: String| {
            ApiError::invalid(param, format!("{param}: cannot be enforced: {reason}"))
        };
        let grammar = match form {
            Form::JsonObject => {
                TopLevelGrammar::from_json_schema(compact(&json!({ "type": "object" })))
            }
            Form::JsonSchema(schema) => {
                check_schema(schema).map_err(refuse)?;
                TopLevelGrammar::from_json_schema(compact(schema))
            }
            Form::Regex(pattern) => {
                if pattern.len() > MAX_SOURCE_BYTES {
                    return Err(refuse("the pattern is too long".into()));
                }
                TopLevelGrammar::from_regex(pattern)
            }
            Form::Call(tools, format) => {
                TopLevelGrammar::from_lark(calls(tools, *format, false).map_err(refuse)?)
            }
            Form::TextOrCalls(tools, format) => {
                TopLevelGrammar::from_lark(calls(tools, *format, true).map_err(refuse)?)
            }
        };
        // Errors of a grammar may quote all of it.
        let short = |error: String| error.chars().take(300).collect::<String>();
        let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.factory.create_parser(grammar)
        }));
        let parser = match parser {
            Ok(Ok(parser)) => parser,
            Ok(Err(error)) => return Err(refuse(short(error.to_string()))),
            Err(_) => return Err(refuse("its compiler failed".into())),
        };
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(refuse(short(error)));
        }
        let warnings = matcher.grammar_warnings();
        if !warnings.is_empty() {
            return Err(refuse(short(warnings.join("; "))));
        }
        // A grammar that allows nothing is found out now, not after the prompt.
        matcher
            .compute_mask_or_eos()
            .map_err(|error| refuse(short(error.to_string())))?;
        Ok(Grammar { matcher })
    }
}

fn check_schema(schema: &Value) -> Result<(), String> {
    fn depth(value: &Value) -> usize {
        let inner = match value {
            Value::Array(items) => items.iter().map(depth).max(),
            Value::Object(map) => map.values().map(depth).max(),
            _ => return 0,
        };
        1 + inner.unwrap_or(0)
    }
    if !(schema.is_object() || schema.is_boolean()) {
        return Err("a schema is an object".into());
    }
    if depth(schema) > MAX_DEPTH {
        return Err(format!("it is nested more than {MAX_DEPTH} deep"));
    }
    if schema.to_string().len() > MAX_SOURCE_BYTES {
        return Err(format!("it has more than {MAX_SOURCE_BYTES} bytes"));
    }
    Ok(())
}

/// Leaves one way to put white space: a model that may write any of it can go on for ever.
fn compact(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(map) = schema.as_object_mut() {
        let layout = json!({
            "whitespace_flexible": false, "key_separator": ": ", "item_separator": ", ",
        });
        map.insert("x-guidance".into(), layout);
    }
    schema
}

/// Arguments are those that a function has, unless its schema says that there may be others.
fn closed(parameters: &Value) -> Value {
    let mut parameters = parameters.clone();
    if let Some(map) = parameters.as_object_mut()
        && map.contains_key("properties")
        && !map.contains_key("additionalProperties")
        // Keywords that combine schemas have properties of their own.
        && !["allOf", "anyOf", "oneOf", "$ref"].iter().any(|key| map.contains_key(*key))
    {
        map.insert("additionalProperties".into(), false.into());
    }
    parameters
}

/// A grammar of calls in Lark's syntax.
fn calls(tools: &[Tool], format: CallFormat, with_text: bool) -> Result<String, String> {
    let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    let start = match with_text {
        // A call begins wherever its tag is written: text never contains it.
        true => {
            "start: text? (any_call text?)*\ntext: TEXT\n\
                 TEXT: /(?s:.+)/ & ~/(?s:.*)<tool_call>(?s:.*)/\n"
        }
        false => "start: any_call\n",
    };
    let mut lark = format!("{start}any_call: {}\n", names.join(" | "));
    for (tool, name) in tools.iter().zip(&names) {
        check_schema(&tool.parameters)?;
        let body = match format {
            CallFormat::Hermes => {
                let head = format!(
                    "<tool_call>\n{{\"name\": {}, \"arguments\": ",
                    json!(tool.name)
                );
                format!(
                    "{} %json {} {}",
                    json!(head),
                    compact(&closed(&tool.parameters)),
                    json!("}\n</tool_call>")
                )
            }
            CallFormat::Xml => xml_call(tool),
        };
        lark.push_str(&format!("{name}: {body}\n"));
    }
    if format == CallFormat::Xml {
        lark.push_str("value_text: VALUE\nVALUE: /(?s:.*)/ & ~/(?s:.*)<\\/parameter>(?s:.*)/\n");
    }
    Ok(lark)
}

/// Parameters in the schema's order: required ones, and others that may be left out.
fn xml_call(tool: &Tool) -> String {
    let head = format!("<tool_call>\n<function={}>\n", tool.name);
    let mut body = json!(head).to_string();
    let empty = serde_json::Map::new();
    let properties = tool.parameters["properties"].as_object().unwrap_or(&empty);
    let required = tool.parameters["required"].as_array();
    for (key, schema) in properties {
        let opening = json!(format!("<parameter={key}>\n"));
        let closing = json!("\n</parameter>\n");
        let is_text = schema["type"] == "string" && schema.get("enum").is_none();
        let value = match is_text {
            true => "value_text".to_owned(),
            false => format!("%json {}", compact(schema)),
        };
        let parameter = format!("{opening} {value} {closing}");
        let needed = required.is_some_and(|keys| keys.iter().any(|k| k == key));
        match needed {
            true => body.push_str(&format!(" {parameter}")),
            false => body.push_str(&format!(" ({parameter})?")),
        }
    }
    body + " " + &json!("</function>\n</tool_call>").to_string()
}

/// A compiled grammar at the beginning of an answer, or within one.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
}

impl Constraint for Grammar {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = (self.matcher.compute_mask_or_eos()).map_err(|e| e.to_string())?;
        for (id, logit) in (0..).zip(logits) {
            if !mask.is_allowed(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        if self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|e| e.to_string())
    }
}
