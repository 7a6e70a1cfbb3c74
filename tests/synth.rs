//! Synthetic models: reproducible, loadable by every backend, labelled, and refused when impossible.

mod support;

use moectl::backend::cpu::{Cpu, CpuOptions};
use moectl::backend::reference::Reference;
use moectl::formats::Checkpoint;
use moectl::model::{LogitRows, Runner, Sequence, Source, weights};
use sha2::{Digest, Sha256};
use support::{argmax, greedy};

/// Small enough for a test, with the routing of the default shape: many experts, ten a token.
const SPEC: &str = "synth:qwen3-next-80b-a3b?layers=4&experts=64&hidden-size=256&vocab-size=8192\
    &moe-intermediate-size=64&shared-expert-intermediate-size=64&linear-key-heads=2\
    &linear-value-heads=4&linear-key-head-dim=64&linear-value-head-dim=64&attention-heads=2\
    &key-value-heads=1&head-dim=64";

fn hash(checkpoint: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    for name in checkpoint.names() {
        hash.update(name);
        hash.update(&*checkpoint.tensor(name).unwrap().data);
    }
    format!("{:x}", hash.finalize())
}

#[test]
fn one_seed_gives_one_model_whatever_the_threads_and_another_seed_another() {
    let make = |spec: &str, threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| hash(&Source::resolve(Some(spec)).unwrap().checkpoint().unwrap()))
    };
    let first = make(SPEC, 1);
    assert_eq!(first, make(SPEC, 3));
    assert_ne!(first, make(&format!("{SPEC}&seed=7"), 1));
}

#[test]
fn both_backends_run_it_to_the_same_tokens_and_sane_logits() {
    let source = Source::resolve(Some(SPEC)).unwrap();
    let config = source.config().unwrap();
    assert!(config.synthetic, "a synthetic model says so");
    let weights = weights::load(&source.checkpoint().unwrap(), &config).unwrap();
    let prompt: Vec<u32> = (5..25).collect();
    let cpu = Cpu::new(
        config.shape.clone(),
        &weights,
        CpuOptions::default(),
        &|_, _| {},
    );
    let mut cpu = Sequence::new(cpu.unwrap(), 64).unwrap();
    let logits = cpu
        .forward(&prompt, LogitRows::Last, &mut |_, _, _| {})
        .unwrap();
    assert!(logits.iter().all(|l| l.is_finite() && l.abs() < 100.0));
    let tokens = greedy(&mut cpu, &logits, 16);

    let reference = Reference::new(config.shape.clone(), weights);
    let mut reference = Sequence::new(reference, 64).unwrap();
    let logits = reference
        .forward(&prompt, LogitRows::Last, &mut |_, _, _| {})
        .unwrap();
    assert_eq!(argmax(&logits), tokens[0]);
    assert_eq!(greedy(&mut reference, &logits, 16), tokens);
}

#[test]
fn impossible_specs_are_refused_with_the_field() {
    for (spec, expected) in [
        ("synth:llama", "llama"),
        ("synth:tiny?layers=0", "layers"),
        ("synth:tiny?colour=blue", "colour"),
        ("synth:tiny?experts-per-tok=100", "num_experts_per_tok"),
    ] {
        let refused = Source::resolve(Some(spec)).and_then(|source| source.config().map(drop));
        let error = refused.expect_err(spec).to_string();
        assert!(error.contains(expected), "{spec}: {error}");
    }
}
