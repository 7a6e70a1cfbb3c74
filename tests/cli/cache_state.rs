//! The file that keeps what is in the expert slots from one run to the next.

use moectl::formats::document::CACHE_STATE;
use moectl::formats::{Document, ModelId};
use moectl::planning::{CacheState, ExpertCache, PolicyConfig, Throttle};

use crate::program::Sandbox;

const LFU: PolicyConfig = PolicyConfig::LfuDecay {
    half_life_tokens: 64.0,
    margin_picks: 0.5,
};

fn model(hash: &str) -> ModelId {
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
    let document = Document::new(CACHE_STATE, Some(model("f00d")), warm.state(LFU));
    document.write(&path).unwrap();

    let back = Document::<CacheState>::read(&path, CACHE_STATE).unwrap();
    back.check_model(&path, &model("f00d")).unwrap();
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
    let document = Document::new(CACHE_STATE, Some(model("f00d")), cache().state(LFU));
    document.write(&path).unwrap();
    let good = std::fs::read_to_string(&path).unwrap();

    let message = document.check_model(&path, &model("beef")).unwrap_err();
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
