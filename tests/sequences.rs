//! Many sequences on one loaded model, block by block: each is as if it were alone.

mod support;

use moectl::backend::cpu::{Cpu, CpuOptions};
use moectl::backend::reference::Reference;
use moectl::backend::{Backend, BackendError, BlockExecutor, Executor, KvDtype, LogitRows, Piece};
use support::sequences::{bits, check_against_fresh_sequences, feed};
use support::*;

fn cpu(model: &str, kv_dtype: KvDtype) -> Cpu {
    let layout = if model == "qwen3_moe" { "bf16" } else { "nf4" };
    let (shape, weights) = open(&golden(model, layout).model_dir);
    let options = CpuOptions {
        threads: Some(2),
        kv_dtype,
        ..CpuOptions::default()
    };
    Cpu::new(shape, &weights, options, &|_, _| {}).unwrap()
}

fn reference(model: &str) -> Reference {
    let (shape, weights) = open(&golden(model, "nf4").model_dir);
    Reference::new(shape, weights)
}

fn executor<B: Backend>(backend: B) -> BlockExecutor<B> {
    BlockExecutor::new(backend, 1)
}

#[test]
fn sequences_of_the_cpu_backend_are_as_if_each_were_alone() {
    for kv_dtype in KvDtype::ALL {
        let mut tested = executor(cpu("tiny-b", kv_dtype));
        let mut naive = executor(cpu("tiny-b", kv_dtype));
        check_against_fresh_sequences(&mut tested, &mut naive, [4, 250, 70]);
    }
}

/// Without delta nets sequences can be cut anywhere.
#[test]
fn sequences_of_attention_alone_are_as_if_each_were_alone() {
    for kv_dtype in [KvDtype::F32, KvDtype::Int8] {
        let mut tested = executor(cpu("qwen3_moe", kv_dtype));
        let mut naive = executor(cpu("qwen3_moe", kv_dtype));
        check_against_fresh_sequences(&mut tested, &mut naive, [4, 250, 70]);
    }
}

#[test]
fn sequences_of_the_reference_are_as_if_each_were_alone() {
    let mut tested = executor(reference("tiny-a"));
    let mut naive = executor(reference("tiny-a"));
    check_against_fresh_sequences(&mut tested, &mut naive, [2, 60, 20]);
}

#[test]
fn snapshots_of_one_sequence_share_keys_and_values() {
    let mut executor = executor(cpu("tiny-b", KvDtype::F32));
    executor.reserve(2, 1024).unwrap();
    let id = executor.new_sequence().unwrap();
    let ids: Vec<u32> = (0..300).map(|i| i % 50).collect();
    feed(&mut executor, id, &ids).unwrap();
    let before = executor.sequence_bytes().host;
    let first = executor.snapshot(id).unwrap();
    assert_eq!(executor.sequence_bytes().host, before + first.own_bytes());
    feed(&mut executor, id, &[7]).unwrap();
    let second = executor.snapshot(id).unwrap();
    // Positions 256 to 300 are in a page that was written to since.
    let shared = |page| first.pages().contains(page);
    let all = second.pages().len();
    assert_eq!(
        second.pages().iter().filter(|page| shared(page)).count(),
        all * 2 / 3
    );
    drop((first, second));
    executor.drop_sequence(id);
    assert_eq!(executor.sequence_bytes().host, 0);
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_done() {
    let mut executor = executor(cpu("tiny-b", KvDtype::F32));
    executor.reserve(2, 64).unwrap();
    let [a, b] = [(); 2].map(|()| executor.new_sequence().unwrap());
    let error = executor.new_sequence().unwrap_err();
    assert!(matches!(error, BackendError::NoRoom { capacity: 2 }));
    let expected = bits(&feed(&mut executor, a, &[1, 2, 3]).unwrap());

    let [good, long] = [vec![1, 2, 3], vec![5; 65]];
    let pieces =
        |ids: [(_, &'static [u32]); 2]| ids.map(|(id, ids)| Piece::new(id, ids, LogitRows::Last));
    let long: &'static [u32] = long.leak();
    let good: &'static [u32] = good.leak();
    let quiet = &mut |_: usize, _: usize, _: &moectl::backend::Routing| {};
    for batch in [
        pieces([(b, good), (a, long)]),
        pieces([(b, good), (b, good)]),
    ] {
        assert!(executor.run(&batch, &mut Quiet(quiet)).is_err());
        assert_eq!(executor.position(b).unwrap(), 0);
    }
    let piece = Piece {
        wanted: moectl::backend::Wanted::Rows(2..4),
        ..Piece::new(b, good, LogitRows::None)
    };
    let error = executor.run(&[piece], &mut Quiet(quiet)).unwrap_err();
    assert!(error.to_string().contains("2 to 4"), "{error}");
    assert_eq!(bits(&feed(&mut executor, b, good).unwrap()), expected);

    let error = executor.truncate(a, 2).unwrap_err();
    assert!(error.to_string().contains("restore a snapshot"), "{error}");
    executor.truncate(a, 3).unwrap();
    let snapshot = executor.park(a).unwrap();
    let error = feed(&mut executor, a, good).unwrap_err();
    assert!(matches!(error, BackendError::UnknownSequence(id) if id == a));
    executor.reserve(1, 2).unwrap();
    let error = executor.restore(&snapshot).unwrap_err();
    assert!(matches!(
        error,
        BackendError::ContextFull {
            needed: 3,
            capacity: 2
        }
    ));

    let mut other = BlockExecutor::new(cpu("tiny-a", KvDtype::F32), 64);
    let error = other.restore(&snapshot).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
    let mut other = BlockExecutor::new(reference("tiny-b"), 64);
    let error = other.restore(&snapshot).unwrap_err();
    assert!(error.to_string().contains("another backend"), "{error}");
}
