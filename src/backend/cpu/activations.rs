//! What the weight kernels multiply with: activations in blocks of 64 columns.
//!
//! Block `kb` of token `t` is `blocks[kb * tokens + t]`, so that a kernel that walks along a row of
//! tiles meets all tokens of one tile side by side. The last block is padded with zeros.

use super::byte_rows::{ByteRows, ByteRowsParts};
use super::isa::{Isa, dispatch};
use super::layout::{TILE_COLS, column};
use super::simd::{
    BYTE_OFFSET, BYTE_ONE, LANES, Simd, WEIGHT_ONE, WIDE_ONE, activation_sum, lanes, lanes_mut,
};
use super::threads::Parts;

/// 64 activations of one token.
pub type Block = [f32; TILE_COLS];

/// How integer kernels multiply: all read the same tiles, each its own form of the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integers {
    /// 8-bit weights and activations: 1% error
    Int8,
    /// 14-bit weights, 13 to 14-bit activations: 0.007% error
    Int16,
    /// 16-bit weights, activations of 18 bits in two terms: 0.001% error, half as fast
    Wide,
}

/// 64 activations of one token as integers: `x = scale * WEIGHT_ONE * quantised`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Int16Block {
    /// i16 pairs in the order in which the instruction set meets the tile's codes: pair `4 * group + j`
    /// holds the columns of nibbles [`Simd::PAIRS`]`[j]`, the first in the low half.
    pub pairs: [i32; TILE_COLS / 2],
    /// Undoes the scaling of the activations and of the code book.
    pub scale: f32,
}

/// 64 activations of one token as bytes: `x = scale * BYTE_ONE * quantised`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Int8Block {
    /// Quads of i8 in the order of the tile's codes: quad `2 * group + odd` holds the columns of
    /// nibbles `odd`, `2 + odd`, `4 + odd`, `6 + odd`.
    pub quads: [i32; TILE_COLS / 4],
    /// `-BYTE_OFFSET` times the sum of the quantised
    pub offset: i32,
    /// Undoes the scaling of the activations and of the code book.
    pub scale: f32,
}

/// 64 activations of one token in two terms: coarse integers, and what their rounding left.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct WideBlock {
    /// `x = scale * WIDE_ONE * quantised + rest`
    pub coarse: Int16Block,
    pub rest: Int8Block,
}

/// Columns of the 16 pairs of 32 columns, in order: [`Simd::PAIRS`] of four groups.
const fn pair_columns(pairs: [[usize; 2]; 4]) -> [[usize; 2]; LANES] {
    let (mut columns, mut p) = ([[0; 2]; LANES], 0);
    while p < LANES {
        let [first, second] = pairs[p % 4];
        columns[p] = [column(0, p / 4, first), column(0, p / 4, second)];
        p += 1;
    }
    columns
}

impl Int16Block {
    pub const ZERO: Int16Block = Int16Block {
        pairs: [0; TILE_COLS / 2],
        scale: 0.0,
    };

    /// Inlined, so that the loops become vectors of the caller's instruction set.
    #[inline(always)]
    fn new<S: Simd>(_: S, quantized: &[i32; TILE_COLS], scale: f32) -> Self {
        let columns = const { pair_columns(S::PAIRS) };
        let mut pairs = [0; TILE_COLS / 2];
        for (pairs, q) in lanes_mut(&mut pairs)
            .iter_mut()
            .zip(quantized.as_chunks::<32>().0)
        {
            for (pair, [first, second]) in pairs.iter_mut().zip(columns) {
                *pair = q[second] << 16 | (q[first] & 0xffff);
            }
        }
        Int16Block { pairs, scale }
    }
}

impl Int8Block {
    pub const ZERO: Int8Block = Int8Block {
        quads: [0; TILE_COLS / 4],
        offset: 0,
        scale: 0.0,
    };

    /// Inlined as [`Int16Block::new`] is.
    #[inline(always)]
    fn new(quantized: &[i32; TILE_COLS], scale: f32) -> Self {
        let mut quads = [0; TILE_COLS / 4];
        for (quads, q) in quads
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(quantized.as_chunks::<32>().0)
        {
            for i in 0..8 {
                quads[i] = q[24 + i] << 24
                    | (q[16 + i] & 0xff) << 16
                    | (q[8 + i] & 0xff) << 8
                    | (q[i] & 0xff);
            }
        }
        Int8Block {
            quads,
            offset: -BYTE_OFFSET * quantized.iter().sum::<i32>(),
            scale,
        }
    }
}

impl WideBlock {
    pub const ZERO: WideBlock = WideBlock {
        coarse: Int16Block::ZERO,
        rest: Int8Block::ZERO,
    };
}

/// Integer activations of the kind that a kernel asks for; the other lists are empty.
#[derive(Default)]
pub struct IntegerBlocks {
    pub int8: Vec<Int8Block>,
    pub int16: Vec<Int16Block>,
    pub wide: Vec<WideBlock>,
    /// The same for tiles, on AMX only
    pub rows: ByteRows,
}

impl IntegerBlocks {
    /// Makes room for `len` blocks of `kind`, keeping memory of earlier use.
    pub fn resize(&mut self, isa: Isa, len: usize, kind: Option<Integers>) {
        let len_of = |of| if kind == Some(of) { len } else { 0 };
        self.int8.resize(len_of(Integers::Int8), Int8Block::ZERO);
        self.int16.resize(len_of(Integers::Int16), Int16Block::ZERO);
        self.wide.resize(len_of(Integers::Wide), WideBlock::ZERO);
        self.rows
            .resize(len, kind.filter(|_| matches!(isa, Isa::Amx(_))));
    }

    /// For jobs that each fill blocks of their own.
    pub fn parts(&mut self) -> IntegerParts<'_> {
        IntegerParts {
            int8: Parts::new(&mut self.int8),
            int16: Parts::new(&mut self.int16),
            wide: Parts::new(&mut self.wide),
            rows: self.rows.parts(),
        }
    }
}

/// See [`IntegerBlocks::parts`].
pub struct IntegerParts<'a> {
    pub int8: Parts<'a, Int8Block>,
    pub int16: Parts<'a, Int16Block>,
    pub wide: Parts<'a, WideBlock>,
    rows: ByteRowsParts<'a>,
}

impl IntegerParts<'_> {
    /// Quantises `x` into block `i` of `kind`, for which there is room.
    ///
    /// # Safety
    /// No two threads may write the same block at the same time.
    pub unsafe fn quantize(&self, isa: Isa, kind: Integers, i: usize, x: &Block) {
        // SAFETY: the caller promises that this block is nobody else's now.
        unsafe {
            match kind {
                Integers::Int8 => {
                    let block = quantize_int8(isa, x);
                    *self.int8.item(i) = block;
                    if let Isa::Amx(amx) = isa {
                        self.rows.put_bytes(amx, i, &block);
                    }
                }
                Integers::Int16 => {
                    let block = quantize_block(isa, x);
                    *self.int16.item(i) = block;
                    if let Isa::Amx(amx) = isa {
                        self.rows.put_words(amx, i, &block);
                    }
                }
                Integers::Wide => {
                    let block = quantize_wide(isa, x);
                    *self.wide.item(i) = block;
                    if let Isa::Amx(amx) = isa {
                        self.rows.put_words(amx, i, &block.coarse);
                        self.rows.put_bytes(amx, i, &block.rest);
                    }
                }
            }
        }
    }
}

/// Activations `[tokens, cols]` as blocks, plain and as integers.
#[derive(Default)]
pub struct Activations {
    pub tokens: usize,
    /// `[ceil(cols / 64), tokens]`
    pub blocks: Vec<Block>,
    /// Each `[ceil(cols / 64), tokens]`, or empty
    pub integers: IntegerBlocks,
}

impl Activations {
    /// Makes room for `[tokens, cols]`, keeping memory of earlier use; contents are arbitrary.
    pub fn resize(&mut self, isa: Isa, tokens: usize, cols: usize, integers: Option<Integers>) {
        let len = tokens * cols.div_ceil(TILE_COLS);
        self.tokens = tokens;
        self.blocks.resize(len, [0.0; TILE_COLS]);
        self.integers.resize(isa, len, integers);
    }

    /// Columns, padded to 64.
    pub fn padded_cols(&self) -> usize {
        self.blocks.len() / self.tokens.max(1) * TILE_COLS
    }
}

dispatch! {
    /// Quantises one block as finely as 16 bits and the sum of 64 products in 32 bits allow.
    ///
    /// The second limit counts: it gives 13 to 14 bits to ordinary activations, where a fixed
    /// range, safe for 64 equal ones, would have to stop at 12.
    pub fn quantize_block(x: &Block) -> Int16Block = quantize_block_body
}

dispatch! {
    /// Quantises one block to bytes.
    pub fn quantize_int8(x: &Block) -> Int8Block = quantize_int8_body
}

dispatch! {
    /// Quantises one block to as many bits as sums with 16-bit weights allow, about 11, and the
    /// remainders to 7 more.
    pub fn quantize_wide(x: &Block) -> WideBlock = quantize_wide_body
}

/// Largest and sum of the absolute values.
#[inline(always)]
fn size<S: Simd>(s: S, x: &Block) -> (f32, f32) {
    let (mut max, mut sum) = (s.splat(0.0), s.splat(0.0));
    for v in lanes(x) {
        let v = s.abs(s.load(v));
        max = s.max(max, v);
        sum = s.add(sum, v);
    }
    (s.reduce_max(max), s.reduce_add(sum))
}

/// `round(x * steps)`
#[inline(always)]
fn rounded<S: Simd>(s: S, x: &Block, steps: f32) -> [i32; TILE_COLS] {
    let mut out = [0; TILE_COLS];
    for (v, q) in lanes(x).iter().zip(lanes_mut(&mut out)) {
        s.store_i32(s.round(s.mul(s.load(v), s.splat(steps))), q);
    }
    out
}

#[inline(always)]
fn quantize_block_body<S: Simd>(s: S, x: &Block) -> Int16Block {
    quantize_16(s, x, WEIGHT_ONE).0
}

/// With the steps per 1.0; 0 where there is nothing to round.
#[inline(always)]
fn quantize_16<S: Simd>(s: S, x: &Block, one: i32) -> (Int16Block, f32) {
    let (max, sum) = size(s, x);
    if sum == 0.0 {
        return (Int16Block::ZERO, 0.0);
    }
    if !sum.is_finite() {
        // What is not a number must not look like one: the scale carries it on.
        let scale = f32::NAN;
        return (
            Int16Block {
                scale,
                ..Int16Block::ZERO
            },
            0.0,
        );
    }
    let steps = (activation_sum(one) as f32 / sum).min(f32::from(i16::MAX) / max);
    let quantized = rounded(s, x, steps);
    (
        Int16Block::new(s, &quantized, 1.0 / (steps * one as f32)),
        steps,
    )
}

#[inline(always)]
fn quantize_int8_body<S: Simd>(s: S, x: &Block) -> Int8Block {
    let (max, sum) = size(s, x);
    if max == 0.0 && sum == 0.0 {
        return Int8Block::ZERO;
    }
    if !sum.is_finite() {
        let scale = f32::NAN;
        return Int8Block {
            scale,
            ..Int8Block::ZERO
        };
    }
    let steps = f32::from(i8::MAX) / max;
    Int8Block::new(&rounded(s, x, steps), 1.0 / (steps * BYTE_ONE as f32))
}

#[inline(always)]
fn quantize_wide_body<S: Simd>(s: S, x: &Block) -> WideBlock {
    let (coarse, steps) = quantize_16(s, x, WIDE_ONE);
    if steps == 0.0 {
        return WideBlock {
            coarse,
            rest: Int8Block::ZERO,
        };
    }
    // Remainders are at most half a step; roundings of the product add a little.
    const REST_STEPS: f32 = 250.0;
    let mut rest = [0; TILE_COLS];
    for (v, q) in lanes(x).iter().zip(lanes_mut(&mut rest)) {
        let scaled = s.mul(s.load(v), s.splat(steps));
        let left = s.sub(scaled, s.to_f32(s.round(scaled)));
        s.store_i32(s.round(s.mul(left, s.splat(REST_STEPS))), q);
    }
    let scale = 1.0 / (steps * REST_STEPS * BYTE_ONE as f32);
    WideBlock {
        coarse,
        rest: Int8Block::new(&rest, scale),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::random_vector;

    dispatch! {
        fn pairs_of() -> [[usize; 2]; 4] = pairs_of_body
    }

    #[inline(always)]
    fn pairs_of_body<S: Simd>(_: S) -> [[usize; 2]; 4] {
        S::PAIRS
    }

    /// Column and value of both halves of every pair.
    fn halves(isa: Isa, block: &Int16Block) -> Vec<(usize, i16)> {
        let pairs = pairs_of(isa);
        let both = |(p, pair): (usize, &i32)| {
            let [first, second] = pairs[p % 4].map(|n| column(p / 16, p / 4 % 4, n));
            [(first, *pair as i16), (second, (pair >> 16) as i16)]
        };
        block.pairs.iter().enumerate().flat_map(both).collect()
    }

    /// Columns of quad `2 * group + odd`.
    fn quad_columns(q: usize) -> [usize; 4] {
        std::array::from_fn(|j| column(q / 8, q / 2 % 4, 2 * j + q % 2))
    }

    #[test]
    fn quantised_activations_are_within_half_a_step_and_cannot_overflow() {
        for seed in 0..20 {
            let mut x: Block = random_vector(64, seed).try_into().unwrap();
            match seed % 4 {
                0 => x[7] = 1e4,
                1 => x = [-3e-7; 64],
                _ => {}
            }
            for isa in Isa::available() {
                let block = quantize_block(isa, &x);
                let mut sum = 0;
                for (k, q) in halves(isa, &block) {
                    let step = block.scale * WEIGHT_ONE as f32;
                    assert!((f32::from(q) * step - x[k]).abs() <= 0.51 * step);
                    sum += i64::from(q.unsigned_abs());
                }
                assert!(sum * i64::from(WEIGHT_ONE) <= i64::from(i32::MAX));
            }
        }
    }

    #[test]
    fn two_terms_are_within_a_five_hundredth_of_a_step() {
        for seed in 0..20 {
            let mut x: Block = random_vector(64, seed).try_into().unwrap();
            if seed % 3 == 0 {
                x[9] = -700.0;
            }
            for isa in Isa::available() {
                let WideBlock { coarse, rest } = quantize_wide(isa, &x);
                let mut found = [0.0; 64];
                for (k, q) in halves(isa, &coarse) {
                    found[k] += coarse.scale * WIDE_ONE as f32 * f32::from(q);
                }
                let mut sum = 0;
                for (q, quad) in rest.quads.iter().enumerate() {
                    for (k, byte) in quad_columns(q).into_iter().zip(quad.to_le_bytes()) {
                        let byte = byte.cast_signed();
                        assert!(byte > i8::MIN);
                        sum += i32::from(byte);
                        found[k] += rest.scale * BYTE_ONE as f32 * f32::from(byte);
                    }
                }
                assert_eq!(rest.offset, -BYTE_OFFSET * sum);
                let step = coarse.scale * WIDE_ONE as f32;
                for (found, x) in found.iter().zip(x) {
                    let rounding = 2.0 * f32::EPSILON * x.abs();
                    assert!(
                        (found - x).abs() <= step * 0.0025 + rounding,
                        "{found} {x} {step}"
                    );
                }
            }
        }
    }

    #[test]
    fn bytes_are_within_half_a_step() {
        let mut x: Block = random_vector(64, 3).try_into().unwrap();
        x[0] = 9.0;
        for isa in Isa::available() {
            let block = quantize_int8(isa, &x);
            for (q, quad) in block.quads.iter().enumerate() {
                for (k, byte) in quad_columns(q).into_iter().zip(quad.to_le_bytes()) {
                    let found = block.scale * BYTE_ONE as f32 * f32::from(byte.cast_signed());
                    assert!((found - x[k]).abs() <= 9.0 / 127.0 * 0.501);
                }
            }
        }
    }

    #[test]
    fn a_block_of_zeros_stays_zero() {
        for isa in Isa::available() {
            let block = quantize_block(isa, &[0.0; 64]);
            assert!(block.scale == 0.0 && block.pairs == [0; 32]);
            let block = quantize_int8(isa, &[0.0; 64]);
            assert!(block.scale == 0.0 && block.quads == [0; 16]);
            let block = quantize_wide(isa, &[0.0; 64]);
            assert!(block.coarse.scale == 0.0 && block.rest.scale == 0.0);
        }
    }

    #[test]
    fn what_is_not_a_number_is_not_lost() {
        for isa in Isa::available() {
            for bad in [f32::INFINITY, f32::NAN] {
                let mut x = [1.0; 64];
                x[3] = bad;
                assert!(quantize_block(isa, &x).scale.is_nan());
                assert!(quantize_int8(isa, &x).scale.is_nan());
                assert!(quantize_wide(isa, &x).coarse.scale.is_nan());
            }
        }
    }
}
