//! Sixteen lanes, whatever the machine: kernels are written once against [`Simd`].
//!
//! AVX-512 holds 16 f32 in one register, AVX2 and AVX-VNNI in two, plain Rust in an array. All add lanes
//! up in the same order, so the first three agree bit for bit; scalar code differs in that it has no
//! fused multiply-add.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod scalar;

use half::{bf16, f16};

use crate::formats::Dtype;
use crate::formats::nf4::CODE_BOOK;

/// Lanes of every vector.
pub const LANES: usize = 16;

/// Weight 1.0 in the 16-bit code book.
///
/// Of the integers below 8192 this is the one whose multiples of the 16 codes lie closest to
/// integers: 0.004% off, half of what its neighbours give.
pub const WEIGHT_ONE: i32 = 7854;

/// Weight 1.0 in the 16-bit code book of wide products, whose activations need fewer bits because
/// a second product adds the rest. The best of all 16-bit integers: 0.0007% off.
pub const WIDE_ONE: i32 = 25_545;

/// Weight 1.0 in the 8-bit code book: the best below 127, 0.4% off.
pub const BYTE_ONE: f64 = 124.11;

/// What the absolute values of a block of quantised activations may add up to, so that its
/// products with weights up to `one` fit in an i32: 32 below the limit for roundings, 60 for those
/// of f32.
pub const fn activation_sum(one: i32) -> i32 {
    i32::MAX / one - 92
}

/// The NF4 code book in integers, weight 1.0 being `one`.
const fn code_book(one: f64) -> [i16; 16] {
    let mut table = [0i16; 16];
    let mut i = 0;
    while i < 16 {
        let v = CODE_BOOK[i] as f64 * one;
        table[i] = if v < 0.0 { v - 0.5 } else { v + 0.5 } as i16;
        i += 1;
    }
    table
}

pub const CODE_BOOK_INT16: [i16; 16] = code_book(WEIGHT_ONE as f64);
pub const CODE_BOOK_WIDE: [i16; 16] = code_book(WIDE_ONE as f64);
pub const CODE_BOOK_INT8: [i8; 16] = {
    let (words, mut bytes, mut i) = (code_book(BYTE_ONE), [0; 16], 0);
    while i < 16 {
        bytes[i] = words[i] as i8;
        i += 1;
    }
    bytes
};

/// What the 8-bit weights of [`Simd::nf4_bytes`] may be above their values.
pub const BYTE_OFFSET: i32 = 128;

/// The 8-bit code book plus [`BYTE_OFFSET`], for products that take one factor unsigned.
#[cfg(target_arch = "x86_64")]
const BYTE_TABLE_UNSIGNED: [u8; 16] = {
    let (mut table, mut i) = ([0; 16], 0);
    while i < 16 {
        table[i] = (CODE_BOOK_INT8[i] as i32 + BYTE_OFFSET) as u8;
        i += 1;
    }
    table
};

/// Vector operations of one instruction set; lane by lane unless said otherwise.
pub trait Simd: Copy {
    /// 16 f32
    type F32: Copy;
    /// 16 i32, or as many pairs of i16, or as many quads of bytes
    type I32: Copy;
    /// A 16-bit code book, ready for [`nf4_words`](Self::nf4_words)
    type WordTable: Copy;
    /// The 8-bit code book, ready for [`nf4_bytes`](Self::nf4_bytes)
    type ByteTable: Copy;
    /// The f32 code book, ready for [`nf4_f32`](Self::nf4_f32)
    type F32Table: Copy;

    /// Which of a lane's eight codes become a pair of i16: four such pairs.
    const PAIRS: [[usize; 2]; 4];

    /// Tokens for which the accumulators of a 32-row matrix product fit in registers.
    const MAX_TOKENS: usize;

    fn splat(self, v: f32) -> Self::F32;
    fn load(self, v: &[f32; LANES]) -> Self::F32;
    fn load_u16(self, v: &[u16; LANES]) -> Self::F32;
    fn load_bf16(self, v: &[bf16; LANES]) -> Self::F32;
    fn load_f16(self, v: &[f16; LANES]) -> Self::F32;
    fn load_i8(self, v: &[i8; LANES]) -> Self::F32;
    fn store(self, v: Self::F32, out: &mut [f32; LANES]);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn abs(self, a: Self::F32) -> Self::F32;
    /// `a * b + c`
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// Sum of all lanes: halves are added until one lane is left.
    fn reduce_add(self, v: Self::F32) -> f32;
    fn reduce_max(self, v: Self::F32) -> f32;

    /// Fetches the cache lines of an item that will be read soon into L2; it need not exist.
    ///
    /// Fetching into L1 instead lost a fifth of the memory bandwidth: it has fewer miss buffers.
    fn prefetch<T>(self, item: *const T);

    fn splat_i32(self, v: i32) -> Self::I32;
    fn load_i32(self, v: &[i32; LANES]) -> Self::I32;
    fn load_u32(self, v: &[u32; LANES]) -> Self::I32;
    fn store_i32(self, v: Self::I32, out: &mut [i32; LANES]);
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Shifts each 32-bit lane right by `N`, zeros coming in.
    fn shr<const N: u32>(self, v: Self::I32) -> Self::I32;
    fn to_f32(self, v: Self::I32) -> Self::F32;
    /// Nearest integer, ties to even; inputs are in the range of i32.
    fn round(self, v: Self::F32) -> Self::I32;
    /// `2^v` for `v` in -126..=127.
    fn pow2(self, v: Self::I32) -> Self::F32;

    fn word_table(self, book: &[i16; 16]) -> Self::WordTable;
    /// Eight codes per lane become four vectors of i16 pairs: of vector `j`, the low half comes
    /// from the first code of `PAIRS[j]`, the high half from the second.
    fn nf4_words(self, table: Self::WordTable, codes: Self::I32) -> [Self::I32; 4];
    /// `acc + a.low * b.low + a.high * b.high`, on i16 halves.
    fn dot_pairs(self, acc: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32;

    /// Products of `H` halves of a tile, 16 rows each, with a block of 64 activations of each of a few
    /// tokens, whose sums fit in registers.
    ///
    /// - `codes`: eight of each row per group
    /// - `pairs`: of each token, those of [`PAIRS`](Self::PAIRS) for each group
    #[inline(always)]
    fn dot_words<const N: usize, const H: usize>(
        self,
        table: Self::WordTable,
        codes: &[[u32; 2 * LANES]; 8],
        first_half: usize,
        pairs: [&[i32; 32]; N],
    ) -> [[Self::I32; N]; H] {
        let zero = self.splat_i32(0);
        let mut out = [[zero; N]; H];
        if N == 1 {
            // Sums for even and odd groups, and two for each: VNNI adds with the latency of its
            // multiplier.
            let mut sums = [[[zero; 2]; H]; 2];
            for (two, groups) in codes.chunks_exact(2).enumerate() {
                for odd in 0..2 {
                    let x: [Self::I32; 4] =
                        std::array::from_fn(|j| self.splat_i32(pairs[0][8 * two + 4 * odd + j]));
                    for half in 0..H {
                        let codes = self.load_u32(&lanes(&groups[odd])[first_half + half]);
                        let words = self.nf4_words(table, codes);
                        for j in 0..4 {
                            let sum = &mut sums[odd][half][j % 2];
                            *sum = self.dot_pairs(*sum, words[j], x[j]);
                        }
                    }
                }
            }
            for half in 0..H {
                let [even, odd] = sums.map(|sums| self.add_i32(sums[half][0], sums[half][1]));
                out[half][0] = self.add_i32(even, odd);
            }
            return out;
        }
        // Broadcasts are shared between the halves where tokens are many; where they are few, that
        // only lengthens the way from the codes to the first product.
        let together = if N > 6 { H } else { 1 };
        for (group, codes) in codes.iter().enumerate() {
            for first in (0..H).step_by(together) {
                let mut words = [[zero; 4]; H];
                for half in first..first + together {
                    let codes = self.load_u32(&lanes(codes)[first_half + half]);
                    words[half] = self.nf4_words(table, codes);
                }
                for j in 0..4 {
                    for i in 0..N {
                        let x = self.splat_i32(pairs[i][4 * group + j]);
                        for half in first..first + together {
                            out[half][i] = self.dot_pairs(out[half][i], words[half][j], x);
                        }
                    }
                }
            }
        }
        out
    }

    fn byte_table(self) -> Self::ByteTable;
    /// Eight codes per lane become two vectors of bytes: the even codes in order, and the odd ones.
    /// The bytes are meant for [`dot_bytes`](Self::dot_bytes) only.
    fn nf4_bytes(self, table: Self::ByteTable, codes: Self::I32) -> [Self::I32; 2];
    /// `acc + sum of 4 weights * 4 activations`, the weights from [`nf4_bytes`](Self::nf4_bytes),
    /// which may be [`BYTE_OFFSET`] too large; activations are in -127..=127.
    fn dot_bytes(self, acc: Self::I32, weights: Self::I32, x: Self::I32) -> Self::I32;
    /// What sums of [`dot_bytes`](Self::dot_bytes) start with, so that the offset cancels;
    /// `offset` is `-BYTE_OFFSET` times the sum of all activations.
    fn byte_start(self, offset: i32) -> Self::I32;

    fn f32_table(self) -> Self::F32Table;
    /// The f32 weight of the lowest code of each lane; higher bits are ignored.
    fn nf4_f32(self, table: Self::F32Table, codes: Self::I32) -> Self::F32;
}

/// A stored weight that widens to f32 exactly.
pub trait Weight: bytemuck::Pod {
    /// The same type in a checkpoint.
    const DTYPE: Dtype;

    fn load<S: Simd>(s: S, v: &[Self; LANES]) -> S::F32;
    /// Rounds to nearest.
    fn from_f32(v: f32) -> Self;
}

impl Weight for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[f32; LANES]) -> S::F32 {
        s.load(v)
    }
    fn from_f32(v: f32) -> Self {
        v
    }
}

impl Weight for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[bf16; LANES]) -> S::F32 {
        s.load_bf16(v)
    }
    fn from_f32(v: f32) -> Self {
        bf16::from_f32(v)
    }
}

/// Splits into whole vectors; the length must be a multiple of 16.
#[inline(always)]
pub fn lanes<T>(v: &[T]) -> &[[T; LANES]] {
    let (vectors, rest) = v.as_chunks();
    assert!(rest.is_empty(), "length {} is no multiple of 16", v.len());
    vectors
}

/// [`lanes`] of a mutable slice.
#[inline(always)]
pub fn lanes_mut<T>(v: &mut [T]) -> &mut [[T; LANES]] {
    let len = v.len();
    let (vectors, rest) = v.as_chunks_mut();
    assert!(rest.is_empty(), "length {len} is no multiple of 16");
    vectors
}

#[cfg(test)]
mod tests;
