use moectl::model::{Tokenizer, TokenizerError};
use serde_json::{Value, json};

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

/// A tokenizer of bytes alone, with `<a>` among its added tokens and `<b>` in its vocabulary.
fn small(config: &Value, pattern: Option<&str>) -> Tokenizer {
    // Every byte that stands for itself, then the space, then `<b>`.
    let letters = (0x21..=0x7eu8).map(|byte| char::from(byte).to_string());
    let letters = letters.chain(["\u{120}".into(), "<b>".into(), "\u{120}\u{120}".into()]);
    let vocab: serde_json::Map<String, Value> = letters
        .zip(0..)
        .map(|(text, id): (_, u32)| (text, id.into()))
        .collect();
    let split = pattern.map(|pattern| {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": false})
    });
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": false});
    let steps: Vec<Value> = split.into_iter().chain([bytes]).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{"id": 97, "content": "<a>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["\u{120} \u{120}"]},
    });
    let config = config.to_string();
    Tokenizer::from_bytes(tokenizer.to_string().as_bytes(), Some(config.as_bytes())).unwrap()
}

/// Expected ids: transformers 4.57.6.
#[test]
fn tokens_of_tokenizer_config_are_added() {
    let config = json!({
        "added_tokens_decoder": {
            "99": {"content": "<d>", "special": false},
            "98": {"content": "<c>", "special": true, "lstrip": false, "rstrip": false,
                "normalized": false, "single_word": false},
            "97": {"content": "<a>", "special": true},
        },
        "eos_token": {"content": "<b>"},
        "additional_special_tokens": ["<e>", "<a>"],
    });
    let tokenizer = small(&config, None);
    assert_eq!(
        tokenizer.encode("<a><b><c><d><e>").unwrap(),
        [97, 95, 98, 99, 100]
    );
    assert_eq!(tokenizer.eos_id(), Some(95));
    let special: Vec<bool> = (95..101).map(|id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [true, false, true, true, false, true]);
    // Of nothing but tokenizer.json, `<b>` is three bytes and `<c>` too.
    let plain = small(&json!({}), None);
    assert_eq!(plain.encode("<a><b>").unwrap(), [97, 27, 65, 29]);
}

#[test]
fn special_tokens_are_text_where_they_are_split() {
    let config = json!({"split_special_tokens": true, "eos_token": "<b>"});
    let tokenizer = small(&config, None);
    assert_eq!(
        tokenizer.encode("<a><b>").unwrap(),
        [27, 64, 29, 27, 65, 29]
    );
}

#[test]
fn a_long_run_of_spaces_does_not_end_the_search_for_words() {
    let pattern =
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let tokenizer = small(&json!({}), Some(pattern));
    let text = " ".repeat(1_000_002) + "x  y";
    let ids = tokenizer.encode(&text).unwrap();
    // Pairs of spaces, the odd one, then each word with the space before it.
    assert_eq!(ids[ids.len() - 7..], [96, 94, 94, 87, 94, 94, 88]);
}

/// transformers gives the pre-tokenizer its own setting, whatever tokenizer.json says.
#[test]
fn the_space_before_a_text_is_as_tokenizer_config_json_says() {
    let mut file = json("tests/data/goldens/tiny-c/nf4/tokenizer.json");
    file["pre_tokenizer"] = json!({
        "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true,
    });
    let file = file.to_string();
    for (config, expected) in [
        (None, "the"),
        (Some(r#"{"add_prefix_space": null}"#), "the"),
        (Some(r#"{"add_prefix_space": true}"#), " the"),
    ] {
        let config = config.map(str::as_bytes);
        let tokenizer = Tokenizer::from_bytes(file.as_bytes(), config).unwrap();
        let ids = tokenizer.encode("the").unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), expected);
    }
}
