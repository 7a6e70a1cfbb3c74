//! Models of drawn shapes: the cpu backend computes what the reference does.

mod support;

use moectl::backend::KvDtype;
use moectl::backend::cpu::{Cpu, CpuOptions};
use moectl::backend::reference::Reference;
use support::shapes::{Tolerance, answers, draw};
use support::*;

/// int16 activations and weights are off by 2^-16 each.
const EXACT: Tolerance = Tolerance {
    logits: 5e-3,
    tie: DECIDED_GAP,
};
/// Keys and values of int8 are off by 0.4%.
const INT8: Tolerance = Tolerance {
    logits: 0.2,
    tie: 0.1,
};

#[test]
fn drawn_models_on_the_cpu_equal_the_reference() {
    let (mut models, mut tokens, mut worst) = (0, 0, [0.0f32; 2]);
    for (i, drawn) in draw(60).into_iter().enumerate() {
        // Of the largest there is nothing to learn here that smaller ones don't show.
        if drawn.shape.hidden_size > 1024 || drawn.shape.moe.num_experts > 200 {
            continue;
        }
        let weights = drawn.weights();
        let ids = drawn.ids(24);
        let mut reference = one(Reference::new(drawn.shape.clone(), weights.clone()), 64);
        let expected = answers(&mut reference, &ids, 20).unwrap();
        let variants = [(KvDtype::F32, EXACT), (KvDtype::Int8, INT8)];
        for (which, (kv_dtype, tolerance)) in variants.into_iter().enumerate() {
            let options = CpuOptions {
                threads: Some(2),
                kv_dtype,
                ..CpuOptions::default()
            };
            let cpu = Cpu::new(drawn.shape.clone(), &weights, options, &|_, _| {});
            let found = match cpu {
                Ok(cpu) => answers(&mut one(cpu, 64), &ids, 20),
                Err(error) => Err(error),
            };
            let found = found.unwrap_or_else(|error| panic!("model {i}, {drawn:?}: {error}"));
            let compared = found.compare(&expected, tolerance);
            let (same, diff) = compared.unwrap_or_else(|e| panic!("model {i}, {drawn:?}: {e}"));
            worst[which] = worst[which].max(diff);
            tokens += same;
            models += 1;
        }
    }
    println!("{models} models, {tokens} tokens, largest differences {worst:?}");
    assert!(tokens > 20 * models, "{tokens} tokens of {models} models");
}
