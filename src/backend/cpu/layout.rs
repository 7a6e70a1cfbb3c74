//! How NF4 weights lie in memory: tiles that the CPU and the GPU read as they are.
//!
//! A [`Tile`] holds 32 output rows x 64 input columns. Its codes are eight groups of 32 dwords, one
//! dword per row; group `4d + t` (d 0..2, t 0..4) holds of each row the eight columns
//!
//! ```text
//! k(t, d, n) = 32 d + 16 (n >> 2) + 2 t + (n & 1) + 8 ((n >> 1) & 1)      nibble n in bits 4n..
//! ```
//!
//! - CPU: one load is 16 rows, so a product with a broadcast activation needs no shuffles and no
//!   sums across lanes, and gives the same bits for one token as for many. Measured against
//!   fragment order with 16 rows, which needs both, this saves a fifth of the instructions.
//! - GPU: lane `4g + t` of a warp loads the 16 bytes of rows 4g..4g+4 of group `t`: the A fragments
//!   of `mma.m16n8k16` for two k-steps of two 16-row products. MMA row g of the first is tile row
//!   4g, row g + 8 is 4g + 1; of the second, 4g + 2 and 4g + 3. One byte is one register pair.
//!
//! The scales of a tile follow its codes, so one stream of bytes feeds a kernel. In integer tiles
//! they are u16, in units of one f32 per tile row: a tenth of the error of f16 in the same space. A
//! matrix is its tiles row after row, rows padded to 32 with zero scales; an expert is gate, up,
//! down in a row, one piece to copy to the GPU.

use bytemuck::{Pod, Zeroable};

use crate::formats::nf4::{BLOCKSIZE, Nf4Matrix};

/// Output rows of a tile.
pub const TILE_ROWS: usize = 32;
/// Input columns of a tile: one NF4 block.
pub const TILE_COLS: usize = BLOCKSIZE;

/// How far ahead kernels fetch tiles from memory: 8 KB, which is worth a quarter of the bandwidth
/// beside busy neighbours, and nothing on a quiet machine.
pub const TILES_AHEAD: usize = 8;

/// 32 x 64 weights; scales `A` are u16 for the integer kernels or f32 for the exact ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile<A> {
    /// `[4d + t][row]`
    pub codes: [[u32; TILE_ROWS]; 8],
    /// `[row]`
    pub absmax: [A; TILE_ROWS],
}

// SAFETY: all-zero bits are valid for u32 and for any zeroable scale.
unsafe impl<A: Zeroable> Zeroable for Tile<A> {}
// SAFETY: plain numbers, no padding: 1024 bytes of codes and 32 scales of 2 or 4 bytes fill whole
// multiples of 64.
unsafe impl Pod for Tile<u16> {}
// SAFETY: as above.
unsafe impl Pod for Tile<f32> {}

/// Column of the tile that nibble `n` of group `4d + t` holds.
pub const fn column(d: usize, t: usize, n: usize) -> usize {
    32 * d + 16 * (n >> 2) + 2 * t + (n & 1) + 8 * ((n >> 1) & 1)
}

/// Tiles that `matrix` takes, or `None` if a scale does not hold for all of a tile's row.
pub fn tile_count(matrix: &Nf4Matrix) -> Option<usize> {
    let starts = [matrix.cols, matrix.first, matrix.blocksize];
    let aligned = starts.iter().all(|n| n.is_multiple_of(TILE_COLS));
    aligned.then(|| matrix.rows.div_ceil(TILE_ROWS) * matrix.cols / TILE_COLS)
}

/// How a tile keeps absmax.
pub trait Absmax: Copy + Zeroable + Send + Sync {
    /// The unit of a tile row whose largest absmax is `largest`.
    fn unit(largest: f32) -> f32;
    fn encode(absmax: f32, unit: f32) -> Self;
}

impl Absmax for u16 {
    fn unit(largest: f32) -> f32 {
        largest / f32::from(u16::MAX)
    }
    fn encode(absmax: f32, unit: f32) -> u16 {
        if unit == 0.0 {
            return 0;
        }
        // Division may end a rounding above 65535, which the cast cuts.
        (absmax / unit).round() as u16
    }
}

impl Absmax for f32 {
    fn unit(_: f32) -> f32 {
        1.0
    }
    fn encode(absmax: f32, _: f32) -> f32 {
        absmax
    }
}

/// Rewrites rows `32 * tile_row ..` of `matrix` as its tile row `out`, `[cols / 64]`; returns the
/// unit of its scales.
pub fn pack_tile_row<A: Absmax>(matrix: &Nf4Matrix, tile_row: usize, out: &mut [Tile<A>]) -> f32 {
    let kblocks = matrix.cols / TILE_COLS;
    assert!(out.len() == kblocks && matrix.cols.is_multiple_of(TILE_COLS));
    let rows = tile_row * TILE_ROWS..matrix.rows.min((tile_row + 1) * TILE_ROWS);
    let first_block = |row: usize| matrix.first / TILE_COLS + row * kblocks;
    let largest = (first_block(rows.start)..first_block(rows.end))
        .fold(0.0f32, |max, b| max.max(matrix.scale(b * TILE_COLS)));
    let unit = A::unit(largest);
    for (kb, tile) in out.iter_mut().enumerate() {
        let mut words = [[0; TILE_ROWS]; 8];
        for (r, row) in rows.clone().enumerate() {
            let block = first_block(row) + kb;
            tile.absmax[r] = A::encode(matrix.scale(block * TILE_COLS), unit);
            let codes = &matrix.packed[block * TILE_COLS / 2..(block + 1) * TILE_COLS / 2];
            for (words, bytes) in words.iter_mut().zip(codes.as_chunks().0) {
                words[r] = u32::from_le_bytes(*bytes);
            }
        }
        transpose(&words, &mut tile.codes);
    }
    unit
}

/// From the words of 32 rows, `[word][row]`, to the groups of a tile, `[4d + t][row]`.
///
/// Group `4d + t` of a row takes byte t of words 4d .. 4d + 4, nibbles swapped because bitsandbytes
/// stores the earlier column in the high one: in each half, 4 x 4 bytes change rows with columns.
fn transpose(words: &[[u32; TILE_ROWS]; 8], groups: &mut [[u32; TILE_ROWS]; 8]) {
    const EVEN: u32 = 0x00ff_00ff;
    for d in 0..2 {
        for row in 0..TILE_ROWS {
            let word = |i: usize| {
                let w = words[4 * d + i][row];
                (w >> 4) & 0x0f0f_0f0f | (w & 0x0f0f_0f0f) << 4
            };
            let (a, b, c, e) = (word(0), word(1), word(2), word(3));
            let even = [a & EVEN | (b & EVEN) << 8, c & EVEN | (e & EVEN) << 8];
            let odd = [(a >> 8) & EVEN | b & !EVEN, (c >> 8) & EVEN | e & !EVEN];
            groups[4 * d][row] = even[0] & 0xffff | even[1] << 16;
            groups[4 * d + 1][row] = odd[0] & 0xffff | odd[1] << 16;
            groups[4 * d + 2][row] = even[0] >> 16 | even[1] & 0xffff_0000;
            groups[4 * d + 3][row] = odd[0] >> 16 | odd[1] & 0xffff_0000;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::tests::random_nf4;
    use crate::formats::Matrix;
    use crate::formats::nf4::CODE_BOOK;

    /// Code of (row, col), straight from the definition.
    fn code<A>(tile: &Tile<A>, row: usize, col: usize) -> usize {
        for group in 0..8 {
            for n in 0..8 {
                if column(group / 4, group % 4, n) == col {
                    return (tile.codes[group][row] >> (4 * n) & 15) as usize;
                }
            }
        }
        unreachable!("column {col} is in no group");
    }

    #[test]
    fn tiles_have_the_bytes_of_the_transfer_format() {
        assert_eq!(size_of::<Tile<u16>>(), 1088);
        assert_eq!(size_of::<Tile<f32>>(), 1152);
        // An expert of the 80B model: gate, up and down of 512 x 2048.
        assert_eq!(3 * 512 * 2048 / 2048 * size_of::<Tile<u16>>(), 1_671_168);
    }

    #[test]
    fn packed_weights_are_the_dequantized_ones() {
        for (rows, cols) in [(32, 64), (1, 64), (33, 128), (70, 192), (64, 2048)] {
            let Matrix::Nf4(matrix) = random_nf4(rows, cols, 7) else {
                unreachable!()
            };
            let expected = Matrix::Nf4(matrix.clone()).dequantize();
            for tile_row in 0..rows.div_ceil(TILE_ROWS) {
                let mut exact = vec![Tile::<f32>::zeroed(); cols / TILE_COLS];
                let mut int16 = vec![Tile::<u16>::zeroed(); cols / TILE_COLS];
                assert_eq!(pack_tile_row(&matrix, tile_row, &mut exact), 1.0);
                let unit = pack_tile_row(&matrix, tile_row, &mut int16);
                for (row, col) in (0..TILE_ROWS).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let global = tile_row * TILE_ROWS + row;
                    let expected = match global < rows {
                        true => expected[global * cols + col],
                        false => 0.0,
                    };
                    let (exact, int16) = (&exact[col / 64], &int16[col / 64]);
                    let weight = CODE_BOOK[code(exact, row, col % 64)];
                    assert_eq!(weight * exact.absmax[row], expected);
                    let weight = CODE_BOOK[code(int16, row, col % 64)];
                    let found = weight * f32::from(int16.absmax[row]) * unit;
                    assert!((found - expected).abs() <= unit * 0.51);
                }
            }
        }
    }

    #[test]
    fn blocks_that_cross_rows_have_no_tiles() {
        let Matrix::Nf4(matrix) = random_nf4(4, 96, 7) else {
            unreachable!()
        };
        assert_eq!(tile_count(&matrix), None);
    }
}
