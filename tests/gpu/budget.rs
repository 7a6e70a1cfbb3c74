//! A budget that changes while a sequence is generated: slots go and come, the sequence stays.

use moectl::backend::BackendError;
use moectl::engine::experts::ExpertManager;
use moectl::engine::{Engine, EngineError};
use moectl::planning::execution::MARGIN_BYTES;
use moectl::planning::{PolicyConfig, Throttle};

use super::{engine, layers, some_ids, step};

fn slots(engine: &Engine) -> usize {
    engine.experts().unwrap().total_slots()
}

#[test]
fn slots_shrink_and_grow_with_the_budget_and_the_sequence_goes_on() {
    let (prompt, steps) = (some_ids(20, 1), some_ids(40, 4));
    let run = |changes: bool| -> (Vec<Vec<f32>>, Vec<usize>) {
        let mut engine = engine(80);
        let num_experts = engine.shape().moe.num_experts;
        let layers = layers(PolicyConfig::Lru, &engine, 6);
        let manager = ExpertManager::new(PolicyConfig::Lru, num_experts, &layers, Throttle::NONE);
        engine.place(manager).unwrap();
        engine.reset(80).unwrap();
        let prefilled = engine.prefill(&prompt, &mut |_, _, _| {}, &mut |_| true);
        prefilled.unwrap();
        let held = engine.vram_held().unwrap();
        let slot = held.slots_bytes / slots(&engine) as u64;
        let used = engine.vram_bytes().unwrap() + MARGIN_BYTES;
        // The router's picks so far: nothing was told, so what is in slots goes first.
        let picks = vec![vec![0; num_experts]; layers.len()];
        let (mut logits, mut counts) = (Vec::new(), vec![slots(&engine)]);
        for (i, &id) in steps.iter().enumerate() {
            let budget = match i {
                10 => Some(used - 8 * slot),
                20 => Some(used - held.slots_bytes - 1),
                30 => Some(used + 12 * slot),
                _ => None,
            };
            if let Some(budget) = budget.filter(|_| changes) {
                let before = slots(&engine);
                match engine.set_vram_budget(budget, &picks) {
                    Ok(fitting) => {
                        assert_eq!(fitting, Some(slots(&engine)));
                        assert!(engine.vram_bytes().unwrap() + MARGIN_BYTES <= budget);
                        let held = engine.experts().unwrap().contents();
                        let filled = held.iter().flatten().flatten().count();
                        assert_eq!(filled, before.min(slots(&engine)), "what was there stays");
                    }
                    Err(EngineError::Backend(BackendError::DoesNotFit { .. })) => {
                        assert_eq!((i, slots(&engine)), (20, before));
                    }
                    Err(error) => panic!("{error}"),
                }
                counts.push(slots(&engine));
            }
            logits.push(step(&mut engine, id, &mut |_, _, _| {}));
        }
        (logits, counts)
    };
    let (expected, _) = run(false);
    let (logits, counts) = run(true);
    assert_eq!(counts, [24, 16, 16, 36]);
    for (step, (a, b)) in logits.iter().zip(&expected).enumerate() {
        let far = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 5e-3, "step {step}");
    }
}
