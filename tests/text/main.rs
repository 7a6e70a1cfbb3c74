//! Text in and out: tokenizer, chat templates, sampling and streaming, against transformers.

mod chat;
mod configs;
mod hf_rules;
mod jinja;
mod sampling;
mod streaming;
mod tokenization;

use std::path::{Path, PathBuf};

use moectl::model::Tokenizer;
use serde_json::Value;

const GOLDEN_MODELS: [&str; 3] = ["tiny-a", "tiny-b", "tiny-c"];

fn in_project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> Vec<u8> {
    let path = in_project(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The tokenizer in folder `model` of the project.
fn tokenizer(model: &str) -> Tokenizer {
    Tokenizer::from_bytes(
        &read(&format!("{model}/tokenizer.json")),
        Some(&read(&format!("{model}/tokenizer_config.json"))),
    )
    .unwrap()
}

fn golden_model(name: &str) -> String {
    format!("tests/data/goldens/{name}/nf4")
}

/// `tokenizer` of a golden manifest: encode cases and rendered conversations.
fn golden_text(name: &str) -> Value {
    json(&format!("tests/data/goldens/{name}/golden/manifest.json"))["tokenizer"].take()
}
