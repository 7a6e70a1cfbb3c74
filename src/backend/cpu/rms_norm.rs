//! RMSNorm, `y = x / sqrt(mean(x^2) + eps) * scale`, and its gated form.

use super::isa::dispatch;
use super::math::silu;
use super::simd::{Simd, lanes, lanes_mut};

dispatch! {
    /// `y = x / sqrt(mean(x^2) + eps) * scale`, all of one length.
    ///
    /// Zero-centred weights `w` come in as `scale = 1 + w`.
    pub fn rms_norm(x: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) = rms_norm_body
}

#[inline(always)]
fn rms_norm_body<S: Simd>(s: S, x: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == scale.len() && x.len() == y.len());
    let inverse = (sum_of_squares(s, x) / x.len() as f32 + eps).sqrt().recip();
    let whole = x.len() / 16 * 16;
    let v = s.splat(inverse);
    for ((x, scale), y) in lanes(&x[..whole])
        .iter()
        .zip(lanes(&scale[..whole]))
        .zip(lanes_mut(&mut y[..whole]))
    {
        s.store(s.mul(s.mul(s.load(x), v), s.load(scale)), y);
    }
    for i in whole..x.len() {
        y[i] = x[i] * inverse * scale[i];
    }
}

/// Sum of the squares of `x`, of any length.
#[inline(always)]
pub fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (vectors, rest) = x.as_chunks();
    let mut sums = [s.splat(0.0); 2];
    for (i, v) in vectors.iter().enumerate() {
        let v = s.load(v);
        sums[i % 2] = s.mul_add(v, v, sums[i % 2]);
    }
    s.reduce_add(s.add(sums[0], sums[1])) + rest.iter().map(|v| v * v).sum::<f32>()
}

/// `y = x / sqrt(mean(x^2) + eps) * scale * silu(gate)` in place of `x`; lengths are whole vectors,
/// of which the first `len` elements count and the rest of `x` is 0.
#[inline(always)]
pub fn gated_rms_norm<S: Simd>(
    s: S,
    x: &mut [f32],
    scale: &[f32],
    gate: &[f32],
    eps: f32,
    len: usize,
) {
    let inverse = (sum_of_squares(s, x) / len as f32 + eps).sqrt().recip();
    let v = s.splat(inverse);
    for ((x, scale), gate) in lanes_mut(x).iter_mut().zip(lanes(scale)).zip(lanes(gate)) {
        let n = s.mul(s.mul(s.load(x), v), s.load(scale));
        s.store(s.mul(n, silu(s, s.load(gate))), x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::{assert_close, random_vector};

    #[test]
    fn rms_norm_is_the_formula_at_any_length() {
        for len in [1, 15, 16, 17, 31, 64, 100, 2048] {
            let mut x = random_vector(len, 3);
            x[len / 2] = 300.0;
            let scale = random_vector(len, 4);
            let mean = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / len as f64;
            let expected: Vec<f32> = x
                .iter()
                .zip(&scale)
                .map(|(x, w)| (f64::from(x * w) / (mean + 1e-6).sqrt()) as f32)
                .collect();
            for isa in Isa::available() {
                let mut y = vec![0.0; len];
                rms_norm(isa, &x, &scale, 1e-6, &mut y);
                assert_close(&y, &expected, 1e-5);
            }
        }
    }
}
