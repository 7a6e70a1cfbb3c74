//! Plans for the 80B model from its config.json alone.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::{Sandbox, data};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The placement that `plan` makes for the 80B model on the laptop, or the machine that is named.
#[track_caller]
fn plan(flags: &str) -> Value {
    let flags = match flags.contains("--hardware") {
        true => flags.to_string(),
        false => format!("{flags} --hardware laptop-4090"),
    };
    let sandbox = Sandbox::new();
    let model = data("qwen3-next-80b");
    let line = format!("plan --json -m {} {flags}", model.display());
    let start = Instant::now();
    let outcome = sandbox.run(&line).ok();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(outcome.stderr.contains("planned from config.json alone"));
    // What is printed is what is written.
    assert_eq!(outcome.json(), sandbox.json("placement.json"));
    outcome.json()
}

fn component(placement: &Value, tier: &str, name: &str) -> u64 {
    let items = placement["memory"].as_array().unwrap();
    let found = items
        .iter()
        .find(|item| item["tier"] == tier && item["component"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {tier}"))["bytes"]
        .as_u64()
        .unwrap()
}

fn slots(placement: &Value) -> Vec<u64> {
    let layers = placement["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["slots"].as_u64().unwrap())
        .collect()
}

#[test]
fn the_80b_plan_needs_only_config_json_and_itemises_every_byte() {
    let placement = plan("--vram 14G --ctx 32k");
    assert_eq!(placement["schema"], "moectl.placement");
    assert_eq!(placement["schema_version"], 1);
    assert!(placement["model"]["config_sha256"].is_string());
    assert!(placement["model"]["fingerprint"].is_null());
    assert_eq!(placement["vram_budget_bytes"], 14 * GIB);
    assert_eq!(placement["ctx_tokens"], 32 * 1024);

    // 24,576 bytes of keys and values per token: 12 layers, 2 heads of 256, f16.
    assert_eq!(
        component(&placement, "vram", "kv cache"),
        32 * 1024 * 24_576
    );
    // A state of 32 heads, 128 by 128 in f32, for each of 36 layers.
    assert_eq!(
        component(&placement, "vram", "delta-net state"),
        36 * 32 * 128 * 128 * 4
    );
    // bf16 rows of 2048 for a vocabulary of 151,936 and for 48 routers of 512 experts.
    assert_eq!(component(&placement, "vram", "lm_head"), 151_936 * 2048 * 2);
    assert_eq!(component(&placement, "vram", "router"), 48 * 512 * 2048 * 2);
    // NF4 with its scales: 0.9 GB dense, 1.67 MB an expert.
    let dense = component(&placement, "vram", "dense weights");
    assert!((850 * MIB..900 * MIB).contains(&dense), "{dense}");
    let expert = placement["expert_bytes"].as_u64().unwrap();
    assert!((1_660_000..1_780_000).contains(&expert), "{expert}");
    assert_eq!(component(&placement, "ram", "experts"), 48 * 512 * expert);

    let vram = placement["memory"].as_array().unwrap().iter();
    let vram = vram.filter(|item| item["tier"] == "vram");
    let total: u64 = vram.map(|item| item["bytes"].as_u64().unwrap()).sum();
    // The ceiling is hard, and less than one slot is left over.
    assert!(total <= 14 * GIB && 14 * GIB - total < expert, "{total}");
    let slots = slots(&placement);
    assert_eq!(slots.len(), 48);
    assert_eq!(
        slots.iter().sum::<u64>() * expert,
        component(&placement, "vram", "expert slots")
    );
    assert!(slots.iter().all(|&n| (130..=155).contains(&n)), "{slots:?}");
}

#[test]
fn a_longer_context_costs_slots_and_int8_gives_half_of_them_back() {
    let total = |flags| slots(&plan(flags)).iter().sum::<u64>();
    let short = total("--vram 14G --ctx 8k");
    let long = total("--vram 14G --ctx 128k");
    let long_int8 = total("--vram 14G --ctx 128k --kv int8");
    assert!(short > long_int8 && long_int8 > long);
    // 120k tokens of 24,576 bytes, in experts of 1.67 MB.
    let cost = short - long;
    assert!((1650..1950).contains(&cost), "{cost}");
    let back = long_int8 - long;
    assert!((800..1000).contains(&back), "{back}");
}

#[test]
fn a_faster_machine_is_predicted_to_be_faster_and_is_named() {
    let laptop = plan("--vram 14G --ctx 32k");
    let h100 = plan("--vram 76G --ctx 32k --hardware h100");
    // Room for all 512: nothing is handed over.
    assert!(slots(&h100).iter().all(|&n| n == 512));
    assert!(h100["hardware"].as_str().unwrap().contains("H100"));
    assert_eq!(laptop["hardware_basis"], "modelled");
    assert_eq!(h100["hardware_basis"], "mixed");
    for phase in ["decode", "prefill"] {
        let speed = |placement: &Value| placement[phase]["tok_s"].as_f64().unwrap();
        assert!(speed(&h100) > 1.5 * speed(&laptop), "{phase}");
    }
    // The terms are the whole prediction.
    let terms = laptop["decode"]["terms"].as_array().unwrap().iter();
    let ms: f64 = terms.map(|term| term["ms"].as_f64().unwrap()).sum();
    let expected = 1e3 / laptop["decode"]["tok_s"].as_f64().unwrap();
    assert!((ms / expected - 1.0).abs() < 1e-6, "{ms} {expected}");
}

#[test]
fn the_table_and_the_alternatives_are_for_people() {
    let sandbox = Sandbox::new();
    let model = data("qwen3-next-80b");
    let line = format!(
        "plan --vram 14G --ctx 32k --explain --hardware laptop-4090 -m {}",
        model.display()
    );
    let text = sandbox.run(&line).ok().stdout;
    for part in [
        "kv cache           VRAM    768.0 MiB",
        "experts            RAM ",
        "of 14.0 GiB",
        "context 32k",
        "tok/s",
        "alternative",
    ] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

#[test]
fn a_machine_that_is_not_known_is_refused_before_anything_is_written() {
    let sandbox = Sandbox::new();
    for line in ["plan --hardware nix", "bench --hardware nix"] {
        sandbox.run(line).fails(1, &["nix", "laptop-4090, h100"]);
        assert!(sandbox.files().is_empty(), "{line}");
    }
}

#[test]
fn with_room_for_all_experts_none_is_left_in_ram_without_a_word() {
    for flags in [
        "--vram 48G --hardware laptop-4090",
        "--vram 80G --hardware h100",
    ] {
        let placement = plan(flags);
        assert!(slots(&placement).iter().all(|&n| n == 512), "{flags}");
        let terms = placement["decode"]["terms"].as_array().unwrap();
        let handoffs = terms
            .iter()
            .find(|term| term["name"] == "handoffs")
            .unwrap();
        assert_eq!(handoffs["ms"], 0.0, "{flags}");
    }
}

#[test]
fn the_users_own_plan_says_for_which_model_and_machine_it_is_and_how_to_ask_for_others() {
    let sandbox = Sandbox::new();
    let text = sandbox.run("plan --vram 14G").ok().stdout;
    let mut lines = text.lines();
    let model = lines.next().unwrap();
    assert!(model.starts_with("model    tiny (built in"), "{text}");
    assert!(model.contains("--model"), "{text}");
    let machine = lines.next().unwrap();
    assert!(machine.starts_with("machine  this one, "), "{text}");
    assert!(machine.contains("--hardware laptop-4090, h100"), "{text}");
    if machine.contains("no GPU") {
        // No GPU, so nothing of a GPU: no VRAM, no speed that a CPU cannot have.
        assert!(!text.contains("VRAM  "), "{text}");
        let prefill = text
            .lines()
            .find(|line| line.starts_with("prefill"))
            .unwrap();
        let tok_s: f64 = prefill.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(tok_s < 200_000.0, "{prefill}");
    }
}

#[test]
fn a_plan_that_is_replaced_is_named() {
    let sandbox = Sandbox::new();
    let line = "plan --vram 2G --ctx 1k --hardware laptop-4090";
    assert!(!sandbox.run(line).ok().stderr.contains("replac"));
    let again = sandbox.run(line).ok().stderr;
    assert!(
        again.contains("placement.json, replacing the file"),
        "{again}"
    );
}
