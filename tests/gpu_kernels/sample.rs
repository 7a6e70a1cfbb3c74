//! sample.cu: the best logits of a token.

use moectl::backend::cuda::abi::{Best, MAX_CANDIDATES};
use moectl::backend::cuda::geometry;

use crate::{Gpu, Rng, args};

/// What the kernel says of `logits`, candidates sorted by id.
struct Found {
    count: usize,
    id: usize,
    logit: f32,
    candidates: Vec<(usize, f32)>,
}

fn find(gpu: &Gpu, logits: &[f32], wanted: usize) -> Found {
    let vocab = logits.len();
    let chunk = geometry::sample_chunk(vocab);
    let maxima = gpu.nans(vocab.div_ceil(chunk));
    let (counter, best) = (gpu.zeros(4), gpu.nans(size_of::<Best>() / 4));
    let logits = gpu.up(logits);
    // Twice: the counter is as it was.
    for _ in 0..2 {
        gpu.launch(
            "sample_best",
            geometry::sample_best(vocab),
            args![
                logits.address(),
                vocab as i32,
                chunk as i32,
                wanted as i32,
                maxima.address(),
                counter.address(),
                best.address()
            ],
        );
    }
    let best = gpu.down::<Best>(&best)[0];
    let count = best.count as usize;
    let both = best.ids.iter().zip(&best.logits);
    let mut candidates: Vec<(usize, f32)> = both
        .take(count.min(MAX_CANDIDATES))
        .map(|(&id, &logit)| (id as usize, logit))
        .collect();
    candidates.sort_by_key(|&(id, _)| id);
    Found {
        count,
        id: best.id as usize,
        logit: best.logit,
        candidates,
    }
}

/// The lowest id among the best.
fn best_of(logits: &[f32]) -> usize {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&x| x == best).unwrap()
}

const SIZES: [usize; 10] = [1, 2, 31, 63, 64, 65, 1000, 4096, 49_153, 151_936];

#[test]
fn the_best_and_everything_as_good_as_the_wanted_th() {
    let Some(gpu) = Gpu::open() else { return };
    for (i, vocab) in SIZES.into_iter().enumerate() {
        let mut rng = Rng::new(i as u64);
        let smooth = rng.gausses(vocab, 3.0);
        // Many equal ones, both zeros among them.
        let coarse: Vec<f32> = smooth.iter().map(|x| (x * 0.7).round() - 6.0).collect();
        let zeros: Vec<f32> = (0..vocab)
            .map(|i| if i % 3 == 0 { 0.0 } else { -0.0 })
            .collect();
        let masked: Vec<f32> = (smooth.iter().enumerate())
            .map(|(i, &x)| if i % 7 == 3 { x } else { f32::NEG_INFINITY })
            .collect();
        for (name, logits) in [
            ("smooth", &smooth),
            ("coarse", &coarse),
            ("zeros", &zeros),
            ("masked", &masked),
        ] {
            for wanted in [0, 1, 20, 64] {
                let what = format!("{vocab} {name} logits, {wanted} wanted");
                let found = find(&gpu, logits, wanted);
                let expected = best_of(logits);
                assert_eq!(found.id, expected, "{what}");
                assert_eq!(found.logit.to_bits(), logits[expected].to_bits(), "{what}");
                if wanted == 0 {
                    assert_eq!(found.count, 0, "{what}");
                    continue;
                }
                let mut sorted = logits.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let bound = sorted[wanted.min(vocab) - 1];
                let needed: Vec<usize> = (0..vocab).filter(|&id| logits[id] >= bound).collect();
                assert!(
                    found.count >= needed.len() && found.count <= vocab,
                    "{what}"
                );
                if found.count > MAX_CANDIDATES {
                    continue;
                }
                assert_eq!(found.candidates.len(), found.count, "{what}");
                for &(id, logit) in &found.candidates {
                    assert_eq!(logit.to_bits(), logits[id].to_bits(), "{what}: {id}");
                }
                for id in needed {
                    let there = found.candidates.binary_search_by_key(&id, |&(id, _)| id);
                    assert!(there.is_ok(), "{what}: {id} is missing");
                }
                if name == "smooth" && vocab > 10_000 {
                    assert!(found.count < 4 * wanted + 64, "{what}: {}", found.count);
                }
            }
        }
    }
}

#[test]
fn the_first_broken_logit_is_told() {
    let Some(gpu) = Gpu::open() else { return };
    for (i, vocab) in SIZES.into_iter().enumerate() {
        let mut rng = Rng::new(100 + i as u64);
        let mut logits = rng.gausses(vocab, 3.0);
        let places = [vocab - 1, vocab * 2 / 3, vocab / 2];
        for (at, broken) in places.into_iter().zip([f32::NAN, f32::INFINITY, -f32::NAN]) {
            logits[at] = broken;
            let expected = logits
                .iter()
                .position(|x| x.is_nan() || *x == f32::INFINITY)
                .unwrap();
            let found = find(&gpu, &logits, 20);
            assert_eq!(found.id, expected, "{vocab} logits");
            assert!(
                found.logit.is_nan() || found.logit == f32::INFINITY,
                "{vocab} logits: {}",
                found.logit
            );
        }
        let none = find(&gpu, &vec![f32::NEG_INFINITY; vocab], 20);
        assert_eq!(
            (none.id, none.logit),
            (0, f32::NEG_INFINITY),
            "{vocab} logits"
        );
    }
}
