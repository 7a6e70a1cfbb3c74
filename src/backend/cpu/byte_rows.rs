//! Integer activations once more, as tile registers load them: bytes, tokens 64 bytes apart.
//!
//! Made where activations are quantised, so that no product of a matrix has to: tiles have up to
//! 16 rows a constant distance apart, and tokens `t..t + 16` of a block are one tile of a list.

use std::ops::Range;

use super::activations::{Int8Block, Int16Block, Integers};
use super::layout::TILE_COLS;
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
    pub fn gather(&mut self, x: ByteRowsView, x_tokens: usize, tokens: &[u32]) {
        let len_of = |list: &[Row]| list.len() / x_tokens * tokens.len();
        self.resize_lists(len_of(x.high), len_of(x.bytes));
        gather(x.high, x_tokens, tokens, &mut self.high);
        gather(x.low, x_tokens, tokens, &mut self.low);
        gather(x.word_scales, x_tokens, tokens, &mut self.word_scales);
        gather(x.bytes, x_tokens, tokens, &mut self.bytes);
        gather(x.byte_scales, x_tokens, tokens, &mut self.byte_scales);
    }
}

/// `out[kb, i] = x[kb, tokens[i]]`
fn gather<T: Copy>(x: &[T], x_tokens: usize, tokens: &[u32], out: &mut [T]) {
    let blocks = x.chunks_exact(x_tokens);
    for (x, out) in blocks.zip(out.chunks_exact_mut(tokens.len())) {
        for (out, &token) in out.iter_mut().zip(tokens) {
            *out = x[token as usize];
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

    /// Whether nothing was quantised for tiles.
    pub fn is_empty(&self) -> bool {
        self.high.is_empty() && self.bytes.is_empty()
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
    pub unsafe fn put_words(&self, i: usize, block: &Int16Block) {
        // SAFETY: the caller promises that this block is nobody else's now.
        unsafe {
            (*self.high.item(i), *self.low.item(i)) = split(&block.pairs);
            *self.word_scales.item(i) = block.scale;
        }
    }

    /// As [`put_words`](Self::put_words).
    ///
    /// # Safety
    /// As there.
    pub unsafe fn put_bytes(&self, i: usize, block: &Int8Block) {
        // SAFETY: the caller promises that this block is nobody else's now.
        unsafe {
            *self.bytes.item(i) = Row(block.quads);
            *self.byte_scales.item(i) = block.scale;
        }
    }
}

/// High and low bytes.
///
/// Pairs 0 to 3 of a group hold its nibbles 0 and 4, 2 and 6, 1 and 5, 3 and 7; quads hold the even
/// nibbles, then the odd ones.
fn split(pairs: &[i32; TILE_COLS / 2]) -> (Row, Row) {
    let (mut high, mut low) = ([0; TILE_COLS / 4], [0; TILE_COLS / 4]);
    for (i, pairs) in pairs.as_chunks::<2>().0.iter().enumerate() {
        let [[a0, a1, a2, a3], [b0, b1, b2, b3]] = pairs.map(i32::to_le_bytes);
        high[i] = i32::from_le_bytes([a1, b1, a3, b3]);
        low[i] = i32::from_le_bytes([a0, b0, a2, b2]);
    }
    (Row(high), Row(low))
}
