//! Whole sequences on a device: how tests of the engine load and ask them.
#![allow(dead_code)] // each test binary uses its part

use std::sync::{Mutex, MutexGuard};

use moectl::backend::cuda::budget::Usage;
use moectl::backend::cuda::device::Device;
use moectl::backend::cuda::{Cuda, CudaOptions, Residency};
use moectl::backend::{Executor, LogitRows, ModelShape, ModelWeights, Result, Routing};
use moectl::engine::TextModel;
use moectl::model::Source;

use crate::support::{DECIDED_GAP, One, argmax, exact, greedy, max_diff, prefill, tiny_moe};

/// Largest difference of a logit between two ways to compute it on the GPU. Sums in another order
/// differ by 1e-6; where that moves a key or value across a rounding of f16, by 5e-4 of it.
pub const SAME: f32 = 1e-3;
/// The same where the CPU computes experts: it rounds activations to int16.
pub const SAME_BESIDE_CPU: f32 = 5e-3;
/// The driver takes pages of 2 MiB, and a little for the first launches.
pub const SLACK_BYTES: u64 = 8 << 20;

pub type Model = (ModelShape, ModelWeights);

/// Tests that measure memory want the device for themselves.
pub fn alone() -> MutexGuard<'static, ()> {
    static DEVICE: Mutex<()> = Mutex::new(());
    DEVICE.lock().unwrap_or_else(|failed| failed.into_inner())
}

pub fn load(
    device: &Device,
    options: CudaOptions,
    model: &Model,
    max_tokens: usize,
) -> Result<One<Cuda>> {
    let (shape, weights) = (model.0.clone(), &model.1);
    let usage = Usage::of(device, 0);
    Cuda::on(
        device.clone(),
        0,
        usage,
        shape,
        weights,
        options,
        max_tokens,
        &|_, _| {},
    )
    .map(One::new)
}

pub fn cuda(device: &Device, options: CudaOptions, model: &Model, max_tokens: usize) -> One<Cuda> {
    load(device, options, model, max_tokens).unwrap()
}

pub fn with(residency: Residency) -> CudaOptions {
    CudaOptions {
        residency,
        prefill: exact(None),
        ..CudaOptions::default()
    }
}

/// Every `step`-th expert of the model.
pub fn every(step: usize, shape: &ModelShape) -> Residency {
    let experts = shape.moe.num_experts;
    let all = 0..shape.num_layers() * experts;
    Residency::Exactly(
        all.step_by(step)
            .map(|i| (i / experts, i % experts))
            .collect(),
    )
}

pub fn tiny_moe_text(tokens: usize) -> Vec<u32> {
    let source = Source::resolve(Some(tiny_moe().to_str().unwrap())).unwrap();
    let text = TextModel::load(&source).unwrap();
    let prose = std::fs::read_to_string(tiny_moe().with_file_name("prose.jsonl")).unwrap();
    let mut ids = Vec::new();
    for line in prose.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        ids.extend(
            text.tokenizer
                .encode(record["text"].as_str().unwrap())
                .unwrap(),
        );
        if ids.len() >= tokens {
            break;
        }
    }
    assert!(ids.len() >= tokens);
    ids[..tokens].to_vec()
}

pub fn last_row(logits: &[f32], shape: &ModelShape) -> Vec<f32> {
    logits[logits.len() - shape.vocab_size..].to_vec()
}

/// All logits of a prompt fed in pieces, then `n` greedy tokens.
pub fn answer(
    sequence: &mut One<Cuda>,
    ids: &[u32],
    piece: usize,
    n: usize,
    max_tokens: usize,
) -> (Vec<f32>, Vec<u32>) {
    sequence.reset(max_tokens).unwrap();
    let (logits, _) = prefill(sequence, ids, piece);
    let last = last_row(&logits, sequence.shape());
    let tokens = greedy(sequence, &last, n);
    assert_eq!(sequence.position(), ids.len() + n - 1);
    (logits, tokens)
}

/// What a decode step gave.
#[derive(Clone)]
pub struct Step {
    /// `[V]`
    pub logits: Vec<f32>,
    /// Of each layer, one token's
    pub routing: Vec<Routing>,
}

pub fn step(sequence: &mut One<Cuda>, id: u32) -> Step {
    let mut routing = Vec::new();
    let logits = sequence.forward(&[id], LogitRows::Last, &mut |layer, _, chosen| {
        assert_eq!(layer, routing.len());
        routing.push(chosen.clone());
    });
    Step {
        logits: logits.unwrap(),
        routing,
    }
}

/// As [`greedy`], with what each step gave.
pub fn greedy_steps(sequence: &mut One<Cuda>, logits: &[f32], n: usize) -> (Vec<u32>, Vec<Step>) {
    let mut tokens = vec![argmax(logits)];
    let mut steps = Vec::new();
    while tokens.len() < n {
        let next = step(sequence, *tokens.last().unwrap());
        tokens.push(argmax(&next.logits));
        steps.push(next);
    }
    (tokens, steps)
}

/// How far two runs over the same tokens went together.
#[derive(Debug)]
pub struct Compared {
    /// Steps whose logits were compared
    pub steps: usize,
    /// Largest difference of a logit of these
    pub diff: f32,
    /// Where the experts first differ, if they do
    pub parted: Option<Tie>,
}

/// Where two runs picked different experts, and the relative gap of the weights at that boundary.
#[derive(Debug)]
pub struct Tie {
    pub step: usize,
    pub layer: usize,
    pub gap: f64,
}

/// Compares logits step by step, while the experts of all steps so far are the same. Two runs that
/// round differently may pick different experts where the router all but ties: from there on they
/// compute different things, and their logits are not compared.
///
/// # Errors
/// A logit that differs by more than `bound`, or experts that differ without such a tie.
pub fn compare_steps(
    found: &[Step],
    expected: &[Step],
    bound: f32,
) -> std::result::Result<Compared, String> {
    assert_eq!(found.len(), expected.len());
    let mut compared = Compared {
        steps: 0,
        diff: 0.0,
        parted: None,
    };
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.routing.len(), expected.routing.len());
        for (layer, pair) in found.routing.iter().zip(&expected.routing).enumerate() {
            let Some(tied) = tied_weights(pair.0, pair.1) else {
                continue;
            };
            let (least, most) = (tied[0], tied[tied.len() - 1]);
            let gap = f64::from(most - least) / f64::from(most);
            if gap.is_nan() || gap >= DECIDED_GAP {
                return Err(format!(
                    "step {step}, layer {layer}: experts {:?} and {:?} with weights {tied:?} at \
                     the boundary, {gap:.1e} apart; a tie is below {DECIDED_GAP:.0e}",
                    pair.0.topk_ids, pair.1.topk_ids
                ));
            }
            compared.parted = Some(Tie { step, layer, gap });
            return Ok(compared);
        }
        let diff = max_diff(&found.logits, &expected.logits);
        if diff > bound {
            return Err(format!(
                "step {step}: the same experts, and logits differ by {diff}"
            ));
        }
        compared.steps += 1;
        compared.diff = compared.diff.max(diff);
    }
    Ok(compared)
}

/// If two runs chose different experts for a token, the weights that must be nearly equal for that
/// to be a tie, ascending: those of the experts that only one of them has, and each one's least.
fn tied_weights(a: &Routing, b: &Routing) -> Option<Vec<f32>> {
    assert_eq!(a.topk_ids.len(), b.topk_ids.len());
    let only = |a: &Routing, b: &Routing| -> Vec<f32> {
        let chosen = a.topk_ids.iter().zip(&a.topk_weights);
        let alone = chosen.filter(|(id, _)| !b.topk_ids.contains(id));
        alone.map(|(_, &weight)| weight).collect()
    };
    let mut weights = only(a, b);
    if weights.is_empty() {
        return None;
    }
    weights.extend(only(b, a));
    for routing in [a, b] {
        weights.extend(routing.topk_weights.iter().copied().min_by(f32::total_cmp));
    }
    weights.sort_by(f32::total_cmp);
    Some(weights)
}
