//! What the weight kernels multiply with: activations in blocks of 64 columns.
//!
//! Block `kb` of token `t` is `blocks[kb * tokens + t]`, so that a kernel that walks along a row of
//! tiles meets all tokens of one tile side by side. The last block is padded with zeros.

use std::array::from_fn;

use super::isa::dispatch;
use super::layout::{TILE_COLS, column};
use super::simd::{ACTIVATION_SUM, LANES, PAIR_ORDER, Simd, WEIGHT_ONE, lanes, lanes_mut};

/// 64 activations of one token.
pub type Block = [f32; TILE_COLS];

/// 64 activations of one token as integers: `x = scale * WEIGHT_ONE * quantised`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Int16Block {
    /// i16 pairs in the order of the tile's codes: pair `4 * group + j` holds the columns of
    /// nibble `PAIR_ORDER[j]` (low half) and of the nibble four further, 16 columns on.
    pub pairs: [i32; TILE_COLS / 2],
    /// Undoes the scaling of the activations and of the code book.
    pub scale: f32,
}

/// First column of pair `4 * group + j`; the second is 16 further.
const PAIR_COLUMN: [usize; TILE_COLS / 2] = {
    let mut columns = [0; TILE_COLS / 2];
    let mut p = 0;
    while p < columns.len() {
        columns[p] = column(p / 16, p / 4 % 4, PAIR_ORDER[p % 4]);
        p += 1;
    }
    columns
};

impl Int16Block {
    pub const ZERO: Int16Block = Int16Block {
        pairs: [0; TILE_COLS / 2],
        scale: 0.0,
    };
}

/// Activations `[tokens, cols]` as blocks; the integer form exists where a kernel asks for it.
#[derive(Default)]
pub struct Activations {
    pub tokens: usize,
    /// `[ceil(cols / 64), tokens]`
    pub blocks: Vec<Block>,
    /// `[ceil(cols / 64), tokens]`, or empty
    pub int16: Vec<Int16Block>,
}

impl Activations {
    /// Makes room for `[tokens, cols]`, keeping memory of earlier use; contents are arbitrary.
    pub fn resize(&mut self, tokens: usize, cols: usize, int16: bool) {
        let len = tokens * cols.div_ceil(TILE_COLS);
        self.tokens = tokens;
        self.blocks.resize(len, [0.0; TILE_COLS]);
        let int16_len = if int16 { len } else { 0 };
        self.int16.resize(int16_len, Int16Block::ZERO);
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

#[inline(always)]
fn quantize_block_body<S: Simd>(s: S, x: &Block) -> Int16Block {
    let (mut max, mut sum) = (s.splat(0.0), s.splat(0.0));
    for v in lanes(x) {
        let v = s.abs(s.load(v));
        max = s.max(max, v);
        sum = s.add(sum, v);
    }
    let (max, sum) = (s.reduce_max(max), s.reduce_add(sum));
    if sum == 0.0 {
        return Int16Block::ZERO;
    }
    if !sum.is_finite() {
        // What is not a number must not look like one: the scale carries it on.
        return Int16Block {
            scale: f32::NAN,
            ..Int16Block::ZERO
        };
    }
    let steps = (ACTIVATION_SUM as f32 / sum).min(f32::from(i16::MAX) / max);
    let mut quantized = [0; TILE_COLS];
    for (v, q) in lanes(x).iter().zip(lanes_mut(&mut quantized)) {
        s.store_i32(s.round(s.mul(s.load(v), s.splat(steps))), q);
    }
    Int16Block {
        pairs: from_fn(|p| {
            let k = PAIR_COLUMN[p];
            quantized[k + LANES] << 16 | (quantized[k] & 0xffff)
        }),
        scale: 1.0 / (steps * WEIGHT_ONE as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::random_vector;

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
                for (p, pair) in block.pairs.iter().enumerate() {
                    let k = PAIR_COLUMN[p];
                    for (k, q) in [(k, *pair as i16), (k + 16, (pair >> 16) as i16)] {
                        let step = block.scale * WEIGHT_ONE as f32;
                        assert!((f32::from(q) * step - x[k]).abs() <= 0.51 * step);
                        sum += i64::from(q.unsigned_abs());
                    }
                }
                assert!(sum * i64::from(WEIGHT_ONE) <= i64::from(i32::MAX));
            }
        }
    }

    #[test]
    fn a_block_of_zeros_stays_zero() {
        for isa in Isa::available() {
            let block = quantize_block(isa, &[0.0; 64]);
            assert!(block.scale == 0.0 && block.pairs == [0; 32]);
        }
    }

    #[test]
    fn what_is_not_a_number_is_not_lost() {
        for isa in Isa::available() {
            for bad in [f32::INFINITY, f32::NAN] {
                let mut x = [1.0; 64];
                x[3] = bad;
                assert!(quantize_block(isa, &x).scale.is_nan());
            }
        }
    }
}
