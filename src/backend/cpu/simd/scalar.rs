//! [`Simd`] in plain Rust: runs anywhere, and says what the other two must compute.

use std::array::from_fn;

use half::{bf16, f16};

use super::{CODE_BOOK_INT8, LANES, Simd};
use crate::backend::cpu::isa::Scalar;
use crate::formats::nf4::CODE_BOOK;

type F32 = [f32; LANES];
type I32 = [i32; LANES];

/// Folds the upper half onto the lower until one lane is left.
fn fold(mut v: F32, op: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] = op(v[i], v[i + width]);
        }
        width /= 2;
    }
    v[0]
}

impl Simd for Scalar {
    type F32 = F32;
    type I32 = I32;
    type WordTable = [i16; 16];
    type ByteTable = ();
    type F32Table = ();

    const PAIRS: [[usize; 2]; 4] = [[0, 1], [2, 3], [4, 5], [6, 7]];
    const MAX_TOKENS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> F32 {
        [v; LANES]
    }
    #[inline(always)]
    fn load(self, v: &F32) -> F32 {
        *v
    }
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> F32 {
        v.map(f32::from)
    }
    #[inline(always)]
    fn load_bf16(self, v: &[bf16; LANES]) -> F32 {
        v.map(bf16::to_f32)
    }
    #[inline(always)]
    fn load_f16(self, v: &[f16; LANES]) -> F32 {
        v.map(f16::to_f32)
    }
    #[inline(always)]
    fn load_i8(self, v: &[i8; LANES]) -> F32 {
        v.map(f32::from)
    }
    #[inline(always)]
    fn store(self, v: F32, out: &mut F32) {
        *out = v;
    }

    #[inline(always)]
    fn add(self, a: F32, b: F32) -> F32 {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: F32, b: F32) -> F32 {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: F32, b: F32) -> F32 {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: F32, b: F32) -> F32 {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: F32, b: F32) -> F32 {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: F32, b: F32) -> F32 {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, a: F32) -> F32 {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn mul_add(self, a: F32, b: F32, c: F32) -> F32 {
        // Not `f32::mul_add`: without the instruction that is a slow library call.
        from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn reduce_add(self, v: F32) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(self, v: F32) -> f32 {
        fold(v, f32::max)
    }

    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}

    #[inline(always)]
    fn splat_i32(self, v: i32) -> I32 {
        [v; LANES]
    }
    #[inline(always)]
    fn load_i32(self, v: &I32) -> I32 {
        *v
    }
    #[inline(always)]
    fn load_u32(self, v: &[u32; LANES]) -> I32 {
        v.map(|v| v as i32)
    }
    #[inline(always)]
    fn store_i32(self, v: I32, out: &mut I32) {
        *out = v;
    }
    #[inline(always)]
    fn add_i32(self, a: I32, b: I32) -> I32 {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, v: I32) -> I32 {
        v.map(|v| (v as u32 >> N) as i32)
    }
    #[inline(always)]
    fn to_f32(self, v: I32) -> F32 {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    fn round(self, v: F32) -> I32 {
        v.map(|v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    fn pow2(self, v: I32) -> F32 {
        v.map(|v| f32::from_bits(((v + 127) as u32) << 23))
    }

    #[inline(always)]
    fn word_table(self, book: &[i16; 16]) -> [i16; 16] {
        *book
    }
    #[inline(always)]
    fn nf4_words(self, table: [i16; 16], codes: I32) -> [I32; 4] {
        let word = |code: u32, n: usize| table[(code >> (4 * n)) as usize & 15];
        Self::PAIRS.map(|[a, b]| codes.map(|c| join(word(c as u32, a), word(c as u32, b))))
    }
    #[inline(always)]
    fn dot_pairs(self, acc: I32, a: I32, b: I32) -> I32 {
        from_fn(|i| {
            let ((a0, a1), (b0, b1)) = (split(a[i]), split(b[i]));
            acc[i].wrapping_add(a0 * b0).wrapping_add(a1 * b1)
        })
    }

    #[inline(always)]
    fn byte_table(self) {}
    #[inline(always)]
    fn nf4_bytes(self, (): (), codes: I32) -> [I32; 2] {
        let byte = |code: i32, n: usize| CODE_BOOK_INT8[(code as u32 >> (4 * n)) as usize & 15];
        let quad = |first: usize| {
            codes.map(|c| i32::from_le_bytes(from_fn(|i| byte(c, first + 2 * i).cast_unsigned())))
        };
        [quad(0), quad(1)]
    }
    #[inline(always)]
    fn dot_bytes(self, acc: I32, weights: I32, x: I32) -> I32 {
        from_fn(|i| {
            let (w, x) = (weights[i].to_le_bytes(), x[i].to_le_bytes());
            let products = w.into_iter().zip(x);
            products.fold(acc[i], |acc, (w, x)| {
                acc.wrapping_add(i32::from(w.cast_signed()) * i32::from(x.cast_signed()))
            })
        })
    }
    /// Weights are as they are.
    #[inline(always)]
    fn byte_start(self, _: i32) -> I32 {
        [0; LANES]
    }

    #[inline(always)]
    fn f32_table(self) {}
    #[inline(always)]
    fn nf4_f32(self, (): (), codes: I32) -> F32 {
        codes.map(|c| CODE_BOOK[c as usize & 15])
    }
}

/// An i16 pair in one lane.
fn join(low: i16, high: i16) -> i32 {
    i32::from(high) << 16 | i32::from(low as u16)
}

fn split(pair: i32) -> (i32, i32) {
    (i32::from(pair as i16), pair >> 16)
}
