//! Checkpoints that are not what they claim to be: an error that names the place, never a panic.

use std::fs;
use std::path::Path;

use moectl::formats::nf4::quantize::quantize;
use moectl::formats::{Bytes, Checkpoint, Dtype};
use proptest::prelude::*;
use serde_json::{Value, json};

const Q: &str = "layer.q_proj.weight";
const STATE: &str = "layer.q_proj.weight.quant_state.bitsandbytes__nf4";

/// A safetensors file of a header and data that need not fit together.
fn file(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    let len = (header.len() as u64).to_le_bytes();
    [&len, header.as_bytes(), data].concat()
}

type Stored = (String, &'static str, Vec<usize>, Vec<u8>);

/// A valid file of the given tensors.
fn valid(tensors: &[Stored]) -> Vec<u8> {
    let mut header = json!({"__metadata__": {"format": "pt"}});
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]});
        data.extend_from_slice(bytes);
    }
    file(&header, &data)
}

/// A plain vector and an NF4 weight `[3, 64]` with all its parts.
fn nf4_tensors() -> Vec<Stored> {
    let values: Vec<u8> = (0..192)
        .flat_map(|i| (i as f32).sin().to_le_bytes())
        .collect();
    let weight = quantize(Q, &values, Dtype::F32, &[3, 64], true).unwrap();
    let mut tensors = vec![("norm.weight".into(), "F32", vec![4], vec![0; 16])];
    for (suffix, bytes) in weight.into_tensors() {
        let (dtype, shape) = match suffix {
            "" => ("U8", vec![bytes.len(), 1]),
            ".quant_map" | ".nested_absmax" | ".nested_quant_map" => ("F32", vec![bytes.len() / 4]),
            _ => ("U8", vec![bytes.len()]),
        };
        tensors.push((format!("{Q}{suffix}"), dtype, shape, bytes));
    }
    tensors
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint, String> {
    Checkpoint::from_bytes("m.safetensors", Bytes::from(bytes)).map_err(|e| e.to_string())
}

#[track_caller]
fn assert_refused(bytes: Vec<u8>, expected: &str) {
    let error = open(bytes).unwrap_err();
    let expected = format!("m.safetensors: not a valid safetensors file: {expected}");
    assert!(
        error.starts_with(&expected),
        "\n   found: {error}\nexpected: {expected}"
    );
}

/// Opens the NF4 file after `change` and reads its matrix, which must fail with `expected`.
#[track_caller]
fn assert_matrix_refused(change: impl FnOnce(&mut Vec<Stored>), expected: &str) {
    let mut tensors = nf4_tensors();
    change(&mut tensors);
    let error = open(valid(&tensors)).unwrap().matrix(Q, 3, 64).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

fn part<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|t| t.0 == name).unwrap()
}

/// Replaces `from` by `to` in the JSON state.
fn edit_state(tensors: &mut [Stored], from: &str, to: &str) {
    let state = part(tensors, STATE);
    let text = String::from_utf8(state.3.clone()).unwrap();
    assert!(text.contains(from), "{text}");
    state.3 = text.replace(from, to).into_bytes();
    state.2 = vec![state.3.len()];
}

#[test]
fn files_without_a_whole_header_are_refused() {
    assert_refused(vec![], "0 bytes, too short to hold a header");
    assert_refused(vec![1, 2, 3], "3 bytes, too short to hold a header");
    let mut long = valid(&nf4_tensors());
    long[..8].copy_from_slice(&1_000_000u64.to_le_bytes());
    let expected = format!(
        "header of 1000000 bytes in a file of {}; truncated?",
        long.len()
    );
    assert_refused(long, &expected);
    let mut huge = valid(&nf4_tensors());
    huge[..8].copy_from_slice(&100_000_001u64.to_le_bytes());
    assert_refused(
        huge.clone(),
        "header of 100000001 bytes, at most 100000000 allowed",
    );
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_refused(
        huge,
        "header of 18446744073709551615 bytes, at most 100000000 allowed",
    );
}

#[test]
fn headers_that_are_not_tensors_by_name_are_refused() {
    assert_refused(
        file(&json!([1, 2]), &[]),
        "header: invalid type: sequence, expected an object",
    );
    assert_refused(
        file(&json!({"a": 1}), &[]),
        "header: tensor `a`: invalid type: integer `1`",
    );
    let unfinished = json!({"a": {"dtype": "F32", "shape": [1]}});
    assert_refused(
        file(&unfinished, &[0; 4]),
        "header: tensor `a`: missing field `data_offsets`",
    );
    let mut garbage = valid(&nf4_tensors());
    garbage[20] = 0xff;
    assert_refused(garbage, "header is not UTF-8 text: ");
    let mut cut = valid(&nf4_tensors());
    cut[..8].copy_from_slice(&40u64.to_le_bytes());
    assert_refused(cut, "header: EOF while parsing");
    let negative = json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}});
    assert_refused(
        file(&negative, &[0; 4]),
        "header: tensor `a`: invalid value: integer `-1`",
    );
}

#[test]
fn what_is_not_read_may_be_of_any_name_type_and_shape() {
    let header = json!({
        "a\"b\n": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "F8": {"dtype": "F8_E4M3", "shape": [7], "data_offsets": [1, 8]},
        "F4": {"dtype": "F4", "shape": [2, 4], "data_offsets": [8, 12]},
        "patches": {"dtype": "BOOL", "shape": [1, 1, 2, 1, 2], "data_offsets": [12, 16]},
        "deep": {"dtype": "F64", "shape": [1, 1, 1, 1, 1, 2], "data_offsets": [16, 32]},
        "norm": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]},
    });
    let checkpoint = open(file(&header, &[0; 36])).unwrap();
    assert_eq!(checkpoint.names().count(), 6);
    assert_eq!(checkpoint.tensor("a\"b\n").unwrap().shape, [1]);
    assert_eq!(checkpoint.tensor("patches").unwrap().shape, [1, 1, 2, 1, 2]);
    assert_eq!(checkpoint.tensor("deep").unwrap().shape, [1, 1, 1, 1, 2]);
    assert_eq!(checkpoint.vector("norm", &[1]).unwrap(), [0.0]);
    assert_eq!(
        checkpoint.vector("F8", &[7]).unwrap_err().to_string(),
        "tensor `F8`: dtype F8_E4M3, expected BF16, F16 or F32"
    );
}

#[test]
fn every_block_size_of_bitsandbytes_is_read() {
    for blocksize in [32usize, 64, 128, 256, 512, 1024, 2048, 4096] {
        // Codes 0 to 15 in turn, block b scaled by b + 1.
        let (rows, cols) = (96usize, 128);
        let n = rows * cols;
        let codes: Vec<u8> = (0..n / 2).map(|i| (i % 8 * 34 + 1) as u8).collect();
        let blocks = n.div_ceil(blocksize);
        let absmax: Vec<u8> = (0..blocks)
            .flat_map(|b| (b as f32 + 1.0).to_le_bytes())
            .collect();
        let state = format!(
            r#"{{"quant_type": "nf4", "blocksize": {blocksize}, "dtype": "bfloat16", "shape": [{rows}, {cols}]}}"#
        );
        let tensors: Vec<Stored> = vec![
            (Q.into(), "U8", vec![codes.len(), 1], codes),
            (format!("{Q}.absmax"), "F32", vec![blocks], absmax),
            (STATE.into(), "U8", vec![state.len()], state.into_bytes()),
        ];
        let matrix = open(valid(&tensors))
            .unwrap()
            .matrix(Q, rows, cols)
            .unwrap();
        for (i, weight) in matrix.dequantize().into_iter().enumerate() {
            let scale = (i / blocksize + 1) as f32;
            assert_eq!(weight, moectl::formats::nf4::CODE_BOOK[i % 16] * scale);
        }
    }
}

#[test]
fn truncated_and_padded_files_are_refused() {
    let whole = valid(&nf4_tensors());
    let data: usize = nf4_tensors().iter().map(|t| t.3.len()).sum();
    let expected = format!("{} bytes of data, expected {data}; truncated?", data - 1);
    assert_refused(whole[..whole.len() - 1].to_vec(), &expected);
    let padded = [whole, vec![0; 3]].concat();
    let expected = format!("{} bytes of data, expected {data}; the header", data + 3);
    assert_refused(padded, &expected);
}

#[test]
fn overlapping_tensors_and_gaps_are_refused() {
    let pair = |start: u64, end: u64| {
        json!({
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "b": {"dtype": "U8", "shape": [8], "data_offsets": [start, end]},
        })
    };
    open(file(&pair(8, 16), &[0; 16])).unwrap();
    assert_refused(
        file(&pair(4, 12), &[0; 16]),
        "tensor `b` overlaps `a`: starts at byte 4 of the data, expected 8",
    );
    assert_refused(
        file(&pair(10, 18), &[0; 18]),
        "tensor `b` leaves a gap after `a`: starts at byte 10 of the data, expected 8",
    );
    let late = json!({"a": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}});
    assert_refused(
        file(&late, &[0; 8]),
        "tensor `a` leaves a gap after the header: starts at byte 7 of the data, expected 0",
    );
}

#[test]
fn impossible_tensors_are_refused_by_name() {
    let one = |dtype: &str, shape: Value, offsets: Value| {
        let header = json!({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
        file(&header, &[0; 8])
    };
    assert_refused(
        one("F9", json!([8]), json!([0, 8])),
        "header: tensor `a`: dtype F9, which safetensors does not have",
    );
    assert_refused(
        one("F32", json!([3]), json!([0, 8])),
        "header: tensor `a`: bytes 0 to 8 for shape [3] of F32",
    );
    assert_refused(
        one("F32", json!([2]), json!([8, 0])),
        "header: tensor `a`: bytes 8 to 0 for shape [2] of F32",
    );
    assert_refused(
        one("F4", json!([15]), json!([0, 8])),
        "header: tensor `a`: bytes 0 to 8 for shape [15] of F4",
    );
    assert_refused(
        one("U8", json!([1u64 << 32, 0]), json!([0, 0])),
        "header: tensor `a`: shape [4294967296, 0] is beyond any real tensor",
    );
    // A product that wraps around, and one that wraps to exactly the right size.
    let max = u32::MAX;
    assert_refused(
        one("U8", json!([max, max, max]), json!([8, 0])),
        "header: tensor `a`: bytes 8 to 0 for shape [4294967295, 4294967295, 4294967295] of U8",
    );
    assert_refused(
        one("U8", json!([1u64 << 31, 1u64 << 31, 4]), json!([0, 0])),
        "header: tensor `a`: bytes 0 to 0 for shape [2147483648, 2147483648, 4] of U8",
    );
    assert_refused(
        one("U8", json!([8]), json!([u64::MAX - 8, u64::MAX])),
        "header: tensor `a`: bytes 18446744073709551607 to 18446744073709551615",
    );
}

/// As Python's JSON reader has it, and with it every program that wrote such a file.
#[test]
fn of_a_name_that_is_there_twice_the_last_counts() {
    let one = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let two = r#""a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    let open_both = |first: &str, second: &str| {
        let header = format!("{{{first},{second}}}");
        let length = (header.len() as u64).to_le_bytes();
        open([&length, header.as_bytes(), &[0; 2]].concat())
    };
    let checkpoint = open_both(one, two).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().shape, [2]);
    assert_eq!(checkpoint.names().count(), 1);
    assert!(open_both(two, two).is_ok());
    let error = open_both(two, one).unwrap_err();
    assert!(error.contains("2 bytes of data, expected 1"), "{error}");
}

#[test]
fn tensors_without_elements_are_fine() {
    let header = json!({
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [4, 4]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "two": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    });
    let checkpoint = open(file(&header, &[0; 8])).unwrap();
    assert_eq!(checkpoint.vector("empty", &[0, 4]).unwrap(), [] as [f32; 0]);
    assert_eq!(checkpoint.vector("one", &[]).unwrap(), [0.0]);
}

#[test]
fn wrong_shapes_dtypes_and_names_are_named() {
    let checkpoint = open(valid(&nf4_tensors())).unwrap();
    let refused = |e: Result<(), moectl::formats::FormatError>| e.unwrap_err().to_string();
    assert_eq!(
        refused(checkpoint.vector("norm.weight", &[5]).map(drop)),
        "tensor `norm.weight`: shape [4], expected [5]"
    );
    assert_eq!(
        refused(checkpoint.matrix(Q, 64, 3).map(drop)),
        format!("tensor `{Q}`: shape [3, 64], expected [64, 3]")
    );
    assert_eq!(
        refused(checkpoint.vector(&format!("{Q}.absmax"), &[3]).map(drop)),
        format!("tensor `{Q}.absmax`: dtype U8, expected BF16, F16 or F32")
    );
    assert_eq!(
        refused(checkpoint.matrix(&format!("{Q}.quant_map"), 4, 4).map(drop)),
        format!("tensor `{Q}.quant_map`: shape [16], expected [4, 4]")
    );
    assert_eq!(
        refused(checkpoint.matrix("layer.k_proj.weight", 3, 64).map(drop)),
        "tensor `layer.k_proj.weight` is missing from m.safetensors"
    );
}

#[test]
fn a_whole_nf4_weight_is_read() {
    open(valid(&nf4_tensors()))
        .unwrap()
        .matrix(Q, 3, 64)
        .unwrap();
}

#[test]
fn a_missing_or_damaged_quant_state_is_named() {
    assert_matrix_refused(
        |t| t.retain(|t| t.0 != STATE),
        &format!(
            "tensor `{Q}`: damaged quantisation state: `{Q}.absmax` is there, `{STATE}` is not"
        ),
    );
    assert_matrix_refused(
        |t| edit_state(t, "}", ""),
        &format!(
            "tensor `{Q}`: damaged quantisation state: not the expected JSON: \
             EOF while parsing an object at line 1 column {}",
            nf4_tensors().iter().find(|t| t.0 == STATE).unwrap().3.len() - 1
        ),
    );
    for (from, to, reason) in [
        (
            "\"blocksize\": 64",
            "\"blocksize\": 96",
            "blocksize 96, expected one of [32, 64, 128, 256, 512, 1024, 2048, 4096]",
        ),
        ("[3, 64]", "[0, 64]", "shape [0, 64] holds no weights"),
        (
            "[3, 64]",
            "[4294967296, 4294967296]",
            "shape [4294967296, 4294967296] holds no weights",
        ),
        (
            "\"shape\": [3, 64], ",
            "",
            "not the expected JSON: missing field `shape`",
        ),
        (
            "\"nested_dtype\": \"float32\", ",
            "",
            "not the expected JSON: missing field `nested_dtype`",
        ),
        (
            "\"nested_blocksize\": 256",
            "\"nested_blocksize\": 512",
            "nested_blocksize 512, expected 256",
        ),
        (
            "float32\", \"nested_o",
            "float16\", \"nested_o",
            "nested_dtype `float16`, expected `float32`",
        ),
        (
            "\"nested_offset\": ",
            "\"nested_offset\": 1e300, \"x\": ",
            "nested_offset 1e300 is not finite",
        ),
    ] {
        assert_matrix_refused(
            |t| edit_state(t, from, to),
            &format!("tensor `{Q}`: damaged quantisation state: {reason}"),
        );
    }
}

#[test]
fn other_quantisations_are_refused_by_name() {
    let expected = |found: &str| {
        format!(
            "tensor `{Q}`: quantisation `{found}` is not supported; supported: bitsandbytes nf4"
        )
    };
    assert_matrix_refused(
        |t| part(t, STATE).0 = format!("{Q}.quant_state.bitsandbytes__fp4"),
        &expected("bitsandbytes__fp4"),
    );
    assert_matrix_refused(|t| edit_state(t, "\"nf4\"", "\"fp4\""), &expected("fp4"));
}

#[test]
fn parts_of_another_length_or_missing_are_named() {
    assert_matrix_refused(
        |t| {
            let absmax = part(t, &format!("{Q}.absmax"));
            (absmax.2, absmax.3) = (vec![2], vec![0; 2]);
        },
        &format!("tensor `{Q}.absmax`: shape [2], expected [3]"),
    );
    assert_matrix_refused(
        |t| {
            let absmax = part(t, &format!("{Q}.absmax"));
            (absmax.1, absmax.3) = ("F32", vec![0; 12]);
        },
        &format!("tensor `{Q}.absmax`: dtype F32, expected U8"),
    );
    assert_matrix_refused(
        |t| {
            let codes = part(t, Q);
            (codes.2, codes.3) = (vec![90, 1], vec![0; 90]);
        },
        &format!(
            "tensor `{Q}`: damaged quantisation state: 90 bytes of codes, \
             expected 96 for shape [3, 64]"
        ),
    );
    for missing in ["absmax", "nested_absmax", "nested_quant_map"] {
        let name = format!("{Q}.{missing}");
        assert_matrix_refused(
            |t| t.retain(|t| t.0 != name),
            &format!("tensor `{name}` is missing from m.safetensors"),
        );
    }
    assert_matrix_refused(
        |t| t.retain(|t| t.0 != Q),
        &format!("tensor `{Q}` is missing from m.safetensors"),
    );
}

/// The error of opening `dir`, with its path left out.
fn open_dir(dir: &Path) -> String {
    let error = Checkpoint::open(dir).unwrap_err().to_string();
    let dir = dir.display().to_string();
    error.replace(&format!("{dir}/"), "").replace(&dir, "DIR")
}

#[test]
fn folders_without_a_whole_set_of_shards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let index = |text: &str| fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    assert_eq!(
        open_dir(dir),
        "DIR: holds neither model.safetensors nor model.safetensors.index.json; \
         expected a model folder"
    );
    fs::write(dir.join("a.safetensors"), valid(&nf4_tensors())).unwrap();
    index(r#"{"weight_map": {"norm.weight": "a.safetensors", "x": "b.safetensors"}}"#);
    assert_eq!(
        open_dir(dir),
        "model.safetensors.index.json: shard `b.safetensors` is missing; download it again"
    );
    for path in [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        ".",
    ] {
        index(&json!({"weight_map": {"norm.weight": path}}).to_string());
        assert_eq!(
            open_dir(dir),
            format!("model.safetensors.index.json: shard `{path}` is not a plain file name")
        );
    }
    index("{}");
    assert_eq!(
        open_dir(dir),
        "model.safetensors.index.json: not a shard index: missing field `weight_map`"
    );
    index(r#"{"weight_map": {}}"#);
    assert_eq!(
        open_dir(dir),
        "model.safetensors.index.json: names no tensors"
    );
    fs::write(dir.join("b.safetensors"), "").unwrap();
    index(r#"{"weight_map": {"norm.weight": "a.safetensors", "x": "b.safetensors"}}"#);
    assert_eq!(
        open_dir(dir),
        "b.safetensors: not a valid safetensors file: 0 bytes, too short to hold a header"
    );
    fs::write(dir.join("a.safetensors"), &valid(&nf4_tensors())[..1500]).unwrap();
    assert!(open_dir(dir).starts_with("a.safetensors: not a valid safetensors file: "));
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    fs::write(dir.join("a.safetensors"), pointer).unwrap();
    assert_eq!(
        open_dir(dir),
        "a.safetensors: not a valid safetensors file: a git-lfs pointer, not the weights; run \
         `git lfs pull` in its folder"
    );
}

/// A file with one vector, `norm.weight`, of that value.
fn one_norm(value: f32) -> Vec<u8> {
    valid(&[(
        "norm.weight".into(),
        "F32",
        vec![1],
        value.to_le_bytes().into(),
    )])
}

#[test]
fn the_single_file_comes_before_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let norm = || {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.vector("norm.weight", &[1]).unwrap()[0]
    };
    // The shard is gone: only its index is left of an older save.
    let index = r#"{"weight_map": {"norm.weight": "old.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(dir.path().join("model.safetensors"), one_norm(2.0)).unwrap();
    assert_eq!(norm(), 2.0);
    fs::write(dir.path().join("old.safetensors"), one_norm(1.0)).unwrap();
    assert_eq!(norm(), 2.0);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(norm(), 1.0);
}

#[test]
fn an_index_is_held_to_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let index = r#"{"metadata": {"total_size": NaN}, "weight_map": {
        "norm.weight": "a.safetensors", "mtp.norm.weight": "b.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(dir.path().join("a.safetensors"), one_norm(1.0)).unwrap();
    fs::write(dir.path().join("b.safetensors"), one_norm(2.0)).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // As in transformers, the last shard counts.
    assert_eq!(checkpoint.vector("norm.weight", &[1]).unwrap(), [2.0]);
    let error = checkpoint.vector("mtp.norm.weight", &[1]).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("the index has it in `b.safetensors`"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_damage_to_a_file_makes_reading_it_panic(
        changes in prop::collection::vec((0usize..1 << 16, any::<u8>()), 1..6),
        in_header in any::<bool>(),
        cut in prop::option::weighted(0.1, 0usize..4000),
    ) {
        let mut bytes = valid(&nf4_tensors());
        let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let range = if in_header { 0..header } else { 0..bytes.len() };
        for (at, value) in changes {
            // Digits and braces hit the interesting places more often than any byte does.
            let value = if in_header && value < 128 { b"0123456789[]{}\",:"[value as usize % 17] } else { value };
            bytes[range.start + at % range.len()] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        if let Ok(checkpoint) = open(bytes) {
            for name in checkpoint.names() {
                let tensor = checkpoint.tensor(name).unwrap();
                if let [rows, cols] = tensor.shape[..] {
                    let _ = checkpoint.matrix(name, rows, cols).map(|m| m.dequantize());
                }
                let _ = checkpoint.vector(name, &tensor.shape);
            }
            let _ = checkpoint.matrix(Q, 3, 64).map(|m| m.dequantize());
            checkpoint.fingerprint(b"");
        }
    }
}
