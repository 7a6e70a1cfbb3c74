//! NF4 codes: drawn like those of normal weights, or given.

use std::ops::Range;
use std::sync::LazyLock;

use rayon::prelude::*;

use super::random::{Stream, normal_quantiles};
use crate::formats::nf4::CODE_BOOK;

/// Bytes that one thread fills at a time.
pub const PIECE: usize = 1 << 18;

/// Codes of 0 and 1, the middle and the end of the book.
pub const ZERO: u8 = 7;
pub const ONE: u8 = 15;

/// The codes of a matrix, two a byte.
pub struct Codes {
    pub stream: Stream,
    pub cols: usize,
    /// Not drawn; later ones overwrite earlier.
    pub given: Vec<Given>,
}

/// One code for all elements of some rows and columns.
pub struct Given {
    pub rows: Range<usize>,
    /// Even on both sides: whole bytes
    pub cols: Range<usize>,
    pub code: u8,
}

impl Codes {
    /// Fills `out`, the whole matrix, on all threads of the current pool.
    pub fn fill(&self, out: &mut [u8]) {
        let pairs: &[u8; 256] = &CODE_PAIRS;
        out.par_chunks_mut(PIECE)
            .enumerate()
            .for_each(|(i, piece)| {
                let start = i * PIECE;
                self.stream.bytes((start / 8) as u64, piece);
                piece.iter_mut().for_each(|b| *b = pairs[usize::from(*b)]);
                self.given.iter().for_each(|g| self.give(g, start, piece));
            });
    }

    /// Writes what is given of `piece`, which begins `start` bytes into the matrix.
    fn give(&self, given: &Given, start: usize, piece: &mut [u8]) {
        let stride = self.cols / 2;
        let end = start + piece.len();
        let rows = given.rows.start.max(start / stride)..given.rows.end.min(end.div_ceil(stride));
        for row in rows {
            let at = |col: usize| (row * stride + col / 2).clamp(start, end) - start;
            piece[at(given.cols.start)..at(given.cols.end)].fill(given.code << 4 | given.code);
        }
    }
}

/// The code whose value is nearest.
pub fn nearest(value: f32) -> u8 {
    let distance = |code: &usize| (CODE_BOOK[*code] - value).abs();
    let nearest = (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    nearest.expect("there are sixteen") as u8
}

/// Two NF4 codes for each value of a byte: with random bytes, those of normal weights in blocks of
/// 64, whose largest is 2.4 standard deviations on average.
///
/// All sixteen codes equally often would be nearly as normal, but with a mean of 0.05 standard
/// deviations, and that is enough to make all tokens alike after some thirty layers.
static CODE_PAIRS: LazyLock<[u8; 256]> = LazyLock::new(|| {
    const ABSMAX: f32 = 2.4;
    let codes = normal_quantiles::<256>().map(|z| nearest(z / ABSMAX));
    // The other nibble takes the same codes in an order that has little to do with the first.
    std::array::from_fn(|i| codes[i] << 4 | codes[usize::from((i as u8).reverse_bits())])
});

/// Root mean square of drawn codes' values.
pub fn code_rms() -> f64 {
    let value = |pair: &u8| f64::from(CODE_BOOK[usize::from(pair >> 4)]);
    let sum: f64 = CODE_PAIRS.iter().map(|pair| value(pair).powi(2)).sum();
    (sum / CODE_PAIRS.len() as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_codes_lie_where_they_belong_in_any_piece() {
        let (rows, cols) = (3 * PIECE / 500, 1000);
        let given = |rows, cols, code| Given { rows, cols, code };
        let codes = Codes {
            stream: Stream::new(0, "codes"),
            cols,
            given: vec![
                given(0..rows, 10..990, ZERO),
                given(5..rows - 5, 10..12, ONE),
            ],
        };
        let mut out = vec![0; rows * cols / 2];
        codes.fill(&mut out);
        let drawn: Vec<u8> = (out.chunks(500).flat_map(|row| [&row[..5], &row[495..]]))
            .flatten()
            .copied()
            .collect();
        assert!(drawn.iter().any(|&b| b != 0x77), "the rest is drawn");
        for (i, row) in out.chunks(500).enumerate() {
            let first = if (5..rows - 5).contains(&i) {
                0xff
            } else {
                0x77
            };
            assert_eq!(row[5], first, "row {i}");
            assert!(row[6..495].iter().all(|&b| b == 0x77), "row {i}");
        }
    }
}
