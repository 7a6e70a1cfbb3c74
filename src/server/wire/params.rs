//! What chat and completions have in common: sampling, lengths, stops, formats.

use serde_json::{Map, Value};

use crate::engine::sampler::SamplingParams;
use crate::server::App;
use crate::server::error::{ApiError, ApiResult};
use crate::server::fields::Fields;
use crate::server::schema::Form;

/// Bounds on what one request may ask for.
const MAX_N: i64 = 16;
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 4096;
const MAX_BIASES: usize = 4096;
pub const MAX_LOGPROBS: i64 = 20;
const MAX_MODEL_NAME: usize = 256;

/// Settings of a request.
#[derive(Clone, Debug)]
pub struct Params {
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    pub n: usize,
    pub max_tokens: Option<usize>,
    pub sampling: SamplingParams,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub logit_bias: Vec<(u32, f32)>,
    pub return_token_ids: bool,
    /// The request wants its own routing summary
    pub routing: bool,
}

impl Params {
    /// # Errors
    /// 400 for the first field that cannot be taken.
    pub fn read(app: &App, fields: Fields<'_>) -> ApiResult<Self> {
        let defaults = SamplingParams::from(&app.text.generation_config);
        let own = fields.object("moectl")?;
        let own = own.map(|map| Fields::within(map, "moectl"));
        let stream_options = fields.object("stream_options")?;
        let usage = stream_options
            .map(|map| Fields::within(map, "stream_options").bool("include_usage"))
            .transpose()?
            .flatten();
        let params = Params {
            model: model(app, fields)?,
            stream: fields.bool("stream")?.unwrap_or(false),
            include_usage: usage.unwrap_or(false),
            n: fields.integer("n", 1..=MAX_N)?.unwrap_or(1) as usize,
            max_tokens: max_tokens(fields)?,
            sampling: sampling(fields, defaults)?,
            stop: stop(fields, "stop")?,
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            logit_bias: logit_bias(app, fields)?,
            return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
            routing: own.map(|own| own.bool("routing")).transpose()?.flatten() == Some(true),
        };
        if let Some(best_of) = fields.integer("best_of", 0..=i64::MAX)?
            && best_of > params.n as i64
        {
            return Err(fields.wrong("best_of", "no more than n: answers are not rated"));
        }
        for field in ["grammar", "guided_grammar", "chat_template"] {
            if fields.get(field).is_some_and(|value| value != "") {
                return Err(ApiError::invalid(
                    field,
                    format!("{field}: is not supported"),
                ));
            }
        }
        Ok(params)
    }
}

/// The model's name as the request has it.
pub fn model(app: &App, fields: Fields<'_>) -> ApiResult<String> {
    let own = &app.options.model_name;
    let name = fields.text("model")?.filter(|name| !name.is_empty());
    match name {
        None => Ok(own.clone()),
        Some(name) if name.len() > MAX_MODEL_NAME => {
            Err(fields.wrong("model", format!("at most {MAX_MODEL_NAME} bytes")))
        }
        Some(name) if app.options.strict_model && name != own => {
            let mut error = fields.wrong("model", format!("`{own}`, the model served here"));
            error.status = axum::http::StatusCode::NOT_FOUND;
            error.code = Some("model_not_found");
            Err(error)
        }
        Some(name) => Ok(name.to_owned()),
    }
}

/// -1 is no bound, as in llama-server.
fn max_tokens(fields: Fields<'_>) -> ApiResult<Option<usize>> {
    for field in ["max_completion_tokens", "max_tokens", "n_predict"] {
        match fields.integer(field, -1..=i64::MAX)? {
            None => {}
            Some(-1) => return Ok(None),
            Some(number) => return Ok(Some(number as usize)),
        }
    }
    Ok(None)
}

pub fn sampling(fields: Fields<'_>, defaults: SamplingParams) -> ApiResult<SamplingParams> {
    let repetition_penalty = match fields.number("repetition_penalty", 1e-3..=1e3)? {
        None => fields.number("repeat_penalty", 1e-3..=1e3)?,
        some => some,
    };
    let seed = match fields.get("seed").and_then(Value::as_u64) {
        Some(seed) => Some(seed),
        None => match fields.integer("seed", i64::MIN..=i64::MAX)? {
            None | Some(-1) => None,
            Some(seed) => Some(seed as u64),
        },
    };
    Ok(SamplingParams {
        temperature: fields
            .number("temperature", 0.0..=100.0)?
            .unwrap_or(defaults.temperature),
        // -1 and 0 are off.
        top_k: (fields.integer("top_k", -1..=i64::MAX)?)
            .map_or(defaults.top_k, |k| k.max(0) as usize),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(defaults.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: (fields.number("presence_penalty", -100.0..=100.0)?)
            .unwrap_or(defaults.presence_penalty),
        frequency_penalty: (fields.number("frequency_penalty", -100.0..=100.0)?)
            .unwrap_or(defaults.frequency_penalty),
        seed: match seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|e| ApiError::internal(e.to_string()))?,
        },
    })
}

/// A string, or a list of them.
pub fn stop(fields: Fields<'_>, field: &str) -> ApiResult<Vec<String>> {
    let expected = || format!("a string or a list of at most {MAX_STOPS} strings");
    let stops: Vec<String> = match fields.get(field) {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) if items.len() <= MAX_STOPS => {
            let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
            let texts: Option<Vec<String>> = texts.collect();
            texts.ok_or_else(|| fields.wrong(field, expected()))?
        }
        Some(_) => return Err(fields.wrong(field, expected())),
    };
    if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        return Err(fields.wrong(field, format!("strings of at most {MAX_STOP_BYTES} bytes")));
    }
    Ok(stops)
}

fn logit_bias(app: &App, fields: Fields<'_>) -> ApiResult<Vec<(u32, f32)>> {
    let Some(map) = fields.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    if map.len() > MAX_BIASES {
        return Err(fields.wrong("logit_bias", format!("at most {MAX_BIASES} tokens")));
    }
    let vocab_size = app.facts()?.vocab_size;
    let within = Fields::within(map, "logit_bias");
    let mut biases = Vec::new();
    for key in map.keys() {
        let id: Option<u32> = key.parse().ok().filter(|&id| (id as usize) < vocab_size);
        let id = id.ok_or_else(|| {
            let message = format!(
                "logit_bias: `{key}` is no token id, expected 0 to {}",
                vocab_size - 1
            );
            ApiError::invalid("logit_bias", message)
        })?;
        let bias = within.number(key, -100.0..=100.0)?;
        biases.extend(bias.map(|bias| (id, bias)));
    }
    Ok(biases)
}

/// The form that an answer must have, under all the names that servers gave this, and its field.
pub fn form(fields: Fields<'_>) -> ApiResult<Option<(Form, &'static str)>> {
    if let Some(format) = fields.object("response_format")? {
        let form = response_format(Fields::within(format, "response_format"))?;
        return Ok(form.map(|form| (form, "response_format")));
    }
    if let Some(outputs) = fields.object("structured_outputs")? {
        let outputs = Fields::within(outputs, "structured_outputs");
        let form = guided(outputs, "json", "regex", "choice")?;
        if form.is_none() && !outputs.map().is_empty() {
            return Err(fields.wrong("structured_outputs", "json, regex or choice"));
        }
        return Ok(form.map(|form| (form, "structured_outputs")));
    }
    if let Some(schema) = fields.object("json_schema")? {
        return Ok(Some((
            Form::JsonSchema(schema.clone().into()),
            "json_schema",
        )));
    }
    let form = guided(fields, "guided_json", "guided_regex", "guided_choice")?;
    Ok(form.map(|form| (form, "guided_json")))
}

/// `text`, `json_object`, `json_schema`, or `regex`.
pub fn response_format(format: Fields<'_>) -> ApiResult<Option<Form>> {
    let kinds = "text, json_object, json_schema or regex";
    Ok(match format.text("type")? {
        Some("text") => None,
        Some("json_object") => Some(match format.object("schema")? {
            // llama-server's way to give one.
            Some(schema) => Form::JsonSchema(schema.clone().into()),
            None => Form::JsonObject,
        }),
        Some("json_schema") => {
            // The Responses API has the schema one level up.
            let inner = format.object("json_schema")?.unwrap_or(format.map());
            let inner = Fields::within(inner, "response_format.json_schema");
            match inner.get("schema") {
                Some(schema) => Some(Form::JsonSchema(schema.clone())),
                None if inner.bool("strict")? == Some(true) => {
                    return Err(inner.wrong("schema", "a JSON schema"));
                }
                None => Some(Form::JsonObject),
            }
        }
        Some("regex") => {
            let pattern = match format.text("pattern")? {
                None => format.text("regex")?,
                some => some,
            };
            let pattern = pattern.ok_or_else(|| format.wrong("pattern", "a regular expression"))?;
            Some(Form::Regex(pattern.to_owned()))
        }
        _ => return Err(format.wrong("type", kinds)),
    })
}

fn guided(fields: Fields<'_>, json: &str, regex: &str, choice: &str) -> ApiResult<Option<Form>> {
    if let Some(schema) = fields.get(json) {
        // Some send the schema as text.
        let parsed = schema.as_str().map(serde_json::from_str::<Value>);
        return match parsed {
            None => Ok(Some(Form::JsonSchema(schema.clone()))),
            Some(Ok(schema)) => Ok(Some(Form::JsonSchema(schema))),
            Some(Err(_)) => Err(fields.wrong(json, "a JSON schema")),
        };
    }
    if let Some(pattern) = fields.text(regex)? {
        return Ok(Some(Form::Regex(pattern.to_owned())));
    }
    let Some(choices) = fields.list(choice)? else {
        return Ok(None);
    };
    if choices.is_empty() || !choices.iter().all(Value::is_string) {
        return Err(fields.wrong(choice, "a list of strings"));
    }
    let escaped: Vec<String> = choices
        .iter()
        .filter_map(Value::as_str)
        .map(escape_pattern)
        .collect();
    Ok(Some(Form::Regex(format!("({})", escaped.join("|")))))
}

/// A pattern that matches `text` only.
fn escape_pattern(text: &str) -> String {
    let mut pattern = String::new();
    for character in text.chars() {
        if character.is_ascii_punctuation() {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// Template variables that a request may set: no others reach the template.
pub fn template_variables(fields: Fields<'_>) -> ApiResult<Map<String, Value>> {
    let mut variables = Map::new();
    if let Some(effort) = fields.text("reasoning_effort")? {
        variables.insert("reasoning_effort".into(), effort.into());
        if effort == "none" {
            variables.insert("enable_thinking".into(), false.into());
        }
    }
    let Some(kwargs) = fields.object("chat_template_kwargs")? else {
        return Ok(variables);
    };
    let kwargs = Fields::within(kwargs, "chat_template_kwargs");
    for name in kwargs.map().keys() {
        let value: Value = match name.as_str() {
            "enable_thinking" | "thinking" | "preserve_thinking" => kwargs.bool(name)?.into(),
            "reasoning_effort" => kwargs.text(name)?.into(),
            _ => {
                return Err(
                    kwargs.wrong(name, "enable_thinking, thinking or reasoning_effort only")
                );
            }
        };
        variables.insert(name.clone(), value);
    }
    Ok(variables)
}
