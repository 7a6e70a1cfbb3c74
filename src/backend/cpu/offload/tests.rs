//! What is computed for a GPU, against the batched path and against tokens that are alone.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::backend::Routing;
use crate::backend::cpu::experts::add_experts;
use crate::backend::cpu::tests::{random_nf4, random_vector};

fn layer(count: usize, dim: usize, inner: usize) -> Vec<ExpertWeights> {
    (0..count as u64)
        .map(|e| ExpertWeights {
            gate_proj: random_nf4(inner, dim, 3 * e),
            up_proj: random_nf4(inner, dim, 3 * e + 1),
            down_proj: random_nf4(dim, inner, 3 * e + 2),
        })
        .collect()
}

/// The same sum through the batched path, as the difference to a block without routed experts.
#[test]
fn offloaded_experts_give_what_the_batched_path_gives() {
    for (count, dim, inner) in [(4, 64, 64), (6, 128, 192), (16, 256, 64)] {
        for threads in [1, 2] {
            let mut offload = Offload::new(Some(threads)).unwrap();
            let weights = layer(count, dim, inner);
            let layer = load_layer(offload.pool(), &weights, CpuPrecision::Int16).unwrap();
            assert!(layer.arena.is_some());
            let mut shared = load_layer(offload.pool(), &weights[..1], CpuPrecision::Int16)
                .unwrap()
                .experts;
            let x = random_vector(dim, 5);
            let ids = [count as i32 - 1, 0, 2];
            let topk_weights = vec![0.5, 0.3, 0.2];
            let mut out = vec![f32::NAN; dim];
            for _ in 0..2 {
                let asked = Asked {
                    ids: &ids,
                    weights: &topk_weights,
                    x: &x,
                };
                (offload.compute(&layer.experts, &[asked], &mut out)).unwrap();
            }
            let routing = Routing {
                num_experts_per_tok: 3,
                topk_ids: ids.iter().map(|&id| id as u16).collect(),
                topk_weights,
            };
            let mut expected = vec![0.0; dim];
            let shared = shared.remove(0);
            let isa = offload.isa();
            add_experts(
                &mut offload.pool,
                isa,
                &layer.experts,
                &shared,
                &routing,
                &[0.0],
                &offload.workers[0].x,
                &[0],
                &mut Buffers::default(),
                &mut expected,
            )
            .unwrap();
            for (a, b) in out.iter().zip(&expected) {
                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} for {b}");
            }
        }
    }
}

#[test]
fn no_experts_are_zero_and_unknown_ones_an_error() {
    let mut offload = Offload::new(Some(1)).unwrap();
    let layer = load_layer(offload.pool(), &layer(2, 64, 64), CpuPrecision::Int16).unwrap();
    let mut out = vec![1.0; 64];
    let x = vec![0.0; 64];
    let asked = |ids, weights| Asked {
        ids,
        weights,
        x: &x,
    };
    offload
        .compute(&layer.experts, &[asked(&[], &[])], &mut out)
        .unwrap();
    assert!(out.iter().all(|&v| v == 0.0));
    let unknown = offload.compute(&layer.experts, &[asked(&[2], &[1.0])], &mut out);
    assert!(unknown.is_err());
    let many = AtOnce {
        experts: &layer.experts,
        asked: &[asked(&[0, 1], &[1.0, 1.0])],
    };
    let too_many = offload.answer(&many, 1, &mut |_, _| Ok(()), &mut out);
    assert!(too_many.is_err());
}

#[test]
fn after_a_panic_within_a_layer_the_next_token_is_exact() {
    for threads in [1, 2] {
        let mut offload = Offload::new(Some(threads)).unwrap();
        let mut load = |weights: &[ExpertWeights]| {
            load_layer(offload.pool(), weights, CpuPrecision::Int16)
                .unwrap()
                .experts
        };
        let experts = load(&layer(2, 128, 64));
        // A matrix that claims more rows than it has tiles: its second tile row panics, with the
        // expert's first one done.
        let mut broken = load(&layer(2, 128, 64));
        broken[1].up = load(&layer(1, 128, 32)).remove(0).up;
        broken[1].up.rows = 64;
        let x = random_vector(128, 5);
        let asked = Asked {
            ids: &[0, 1],
            weights: &[0.6, 0.4],
            x: &x,
        };
        let (mut expected, mut out) = (vec![0.0; 128], vec![0.0; 128]);
        (offload.compute(&experts, &[asked], &mut expected)).unwrap();
        for _ in 0..10 {
            let error = offload.compute(&broken, &[asked], &mut out).unwrap_err();
            assert!(error.to_string().contains("panicked"), "{error}");
            out.fill(f32::NAN);
            offload.compute(&experts, &[asked], &mut out).unwrap();
            assert_eq!(out, expected);
        }
    }
}

/// Asks after a while, as a GPU does, and for the next layer once this one is answered.
struct Later<'a> {
    experts: &'a [Expert],
    asked: Asked<'a>,
    /// Layers that are requested; the GPU stalls before it requests the next one.
    requested: usize,
    looks: [AtomicUsize; 5],
    answers: [AtomicUsize; 5],
}

impl Later<'_> {
    /// Whether `layer` was looked at so often since the one before it was answered.
    fn is_time(&self, layer: usize, looks: usize) -> bool {
        let answers = |layer: usize| self.answers[layer].load(Ordering::Acquire);
        let may_ask = layer == 0 || answers(layer - 1) > 0;
        may_ask && self.looks[layer].fetch_add(1, Ordering::AcqRel) > looks
    }
}

impl Requests for Later<'_> {
    fn layers(&self) -> usize {
        self.answers.len()
    }

    fn tokens(&self) -> usize {
        1
    }

    fn experts(&self, _: usize) -> &[Expert] {
        self.experts
    }

    fn predicted(&self, layer: usize, _: usize) -> Option<&[i32]> {
        // An expert that does not exist must be no worse than one that is not asked for.
        self.is_time(layer, 10).then_some(&[1, 0, 99])
    }

    fn asked(&self, layer: usize, _: usize) -> Option<Asked<'_>> {
        (layer < self.requested && self.is_time(layer, 100)).then_some(self.asked)
    }

    fn answered(&self, layer: usize) {
        self.answers[layer].fetch_add(1, Ordering::AcqRel);
    }
}

#[test]
fn requests_are_answered_once_and_an_error_while_waiting_ends_the_token() {
    for threads in [1, 2] {
        let mut offload = Offload::new(Some(threads)).unwrap();
        let layer = load_layer(offload.pool(), &layer(3, 128, 64), CpuPrecision::Int16).unwrap();
        let x = random_vector(128, 5);
        let mut expected = vec![0.0; 128];
        let mut out = vec![0.0; 5 * 128];
        let asked = Asked {
            ids: &[2, 0],
            weights: &[0.6, 0.4],
            x: &x,
        };
        (offload.compute(&layer.experts, &[asked], &mut expected)).unwrap();
        for round in 0..200 {
            let stands_still = round % 4;
            let later = Later {
                experts: &layer.experts,
                asked,
                requested: stands_still,
                looks: Default::default(),
                answers: Default::default(),
            };
            let mut wait = |layer: usize, fetch: &dyn Fn()| {
                if layer == stands_still {
                    return Err(BackendError::Other("the GPU stands still".into()));
                }
                fetch();
                while later.asked(layer, 0).is_none() {}
                Ok(())
            };
            out.fill(f32::NAN);
            let answer = offload.answer(&later, 4, &mut wait, &mut out);
            assert!(answer.is_err());
            let answered: Vec<usize> = later
                .answers
                .iter()
                .map(|a| a.load(Ordering::Relaxed))
                .collect();
            for (layer, out) in out.chunks_exact(128).enumerate() {
                let is_answered = layer < stands_still;
                assert_eq!(answered[layer], usize::from(is_answered), "layer {layer}");
                assert!(!is_answered || out == expected, "layer {layer}");
            }
            let later = Later {
                requested: 5,
                answers: Default::default(),
                looks: Default::default(),
                ..later
            };
            let mut wait = |layer: usize, _: &dyn Fn()| {
                while later.asked(layer, 0).is_none() {}
                Ok(())
            };
            offload.answer(&later, 4, &mut wait, &mut out).unwrap();
            assert!(out.chunks_exact(128).all(|out| out == expected));
            assert!(later.answers.iter().all(|a| a.load(Ordering::Relaxed) == 1));
        }
    }
}

/// Each token's picks, some of them others' too, in an order of its own; one token asks for nothing.
fn picks_of(token: usize, count: usize) -> (Vec<i32>, Vec<f32>) {
    let ids: Vec<i32> = match token {
        3 => Vec::new(),
        _ => (0..1 + token % 3)
            .map(|i| ((3 * token + 2 * i) % count) as i32)
            .collect(),
    };
    let weights = (0..ids.len()).map(|i| 0.6 / (1 + i + token) as f32);
    let weights = weights.collect();
    (ids, weights)
}

#[test]
fn a_token_has_the_same_bits_whoever_shares_its_step() {
    for precision in [CpuPrecision::Int16, CpuPrecision::Int8] {
        for (count, dim, inner) in [(4, 64, 64), (9, 128, 192)] {
            for threads in [1, 3] {
                let mut offload = Offload::new(Some(threads)).unwrap();
                let layer =
                    load_layer(offload.pool(), &layer(count, dim, inner), precision).unwrap();
                let picks: Vec<_> = (0..MAX_TOKENS).map(|t| picks_of(t, count)).collect();
                let x: Vec<_> = (0..MAX_TOKENS as u64)
                    .map(|t| random_vector(dim, 7 + t))
                    .collect();
                let asked: Vec<Asked> = (picks.iter().zip(&x))
                    .map(|((ids, weights), x)| Asked { ids, weights, x })
                    .collect();
                let mut alone = vec![f32::NAN; MAX_TOKENS * dim];
                for (asked, out) in asked.iter().zip(alone.chunks_exact_mut(dim)) {
                    (offload.compute(&layer.experts, &[*asked], out)).unwrap();
                }
                for tokens in [1, 2, 4, 5, 8] {
                    for first in [0, MAX_TOKENS - tokens] {
                        let mut out = vec![f32::NAN; tokens * dim];
                        let some = &asked[first..first + tokens];
                        offload.compute(&layer.experts, some, &mut out).unwrap();
                        let expected = &alone[first * dim..(first + tokens) * dim];
                        assert_eq!(out, expected, "{tokens} from {first}, {threads} threads");
                    }
                }
            }
        }
    }
}
