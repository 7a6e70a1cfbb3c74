//! [`Simd`] on AVX-512: one register per vector, VNNI for the integer dot product.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{BYTE_TABLE_UNSIGNED, LANES, Simd};
use crate::backend::cpu::isa::Avx512;
use crate::formats::nf4::CODE_BOOK;

/// Runs intrinsics; every use is inside a method of [`Avx512`].
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: an `Avx512` exists only where its features were seen, and pointers come from
        // references to arrays of exactly the size that is loaded or stored.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type WordTable = __m512i;
    type ByteTable = __m512i;
    type F32Table = __m512;

    /// Codes of the two words of a dword, shifted to the same place.
    const PAIRS: [[usize; 2]; 4] = [[0, 4], [2, 6], [1, 5], [3, 7]];

    /// 24 of 32 registers accumulate, two hold weights.
    const MAX_TOKENS: usize = 12;

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        avx512!(_mm512_set1_ps(v))
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> __m512 {
        avx512!(_mm512_loadu_ps(v.as_ptr()))
    }
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(
            _mm256_loadu_si256(v.as_ptr().cast())
        )))
    }
    #[inline(always)]
    fn load_bf16(self, v: &[bf16; LANES]) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(v.as_ptr().cast()))
        )))
    }
    #[inline(always)]
    fn load_f16(self, v: &[f16; LANES]) -> __m512 {
        avx512!(_mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_i8(self, v: &[i8; LANES]) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            v.as_ptr().cast()
        ))))
    }
    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        avx512!(_mm512_storeu_ps(out.as_mut_ptr(), v))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        avx512!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn reduce_add(self, v: __m512) -> f32 {
        avx512!(super::avx2::reduce_add_256(_mm256_add_ps(
            _mm512_castps512_ps256(v),
            _mm512_extractf32x8_ps::<1>(v)
        )))
    }
    #[inline(always)]
    fn reduce_max(self, v: __m512) -> f32 {
        avx512!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn prefetch<T>(self, item: *const T) {
        for line in 0..size_of::<T>().div_ceil(64) {
            let address = item.cast::<i8>().wrapping_add(64 * line);
            // SAFETY: a prefetch of any address is allowed, and changes nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(address) };
        }
    }

    #[inline(always)]
    fn splat_i32(self, v: i32) -> __m512i {
        avx512!(_mm512_set1_epi32(v))
    }
    #[inline(always)]
    fn load_i32(self, v: &[i32; LANES]) -> __m512i {
        avx512!(_mm512_loadu_si512(v.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_u32(self, v: &[u32; LANES]) -> __m512i {
        avx512!(_mm512_loadu_si512(v.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_i32(self, v: __m512i, out: &mut [i32; LANES]) {
        avx512!(_mm512_storeu_si512(out.as_mut_ptr().cast(), v))
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        avx512!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, v: __m512i) -> __m512i {
        avx512!(_mm512_srli_epi32::<N>(v))
    }
    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn round(self, v: __m512) -> __m512i {
        avx512!(_mm512_cvtps_epi32(v))
    }
    #[inline(always)]
    fn pow2(self, v: __m512i) -> __m512 {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(
            _mm512_add_epi32(v, _mm512_set1_epi32(127))
        )))
    }

    #[inline(always)]
    fn word_table(self, book: &[i16; 16]) -> __m512i {
        // vpermw looks at five bits: the table is there twice, so the fifth does not matter.
        avx512!(_mm512_broadcast_i64x4(_mm256_loadu_si256(
            book.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn nf4_words(self, table: __m512i, codes: __m512i) -> [__m512i; 4] {
        avx512!([
            _mm512_permutexvar_epi16(codes, table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), table),
        ])
    }
    #[inline(always)]
    fn dot_pairs(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        avx512!(dot_pairs_512(acc, a, b))
    }

    /// Unsigned bytes, as `vpdpbusd` takes them.
    #[inline(always)]
    fn byte_table(self) -> __m512i {
        avx512!(_mm512_broadcast_i32x4(_mm_loadu_si128(
            BYTE_TABLE_UNSIGNED.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn nf4_bytes(self, table: __m512i, codes: __m512i) -> [__m512i; 2] {
        avx512!({
            let nibbles = _mm512_set1_epi8(15);
            let odd = _mm512_srli_epi16::<4>(codes);
            [
                _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibbles)),
                _mm512_shuffle_epi8(table, _mm512_and_si512(odd, nibbles)),
            ]
        })
    }
    #[inline(always)]
    fn dot_bytes(self, acc: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        avx512!(dot_bytes_512(acc, weights, x))
    }
    #[inline(always)]
    fn byte_start(self, offset: i32) -> __m512i {
        self.splat_i32(offset)
    }

    #[inline(always)]
    fn f32_table(self) -> __m512 {
        self.load(&CODE_BOOK)
    }
    #[inline(always)]
    fn nf4_f32(self, table: __m512, codes: __m512i) -> __m512 {
        avx512!(_mm512_permutexvar_ps(codes, table))
    }
}

/// `vpdpwssd`, spelled out: the compiler likes to split the intrinsic into a multiplication and an
/// addition where sums are chained, which costs a third more instructions.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot_pairs_512(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction reads and writes these registers only.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {acc}, {a}, {b}",
            acc = inout(zmm_reg) acc,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// `vpdpbusd`, spelled out as [`dot_pairs_512`] is.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot_bytes_512(mut acc: __m512i, weights: __m512i, x: __m512i) -> __m512i {
    // SAFETY: the instruction reads and writes these registers only.
    unsafe {
        std::arch::asm!(
            "vpdpbusd {acc}, {w}, {x}",
            acc = inout(zmm_reg) acc,
            w = in(zmm_reg) weights,
            x = in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
