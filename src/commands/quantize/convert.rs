//! `quantize`: a bf16, f16 or f32 checkpoint to bitsandbytes NF4, as transformers 4.57 loads it.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::commands::checkpoint_folder::{CheckpointFolder, Job};
use crate::formats::nf4::{STATE_SUFFIX, quantize as nf4};
use crate::formats::writer::Planned;
use crate::formats::{Bytes, Checkpoint, Dtype, FormatError};

const CONFIG: &str = "config.json";

/// Files that go along as they are, where the source has them.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// Modules whose weights stay as they are: a module's last name, its full name, or the full
    /// name of one it is inside of
    pub skip: Vec<String>,
    /// Quantise the scales too: 4.127 bits per weight in place of 4.5
    pub double_quant: bool,
    /// A file that would grow beyond is split
    pub max_shard_bytes: u64,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        QuantizeOptions {
            skip: vec!["lm_head".into(), "gate".into()],
            double_quant: true,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Weights now in NF4
    pub quantized: usize,
    /// Tensors copied as they were
    pub kept: usize,
    /// Multi-token-prediction tensors left out: transformers ignores them
    pub mtp_dropped: usize,
    pub source_bytes: u64,
    pub output_bytes: u64,
    pub files: usize,
}

/// Quantises the checkpoint in the folder `src` into the folder `dst`.
///
/// - `progress`: told the source bytes done and in all after each weight; `Break` stops the work
///
/// Everything is written to a folder beside `dst` that takes its name at the end: an interruption
/// leaves nothing at `dst`. Holds a few weights at a time, one for each thread.
///
/// # Errors
/// A source that cannot be read, is quantised already or holds NaN or infinity; a `dst` that holds
/// files; a stop asked for by `progress`; whatever the file system says.
pub fn quantize_checkpoint(
    src: &Path,
    dst: &Path,
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Summary> {
    let folder = CheckpointFolder::create(dst)?;
    let mut config = read_config(&src.join(CONFIG))?;
    let source = Checkpoint::open(src)?;
    check_not_quantized(src, &config, &source)?;
    prepare_config(&mut config, options);
    let (jobs, mtp_dropped) = plan(&source, options)?;

    let mut summary = Summary {
        mtp_dropped,
        ..Summary::default()
    };
    let total = jobs.iter().map(Weight::source_bytes).sum();
    let mut done = |job: &Weight| {
        summary.source_bytes += job.source_bytes();
        match job.quantize {
            true => summary.quantized += 1,
            false => summary.kept += 1,
        }
        progress(summary.source_bytes, total)
    };
    let written = folder.write(jobs, options.max_shard_bytes, &mut done)?;
    summary.output_bytes = written.bytes;
    summary.files = written.files;
    folder.write_json(CONFIG, &config)?;
    for name in COMPANIONS {
        let from = src.join(name);
        if from.is_file() {
            let bytes = fs::read(&from).with_context(|| from.display().to_string())?;
            folder.write_file(name, &bytes)?;
        }
    }
    folder.finish()?;
    Ok(summary)
}

/// One weight of the output.
struct Weight {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Bytes,
    quantize: bool,
    double_quant: bool,
}

impl Weight {
    fn source_bytes(&self) -> u64 {
        self.data.len() as u64
    }
}

impl Job for Weight {
    fn planned(&self) -> (Vec<Planned>, Option<(String, usize)>) {
        let planned = |suffix: &str, dtype, shape| Planned {
            name: format!("{}{suffix}", self.name),
            dtype,
            shape,
        };
        if !self.quantize {
            return (vec![planned("", self.dtype, self.shape.clone())], None);
        }
        let parts = nf4::parts(self.shape.iter().product(), self.double_quant);
        let mut state = nf4::state(self.dtype, &self.shape, self.double_quant);
        if let Some(nested) = &mut state.nested {
            // No f64 takes more characters.
            nested.nested_offset = -f64::MIN_POSITIVE;
        }
        let late = (
            format!("{}{STATE_SUFFIX}", self.name),
            state.to_json().len(),
        );
        let parts = parts
            .into_iter()
            .map(|p| planned(p.suffix, p.dtype, p.shape));
        (parts.collect(), Some(late))
    }

    fn tensors(&self) -> Result<Vec<(String, Bytes)>, FormatError> {
        if !self.quantize {
            return Ok(vec![(self.name.clone(), self.data.clone())]);
        }
        let Weight {
            name, dtype, shape, ..
        } = self;
        let weight = nf4::quantize(name, &self.data, *dtype, shape, self.double_quant)?;
        let tensors = weight.into_tensors().into_iter();
        Ok(tensors
            .map(|(suffix, data)| (format!("{name}{suffix}"), Bytes::from(data)))
            .collect())
    }
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| format!("{}: bad JSON", path.display()))
}

fn check_not_quantized(src: &Path, config: &Map<String, Value>, source: &Checkpoint) -> Result<()> {
    let already = |what: &str| {
        format!(
            "{}: quantised already ({what}); expected bf16, f16 or f32 weights",
            src.display()
        )
    };
    if let Some(found) = config.get("quantization_config").filter(|c| !c.is_null()) {
        let method = found["quant_method"].as_str().unwrap_or("unknown method");
        bail!(already(&format!("quantization_config: {method}")));
    }
    if let Some(name) = source.names().find(|name| name.contains(".quant_state.")) {
        bail!(already(&format!("tensor `{name}`")));
    }
    Ok(())
}

/// Adds what makes transformers load NF4, and respells what 5.x writes and 4.57 does not read.
fn prepare_config(config: &mut Map<String, Value>, options: &QuantizeOptions) {
    if let Some(Value::Object(mut rope)) = config.remove("rope_parameters") {
        for field in ["rope_theta", "partial_rotary_factor"] {
            if let Some(value) = rope.remove(field) {
                config.insert(field.into(), value);
            }
        }
        let plain = rope.get("rope_type").is_none_or(|t| t == "default");
        let scaling = if plain { Value::Null } else { rope.into() };
        config.insert("rope_scaling".into(), scaling);
    }
    let dtype = config.get("dtype").or(config.get("torch_dtype"));
    let dtype = dtype.and_then(Value::as_str).unwrap_or("bfloat16");
    let quantization = json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": options.skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    });
    config.insert("quantization_config".into(), quantization);
}

/// One job per weight of the output, in the order of the source, and the tensors left out.
fn plan(source: &Checkpoint, options: &QuantizeOptions) -> Result<(Vec<Weight>, usize)> {
    let mut jobs = Vec::new();
    let mut dropped = 0;
    for name in source.names() {
        let tensor = source.tensor(name)?;
        if name.starts_with("mtp.") {
            dropped += 1;
        } else if let Some((prefix, projections)) = fused_projections(name) {
            let [experts, rows, cols] = tensor.shape[..] else {
                bail!(
                    "tensor `{name}`: shape {:?}, expected [experts, rows, cols]",
                    tensor.shape
                );
            };
            ensure!(
                rows % projections.len() == 0,
                "tensor `{name}`: {rows} rows, expected {} equal parts",
                projections.len()
            );
            let rows = rows / projections.len();
            let bytes = rows * cols * tensor.dtype.size_bytes();
            for part in 0..experts * projections.len() {
                let (expert, projection) = (part / projections.len(), part % projections.len());
                let module = format!("{prefix}.{expert}.{}", projections[projection]);
                jobs.push(Weight {
                    quantize: tensor.dtype.is_float() && bytes > 0 && !is_skipped(&module, options),
                    name: format!("{module}.weight"),
                    dtype: tensor.dtype,
                    shape: vec![rows, cols],
                    data: tensor.data.slice(part * bytes..(part + 1) * bytes),
                    double_quant: options.double_quant,
                });
            }
        } else {
            let linear = name.strip_suffix(".weight").is_some_and(|module| {
                tensor.shape.len() == 2 && !is_embedding(module) && !is_skipped(module, options)
            });
            jobs.push(Weight {
                quantize: linear && tensor.dtype.is_float() && !tensor.data.is_empty(),
                name: name.into(),
                dtype: tensor.dtype,
                shape: tensor.shape,
                data: tensor.data,
                double_quant: options.double_quant,
            });
        }
    }
    Ok((jobs, dropped))
}

/// Of a tensor that holds one projection, or two on top of each other, of all experts of a layer:
/// the experts' common prefix and the projections.
fn fused_projections(name: &str) -> Option<(&str, &'static [&'static str])> {
    let (prefix, last) = name.rsplit_once('.')?;
    let projections: &[&str] = match last {
        "gate_up_proj" => &["gate_proj", "up_proj"],
        "down_proj" => &["down_proj"],
        _ => return None,
    };
    prefix
        .ends_with(".experts")
        .then_some((prefix, projections))
}

/// Embeddings are matrices, but no Linear layers.
fn is_embedding(module: &str) -> bool {
    last_name(module).contains("embed")
}

/// Whether transformers 4.57 leaves a module alone, given the skip list.
///
/// Source: `_replace_with_bnb_linear` in `integrations/bitsandbytes.py`.
fn is_skipped(module: &str, options: &QuantizeOptions) -> bool {
    options.skip.iter().any(|entry| {
        last_name(module) == entry || module == entry || module.contains(&format!("{entry}."))
    })
}

fn last_name(module: &str) -> &str {
    module.rsplit_once('.').map_or(module, |(_, last)| last)
}
