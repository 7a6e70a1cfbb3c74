//! The cpu backend, every instruction set and precision of it, against what transformers computed.

mod support;

use moectl::backend::cpu::isa::Isa;
use moectl::backend::cpu::{Cpu, CpuOptions, CpuPrecision};
use moectl::backend::reference::Reference;
use moectl::backend::{BlockExecutor, LogitRows};
use moectl::backend::{KvDtype, ModelShape, ModelWeights};
use support::*;

/// Largest difference of a logit.
fn tolerance(precision: CpuPrecision) -> f32 {
    match precision {
        CpuPrecision::F32 => 1e-3,
        CpuPrecision::Int16 => 5e-3,
        CpuPrecision::Int8 => unreachable!("is only reported"),
    }
}

/// Below `DECIDED_GAP`, integer products may pick the other expert. They do not on these prompts, but
/// two of them are then 0.011 away from the recorded logits.
const UNDECIDED_TOLERANCE: f32 = 0.02;

fn cpu(
    isa: Isa,
    precision: CpuPrecision,
    threads: Option<usize>,
    (shape, weights): &(ModelShape, ModelWeights),
) -> One<BlockExecutor<Cpu>> {
    let options = CpuOptions {
        threads,
        precision,
        kv_dtype: KvDtype::F32,
    };
    with(isa, options, (shape, weights))
}

fn with(
    isa: Isa,
    options: CpuOptions,
    (shape, weights): (&ModelShape, &ModelWeights),
) -> One<BlockExecutor<Cpu>> {
    let backend = Cpu::with_isa(isa, shape.clone(), weights, options, &|_, _| {}).unwrap();
    one(backend, 4096)
}

fn each_kind() -> impl Iterator<Item = (Isa, CpuPrecision)> {
    Isa::available()
        .into_iter()
        .flat_map(|isa| [CpuPrecision::F32, CpuPrecision::Int16].map(|precision| (isa, precision)))
}

#[test]
fn logits_routing_and_greedy_tokens_equal_transformers() {
    for &(model, layout) in F32_GOLDENS {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        for (isa, precision) in each_kind() {
            let mut sequence = cpu(isa, precision, None, &model);
            for prompt in &golden.prompts {
                let what = format!(
                    "{} {} {} {precision:?}",
                    golden.name,
                    prompt.name,
                    isa.name()
                );
                let expected = golden.f32s(&format!("logits.{}", prompt.name));
                let vocab = expected.len() / prompt.ids.len();
                sequence.reset(4096).unwrap();
                let (logits, routing) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
                let exact = precision == CpuPrecision::F32;
                let bound = match exact || prompt.router_gap > DECIDED_GAP {
                    true => tolerance(precision),
                    false => UNDECIDED_TOLERANCE,
                };
                let diff = max_diff(&logits, &expected);
                println!("{what}: {diff:.4} of {bound}");
                assert!(diff <= bound, "{what}: logits differ by {diff}");
                for (layer, routing) in routing.iter().enumerate() {
                    let ids = golden.i32s(&format!("router.{}.{layer}.idx", prompt.name));
                    let unequal = unequal_expert_sets(routing, &ids);
                    assert_eq!(unequal, 0, "{what} layer {layer}");
                }
                let last = &logits[logits.len() - vocab..];
                assert_eq!(greedy(&mut sequence, last, 32), prompt.greedy, "{what}");
            }
        }
    }
}

#[test]
fn cutting_the_prompt_changes_no_bit() {
    let kinds = || {
        let int8 = Isa::available()
            .into_iter()
            .map(|isa| (isa, CpuPrecision::Int8));
        each_kind().chain(int8)
    };
    for &(model, layout) in &[("tiny-a", "nf4"), ("tiny-b", "nf4"), ("tiny-c", "bf16")] {
        let golden = golden(model, layout);
        let model = open(&golden.model_dir);
        let prompt = golden.prompts.iter().max_by_key(|p| p.ids.len()).unwrap();
        for (isa, precision) in kinds() {
            let mut sequence = cpu(isa, precision, None, &model);
            let (whole, _) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            for piece in [1, 3, 7, 64] {
                sequence.reset(4096).unwrap();
                let (logits, _) = prefill(&mut sequence, &prompt.ids, piece);
                assert!(
                    logits == whole,
                    "{} {} {precision:?} in pieces of {piece}",
                    golden.name,
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let golden = golden("tiny-a", "nf4");
    let model = open(&golden.model_dir);
    let prompt = &golden.prompts[0];
    let isa = Isa::detect().unwrap();
    for precision in [CpuPrecision::F32, CpuPrecision::Int16, CpuPrecision::Int8] {
        let run = |threads| {
            let mut sequence = cpu(isa, precision, threads, &model);
            let (mut logits, _) = prefill(&mut sequence, &prompt.ids, prompt.ids.len());
            for &token in &prompt.greedy {
                let mut ignore = |_: usize, _: usize, _: &moectl::backend::Routing| {};
                let next = sequence.forward(&[token], LogitRows::Last, &mut ignore);
                logits.extend(next.unwrap());
            }
            logits
        };
        assert!(run(Some(1)) == run(None));
    }
}

#[test]
fn built_in_model_reproduces_its_recorded_prompts() {
    let golden = json(data("tiny-moe/golden.json"));
    let model = open(&tiny_moe());
    for (isa, precision) in each_kind().filter(|(isa, _)| isa.name() != "scalar") {
        let mut sequence = cpu(isa, precision, None, &model);
        for (name, prompt) in golden["prompts"].as_object().unwrap() {
            let ids = ids(&prompt["ids"]);
            sequence.reset(4096).unwrap();
            let mut ignore = |_: usize, _: usize, _: &moectl::backend::Routing| {};
            let logits = sequence
                .forward(&ids, LogitRows::Last, &mut ignore)
                .unwrap();
            let expected = prompt["top_ids"].as_array().unwrap().iter();
            for (id, logit) in expected.zip(prompt["top_logits"].as_array().unwrap()) {
                let found = logits[id.as_u64().unwrap() as usize];
                let diff = (found - logit.as_f64().unwrap() as f32).abs();
                assert!(diff <= 0.02, "{name}: logit of {id} differs by {diff}");
            }
            let tokens = greedy(&mut sequence, &logits, 48);
            assert_eq!(tokens, support::ids(&prompt["greedy_ids"]), "{name}");
        }
    }
}

/// Mean over positions of KL(reference || cpu).
fn mean_kl(expected: &[f32], found: &[f32], vocab: usize) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        logits
            .iter()
            .map(|&l| f64::from(l - max) - sum.ln())
            .collect()
    };
    let rows = expected.chunks_exact(vocab).zip(found.chunks_exact(vocab));
    let total: f64 = rows
        .map(|(p, q)| {
            let (p, q) = (log_softmax(p), log_softmax(q));
            p.iter()
                .zip(&q)
                .map(|(p, q)| p.exp() * (p - q))
                .sum::<f64>()
        })
        .sum();
    total / (expected.len() / vocab) as f64
}

#[test]
fn held_out_text_diverges_from_the_reference_by_less_than_the_target() {
    let heldout = json(data("tiny-moe/heldout_tokens.json"));
    let tokens = ids(&heldout["tokens"]);
    let len = heldout["row_tokens"].as_u64().unwrap() as usize;
    let model = open(&tiny_moe());
    let vocab = model.0.vocab_size;
    let mut reference = one(Reference::new(model.0.clone(), model.1.clone()), len);
    let isa = Isa::detect().unwrap();
    // Of int8 the divergence is only reported; a bound tells lost precision from a broken kernel.
    let targets = [
        (CpuPrecision::F32, KvDtype::F32, 1e-5),
        (CpuPrecision::Int16, KvDtype::F32, 1e-4),
        (CpuPrecision::Int16, KvDtype::F16, 1e-4),
        (CpuPrecision::Int16, KvDtype::Int8, 0.01),
        (CpuPrecision::Int8, KvDtype::F32, 0.01),
    ];
    for (precision, kv_dtype, target) in targets {
        let options = CpuOptions {
            threads: None,
            precision,
            kv_dtype,
        };
        let mut sequence = with(isa, options, (&model.0, &model.1));
        let mut total = 0.0;
        let rows = 4;
        for row in tokens.chunks(len).take(rows) {
            reference.reset(len).unwrap();
            sequence.reset(len).unwrap();
            let (expected, _) = prefill(&mut reference, row, len);
            let (found, _) = prefill(&mut sequence, row, len);
            total += mean_kl(&expected, &found, vocab);
        }
        let kl = total / rows as f64;
        let what = format!("{} with {kv_dtype} KV", precision.name());
        println!("{what}: mean KL {kl:.2e}");
        assert!(kl < target, "{what}: mean KL {kl}, target {target}");
    }
}
