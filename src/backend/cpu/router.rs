//! Softmax over all experts, then the k best.

use super::isa::dispatch;
use super::math::exp;
use super::simd::{LANES, Simd, lanes, lanes_mut};
use crate::backend::Routing;

dispatch! {
    /// `p = softmax(p)`; the length is a multiple of 16, unused entries are `-inf` and become 0.
    pub fn softmax(p: &mut [f32]) = softmax_body
}

#[inline(always)]
fn softmax_body<S: Simd>(s: S, p: &mut [f32]) {
    let mut max = s.splat(f32::MIN);
    for v in lanes(p) {
        max = s.max(max, s.load(v));
    }
    let max = s.splat(s.reduce_max(max));
    let mut sum = s.splat(0.0);
    for v in lanes_mut(p) {
        let e = exp(s, s.sub(s.load(v), max));
        sum = s.add(sum, e);
        s.store(e, v);
    }
    let total = s.splat(s.reduce_add(sum));
    for v in lanes_mut(p) {
        s.store(s.div(s.load(v), total), v);
    }
}

/// Room for the logits of `num_experts`, rounded up to whole vectors.
pub fn padded_len(num_experts: usize) -> usize {
    num_experts.next_multiple_of(LANES)
}

/// Appends the `k` largest of `p` to `routing`, best first; of equal ones the lower id goes first.
///
/// Weights sum to 1 if `normalize` is set.
pub fn push_top_k(p: &[f32], k: usize, normalize: bool, routing: &mut Routing) {
    let start = routing.topk_ids.len();
    for (id, &weight) in p.iter().enumerate() {
        let kept = routing.topk_ids.len() - start;
        if kept == k && weight <= routing.topk_weights[start + k - 1] {
            continue;
        }
        let place = routing.topk_weights[start..]
            .iter()
            .position(|&w| weight > w)
            .unwrap_or(kept);
        if kept == k {
            routing.topk_ids.pop();
            routing.topk_weights.pop();
        }
        routing.topk_ids.insert(start + place, id as u16);
        routing.topk_weights.insert(start + place, weight);
    }
    if normalize {
        let weights = &mut routing.topk_weights[start..];
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::{assert_close, random_vector};

    #[test]
    fn softmax_is_the_formula_with_outliers_and_padding() {
        for experts in [1, 4, 15, 16, 17, 64, 512] {
            let mut logits = random_vector(experts, 9);
            logits[experts / 2] = 40.0;
            let total: f64 = logits.iter().map(|&l| f64::from(l - 40.0).exp()).sum();
            let expected: Vec<f32> = logits
                .iter()
                .map(|&l| (f64::from(l - 40.0).exp() / total) as f32)
                .collect();
            logits.resize(padded_len(experts), f32::NEG_INFINITY);
            for isa in Isa::available() {
                let mut p = logits.clone();
                softmax(isa, &mut p);
                assert_close(&p[..experts], &expected, 1e-6);
                assert!(p[experts..].iter().all(|&p| p < 1e-37));
            }
        }
    }

    #[test]
    fn the_best_experts_come_first_and_ties_keep_the_lower_id() {
        let mut routing = Routing::default();
        push_top_k(&[0.1, 0.3, 0.05, 0.3, 0.25, 0.0], 3, false, &mut routing);
        push_top_k(&[0.2, 0.2, 0.2, 0.2, 0.2, 0.0], 3, true, &mut routing);
        assert_eq!(routing.topk_ids, [1, 3, 4, 0, 1, 2]);
        assert_eq!(routing.topk_weights[..3], [0.3, 0.3, 0.25]);
        assert!((routing.topk_weights[3..].iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}
