//! Many sequences on one device: each is as if it were alone, wherever experts are.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
#[path = "gpu/sequence.rs"]
mod sequence;
mod support;

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::{CudaOptions, Residency};
use moectl::backend::{BackendError, DeviceMemory, Executor, KvDtype, ModelShape};
use moectl::planning::Footprint;
use moectl::planning::footprint::KvDtype as Kv;
use sequence::*;
use support::sequences::{bits, check_against_fresh_sequences, feed};
use support::*;

#[test]
fn sequences_on_a_device_are_as_if_each_were_alone() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let model = open(&golden("tiny-b", "nf4").model_dir);
    // The emulator takes a twentieth of a second for a step.
    let sizes = if is_emulated(&device) {
        [1, 40, 50]
    } else {
        [4, 250, 100]
    };
    let options = |kv_dtype, residency| CudaOptions {
        threads: Some(2),
        kv_dtype: Some(kv_dtype),
        prefill: exact(Some(24)),
        residency,
        ..CudaOptions::default()
    };
    for (kv_dtype, residency) in [
        (KvDtype::F16, every(2, &model.0)),
        (KvDtype::Int8, Residency::Fill),
    ] {
        let options = || options(kv_dtype, residency.clone());
        let mut tested = cuda(&device, options(), &model, 64);
        let mut naive = cuda(&device, options(), &model, 64);
        check_against_fresh_sequences(&mut tested.executor, &mut naive.executor, sizes);
    }
}

#[test]
fn snapshots_hold_whole_pages_once_and_outlive_the_states_they_are_of() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let model = open(&golden("tiny-a", "nf4").model_dir);
    let options = CudaOptions {
        prefill: exact(Some(128)),
        ..with(Residency::Fill)
    };
    let mut executor = cuda(&device, options, &model, 64).executor;
    executor.reserve(2, 400).unwrap();
    let id = executor.new_sequence().unwrap();
    let ids: Vec<u32> = (0..300).map(|i| i * 5 % 90).collect();
    feed(&mut executor, id, &ids).unwrap();
    let first = executor.snapshot(id).unwrap();
    let expected = bits(&feed(&mut executor, id, &[7]).unwrap());
    let second = executor.snapshot(id).unwrap();
    assert_eq!((first.pages().len(), second.pages().len()), (2, 2));
    assert_eq!(first.pages()[0], second.pages()[0]);
    assert_ne!(first.pages()[1].id, second.pages()[1].id);
    let page = first.pages()[0].bytes;
    let host = executor.sequence_bytes().host;
    assert_eq!(host, 2 * first.own_bytes() + 3 * page);

    // Of another capacity, after the states there were are gone.
    executor.reserve(1, 900).unwrap();
    assert_eq!(executor.resident(), (0, 1));
    let id = executor.restore(&first).unwrap();
    assert_eq!(bits(&feed(&mut executor, id, &[7]).unwrap()), expected);
    drop((first, second));
    executor.drop_sequence(id);
    assert_eq!(executor.sequence_bytes().host, 0);
}

/// Bytes that the layout of a sequence's states is rounded up by: its parts begin on 256.
fn rounding(shape: &ModelShape) -> u64 {
    256 * 6 * shape.num_layers() as u64
}

#[test]
fn sequences_take_the_memory_that_plans_have_for_them() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    for (name, layout) in [("tiny-b", "nf4"), ("qwen3_moe", "bf16"), ("tiny-c", "bf16")] {
        let model = open(&golden(name, layout).model_dir);
        let footprint = Footprint::published(&model.0.numbers());
        for (kv_dtype, planned) in [(KvDtype::F16, Kv::F16), (KvDtype::Int8, Kv::Int8)] {
            let options = CudaOptions {
                kv_dtype: Some(kv_dtype),
                ..with(Residency::Nothing)
            };
            let mut executor = cuda(&device, options, &model, 64).executor;
            for (sequences, tokens) in [(1, 64), (4, 512)] {
                executor.reserve(sequences, tokens).unwrap();
                let held = executor.sequence_bytes().device as u64;
                let each = footprint.sequence_bytes(tokens as u64, planned);
                let most = sequences as u64 * (each + rounding(&model.0));
                let least = sequences as u64 * each;
                assert!(
                    (least..=most).contains(&held),
                    "{name}, {sequences} of {tokens}: {held} bytes, planned {least}"
                );
            }
        }
    }
}

#[test]
fn room_for_more_sequences_is_taken_from_expert_slots_or_refused() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let model = open(&golden("tiny-a", "nf4").model_dir);
    let mut executor = cuda(&device, with(Residency::Fill), &model, 256).executor;
    let (one, used) = (
        executor.sequence_bytes().device,
        executor.used_bytes().unwrap(),
    );
    executor.reserve(3, 256).unwrap();
    assert_eq!(executor.sequence_bytes().device, 3 * one);
    if is_emulated(&device) {
        assert_eq!(executor.used_bytes().unwrap(), used + 2 * one as u64);
    }
    let held = executor.held().unwrap();
    assert_eq!(held.sequence_bytes, 3 * one as u64);
    drop(executor);

    let options = CudaOptions {
        vram_bytes: Some(used + (56 << 20)),
        ..with(Residency::Fill)
    };
    let One { mut executor, id } = cuda(&device, options, &model, 256);
    let resident = executor.resident_experts();
    let error = executor.reserve(100_000, 256).unwrap_err();
    assert!(matches!(error, BackendError::DoesNotFit { .. }), "{error}");
    // What there was is still there.
    assert_eq!(executor.resident_experts(), resident);
    feed(&mut executor, id, &[1, 2, 3]).unwrap();
}
