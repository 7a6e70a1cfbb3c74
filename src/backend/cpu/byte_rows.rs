//! Integer activations once more, as tile registers load them: bytes, tokens 64 bytes apart.
//!
//! Made where activations are quantised, so that no product of a matrix has to: tiles have up to
//! 16 rows a constant distance apart, and tokens `t..t + 16` of a block are one tile of a list.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use super::integer_blocks::{Int8Block, Int16Block, Integers};
use super::isa::{Amx, Isa, dispatch};
use super::layout::TILE_COLS;
use super::simd::{Simd, lanes};
use super::threads::Parts;

/// One block of one token, in the order of [`Int8Block::quads`], one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Row(pub [i32; TILE_COLS / 4]);

/// Each list `[blocks, tokens]`, as the blocks they are made of, or empty.
#[derive(Default)]
pub struct ByteRows {
    /// High bytes, signed, and low bytes of 16-bit activations
    high: Vec<Row>,
    low: Vec<Row>,
    word_scales: Vec<f32>,
    /// 8-bit activations
    bytes: Vec<Row>,
    byte_scales: Vec<f32>,
}

/// See [`ByteRows`].
#[derive(Clone, Copy, Default)]
pub struct ByteRowsView<'a> {
    pub high: &'a [Row],
    pub low: &'a [Row],
    pub word_scales: &'a [f32],
    pub bytes: &'a [Row],
    pub byte_scales: &'a [f32],
}

impl ByteRows {
    /// Makes room for `len` blocks of `kind`, keeping memory of earlier use.
    pub fn resize(&mut self, len: usize, kind: Option<Integers>) {
        let words = matches!(kind, Some(Integers::Int16 | Integers::Wide));
        let bytes = matches!(kind, Some(Integers::Int8 | Integers::Wide));
        let len_if = |there| if there { len } else { 0 };
        self.resize_lists(len_if(words), len_if(bytes));
    }

    fn resize_lists(&mut self, words: usize, bytes: usize) {
        const ZERO: Row = Row([0; TILE_COLS / 4]);
        self.high.resize(words, ZERO);
        self.low.resize(words, ZERO);
        self.word_scales.resize(words, 0.0);
        self.bytes.resize(bytes, ZERO);
        self.byte_scales.resize(bytes, 0.0);
    }

    pub fn view(&self) -> ByteRowsView<'_> {
        ByteRowsView {
            high: &self.high,
            low: &self.low,
            word_scales: &self.word_scales,
            bytes: &self.bytes,
            byte_scales: &self.byte_scales,
        }
    }

    /// For jobs that each fill blocks of their own.
    pub fn parts(&mut self) -> ByteRowsParts<'_> {
        ByteRowsParts {
            high: Parts::new(&mut self.high),
            low: Parts::new(&mut self.low),
            word_scales: Parts::new(&mut self.word_scales),
            bytes: Parts::new(&mut self.bytes),
            byte_scales: Parts::new(&mut self.byte_scales),
        }
    }

    /// Becomes `tokens` of `x`, which has `x_tokens`, one after the other.
    pub fn gather(&mut self, isa: Isa, x: ByteRowsView, x_tokens: usize, tokens: &[u32]) {
        let len_of = |list: &[Row]| list.len() / x_tokens * tokens.len();
        self.resize_lists(len_of(x.high), len_of(x.bytes));
        gather_rows(isa, x.high, x_tokens, tokens, &mut self.high);
        gather_rows(isa, x.low, x_tokens, tokens, &mut self.low);
        gather_rows(isa, x.bytes, x_tokens, tokens, &mut self.bytes);
        gather(
            x.word_scales,
            x_tokens,
            tokens,
            &mut self.word_scales,
            |x| *x,
        );
        gather(
            x.byte_scales,
            x_tokens,
            tokens,
            &mut self.byte_scales,
            |x| *x,
        );
    }
}

dispatch! {
    /// [`gather`] of whole vectors.
    fn gather_rows(x: &[Row], x_tokens: usize, tokens: &[u32], out: &mut [Row]) = gather_rows_body
}

#[inline(always)]
fn gather_rows_body<S: Simd>(s: S, x: &[Row], x_tokens: usize, tokens: &[u32], out: &mut [Row]) {
    gather(x, x_tokens, tokens, out, |Row(x)| {
        let mut row = Row([0; TILE_COLS / 4]);
        s.store_i32(s.load_i32(x), &mut row.0);
        row
    });
}

/// `out[kb, i] = copy(x[kb, tokens[i]])`
#[inline(always)]
fn gather<T>(x: &[T], x_tokens: usize, tokens: &[u32], out: &mut [T], copy: impl Fn(&T) -> T) {
    let blocks = x.chunks_exact(x_tokens);
    for (x, out) in blocks.zip(out.chunks_exact_mut(tokens.len())) {
        for (out, &token) in out.iter_mut().zip(tokens) {
            *out = copy(&x[token as usize]);
        }
    }
}

impl<'a> ByteRowsView<'a> {
    /// Blocks `range`; a list that is not filled stays empty.
    pub fn slice(self, range: Range<usize>) -> ByteRowsView<'a> {
        fn of<T>(list: &[T], range: Range<usize>) -> &[T] {
            list.get(range).unwrap_or(&[])
        }
        ByteRowsView {
            high: of(self.high, range.clone()),
            low: of(self.low, range.clone()),
            word_scales: of(self.word_scales, range.clone()),
            bytes: of(self.bytes, range.clone()),
            byte_scales: of(self.byte_scales, range),
        }
    }

    /// Blocks of all tokens.
    pub fn len(&self) -> usize {
        self.high.len().max(self.bytes.len())
    }

    /// Whether nothing was quantised for tiles.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// See [`ByteRows::parts`].
pub struct ByteRowsParts<'a> {
    high: Parts<'a, Row>,
    low: Parts<'a, Row>,
    word_scales: Parts<'a, f32>,
    bytes: Parts<'a, Row>,
    byte_scales: Parts<'a, f32>,
}

impl ByteRowsParts<'_> {
    /// Makes `block` block `i`, for which there is room.
    ///
    /// # Safety
    /// No two threads may write the same block at the same time.
    pub unsafe fn put_words(&self, amx: Amx, i: usize, block: &Int16Block) {
        // SAFETY: the caller promises that this block is nobody else's now, and an `Amx` holds an
        // `Avx512`, which exists only where these features were seen.
        unsafe {
            split(amx, &block.pairs, self.high.item(i), self.low.item(i));
            *self.word_scales.item(i) = block.scale;
        }
    }

    /// As [`put_words`](Self::put_words).
    ///
    /// # Safety
    /// As there.
    pub unsafe fn put_bytes(&self, _: Amx, i: usize, block: &Int8Block) {
        // SAFETY: the caller promises that this block is nobody else's now.
        unsafe {
            *self.bytes.item(i) = Row(block.quads);
            *self.byte_scales.item(i) = block.scale;
        }
    }
}

/// High and low bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(amx: Amx, pairs: &[i32; TILE_COLS / 2], high: &mut Row, low: &mut Row) {
    let s = amx.avx512();
    // Of each group's four pairs, the high bytes of even nibbles and of odd ones, then the low bytes.
    let order = _mm512_broadcast_i32x4(_mm_setr_epi8(
        1, 5, 3, 7, 9, 13, 11, 15, 0, 4, 2, 6, 8, 12, 10, 14,
    ));
    let pairs = lanes(pairs);
    let a = _mm512_shuffle_epi8(s.load_i32(&pairs[0]), order);
    let b = _mm512_shuffle_epi8(s.load_i32(&pairs[1]), order);
    let high_quads = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    let low_quads = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    s.store_i32(_mm512_permutex2var_epi64(a, high_quads, b), &mut high.0);
    s.store_i32(_mm512_permutex2var_epi64(a, low_quads, b), &mut low.0);
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn split(_: Amx, _: &[i32; TILE_COLS / 2], _: &mut Row, _: &mut Row) {
    unreachable!("never detected here")
}
