//! `y = W x` with W in NF4 and exact f32 weights: `--cpu-precision f32`, routers, small matrices.
//!
//! Columns are added one after the other in tile order, so one token gives the same bits as many.

use super::activations::Block;
use super::isa::dispatch;
use super::layout::{TILE_COLS, TILE_ROWS, Tile, column};
use super::simd::{Simd, lanes, lanes_mut};

/// Weights of one tile in the order of its nibbles, `[8 * group + n][row]`.
type Weights = [[f32; TILE_ROWS]; TILE_COLS];

/// Column of each entry of [`Weights`].
const COLUMN: [u8; TILE_COLS] = {
    let mut columns = [0; TILE_COLS];
    let mut i = 0;
    while i < TILE_COLS {
        columns[i] = column(i / 32, i / 8 % 4, i % 8) as u8;
        i += 1;
    }
    columns
};

dispatch! {
    /// One tile row times some tokens: `c[i] = W x[tokens[i]]`.
    ///
    /// - `tiles`: `[cols / 64]`
    /// - `x`: `[cols / 64, x_tokens]`
    /// - `tokens`: `[n]`, each below `x_tokens`
    /// - `c`: `[n]` vectors of the 32 rows
    pub fn tile_row(
        tiles: &[Tile<f32>],
        x: &[Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = tile_row_body
}

/// Tokens at once: 12 accumulators hide the latency of two multipliers.
const MAX_TOKENS: usize = 6;

#[inline(always)]
fn tile_row_body<S: Simd>(
    s: S,
    tiles: &[Tile<f32>],
    x: &[Block],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert_eq!(x.len(), tiles.len() * x_tokens);
    assert_eq!(c.len(), tokens.len());
    let mut weights: Weights = [[0.0; TILE_ROWS]; TILE_COLS];
    c.fill([0.0; TILE_ROWS]);
    let group_len = S::MAX_TOKENS.min(MAX_TOKENS);
    for (kb, tile) in tiles.iter().enumerate() {
        dequantize(s, tile, &mut weights);
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        for (tokens, c) in tokens.chunks(group_len).zip(c.chunks_mut(group_len)) {
            match tokens.len() {
                1 => add_product::<S, 1>(s, &weights, x, tokens, c),
                2 => add_product::<S, 2>(s, &weights, x, tokens, c),
                3 => add_product::<S, 3>(s, &weights, x, tokens, c),
                4 => add_product::<S, 4>(s, &weights, x, tokens, c),
                5 => add_product::<S, 5>(s, &weights, x, tokens, c),
                _ => add_product::<S, MAX_TOKENS>(s, &weights, x, tokens, c),
            }
        }
    }
}

/// The weights exactly as the file defines them: one rounding of code times scale.
#[inline(always)]
fn dequantize<S: Simd>(s: S, tile: &Tile<f32>, weights: &mut Weights) {
    let table = s.f32_table();
    for half in 0..2 {
        let absmax = s.load(&lanes(&tile.absmax)[half]);
        for (group, codes) in tile.codes.iter().enumerate() {
            let mut codes = s.load_u32(&lanes(codes)[half]);
            for n in 0..8 {
                let weight = s.mul(s.nf4_f32(table, codes), absmax);
                s.store(weight, &mut lanes_mut(&mut weights[8 * group + n])[half]);
                codes = s.shr::<4>(codes);
            }
        }
    }
}

#[inline(always)]
fn add_product<S: Simd, const N: usize>(
    s: S,
    weights: &Weights,
    x: &[Block],
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    if N > S::MAX_TOKENS {
        unreachable!("groups have at most {} tokens", S::MAX_TOKENS);
    }
    let mut blocks = [&[0.0; TILE_COLS]; N];
    let mut sums = [[s.splat(0.0); 2]; N];
    for i in 0..N {
        blocks[i] = &x[tokens[i] as usize];
        let c = lanes(&c[i]);
        sums[i] = [s.load(&c[0]), s.load(&c[1])];
    }
    for (weights, column) in weights.iter().zip(COLUMN) {
        let weights = lanes(weights);
        let (low, high) = (s.load(&weights[0]), s.load(&weights[1]));
        for i in 0..N {
            let x = s.splat(blocks[i][column as usize % TILE_COLS]);
            sums[i][0] = s.mul_add(low, x, sums[i][0]);
            sums[i][1] = s.mul_add(high, x, sums[i][1]);
        }
    }
    for i in 0..N {
        let c = lanes_mut(&mut c[i]);
        s.store(sums[i][0], &mut c[0]);
        s.store(sums[i][1], &mut c[1]);
    }
}
