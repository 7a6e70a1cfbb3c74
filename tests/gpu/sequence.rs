//! Whole sequences on a device: how tests of the engine load and ask them.
#![allow(dead_code)] // each test binary uses its part

use std::sync::{Mutex, MutexGuard};

use moectl::backend::cuda::budget::Usage;
use moectl::backend::cuda::device::Device;
use moectl::backend::cuda::{Cuda, CudaOptions, Residency};
use moectl::backend::{ModelShape, ModelWeights, Result};
use moectl::engine::TextModel;
use moectl::model::{Runner, Source};

use crate::support::{greedy, prefill, tiny_moe};

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
) -> Result<Cuda> {
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
}

pub fn cuda(device: &Device, options: CudaOptions, model: &Model, max_tokens: usize) -> Cuda {
    load(device, options, model, max_tokens).unwrap()
}

pub fn with(residency: Residency) -> CudaOptions {
    CudaOptions {
        residency,
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
    sequence: &mut Cuda,
    ids: &[u32],
    piece: usize,
    n: usize,
    max_tokens: usize,
) -> (Vec<f32>, Vec<u32>) {
    Runner::reset(sequence, max_tokens).unwrap();
    let (logits, _) = prefill(sequence, ids, piece);
    let last = last_row(&logits, sequence.shape());
    let tokens = greedy(sequence, &last, n);
    assert_eq!(sequence.position(), ids.len() + n - 1);
    (logits, tokens)
}
