//! The cuda backend and memory: the budget is a ceiling, nothing leaks, and wherever experts are, the
//! same logits.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
#[path = "gpu/sequence.rs"]
mod sequence;
mod support;

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::budget::Usage;
use moectl::backend::cuda::{Cuda, CudaOptions, Residency};
use moectl::backend::{BackendError, DeviceMemory, Result, Routing};
use sequence::*;
use support::*;

#[test]
fn a_long_generation_neither_drifts_nor_leaks() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    // On a GPU the model's whole context, twice in each place: 32,000 tokens. The emulator takes a
    // fifth of a second for a token of that model.
    let (model, ids, limit) = match is_emulated(&device) {
        true => {
            let golden = golden("tiny-b", "nf4");
            (open(&golden.model_dir), golden.prompts[0].ids.clone(), 50)
        }
        false => (open(&tiny_moe()), tiny_moe_text(100), 8192),
    };
    let prompt = ids.len();
    for residency in [Residency::Fill, every(3, &model.0)] {
        let mut sequence = cuda(&device, with(residency), &model, limit);
        let mut first: Option<(Vec<u32>, u64)> = None;
        for round in 0..2 {
            sequence.reset(limit).unwrap();
            let (logits, _) = prefill(&mut sequence, &ids, ids.len());
            let mut tokens = vec![argmax(&last_row(&logits, &model.0))];
            let error = loop {
                let last = *tokens.last().unwrap();
                match sequence.forward(&[last], 0..1, &mut |_, _, _| {}) {
                    Ok(logits) => {
                        assert!(
                            logits.iter().all(|x| x.is_finite()),
                            "token {}",
                            tokens.len()
                        );
                        tokens.push(argmax(&logits));
                    }
                    Err(error) => break error,
                }
            };
            assert!(
                matches!(error, BackendError::ContextFull { needed, capacity }
                    if needed == limit + 1 && capacity == limit),
                "{error}"
            );
            assert_eq!(tokens.len(), limit - prompt + 1);
            let used = sequence.used_bytes().unwrap();
            match &first {
                None => first = Some((tokens, used)),
                Some((expected, before)) => {
                    let same = tokens
                        .iter()
                        .zip(expected)
                        .take_while(|(a, b)| a == b)
                        .count();
                    assert_eq!(same, tokens.len(), "round {round}: tokens part there");
                    assert_eq!(used, *before, "bytes on the device");
                }
            }
        }
        println!(
            "{} tokens twice, {} B held",
            limit - prompt + 1,
            first.unwrap().1
        );
    }
}

#[test]
fn dropping_a_model_gives_its_memory_back() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let golden = golden("tiny-a", "nf4");
    let model = open(&golden.model_dir);
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut sequence = cuda(&device, with(every(2, &model.0)), &model, 128);
        answer(&mut sequence, &golden.prompts[0].ids, 64, 2, 128);
        drop(sequence);
        held.push(Usage::of(&device, 0).now().unwrap());
    }
    // The first one may leave the driver's own memory behind.
    assert!(
        held.iter().skip(2).all(|&bytes| bytes == held[1]),
        "{held:?}"
    );
}

#[test]
fn the_budget_is_a_ceiling_or_an_error_with_both_numbers() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let golden = golden("tiny-a", "nf4");
    let model = open(&golden.model_dir);
    let prompt = golden.prompts.iter().find(|p| p.ids.len() == 65).unwrap();
    let run = |vram_bytes: Option<u64>, residency: Residency| -> Result<(u64, u64, usize)> {
        let options = CudaOptions {
            vram_bytes,
            prefill: exact(Some(64)),
            ..with(residency)
        };
        let mut sequence = load(&device, options, &model, 256)?;
        let loaded = sequence.used_bytes()?;
        let (_, tokens) = answer(&mut sequence, &prompt.ids, 65, 16, 256);
        assert_eq!(tokens, prompt.greedy[..16], "{vram_bytes:?}");
        Ok((loaded, sequence.used_bytes()?, sequence.resident_experts()))
    };
    // The least that must be there, with an expert or two and without.
    let (bare, ..) = run(None, Residency::Nothing).unwrap();
    for budget in [1, 1 << 20, bare / 2] {
        match run(Some(budget), Residency::Fill) {
            Err(
                error @ BackendError::DoesNotFit {
                    needed,
                    budget: told,
                },
            ) => {
                assert_eq!(told, budget);
                assert!(needed > budget, "{error}");
                let text = error.to_string();
                assert!(text.contains(&needed.to_string()), "{text}");
                assert!(text.contains(&budget.to_string()), "{text}");
            }
            other => panic!("{other:?} within {budget}"),
        }
    }
    let experts = model.0.num_layers() * model.0.moe.num_experts;
    let mut residents = Vec::new();
    for more in [56 << 20, (56 << 20) + 500_000, 64 << 20, 256 << 20] {
        let budget = bare + more;
        let (loaded, used, resident) = run(Some(budget), Residency::Fill).unwrap();
        assert!(
            loaded <= budget && used <= budget,
            "{loaded}, then {used} of {budget}"
        );
        assert!(used <= loaded + SLACK_BYTES, "{loaded}, then {used}");
        residents.push(resident);
    }
    assert!(residents.is_sorted(), "{residents:?}");
    assert_eq!(residents.last(), Some(&experts));
    // More experts asked for than fit is an error too. A GPU's driver takes pages, in which a few have
    // room that no figure shows.
    let more = if is_emulated(&device) { 48 } else { 40 };
    let error = run(Some(bare + (more << 20)), every(1, &model.0)).unwrap_err();
    if is_emulated(&device) {
        assert!(error.to_string().contains(&experts.to_string()), "{error}");
    }
}

#[test]
fn only_a_tie_of_experts_excuses_logits_that_differ() {
    let step = |ids: [u16; 2], weights: [f32; 2], logit: f32| Step {
        logits: vec![0.0, logit],
        routing: vec![
            Routing {
                num_experts_per_tok: 2,
                topk_ids: vec![7, 3],
                topk_weights: vec![0.6, 0.4],
            },
            Routing {
                num_experts_per_tok: 2,
                topk_ids: ids.to_vec(),
                topk_weights: weights.to_vec(),
            },
        ],
    };
    let same = step([1, 2], [0.6, 0.4], 1.0);
    let compare = |found: Step| compare_steps(&[same.clone(), found], &vec![same.clone(); 2], 0.1);

    let near = compare(step([2, 1], [0.4, 0.6], 1.05)).unwrap();
    assert!(near.steps == 2 && near.parted.is_none(), "{near:?}");
    assert!(near.diff > 0.04 && near.diff < 0.06, "{near:?}");
    let reason = compare(step([1, 2], [0.6, 0.4], 1.2)).unwrap_err();
    assert!(reason.contains("step 1: the same experts"), "{reason}");

    let tie = compare(step([1, 5], [0.6, 0.4002], 9.0)).unwrap();
    let parted = tie.parted.as_ref().unwrap();
    assert_eq!((tie.steps, parted.step, parted.layer), (1, 1, 1));
    assert!(parted.gap > 4e-4 && parted.gap < 6e-4, "{tie:?}");
    for no_tie in [
        ([1, 5], [0.6, 0.401]),
        // Not at the boundary: expert 1 was far from it.
        ([5, 2], [0.6, 0.4]),
        ([5, 6], [0.6, 0.4]),
        ([1, 5], [0.6, f32::NAN]),
    ] {
        let reason = compare(step(no_tie.0, no_tie.1, 1.0)).unwrap_err();
        assert!(reason.contains("step 1, layer 1"), "{reason}");
    }
}

#[test]
fn experts_anywhere_and_a_borrowed_workspace_give_the_same_logits() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let model = open(&tiny_moe());
    let (layers, experts) = (model.0.num_layers(), model.0.moe.num_experts);
    let ids = tiny_moe_text(if is_emulated(&device) { 49 } else { 300 });
    let all = layers * experts;
    let small = |residency: Residency| CudaOptions {
        prefill: exact(Some(24)),
        ..with(residency)
    };
    let emulated = is_emulated(&device);
    let run = |options: CudaOptions, twice: bool| {
        let mut sequence = cuda(&device, options, &model, 512);
        let used = sequence.used_bytes().unwrap();
        let resident = sequence.resident_experts();
        // The last logits of a prompt, whose experts all go to the GPU, greedy tokens, and the steps
        // after the prompt, which the CPU takes part in.
        let answer = |sequence: &mut One<Cuda>| {
            sequence.reset(512).unwrap();
            let last = ids.len() - 1;
            let logits = sequence
                .forward(&ids, last..last + 1, &mut |_, _, _| {})
                .unwrap();
            let n = if emulated { 2 } else { 20 };
            let (tokens, mut steps) = greedy_steps(sequence, &logits, n);
            steps.push(step(sequence, ids[0]));
            (logits, tokens, steps)
        };
        let first = answer(&mut sequence);
        // What prefill borrowed is back.
        assert_eq!(sequence.resident_experts(), resident);
        let now = sequence.used_bytes().unwrap();
        assert!(now.abs_diff(used) <= SLACK_BYTES, "{used}, then {now}");
        if twice {
            let second = answer(&mut sequence);
            let bits = |(logits, _, steps): &(Vec<f32>, Vec<u32>, Vec<Step>)| -> Vec<u32> {
                let of_steps = steps.iter().flat_map(|step| &step.logits);
                logits.iter().chain(of_steps).map(|x| x.to_bits()).collect()
            };
            let same = bits(&first) == bits(&second) && first.1 == second.1;
            assert!(same, "a second time");
        }
        (first, used, resident)
    };
    // All experts in slots, and a workspace beside them.
    let ((expected, tokens, steps), own_used, resident) = run(small(every(1, &model.0)), !emulated);
    assert_eq!(resident, all);
    let check = |name: &str, options: CudaOptions, count: Option<usize>| -> (u64, usize) {
        let borrows = name.starts_with("borrowed");
        let ((logits, found, own_steps), used, resident) = run(options, borrows || !emulated);
        // A prompt's experts that are not in VRAM are computed by the CPU, too.
        let bound = if resident == all && !borrows {
            SAME
        } else {
            SAME_BESIDE_CPU
        };
        let diff = max_diff(&logits, &expected);
        println!("{name}: {resident} of {all} in VRAM, the prompt's logits differ by {diff:.1e}");
        assert!(
            diff <= bound,
            "{name}: the prompt's logits differ by {diff}"
        );
        assert_eq!(found, tokens, "{name}");
        let compared = compare_steps(&own_steps, &steps, bound);
        let compared = compared.unwrap_or_else(|reason| panic!("{name}: {reason}"));
        println!(
            "{name}: those of {} of {} steps by {:.1e}",
            compared.steps,
            steps.len(),
            compared.diff
        );
        if let Some(Tie { step, layer, gap }) = compared.parted {
            println!(
                "{name}: experts tie by {gap:.1e} at step {step}, layer {layer}; then only tokens"
            );
        }
        assert!(
            count.is_none_or(|count| count == resident),
            "{name}: {resident} resident"
        );
        (used, resident)
    };
    // As many slots, but a budget without room for a workspace beside them, so it is borrowed.
    let tight = CudaOptions {
        vram_bytes: Some(own_used + (48 << 20) - (3 << 20)),
        ..small(Residency::Fill)
    };
    let (borrowed_used, _) = check("borrowed workspace", tight, Some(all));
    if is_emulated(&device) {
        assert!(
            borrowed_used < own_used,
            "{borrowed_used} of {own_used}: nothing is borrowed"
        );
    }
    check(
        "every third",
        small(every(3, &model.0)),
        Some(all.div_ceil(3)),
    );
    if !emulated {
        check("none", small(Residency::Nothing), Some(0));
        let last_layer = (0..experts).map(|e| (layers - 1, e)).collect();
        check(
            "one layer",
            small(Residency::Exactly(last_layer)),
            Some(experts),
        );
        let chunk = CudaOptions {
            prefill: exact(Some(512)),
            ..with(Residency::Fill)
        };
        check("one chunk", chunk, Some(all));
    }

    // The least wanted ones are left out, and what prefill borrows is in use; so many slots are
    // there that it borrows.
    let lists: Vec<Vec<u16>> = (0..layers)
        .map(|l| {
            (0..experts as u16)
                .rev()
                .filter(|e| e % 3 != l as u16 % 3)
                .collect()
        })
        .collect();
    let per_expert = (own_used - {
        let sequence = cuda(&device, small(Residency::Nothing), &model, 512);
        sequence.used_bytes().unwrap()
    }) / all as u64;
    let budget = borrowed_used + (48 << 20) - 30 * per_expert;
    let options = CudaOptions {
        vram_bytes: Some(budget),
        ..small(Residency::Preferred(lists))
    };
    let (used, resident) = check("most wanted ones", options, None);
    assert!(used <= budget, "{used} of {budget}");
    if is_emulated(&device) {
        assert!(resident < all && resident > all - 40, "{resident} of {all}");
    }
    check(
        "not all of few",
        CudaOptions {
            vram_bytes: Some(budget - 150 * per_expert),
            ..small(Residency::Fill)
        },
        None,
    );
}
