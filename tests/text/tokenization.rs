use moectl::model::{Tokenizer, TokenizerError};

use crate::{GOLDEN_MODELS, golden_model, golden_text, ids, json, read, tokenizer};

#[test]
fn encoding_and_decoding_equal_transformers() {
    for name in GOLDEN_MODELS {
        let tokenizer = tokenizer(&golden_model(name));
        for case in golden_text(name)["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let encoded = tokenizer.encode(text).unwrap();
            assert_eq!(encoded, ids(&case["ids"]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&encoded, false).unwrap(), case["decode"]);
            assert_eq!(
                tokenizer.decode(&encoded, true).unwrap(),
                case["decode_skip_special"]
            );
        }
    }
}

#[test]
fn arbitrary_ids_decode_as_in_transformers() {
    let tokenizer = tokenizer(&golden_model("tiny-a"));
    for case in json("tests/data/text/decode.json").as_array().unwrap() {
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["text"]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), case["skip_special"]);
    }
}

#[test]
fn the_built_in_model_has_the_recorded_prompt_ids() {
    let tokenizer = tokenizer("workloads/tiny-moe");
    assert_eq!(tokenizer.vocab_size(), 8192);
    let prompts = json("tests/data/text/tiny-moe-prompts.json");
    for (name, prompt) in prompts.as_object().unwrap() {
        let encoded = tokenizer.encode(prompt["text"].as_str().unwrap()).unwrap();
        assert_eq!(encoded, ids(&prompt["ids"]), "{name}");
    }
}

#[test]
fn token_bytes_are_the_decoded_token() {
    let tokenizer = tokenizer("workloads/tiny-moe");
    for id in 0..tokenizer.vocab_size() as u32 {
        let bytes = tokenizer.token_bytes(id).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&bytes),
            tokenizer.decode(&[id], false).unwrap()
        );
        let skipped = tokenizer.decode(&[id], true).unwrap().is_empty();
        assert_eq!(skipped, tokenizer.is_special(id), "token {id}");
    }
}

#[test]
fn ids_outside_the_vocabulary_have_no_text() {
    let tokenizer = tokenizer(&golden_model("tiny-a"));
    let outside = tokenizer.vocab_size() as u32;
    assert_eq!(tokenizer.token_bytes(outside), None);
    assert_eq!(tokenizer.decode(&[outside, u32::MAX], false).unwrap(), "");
}

#[test]
fn tokens_are_found_by_name() {
    let tokenizer = tokenizer(&golden_model("tiny-a"));
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(311));
    assert_eq!(tokenizer.eos_id(), Some(311));
    assert_eq!(tokenizer.token_id("<|no_such_token|>"), None);
    assert!(tokenizer.is_special(311));
    assert!(!tokenizer.is_special(tokenizer.token_id("<think>").unwrap()));
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let mut file = json(&format!("{}/tokenizer.json", golden_model("tiny-a")));
    file["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    });
    file["padding"] = serde_json::json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"
    });
    let limited = Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap();
    let plain = tokenizer(&golden_model("tiny-a"));
    let text = "more than two tokens";
    assert_eq!(limited.encode(text).unwrap(), plain.encode(text).unwrap());
}

#[test]
fn damaged_files_are_errors_that_name_the_file() {
    let good = read(&format!("{}/tokenizer.json", golden_model("tiny-a")));
    let message = |result: Result<Tokenizer, TokenizerError>| result.unwrap_err().to_string();

    for cut in [0, 1, good.len() / 2, good.len() - 2] {
        let error = message(Tokenizer::from_bytes(&good[..cut], None));
        assert!(error.starts_with("tokenizer.json: "), "{error}");
    }
    for (config, expected) in [
        (&b"{"[..], "tokenizer_config.json: "),
        (&b"[]"[..], "tokenizer_config.json: "),
        (&b"{\"eos_token\": 3}"[..], "tokenizer_config.json: "),
        (
            &b"{\"eos_token\": \"<x>\"}"[..],
            "tokenizer_config.json: eos_token `<x>` is not",
        ),
    ] {
        let error = message(Tokenizer::from_bytes(&good, Some(config)));
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn a_tokenizer_that_is_not_byte_level_is_refused_by_name() {
    let mut file = json(&format!("{}/tokenizer.json", golden_model("tiny-a")));
    file["decoder"] = serde_json::json!({"type": "Fuse"});
    let error = Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("decoder Fuse, expected ByteLevel")
    );
}
