//! Recorded results of the real libraries, and how to compare with them.
#![allow(dead_code)] // each test binary uses its part

pub mod sequences;
pub mod shapes;

use std::ops::{Deref, DerefMut, Range};
use std::path::PathBuf;

use moectl::backend::{
    Backend, BlockExecutor, Executor, LogitRows, ModelShape, ModelWeights, NextLogits, OnRouting,
    Piece, Result, Routing, RunEvents, SequenceId, SlotChange, Wanted,
};
use moectl::formats::Checkpoint;
use moectl::model::{ModelConfig, weights};
use moectl::planning::execution::PrefillSettings;
use moectl::planning::{Offer, Precision};
use serde_json::Value;

/// Two f16 terms in all products of prompts, which what is compared with f32 results needs, and all experts of
/// prompts on the GPU.
pub fn exact(chunk_tokens: Option<usize>) -> PrefillSettings {
    PrefillSettings {
        precision: Precision::Exact,
        chunk_tokens,
        picked_tokens: 0,
    }
}

/// A recorded checkpoint and the results of one library on it.
pub struct Golden {
    /// `tiny-a/nf4-f32`, for messages.
    pub name: String,
    pub model_dir: PathBuf,
    pub results: Checkpoint,
    pub prompts: Vec<Prompt>,
    pub detail_prompt: String,
}

pub struct Prompt {
    pub name: String,
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
    /// Smallest relative gap at the router's top-k boundary.
    pub router_gap: f64,
    /// By how much f16 keys and values alone move a logit in transformers; zero where nobody recorded it
    pub kv_f16: f32,
}

/// Below this relative gap at the router's boundary, either expert is right.
pub const DECIDED_GAP: f64 = 1e-3;

/// The repository: where cargo says at run time, so that a test binary may run in another checkout.
pub fn root() -> PathBuf {
    let given = std::env::var_os("CARGO_MANIFEST_DIR");
    given.map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn data(path: &str) -> PathBuf {
    root().join("tests/data").join(path)
}

pub fn tiny_moe() -> PathBuf {
    root().join("workloads/tiny-moe")
}

pub fn json(path: PathBuf) -> Value {
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

/// Every recorded f32 result: `(model, checkpoint folder)`.
pub const F32_GOLDENS: &[(&str, &str)] = &[
    ("tiny-a", "bf16"),
    ("tiny-a", "nf4"),
    ("tiny-b", "nf4"),
    ("tiny-c", "bf16"),
    ("tiny-c", "bf16-fused"),
    ("tiny-c", "nf4"),
    ("tiny-c", "nf4-v5"),
    ("tiny-c", "nf4-fused"),
    ("yarn", "bf16"),
    ("qwen3_5_moe", "bf16"),
    ("qwen3_5_moe", "nf4"),
    ("qwen3_moe", "bf16"),
    ("qwen3_moe", "nf4"),
];

pub fn golden(model: &str, layout: &str) -> Golden {
    let folder = data("goldens").join(model);
    // The fused file holds the same weights as the per-expert one, and so has its results.
    let recorded = if layout == "bf16-fused" {
        "bf16"
    } else {
        layout
    };
    let results = folder.join(format!("golden/{recorded}-f32.safetensors"));
    let results = std::fs::read(results).unwrap();
    let results = Checkpoint::from_bytes("golden results", results.into()).unwrap();
    let manifest = json(folder.join("golden/manifest.json"));
    let manifest_v5 = folder.join("golden/manifest-v5.json");
    let manifest_v5 = if manifest_v5.exists() {
        json(manifest_v5)
    } else {
        Value::Null
    };
    let mode = format!("{recorded}/f32");
    let prompts = manifest["prompts"].as_object().unwrap().iter();
    let prompts = prompts
        .map(|(name, prompt)| {
            // Layouts that only transformers 5 writes are in its manifest.
            let facts = match &manifest["modes"][&mode][name] {
                Value::Null => &manifest_v5["layouts"][&mode][name],
                facts => facts,
            };
            Prompt {
                name: name.clone(),
                ids: ids(&prompt["ids"]),
                greedy: ids(&facts["greedy"]),
                router_gap: facts["router_min_relative_gap"].as_f64().unwrap(),
                kv_f16: facts["f16_keys_and_values_move_a_logit_by"]
                    .as_f64()
                    .unwrap_or(0.0) as f32,
            }
        })
        .collect();
    Golden {
        name: format!("{model}/{layout}-f32"),
        model_dir: folder.join(layout),
        results,
        prompts,
        detail_prompt: manifest["detail_prompt"].as_str().unwrap().into(),
    }
}

impl Golden {
    pub fn f32s(&self, name: &str) -> Vec<f32> {
        let tensor = self.results.tensor(name).unwrap();
        let mut out = vec![0.0; tensor.shape.iter().product()];
        tensor.dtype.widen(&tensor.data, &mut out);
        out
    }

    pub fn i32s(&self, name: &str) -> Vec<i32> {
        let tensor = self.results.tensor(name).unwrap();
        tensor
            .data
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

/// Shape and weights of a checkpoint folder.
pub fn open(dir: &std::path::Path) -> (ModelShape, ModelWeights) {
    let config = std::fs::read(dir.join("config.json")).unwrap();
    let config = ModelConfig::parse(&config).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let weights = weights::load(&checkpoint, &config).unwrap();
    (config.shape, weights)
}

/// An executor and one sequence of it, for tests that need no more.
pub struct One<E: Executor> {
    pub executor: E,
    pub id: SequenceId,
}

impl<E: Executor> One<E> {
    pub fn new(mut executor: E) -> Self {
        let id = executor.new_sequence().unwrap();
        One { executor, id }
    }

    /// Forgets the sequence and makes room for one of `max_tokens`.
    pub fn reset(&mut self, max_tokens: usize) -> Result<()> {
        self.executor.reserve(1, max_tokens)?;
        self.id = self.executor.new_sequence()?;
        Ok(())
    }

    pub fn position(&self) -> usize {
        self.executor.position(self.id).unwrap()
    }

    /// Feeds `ids`; `[rows, vocab_size]` logits.
    pub fn forward(
        &mut self,
        ids: &[u32],
        rows: impl Rows,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>> {
        let piece = Piece {
            wanted: Wanted::Rows(rows.of(ids.len())),
            ..Piece::new(self.id, ids, LogitRows::None)
        };
        Ok(all(run_one(
            &mut self.executor,
            piece,
            &mut Quiet(on_routing),
        )?))
    }

    /// As [`forward`](One::forward) of one token, of which only the best logits are wanted.
    pub fn forward_best(
        &mut self,
        id: u32,
        wanted: usize,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        let ids = [id];
        let piece = Piece {
            wanted: Wanted::Best(wanted),
            ..Piece::new(self.id, &ids, LogitRows::Last)
        };
        run_one(&mut self.executor, piece, &mut Quiet(on_routing))
    }
}

impl<E: Executor> Deref for One<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.executor
    }
}

impl<E: Executor> DerefMut for One<E> {
    fn deref_mut(&mut self) -> &mut E {
        &mut self.executor
    }
}

/// A sequence of at most `max_tokens` on a backend that computes block by block.
pub fn one<B: Backend>(backend: B, max_tokens: usize) -> One<BlockExecutor<B>> {
    One::new(BlockExecutor::new(backend, max_tokens))
}

/// Which tokens of a piece want logits.
pub trait Rows {
    fn of(self, tokens: usize) -> Range<usize>;
}

impl Rows for LogitRows {
    fn of(self, tokens: usize) -> Range<usize> {
        LogitRows::of(self, tokens)
    }
}

impl Rows for Range<usize> {
    fn of(self, _tokens: usize) -> Range<usize> {
        self
    }
}

/// Runs a batch of one piece.
pub fn run_one(
    executor: &mut dyn Executor,
    piece: Piece<'_>,
    events: &mut dyn RunEvents,
) -> Result<NextLogits> {
    let mut outputs = executor.run(&[piece], events)?;
    assert_eq!(outputs.len(), 1);
    Ok(outputs.remove(0))
}

/// The logits of a piece that wanted rows.
pub fn all(logits: NextLogits) -> Vec<f32> {
    match logits {
        NextLogits::All(logits) => logits,
        NextLogits::Best(_) => panic!("rows were wanted"),
    }
}

/// Tells only what the router picks.
pub struct Quiet<'a, 'b>(pub &'a mut OnRouting<'b>);

impl RunEvents for Quiet<'_, '_> {
    fn routed(&mut self, _: usize, layer: usize, position: usize, routing: &Routing) {
        (self.0)(layer, position, routing);
    }

    fn admit(&mut self, _: usize, _: usize, _: Offer<'_>) -> Vec<SlotChange> {
        Vec::new()
    }
}

/// Logits of every prompt token and the routing per layer, fed in pieces of at most `piece`.
pub fn prefill(
    sequence: &mut One<impl Executor>,
    ids: &[u32],
    piece: usize,
) -> (Vec<f32>, Vec<Routing>) {
    let mut logits = Vec::new();
    let mut routing: Vec<Routing> = Vec::new();
    for piece in ids.chunks(piece) {
        let rows = sequence.forward(piece, LogitRows::All, &mut |layer, _, chosen| {
            if routing.len() == layer {
                routing.push(chosen.clone());
            } else {
                routing[layer].topk_ids.extend(&chosen.topk_ids);
                routing[layer].topk_weights.extend(&chosen.topk_weights);
            }
        });
        logits.extend(rows.unwrap());
    }
    (logits, routing)
}

/// The largest difference, which must not be NaN.
pub fn max_diff(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).fold(0.0, |worst: f32, (a, b)| {
        let diff = (a - b).abs();
        assert!(!diff.is_nan());
        worst.max(diff)
    })
}

/// The largest value's index; the lowest on ties.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .rev()
        .max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// Greedy continuation of a sequence whose last logits are `logits`.
pub fn greedy(sequence: &mut One<impl Executor>, logits: &[f32], n: usize) -> Vec<u32> {
    let mut tokens = vec![argmax(logits)];
    while tokens.len() < n {
        let last = *tokens.last().unwrap();
        let logits = sequence
            .forward(&[last], LogitRows::Last, &mut |_, _, _| {})
            .unwrap();
        tokens.push(argmax(&logits));
    }
    tokens
}

/// Compares the experts of each token as sets with recorded ids `[T, k]`; counts unequal tokens.
pub fn unequal_expert_sets(found: &Routing, expected: &[i32]) -> usize {
    let k = found.num_experts_per_tok;
    let pairs = found.topk_ids.chunks(k).zip(expected.chunks(k));
    pairs
        .filter(|(found, expected)| {
            let mut found: Vec<i32> = found.iter().map(|&e| i32::from(e)).collect();
            let mut expected = expected.to_vec();
            found.sort_unstable();
            expected.sort_unstable();
            found != expected
        })
        .count()
}
