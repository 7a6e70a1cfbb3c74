//! The expert cache where it really moves experts: what was simulated is what happens, and what was
//! saved is what a later run starts with. On the emulated GPU, through the engine and the program.
#![cfg(feature = "emulate")]

#[path = "gpu/admission.rs"]
mod admission;
#[path = "gpu/budget.rs"]
mod budget;
#[path = "cli/program.rs"]
mod program;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::Duration;

use moectl::backend::KvDtype;
use moectl::backend::cpu::CpuPrecision;
use moectl::backend::{LogitRows, OnRouting};
use moectl::engine::experts::ExpertManager;
use moectl::engine::{BackendChoice, Engine, GpuOptions, LoadOptions, Residency};
use moectl::model::Source;
use moectl::planning::execution::PrefillSettings;
use moectl::planning::simulator::simulate;
use moectl::planning::trace::{Phase, Picks, Record};
use moectl::planning::{ExpertCache, LayerSlots, Offer, PolicyConfig, Precision, Throttle};
use program::{Outcome, Sandbox, data, finish};
use serde_json::{Value, json};

/// Four layers of 16 experts, four a token.
fn model() -> PathBuf {
    data("goldens/tiny-a/nf4")
}

const LFU: PolicyConfig = PolicyConfig::LfuDecay {
    half_life_tokens: 8.0,
    margin_picks: 0.5,
};

/// The engine opens its device itself, and asks this variable which.
fn emulate() {
    static SET: Once = Once::new();
    // SAFETY: every test that reads the environment in this process waits here first.
    SET.call_once(|| unsafe { std::env::set_var("MOECTL_EMULATE", "1") });
}

fn engine(max_tokens: usize) -> Engine {
    engine_of(model().to_str().unwrap(), max_tokens, None)
}

fn engine_of(model: &str, max_tokens: usize, prefill_tokens: Option<usize>) -> Engine {
    engine_within(None, model, max_tokens, prefill_tokens)
}

/// As [`engine_of`], within a budget of GPU memory.
fn engine_within(
    vram_bytes: Option<u64>,
    model: &str,
    max_tokens: usize,
    prefill_tokens: Option<usize>,
) -> Engine {
    emulate();
    let source = Source::resolve(Some(model)).unwrap();
    let options = LoadOptions {
        backend: BackendChoice::Cuda(0),
        threads: Some(2),
        cpu_precision: CpuPrecision::default(),
        gpu: GpuOptions {
            vram_bytes,
            residency: Residency::Nothing,
            prefill: PrefillSettings {
                precision: Precision::Exact,
                chunk_tokens: prefill_tokens,
                picked_tokens: 0,
            },
            ..GpuOptions::default()
        },
        kv_dtype: Some(KvDtype::F16),
        progress: &|_, _| {},
        max_tokens,
    };
    Engine::load(&source, &options).unwrap()
}

fn layers(config: PolicyConfig, engine: &Engine, slots: usize) -> Vec<LayerSlots> {
    vec![config.fill(slots, &[0, 1, 2, 3, 4, 5, 6, 7]); engine.shape().num_layers()]
}

/// Feeds `prompt` at once and then tokens one by one; the picks, and every logit of a step.
fn drive(engine: &mut Engine, prompt: &[u32], steps: &[u32]) -> (Vec<Record>, Vec<f32>) {
    let (mut records, mut logits) = (Vec::new(), Vec::new());
    let mut on_routing = |layer: usize, first: usize, routing: &moectl::backend::Routing| {
        let phase = match first < prompt.len() {
            true => Phase::Prefill,
            false => Phase::Decode,
        };
        let (ids, weights) = (&routing.topk_ids, &routing.topk_weights);
        records.push(Record::Picks(Picks::new(phase, layer, first, ids, weights)));
    };
    engine.reset(prompt.len() + steps.len()).unwrap();
    if !prompt.is_empty() {
        engine
            .prefill(prompt, &mut on_routing, &mut |_| true)
            .unwrap();
    }
    for &id in steps {
        logits.extend(step(engine, id, &mut on_routing));
    }
    (records, logits)
}

/// One token, and time enough for the copies after it, which nobody waits for.
fn step(engine: &mut Engine, id: u32, on_routing: &mut OnRouting<'_>) -> Vec<f32> {
    let logits = engine.forward(&[id], LogitRows::Last, on_routing).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    logits
}

/// What was read from VRAM against the hits of the policy: an expert whose copy is late, because the
/// machine is busy, is computed from RAM.
#[track_caller]
fn are_hits(from_vram: u64, hits: u64) {
    assert!(
        from_vram <= hits && 100 * (hits - from_vram) <= 2 * hits,
        "{from_vram} of {hits}"
    );
}

fn some_ids(count: usize, seed: usize) -> Vec<u32> {
    // Few different ones, so that experts come back.
    (0..count)
        .map(|i| ((i * i + 3 * i + seed) % 11 * 17 + 3) as u32)
        .collect()
}

#[test]
fn hits_are_those_of_the_simulator_to_the_last_one() {
    let (prompt, steps) = (some_ids(20, 1), some_ids(60, 4));
    let throttle = Throttle {
        admits_per_step: 0.5,
        burst_admits: 4.0,
    };
    let mut plain = engine(80);
    let (_, expected) = drive(&mut plain, &prompt, &steps);
    let mut engine = engine(80);
    for config in [
        PolicyConfig::Static,
        PolicyConfig::Lru,
        PolicyConfig::LruPinned { pinned_share: 0.5 },
        LFU,
    ] {
        let num_experts = engine.shape().moe.num_experts;
        let k = engine.shape().moe.num_experts_per_tok;
        let layers = layers(config, &engine, 6);
        let manager = ExpertManager::new(config, num_experts, &layers, throttle);
        engine.place(manager).unwrap();
        engine.take_times();
        let (records, logits) = drive(&mut engine, &prompt, &steps);
        let times = engine.take_times().unwrap();

        let mut simulated = ExpertCache::build(config, num_experts, &layers, throttle);
        let is_prefill = |r: &&Record| matches!(r, Record::Picks(p) if p.phase == Phase::Prefill);
        for record in records.iter().filter(is_prefill) {
            let Record::Picks(picks) = record else {
                continue;
            };
            for ids in picks.topk_ids.chunks_exact(k) {
                simulated.learn(usize::from(picks.layer), ids);
            }
        }
        let admitted: usize = (0..layers.len())
            .map(|layer| {
                // A prompt this short is stepped through: copies go over PCIe.
                let at_most = simulated.admitted_over_pcie(layer);
                simulated.admit_prefill(layer, Offer::of_any(at_most)).len()
            })
            .sum();
        assert_eq!(admitted > 0, config == LFU);
        let decode = records.iter().filter(|r| !is_prefill(r));
        let outcome = simulate(&mut simulated, k, decode);

        let cache = engine.experts().unwrap();
        assert_eq!(cache.stopped(), None);
        assert_eq!(cache.layer_counts(), outcome.layers, "{}", config.label());
        let picks = (steps.len() * layers.len() * k) as u64;
        assert_eq!(outcome.hits() + outcome.misses(), picks);
        assert_eq!(outcome.admits() > 0, config.is_dynamic());
        assert!(outcome.hits() > picks / 10, "{}", outcome.hit_rate());
        // And the slots hold what the policy says: what was a hit was read from VRAM. A prompt
        // this short is stepped through, with the slots as they are at first.
        let at_first = |records: &[Record]| -> u64 {
            let in_slots = |p: &Picks| {
                let here = |e: &&u16| usize::from(**e) < 6;
                p.topk_ids.iter().filter(here).count() as u64
            };
            records
                .iter()
                .map(|r| match r {
                    Record::Picks(p) if p.phase == Phase::Prefill => in_slots(p),
                    _ => 0,
                })
                .sum()
        };
        are_hits(times.experts_vram, outcome.hits() + at_first(&records));
        let far = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 5e-3, "{}", config.label());
    }
}

#[test]
fn a_new_context_finds_in_the_slots_what_the_policy_put_there() {
    let mut engine = engine(40);
    let num_experts = engine.shape().moe.num_experts;
    let layers = layers(PolicyConfig::Lru, &engine, 6);
    let manager = ExpertManager::new(PolicyConfig::Lru, num_experts, &layers, Throttle::NONE);
    engine.place(manager).unwrap();
    drive(&mut engine, &[], &some_ids(30, 2));
    // Much more room than before: keys, values and slots are laid out anew.
    engine.reset(400).unwrap();
    engine.take_times();
    let before = engine.experts().unwrap().counts();
    for id in some_ids(10, 2) {
        step(&mut engine, id, &mut |_, _, _| {});
    }
    let after = engine.experts().unwrap().counts();
    let times = engine.take_times().unwrap();
    are_hits(times.experts_vram, after.hits - before.hits);
}

/// A sandbox with a placement of six slots a layer under LRU, as `plan` writes it.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write(
        "moectl.toml",
        format!("model = {:?}\nthreads = 2\n", model()),
    );
    sandbox.run("plan --vram 2G --ctx 64 --policy lru").ok();
    edit(&sandbox, |placement| {
        for layer in placement["layers"].as_array_mut().unwrap() {
            *layer = json!({"slots": 6, "pinned_experts": [], "initial_experts": [0, 1, 2, 3]});
        }
        placement["throttle"] = Value::Null;
    });
    sandbox
}

fn edit(sandbox: &Sandbox, change: impl FnOnce(&mut Value)) {
    let mut placement = sandbox.json("placement.json");
    change(&mut placement);
    sandbox.write("placement.json", placement.to_string());
}

const RUN: &str = "run --json --temperature 0 --ignore-eos --placement placement.json";

fn command(sandbox: &Sandbox, flags: &str) -> Command {
    let ids: Vec<String> = some_ids(12, 5).iter().map(u32::to_string).collect();
    let line = format!("{RUN} --prompt-ids {} {flags}", ids.join(","));
    let mut command = sandbox.command(&line.split_whitespace().collect::<Vec<_>>());
    command.env("MOECTL_EMULATE", "1");
    command
}

fn run(sandbox: &Sandbox, flags: &str) -> Outcome {
    finish(&mut command(sandbox, flags))
}

#[test]
fn a_saved_cache_is_what_the_next_run_starts_with() {
    let sandbox = sandbox();
    let first = run(&sandbox, "-n 16 --cache-state state.json").ok().json();
    let saved = sandbox.json("state.json");
    assert_eq!(saved["schema"], "moectl.cache-state");
    assert_eq!(saved["layers"][0]["experts"].as_array().unwrap().len(), 6);
    // Nothing generated, nothing moved: the next run ends with what it started with.
    run(&sandbox, "-n 1 --cache-state state.json").ok();
    let kept = sandbox.json("state.json");
    for (layer, (saved, kept)) in zip(&saved, &kept).enumerate() {
        assert_eq!(saved["experts"], kept["experts"], "layer {layer}");
    }
    // A warm start finds more, and says the same.
    let warm = run(&sandbox, "-n 16 --cache-state state.json").ok().json();
    assert_eq!(warm["token_ids"], first["token_ids"]);
    // Two tokens have one step, before which no copy is under way.
    let cold_run = run(&sandbox, "-n 2").ok().json();
    let warm = run(&sandbox, "-n 2 --cache-state state.json").ok();
    let warm_run = warm.json();
    assert_eq!(warm_run["token_ids"], cold_run["token_ids"]);
    let hits = |run: &Value| run["experts"]["hits"].as_u64().unwrap();
    assert!(
        hits(&warm_run) > hits(&cold_run),
        "{} {}",
        hits(&warm_run),
        hits(&cold_run)
    );
    assert!(
        warm.stderr.contains("experts go on from state.json"),
        "{warm:?}"
    );
}

fn zip<'a>(a: &'a Value, b: &'a Value) -> impl Iterator<Item = (&'a Value, &'a Value)> {
    let layers = |v: &'a Value| v["layers"].as_array().unwrap().iter();
    layers(a).zip(layers(b))
}

#[test]
fn a_state_of_another_placement_is_refused_before_anything_loads() {
    let sandbox = sandbox();
    run(&sandbox, "-n 4 --cache-state state.json").ok();
    let good = std::fs::read(sandbox.path("state.json")).unwrap();
    let refused = |part: &str| {
        run(&sandbox, "-n 4 --cache-state state.json").fails(1, &["state.json", part]);
        let now = std::fs::read(sandbox.path("state.json")).unwrap();
        assert!(now == good, "a refused file is left as it was");
    };
    edit(&sandbox, |p| p["layers"][0]["slots"] = json!(5));
    refused("6 slots, this run has 5");
    edit(&sandbox, |p| {
        p["layers"][0]["slots"] = json!(6);
        p["policy"] = json!({"name": "least_stale"});
    });
    refused("the policy is lru, this run has least_stale");
}

#[test]
fn ctrl_c_writes_the_state_and_kill_leaves_the_old_file_whole() {
    let sandbox = sandbox();
    let start = |flags: &str| {
        let mut command = command(&sandbox, flags);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let read =
        |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let path = sandbox.path("state.json");
    // Once it is loaded and has had time for a few tokens.
    let mut command = command(&sandbox, "-n 2000 --ctx 4k --cache-state state.json");
    let mut child = (command.stdout(Stdio::null()).stderr(Stdio::piped()))
        .spawn()
        .unwrap();
    let mut notes = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(notes.any(|line| line.unwrap().contains("slots, policy")));
    std::thread::sleep(Duration::from_millis(300));
    // SAFETY: a signal to a process that we started and have not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let kept = read(&path);
    assert_eq!(kept["schema"], "moectl.cache-state");

    let before = std::fs::read(&path).unwrap();
    for ms in [200, 600, 1100] {
        let mut child = start("-n 2000 --ctx 4k --cache-state state.json");
        std::thread::sleep(Duration::from_millis(ms));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "after {ms} ms");
    }
    run(&sandbox, "-n 2 --cache-state state.json").ok();
}

#[test]
fn bytes_over_pcie_are_copies_and_what_the_gpu_reads_in_place() {
    let sandbox = sandbox();
    let run = |flags: &str| run(&sandbox, flags).ok().json()["experts"].clone();
    let of = |experts: &Value, field: &str| experts[field].as_u64().unwrap();
    let mut expert_bytes = None;
    // Of two, three, four missing experts one is read over PCIe.
    for flags in ["-n 8 --gpu-reads 0,1", "-n 8 --gpu-reads 0,1 --cpu-moe"] {
        let experts = run(flags);
        let layers = experts["cpu_share_by_layer"].as_array().unwrap();
        assert_eq!(layers.len(), 4);
        let shares = layers.iter().map(|s| s.as_f64().unwrap());
        let accesses = (of(&experts, "hits") + of(&experts, "misses")) as f64;
        let by_cpu = (shares.sum::<f64>() * accesses / 4.0).round() as u64;
        let in_place = of(&experts, "misses") - by_cpu;
        assert!(in_place > 0 && by_cpu > 0, "{experts}");
        let copied = of(&experts, "promotions");
        assert_eq!(copied > 0, !flags.contains("cpu-moe"));
        // The same for both: known from the first, which copies.
        let expert_bytes = *expert_bytes.get_or_insert(of(&experts, "moved_bytes") / copied.max(1));
        assert_eq!(of(&experts, "moved_bytes"), copied * expert_bytes);
        assert_eq!(
            of(&experts, "h2d_bytes"),
            (copied + in_place) * expert_bytes
        );
    }
}

#[test]
fn a_head_in_ram_is_carried_out_as_planned() {
    let sandbox = sandbox();
    let in_vram = run(&sandbox, "-n 12").ok().json();
    edit(&sandbox, |placement| placement["head"] = json!("ram"));
    let in_ram = run(&sandbox, "-n 12").ok().json();
    assert_eq!(in_ram["token_ids"], in_vram["token_ids"]);
}

#[test]
fn bench_keeps_the_cache_too() {
    let sandbox = sandbox();
    let flags = "bench --ctx 64 -n 8 --repetitions 1 --warmups 0 --quality-tokens 0 \
                 --placement placement.json --cache-state state.json --json";
    let mut command = sandbox.command(&flags.split_whitespace().collect::<Vec<_>>());
    command.env("MOECTL_EMULATE", "1");
    let outcome = finish(&mut command).ok();
    assert_eq!(sandbox.json("state.json")["schema"], "moectl.cache-state");
    let run = outcome.json();
    assert!(run["contexts"][0]["repetitions"][0]["experts"]["hits"].as_u64() > Some(0));
    // And says how far the prediction is off, and where.
    let mut command = sandbox.command(
        &flags
            .replace("--json", "")
            .split_whitespace()
            .collect::<Vec<_>>(),
    );
    command.env("MOECTL_EMULATE", "1");
    let table = finish(&mut command).ok().stdout;
    let line = table
        .lines()
        .find(|l| l.contains("predicted / measured ms of a token"));
    let line = line.expect(&table);
    for term in ["launch 0.00 / ", "GPU ", "experts "] {
        assert!(line.contains(term), "{line}");
    }
}

#[test]
fn policies_are_measured_by_turns_on_one_loaded_model() {
    let sandbox = sandbox();
    let flags = "bench --ctx 64 -n 8 --repetitions 2 --warmups 0 --quality-tokens 0 \
                 --placement placement.json --against static,none -o out";
    let mut command = sandbox.command(&flags.split_whitespace().collect::<Vec<_>>());
    command.env("MOECTL_EMULATE", "1");
    let shown = finish(&mut command).ok().stdout;
    assert!(shown.contains("against static"), "{shown}");
    let hits = |folder: &str, repetition: usize| {
        let run = sandbox.json(&format!("{folder}/run.json"));
        let repetition = &run["contexts"][0]["repetitions"][repetition];
        let hits = repetition["experts"]["hits"].as_u64().unwrap();
        (
            hits,
            repetition["output_sha256"].as_str().unwrap().to_string(),
        )
    };
    // The cache's hits depend on when its copies arrive; those of slots that never change do not.
    let planned = hits("out", 0);
    let fixed = hits("out/static", 0);
    assert!(planned.0 > 0 && fixed.0 > 0);
    assert_eq!(fixed, hits("out/static", 1));
    let none = hits("out/none", 0);
    assert_eq!(none.0, 0);
    assert!(
        planned.1 == fixed.1 && fixed.1 == none.1,
        "tokens do not depend on the policy"
    );
}
