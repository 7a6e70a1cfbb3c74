//! `y = W x` with W in NF4 and integer arithmetic: the default precision.
//!
//! Codes become 14-bit integers by table lookup, activations are 14 to 16-bit integers, products
//! of a block of 64 add up exactly in 32 bits, and then count `absmax * scale` in f32. Because
//! integers are exact and blocks are added in order, one token gives the same bits as many.

use super::activations::Int16Block;
use super::isa::dispatch;
use super::layout::{TILE_ROWS, TILES_AHEAD, Tile};
use super::simd::{Simd, lanes, lanes_mut};

/// The i16 pairs of one tile, `[pair][row]`.
type Words = [[i32; TILE_ROWS]; 32];

dispatch! {
    /// One tile row times some tokens: `c[i] = W x[tokens[i]]`.
    ///
    /// - `tiles`: `[cols / 64]`; `unit`: of their scales
    /// - `x`: `[cols / 64, x_tokens]`
    /// - `tokens`: `[n]`, each below `x_tokens`
    /// - `c`: `[n]` vectors of the 32 rows
    pub fn tile_row(
        tiles: &[Tile<u16>],
        unit: f32,
        x: &[Int16Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = tile_row_body
}

#[inline(always)]
fn tile_row_body<S: Simd>(
    s: S,
    tiles: &[Tile<u16>],
    unit: f32,
    x: &[Int16Block],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert_eq!(x.len(), tiles.len() * x_tokens);
    assert_eq!(c.len(), tokens.len());
    match tokens.len() {
        0 => {}
        1 => few::<S, 1>(s, tiles, x, x_tokens, tokens, c),
        2 => few::<S, 2>(s, tiles, x, x_tokens, tokens, c),
        n if n > S::MAX_TOKENS => many(s, tiles, x, x_tokens, tokens, c),
        3 => few::<S, 3>(s, tiles, x, x_tokens, tokens, c),
        4 => few::<S, 4>(s, tiles, x, x_tokens, tokens, c),
        5 => few::<S, 5>(s, tiles, x, x_tokens, tokens, c),
        6 => few::<S, 6>(s, tiles, x, x_tokens, tokens, c),
        7 => few::<S, 7>(s, tiles, x, x_tokens, tokens, c),
        8 => few::<S, 8>(s, tiles, x, x_tokens, tokens, c),
        9 => few::<S, 9>(s, tiles, x, x_tokens, tokens, c),
        10 => few::<S, 10>(s, tiles, x, x_tokens, tokens, c),
        11 => few::<S, 11>(s, tiles, x, x_tokens, tokens, c),
        _ => few::<S, 12>(s, tiles, x, x_tokens, tokens, c),
    }
    let unit = s.splat(unit);
    for v in lanes_mut(c.as_flattened_mut()) {
        s.store(s.mul(s.load(v), unit), v);
    }
}

/// As many tokens as registers: weights go from the table straight into the products.
#[inline(always)]
fn few<S: Simd, const N: usize>(
    s: S,
    tiles: &[Tile<u16>],
    x: &[Int16Block],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    if N > S::MAX_TOKENS.max(2) {
        unreachable!("more tokens than registers");
    }
    let table = s.word_table();
    let mut sums = [[s.splat(0.0); 2]; N];
    for (kb, tile) in tiles.iter().enumerate() {
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        let mut blocks = [&Int16Block::ZERO; N];
        s.prefetch((tile as *const Tile<u16>).wrapping_add(TILES_AHEAD));
        for (block, &token) in blocks.iter_mut().zip(tokens) {
            *block = &x[token as usize];
            if N > 1 {
                s.prefetch((*block as *const Int16Block).wrapping_add(x_tokens));
            }
        }
        // AVX2 has registers for the sums of 16 rows, AVX-512 for those of 32.
        let mut dots = [[s.splat_i32(0); N]; 2];
        if S::MAX_TOKENS > 2 {
            dots = dot_products::<S, N, 2>(s, table, tile, 0, &blocks);
        } else {
            dots[0] = dot_products::<S, N, 1>(s, table, tile, 0, &blocks)[0];
            dots[1] = dot_products::<S, N, 1>(s, table, tile, 1, &blocks)[0];
        }
        for half in 0..2 {
            let absmax = s.load_u16(&lanes(&tile.absmax)[half]);
            for i in 0..N {
                let scale = s.mul(absmax, s.splat(blocks[i].scale));
                sums[i][half] = s.mul_add(s.to_f32(dots[half][i]), scale, sums[i][half]);
            }
        }
    }
    for (c, sums) in c.iter_mut().zip(sums) {
        let c = lanes_mut(c);
        s.store(sums[0], &mut c[0]);
        s.store(sums[1], &mut c[1]);
    }
}

/// Products of `H` halves of a tile, 16 rows each, with one block of each token.
#[inline(always)]
fn dot_products<S: Simd, const N: usize, const H: usize>(
    s: S,
    table: S::WordTable,
    tile: &Tile<u16>,
    first_half: usize,
    blocks: &[&Int16Block; N],
) -> [[S::I32; N]; H] {
    let zero = s.splat_i32(0);
    let mut out = [[zero; N]; H];
    if N == 1 {
        // Two sets of sums for even and odd groups: VNNI adds with the latency of its multiplier.
        let mut sums = [[[zero; 2]; H]; 2];
        for (pair, groups) in tile.codes.chunks_exact(2).enumerate() {
            for odd in 0..2 {
                let x = &blocks[0].pairs.as_chunks().0[2 * pair + odd];
                for half in 0..H {
                    let codes = s.load_u32(&lanes(&groups[odd])[first_half + half]);
                    sums[odd][half] = s.add_products(table, sums[odd][half], codes, x);
                }
            }
        }
        for half in 0..H {
            let even = s.fold_products(sums[0][half]);
            out[half][0] = s.add_i32(even, s.fold_products(sums[1][half]));
        }
        return out;
    }
    for (group, codes) in tile.codes.iter().enumerate() {
        for half in 0..H {
            let codes = s.load_u32(&lanes(codes)[first_half + half]);
            let words = s.nf4_words(table, codes);
            for j in 0..4 {
                for i in 0..N {
                    let x = s.splat_i32(blocks[i].pairs[4 * group + j]);
                    out[half][i] = s.dot_pairs(out[half][i], words[j], x);
                }
            }
        }
    }
    out
}

/// Any number of tokens: a tile is looked up once and used for all of them.
#[inline(always)]
fn many<S: Simd>(
    s: S,
    tiles: &[Tile<u16>],
    x: &[Int16Block],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    let table = s.word_table();
    let mut words: Words = [[0; TILE_ROWS]; 32];
    c.fill([0.0; TILE_ROWS]);
    // Groups of nearly equal size: thirteen tokens are 7 + 6, not 12 + 1.
    let groups = tokens.len().div_ceil(S::MAX_TOKENS);
    let group_len = tokens.len().div_ceil(groups);
    for (kb, tile) in tiles.iter().enumerate() {
        look_up(s, table, &tile.codes, &mut words);
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        for (tokens, c) in tokens.chunks(group_len).zip(c.chunks_mut(group_len)) {
            let product = Product {
                words: &words,
                absmax: &tile.absmax,
                x,
                tokens,
            };
            match tokens.len() {
                1 => product.add_to::<S, 1>(s, c),
                2 => product.add_to::<S, 2>(s, c),
                3 => product.add_to::<S, 3>(s, c),
                4 => product.add_to::<S, 4>(s, c),
                5 => product.add_to::<S, 5>(s, c),
                6 => product.add_to::<S, 6>(s, c),
                7 => product.add_to::<S, 7>(s, c),
                8 => product.add_to::<S, 8>(s, c),
                9 => product.add_to::<S, 9>(s, c),
                10 => product.add_to::<S, 10>(s, c),
                11 => product.add_to::<S, 11>(s, c),
                _ => product.add_to::<S, 12>(s, c),
            }
        }
    }
}

#[inline(always)]
fn look_up<S: Simd>(s: S, table: S::WordTable, codes: &[[u32; TILE_ROWS]; 8], words: &mut Words) {
    for (group, codes) in codes.iter().enumerate() {
        for half in 0..2 {
            let looked_up = s.nf4_words(table, s.load_u32(&lanes(codes)[half]));
            for j in 0..4 {
                s.store_i32(
                    looked_up[j],
                    &mut lanes_mut(&mut words[4 * group + j])[half],
                );
            }
        }
    }
}

/// One tile, looked up, and some tokens.
struct Product<'a> {
    words: &'a Words,
    absmax: &'a [u16; TILE_ROWS],
    x: &'a [Int16Block],
    tokens: &'a [u32],
}

impl Product<'_> {
    /// Adds the products of `N` tokens to `c`.
    #[inline(always)]
    fn add_to<S: Simd, const N: usize>(&self, s: S, c: &mut [[f32; TILE_ROWS]]) {
        if N > S::MAX_TOKENS {
            unreachable!("groups have at most {} tokens", S::MAX_TOKENS);
        }
        let mut blocks = [&Int16Block::ZERO; N];
        for (block, &token) in blocks.iter_mut().zip(self.tokens) {
            *block = &self.x[token as usize];
        }
        let mut sums = [[s.splat_i32(0); 2]; N];
        for (p, words) in self.words.iter().enumerate() {
            let words = lanes(words);
            let (low, high) = (s.load_i32(&words[0]), s.load_i32(&words[1]));
            for i in 0..N {
                let x = s.splat_i32(blocks[i].pairs[p]);
                sums[i][0] = s.dot_pairs(sums[i][0], low, x);
                sums[i][1] = s.dot_pairs(sums[i][1], high, x);
            }
        }
        for half in 0..2 {
            let absmax = s.load_u16(&lanes(self.absmax)[half]);
            for (i, c) in c.iter_mut().enumerate().take(N) {
                let c = &mut lanes_mut(c)[half];
                let scale = s.mul(absmax, s.splat(blocks[i].scale));
                let sum = s.mul_add(s.to_f32(sums[i][half]), scale, s.load(c));
                s.store(sum, c);
            }
        }
    }
}
