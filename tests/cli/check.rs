//! What a user is told of a checkpoint before anything large is read.

use std::fs;

use serde_json::{Value, json};

use crate::program::{Outcome, Sandbox, data};

fn line<'a>(record: &'a Value, list: &str, key: &str, name: &str) -> &'a Value {
    let lines = record[list].as_array().unwrap();
    let found = lines.iter().find(|line| line[key] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list}: {record}"))
}

/// The verb says what it found before it fails.
#[track_caller]
fn assert_fails(outcome: &Outcome, code: i32, parts: &[&str]) {
    assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
    for part in parts {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
}

#[test]
fn a_good_checkpoint_is_listed_by_role_and_file() {
    let sandbox = Sandbox::new();
    let model = data("goldens/tiny-c/nf4");
    let model = model.to_str().unwrap();
    let record = sandbox.run(&format!("check {model} --json")).ok().json();
    assert_eq!(record["model_type"], "qwen3_next");
    assert_eq!(record["problems"], json!([]));
    let experts = line(
        &record,
        "loaded",
        "role",
        "model.layers.*.mlp.experts.*.up_proj.weight",
    );
    assert_eq!(experts["tensors"], 2 * 4);
    assert_eq!(experts["how"], "NF4, 64 weights a scale, scales in 8 bits");
    let head = line(&record, "loaded", "role", "lm_head.weight");
    assert_eq!(
        (&head["how"], &head["bytes"]),
        (&json!("BF16"), &json!(336 * 64 * 2))
    );
    assert_eq!(record["ignored"], json!([]));
    assert_eq!(line(&record, "files", "name", "config.json")["read"], true);

    let text = sandbox.run(&format!("check {model}")).ok().stdout;
    for part in [
        "2 layers (1 of full attention)",
        "tokenizer of 33",
        "renders a plain conversation",
        "\nloaded\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn what_is_ignored_is_said_with_the_reason() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    for (file, content) in [
        ("model.safetensors.index.json", "{}"),
        ("adapter_model.safetensors", ""),
        ("pytorch_model.bin", ""),
        ("preprocessor_config.json", "{}"),
        (
            "generation_config.json",
            r#"{"num_beams": 4, "eos_token_id": 1}"#,
        ),
        ("config.json", ""),
    ] {
        let path = model.join(file);
        if file == "config.json" {
            let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config["num_hidden_layers"] = 1.into();
            config.as_object_mut().unwrap().remove("layer_types");
            config["full_attention_interval"] = 2.into();
            fs::write(path, config.to_string()).unwrap();
        } else {
            fs::write(path, content).unwrap();
        }
    }
    let outcome = sandbox
        .run(&format!("check {} --json", model.display()))
        .ok();
    let record = outcome.json();
    for (file, why) in [
        ("model.safetensors.index.json", "model.safetensors counts"),
        ("adapter_model.safetensors", "not applied"),
        ("pytorch_model.bin", "another format"),
        ("preprocessor_config.json", "images"),
    ] {
        let file = line(&record, "files", "name", file);
        assert_eq!(file["read"], false);
        assert!(file["why"].as_str().unwrap().contains(why), "{file}");
    }
    let beyond = line(&record, "ignored", "role", "model.layers.*");
    assert_eq!(beyond["how"], "beyond num_hidden_layers of config.json");
    let notes = record["notes"].to_string();
    assert!(
        notes.contains("num_beams is 4, which is not carried out"),
        "{notes}"
    );
}

#[test]
fn every_problem_is_listed_not_only_the_first() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hidden_size"] = 128.into();
    fs::write(path, config.to_string()).unwrap();
    fs::write(model.join("tokenizer.json"), "{").unwrap();
    let outcome = sandbox.run(&format!("check {}", model.display()));
    assert_fails(&outcome, 1, &["cannot be loaded", "problems"]);
    for part in ["embed_tokens.weight", "model.norm.weight", "tokenizer.json"] {
        assert!(outcome.stdout.contains(part), "{part}: {}", outcome.stdout);
    }
}

#[test]
fn models_without_a_folder_are_checked_too_and_cannot_be_compared() {
    let sandbox = Sandbox::new();
    let record = sandbox.run("check tiny --json").ok().json();
    assert!(record["loaded"].as_array().unwrap().len() > 5);
    let outcome = sandbox.run("check tiny --against transformers");
    assert_fails(&outcome, 2, &["tiny", "no folder", "moectl synth"]);
}

/// Stands for Python: says what it was asked, and ends as it is told.
#[cfg(unix)]
#[test]
fn the_comparison_gets_the_folder_and_the_program_and_its_end_is_ours() {
    use std::os::unix::fs::PermissionsExt;
    let sandbox = Sandbox::new();
    let model = data("goldens/tiny-c/nf4");
    for (status, code, part) in [(0, 0, ""), (1, 1, "differ"), (2, 1, "could not be made")] {
        let python = sandbox.write(
            "python",
            format!("#!/bin/sh\necho \"asked: $@\"\nexit {status}\n"),
        );
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        let outcome = sandbox.run_args(&[
            "check",
            model.to_str().unwrap(),
            "--against",
            "transformers",
            "--python",
            python.to_str().unwrap(),
        ]);
        assert_fails(&outcome, code, &[part]);
        let asked = outcome
            .stdout
            .lines()
            .find(|line| line.starts_with("asked: "));
        let asked = asked.expect("the script runs");
        assert!(asked.contains(".py ") && asked.contains(model.to_str().unwrap()));
        assert!(asked.contains("--moectl "), "{asked}");
    }
}
