//! The cuda backend against what transformers computed: whole models, every placement of experts.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in
//! (`--features cuda,emulate`); without both there is nothing to test, which is said.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
mod support;

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::budget::Usage;
use moectl::backend::cuda::device::Device;
use moectl::backend::cuda::{Cuda, CudaOptions, Residency};
use moectl::backend::{DeviceMemory, ModelShape, ModelWeights};
use moectl::planning::execution::PrefillSettings;
use support::*;

/// Largest difference of a logit. Keys and values are f16: 0.02% off each, which the random weights
/// of the goldens magnify.
const TOLERANCE: f32 = 5e-3;
/// Beyond what f16 keys and values alone do to a logit in transformers, where that was recorded: in a
/// model whose every layer attends it is more than [`TOLERANCE`].
const TOLERANCE_BESIDE_KV: f32 = 1e-3;

fn cuda(device: &Device, options: CudaOptions, model: &(ModelShape, ModelWeights)) -> One<Cuda> {
    let (shape, weights) = (model.0.clone(), &model.1);
    let usage = Usage::alone(device);
    let cuda = Cuda::on(
        device.clone(),
        0,
        usage,
        shape,
        weights,
        options,
        512,
        &|_, _| {},
    );
    One::new(cuda.unwrap())
}

fn with(residency: Residency) -> CudaOptions {
    CudaOptions {
        residency,
        prefill: exact(None),
        ..CudaOptions::default()
    }
}

/// One f16 term in prefill: rounding moves logits, but no greedy token.
#[test]
fn greedy_tokens_of_one_term_equal_transformers() {
    let Some(device) = open_device() else { return };
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        let options = CudaOptions {
            prefill: PrefillSettings::default(),
            ..with(Residency::Fill)
        };
        let mut sequence = cuda(&device, options, &model);
        for prompt in &golden.prompts {
            let what = format!("{} {}", golden.name, prompt.name);
            let expected = golden.f32s(&format!("logits.{}", prompt.name));
            let vocab = expected.len() / prompt.ids.len();
            sequence.reset(512).unwrap();
            let (logits, _) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            let last = &logits[logits.len() - vocab..];
            let diff = max_diff(last, &expected[expected.len() - vocab..]);
            println!("{what}: largest difference of a last logit {diff:.1e}");
            assert_eq!(greedy(&mut sequence, last, 32), prompt.greedy, "{what}");
        }
    }
}

#[test]
fn logits_routing_and_greedy_tokens_equal_transformers() {
    let Some(device) = open_device() else { return };
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        let mut sequence = cuda(&device, with(Residency::Fill), &model);
        let (mut worst, mut worst_name) = (0.0f32, String::new());
        for prompt in &golden.prompts {
            let what = format!("{} {}", golden.name, prompt.name);
            let expected = golden.f32s(&format!("logits.{}", prompt.name));
            let vocab = expected.len() / prompt.ids.len();
            sequence.reset(512).unwrap();
            let (logits, routing) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            if prompt.router_gap < DECIDED_GAP {
                continue;
            }
            let diff = max_diff(&logits, &expected);
            if diff > worst {
                (worst, worst_name) = (diff, what.clone());
            }
            let bound = TOLERANCE.max(prompt.kv_f16 + TOLERANCE_BESIDE_KV);
            assert!(diff <= bound, "{what}: logits differ by {diff}");
            for (layer, routing) in routing.iter().enumerate() {
                let ids = golden.i32s(&format!("router.{}.{layer}.idx", prompt.name));
                assert_eq!(
                    unequal_expert_sets(routing, &ids),
                    0,
                    "{what} layer {layer}"
                );
            }
            let last = &logits[logits.len() - vocab..];
            assert_eq!(greedy(&mut sequence, last, 32), prompt.greedy, "{what}");
        }
        println!(
            "{}: largest difference of a logit {worst:.1e} ({worst_name})",
            golden.name
        );
    }
}

#[test]
fn a_head_in_ram_gives_the_same_logits_and_takes_no_memory_of_the_device() {
    let Some(device) = open_device() else { return };
    for &(model, layout) in &[("tiny-a", "nf4"), ("tiny-b", "nf4"), ("tiny-c", "bf16")] {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        // The longest: prefill's head too, where it has more than 48 tokens.
        let decided = (golden.prompts.iter()).filter(|p| p.router_gap >= DECIDED_GAP);
        let prompt = decided.max_by_key(|p| p.ids.len()).unwrap();
        let expected = golden.f32s(&format!("logits.{}", prompt.name));
        for residency in [Residency::Fill, Residency::Nothing] {
            let in_vram = cuda(&device, with(residency.clone()), &model);
            let with_head = in_vram.used_bytes().unwrap();
            drop(in_vram);
            let options = CudaOptions {
                head_in_ram: true,
                ..with(residency)
            };
            let mut sequence = cuda(&device, options, &model);
            // A GPU is used by the other tests too.
            if is_emulated(&device) {
                assert!(sequence.used_bytes().unwrap() <= with_head);
            }
            let (logits, _) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            let diff = max_diff(&logits, &expected);
            assert!(
                diff <= TOLERANCE,
                "{}: logits differ by {diff}",
                golden.name
            );
            let vocab = logits.len() / prompt.ids.len();
            let tokens = greedy(&mut sequence, &logits[logits.len() - vocab..], 32);
            assert_eq!(tokens, prompt.greedy, "{}", golden.name);
        }
    }
}

#[test]
fn every_placement_of_experts_gives_the_same_tokens() {
    let Some(device) = open_device() else { return };
    for &(model, layout) in &[("tiny-a", "nf4"), ("tiny-b", "nf4"), ("tiny-c", "bf16")] {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        let (layers, experts) = (model.0.num_layers(), model.0.moe.num_experts);
        let some = |step: usize| -> Vec<(usize, usize)> {
            (0..layers * experts)
                .step_by(step)
                .map(|i| (i / experts, i % experts))
                .collect()
        };
        let prompt = golden
            .prompts
            .iter()
            .find(|p| p.router_gap >= DECIDED_GAP)
            .unwrap();
        let placements = [
            (with(Residency::Nothing), "all in RAM"),
            (with(Residency::Exactly(some(2))), "every other one in VRAM"),
            (
                CudaOptions {
                    prefill: PrefillSettings {
                        picked_tokens: 1024,
                        ..exact(None)
                    },
                    ..with(Residency::Exactly(some(3)))
                },
                "only picked experts on the GPU, some of them in RAM",
            ),
            (with(Residency::Exactly(some(3))), "every third in VRAM"),
            (with(Residency::Fill), "all in VRAM"),
            (
                CudaOptions {
                    split: Some(vec![0, 1, 1, 2]),
                    ..with(Residency::Exactly(some(5)))
                },
                "some read over PCIe",
            ),
            (
                CudaOptions {
                    parts: Some(3),
                    ..with(Residency::Exactly(some(3)))
                },
                "in three graphs",
            ),
            (
                CudaOptions {
                    parts: Some(2),
                    ..with(Residency::Fill)
                },
                "all in VRAM, in two graphs",
            ),
            (
                CudaOptions {
                    look_ahead: Some(true),
                    parts: Some(2),
                    split: Some(vec![0, 0, 1]),
                    ..with(Residency::Exactly(some(4)))
                },
                "fetched ahead, some read over PCIe, in two graphs",
            ),
            (
                CudaOptions {
                    look_ahead: Some(true),
                    ..with(Residency::Exactly(some(4)))
                },
                "fetched ahead",
            ),
        ];
        for (options, name) in placements {
            let mut sequence = cuda(&device, options, &model);
            let (logits, _) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            let vocab = logits.len() / prompt.ids.len();
            let tokens = greedy(&mut sequence, &logits[logits.len() - vocab..], 32);
            assert_eq!(tokens, prompt.greedy, "{} {name}", golden.name);
        }
    }
}
