//! The experts that a prompt used most, in the slots when it ends.

use moectl::backend::LogitRows;
use moectl::backend::Routing;
use moectl::engine::Engine;
use moectl::engine::experts::ExpertManager;
use moectl::planning::{ExpertCache, Offer, PolicyConfig, Throttle};

use super::{LFU, engine_of, engine_within, layers, some_ids};

/// Three groups of experts a layer, which use more ring buffers than there are.
fn many_experts(layers: usize) -> String {
    format!(
        "synth:qwen3-next-80b-a3b?layers={layers}&experts=160&hidden-size=128&vocab-size=8192\
         &moe-intermediate-size=64&shared-expert-intermediate-size=64&linear-key-heads=2\
         &linear-value-heads=4&linear-key-head-dim=64&linear-value-head-dim=64\
         &attention-heads=2&key-value-heads=1&head-dim=64"
    )
}

/// Bytes on the device beside dense weights, sequence and slots: with those of a workspace, if it is
/// not borrowed.
fn other_bytes(engine: &Engine) -> u64 {
    engine.vram_held().unwrap().other_bytes
}

fn place(engine: &mut Engine, config: PolicyConfig, contents: &[Vec<u16>]) {
    let slots = |hottest: &Vec<u16>| config.fill(hottest.len(), hottest);
    let layers: Vec<_> = contents.iter().map(slots).collect();
    let num_experts = engine.shape().moe.num_experts;
    let manager = ExpertManager::new(config, num_experts, &layers, Throttle::NONE);
    let fitting = engine.place(manager).unwrap().unwrap();
    assert_eq!(fitting, contents.iter().map(Vec::len).sum::<usize>());
}

/// Logits after a prompt and after a token behind it.
fn answer(engine: &mut Engine, prompt: &[u32]) -> [Vec<f32>; 2] {
    engine.reset(prompt.len() + 8).unwrap();
    let logits = engine.prefill(prompt, &mut |_, _, _| {}, &mut |_| true);
    let next = engine.forward(&[7], LogitRows::Last, &mut |_, _, _| {});
    [logits.unwrap().unwrap(), next.unwrap()]
}

/// Prompts in chunks of 64 with `slots` a layer, whose workspace is borrowed from them or not.
fn prompts_admit(model: &str, slots: usize, borrows: bool) {
    let mut engine = engine_of(model, 200, Some(64));
    let (num_layers, moe) = (engine.shape().num_layers(), engine.shape().moe.clone());
    let (experts, k) = (moe.num_experts, moe.num_experts_per_tok);
    let first: Vec<u16> = (0..slots as u16).collect();
    if borrows {
        // A budget without room for a workspace beside the slots.
        place(&mut engine, LFU, &vec![first.clone(); num_layers]);
        let held = engine.vram_held().unwrap();
        let budget = engine.vram_bytes().unwrap() + held.margin_bytes - (1 << 20);
        drop(engine);
        engine = engine_within(Some(budget), model, 200, Some(64));
    }
    let with_workspace = other_bytes(&engine);
    place(&mut engine, LFU, &vec![first.clone(); num_layers]);
    assert_eq!(other_bytes(&engine) < with_workspace, borrows);
    let slots = vec![LFU.fill(slots, &first); num_layers];
    let mut simulated = ExpertCache::build(LFU, experts, &slots, Throttle::NONE);
    let mut answers = Vec::new();
    // Two prompts in two chunks, the second after tokens of the first.
    for seed in [1, 6] {
        let prompt = some_ids(116, seed);
        engine.reset(prompt.len() + 8).unwrap();
        simulated.begin_sequence();
        engine.take_times();
        let mut told = Vec::new();
        let mut on_routing = |layer: usize, position: usize, routing: &Routing| {
            told.push((position, layer));
            for ids in routing.topk_ids.chunks_exact(k) {
                simulated.learn(layer, ids);
            }
        };
        let logits = engine.prefill(&prompt, &mut on_routing, &mut |_| true);
        let calls = [0, 64]
            .into_iter()
            .flat_map(|position| (0..num_layers).map(move |layer| (position, layer)));
        assert_eq!(told, calls.collect::<Vec<_>>());

        // As many changes as pay, and no bytes for them.
        let at_most = (experts / 8).max(4);
        let admitted: usize = (0..num_layers)
            .map(|layer| simulated.admit_prefill(layer, Offer::of_any(at_most)).len())
            .sum();
        let times = engine.take_times().unwrap();
        assert_eq!(times.promotions, admitted as u64);
        assert!(admitted > num_layers, "{admitted}");
        assert_eq!((times.promoted_bytes, times.h2d_bytes), (0, 0));
        let contents = engine.experts().unwrap().contents();
        for (layer, contents) in contents.iter().enumerate() {
            assert_eq!(contents, simulated.contents(layer), "layer {layer}");
        }
        // The next token finds them.
        let hits = |engine: &Engine| engine.experts().unwrap().counts().hits;
        let before = hits(&engine);
        let mut on_routing = |layer: usize, _: usize, routing: &Routing| {
            simulated.on_step(layer, &routing.topk_ids);
        };
        let next = engine.forward(&[7], LogitRows::Last, &mut on_routing);
        let found = engine.take_times().unwrap().experts_vram;
        assert_eq!(found, hits(&engine) - before);
        assert!(found > 0);
        let contents: Vec<Vec<u16>> = contents
            .into_iter()
            .map(|layer| layer.into_iter().flatten().collect())
            .collect();
        answers.push((prompt, contents, [logits.unwrap().unwrap(), next.unwrap()]));
    }
    // The same bits where those experts were placed, and the prompt's with others or none.
    for (prompt, contents, expected) in &answers {
        place(&mut engine, PolicyConfig::Static, contents);
        assert!(answer(&mut engine, prompt) == *expected, "placed");
        place(
            &mut engine,
            PolicyConfig::Static,
            &vec![first.clone(); num_layers],
        );
        assert!(answer(&mut engine, prompt)[0] == expected[0], "others");
        engine.place_nothing(&[]).unwrap();
        assert!(answer(&mut engine, prompt)[0] == expected[0], "none");
    }
}

#[test]
fn a_long_prompt_leaves_in_the_slots_what_it_used_most() {
    prompts_admit(super::model().to_str().unwrap(), 6, false);
}

#[test]
fn so_it_does_where_experts_come_in_several_groups() {
    prompts_admit(&many_experts(4), 40, false);
}

#[test]
fn so_it_does_where_slots_are_its_workspace() {
    prompts_admit(&many_experts(8), 60, true);
}

#[test]
fn what_ends_in_steps_is_brought_in_over_pcie() {
    let mut engine = engine_of(super::model().to_str().unwrap(), 200, Some(64));
    let layers = layers(LFU, &engine, 6);
    let manager = ExpertManager::new(LFU, 16, &layers, Throttle::NONE);
    engine.place(manager).unwrap();
    engine.take_times();
    let prompt = some_ids(70, 1);
    let logits = engine.prefill(&prompt, &mut |_, _, _| {}, &mut |_| true);
    assert!(logits.unwrap().is_some());
    let times = engine.take_times().unwrap();
    // One of six slots a layer.
    assert!((1..=4).contains(&times.promotions), "{}", times.promotions);
    assert!(times.promoted_bytes > 0 && times.promoted_bytes == times.h2d_bytes);
}
