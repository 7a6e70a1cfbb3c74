//! Renders templates and encodes texts for `scripts/compare_text.py`: a JSON object per line in, one
//! per line out.
//!
//! - `{"template", "config", "messages", "tools", "documents", "variables", "add_generation_prompt"}`
//!   gives `{"text"}` or `{"error"}`
//! - `{"tokenizer", "texts"}`, the first a folder with the files of a tokenizer, gives
//!   `{"ids", "decoded"}`, each a list with one entry a text, or `{"error"}`

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, Result};
use moectl::model::{ChatTemplate, TemplateInputs, Tokenizer, TokenizerFiles};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = match request.get("template") {
            Some(_) => render(&request).map(|text| json!({ "text": text })),
            None => encode(&request),
        };
        let answer = answer.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn render(request: &Value) -> Result<String> {
    let source = request["template"].as_str().context("template: no text")?;
    let config = request.get("config").map(Value::to_string);
    let template = ChatTemplate::from_bytes(
        config.as_deref().map(str::as_bytes),
        Some(source.as_bytes()),
    )?
    .context("no template")?;
    let given = |name: &str| request.get(name).filter(|value| !value.is_null());
    let none = Vec::new();
    let messages = given("messages").and_then(Value::as_array);
    let inputs = TemplateInputs {
        tools: given("tools"),
        documents: given("documents"),
        variables: given("variables").and_then(Value::as_object),
        add_generation_prompt: request["add_generation_prompt"] == true,
    };
    Ok(template.render_with(messages.unwrap_or(&none), &inputs)?)
}

fn encode(request: &Value) -> Result<Value> {
    let folder = request["tokenizer"].as_str();
    let folder = Path::new(folder.context("neither template nor tokenizer")?);
    let tokenizer = std::fs::read(folder.join("tokenizer.json"))?;
    let files = TokenizerFiles::read(&tokenizer, |file| Ok(std::fs::read(folder.join(file)).ok()))?;
    let tokenizer = Tokenizer::from_bytes(&tokenizer, files.config.as_deref())?;
    let texts = request["texts"].as_array().context("texts: no list")?;
    let (mut ids, mut decoded) = (Vec::new(), Vec::new());
    for text in texts {
        match tokenizer.encode_document(text.as_str().context("texts: not a text")?) {
            Ok(found) => {
                decoded.push(tokenizer.decode(&found, true)?.into());
                ids.push(found.into());
            }
            Err(error) => {
                decoded.push(Value::Null);
                ids.push(Value::from(error.to_string()));
            }
        }
    }
    Ok(json!({ "ids": ids, "decoded": decoded }))
}
