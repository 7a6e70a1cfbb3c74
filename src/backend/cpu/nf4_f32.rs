//! `y = W x` with W in NF4 and exact f32 weights: `--cpu-precision f32`, routers, small matrices.
//!
//! Code book entries times activations add up in four sums per block, which count `absmax`; the
//! order is the same for one token as for many, and so are the bits.

use super::activations::Block;
use super::isa::dispatch;
use super::layout::{TILE_COLS, TILE_ROWS, TILES_AHEAD, Tile, column};
use super::simd::{Simd, lanes, lanes_mut};

/// Code book entries of one tile in the order of its nibbles, `[8 * group + n][row]`.
type Weights = [[f32; TILE_ROWS]; TILE_COLS];

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

/// Tokens at once: with two sums per row, 24 accumulators.
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
    let table = s.f32_table();
    let mut weights: Weights = [[0.0; TILE_ROWS]; TILE_COLS];
    c.fill([0.0; TILE_ROWS]);
    let group_len = S::MAX_TOKENS.min(MAX_TOKENS);
    for (kb, tile) in tiles.iter().enumerate() {
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        s.prefetch((tile as *const Tile<f32>).wrapping_add(TILES_AHEAD));
        if let [token] = *tokens {
            for half in 0..2 {
                let codes = Codes { s, table, tile };
                add_products(s, &codes, half, &tile.absmax, [&x[token as usize]], c);
            }
            continue;
        }
        look_up(s, table, tile, &mut weights);
        for (tokens, c) in tokens.chunks(group_len).zip(c.chunks_mut(group_len)) {
            for half in 0..2 {
                let (w, absmax) = (&weights, &tile.absmax);
                let x = |i: usize| &x[tokens[i] as usize];
                match tokens.len() {
                    1 => add_products(s, w, half, absmax, [x(0)], c),
                    2 => add_products(s, w, half, absmax, [0, 1].map(x), c),
                    3 => add_products(s, w, half, absmax, [0, 1, 2].map(x), c),
                    4 => add_products(s, w, half, absmax, [0, 1, 2, 3].map(x), c),
                    5 => add_products(s, w, half, absmax, [0, 1, 2, 3, 4].map(x), c),
                    _ => add_products(s, w, half, absmax, [0, 1, 2, 3, 4, 5].map(x), c),
                }
            }
        }
    }
}

/// The eight vectors of code book entries in half of a group.
trait Source<S: Simd> {
    fn group(&self, s: S, group: usize, half: usize) -> [S::F32; 8];
}

/// Looks codes up as they are needed.
struct Codes<'a, S: Simd> {
    s: S,
    table: S::F32Table,
    tile: &'a Tile<f32>,
}

impl<S: Simd> Source<S> for Codes<'_, S> {
    #[inline(always)]
    fn group(&self, s: S, group: usize, half: usize) -> [S::F32; 8] {
        let mut codes = s.load_u32(&lanes(&self.tile.codes[group])[half]);
        let mut out = [s.splat(0.0); 8];
        for weight in &mut out {
            *weight = self.s.nf4_f32(self.table, codes);
            codes = s.shr::<4>(codes);
        }
        out
    }
}

impl<S: Simd> Source<S> for Weights {
    #[inline(always)]
    fn group(&self, s: S, group: usize, half: usize) -> [S::F32; 8] {
        let mut out = [s.splat(0.0); 8];
        for n in 0..8 {
            out[n] = s.load(&lanes(&self[8 * group + n])[half]);
        }
        out
    }
}

/// The code book entries of one tile, for more tokens than one.
#[inline(always)]
fn look_up<S: Simd>(s: S, table: S::F32Table, tile: &Tile<f32>, weights: &mut Weights) {
    let codes = Codes { s, table, tile };
    for group in 0..8 {
        for half in 0..2 {
            for (n, weight) in codes.group(s, group, half).into_iter().enumerate() {
                s.store(weight, &mut lanes_mut(&mut weights[8 * group + n])[half]);
            }
        }
    }
}

/// Adds the products of 16 rows and `N` tokens to `c`: four sums in turn, then times absmax.
#[inline(always)]
fn add_products<S: Simd, W: Source<S>, const N: usize>(
    s: S,
    weights: &W,
    half: usize,
    absmax: &[f32; TILE_ROWS],
    blocks: [&Block; N],
    c: &mut [[f32; TILE_ROWS]],
) {
    if N > S::MAX_TOKENS {
        unreachable!("groups have at most {} tokens", S::MAX_TOKENS);
    }
    let mut sums = [[s.splat(0.0); 4]; N];
    for group in 0..8 {
        let weights = weights.group(s, group, half);
        for n in 0..8 {
            let column = column(group / 4, group % 4, n);
            for i in 0..N {
                let x = s.splat(blocks[i][column]);
                sums[i][n % 4] = s.mul_add(weights[n], x, sums[i][n % 4]);
            }
        }
    }
    let absmax = s.load(&lanes(absmax)[half]);
    for (c, [a, b, d, e]) in c.iter_mut().zip(sums) {
        let sum = s.add(s.add(a, b), s.add(d, e));
        let c = &mut lanes_mut(c)[half];
        s.store(s.mul_add(sum, absmax, s.load(c)), c);
    }
}
