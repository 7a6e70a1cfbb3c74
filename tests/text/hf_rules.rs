//! The sampling rules of transformers written down directly, slow and plain.

use moectl::engine::sampler::SamplingParams;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Probabilities `[vocab_size]` after all rules; the token is drawn from these.
pub fn probabilities(
    logits: &[f32],
    prompt: &[u32],
    generated: &[u32],
    params: &SamplingParams,
) -> Vec<f64> {
    let mut scores = penalized(logits, prompt, generated, params);
    for score in &mut scores {
        *score /= f64::from(params.temperature);
    }
    if params.top_k > 0 {
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let kth = sorted[params.top_k.min(sorted.len()) - 1];
        keep(&mut scores, |score| score >= kth);
    }
    if params.top_p < 1.0 {
        // Worst first; of equals the highest id, so that the lowest survives.
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
        let probabilities = softmax(&scores);
        let mut cumulative = 0.0;
        for &id in &order[..order.len() - 1] {
            cumulative += probabilities[id];
            if cumulative <= 1.0 - f64::from(params.top_p) {
                scores[id] = f64::NEG_INFINITY;
            }
        }
        // In exact arithmetic only the best has a cumulative probability above 1 - 0.
        if params.top_p == 0.0 {
            for &id in &order[..order.len() - 1] {
                scores[id] = f64::NEG_INFINITY;
            }
        }
    }
    let best = softmax(&scores).into_iter().fold(0.0, f64::max);
    let probabilities = softmax(&scores);
    for (score, p) in scores.iter_mut().zip(probabilities) {
        if p < f64::from(params.min_p) * best {
            *score = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

/// The ids drawn one after another from rows of logits.
pub fn draw_all(rows: &[Vec<f32>], prompt: &[u32], params: &SamplingParams) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    let mut generated = Vec::new();
    for logits in rows {
        let id = if params.temperature == 0.0 {
            argmax(&penalized(logits, prompt, &generated, params))
        } else {
            let point: f64 = rng.random();
            let mut cumulative = 0.0;
            probabilities(logits, prompt, &generated, params)
                .iter()
                .position(|p| {
                    cumulative += p;
                    point < cumulative
                })
                .unwrap()
        };
        generated.push(id as u32);
    }
    generated
}

fn penalized(
    logits: &[f32],
    prompt: &[u32],
    generated: &[u32],
    params: &SamplingParams,
) -> Vec<f64> {
    let mut scores = logits.to_vec();
    for (id, score) in (0..).zip(&mut scores) {
        let count = generated.iter().filter(|&&g| g == id).count();
        if prompt.contains(&id) || count > 0 {
            *score = if *score < 0.0 {
                *score * params.repetition_penalty
            } else {
                *score / params.repetition_penalty
            };
        }
        if count > 0 {
            *score -= params.presence_penalty + count as f32 * params.frequency_penalty;
        }
    }
    scores.into_iter().map(f64::from).collect()
}

fn argmax(scores: &[f64]) -> usize {
    (0..scores.len())
        .rev()
        .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))
        .unwrap()
}

fn keep(scores: &mut [f64], condition: impl Fn(f64) -> bool) {
    for score in scores {
        if !condition(*score) {
            *score = f64::NEG_INFINITY;
        }
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}
