use moectl::engine::sampler::SamplingParams;
use moectl::model::GenerationConfig;

use crate::{golden_model, read};

#[test]
fn the_generation_config_wins_over_the_model_config() {
    let model = golden_model("tiny-a");
    let config = GenerationConfig::from_bytes(
        Some(&read(&format!("{model}/generation_config.json"))),
        &read(&format!("{model}/config.json")),
    )
    .unwrap();
    assert_eq!(config.eos_token_ids, [311, 309]);
    assert!(config.do_sample);
    assert_eq!(config.temperature, Some(0.7));
    assert_eq!(config.top_k, Some(20));
    assert_eq!(config.top_p, Some(0.8));
    assert_eq!(config.min_p, None);
    assert_eq!(
        SamplingParams::from(&config),
        SamplingParams {
            temperature: 0.7,
            top_k: 20,
            top_p: 0.8,
            ..SamplingParams::default()
        }
    );
}

#[test]
fn without_a_generation_config_decoding_is_greedy_and_stops_at_the_model_s_token() {
    for (config, expected) in [
        (&br#"{"eos_token_id": 7}"#[..], &[7][..]),
        (br#"{"eos_token_id": [7, 8]}"#, &[7, 8]),
        (br#"{"eos_token_id": null}"#, &[]),
        (b"{}", &[]),
    ] {
        let config = GenerationConfig::from_bytes(None, config).unwrap();
        assert_eq!(config.eos_token_ids, expected);
        assert_eq!(SamplingParams::from(&config), SamplingParams::default());
    }
}

#[test]
fn stop_tokens_fall_back_to_the_model_config() {
    let config = GenerationConfig::from_bytes(
        Some(br#"{"do_sample": true, "temperature": null}"#),
        br#"{"eos_token_id": 7}"#,
    )
    .unwrap();
    assert_eq!(config.eos_token_ids, [7]);
    assert_eq!(SamplingParams::from(&config).temperature, 1.0);
}

#[test]
fn impossible_values_are_errors_that_name_file_and_field() {
    for (generation, model, expected) in [
        ("{", "{}", "generation_config.json: "),
        ("[]", "{}", "generation_config.json: "),
        ("{}", "[", "config.json: "),
        ("{}", "[]", "config.json: "),
        (
            r#"{"eos_token_id": "x"}"#,
            "{}",
            "generation_config.json: eos_token_id: expected",
        ),
        (
            r#"{"eos_token_id": -1}"#,
            "{}",
            "generation_config.json: eos_token_id: expected",
        ),
        (
            "{}",
            r#"{"eos_token_id": 1.5}"#,
            "config.json: eos_token_id: expected",
        ),
        (r#"{"top_k": -1}"#, "{}", "generation_config.json: "),
        (
            r#"{"temperature": -0.5}"#,
            "{}",
            "generation_config.json: temperature -0.5, expected 0 or more",
        ),
        (
            r#"{"top_p": 1.5}"#,
            "{}",
            "generation_config.json: top_p 1.5, expected 0 to 1",
        ),
        (
            r#"{"min_p": 2}"#,
            "{}",
            "generation_config.json: min_p 2, expected 0 to 1",
        ),
        (
            r#"{"repetition_penalty": 0}"#,
            "{}",
            "generation_config.json: repetition_penalty 0, expected more than 0",
        ),
    ] {
        let error = GenerationConfig::from_bytes(Some(generation.as_bytes()), model.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
