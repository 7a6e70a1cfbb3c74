//! [`Simd`] on AVX-VNNI: AVX2, but for integer products, which take one instruction.
//!
//! For processors without AVX-512: Intel's Core from Alder Lake on, performance and efficiency cores.
//! Vector instructions for one token, 8 rows x 8 codes, loads left out:
//!
//! ```text
//!              nibbles   lookups   interleave   products   sum
//! int16 AVX2         3         4            4          8    19
//!       VNNI         3         4            4          4    15
//! int8  AVX2         3         2                      10    15
//!       VNNI         3         2                       2     7
//! ```
//!
//! Measured on one core of a shared Emerald Rapids, which has all three, weights in L2, medians of 150
//! interleaved turns (`cargo bench --bench kernels -- isa-ab`):
//!
//! ```text
//!                        AVX2   VNNI   AVX-512
//! int16 1 token  GB/s    18.7   23.1      30.7
//!       2 tokens         12.1   16.2      23.9
//! wide  1 token          10.3   15.0      21.3
//! int8  1 token          22.9   47.4      63.2
//! int16 512      GFLOP/s  138    160       313
//! wide  512                65    108       179
//! int8  512               124    325       630
//! ```
//!
//! Tried and lost: 16-bit products as four products of bytes, which needs no interleaving and as many
//! instructions, 6.1 to 7.0 cycles for 32 bytes of codes in place of 5.8: twice as many of them multiply,
//! on two of three ports.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{Pairs, dot_words_by_eight, nf4_bytes_256};
use super::{BYTE_TABLE_UNSIGNED, LANES, Simd};
use crate::backend::cpu::isa::{Avx2, AvxVnni};

/// Runs intrinsics; every use is inside a method of [`AvxVnni`].
macro_rules! avx_vnni {
    ($e:expr) => {
        // SAFETY: an `AvxVnni` exists only where its features were seen, and pointers come from
        // references to arrays of exactly the size that is loaded.
        unsafe { $e }
    };
}

/// Methods that are those of [`Avx2`].
macro_rules! as_avx2 {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) $(-> $ret)? {
            self.avx2().$name($($arg),*)
        }
    )*};
}

type F32 = <Avx2 as Simd>::F32;
type I32 = <Avx2 as Simd>::I32;

impl Simd for AvxVnni {
    type F32 = F32;
    type I32 = I32;
    type WordTable = <Avx2 as Simd>::WordTable;
    type ByteTable = __m256i;
    type F32Table = <Avx2 as Simd>::F32Table;

    const PAIRS: [[usize; 2]; 4] = Avx2::PAIRS;
    const MAX_TOKENS: usize = Avx2::MAX_TOKENS;

    as_avx2! {
        fn splat(v: f32) -> F32;
        fn load(v: &[f32; LANES]) -> F32;
        fn load_u16(v: &[u16; LANES]) -> F32;
        fn load_bf16(v: &[bf16; LANES]) -> F32;
        fn load_f16(v: &[f16; LANES]) -> F32;
        fn load_i8(v: &[i8; LANES]) -> F32;
        fn store(v: F32, out: &mut [f32; LANES]);
        fn add(a: F32, b: F32) -> F32;
        fn sub(a: F32, b: F32) -> F32;
        fn mul(a: F32, b: F32) -> F32;
        fn div(a: F32, b: F32) -> F32;
        fn max(a: F32, b: F32) -> F32;
        fn min(a: F32, b: F32) -> F32;
        fn abs(a: F32) -> F32;
        fn mul_add(a: F32, b: F32, c: F32) -> F32;
        fn reduce_add(v: F32) -> f32;
        fn reduce_max(v: F32) -> f32;
        fn splat_i32(v: i32) -> I32;
        fn load_i32(v: &[i32; LANES]) -> I32;
        fn load_u32(v: &[u32; LANES]) -> I32;
        fn store_i32(v: I32, out: &mut [i32; LANES]);
        fn add_i32(a: I32, b: I32) -> I32;
        fn to_f32(v: I32) -> F32;
        fn round(v: F32) -> I32;
        fn pow2(v: I32) -> F32;
        fn word_table(book: &[i16; 16]) -> Self::WordTable;
        fn nf4_words(table: Self::WordTable, codes: I32) -> [I32; 4];
        fn f32_table() -> Self::F32Table;
        fn nf4_f32(table: Self::F32Table, codes: I32) -> F32;
    }

    #[inline(always)]
    fn prefetch<T>(self, item: *const T) {
        self.avx2().prefetch(item);
    }
    #[inline(always)]
    fn shr<const N: u32>(self, v: I32) -> I32 {
        self.avx2().shr::<N>(v)
    }

    #[inline(always)]
    fn dot_pairs(self, acc: I32, a: I32, b: I32) -> I32 {
        [
            self.dot_pairs_256(acc[0], a[0], b[0]),
            self.dot_pairs_256(acc[1], a[1], b[1]),
        ]
    }
    #[inline(always)]
    fn dot_words<const N: usize, const H: usize>(
        self,
        table: Self::WordTable,
        codes: &[[u32; 2 * LANES]; 8],
        first_half: usize,
        pairs: [&[i32; 32]; N],
    ) -> [[I32; N]; H] {
        dot_words_by_eight(self, table, codes, first_half, pairs)
    }

    /// Unsigned bytes, as `vpdpbusd` takes them.
    #[inline(always)]
    fn byte_table(self) -> __m256i {
        avx_vnni!(_mm256_broadcastsi128_si256(_mm_loadu_si128(
            BYTE_TABLE_UNSIGNED.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn nf4_bytes(self, table: __m256i, codes: I32) -> [I32; 2] {
        avx_vnni!({
            let [a, b] = [
                nf4_bytes_256(table, codes[0]),
                nf4_bytes_256(table, codes[1]),
            ];
            [[a[0], b[0]], [a[1], b[1]]]
        })
    }
    #[inline(always)]
    fn dot_bytes(self, acc: I32, weights: I32, x: I32) -> I32 {
        avx_vnni!([
            dot_bytes_256(acc[0], weights[0], x[0]),
            dot_bytes_256(acc[1], weights[1], x[1])
        ])
    }
    #[inline(always)]
    fn byte_start(self, offset: i32) -> I32 {
        self.splat_i32(offset)
    }
}

impl Pairs for AvxVnni {
    #[inline(always)]
    fn dot_pairs_256(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        avx_vnni!(dot_pairs(acc, a, b))
    }
}

/// `vpdpwssd` in VEX encoding, spelled out: the compiler likes to split the intrinsic into a
/// multiplication and an addition where sums are chained.
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn dot_pairs(mut acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: the instruction reads and writes these registers only.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpwssd {acc}, {a}, {b}",
            acc = inout(ymm_reg) acc,
            a = in(ymm_reg) a,
            b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// `vpdpbusd`, spelled out as [`dot_pairs`] is.
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn dot_bytes_256(mut acc: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the instruction reads and writes these registers only.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpbusd {acc}, {w}, {x}",
            acc = inout(ymm_reg) acc,
            w = in(ymm_reg) weights,
            x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
