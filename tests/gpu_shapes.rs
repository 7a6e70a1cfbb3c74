//! Models of drawn shapes on a device: computed as the reference does, or refused by name.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
#[path = "gpu/sequence.rs"]
mod sequence;
mod support;

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::device::Device;
use moectl::backend::cuda::{CudaOptions, Residency, limits};
use moectl::backend::reference::Reference;
use moectl::backend::{BackendError, KvDtype, MixerKind, ModelShape};
use moectl::planning::execution::PrefillSettings;
use sequence::*;
use support::shapes::{Drawn, Form, Tolerance, answers, draw};
use support::*;

/// Keys and values of f16 are off by 0.05%.
const F16: Tolerance = Tolerance {
    logits: 2e-2,
    tie: 0.02,
};
/// One f16 term in the products of prompts, too.
const ONE_TERM: Tolerance = Tolerance {
    logits: 5e-2,
    tie: 0.05,
};
/// Of int8, by 0.4%.
const INT8: Tolerance = Tolerance {
    logits: 0.2,
    tie: 0.1,
};

/// Tokens that come as one chunk, and those that come one by one.
const TOKENS: [usize; 2] = [70, 4];

/// Tokens compared, and the largest difference.
fn compare(device: &Device, i: usize, drawn: &Drawn) -> (usize, f32) {
    let weights = drawn.weights();
    let [first, rest] = TOKENS;
    let ids = drawn.ids(first + rest);
    let mut reference = one(Reference::new(drawn.shape.clone(), weights.clone()), 128);
    let expected = answers(&mut reference, &ids, first).unwrap();
    let kv_dtype = match i % 4 {
        3 => KvDtype::Int8,
        _ => KvDtype::F16,
    };
    // In some the CPU computes experts of the prompt, too.
    let one_term = i % 5 == 4;
    let prefill = match one_term {
        true => PrefillSettings::default(),
        false => exact(None),
    };
    let options = CudaOptions {
        threads: Some(2),
        kv_dtype: Some(kv_dtype),
        prefill,
        ..with(match i % 3 {
            0 => Residency::Fill,
            1 => Residency::Nothing,
            _ => every(2, &drawn.shape),
        })
    };
    let model = (drawn.shape.clone(), weights);
    let found = load(device, options, &model, 128)
        .and_then(|mut sequence| answers(&mut sequence, &ids, first));
    let found = match found {
        Ok(found) => found,
        // Forms of matrices are refused by name, too.
        Err(BackendError::Other(why)) if why.contains("use --backend cpu") => return (0, 0.0),
        Err(error) => panic!("model {i}, {drawn:?}: {error}"),
    };
    let tolerance = match (kv_dtype, one_term) {
        (KvDtype::Int8, _) => INT8,
        (_, true) => ONE_TERM,
        (_, false) => F16,
    };
    let compared = found.compare(&expected, tolerance);
    compared.unwrap_or_else(|error| panic!("model {i}, {drawn:?}: {error}"))
}

/// What makes a shape another one.
type Change = fn(&mut ModelShape);

#[test]
fn drawn_models_are_computed_right_or_refused_by_name() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let count = if is_emulated(&device) { 80 } else { 400 };
    let (mut models, mut tokens, mut worst, mut refused) = (0, 0, 0.0f32, 0);
    for (i, drawn) in draw(count).into_iter().enumerate() {
        if let Err(error) = limits::check(&drawn.shape) {
            assert!(matches!(error, BackendError::Unsupported { .. }), "{error}");
            refused += 1;
            continue;
        }
        let (same, diff) = compare(&device, i, &drawn);
        tokens += same;
        models += usize::from(same > 0);
        worst = worst.max(diff);
    }
    println!("{models} models, {tokens} tokens, {refused} refused, largest difference {worst:.1e}");
    assert!(models > count / 4 && refused > count / 8);
    let all = TOKENS[0] + TOKENS[1];
    assert!(
        tokens > models * all * 3 / 4,
        "{tokens} tokens of {models} models"
    );
}

/// A small model of both kinds of layers.
fn small() -> Drawn {
    let mut drawn = draw(1).remove(0);
    let shape = &mut drawn.shape;
    shape.mixers = vec![MixerKind::GatedDeltaNet, MixerKind::GatedAttention];
    shape.hidden_size = 64;
    let attention = &mut shape.attention;
    attention.num_key_value_heads = 1;
    attention.num_attention_heads = 2;
    attention.head_dim = 32;
    attention.rotary_dim = 32;
    let net = &mut shape.delta_net;
    (net.num_key_heads, net.num_value_heads) = (1, 2);
    (net.key_head_dim, net.value_head_dim) = (32, 32);
    net.conv_kernel_dim = 4;
    let moe = &mut shape.moe;
    (moe.num_experts, moe.num_experts_per_tok) = (4, 2);
    moe.moe_intermediate_size = 32;
    moe.shared_expert_intermediate_size = 32;
    drawn.forms = [Form::Bf16; 3];
    drawn
}

#[test]
fn models_at_every_limit_of_the_kernels_are_computed_right() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let limits: [(&str, Change); 4] = [
        ("hidden_size", |s| s.hidden_size = limits::MAX_HIDDEN_SIZE),
        ("num_experts", |s| {
            s.moe.num_experts = limits::MAX_EXPERTS;
            s.moe.num_experts_per_tok = 32;
            s.moe.moe_intermediate_size = 4;
        }),
        ("heads", |s| {
            s.attention.head_dim = 256;
            s.attention.rotary_dim = 256;
            s.attention.num_attention_heads = 17;
            s.delta_net.key_head_dim = 128;
            s.delta_net.value_head_dim = 128;
            s.delta_net.conv_kernel_dim = limits::MAX_TAPS;
        }),
        ("smallest", |s| {
            s.hidden_size = 4;
            s.moe.num_experts = 1;
            s.moe.num_experts_per_tok = 1;
            s.moe.moe_intermediate_size = 4;
            s.moe.shared_expert_intermediate_size = 4;
            s.delta_net.conv_kernel_dim = 1;
            s.vocab_size = 2;
        }),
    ];
    for (i, (name, set)) in limits.into_iter().enumerate() {
        let mut drawn = small();
        set(&mut drawn.shape);
        limits::check(&drawn.shape).unwrap();
        let (tokens, diff) = compare(&device, i, &drawn);
        println!("{name}: {tokens} tokens, largest difference {diff:.1e}");
        assert!(tokens > 40, "{name}: {tokens} tokens");
    }
}

#[test]
fn a_model_beyond_the_kernels_is_refused_at_load_with_the_way_out() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let beyond: [(&str, Change); 11] = [
        ("head_dim is 48, not 32, 64, 128, 256", |s| {
            s.attention.head_dim = 48
        }),
        ("head_dim is 512", |s| s.attention.head_dim = 512),
        ("linear_key_head_dim is 96, not 32, 64, 128", |s| {
            s.delta_net.key_head_dim = 96
        }),
        ("linear_key_head_dim is 256", |s| {
            s.delta_net.key_head_dim = 256
        }),
        ("linear_value_head_dim is 96", |s| {
            s.delta_net.value_head_dim = 96
        }),
        ("linear_conv_kernel_dim is 9, at most 8", |s| {
            s.delta_net.conv_kernel_dim = 9
        }),
        ("hidden_size is 8196, at most 8192", |s| {
            s.hidden_size = 8196
        }),
        ("hidden_size is 66, not a multiple of 4", |s| {
            s.hidden_size = 66
        }),
        ("num_experts is 1025, at most 1024", |s| {
            s.moe.num_experts = 1025
        }),
        ("num_experts_per_tok is 33, at most 32", |s| {
            s.moe.num_experts = 64;
            s.moe.num_experts_per_tok = 33;
        }),
        ("moe_intermediate_size is 30, not a multiple of 4", |s| {
            s.moe.moe_intermediate_size = 30
        }),
    ];
    for (expected, set) in beyond {
        let mut drawn = small();
        set(&mut drawn.shape);
        let model = (drawn.shape.clone(), drawn.weights());
        let error = load(&device, with(Residency::Nothing), &model, 64);
        let error = error.err().expect(expected).to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.ends_with("use --backend cpu"), "{error}");
    }
    // Of mixers that a model has not got nothing is asked.
    let mut drawn = small();
    drawn.shape.delta_net.key_head_dim = 96;
    drawn.shape.mixers = vec![MixerKind::GatedAttention];
    limits::check(&drawn.shape).unwrap();
}
