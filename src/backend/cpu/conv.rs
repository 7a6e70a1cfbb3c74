//! Causal depthwise convolution over time, then SiLU: the entrance of a delta-net head.

use super::isa::dispatch;
use super::math::silu;
use super::simd::{Simd, lanes, lanes_mut};

dispatch! {
    /// `y[t, c] = silu(sum_j w[j, c] * x[t + j, c])`.
    ///
    /// - `x`: `[taps - 1 + T, channels]`, the inputs before the chunk first
    /// - `w`: `[taps, channels]`, the last tap meets the current token
    /// - `y`: `[T, channels]`; channels is a multiple of 16
    pub fn conv_silu(x: &[f32], w: &[f32], channels: usize, y: &mut [f32]) = conv_silu_body
}

#[inline(always)]
fn conv_silu_body<S: Simd>(s: S, x: &[f32], w: &[f32], channels: usize, y: &mut [f32]) {
    let taps = w.len() / channels;
    assert_eq!(x.len(), y.len() + (taps - 1) * channels);
    let vectors = channels / 16;
    let (x, w) = (lanes(x), lanes(w));
    for (t, y) in lanes_mut(y).chunks_exact_mut(vectors).enumerate() {
        for (c, y) in y.iter_mut().enumerate() {
            let mut sum = s.splat(0.0);
            for j in 0..taps {
                let x = s.load(&x[(t + j) * vectors + c]);
                sum = s.mul_add(s.load(&w[j * vectors + c]), x, sum);
            }
            s.store(silu(s, sum), y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::{assert_close, random_vector};

    #[test]
    fn convolution_is_the_formula() {
        for (tokens, channels, taps) in [(1, 16, 4), (5, 48, 4), (3, 32, 2), (4, 16, 1)] {
            let x = random_vector((taps - 1 + tokens) * channels, 5);
            let w = random_vector(taps * channels, 6);
            let mut expected = vec![0.0; tokens * channels];
            for t in 0..tokens {
                for c in 0..channels {
                    let sum: f32 = (0..taps)
                        .map(|j| w[j * channels + c] * x[(t + j) * channels + c])
                        .sum();
                    expected[t * channels + c] = sum / (1.0 + (-sum).exp());
                }
            }
            for isa in Isa::available() {
                let mut y = vec![0.0; tokens * channels];
                conv_silu(isa, &x, &w, channels, &mut y);
                assert_close(&y, &expected, 1e-5);
            }
        }
    }
}
