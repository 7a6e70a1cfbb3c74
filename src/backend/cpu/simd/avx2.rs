//! [`Simd`] on AVX2: two registers per vector, lanes 0..8 and 8..16.
//!
//! One token of int16 NF4 by 16 rows at once, with a shuffle that put codes four apart side by side: 16.5
//! GB/s; by 8 rows, whose sums stay in registers, and pairs of codes as lookups meet them: 18.7.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{CODE_BOOK_INT8, LANES, Simd};
use crate::backend::cpu::isa::Avx2;
use crate::formats::nf4::CODE_BOOK;

/// Runs intrinsics; every use is inside a method of [`Avx2`], or of what holds one.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: an `Avx2` exists only where its features were seen, and pointers come from
        // references to arrays of exactly the size that is loaded or stored.
        unsafe { $e }
    };
}

/// Applies an intrinsic to both halves.
macro_rules! both {
    ($f:ident $(::<$n:ident>)?, $($v:expr),+) => {
        avx2!([$f $(::<$n>)? ($($v[0]),+), $f $(::<$n>)? ($($v[1]),+)])
    };
}

/// Sum of eight lanes, halves first.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn reduce_add_256(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

impl Simd for Avx2 {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    /// Low bytes and high bytes of a 16-bit code book.
    type WordTable = [__m256i; 2];
    type ByteTable = __m256i;
    type F32Table = [__m256; 2];

    /// Even codes, and odd ones, side by side as byte lookups meet them.
    const PAIRS: [[usize; 2]; 4] = [[0, 2], [4, 6], [1, 3], [5, 7]];

    /// 32 rows of two tokens are 8 of 16 registers.
    const MAX_TOKENS: usize = 2;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F32 {
        avx2!([_mm256_set1_ps(v); 2])
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F32 {
        avx2!([
            _mm256_loadu_ps(v.as_ptr()),
            _mm256_loadu_ps(v.as_ptr().add(8))
        ])
    }
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> Self::F32 {
        let p: *const __m128i = v.as_ptr().cast();
        avx2!([
            _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(1))))
        ])
    }
    #[inline(always)]
    fn load_bf16(self, v: &[bf16; LANES]) -> Self::F32 {
        let p: *const __m128i = v.as_ptr().cast();
        avx2!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(p)
            ))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(p.add(1))
            )))
        ])
    }
    #[inline(always)]
    fn load_f16(self, v: &[f16; LANES]) -> Self::F32 {
        let p: *const __m128i = v.as_ptr().cast();
        avx2!([
            _mm256_cvtph_ps(_mm_loadu_si128(p)),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))
        ])
    }
    #[inline(always)]
    fn load_i8(self, v: &[i8; LANES]) -> Self::F32 {
        avx2!({
            let bytes = _mm_loadu_si128(v.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            ]
        })
    }
    #[inline(always)]
    fn store(self, v: Self::F32, out: &mut [f32; LANES]) {
        avx2!({
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        })
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        let sign = self.splat(-0.0);
        both!(_mm256_andnot_ps, sign, a)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn reduce_add(self, v: Self::F32) -> f32 {
        avx2!(reduce_add_256(_mm256_add_ps(v[0], v[1])))
    }
    #[inline(always)]
    fn reduce_max(self, v: Self::F32) -> f32 {
        avx2!({
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        })
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
    fn splat_i32(self, v: i32) -> Self::I32 {
        avx2!([_mm256_set1_epi32(v); 2])
    }
    #[inline(always)]
    fn load_i32(self, v: &[i32; LANES]) -> Self::I32 {
        let p: *const __m256i = v.as_ptr().cast();
        avx2!([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
    }
    #[inline(always)]
    fn load_u32(self, v: &[u32; LANES]) -> Self::I32 {
        let p: *const __m256i = v.as_ptr().cast();
        avx2!([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
    }
    #[inline(always)]
    fn store_i32(self, v: Self::I32, out: &mut [i32; LANES]) {
        let p: *mut __m256i = out.as_mut_ptr().cast();
        avx2!({
            _mm256_storeu_si256(p, v[0]);
            _mm256_storeu_si256(p.add(1), v[1]);
        })
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        both!(_mm256_add_epi32, a, b)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, v: Self::I32) -> Self::I32 {
        let count = avx2!(_mm_cvtsi32_si128(N as i32));
        avx2!([_mm256_srl_epi32(v[0], count), _mm256_srl_epi32(v[1], count)])
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I32) -> Self::F32 {
        both!(_mm256_cvtepi32_ps, v)
    }
    #[inline(always)]
    fn round(self, v: Self::F32) -> Self::I32 {
        both!(_mm256_cvtps_epi32, v)
    }
    #[inline(always)]
    fn pow2(self, v: Self::I32) -> Self::F32 {
        let biased = self.add_i32(v, self.splat_i32(127));
        avx2!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased[0])),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased[1]))
        ])
    }

    #[inline(always)]
    fn word_table(self, book: &[i16; 16]) -> Self::WordTable {
        let (low, high) = (book.map(|v| v as u8), book.map(|v| (v >> 8) as u8));
        avx2!([
            _mm256_broadcastsi128_si256(_mm_loadu_si128(low.as_ptr().cast())),
            _mm256_broadcastsi128_si256(_mm_loadu_si128(high.as_ptr().cast())),
        ])
    }
    #[inline(always)]
    fn nf4_words(self, table: Self::WordTable, codes: Self::I32) -> [Self::I32; 4] {
        let [a, b] = avx2!([
            nf4_words_256(table, codes[0]),
            nf4_words_256(table, codes[1])
        ]);
        [[a[0], b[0]], [a[1], b[1]], [a[2], b[2]], [a[3], b[3]]]
    }
    #[inline(always)]
    fn dot_pairs(self, acc: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32 {
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
    ) -> [[Self::I32; N]; H] {
        dot_words_by_eight(self, table, codes, first_half, pairs)
    }

    #[inline(always)]
    fn byte_table(self) -> __m256i {
        avx2!(_mm256_broadcastsi128_si256(_mm_loadu_si128(
            CODE_BOOK_INT8.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn nf4_bytes(self, table: __m256i, codes: Self::I32) -> [Self::I32; 2] {
        let [a, b] = avx2!([
            nf4_bytes_256(table, codes[0]),
            nf4_bytes_256(table, codes[1])
        ]);
        [[a[0], b[0]], [a[1], b[1]]]
    }
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I32, weights: Self::I32, x: Self::I32) -> Self::I32 {
        avx2!([
            dot_bytes_256(acc[0], weights[0], x[0]),
            dot_bytes_256(acc[1], weights[1], x[1])
        ])
    }
    /// Weights are as they are.
    #[inline(always)]
    fn byte_start(self, _: i32) -> Self::I32 {
        self.splat_i32(0)
    }

    #[inline(always)]
    fn f32_table(self) -> Self::F32Table {
        self.load(&CODE_BOOK)
    }
    #[inline(always)]
    fn nf4_f32(self, table: Self::F32Table, codes: Self::I32) -> Self::F32 {
        avx2!([nf4_f32_256(table, codes[0]), nf4_f32_256(table, codes[1])])
    }
}

/// The even codes and the odd ones, a byte each.
#[target_feature(enable = "avx2")]
#[inline]
fn nibbles(codes: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    [
        _mm256_and_si256(codes, low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low),
    ]
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn nf4_bytes_256(table: __m256i, codes: __m256i) -> [__m256i; 2] {
    nibbles(codes).map(|codes| _mm256_shuffle_epi8(table, codes))
}

/// Takes signs from the weights to the activations, because one factor must be unsigned; pairs add
/// up to at most 2 * 124 * 127, which 16 bits hold.
#[target_feature(enable = "avx2")]
#[inline]
fn dot_bytes_256(acc: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Low and high bytes of the integers of the even codes, and of the odd ones, in code order.
#[target_feature(enable = "avx2")]
#[inline]
fn look_up_bytes(table: [__m256i; 2], codes: __m256i) -> [[__m256i; 2]; 2] {
    let [even, odd] = nibbles(codes);
    [
        [
            _mm256_shuffle_epi8(table[0], even),
            _mm256_shuffle_epi8(table[1], even),
        ],
        [
            _mm256_shuffle_epi8(table[0], odd),
            _mm256_shuffle_epi8(table[1], odd),
        ],
    ]
}

/// Joins low and high bytes in place: words 0 and 1 of a dword are made of its bytes 0 and 2, or 1 and 3.
#[target_feature(enable = "avx2")]
#[inline]
fn nf4_words_256(table: [__m256i; 2], codes: __m256i) -> [__m256i; 4] {
    // Bytes 0, 2, 1, 3 of each dword, so that neighbouring ones become a pair.
    let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
    ));
    let bytes = look_up_bytes(table, _mm256_shuffle_epi8(codes, order));
    let low_bytes = _mm256_set1_epi16(0xff);
    let mut words = [codes; 4];
    for (pair, [low, high]) in words.chunks_exact_mut(2).zip(bytes) {
        pair[0] = _mm256_or_si256(
            _mm256_and_si256(low, low_bytes),
            _mm256_slli_epi16::<8>(high),
        );
        pair[1] = _mm256_or_si256(
            _mm256_srli_epi16::<8>(low),
            _mm256_andnot_si256(low_bytes, high),
        );
    }
    words
}

/// Joins bytes by interleaving, which is cheaper, but puts two dwords of a row side by side: of
/// four rows per 128 bits, the first two are in the first vector of each pair, the other two in the
/// second. The first pair of vectors has the even codes, the other the odd ones.
#[target_feature(enable = "avx2")]
#[inline]
fn interleaved_words(table: [__m256i; 2], codes: __m256i) -> [[__m256i; 2]; 2] {
    look_up_bytes(table, codes).map(|[low, high]| {
        [
            _mm256_unpacklo_epi8(low, high),
            _mm256_unpackhi_epi8(low, high),
        ]
    })
}

/// Products of i16 pairs in one register, which is what AVX2 and AVX-VNNI differ in.
pub(super) trait Pairs: Simd {
    /// `acc + a.low * b.low + a.high * b.high`
    fn dot_pairs_256(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i;
}

impl Pairs for Avx2 {
    #[inline(always)]
    fn dot_pairs_256(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        avx2!(_mm256_add_epi32(acc, _mm256_madd_epi16(a, b)))
    }
}

/// [`Simd::dot_words`], eight rows at a time.
#[inline(always)]
pub(super) fn dot_words_by_eight<S: Pairs, const N: usize, const H: usize>(
    s: S,
    table: [__m256i; 2],
    codes: &[[u32; 2 * LANES]; 8],
    first_half: usize,
    pairs: [&[i32; 32]; N],
) -> [[[__m256i; 2]; N]; H] {
    // No closures: they would not have the features of the kernel that this is inlined into.
    let mut out = [[[avx2!(_mm256_setzero_si256()); 2]; N]; H];
    for (half, out) in out.iter_mut().enumerate() {
        for part in 0..2 {
            let row = (first_half + half) * LANES + 8 * part;
            let sums = eight_rows(s, table, codes, row, pairs);
            for (out, sum) in out.iter_mut().zip(sums) {
                out[part] = sum;
            }
        }
    }
    out
}

/// [`Simd::dot_words`] of eight rows, from `row` on.
///
/// Eight rows at a time, because sums of sixteen and what a lookup needs are more than 16 registers hold.
#[inline(always)]
fn eight_rows<S: Pairs, const N: usize>(
    s: S,
    table: [__m256i; 2],
    codes: &[[u32; 2 * LANES]; 8],
    row: usize,
    pairs: [&[i32; 32]; N],
) -> [__m256i; N] {
    // Of each token, for even and odd codes, of the first and second words.
    let mut sums = [[[avx2!(_mm256_setzero_si256()); 2]; 2]; N];
    for (group, codes) in codes.iter().enumerate() {
        let codes: &[u32; 8] = codes[row..].first_chunk().expect("eight more rows");
        let words = avx2!({
            let codes = _mm256_loadu_si256(codes.as_ptr().cast());
            interleaved_words(table, codes)
        });
        for (sums, pairs) in sums.iter_mut().zip(pairs) {
            for parity in 0..2 {
                let x = 4 * group + 2 * parity;
                // Two pairs side by side, again and again.
                let both = i64::from(pairs[x + 1]) << 32 | i64::from(pairs[x] as u32);
                let x = avx2!(_mm256_set1_epi64x(both));
                for (sum, words) in sums[parity].iter_mut().zip(words[parity]) {
                    *sum = s.dot_pairs_256(*sum, words, x);
                }
            }
        }
    }
    let mut out = [avx2!(_mm256_setzero_si256()); N];
    for (out, [even, odd]) in out.iter_mut().zip(sums) {
        // Neighbouring lanes hold two sums of each row.
        *out = avx2!({
            let first = _mm256_add_epi32(even[0], odd[0]);
            _mm256_hadd_epi32(first, _mm256_add_epi32(even[1], odd[1]))
        });
    }
    out
}

/// Two lookups of eight entries; bit 3 of the code, moved to the sign, picks one.
#[target_feature(enable = "avx2")]
#[inline]
fn nf4_f32_256(table: [__m256; 2], codes: __m256i) -> __m256 {
    let low = _mm256_permutevar8x32_ps(table[0], codes);
    let high = _mm256_permutevar8x32_ps(table[1], codes);
    let pick = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
    _mm256_blendv_ps(low, high, pick)
}
