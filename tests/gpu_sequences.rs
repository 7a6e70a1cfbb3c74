//! Many sequences on one device: each is as if it were alone, wherever experts are.
//!
//! On a machine without a GPU the emulator runs the same kernels, if it is built in.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod gpu;
#[path = "gpu/sequence.rs"]
mod sequence;
mod support;

use gpu::{is_emulated, open_device};
use moectl::backend::cuda::abi::MAX_BATCH;
use moectl::backend::cuda::{CudaOptions, Residency};
use moectl::backend::{
    BackendError, DeviceMemory, Executor, KvDtype, LogitRows, ModelShape, NextLogits, Piece,
    Routing, RunEvents, SlotChange, Wanted,
};
use moectl::planning::footprint::KvDtype as Kv;
use moectl::planning::{Footprint, Offer};
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
        [1, 100, 50]
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

/// Sequences of a step, and where experts are.
fn placements() -> Vec<(&'static str, &'static str, CudaOptions)> {
    let split = CudaOptions {
        // Of two misses one over PCIe, of three one, of four two.
        split: Some(vec![0, 0, 1, 1, 2]),
        look_ahead: Some(true),
        ..with(Residency::Nothing)
    };
    let in_ram = CudaOptions {
        head_in_ram: true,
        parts: Some(2),
        ..with(Residency::Nothing)
    };
    let int8 = CudaOptions {
        kv_dtype: Some(KvDtype::Int8),
        ..with(Residency::Fill)
    };
    vec![
        ("tiny-b", "nf4", int8),
        ("tiny-b", "nf4", split),
        ("tiny-c", "bf16", in_ram),
        ("tiny-a", "bf16", with(Residency::Fill)),
    ]
}

#[test]
fn a_token_has_the_same_bits_whoever_shares_its_step() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    for (name, checkpoint, options) in placements() {
        let model = open(&golden(name, checkpoint).model_dir);
        let vocab = model.0.vocab_size as u32;
        let ids = |sequence: usize| -> Vec<u32> {
            let ids = (0..2 + sequence % 3).map(|i| (31 * sequence + 7 * i + 3) as u32 % vocab);
            ids.collect()
        };
        let mut executor = cuda(&device, options, &model, 64).executor;
        executor.reserve(MAX_BATCH, 64).unwrap();
        let all = 0..MAX_BATCH;
        let alone: Vec<Vec<Vec<u32>>> = (all.clone())
            .map(|sequence| {
                let id = executor.new_sequence().unwrap();
                let mut step = |id_fed| bits(&feed(&mut executor, id, &[id_fed]).unwrap());
                let found = ids(sequence).into_iter().map(&mut step).collect();
                executor.drop_sequence(id);
                found
            })
            .collect();
        let sequences: Vec<_> = (all.clone())
            .map(|_| executor.new_sequence().unwrap())
            .collect();
        for (step, together) in [8, 5, 3].into_iter().enumerate() {
            let there: Vec<usize> = all.clone().filter(|&s| ids(s).len() > step).collect();
            for some in there.chunks(together) {
                let fed: Vec<[u32; 1]> = some.iter().map(|&s| [ids(s)[step]]).collect();
                let pieces: Vec<Piece> = (some.iter().zip(&fed))
                    .map(|(&s, ids)| Piece::new(sequences[s], ids, LogitRows::Last))
                    .collect();
                let mut routed = vec![0; pieces.len()];
                let found = executor.run(&pieces, &mut Counting(&mut routed)).unwrap();
                let layers = model.0.num_layers();
                assert!(routed.iter().all(|&count| count == layers), "{routed:?}");
                for (&sequence, found) in some.iter().zip(found) {
                    assert_eq!(executor.position(sequences[sequence]).unwrap(), step + 1);
                    assert!(
                        bits(&all_logits(found)) == alone[sequence][step],
                        "{name} {checkpoint}: token {step} of sequence {sequence} with {some:?}"
                    );
                }
            }
        }
    }
}

/// Layers that were told of each piece.
struct Counting<'a>(&'a mut [usize]);

impl RunEvents for Counting<'_> {
    fn routed(&mut self, piece: usize, layer: usize, position: usize, routing: &Routing) {
        assert_eq!((layer, routing.tokens()), (self.0[piece], 1));
        assert!(position < 4);
        self.0[piece] += 1;
    }

    fn admit(&mut self, _: usize, _: usize, _: Offer<'_>) -> Vec<SlotChange> {
        Vec::new()
    }
}

fn all_logits(logits: NextLogits) -> Vec<f32> {
    match logits {
        NextLogits::All(logits) => logits,
        NextLogits::Best(_) => panic!("rows were wanted"),
    }
}

#[test]
fn best_logits_of_a_step_are_those_of_each_alone() {
    let _alone = alone();
    let Some(device) = open_device() else { return };
    let model = open(&golden("tiny-a", "nf4").model_dir);
    let mut executor = cuda(&device, with(Residency::Fill), &model, 64).executor;
    executor.reserve(6, 64).unwrap();
    let wanted = [Some(1), Some(40), None, Some(1000), Some(5)];
    let fed: Vec<[u32; 1]> = (0..wanted.len() as u32).map(|i| [11 * i + 2]).collect();
    let run = |executor: &mut dyn Executor, some: &[usize]| {
        let ids: Vec<_> = some
            .iter()
            .map(|_| executor.new_sequence().unwrap())
            .collect();
        let piece = |(&id, &i): (&_, &usize)| Piece {
            wanted: wanted[i].map_or(Wanted::Rows(0..1), Wanted::Best),
            ..Piece::new(id, &fed[i], LogitRows::None)
        };
        let pieces: Vec<Piece> = ids.iter().zip(some).map(piece).collect();
        let found = executor
            .run(&pieces, &mut Quiet(&mut |_, _, _| {}))
            .unwrap();
        drop(pieces);
        ids.into_iter().for_each(|id| executor.drop_sequence(id));
        found
    };
    // Where one wants all logits, all get them.
    for some in [&[0, 1, 4][..], &[0, 4, 1, 0], &[0, 1, 2, 3, 4]] {
        let together = run(&mut executor, some);
        for (&i, together) in some.iter().zip(together) {
            let alone = run(&mut executor, &[i]).remove(0);
            match (together, alone) {
                (NextLogits::All(all), NextLogits::Best(best)) => {
                    assert_eq!(all[best.id as usize].to_bits(), best.logit.to_bits());
                    assert!(all.iter().all(|&logit| logit <= best.logit));
                }
                (together, alone) => assert_eq!(together, alone, "{some:?}"),
            }
        }
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
