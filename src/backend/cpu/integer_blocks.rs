//! 64 activations of one token as integers, in the order in which kernels meet the codes of a tile.

use super::layout::{TILE_COLS, column};
use super::simd::{BYTE_OFFSET, LANES, Simd, lanes_mut};

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
    /// holds the columns of nibbles `Simd::PAIRS[j]`, the first in the low half.
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
    pub(super) fn new<S: Simd>(_: S, quantized: &[i32; TILE_COLS], scale: f32) -> Self {
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
    pub(super) fn new(quantized: &[i32; TILE_COLS], scale: f32) -> Self {
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
