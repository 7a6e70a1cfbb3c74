//! How fast the expert kernels are on this machine, by the number of tokens.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use super::CpuPrecision;
use super::activations::Activations;
use super::experts::{Buffers, Expert, add_experts};
use super::offload::{Offload, load_layer};
use crate::backend::{BackendError, ModelShape, ModelWeights, Result, Routing};
use crate::hardware::probe::{BatchRate, ExpertProbe, Rate};

/// Tokens at once: a decode step's one, a few, and what prefill has.
const BATCHES: [usize; 4] = [1, 8, 64, 512];
const TIME_PER_BATCH: Duration = Duration::from_millis(1200);
const REPETITIONS: RangeInclusive<usize> = 3..=15;

struct Layer {
    experts: Vec<Expert>,
    /// Each layer's block has one; it is computed too, and counted
    shared: Expert,
}

/// Measures with the experts of all layers of a model, one layer after the other, so that no cache
/// holds what comes next.
///
/// # Errors
/// If memory is short, or a worker panics.
pub fn measure_experts(
    model: &str,
    shape: &ModelShape,
    weights: &ModelWeights,
    threads: Option<usize>,
) -> Result<ExpertProbe> {
    let started = Instant::now();
    let mut offload = Offload::new(threads)?;
    let mut layers = Vec::new();
    for layer in &weights.layers {
        let load = |offload: &mut Offload, experts| {
            load_layer(offload.pool(), experts, CpuPrecision::Int16).map(|l| l.experts)
        };
        let shared = std::slice::from_ref(&layer.moe.shared_expert);
        layers.push(Layer {
            experts: load(&mut offload, &layer.moe.experts)?,
            shared: load(&mut offload, shared)?.remove(0),
        });
    }
    if layers.iter().any(|l| l.experts.is_empty()) || layers.is_empty() {
        return Err(BackendError::Other("the model has no experts".into()));
    }
    let mut batches = Vec::new();
    for tokens in BATCHES {
        batches.push(of_batch(&mut offload, shape, &layers, tokens)?);
    }
    Ok(ExpertProbe {
        model: model.into(),
        kernels: offload.isa().name().into(),
        threads: offload.threads(),
        batches,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn of_batch(
    offload: &mut Offload,
    shape: &ModelShape,
    layers: &[Layer],
    tokens: usize,
) -> Result<BatchRate> {
    let (dim, k) = (shape.hidden_size, shape.moe.num_experts_per_tok);
    let isa = offload.isa();
    let all_tokens: Vec<u32> = (0..tokens as u32).collect();
    let gates = vec![0.5; tokens];
    let (mut x, mut buffers) = (Activations::default(), Buffers::default());
    let mut out = vec![0.0; tokens * dim];
    let integers = layers[0].shared.gate.reads_integers();
    x.fill(offload.pool(), isa, tokens, dim, integers, &|t, row| {
        let values = row.iter_mut().enumerate();
        values.for_each(|(i, v)| *v = ((t * 31 + i * 17) % 97) as f32 / 97.0 - 0.5);
    })?;
    let (mut rates, mut gflops) = (Vec::new(), Vec::new());
    let since = Instant::now();
    let mut round = 0;
    while rates.len() <= *REPETITIONS.start()
        || (rates.len() <= *REPETITIONS.end() && since.elapsed() < TIME_PER_BATCH)
    {
        // Large batches pass every expert by in one layer.
        let used: Vec<&Layer> = match tokens < 64 {
            true => layers.iter().collect(),
            false => vec![&layers[round % layers.len()]],
        };
        let (mut bytes, mut flops) = (0, 0.0);
        let start = Instant::now();
        for layer in used {
            let count = layer.experts.len();
            let picks = (0..tokens * k).map(|i| ((round * k + i) % count) as u16);
            let routing = Routing {
                num_experts_per_tok: k,
                topk_ids: picks.collect(),
                topk_weights: vec![1.0 / k as f32; tokens * k],
            };
            add_experts(
                offload.pool(),
                isa,
                &layer.experts,
                &layer.shared,
                &routing,
                &gates,
                &x,
                &all_tokens,
                &mut buffers,
                &mut out,
            )?;
            let multiplications = |e: &Expert| (3 * e.gate.rows * e.gate.cols) as f64;
            bytes += (tokens * k).min(count) * layer.experts[0].bytes() + layer.shared.bytes();
            flops += 2.0 * tokens as f64 * multiplications(&layer.shared);
            flops += 2.0 * (tokens * k) as f64 * multiplications(&layer.experts[0]);
        }
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        round += 1;
        rates.push(bytes as f64 / seconds / 1e9);
        gflops.push(flops / seconds / 1e9);
    }
    // The first one warms up.
    rates.remove(0);
    gflops.remove(0);
    Ok(BatchRate::of(tokens, Rate::of(rates), gflops))
}
