//! Files that are not what they should be: named with the place, and nothing is written.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::program::{Sandbox, data, small_model};

/// Runs the model in `folder`; it must be refused with all `parts` in the message.
#[track_caller]
fn assert_refused(sandbox: &Sandbox, folder: &Path, parts: &[&str]) {
    let folder = folder.to_str().unwrap();
    let before = sandbox.files();
    let outcome = sandbox.run_args(&["run", "hello", "-n", "1", "--model", folder]);
    outcome.fails(1, parts);
    assert_eq!(sandbox.files(), before);
}

/// Changes one of the model's JSON files.
fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file and leaves the data as it is.
fn edit_header(file: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = header.to_string();
    let new_length = (header.len() as u64).to_le_bytes();
    let rest = &bytes[8 + length..];
    std::fs::write(file, [&new_length, header.as_bytes(), rest].concat()).unwrap();
}

#[test]
fn a_truncated_checkpoint_is_refused() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    assert_refused(&sandbox, &model, &["model.safetensors", "safetensors file"]);
    std::fs::write(&weights, &bytes[..5]).unwrap();
    assert_refused(&sandbox, &model, &["model.safetensors", "safetensors file"]);
}

#[test]
fn a_header_longer_than_its_file_is_refused() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    bytes[..8].copy_from_slice(&90_000_000u64.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    assert_refused(&sandbox, &model, &["model.safetensors", "90000000"]);
}

#[test]
fn overlapping_tensors_are_refused() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    edit_header(&model.join("model.safetensors"), |header| {
        let offsets = header["lm_head.weight"]["data_offsets"].clone();
        header["model.embed_tokens.weight"]["data_offsets"] = offsets;
    });
    assert_refused(&sandbox, &model, &["model.safetensors", "overlap"]);
}

#[test]
fn a_tensor_of_the_wrong_shape_is_named_with_both_shapes() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    edit_header(&model.join("model.safetensors"), |header| {
        header["lm_head.weight"]["shape"] = json!([64, 336]);
    });
    let parts = [
        model.to_str().unwrap(),
        "lm_head.weight",
        "[64, 336]",
        "[336, 64]",
    ];
    assert_refused(&sandbox, &model, &parts);
}

#[test]
fn a_missing_tensor_is_named() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    edit_header(&model.join("model.safetensors"), |header| {
        let header = header.as_object_mut().unwrap();
        let tensor = header.remove("model.norm.weight").unwrap();
        header.insert("model.norm.weights".into(), tensor);
    });
    assert_refused(&sandbox, &model, &["model.norm.weight`"]);
}

#[test]
fn a_missing_shard_is_named() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    assert_refused(&sandbox, &model, &["model.safetensors"]);
    let index = json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}});
    std::fs::write(
        model.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    assert_refused(&sandbox, &model, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn a_config_with_impossible_numbers_is_refused() {
    for (field, value, expected) in [
        ("num_experts_per_tok", json!(9), "at most num_experts = 4"),
        ("num_hidden_layers", json!(0), "a whole number from 1"),
        (
            "num_key_value_heads",
            json!(3),
            "a divisor of num_attention_heads",
        ),
        ("hidden_size", json!(-64), "a whole number from 1"),
        ("rms_norm_eps", json!("small"), "a number above 0"),
    ] {
        let sandbox = Sandbox::new();
        let model = sandbox.model("m");
        edit_json(&model.join("config.json"), |config| {
            config[field] = value.clone();
        });
        let found = format!("`{field}` is {value}");
        assert_refused(&sandbox, &model, &["config.json", &found, expected]);
    }
}

#[test]
fn a_config_that_disagrees_with_the_weights_is_refused() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    edit_json(&model.join("config.json"), |config| {
        config["num_experts"] = json!(5);
    });
    assert_refused(&sandbox, &model, &["model.layers.0.mlp.experts.4"]);
}

#[test]
fn other_architectures_are_refused_by_name_with_what_is_supported() {
    for model_type in ["qwen3", "mamba9"] {
        let sandbox = Sandbox::new();
        let model = sandbox.model("m");
        edit_json(&model.join("config.json"), |config| {
            config["model_type"] = json!(model_type);
        });
        let name = format!("`{model_type}`");
        assert_refused(&sandbox, &model, &["config.json", &name, "qwen3_next"]);
    }
}

#[test]
fn missing_and_broken_text_files_are_named() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    std::fs::write(model.join("chat_template.jinja"), "{% if %}\n").unwrap();
    assert_refused(&sandbox, &model, &["chat template", "line 1"]);
    std::fs::remove_file(model.join("chat_template.jinja")).unwrap();
    std::fs::write(model.join("generation_config.json"), "{").unwrap();
    assert_refused(&sandbox, &model, &["generation_config.json"]);
    std::fs::remove_file(model.join("generation_config.json")).unwrap();
    std::fs::write(model.join("tokenizer.json"), "{}").unwrap();
    assert_refused(&sandbox, &model, &["tokenizer.json"]);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    assert_refused(&sandbox, &model, &["tokenizer.json"]);
    std::fs::write(model.join("config.json"), "not json").unwrap();
    assert_refused(&sandbox, &model, &["config.json", "JSON"]);
    std::fs::remove_file(model.join("config.json")).unwrap();
    assert_refused(&sandbox, &model, &["config.json"]);
}

#[test]
fn a_model_that_is_nowhere_is_refused_with_what_is_possible() {
    let sandbox = Sandbox::new();
    let outcome = sandbox.run("run hello --model nowhere");
    outcome.fails(1, &["`nowhere`", "org/name", "tiny"]);
}

#[test]
fn a_bad_line_of_a_corpus_is_named_by_number() {
    let sandbox = Sandbox::new();
    let model = small_model();
    for (content, expected) in [
        ("{\"text\": \"a\"}\n\n{oops\n", "bad.jsonl:3: "),
        (
            "{\"text\": \"a\"}\n{\"txt\": \"a\"}\n",
            "bad.jsonl:2: has none of",
        ),
        ("{\"text\": 3}\n", "bad.jsonl:1: "),
        ("\n\n", "bad.jsonl: holds no records"),
        ("", "bad.jsonl: holds no records"),
    ] {
        sandbox.write("bad.jsonl", content);
        let args = ["profile", "bad.jsonl", "--trace", "t", "-m"].map(Path::new);
        let outcome = sandbox.run_args(&[&args[..], &[&model]].concat());
        outcome.fails(1, &[expected]);
        assert_eq!(sandbox.files(), ["bad.jsonl"]);
    }
    let outcome = sandbox.run("profile absent.jsonl");
    outcome.fails(1, &["absent.jsonl"]);
    assert_eq!(sandbox.files(), ["bad.jsonl"]);
}

/// A sandbox with `profile.json` of the small model.
fn with_profile() -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::new();
    sandbox.write("c.jsonl", "{\"text\": \"one two three\"}\n");
    let model = small_model();
    let outcome = sandbox.run(&format!("profile c.jsonl -m {}", model.display()));
    outcome.ok();
    (sandbox, model)
}

#[test]
fn a_profile_of_another_model_is_refused_with_both_names() {
    let (sandbox, model) = with_profile();
    let other = data("goldens/tiny-a/nf4");
    let before = sandbox.files();
    let line = format!("plan --profile profile.json -m {}", other.display());
    let (found, expected) = (model.display().to_string(), other.display().to_string());
    sandbox
        .run(&line)
        .fails(1, &["profile.json", &found, &expected]);
    assert_eq!(sandbox.files(), before);
}

#[test]
fn a_placement_of_another_model_is_refused_with_both_names() {
    let sandbox = Sandbox::new();
    let (model, other) = (small_model(), data("goldens/tiny-a/nf4"));
    sandbox.run(&format!("plan -m {}", model.display())).ok();
    let line = format!(
        "bench --placement placement.json --ctx 64 -n 4 -m {}",
        other.display()
    );
    let (found, expected) = (model.display().to_string(), other.display().to_string());
    sandbox
        .run(&line)
        .fails(1, &["placement.json", &found, &expected]);
    assert!(!sandbox.path("bench-out/run.json").exists());
}

#[test]
fn files_of_another_kind_or_a_newer_version_are_refused() {
    let (sandbox, model) = with_profile();
    let plan = format!("plan --profile profile.json -m {}", model.display());
    let profile = sandbox.json("profile.json");
    let before = sandbox.files();
    let refused = |edited: Value, parts: &[&str]| {
        sandbox.write("profile.json", edited.to_string());
        sandbox
            .run(&plan)
            .fails(1, &[&["profile.json"], parts].concat());
        assert_eq!(sandbox.files(), before);
    };
    let with = |field: &str, value: Value| {
        let mut edited = profile.clone();
        edited[field] = value;
        edited
    };
    refused(with("schema_version", json!(99)), &["99", "update moectl"]);
    refused(
        with("schema", json!("moectl.run")),
        &["moectl.run", "moectl.profile"],
    );
    refused(json!([1, 2]), &["moectl.profile"]);
    refused(with("layers", json!("none")), &["moectl.profile"]);
    // What a later version adds is not in the way.
    sandbox.write("profile.json", with("mood", json!("good")).to_string());
    sandbox.run(&plan).ok();
}

#[test]
fn a_trace_that_is_none_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("t.trace", "certainly not a trace of anything");
    let line = format!("plan --trace t.trace -m {}", small_model().display());
    sandbox.run(&line).fails(1, &["t.trace"]);
    assert_eq!(sandbox.files(), ["t.trace"]);
}

#[test]
fn report_refuses_what_is_no_run() {
    let sandbox = Sandbox::new();
    sandbox.write("run.json", "{}");
    sandbox
        .run("report run.json")
        .fails(1, &["run.json", "moectl.run"]);
    assert_eq!(sandbox.files(), ["run.json"]);
}

#[test]
fn a_placement_that_is_newer_foreign_or_contradicts_itself_is_refused() {
    let sandbox = Sandbox::new();
    let model = small_model();
    sandbox.run(&format!("plan -m {}", model.display())).ok();
    let good = sandbox.json("placement.json");
    let bench = format!(
        "bench --placement placement.json --ctx 64 -n 4 -m {}",
        model.display()
    );
    let refused = |edit: &dyn Fn(&mut Value), parts: &[&str]| {
        let mut bad = good.clone();
        edit(&mut bad);
        sandbox.write("placement.json", bad.to_string());
        let outcome = sandbox.run(&bench);
        outcome.fails(1, &[&["placement.json"], parts].concat());
        assert!(!sandbox.path("bench-out/run.json").exists());
    };
    refused(
        &|p| p["schema_version"] = json!(8),
        &["version 8", "update moectl"],
    );
    refused(
        &|p| p["schema"] = json!("moectl.profile"),
        &["moectl.profile", "moectl.placement"],
    );
    refused(
        &|p| p["policy"]["name"] = json!("crystal_ball"),
        &["crystal_ball"],
    );
    refused(
        &|p| p["layers"][0]["slots"] = json!(9999),
        &["layer 0: 9999 slots"],
    );
    refused(
        &|p| p["layers"][0]["pinned_experts"] = json!([0, 0]),
        &["layer 0"],
    );
    refused(&|p| p["layers"] = json!([]), &["number of layers is 0"]);
}

#[test]
fn optional_files_are_judged_where_they_are_used() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    std::fs::write(model.join("chat_template.jinja"), "{% if %}").unwrap();
    std::fs::write(model.join("generation_config.json"), "{").unwrap();
    let folder = model.to_str().unwrap();
    let corpus = sandbox.path("c.jsonl");
    std::fs::write(&corpus, "{\"text\": \"hello\"}\n").unwrap();
    let corpus = corpus.to_str().unwrap();
    sandbox
        .run_args(&["profile", corpus, "--model", folder])
        .ok();
    let outcome = sandbox.run_args(&["run", "hello", "-n", "1", "--model", folder]);
    outcome.fails(1, &["generation_config.json"]);
    std::fs::remove_file(model.join("generation_config.json")).unwrap();
    sandbox
        .run_args(&["run", "--raw", "hello", "-n", "1", "--model", folder])
        .ok();
    let outcome = sandbox.run_args(&["run", "hello", "-n", "1", "--model", folder]);
    outcome.fails(1, &["chat template line 1"]);
}

#[test]
fn a_git_lfs_pointer_is_named_as_one() {
    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for file in ["model.safetensors", "tokenizer.json"] {
        std::fs::write(model.join(file), pointer).unwrap();
        assert_refused(&sandbox, &model, &[file, "git-lfs pointer", "git lfs pull"]);
    }
}

/// Paths of Linux are bytes.
#[cfg(target_os = "linux")]
#[test]
fn a_model_folder_may_have_any_name() {
    use std::os::unix::ffi::OsStrExt;

    let sandbox = Sandbox::new();
    let model = sandbox.model("m");
    let name = sandbox.path("").join(std::ffi::OsStr::from_bytes(b"m\xff"));
    std::fs::rename(model, &name).unwrap();
    let mut command = sandbox.command(&["run", "hello", "-n", "1", "--model"]);
    crate::program::finish(command.arg(&name)).ok();
}

#[cfg(unix)]
#[test]
fn a_corpus_may_come_from_a_pipe() {
    let sandbox = Sandbox::new();
    let fifo = sandbox.path("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let path = fifo.clone();
    let writer = std::thread::spawn(move || {
        std::fs::write(path, "{\"text\": \"hello\"}\n{\"text\": \"world\"}\n")
    });
    let outcome = sandbox.run_args(&["profile", fifo.to_str().unwrap()]).ok();
    writer.join().unwrap().unwrap();
    assert!(outcome.stdout.contains("2 documents"), "{outcome:?}");
}
