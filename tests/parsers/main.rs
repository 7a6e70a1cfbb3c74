//! Files that are damaged in every way that a generator thinks of: refused or read, never a panic. The
//! same parsers as the fuzzers' in `fuzz/`, without their toolchain.

mod attacks;
mod targets;

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use targets::PARSERS;

fn in_project(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Well-formed files that damage begins with, by the name of their parser.
fn seeds(parser: &str) -> Vec<Vec<u8>> {
    let read = |path: &str| {
        let path = in_project(path);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let folder = in_project("fuzz/seeds").join(parser);
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    let mut seeds: Vec<Vec<u8>> = found.iter().map(|path| fs::read(path).unwrap()).collect();
    match parser {
        "config" => seeds.push(read("tests/data/qwen3-next-80b/config.json")),
        "run" => seeds.push(read("reports/2026-11-29-h200-tiny/run.json")),
        "hardware" => seeds.push(read("workloads/hardware/h100.json")),
        _ => {}
    }
    seeds
}

/// One way to damage a file.
#[derive(Clone, Debug)]
enum Damage {
    Cut(prop::sample::Index),
    Flip(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    use prop::sample::Index;
    let words: Vec<Vec<u8>> = [
        "null",
        "-1",
        "0",
        "1e400",
        "NaN",
        "18446744073709551616",
        "\"",
        "{",
        "[",
        "]]",
        "\\u0000",
        "{%",
        "{{",
        "-%}",
        "|",
        "\u{feff}",
        "~",
        "%",
        "[1:",
        "true",
    ]
    .iter()
    .map(|word| word.as_bytes().to_vec())
    .collect();
    prop_oneof![
        any::<Index>().prop_map(Damage::Cut),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Flip(at, byte)),
        (any::<Index>(), prop::sample::select(words))
            .prop_map(|(at, word)| Damage::Insert(at, word)),
        (any::<Index>(), 1usize..64).prop_map(|(at, n)| Damage::Remove(at, n)),
        (any::<Index>(), 1usize..64).prop_map(|(at, n)| Damage::Repeat(at, n)),
    ]
}

fn damaged(mut bytes: Vec<u8>, damages: &[Damage]) -> Vec<u8> {
    for damage in damages {
        let length = bytes.len();
        if length == 0 {
            break;
        }
        match damage {
            Damage::Cut(at) => bytes.truncate(at.index(length)),
            Damage::Flip(at, byte) => bytes[at.index(length)] ^= byte,
            Damage::Insert(at, word) => {
                let at = at.index(length);
                bytes.splice(at..at, word.iter().copied());
            }
            Damage::Remove(at, n) => {
                let at = at.index(length);
                bytes.drain(at..length.min(at + n));
            }
            Damage::Repeat(at, n) => {
                let at = at.index(length);
                let run = bytes[at..length.min(at + n)].to_vec();
                bytes.splice(at..at, run);
            }
        }
    }
    bytes
}

#[test]
fn seeds_are_well_formed_and_damaged_ones_panic_nowhere() {
    let mut failures = Vec::new();
    for &(name, parse) in PARSERS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name}: no seeds");
        for seed in &seeds {
            parse(seed);
        }
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let strategy = (
            prop::sample::select(seeds),
            prop::collection::vec(damage(), 1..6),
        );
        for _ in 0..200 {
            let (seed, damages) = strategy.new_tree(&mut runner).unwrap().current();
            let bytes = damaged(seed, &damages);
            if std::panic::catch_unwind(|| parse(&bytes)).is_err() {
                failures.push(format!("{name}: panics on {}", bytes.escape_ascii()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What the fuzzers found, kept beside them: each file is named after what was wrong.
#[test]
fn findings_of_the_fuzzers_panic_no_more() {
    for &(name, parse) in PARSERS {
        let folder = in_project("fuzz/findings").join(name);
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            parse(&fs::read(entry.unwrap().path()).unwrap());
        }
    }
}
