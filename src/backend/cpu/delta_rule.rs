//! The gated delta rule: a matrix of memory per head, decayed, corrected and read by each token.

use super::isa::dispatch;
use super::rms_norm::sum_of_squares;
use super::simd::{LANES, Simd, lanes, lanes_mut};

/// Inputs of one value head for `T` tokens.
///
/// `dk` is the length of `q[t]` and `k[t]`; rows of values are padded to whole vectors.
pub struct HeadInputs<'a> {
    pub key_dim: usize,
    /// `[T, q_stride]`, normalised and scaled
    pub q: &'a [f32],
    /// `[T, q_stride]`, normalised
    pub k: &'a [f32],
    /// Elements from one row of `q` and `k` to the next
    pub stride: usize,
    /// `[T, value_dim]`
    pub v: &'a [f32],
    /// `[T]`: exp(g), in (0, 1]
    pub decay: &'a [f32],
    /// `[T]`: write strength, in (0, 1)
    pub beta: &'a [f32],
}

dispatch! {
    /// Advances `state: [key_dim, value_dim]` and writes `out: [T, value_dim]`:
    ///
    /// ```text
    /// S <- decay S;  d = (v - S^T k) beta;  S <- S + k d^T;  out = S^T q
    /// ```
    ///
    /// value_dim is a multiple of 16.
    ///
    /// Source: Gated Delta Networks, arXiv:2412.06464; recurrent form of transformers.
    pub fn delta_rule(inputs: &HeadInputs, value_dim: usize, state: &mut [f32], out: &mut [f32])
        = delta_rule_body
}

#[inline(always)]
fn delta_rule_body<S: Simd>(
    s: S,
    inputs: &HeadInputs,
    value_dim: usize,
    state: &mut [f32],
    out: &mut [f32],
) {
    assert_eq!(state.len(), inputs.key_dim * value_dim);
    assert_eq!(out.len(), inputs.decay.len() * value_dim);
    assert_eq!(inputs.v.len(), out.len());
    // Columns of the state do not touch each other, so all tokens go through a few of them while
    // these sit in the L1 cache.
    let vectors = value_dim / LANES;
    let mut first = 0;
    while first < vectors {
        first += match vectors - first {
            1 => columns::<S, 1>(s, inputs, vectors, first, state, out),
            2 | 3 => columns::<S, 2>(s, inputs, vectors, first, state, out),
            _ => columns::<S, 4>(s, inputs, vectors, first, state, out),
        };
    }
}

/// The whole rule on vectors `first .. first + N` of each row; returns `N`.
#[inline(always)]
fn columns<S: Simd, const N: usize>(
    s: S,
    inputs: &HeadInputs,
    vectors: usize,
    first: usize,
    state: &mut [f32],
    out: &mut [f32],
) -> usize {
    let state = lanes_mut(state);
    let v = lanes(inputs.v).chunks_exact(vectors);
    let out = lanes_mut(out).chunks_exact_mut(vectors);
    for (t, (v, out)) in v.zip(out).enumerate() {
        let row = t * inputs.stride..t * inputs.stride + inputs.key_dim;
        let (q, k) = (&inputs.q[row.clone()], &inputs.k[row]);
        let decay = s.splat(inputs.decay[t]);
        let beta = s.splat(inputs.beta[t]);

        let mut read = [s.splat(0.0); N];
        for (row, &k) in state.chunks_exact(vectors).zip(k) {
            let row = &row[first..first + N];
            for j in 0..N {
                read[j] = s.mul_add(s.load(&row[j]), s.splat(k), read[j]);
            }
        }
        let mut delta = [s.splat(0.0); N];
        for j in 0..N {
            let v = s.load(&v[first + j]);
            delta[j] = s.mul(s.sub(v, s.mul(decay, read[j])), beta);
        }
        let mut sum = [s.splat(0.0); N];
        for ((row, &k), &q) in state.chunks_exact_mut(vectors).zip(k).zip(q) {
            let row = &mut row[first..first + N];
            for j in 0..N {
                let decayed = s.mul(decay, s.load(&row[j]));
                let updated = s.mul_add(s.splat(k), delta[j], decayed);
                s.store(updated, &mut row[j]);
                sum[j] = s.mul_add(updated, s.splat(q), sum[j]);
            }
        }
        for j in 0..N {
            s.store(sum[j], &mut out[first + j]);
        }
    }
    N
}

dispatch! {
    /// `x <- x / sqrt(sum x^2 + 1e-6) * scale`
    pub fn l2_normalize(x: &mut [f32], scale: f32) = l2_normalize_body
}

#[inline(always)]
fn l2_normalize_body<S: Simd>(s: S, x: &mut [f32], scale: f32) {
    let factor = scale / (sum_of_squares(s, x) + 1e-6).sqrt();
    for v in lanes_mut(x) {
        s.store(s.mul(s.load(v), s.splat(factor)), v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::{assert_close, random_vector};

    /// The definition, one number at a time.
    fn definition(x: &HeadInputs, value_dim: usize, state: &mut [f32], out: &mut [f32]) {
        for t in 0..x.decay.len() {
            let (q, k) = (&x.q[t * x.stride..], &x.k[t * x.stride..]);
            for c in 0..value_dim {
                let mut read = 0.0;
                for i in 0..x.key_dim {
                    state[i * value_dim + c] *= x.decay[t];
                    read += state[i * value_dim + c] * k[i];
                }
                let d = (x.v[t * value_dim + c] - read) * x.beta[t];
                let o = &mut out[t * value_dim + c];
                *o = 0.0;
                for i in 0..x.key_dim {
                    state[i * value_dim + c] += k[i] * d;
                    *o += state[i * value_dim + c] * q[i];
                }
            }
        }
    }

    #[test]
    fn the_delta_rule_is_its_definition_in_any_split() {
        for (tokens, dk, dv) in [
            (1, 16, 16),
            (7, 32, 32),
            (5, 24, 48),
            (9, 128, 128),
            (3, 16, 112),
        ] {
            let stride = dk + 8;
            let q = random_vector(tokens * stride, 1);
            let k: Vec<f32> = random_vector(tokens * stride, 2)
                .iter()
                .map(|v| v * 0.2)
                .collect();
            let v = random_vector(tokens * dv, 3);
            let decay: Vec<f32> = random_vector(tokens, 4)
                .iter()
                .map(|v| (-v.abs()).exp())
                .collect();
            let beta: Vec<f32> = random_vector(tokens, 5)
                .iter()
                .map(|v| v.abs().min(1.0))
                .collect();
            let inputs = |range: std::ops::Range<usize>| HeadInputs {
                key_dim: dk,
                q: &q[range.start * stride..range.end * stride],
                k: &k[range.start * stride..range.end * stride],
                stride,
                v: &v[range.start * dv..range.end * dv],
                decay: &decay[range.clone()],
                beta: &beta[range],
            };
            let start = random_vector(dk * dv, 6);
            let (mut state, mut expected) = (start.clone(), vec![0.0; tokens * dv]);
            definition(&inputs(0..tokens), dv, &mut state, &mut expected);

            for isa in Isa::available() {
                let (mut whole, mut out) = (start.clone(), vec![0.0; tokens * dv]);
                delta_rule(isa, &inputs(0..tokens), dv, &mut whole, &mut out);
                assert_close(&out, &expected, 1e-4);
                assert_close(&whole, &state, 1e-4);

                let (mut split, mut pieces) = (start.clone(), vec![0.0; tokens * dv]);
                let cut = tokens / 2;
                let (first, second) = pieces.split_at_mut(cut * dv);
                delta_rule(isa, &inputs(0..cut), dv, &mut split, first);
                delta_rule(isa, &inputs(cut..tokens), dv, &mut split, second);
                assert!(split == whole && pieces == out, "a split changes the bits");
            }
        }
    }
}
