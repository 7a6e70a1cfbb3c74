use moectl::backend::BestLogits;
use moectl::engine::sampler::{
    SampleError, Sampler, SamplingParams, TokenLogprob, log_sum_exp, token_logprob, top_logprobs,
};
use moectl::model::GenerationConfig;
use proptest::prelude::*;

use crate::{hf_rules, ids, json};

fn sampled(rows: &[Vec<f32>], prompt: &[u32], params: &SamplingParams) -> Vec<u32> {
    let mut sampler = Sampler::new(params.clone()).unwrap();
    sampler.observe_prompt(prompt);
    rows.iter()
        .map(|logits| {
            let id = sampler.sample(logits).unwrap();
            sampler.remember(id);
            id
        })
        .collect()
}

fn greedy(logits: &[f32]) -> Result<u32, SampleError> {
    Sampler::new(SamplingParams::default())
        .unwrap()
        .sample(logits)
}

fn number(value: &serde_json::Value) -> f32 {
    value.as_f64().unwrap() as f32
}

#[test]
fn the_written_down_rules_give_the_probabilities_of_transformers() {
    for case in json("tests/data/text/sampling.json").as_array().unwrap() {
        let logits: Vec<f32> = serde_json::from_value(case["logits"].clone()).unwrap();
        let params = SamplingParams {
            temperature: number(&case["temperature"]),
            top_k: case["top_k"].as_u64().unwrap() as usize,
            top_p: number(&case["top_p"]),
            min_p: number(&case["min_p"]),
            repetition_penalty: number(&case["repetition_penalty"]),
            ..SamplingParams::default()
        };
        let found = hf_rules::probabilities(&logits, &ids(&case["seen"]), &[], &params);
        for (id, found) in found.into_iter().enumerate() {
            let expected = case["probabilities"].get(id.to_string());
            let expected = expected.map_or(0.0, |p| p.as_f64().unwrap());
            assert!(
                (found - expected).abs() < 1e-5 && (found > 1e-30) == (expected > 1e-30),
                "token {id}: {found}, expected {expected} in {case}"
            );
        }
    }
}

/// Logits in quarters, so that ties are common, and ids that repeat.
fn rows() -> impl Strategy<Value = Vec<Vec<f32>>> {
    (1usize..400, 1usize..40, 1usize..6).prop_flat_map(|(vocab_size, scale, tokens)| {
        let scale = scale as i32;
        let logit = (-scale..=scale).prop_map(|quarters| quarters as f32 / 4.0);
        prop::collection::vec(prop::collection::vec(logit, vocab_size), tokens)
    })
}

fn params() -> impl Strategy<Value = SamplingParams> {
    (
        prop_oneof![Just(0.0f32), 0.05f32..3.0],
        prop_oneof![Just(0usize), 1usize..30, Just(1000)],
        prop_oneof![Just(1.0f32), Just(0.0), 0.01f32..0.999],
        prop_oneof![Just(0.0f32), 0.001f32..0.999],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        (-2.0f32..2.0, -2.0f32..2.0),
        any::<u64>(),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, penalties, seed)| {
                SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    presence_penalty: penalties.0,
                    frequency_penalty: penalties.1,
                    seed,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn tokens_equal_those_of_the_written_down_rules(
        rows in rows(),
        prompt in prop::collection::vec(0u32..500, 0..10),
        params in params(),
    ) {
        prop_assert_eq!(
            sampled(&rows, &prompt, &params),
            hf_rules::draw_all(&rows, &prompt, &params)
        );
    }

    #[test]
    fn no_logits_make_it_panic(
        logits in prop::collection::vec(any::<f32>(), 0..50),
        params in params(),
    ) {
        let bad = logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY);
        let result = Sampler::new(params).unwrap().sample(&logits);
        prop_assert!(!bad || result.is_err());
        top_logprobs(&logits, 3);
    }
}

#[test]
fn a_nucleus_wider_than_one_sorting_step_is_exact() {
    // 5000 nearly equal tokens: top_p 0.5 must keep about half of them, the best half.
    let logits: Vec<f32> = (0..5000)
        .map(|i| ((i * 7919) % 5000) as f32 * 1e-5)
        .collect();
    let params = SamplingParams {
        temperature: 1.0,
        top_p: 0.5,
        seed: 3,
        ..SamplingParams::default()
    };
    let rows = vec![logits; 50];
    assert_eq!(
        sampled(&rows, &[], &params),
        hf_rules::draw_all(&rows, &[], &params)
    );
}

#[test]
fn greedy_takes_the_lowest_id_on_ties() {
    assert_eq!(greedy(&[0.0, 2.0, 1.0, 2.0]), Ok(1));
    assert_eq!(greedy(&[f32::NEG_INFINITY, -1e30]), Ok(1));
}

#[test]
fn logits_that_are_not_numbers_are_errors_that_name_the_token() {
    assert!(matches!(
        greedy(&[0.0, f32::NAN]),
        Err(SampleError::Logit { id: 1, found }) if found.is_nan()
    ));
    assert_eq!(
        greedy(&[f32::INFINITY]).unwrap_err().to_string(),
        "logit of token 0 is inf, expected a number; the weights may be damaged"
    );
    assert_eq!(greedy(&[]), Err(SampleError::NoCandidate { vocab_size: 0 }));
    assert_eq!(
        greedy(&[f32::NEG_INFINITY; 2]),
        Err(SampleError::NoCandidate { vocab_size: 2 })
    );
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let off = SamplingParams::default();
    for (params, expected) in [
        (
            SamplingParams {
                temperature: -1.0,
                ..off.clone()
            },
            "temperature -1, expected 0 or more",
        ),
        (
            SamplingParams {
                temperature: f32::NAN,
                ..off.clone()
            },
            "temperature NaN, expected 0 or more",
        ),
        (
            SamplingParams {
                top_p: 1.1,
                ..off.clone()
            },
            "top_p 1.1, expected 0 to 1",
        ),
        (
            SamplingParams {
                min_p: -0.1,
                ..off.clone()
            },
            "min_p -0.1, expected 0 to 1",
        ),
        (
            SamplingParams {
                repetition_penalty: 0.0,
                ..off.clone()
            },
            "repetition_penalty 0, expected more than 0",
        ),
        (
            SamplingParams {
                frequency_penalty: f32::INFINITY,
                ..off.clone()
            },
            "frequency_penalty inf, expected a number",
        ),
    ] {
        assert_eq!(Sampler::new(params).unwrap_err().to_string(), expected);
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
    let params = SamplingParams {
        temperature: 1.0,
        seed: 1,
        ..SamplingParams::default()
    };
    let tokens = sampled(&vec![logits; 20_000], &[], &params);
    for (id, expected) in [(0, 0.5), (1, 0.25), (2, 0.15), (3, 0.1)] {
        let share = tokens.iter().filter(|&&t| t == id).count() as f64 / 20_000.0;
        // Four standard deviations at worst.
        assert!((share - expected).abs() < 0.015, "token {id}: {share}");
    }
}

#[test]
fn a_seed_always_gives_the_same_tokens() {
    let params = SamplingParams {
        temperature: 1.0,
        seed: 42,
        ..SamplingParams::default()
    };
    let tokens = sampled(&vec![vec![0.0; 100]; 10], &[], &params);
    assert_eq!(tokens, [68, 95, 42, 62, 28, 14, 30, 80, 77, 23]);
}

#[test]
fn a_tiny_temperature_is_as_good_as_greedy() {
    let params = SamplingParams {
        temperature: f32::MIN_POSITIVE,
        ..SamplingParams::default()
    };
    assert_eq!(sampled(&[vec![1.0, 3e38, -3e38]], &[], &params), [1]);
}

#[test]
fn logprobs_are_of_the_raw_logits_best_first() {
    let logits = [1.0, 3.0, 3.0, -2.0];
    let normalizer = (1f64.exp() + 2.0 * 3f64.exp() + (-2f64).exp()).ln();
    assert!((log_sum_exp(&logits) - normalizer).abs() < 1e-12);
    let rated = |id: u32, logit: f32| TokenLogprob {
        id,
        logit,
        logprob: (f64::from(logit) - normalizer) as f32,
    };
    let all = [rated(1, 3.0), rated(2, 3.0), rated(0, 1.0), rated(3, -2.0)];
    assert_eq!(top_logprobs(&logits, 3), all[..3]);
    assert_eq!(top_logprobs(&logits, 99), all);
    assert_eq!(top_logprobs(&logits, 0), []);
    assert_eq!(token_logprob(&logits, 3), all[3]);
}

/// What a backend gives that finds the best logits itself: all that reach the n-th, and a few more.
fn best_logits(logits: &[f32], wanted: usize, more: usize) -> BestLogits {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let bound = sorted[(wanted + more).min(logits.len()) - 1];
    let id = greedy(logits).unwrap();
    BestLogits {
        vocab_size: logits.len(),
        id,
        logit: logits[id as usize],
        candidates: (0..)
            .zip(logits.iter().copied())
            .filter(|&(_, logit)| logit >= bound)
            .collect(),
    }
}

#[test]
fn the_best_logits_give_the_tokens_that_all_give() {
    let row = |round: u32, coarse: bool| -> Vec<f32> {
        let value = |i: u32| ((i * 7919 + round * 104_729) % 1009) as f32 / 60.0 - 9.0;
        let values = (0..500).map(value);
        match coarse {
            true => values.map(f32::round).collect(),
            false => values.collect(),
        }
    };
    for (temperature, top_k, top_p, min_p) in [
        (0.0, 0, 1.0, 0.0),
        (0.7, 20, 0.8, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.5, 64, 1.0, 0.05),
        (1e-3, 7, 0.3, 0.0),
    ] {
        let params = SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed: 3,
            ..SamplingParams::default()
        };
        let mut of_all = Sampler::new(params.clone()).unwrap();
        let mut of_best = Sampler::new(params.clone()).unwrap();
        let wanted = of_best.wanted().unwrap();
        assert_eq!(wanted, top_k.max(1));
        for round in 0..200 {
            let logits = row(round, round % 3 == 0);
            let best = best_logits(&logits, wanted, round as usize % 5);
            let expected = of_all.sample(&logits).unwrap();
            assert_eq!(
                of_best.sample_best(&best),
                Ok(expected),
                "{params:?} {round}"
            );
        }
    }
    for params in [
        SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        },
        SamplingParams {
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        },
    ] {
        assert_eq!(Sampler::new(params).unwrap().wanted(), None);
    }
}

#[test]
fn broken_logits_are_the_same_errors_among_the_best() {
    let best = |id: u32, logit: f32| {
        let best = BestLogits {
            vocab_size: 9,
            id,
            logit,
            candidates: vec![(id, logit)],
        };
        let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
        sampler.sample_best(&best).unwrap_err()
    };
    let infinite = SampleError::Logit {
        id: 4,
        found: f32::INFINITY,
    };
    assert_eq!(best(4, f32::INFINITY), infinite);
    assert!(matches!(
        best(5, f32::NAN),
        SampleError::Logit { id: 5, .. }
    ));
    assert_eq!(
        best(0, f32::NEG_INFINITY),
        SampleError::NoCandidate { vocab_size: 9 }
    );
}

#[test]
fn suppressed_tokens_are_never_drawn() {
    let suppressed = |fields: &str| {
        let config = format!(r#"{{"eos_token_id": 4, {fields}}}"#);
        let config = GenerationConfig::from_bytes(Some(config.as_bytes()), b"{}").unwrap();
        assert_eq!(config.notes().count(), 0);
        config.suppressed
    };
    // The best is 3, then 2, 1, 0; 4 is the end.
    let logits = vec![0.0, 1.0, 2.0, 3.0, -1.0];
    let rows = vec![logits; 4];
    for (fields, expected) in [
        (r#""suppress_tokens": [3, 9]"#, [2, 2, 2, 2]),
        (r#""begin_suppress_tokens": [3]"#, [2, 3, 3, 3]),
        (r#""bad_words_ids": [[3]]"#, [2, 2, 2, 2]),
        // Not after 1, the prompt's last, nor after 3.
        (r#""bad_words_ids": [[1, 3], [3, 3]]"#, [2, 3, 2, 3]),
        // The end cannot be forbidden.
        (
            r#""bad_words_ids": [[4]], "suppress_tokens": null"#,
            [3, 3, 3, 3],
        ),
    ] {
        let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
        sampler.suppress(suppressed(fields));
        sampler.observe_prompt(&[0, 1]);
        let drawn = rows.iter().map(|logits| {
            let id = sampler.sample(logits).unwrap();
            sampler.remember(id);
            id
        });
        assert_eq!(drawn.collect::<Vec<_>>(), expected, "{fields}");
    }
}

#[test]
fn fields_that_transformers_obeys_and_we_do_not_are_said() {
    let config = br#"{"no_repeat_ngram_size": 3, "num_beams": 1, "typical_p": 1.0, "min_length": 0,
        "guidance_scale": null, "transformers_version": "5", "max_length": 20, "max_new_tokens": 64,
        "token_healing": false}"#;
    let config = GenerationConfig::from_bytes(Some(config), b"{}").unwrap();
    let notes: Vec<String> = config.notes().collect();
    assert_eq!(
        notes,
        ["max_new_tokens is 64", "no_repeat_ngram_size is 3"].map(|field| format!(
            "note: generation_config.json: {field}, which is not carried out"
        ))
    );
}
