//! Plans for other machines, budgets and engines.

use serde_json::{Value, json};

use crate::program::{Sandbox, data, small_model};

fn big() -> String {
    data("qwen3-next-80b").display().to_string()
}

#[test]
fn a_sweep_writes_a_curve_that_never_falls() {
    let sandbox = Sandbox::new();
    let line = format!(
        "plan --vram 14G --ctx 32k --sweep 8G..24G --hardware laptop-4090 -m {}",
        big()
    );
    sandbox.run(&line).ok();
    let mut table = csv::Reader::from_path(sandbox.path("sweep.csv")).unwrap();
    let columns = table.headers().unwrap().clone();
    let column = |name| columns.iter().position(|c| c == name).unwrap();
    let (budget, speed) = (column("vram_budget_bytes"), column("decode_tok_s"));
    let rows: Vec<(u64, f64)> = table
        .records()
        .map(|row| {
            let row = row.unwrap();
            (row[budget].parse().unwrap(), row[speed].parse().unwrap())
        })
        .collect();
    assert_eq!(rows.len(), 17);
    assert_eq!((rows[0].0, rows[16].0), (8 << 30, 24 << 30));
    assert!(rows.windows(2).all(|w| w[1].1 >= w[0].1), "{rows:?}");
    let placement = sandbox.json("placement.json");
    let at_14 = rows.iter().find(|row| row.0 == 14 << 30).unwrap();
    assert_eq!(placement["decode"]["tok_s"].as_f64(), Some(at_14.1));
    let png = std::fs::read(sandbox.path("sweep.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG") && png.len() > 5000);

    // The placement alone is enough for the picture of a report.
    sandbox.run("report --placement placement.json -o out").ok();
    assert!(sandbox.path("out/budget.png").is_file());
}

#[test]
fn llama_cpp_gets_as_many_layers_as_fit_and_not_one_more() {
    let sandbox = Sandbox::new();
    let line = |vram: &str| {
        let line = format!(
            "plan --vram {vram} --ctx 32k --export llama.cpp --json --hardware laptop-4090 -m {}",
            big()
        );
        sandbox.run(&line).ok().json()
    };
    let n = |value: &Value| value["n_cpu_moe"].as_u64().unwrap();
    let (small, large, all) = (line("6G"), line("14G"), line("80G"));
    // Some 10 GiB for layers of 0.9 GiB.
    assert!((36..=39).contains(&n(&large)), "{large}");
    assert!(n(&small) > n(&large) && n(&all) == 0);
    assert!(!all["command"].as_str().unwrap().contains("--n-cpu-moe"));
    let text = format!(
        "plan --vram 14G --ctx 32k --export llama.cpp --hardware laptop-4090 -m {}",
        big()
    );
    let text = sandbox.run(&text).ok().stdout;
    let flag = format!("-c 32768 -ngl 99 -fa on --n-cpu-moe {}", n(&large));
    assert!(text.contains(&flag), "{text}");
    // Moving whole layers is slower than moving the experts that are picked.
    let placement = sandbox.json("placement.json");
    let ours = placement["decode"]["tok_s"].as_f64().unwrap();
    assert!(large["predicted_decode_tok_s"].as_f64().unwrap() < ours);
}

#[test]
fn accelerate_gets_every_module_once_and_no_more_experts_than_fit() {
    let sandbox = Sandbox::new();
    let line = format!(
        "plan --vram 14G --ctx 32k --export accelerate --hardware laptop-4090 -m {}",
        big()
    );
    let map = sandbox.run(&line).ok().json();
    let map = map.as_object().unwrap();
    let placement = sandbox.json("placement.json");
    // Embedding, rotary, norm, head; six modules and 512 experts in each layer.
    assert_eq!(map.len(), 4 + 48 * (6 + 512));
    assert_eq!(map["model.layers.0.linear_attn"], 0);
    assert_eq!(map["model.layers.3.self_attn"], 0);
    assert_eq!(map["lm_head"], 0);
    let on_gpu = map
        .iter()
        .filter(|(name, device)| name.contains("experts.") && **device == 0)
        .count() as u64;
    let layers = placement["layers"].as_array().unwrap();
    let slots: u64 = layers.iter().map(|l| l["slots"].as_u64().unwrap()).sum();
    let embedding = 2 * 151_936 * 2048u64;
    let given_up = embedding.div_ceil(placement["expert_bytes"].as_u64().unwrap());
    assert_eq!(on_gpu, slots - given_up);
    // No module lies within another that is named too.
    assert!(!map.contains_key("model.layers.0") && !map.contains_key("model.layers.0.mlp"));
}

#[test]
fn eplb_gets_the_picks_of_the_profile() {
    let sandbox = Sandbox::new();
    sandbox.write("moectl.toml", format!("model = {:?}\n", small_model()));
    sandbox.write("c.jsonl", "{\"text\": \"one two three\"}\n".repeat(3));
    sandbox.run("profile c.jsonl --trace t.trace").ok();
    let from_profile = sandbox
        .run("plan --profile profile.json --export eplb --ctx 64")
        .ok()
        .json();
    let profile = sandbox.json("profile.json");
    let count = from_profile["logical_count"].as_array().unwrap();
    assert_eq!(json!(count.len()), profile["num_layers"]);
    let picks: u64 = count[0]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(json!(picks), profile["layers"][0]["picks"]);
    let from_trace = sandbox
        .run("plan --trace t.trace --export eplb --ctx 64")
        .ok()
        .json();
    assert_eq!(from_trace, from_profile);
    let outcome = sandbox.run("plan --export eplb --ctx 64 -o other.json");
    outcome.fails(2, &["--profile or --trace"]);
    assert!(!sandbox.path("other.json").exists());
}

#[test]
fn a_machine_file_is_planned_for_and_a_bad_one_is_refused() {
    let sandbox = Sandbox::new();
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/workloads/hardware/h100.json");
    let good: Value = serde_json::from_slice(&std::fs::read(shipped).unwrap()).unwrap();
    sandbox.write("mine.json", good.to_string());
    let plan = format!("plan --json --vram 14G --hardware mine.json -m {}", big());
    let by_file = sandbox.run(&plan).ok().json();
    let by_name = sandbox.run(&plan.replace("mine.json", "h100")).ok().json();
    assert_eq!(by_file["decode"], by_name["decode"]);
    assert_eq!(by_file["hardware_basis"], "mixed");

    let refused = |edit: &dyn Fn(&mut Value), parts: &[&str]| {
        let mut bad = good.clone();
        edit(&mut bad);
        sandbox.write("mine.json", bad.to_string());
        sandbox
            .run(&plan)
            .fails(1, &[&["mine.json"], parts].concat());
    };
    refused(
        &|h| h["schema_version"] = json!(2),
        &["version 2", "update moectl"],
    );
    refused(
        &|h| h["schema"] = json!("moectl.run"),
        &["moectl.run", "moectl.hardware"],
    );
    refused(
        &|h| h["machine"] = Value::Null,
        &["no measured figures", "moectl doctor"],
    );
    refused(
        &|h| h["machine"]["cpu"]["dram_read_gb_s"]["value"] = json!(-1.0),
        &["dram_read_gb_s is -1", "positive"],
    );
    refused(
        &|h| h["machine"]["gpu"]["h2d"] = json!([]),
        &["length of h2d is 0"],
    );
    refused(
        &|h| h["machine"]["cpu"]["dram_read_gb_s"] = json!("fast"),
        &["not a moectl.hardware file"],
    );
    let outcome = sandbox.run(&plan.replace("mine.json", "toaster"));
    outcome.fails(1, &["toaster", "laptop-4090"]);
}

#[test]
fn what_doctor_measures_can_be_planned_for() {
    let sandbox = Sandbox::new();
    let facts = sandbox.run("doctor --json -o here.json").ok().json();
    if facts["machine"].is_null() {
        eprintln!("no memory free to measure; not tested");
        return;
    }
    let line = format!("plan --json --vram 14G --hardware here.json -m {}", big());
    let placement = sandbox.run(&line).ok().json();
    // No GPU figures yet: everything is read from RAM, and the plan says so.
    let terms = placement["decode"]["terms"].as_array().unwrap();
    assert!(terms.iter().any(|term| term["name"] == "experts in RAM"));
    assert_eq!(placement["hardware_basis"], "mixed");
}

#[test]
fn a_forced_policy_is_the_policy_of_the_plan() {
    let sandbox = Sandbox::new();
    for name in [
        "static",
        "lru",
        "lru_pinned",
        "lru_threshold",
        "lfu_decay",
        "least_stale",
    ] {
        let line = format!(
            "plan --json --vram 14G --policy {name} --hardware laptop-4090 -m {}",
            big()
        );
        let placement = sandbox.run(&line).ok().json();
        assert_eq!(placement["policy"]["name"], name);
    }
    let outcome = sandbox.run(&format!("plan --policy fifo -m {}", big()));
    outcome.fails(2, &["fifo", "lfu_decay"]);
}
