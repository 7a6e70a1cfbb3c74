//! Flags that cannot be meant, budgets that cannot hold, outputs that cannot be written.

use std::time::{Duration, Instant};

use crate::program::{Sandbox, finish, small_model};

#[test]
fn contradictory_flags_are_usage_errors() {
    let sandbox = Sandbox::new();
    for line in [
        "run hello --prompt-ids 1,2",
        "run hello --chat",
        "run --chat --raw",
        "run --chat --json",
        "run hello --logprobs 2",
        "run hello --raw --system x",
        "plan --profile a.json --trace b",
        "plan --sweep 24G..8G",
        "plan --export gguf",
        "profile --merge a.json",
        "profile c.jsonl --merge a.json b.json",
        "bench --policy lru --cpu-moe",
        "report",
        "quantize only-one",
        "run hello -q -v",
        "fly",
    ] {
        sandbox.run(line).fails(2, &["error: "]);
        assert!(sandbox.files().is_empty(), "{line}");
    }
}

#[test]
fn bad_values_are_usage_errors_that_name_the_flag() {
    let sandbox = Sandbox::new();
    for (line, part) in [
        ("run x --temperature hot", "--temperature"),
        ("run x --temperature=-1", "temperature"),
        ("run x --temperature nan", "temperature"),
        ("run x --top-p 1.5", "top_p"),
        ("run x --min-p 2", "min_p"),
        ("run x --repetition-penalty 0", "repetition_penalty"),
        ("run x --seed -2", "expected a whole number from 0, or -1"),
        ("run x -n -2", "expected a whole number from 0, or -1"),
        ("run x --temperature -1", "temperature"),
        ("run x --top-k -1", "expected a whole number from 0"),
        ("run x --vram -1G", "is negative"),
        ("run x --vram 14", "14G?"),
        ("plan --ram 24", "24G?"),
        ("plan --sweep 8..24", "8G?"),
        ("run x --threads -1", "expected a whole number from 1"),
        ("bench --repetitions -1", "expected a whole number from 0"),
        ("run x --threads 0", "--threads"),
        ("run x --backend gpu", "auto, cuda[:N], cpu or reference"),
        ("run x --ctx 0", "--ctx"),
        ("run x --ctx many", "--ctx"),
        ("run x --ctx 1M", "max_position_embeddings"),
        ("run --chat --ctx 1M", "max_position_embeddings"),
        ("run --prompt-ids 1,two", "--prompt-ids"),
        ("run --prompt-ids 1,40000000", "40000000"),
        ("plan --vram 14X", "--vram"),
        ("plan --vram 1.2.3G", "--vram"),
        ("plan --vram 99999999999999999999G", "--vram"),
        ("plan --ctx 1M", "max_position_embeddings"),
        ("plan --kv fp4", "f16, int8, auto"),
        ("profile --shard 3/2", "--shard"),
        ("bench --ctx 8 -n 8", "--ctx"),
        ("bench --ctx 1M", "--ctx"),
        ("bench --repetitions 0", "--repetitions"),
        ("bench -n 1", "-n"),
        ("report r.json --fail-above lots", "--fail-above"),
        ("quantize a b --max-shard-size big", "--max-shard-size"),
    ] {
        sandbox.run(line).fails(2, &[part]);
        assert!(sandbox.files().is_empty(), "{line}");
    }
}

#[test]
fn a_prompt_without_tokens_or_without_room_is_a_usage_error() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let model = model.to_str().unwrap();
    let run = |rest: &[&str]| sandbox.run_args(&[&["run", "-m", model], rest].concat());
    run(&["--raw", ""]).fails(2, &["prompt is empty"]);
    run(&[""]).fails(2, &["prompt is empty"]);
    run(&[" \n "]).fails(2, &["prompt is empty"]);
    run(&["--system", "x", ""]).fails(2, &["prompt is empty"]);
    run(&["--raw"]).fails(2, &["prompt is empty"]);
    run(&["--ctx", "4", "a long prompt"]).fails(2, &["--ctx", "tokens"]);
}

#[test]
fn a_budget_below_the_dense_part_names_the_smallest_which_then_works() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let plan = |vram: &str| {
        let line = format!("plan --ctx 1k --vram {vram} -m {}", model.display());
        sandbox.run(&line)
    };
    let refused = plan("1M").fails(4, &["at least", "the budget is 1.0 MiB", "give --vram "]);
    assert!(sandbox.files().is_empty());
    let (_, way_out) = refused.stderr.split_once("give --vram ").unwrap();
    plan(way_out.split_whitespace().next().unwrap()).ok();
    assert_eq!(sandbox.files(), ["placement.json"]);

    let line = format!("plan --ram 1k -m {}", model.display());
    sandbox.run(&line).fails(4, &["RAM", "give --ram "]);
}

/// Each verb tells before it works: none gets as far as loading a model, let alone running it.
#[test]
fn an_output_that_cannot_be_written_is_found_before_the_work() {
    let sandbox = Sandbox::new();
    sandbox.write("file", "");
    for line in [
        "profile -o file/profile.json",
        "profile -o .",
        "profile -o absent/",
        "profile --trace file/t",
        "plan -o file/absent/placement.json",
        "bench -o file",
        "doctor -o file/hardware.json",
    ] {
        let start = Instant::now();
        let words: Vec<&str> = line.split(' ').collect();
        let outcome = finish(&mut sandbox.command(&words));
        outcome.fails(1, &[words[2].split('/').next().unwrap()]);
        assert!(start.elapsed() < Duration::from_secs(2), "{line}");
        assert_eq!(sandbox.files(), ["file"], "{line}");
    }
}
