//! exp and SiLU on vectors, sigmoid and softplus on single numbers.

use std::f32::consts::LOG2_E;

use super::simd::Simd;

/// ln 2 in two parts: multiples of the first, which has 9 significant bits, are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Beyond these, exp is held at its values there, 1.6e-38 and 1.7e38.
const EXP_MIN: f32 = -87.0;
const EXP_MAX: f32 = 88.0;

/// `e^x` within 2 ulp for x in -87..=88, constant outside.
///
/// `x = n ln 2 + r` with |r| <= 0.35, where eight Taylor terms leave 5e-9.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let x = s.min(s.max(x, s.splat(EXP_MIN)), s.splat(EXP_MAX));
    let n = s.round(s.mul(x, s.splat(LOG2_E)));
    let n_f32 = s.to_f32(n);
    let r = s.mul_add(n_f32, s.splat(-LN2_HIGH), x);
    let r = s.mul_add(n_f32, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = s.mul_add(p, r, s.splat(coefficient));
    }
    s.mul(p, s.pow2(n))
}

/// `x * sigmoid(x)`
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// `1 / (1 + e^-x)` of one number.
pub fn sigmoid_f32(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`, and x itself above 20, as torch has it.
pub fn softplus_f32(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::{Isa, dispatch};
    use crate::backend::cpu::simd::{LANES, Simd};

    #[inline(always)]
    fn all<S: Simd>(s: S, x: &[f32; LANES]) -> [[f32; LANES]; 2] {
        let mut out = [[0.0; LANES]; 2];
        let x = s.load(x);
        s.store(exp(s, x), &mut out[0]);
        s.store(silu(s, x), &mut out[1]);
        out
    }

    dispatch! {
        fn all_on(x: &[f32; LANES]) -> [[f32; LANES]; 2] = all
    }

    #[test]
    fn exp_and_silu_are_within_a_few_ulp_of_f64() {
        for isa in Isa::available() {
            for step in 0..10_000 {
                let x: [f32; LANES] =
                    std::array::from_fn(|i| (step * 16 + i as i32 - 80_000) as f32 * 0.001_08);
                let out = all_on(isa, &x);
                for i in 0..LANES {
                    let v = f64::from(x[i]);
                    for (found, expected) in
                        [(out[0][i], v.exp()), (out[1][i], v / (1.0 + (-v).exp()))]
                    {
                        let error = (f64::from(found) - expected).abs() / expected.abs();
                        assert!(
                            error <= 3e-7 || expected == 0.0,
                            "{} at {v}: {found} for {expected}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn extremes_saturate() {
        for isa in Isa::available() {
            let out = all_on(isa, &[-1e30; LANES]);
            assert!(out[0][0] < 2e-38 && out[1][0].abs() < 1e-6);
            let out = all_on(isa, &[1e30; LANES]);
            assert!(out[0][0] > 1e38 && out[1][0] == 1e30);
        }
    }
}
