//! Reading NF4: the exact formula, in plain code. Every kernel is tested against it.

use std::ops::Range;

use super::{CODE_BOOK, NESTED_BLOCKSIZE};
use crate::formats::Bytes;

/// A `[rows, cols]` part of an NF4 weight, starting at element `first` of the stored, flattened
/// tensor: 0 for a tensor of its own, a multiple of the expert size inside fused experts.
#[derive(Clone, Debug)]
pub struct Nf4Matrix {
    /// `[ceil(n / 2)]` for the whole stored tensor of `n` weights, high nibble first
    pub packed: Bytes,
    pub absmax: Absmax,
    /// Weights of the stored tensor that share a scale
    pub blocksize: usize,
    pub first: usize,
    pub rows: usize,
    pub cols: usize,
}

/// The scale of each block of weights of a stored tensor.
#[derive(Clone, Debug)]
pub enum Absmax {
    /// `[blocks]` f32
    Plain(Bytes),
    /// Double quantisation
    Nested {
        /// `[blocks]` u8, indices into `quant_map`
        codes: Bytes,
        /// `[ceil(blocks / 256)]` f32
        nested_absmax: Bytes,
        /// `[256]` f32: the stored one, since files differ in entry 0
        quant_map: Bytes,
        offset: f32,
    },
}

impl Absmax {
    /// Scale of block `b`: a rounded product plus a rounded sum, never fused.
    pub fn get(&self, b: usize) -> f32 {
        match self {
            Absmax::Plain(bytes) => f32_at(bytes, b),
            Absmax::Nested {
                codes,
                nested_absmax,
                quant_map,
                offset,
            } => {
                let product = f32_at(quant_map, codes[b] as usize)
                    * f32_at(nested_absmax, b / NESTED_BLOCKSIZE);
                product + offset
            }
        }
    }
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let b = &bytes[4 * i..4 * i + 4];
    f32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

impl Nf4Matrix {
    /// The scale of weight `i` of the stored tensor.
    pub fn scale(&self, i: usize) -> f32 {
        self.absmax.get(i / self.blocksize)
    }

    pub(crate) fn stored_bytes(&self) -> usize {
        let n = self.rows * self.cols;
        let scales = n.div_ceil(self.blocksize);
        n.div_ceil(2)
            + match self.absmax {
                Absmax::Plain(_) => 4 * scales,
                Absmax::Nested { .. } => scales + 4 * scales.div_ceil(NESTED_BLOCKSIZE),
            }
    }

    /// Gives back the memory of a mapped file that the codes of rows `rows` took.
    pub(crate) fn release_rows(&self, rows: Range<usize>) {
        let first = (self.first + rows.start * self.cols) / 2;
        let last = (self.first + rows.end * self.cols).div_ceil(2);
        self.packed.release(first..last.min(self.packed.len()));
    }

    /// The scales as they are stored.
    pub(crate) fn absmax_bytes(&self) -> impl Iterator<Item = &Bytes> {
        let (first, second) = match &self.absmax {
            Absmax::Plain(bytes) => (bytes, None),
            Absmax::Nested {
                codes,
                nested_absmax,
                ..
            } => (codes, Some(nested_absmax)),
        };
        std::iter::once(first).chain(second)
    }

    /// Rows as f32: `code_book[c[i]] * s[i / blocksize]`, one rounding. Blocks may cross row ends.
    pub(crate) fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let packed: &[u8] = &self.packed;
        let start = self.first + rows.start * self.cols;
        let end = self.first + rows.end * self.cols;
        let mut i = start;
        while i < end {
            let block_end = end.min((i / self.blocksize + 1) * self.blocksize);
            let scale = self.scale(i);
            let scaled = CODE_BOOK.map(|code| code * scale);
            for j in i..block_end {
                let nibble = if j.is_multiple_of(2) {
                    packed[j / 2] >> 4
                } else {
                    packed[j / 2] & 15
                };
                out[j - start] = scaled[usize::from(nibble)];
            }
            i = block_end;
        }
    }
}
