//! The abuses that safetensors' authors list in `attacks/README.md` of their repository, made anew: each
//! is refused, at once and by name.

use std::time::{Duration, Instant};

use moectl::formats::Checkpoint;

fn file(claimed_length: u64, header: &str, data: usize) -> Vec<u8> {
    let mut bytes = claimed_length.to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn honest(header: &str, data: usize) -> Vec<u8> {
    file(header.len() as u64, header, data)
}

/// Many tensors, each on the same `bytes` of data.
fn overlapping(tensors: usize, side: usize) -> Vec<u8> {
    let bytes = 4 * side * side;
    let one = |i| {
        format!(
            r#""w{i}": {{"dtype": "F32", "shape": [{side}, {side}], "data_offsets": [0, {bytes}]}}"#
        )
    };
    let tensors: Vec<String> = (0..tensors).map(one).collect();
    honest(&format!("{{{}}}", tensors.join(",")), bytes)
}

#[test]
fn abuses_that_safetensors_lists_are_refused() {
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        let header = format!(
            r#"{{"w": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#
        );
        honest(&header, 16)
    };
    let good = r#"{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}"#;
    let nested = "[".repeat(100_000);
    for (name, bytes, expected) in [
        (
            "a length beyond the file",
            file(1000, good, 16),
            "truncated?",
        ),
        (
            "a length of all bits",
            file(u64::MAX, good, 16),
            "at most 100000000 allowed",
        ),
        (
            "a header of more than 100 MB",
            file(100_000_001, good, 16),
            "at most 100000000 allowed",
        ),
        (
            "small tensors on each other",
            overlapping(10_000, 2),
            "overlaps",
        ),
        (
            "large tensors on each other",
            overlapping(10_000, 200),
            "overlaps",
        ),
        (
            "offsets beyond the file",
            tensor("F32", "[2, 2]", "[16, 32]"),
            "leaves a gap",
        ),
        (
            "a tensor beyond the file",
            tensor("F32", "[4, 4]", "[0, 64]"),
            "truncated?",
        ),
        (
            "negative offsets",
            tensor("F32", "[2, 2]", "[-16, 0]"),
            "invalid value",
        ),
        (
            "offsets in reverse",
            tensor("F32", "[2, 2]", "[16, 0]"),
            "bytes 16 to 0",
        ),
        (
            "another size than the shape's",
            tensor("F32", "[2, 3]", "[0, 16]"),
            "for shape [2, 3]",
        ),
        (
            "a shape that overflows",
            tensor("F32", "[4294967296, 4294967296]", "[0, 16]"),
            "real tensor",
        ),
        (
            "data that no tensor has",
            honest("{}", 16),
            "16 bytes of data, expected 0",
        ),
        (
            "deep nesting",
            honest(&format!(r#"{{"w": {nested}"#), 0),
            "w",
        ),
        (
            "deep metadata",
            honest(&format!(r#"{{"__metadata__": {nested}"#), 0),
            "header: EOF",
        ),
    ] {
        let start = Instant::now();
        let error = Checkpoint::from_bytes("attack", bytes.into())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{name}: {error}");
        assert!(error.starts_with("attack"), "{name}: {error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{name}");
    }
}
