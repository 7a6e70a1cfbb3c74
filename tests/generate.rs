//! The token loop, with ids that take the place of sampled ones, and sessions side by side.

mod support;

use std::sync::atomic::AtomicBool;

use moectl::backend::NextLogits;
use moectl::backend::cpu::CpuPrecision;
use moectl::engine::generate::{GenerateOptions, Generation, Observer};
use moectl::engine::sampler::SamplingParams;
use moectl::engine::session::Session;
use moectl::engine::{BackendChoice, Engine, GpuOptions, LoadOptions};
use moectl::model::Source;
use support::sequences::bits;

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

/// The bits of the last token's logits.
fn prefill(engine: &mut Engine, session: &mut Session, prompt: &[u32]) -> Vec<u32> {
    loop {
        let logits = engine.prefill_piece(session, prompt, &mut |_, _, _| {});
        if let Some(logits) = logits.unwrap() {
            return bits(&logits);
        }
    }
}

fn decode(engine: &mut Engine, session: &mut Session, id: u32) -> Vec<u32> {
    match engine.decode(session, id, None, &mut |_, _, _| {}).unwrap() {
        NextLogits::All(logits) => bits(&logits),
        NextLogits::Best(_) => panic!("all logits were wanted"),
    }
}

/// Logits of a prompt that nothing is known of.
fn cold(prompt: &[u32]) -> Vec<u32> {
    let mut engine = engine();
    engine.reserve(1, 256).unwrap();
    let mut session = engine.open(prompt, &[], 0).unwrap();
    assert!(session.tokens().is_empty());
    prefill(&mut engine, &mut session, prompt)
}

fn text(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * (2 * seed + 3) + seed) % 90).collect()
}

#[test]
fn a_turn_of_a_conversation_computes_its_rest_and_gives_the_bits_of_all_of_it() {
    let mut engine = engine();
    engine.reserve(1, 256).unwrap();
    let first = text(1, 70);
    let mut session = engine.open(&first, &[], 7).unwrap();
    prefill(&mut engine, &mut session, &first);
    for id in [4, 5, 6] {
        decode(&mut engine, &mut session, id);
    }
    assert_eq!(session.tokens().len(), 73);
    engine.close(session);

    let second = [&first[..], &[4, 5, 6, 8, 9]].concat();
    let mut session = engine.open(&second, &[], 7).unwrap();
    assert_eq!(session.tokens().len(), 73);
    assert_eq!(prefill(&mut engine, &mut session, &second), cold(&second));
    engine.close(session);
    // Another answer to the first prompt: its end is known, too.
    let other = [&first[..], &[30, 31]].concat();
    let mut session = engine.open(&other, &[], 7).unwrap();
    assert_eq!(session.tokens().len(), 70);
    assert_eq!(prefill(&mut engine, &mut session, &other), cold(&other));
    engine.close(session);
    // Nobody else learns of it.
    let session = engine.open(&second, &[], 8).unwrap();
    assert!(session.tokens().is_empty());
    engine.close(session);
    engine.set_prefix_cache(0);
    let session = engine.open(&second, &[], 7).unwrap();
    assert!(session.tokens().is_empty());
}

#[test]
fn beginnings_that_prompts_share_are_known_from_the_third_on_or_where_marked() {
    let mut engine = engine();
    engine.reserve(1, 256).unwrap();
    let systems: Vec<Vec<u32>> = (1..5).map(|seed| text(seed, 80)).collect();
    for round in 0..4u32 {
        for (i, system) in systems.iter().enumerate() {
            let marks: &[usize] = if i == 0 { &[80] } else { &[] };
            let prompt = [&system[..], &text(10 + round, 20)].concat();
            let mut session = engine.open(&prompt, marks, 0).unwrap();
            let known = session.tokens().len();
            let expected = if round >= 2 || (i == 0 && round == 1) {
                80
            } else {
                0
            };
            assert_eq!(known, expected, "system prompt {i}, round {round}");
            let logits = prefill(&mut engine, &mut session, &prompt);
            if round >= 2 {
                assert_eq!(logits, cold(&prompt));
            }
            engine.close(session);
        }
    }
    let counts = engine.prefix_cache().counts();
    assert_eq!(counts.found_tokens, 9 * 80);
    assert!(engine.prefix_cache().held_bytes() > 0);
}

#[test]
fn sessions_side_by_side_parked_and_given_up_are_as_if_each_were_alone() {
    let mut engine = engine();
    let prompts = [text(1, 30), text(2, 40), text(3, 20)];
    let alone: Vec<Vec<Vec<u32>>> = (prompts.iter())
        .map(|prompt| {
            engine.reserve(1, 128).unwrap();
            let mut session = engine.open(prompt, &[], 0).unwrap();
            let mut all = vec![prefill(&mut engine, &mut session, prompt)];
            all.extend((3..9).map(|id| decode(&mut engine, &mut session, id)));
            all
        })
        .collect();
    engine.set_prefix_cache(1 << 30);
    engine.reserve(2, 128).unwrap();
    let open = |engine: &mut Engine, i: usize| engine.open(&prompts[i], &[], i as u64);
    let mut sessions: Vec<Session> = Vec::new();
    for i in 0..2 {
        let mut session = open(&mut engine, i).unwrap();
        assert_eq!(prefill(&mut engine, &mut session, &prompts[i]), alone[i][0]);
        sessions.push(session);
    }
    let error = open(&mut engine, 2).unwrap_err().to_string();
    assert!(error.contains("all 2 sequences"), "{error}");
    engine.park(&mut sessions[0]).unwrap();
    let error = engine.decode(&mut sessions[0], 3, None, &mut |_, _, _| {});
    assert!(error.unwrap_err().to_string().contains("parked"));
    let mut third = open(&mut engine, 2).unwrap();
    assert_eq!(prefill(&mut engine, &mut third, &prompts[2]), alone[2][0]);
    sessions.push(third);
    for step in 1..7 {
        for (i, alone) in alone.iter().enumerate() {
            if !sessions[i].is_resident() {
                let other = (i + 1) % 3;
                engine.park(&mut sessions[other]).unwrap();
                engine.unpark(&mut sessions[i]).unwrap();
            }
            let logits = decode(&mut engine, &mut sessions[i], step as u32 + 2);
            assert_eq!(logits, alone[step], "session {i}, step {step}");
        }
    }
    assert_eq!(engine.resident_sessions(), (2, 2));
    sessions
        .into_iter()
        .for_each(|session| engine.close(session));
    assert_eq!(engine.resident_sessions(), (0, 2));
    // Given up before its end, and asked again.
    let long = text(4, 100);
    let mut session = engine.open(&long, &[50], 0).unwrap();
    let done = engine.prefill_piece(&mut session, &long, &mut |_, _, _| {});
    assert!(done.unwrap().is_none());
    engine.close(session);
    let mut session = engine.open(&long, &[], 0).unwrap();
    assert_eq!(session.tokens().len(), 50);
    assert_eq!(prefill(&mut engine, &mut session, &long), cold(&long));
}
