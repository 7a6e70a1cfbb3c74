//! `moectl check`: what is in a checkpoint, what is loaded of it and how, before anything large is read.

mod against;
mod contents;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::console::Console;
use crate::engine::TextModel;
use crate::engine::footprint::footprint;
use crate::model::{GenerationConfig, Message, ModelConfig, Source, weights};
use crate::planning::units::show_bytes;
use contents::{FileLine, TensorLine};

/// Say what is in a checkpoint, and what of it is loaded
///
/// Reads the small files and the headers of the weights, wherever the model is: a folder, the hub (whose
/// large files are not fetched), `synth:SHAPE`. Lists the weights by role and how they are stored, what is
/// ignored and why, and everything that cannot be loaded; exits with 1 if there is such a thing.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  moectl check ./model
  moectl check org/name --json
  moectl check ./model --against transformers")]
pub struct CheckArgs {
    /// Model folder, org/name[@revision] on the hub, synth:SHAPE, or `tiny`
    #[arg(value_name = "MODEL")]
    model: std::ffi::OsString,
    /// Compare greedy tokens and logits with another program that reads the checkpoint
    ///
    /// Runs scripts/compare_transformers.py, which needs transformers, torch and bitsandbytes
    /// (scripts/requirements-compare.txt) and enough RAM for the model in f32.
    #[arg(long, value_enum, value_name = "PROGRAM")]
    against: Option<Against>,
    /// Python that has what --against needs [default: python3]
    #[arg(long, value_name = "FILE", requires = "against")]
    python: Option<std::path::PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Against {
    Transformers,
}

#[derive(Serialize)]
struct CheckRecord {
    model: String,
    model_type: String,
    synthetic: bool,
    layers: usize,
    full_attention_layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    context_tokens: usize,
    /// In RAM, or in slots of GPU memory
    expert_bytes: u64,
    /// In GPU memory, if one takes part
    dense_bytes: u64,
    files: Vec<FileLine>,
    /// `None` if the weights are not on this machine
    loaded: Option<Vec<TensorLine>>,
    ignored: Vec<TensorLine>,
    text: Vec<String>,
    /// What a user should know
    notes: Vec<String>,
    /// What cannot be loaded
    problems: Vec<String>,
}

/// Prints what a checkpoint has, and what of it would be loaded.
///
/// # Errors
/// If there is no such model, or a problem was found.
pub fn execute(args: &CheckArgs, console: &Console) -> anyhow::Result<()> {
    let source = Source::resolve_os(Some(&args.model))?;
    let record = examine(&source)?;
    match console.json {
        true => console.result_json(&record)?,
        false => console.table(describe(&record))?,
    }
    match record.problems.len() {
        0 => {}
        n => anyhow::bail!(
            "{}: cannot be loaded: {n} problem{}",
            record.model,
            plural(n)
        ),
    }
    match args.against {
        Some(Against::Transformers) => {
            against::transformers(&source, args.python.as_deref(), console)
        }
        None => Ok(()),
    }
}

fn examine(source: &Source) -> anyhow::Result<CheckRecord> {
    let config = source.config()?;
    let mut problems = Vec::new();
    let checkpoint = source.local_checkpoint().unwrap_or_else(|error| {
        problems.push(error.to_string());
        None
    });
    let (mut loaded, mut ignored) = (None, Vec::new());
    if let Some(checkpoint) = &checkpoint {
        let wrong = weights::problems(checkpoint, &config);
        problems.extend(wrong.iter().map(ToString::to_string));
        // What a damaged model would be made of tells nothing.
        let (used, unused) = match wrong.is_empty() {
            true => contents::tensors(checkpoint, &config),
            false => (Vec::new(), Vec::new()),
        };
        loaded = Some(used);
        ignored = unused;
    }
    let readable = checkpoint.as_ref().filter(|_| problems.is_empty());
    let weighed = footprint(&config, readable)?;
    let mut notes = Vec::new();
    let text = text(source, &config, &mut notes, &mut problems);
    let files = contents::files(source)?;
    let shape = &config.shape;
    Ok(CheckRecord {
        model: source.id().into(),
        model_type: config.model_type.clone(),
        synthetic: config.synthetic,
        layers: shape.num_layers(),
        full_attention_layers: (shape.mixers.iter())
            .filter(|m| **m == crate::backend::MixerKind::GatedAttention)
            .count(),
        hidden_size: shape.hidden_size,
        vocab_size: shape.vocab_size,
        num_experts: shape.moe.num_experts,
        num_experts_per_tok: shape.moe.num_experts_per_tok,
        context_tokens: config.max_position_embeddings,
        expert_bytes: (weighed.num_layers * weighed.num_experts) as u64 * weighed.expert_bytes,
        dense_bytes: weighed.dense_bytes + weighed.router_bytes + weighed.lm_head_bytes,
        files,
        loaded,
        ignored,
        text,
        notes,
        problems,
    })
}

/// What is known of tokenizer, template and sampling.
fn text(
    source: &Source,
    config: &ModelConfig,
    notes: &mut Vec<String>,
    problems: &mut Vec<String>,
) -> Vec<String> {
    let model = match TextModel::load(source) {
        Ok(model) => model,
        Err(error) => {
            problems.push(error.to_string());
            return Vec::new();
        }
    };
    let tokens = model.tokenizer.vocab_size();
    let mut lines = vec![format!("tokenizer of {tokens} tokens")];
    if tokens > config.shape.vocab_size {
        let rows = config.shape.vocab_size;
        notes.push(format!(
            "the tokenizer has {tokens} tokens, the embedding {rows} rows: text that needs the others is refused"
        ));
    }
    let hello = [Message::new("user", "Hello")];
    lines.push(
        match (model.has_chat_template(), model.render_chat(&hello)) {
            (false, _) => "no chat template: for plain text only".into(),
            (true, Ok(_)) => "chat template: renders a plain conversation".into(),
            (true, Err(error)) => {
                notes.push(error.to_string());
                "chat template: cannot be used".into()
            }
        },
    );
    match model.generation_config() {
        Ok(found) => {
            lines.push(sampling(found, &model));
            notes.extend(
                found
                    .notes()
                    .map(|note| note.trim_start_matches("note: ").to_owned()),
            );
        }
        Err(error) => problems.push(error.to_string()),
    }
    lines
}

fn sampling(config: &GenerationConfig, model: &TextModel) -> String {
    let stop = config.eos_token_ids.iter().map(|&id| {
        let text = model.tokenizer.decode(&[id], false).unwrap_or_default();
        format!("{id} {text}")
    });
    let stop = stop.collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "stops at {}",
        if stop.is_empty() { "no token" } else { &stop }
    );
    if !config.do_sample {
        return text + "; greedy by default";
    }
    let number = |name: &str, value: Option<f32>| value.map(|v| format!("{name} {v}"));
    let fields = [
        number("temperature", config.temperature),
        config.top_k.map(|k| format!("top_k {k}")),
        number("top_p", config.top_p),
        number("min_p", config.min_p),
        number("repetition_penalty", config.repetition_penalty),
    ];
    let fields: Vec<String> = fields.into_iter().flatten().collect();
    text += "; sampled by default";
    if !fields.is_empty() {
        text += &format!(" ({})", fields.join(", "));
    }
    text
}

fn describe(record: &CheckRecord) -> String {
    let mut lines = vec![format!(
        "{}: {}{}, {} layers ({} of full attention), hidden size {}, {} experts of which {} for a token, vocabulary {}, context {}",
        record.model,
        record.model_type,
        if record.synthetic { " (synthetic)" } else { "" },
        record.layers,
        record.full_attention_layers,
        record.hidden_size,
        record.num_experts,
        record.num_experts_per_tok,
        record.vocab_size,
        record.context_tokens,
    )];
    lines.push(format!(
        "in memory: experts {}, the rest {}",
        show_bytes(record.expert_bytes),
        show_bytes(record.dense_bytes)
    ));
    lines.extend(record.text.iter().cloned());
    if !record.files.is_empty() {
        lines.push("\nfiles".into());
        let rows = record.files.iter();
        lines.extend(contents::columns(rows.map(FileLine::cells).collect()));
    }
    match &record.loaded {
        Some(loaded) if loaded.is_empty() => {}
        Some(loaded) => {
            lines.push("\nloaded".into());
            lines.extend(contents::columns(
                loaded.iter().map(TensorLine::cells).collect(),
            ));
        }
        None => {
            lines.push("\nthe weights are not on this machine: `moectl pull` fetches them".into())
        }
    }
    if !record.ignored.is_empty() {
        lines.push("\nignored".into());
        let rows = record.ignored.iter();
        lines.extend(contents::columns(rows.map(TensorLine::cells).collect()));
    }
    for (heading, items) in [("notes", &record.notes), ("problems", &record.problems)] {
        if !items.is_empty() {
            lines.push(format!("\n{heading}"));
            lines.extend(items.iter().map(|item| format!("  {item}")));
        }
    }
    lines.join("\n")
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}
