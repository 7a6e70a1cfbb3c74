//! Files and tensors of a checkpoint in groups, each with what becomes of it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::formats::{Checkpoint, checkpoint};
use crate::model::{ModelConfig, Source};
use crate::planning::units::show_bytes;

/// A file, and what it is read for or why it is not.
#[derive(Debug, Serialize)]
pub struct FileLine {
    pub name: String,
    pub bytes: u64,
    pub read: bool,
    pub why: String,
}

impl FileLine {
    pub fn cells(&self) -> [String; 4] {
        let read = if self.read { "read" } else { "ignored" };
        [
            self.name.clone(),
            show_bytes(self.bytes),
            read.into(),
            self.why.clone(),
        ]
    }
}

/// Tensors of one role: as many as layers and experts have it.
#[derive(Debug, Serialize)]
pub struct TensorLine {
    pub role: String,
    pub tensors: usize,
    pub bytes: u64,
    /// How they are stored; why they are ignored
    pub how: String,
}

impl TensorLine {
    pub fn cells(&self) -> [String; 4] {
        [
            self.role.clone(),
            self.tensors.to_string(),
            show_bytes(self.bytes),
            self.how.clone(),
        ]
    }
}

/// Rows with their cells below each other, numbers in the middle to the right.
pub fn columns(rows: Vec<[String; 4]>) -> Vec<String> {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths = [width(0), width(1), width(2)];
    let line = |[a, b, c, d]: &[String; 4]| {
        let [wa, wb, wc] = widths;
        format!("  {a:<wa$}  {b:>wb$}  {c:>wc$}  {d}")
            .trim_end()
            .to_owned()
    };
    rows.iter().map(line).collect()
}

/// The parts of an NF4 weight beside its codes.
const PARTS: [&str; 5] = [
    ".absmax",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".quant_state.bitsandbytes__nf4",
];

/// What was taken out of `checkpoint` by role, and what was not by reason.
pub fn tensors(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> (Vec<TensorLine>, Vec<TensorLine>) {
    let mut loaded: BTreeMap<(String, String), (usize, u64)> = BTreeMap::new();
    let mut ignored: BTreeMap<(String, String), (usize, u64)> = BTreeMap::new();
    for (name, dtype, _, bytes, viewed) in checkpoint.inventory() {
        let whole = PARTS.iter().find_map(|part| name.strip_suffix(part));
        let weight = whole.unwrap_or(name);
        // The code book of NF4 is read by nobody: it is always the same. It counts with its weight.
        let is_part = whole.is_some_and(|weight| checkpoint.contains(weight));
        let state = checkpoint.quant_state(weight).ok().flatten();
        if viewed || (is_part && name.ends_with(".quant_map")) {
            let how = match &state {
                Some(state) if state.nested.is_some() => {
                    format!("NF4, {} weights a scale, scales in 8 bits", state.blocksize)
                }
                Some(state) => format!("NF4, {} weights a scale", state.blocksize),
                None => dtype.name().to_owned(),
            };
            let entry = loaded.entry((role(weight), how)).or_default();
            entry.0 += usize::from(!is_part);
            entry.1 += bytes;
        } else {
            let reason = reason(name, config).to_owned();
            let entry = ignored.entry((group(name), reason)).or_default();
            entry.0 += 1;
            entry.1 += bytes;
        }
    }
    let lines = |groups: BTreeMap<(String, String), (usize, u64)>| {
        let line = |((role, how), (tensors, bytes))| TensorLine {
            role,
            tensors,
            bytes,
            how,
        };
        groups.into_iter().map(line).collect()
    };
    (lines(loaded), lines(ignored))
}

/// A tensor's name with `*` for layers and experts.
fn role(name: &str) -> String {
    let is_number = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let parts = name
        .split('.')
        .map(|part| if is_number(part) { "*" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

/// The first parts of a name that is not loaded.
fn group(name: &str) -> String {
    let role = role(name);
    let parts: Vec<&str> = role.split('.').take(2).collect();
    parts.join(".") + ".*"
}

fn reason(name: &str, config: &ModelConfig) -> &'static str {
    let layer = name
        .split_once(".layers.")
        .and_then(|(_, rest)| rest.split('.').next());
    let layer = layer.and_then(|layer| layer.parse::<usize>().ok());
    match name {
        _ if name.starts_with("mtp.") => "multi-token prediction, which generation does not use",
        _ if name.contains("visual.") || name.contains("vision") => "for images: only text is run",
        "lm_head.weight" if config.tie_word_embeddings => {
            "config.json ties the output matrix to the embedding"
        }
        _ if name.ends_with(".inv_freq") => "made from config.json",
        _ if name.contains("lora_") => "an adapter, which is not applied",
        _ if layer.is_some_and(|layer| layer >= config.shape.num_layers()) => {
            "beyond num_hidden_layers of config.json"
        }
        _ => "no weight of this family has such a name",
    }
}

/// The files in the model's folder; none of a model that has no folder.
///
/// # Errors
/// If the folder cannot be read.
pub fn files(source: &Source) -> anyhow::Result<Vec<FileLine>> {
    let Some(folder) = source.folder()? else {
        return Ok(Vec::new());
    };
    let shards = match folder.join(checkpoint::SINGLE).is_file() {
        true => None,
        false => Checkpoint::shard_names(&folder.join(checkpoint::INDEX)).ok(),
    };
    let config = source.read("tokenizer_config.json")?.unwrap_or_default();
    let lists_tokens = String::from_utf8_lossy(&config).contains("\"added_tokens_decoder\"");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !path.is_file() || name.starts_with('.') {
            continue;
        }
        let (read, why) = match &shards {
            Some(shards) if shards.contains(&name) => (true, "weights, as the index names them"),
            shards => purpose(&name, shards.is_some(), lists_tokens, &folder),
        };
        let bytes = std::fs::metadata(&path).map_or(0, |found| found.len());
        found.push(FileLine {
            name,
            bytes,
            read,
            why: why.into(),
        });
    }
    found.sort_by(|a, b| (!a.read, &a.name).cmp(&(!b.read, &b.name)));
    Ok(found)
}

/// Whether a file is read, and what for.
fn purpose(name: &str, sharded: bool, lists_tokens: bool, folder: &Path) -> (bool, &'static str) {
    let has = |file: &str| folder.join(file).is_file();
    match name {
        "config.json" => (true, "shape of the model"),
        "generation_config.json" => (true, "sampling defaults and stop tokens"),
        "tokenizer.json" => (true, "tokens"),
        "tokenizer_config.json" => (true, "further tokens, and their roles"),
        "chat_template.jinja" => (true, "chat template, over tokenizer_config.json's"),
        checkpoint::SINGLE => (true, "weights"),
        checkpoint::INDEX if sharded => (true, "which file has which weight"),
        checkpoint::INDEX => (false, "of another save: model.safetensors counts"),
        "special_tokens_map.json" | "added_tokens.json" if lists_tokens => {
            (false, "tokenizer_config.json lists the tokens")
        }
        "special_tokens_map.json" | "added_tokens.json" => {
            (true, "further tokens, and their roles")
        }
        "vocab.json" | "merges.txt" | "tokenizer.model" if has("tokenizer.json") => {
            (false, "tokenizer.json has it")
        }
        "adapter_model.safetensors" | "adapter_config.json" => (
            false,
            "an adapter, which is not applied: merge it into the weights",
        ),
        "chat_template.json" => (false, "of a processor of images"),
        _ if name.ends_with(".safetensors") => (false, "no index names it"),
        _ if [".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"]
            .iter()
            .any(|e| name.ends_with(e)) =>
        {
            (false, "weights in another format")
        }
        _ if name.contains("preprocessor") || name.contains("processor_config") => {
            (false, "for images: only text is run")
        }
        _ => (false, "not of the model"),
    }
}
