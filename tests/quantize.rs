//! `quantize` from folder to folder: what transformers would write, or nothing.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use moectl::commands::quantize::{QuantizeOptions, Summary, quantize_checkpoint};
use moectl::formats::Checkpoint;
use moectl::formats::Dtype;
use moectl::formats::writer::{Planned, Writer};
use serde_json::{Value, json};

fn golden(folder: &str) -> PathBuf {
    let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    goldens.join(folder)
}

fn quantize(src: &Path, dst: &Path, options: &QuantizeOptions) -> anyhow::Result<Summary> {
    quantize_checkpoint(src, dst, options, &mut |_, _| ControlFlow::Continue(()))
}

fn skipping(names: &[&str]) -> QuantizeOptions {
    QuantizeOptions {
        skip: names.iter().map(|n| n.to_string()).collect(),
        ..QuantizeOptions::default()
    }
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[track_caller]
fn assert_same_tensors(found: &Path, expected: &Path) {
    let found = Checkpoint::open(found).unwrap();
    let expected = Checkpoint::open(expected).unwrap();
    assert!(found.names().eq(expected.names()));
    for name in expected.names() {
        let (a, b) = (found.tensor(name).unwrap(), expected.tensor(name).unwrap());
        assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape), "{name}");
        assert!(a.data[..] == b.data[..], "{name}: other bytes");
    }
}

#[test]
fn tiny_a_becomes_what_transformers_writes() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("nf4");
    let mut calls = Vec::new();
    let summary = quantize_checkpoint(
        &golden("tiny-a/bf16"),
        &dst,
        &QuantizeOptions::default(),
        &mut |done, total| {
            calls.push((done, total));
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    assert_same_tensors(&dst, &golden("tiny-a/nf4"));
    assert_eq!(summary.quantized, 221);
    assert_eq!(summary.files, 1);
    assert!(calls.is_sorted());
    let (done, total) = *calls.last().unwrap();
    assert_eq!((done, done), (total, summary.source_bytes));

    let mut expected = config(&golden("tiny-a/nf4"));
    expected["quantization_config"]["llm_int8_skip_modules"] = json!(["lm_head", "gate"]);
    assert_eq!(config(&dst), expected);
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let source = fs::read(golden("tiny-a/bf16").join(name)).unwrap();
        assert_eq!(fs::read(dst.join(name)).unwrap(), source, "{name}");
    }
}

#[test]
fn other_families_become_what_bitsandbytes_makes_of_each_linear() {
    for family in ["qwen3_moe", "qwen3_5_moe"] {
        let scratch = tempfile::tempdir().unwrap();
        let dst = scratch.path().join("nf4");
        let source = golden(&format!("{family}/bf16"));
        quantize(&source, &dst, &QuantizeOptions::default()).unwrap();
        assert_same_tensors(&dst, &golden(&format!("{family}/nf4")));
    }
}

#[test]
fn skip_list_is_read_as_transformers_4_57_reads_it() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("nf4");
    // `mlp.gate` is neither a last name nor a full one: the router becomes NF4.
    quantize(
        &golden("tiny-c/bf16"),
        &dst,
        &skipping(&["lm_head", "mlp.gate"]),
    )
    .unwrap();
    assert_same_tensors(&dst, &golden("tiny-c/nf4"));

    let dst = scratch.path().join("inside");
    let options = skipping(&["lm_head", "mlp", "model.layers.1.self_attn.q_proj"]);
    quantize(&golden("tiny-c/bf16"), &dst, &options).unwrap();
    let found = Checkpoint::open(&dst).unwrap();
    let quantized = found
        .names()
        .filter_map(|n| n.strip_suffix(".weight.quant_state.bitsandbytes__nf4"));
    let expected = [
        "model.layers.0.linear_attn.in_proj_ba",
        "model.layers.0.linear_attn.in_proj_qkvz",
        "model.layers.0.linear_attn.out_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.self_attn.v_proj",
    ];
    assert!(quantized.eq(expected));
}

#[test]
fn fused_experts_become_per_expert_weights_and_the_config_what_4_57_reads() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("nf4");
    quantize(
        &golden("tiny-c/bf16-fused"),
        &dst,
        &skipping(&["lm_head", "mlp.gate"]),
    )
    .unwrap();
    assert_same_tensors(&dst, &golden("tiny-c/nf4"));
    let config = config(&dst);
    assert_eq!(config["rope_theta"], 10_000_000.0);
    assert_eq!(config["partial_rotary_factor"], 0.25);
    assert_eq!(config["rope_scaling"], Value::Null);
    assert_eq!(config.get("rope_parameters"), None);
}

#[test]
fn large_output_is_split_with_an_index_and_the_same_on_every_run() {
    let scratch = tempfile::tempdir().unwrap();
    let options = QuantizeOptions {
        max_shard_bytes: 200_000,
        ..QuantizeOptions::default()
    };
    let (dst, again) = (scratch.path().join("nf4"), scratch.path().join("again"));
    let summary = quantize(&golden("tiny-a/bf16"), &dst, &options).unwrap();
    assert_eq!(summary.files, 5);
    assert_same_tensors(&dst, &golden("tiny-a/nf4"));
    quantize(&golden("tiny-a/bf16"), &again, &options).unwrap();
    for entry in fs::read_dir(&dst).unwrap() {
        let name = entry.unwrap().file_name();
        let bytes = fs::read(dst.join(&name)).unwrap();
        assert!(bytes == fs::read(again.join(&name)).unwrap(), "{name:?}");
        if Path::new(&name).extension() == Some("safetensors".as_ref()) {
            assert!(bytes.len() < 200_000 + 60_000, "{name:?}: {}", bytes.len());
        }
    }
    let index = fs::read(dst.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], summary.output_bytes);
}

#[test]
fn without_double_quantisation_the_scales_are_floats() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("nf4");
    let options = QuantizeOptions {
        double_quant: false,
        ..QuantizeOptions::default()
    };
    quantize(&golden("tiny-c/bf16"), &dst, &options).unwrap();
    let found = Checkpoint::open(&dst).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    let absmax = found.tensor(&format!("{name}.absmax")).unwrap();
    assert_eq!((absmax.dtype, absmax.shape), (Dtype::F32, vec![128]));
    assert!(!found.names().any(|n| n.contains("nested")));
    let source = Checkpoint::open(&golden("tiny-c/bf16")).unwrap();
    let before = source.matrix(name, 128, 64).unwrap().dequantize();
    let after = found.matrix(name, 128, 64).unwrap().dequantize();
    let error: f32 = before
        .iter()
        .zip(&after)
        .map(|(a, b)| (a - b).powi(2))
        .sum();
    let power: f32 = before.iter().map(|a| a * a).sum();
    assert!((error / power).sqrt() < 0.12, "{}", (error / power).sqrt());
    assert_eq!(
        config(&dst)["quantization_config"]["bnb_4bit_use_double_quant"],
        false
    );
}

/// Writes a model folder of the given tensors.
fn model(folder: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)], config: Value) {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let planned = tensors.iter().map(|(name, dtype, shape, _)| Planned {
        name: name.to_string(),
        dtype: *dtype,
        shape: shape.to_vec(),
    });
    let path = folder.join("model.safetensors");
    let mut writer = Writer::create(&path, planned.collect(), BTreeMap::new()).unwrap();
    for (name, _, _, data) in tensors {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
}

fn f32s(n: usize, value: f32) -> Vec<u8> {
    value.to_le_bytes().repeat(n)
}

#[test]
fn mtp_tensors_are_dropped_and_only_linears_quantised() {
    let scratch = tempfile::tempdir().unwrap();
    let (src, dst) = (scratch.path().join("src"), scratch.path().join("dst"));
    model(
        &src,
        &[
            ("lm_head.weight", Dtype::F32, &[2, 64], f32s(128, 1.0)),
            (
                "model.embed_tokens.weight",
                Dtype::F32,
                &[2, 64],
                f32s(128, 1.0),
            ),
            (
                "model.layers.0.conv1d.weight",
                Dtype::F32,
                &[2, 1, 4],
                f32s(8, 1.0),
            ),
            (
                "model.layers.0.mlp.gate.weight",
                Dtype::F32,
                &[2, 64],
                f32s(128, 1.0),
            ),
            ("model.layers.0.q_proj.bias", Dtype::F32, &[2], f32s(2, 1.0)),
            (
                "model.layers.0.q_proj.weight",
                Dtype::F32,
                &[2, 64],
                f32s(128, 1.0),
            ),
            ("mtp.fc.weight", Dtype::F32, &[2, 64], f32s(128, 1.0)),
            ("mtp.norm.weight", Dtype::F32, &[2], f32s(2, 1.0)),
        ],
        json!({"torch_dtype": "float32"}),
    );
    let summary = quantize(&src, &dst, &QuantizeOptions::default()).unwrap();
    assert_eq!(
        (summary.quantized, summary.kept, summary.mtp_dropped),
        (1, 5, 2)
    );
    let found = Checkpoint::open(&dst).unwrap();
    let weight = found.matrix("model.layers.0.q_proj.weight", 2, 64).unwrap();
    assert_eq!(weight.dequantize(), [1.0; 128]);
    let quantization = &config(&dst)["quantization_config"];
    assert_eq!(quantization["bnb_4bit_compute_dtype"], "float32");
}

/// The error, after checking that it left nothing behind.
#[track_caller]
fn refusal(scratch: &Path, src: &Path, dst: &Path) -> String {
    let before = fs::read_dir(scratch).unwrap().count();
    let error = quantize(src, dst, &QuantizeOptions::default()).unwrap_err();
    assert_eq!(fs::read_dir(scratch).unwrap().count(), before);
    format!("{error:#}").replace(&format!("{}/", scratch.display()), "")
}

#[test]
fn a_quantised_source_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let src = golden("tiny-a/nf4");
    let error = refusal(scratch.path(), &src, &scratch.path().join("dst"));
    let expected = "quantised already (quantization_config: bitsandbytes); \
                    expected bf16, f16 or f32 weights";
    assert_eq!(error, format!("{}: {expected}", src.display()));
}

#[test]
fn a_weight_that_is_not_a_number_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let src = scratch.path().join("src");
    let mut weights = f32s(128, 1.0);
    weights[4 * 77..4 * 78].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    model(
        &src,
        &[("q.weight", Dtype::F32, &[2, 64], weights)],
        json!({}),
    );
    let error = refusal(scratch.path(), &src, &scratch.path().join("dst"));
    assert_eq!(
        error,
        "tensor `q.weight`: weight 77 is -inf, expected a finite number"
    );
}

#[test]
fn a_folder_with_files_is_never_written_to() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("dst");
    fs::create_dir(&dst).unwrap();
    fs::write(dst.join("notes.txt"), "mine").unwrap();
    let error = refusal(scratch.path(), &golden("tiny-c/bf16"), &dst);
    assert_eq!(
        error,
        "dst: holds files already; choose another folder or empty it"
    );
    fs::remove_file(dst.join("notes.txt")).unwrap();
    quantize(&golden("tiny-c/bf16"), &dst, &QuantizeOptions::default()).unwrap();
}

#[test]
fn a_missing_source_is_named_and_a_missing_parent_is_made() {
    let scratch = tempfile::tempdir().unwrap();
    let error = refusal(
        scratch.path(),
        &scratch.path().join("none"),
        &scratch.path().join("dst"),
    );
    assert!(
        error.starts_with("none/config.json: No such file"),
        "{error}"
    );
    let dst = scratch.path().join("none/dst");
    quantize(&golden("tiny-c/bf16"), &dst, &QuantizeOptions::default()).unwrap();
    assert!(dst.join("config.json").is_file());
    let beneath_a_file = dst.join("config.json/dst");
    let error = refusal(scratch.path(), &golden("tiny-c/bf16"), &beneath_a_file);
    assert!(error.starts_with("none/dst/config.json/dst: "), "{error}");
}

#[test]
fn stopping_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let dst = scratch.path().join("dst");
    let mut calls = 0;
    let error = quantize_checkpoint(
        &golden("tiny-a/bf16"),
        &dst,
        &QuantizeOptions::default(),
        &mut |_, _| {
            calls += 1;
            if calls == 10 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "interrupted; nothing was written"
    );
    assert_eq!(calls, 10);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}
