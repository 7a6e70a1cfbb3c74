//! The token loop: ids that take the place of sampled ones.

mod support;

use std::sync::atomic::AtomicBool;

use moectl::backend::cpu::CpuPrecision;
use moectl::engine::generate::{GenerateOptions, Generation, Observer};
use moectl::engine::sampler::SamplingParams;
use moectl::engine::{BackendChoice, Engine, GpuOptions, LoadOptions};
use moectl::model::Source;

fn engine() -> Engine {
    let folder = support::data("goldens/tiny-c/nf4");
    let source = Source::resolve(Some(folder.to_str().unwrap())).unwrap();
    let options = LoadOptions {
        backend: BackendChoice::Cpu,
        threads: Some(1),
        cpu_precision: CpuPrecision::default(),
        gpu: GpuOptions::default(),
        kv_dtype: None,
        progress: &|_, _| {},
        max_tokens: 64,
    };
    Engine::load(&source, &options).unwrap()
}

const PROMPT: [u32; 5] = [5, 6, 7, 80, 9];

/// Twelve tokens after [`PROMPT`], and the text as it came in pieces.
fn generate(
    engine: &mut Engine,
    sampling: &SamplingParams,
    logprobs: usize,
    forced: &[u32],
) -> (Generation, String) {
    generate_after(&PROMPT, 12, engine, sampling, logprobs, forced)
}

fn generate_after(
    prompt: &[u32],
    max_new_tokens: usize,
    engine: &mut Engine,
    sampling: &SamplingParams,
    logprobs: usize,
    forced: &[u32],
) -> (Generation, String) {
    engine.reset(64).unwrap();
    let options = GenerateOptions {
        max_new_tokens,
        sampling: sampling.clone(),
        stop: Vec::new(),
        ignore_eos: true,
        logprobs,
        forced: forced.to_vec(),
    };
    let mut text = String::new();
    let mut observer = Observer {
        on_text: &mut |piece| text.push_str(piece),
        on_prefill: &mut |_| {},
        on_routing: &mut |_, _, _| {},
    };
    let never = AtomicBool::new(false);
    let generation = engine.generate(prompt, &options, &never, &mut observer);
    (generation.unwrap(), text)
}

/// Greedy, drawn from the best logits, and with penalties, which need all logits and what came before.
fn samplings() -> [SamplingParams; 3] {
    let greedy = SamplingParams::default();
    [
        greedy.clone(),
        SamplingParams {
            temperature: 1.0,
            top_k: 20,
            seed: 3,
            ..greedy.clone()
        },
        SamplingParams {
            repetition_penalty: 1.3,
            frequency_penalty: 0.5,
            ..greedy
        },
    ]
}

#[test]
fn forcing_the_sampled_tokens_changes_nothing() {
    let mut engine = engine();
    for sampling in samplings() {
        for logprobs in [0, 3] {
            let (free, text) = generate(&mut engine, &sampling, logprobs, &[]);
            let fed = engine.tokens().to_vec();
            assert_eq!(fed, [&PROMPT, &free.token_ids[..11]].concat());
            for forced in [12, 5] {
                let forced = &free.token_ids[..forced];
                let (found, found_text) = generate(&mut engine, &sampling, logprobs, forced);
                assert_eq!(found.token_ids, free.token_ids, "{sampling:?}");
                assert_eq!((&found.text, &found_text), (&free.text, &text));
                assert_eq!(found.logprobs, free.logprobs);
                assert_eq!(engine.tokens(), fed);
            }
        }
    }
}

#[test]
fn other_forced_tokens_are_fed_and_the_rest_is_sampled_after_them() {
    let mut engine = engine();
    for sampling in samplings() {
        let (free, _) = generate(&mut engine, &sampling, 0, &[]);
        let forced: Vec<u32> = free.token_ids[..6].iter().map(|id| id + 1).collect();
        let (found, _) = generate(&mut engine, &sampling, 4, &forced);
        assert_eq!(found.token_ids.len(), 12);
        assert_eq!(found.token_ids[..6], forced);
        assert_eq!(found.timings.inter_token.len(), 11);
        assert_eq!(
            engine.tokens(),
            [&PROMPT, &found.token_ids[..11]].concat(),
            "{sampling:?}"
        );
        // The first logits do not know of them yet.
        if sampling == SamplingParams::default() {
            assert_eq!(found.logprobs[0][0].id, free.token_ids[0]);
            for (best, id) in found.logprobs[6..].iter().zip(&found.token_ids[6..]) {
                assert_eq!(best[0].id, *id);
            }
        }
    }
}

/// The repetition penalty counts prompts too: forced tokens must weigh as if they had stood there.
#[test]
fn penalties_count_forced_tokens_and_not_those_they_replace() {
    let mut engine = engine();
    let greedy = SamplingParams::default();
    let repetition = SamplingParams {
        repetition_penalty: 1e6,
        ..greedy.clone()
    };
    let (wanted, _) = generate(&mut engine, &greedy, 0, &[]);
    // What the model would say without a penalty it must not say once it was forced.
    let forced = &wanted.token_ids[6..12];
    let (found, _) = generate(&mut engine, &repetition, 0, forced);
    let prompt = [&PROMPT, forced].concat();
    let (expected, _) = generate_after(&prompt, 6, &mut engine, &repetition, 0, &[]);
    assert_eq!(found.token_ids[6..], expected.token_ids);
    for presence in [true, false] {
        let generated_only = SamplingParams {
            presence_penalty: if presence { 1e6 } else { 0.0 },
            frequency_penalty: if presence { 0.0 } else { 1e6 },
            ..greedy.clone()
        };
        let (found, _) = generate(&mut engine, &generated_only, 0, forced);
        let (forced, free) = found.token_ids.split_at(6);
        assert!(free.iter().all(|id| !forced.contains(id)), "{found:?}");
    }
}
