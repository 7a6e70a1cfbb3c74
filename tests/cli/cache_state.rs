//! The file that keeps what is in the expert slots from one run to the next.

use moectl::formats::document::CACHE_STATE;
use moectl::formats::{Document, ModelId};
use moectl::planning::{CacheState, ExpertCache, PolicyConfig, Throttle};

use crate::program::{Sandbox, small_model};

const LFU: PolicyConfig = PolicyConfig::LfuDecay {
    half_life_tokens: 64.0,
    margin_picks: 0.5,
};

fn model_id(hash: &str) -> ModelId {
    ModelId {
        id: "org/name".into(),
        revision: None,
        fingerprint: Some(hash.into()),
        config_sha256: "c0".into(),
        synthetic: false,
    }
}

fn cache() -> ExpertCache {
    let layers = vec![LFU.fill(3, &[4, 5, 6]); 2];
    ExpertCache::build(LFU, 16, &layers, Throttle::NONE)
}

#[test]
fn what_is_written_is_read_back_and_used() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("state.json");
    let mut warm = cache();
    for _ in 0..20 {
        warm.on_step(0, &[9, 10]);
        warm.on_step(1, &[1, 2]);
    }
    let document = Document::new(CACHE_STATE, Some(model_id("f00d")), warm.state(LFU));
    document.write(&path).unwrap();

    let back = Document::<CacheState>::read(&path, CACHE_STATE).unwrap();
    back.check_model(&path, &model_id("f00d")).unwrap();
    let mut cold = cache();
    cold.restore(LFU, &back.body).unwrap();
    for layer in 0..2 {
        assert_eq!(cold.contents(layer), warm.contents(layer));
    }
    assert!(cold.slot(0, 9).is_some() && cold.slot(1, 2).is_some());
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < 4000, "{size} bytes");
}

#[test]
fn foreign_newer_and_damaged_states_are_refused_with_the_reason() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("state.json");
    let document = Document::new(CACHE_STATE, Some(model_id("f00d")), cache().state(LFU));
    document.write(&path).unwrap();
    let good = std::fs::read_to_string(&path).unwrap();

    let message = document.check_model(&path, &model_id("beef")).unwrap_err();
    assert!(message.to_string().contains("made for model"), "{message}");

    for (from, to, part) in [
        (
            "\"schema_version\": 1",
            "\"schema_version\": 7",
            "version 7",
        ),
        ("moectl.cache-state", "moectl.run", "is a `moectl.run` file"),
        ("lfu_decay", "crystal_ball", "crystal_ball"),
        ("\"layers\"", "\"floors\"", "layers"),
    ] {
        sandbox.write("state.json", good.replace(from, to));
        let error = Document::<CacheState>::read(&path, CACHE_STATE).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert!(error.to_string().contains("state.json"), "{error}");
    }
    sandbox.write("state.json", &good[..good.len() / 2]);
    assert!(Document::<CacheState>::read(&path, CACHE_STATE).is_err());
}

#[test]
fn run_and_bench_refuse_a_state_before_anything_loads() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let model = model.to_str().unwrap();
    let refused = |part: &str| {
        for verb in [
            "run --prompt-ids 1,2 -n 1",
            "bench --ctx 64 -n 2 --repetitions 1",
        ] {
            let line = format!("{verb} -m {model} --cache-state state.json");
            let outcome = sandbox.run(&line);
            outcome.fails(1, &["state.json", part, "remove it, or name another file"]);
        }
    };
    sandbox.write("state.json", "{\"schema\": \"moectl.cache-st");
    refused("not a moectl.cache-state file");
    let document = Document::new(CACHE_STATE, Some(model_id("f00d")), cache().state(LFU));
    document.write(&sandbox.path("state.json")).unwrap();
    refused("made for model `org/name`");
    let text = std::fs::read_to_string(sandbox.path("state.json")).unwrap();
    let newer = text.replace("\"schema_version\": 1", "\"schema_version\": 9");
    sandbox.write("state.json", newer);
    refused("update moectl");
}

#[test]
fn without_expert_slots_nothing_is_written_and_that_is_said() {
    let sandbox = Sandbox::new();
    let model = small_model();
    let flags = "--backend cpu --prompt-ids 1,2 -n 1 --cache-state state.json";
    let outcome = sandbox.run(&format!("run -m {} {flags}", model.to_str().unwrap()));
    assert!(outcome.ok().stderr.contains("no expert slots"));
    assert!(!sandbox.path("state.json").exists());
    sandbox.write("file", "");
    let missing = flags.replace("state.json", "file/state.json");
    let outcome = sandbox.run(&format!("run -m {} {missing}", model.to_str().unwrap()));
    outcome.fails(1, &["file/state.json", "cannot be written"]);
}
