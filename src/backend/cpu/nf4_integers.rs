//! `y = W x` with W in NF4 and integer arithmetic: the default precision, and int8.
//!
//! Codes become integers by table lookup, activations are integers too, products of a block of 64
//! add up exactly in 32 bits, and then count `absmax * scale` in f32. Because integers are exact and
//! blocks are added in order, one token gives the same bits as many.
//!
//! Wide activations have two terms: 16-bit products with what is left of 11 bits after 16-bit
//! weights took theirs, and 8-bit products with the remainders. Rounding activations to 14 bits
//! once is the largest error of the other kernel; a second 16-bit product would cost twice as much.

use super::activations::{Int8Block, Int16Block, WideBlock};
use super::isa::dispatch;
use super::layout::{TILE_ROWS, TILES_AHEAD, Tile};
use super::simd::{CODE_BOOK_INT16, CODE_BOOK_WIDE, Simd, lanes, lanes_mut};

/// One tile, looked up: i16 pairs `[pair][row]`, then quads of bytes `[quad][row]`.
type Words = [[i32; TILE_ROWS]; 32];
type Quads = [[i32; TILE_ROWS]; 16];

dispatch! {
    /// One tile row times some tokens: `c[i] = W x[tokens[i]]`.
    ///
    /// - `tiles`: `[cols / 64]`; `unit`: of their scales
    /// - `x`: `[cols / 64, x_tokens]`
    /// - `tokens`: `[n]`, each below `x_tokens`
    /// - `c`: `[n]` vectors of the 32 rows
    pub fn tile_row_int16(
        tiles: &[Tile<u16>],
        unit: f32,
        x: &[Int16Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = tile_row_body
}

dispatch! {
    /// [`tile_row_int16`] with activations in two terms.
    pub fn tile_row_wide(
        tiles: &[Tile<u16>],
        unit: f32,
        x: &[WideBlock],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = tile_row_body
}

dispatch! {
    /// [`tile_row_int16`] with 8-bit weights and activations.
    pub fn tile_row_int8(
        tiles: &[Tile<u16>],
        unit: f32,
        x: &[Int8Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = tile_row_body
}

/// Activations of one token: 16-bit, 8-bit, or one of each, whose products add up.
pub trait Terms {
    /// Code book of the 16-bit term, if there is one
    const WORDS: Option<&'static [i16; 16]>;
    /// Whether there is an 8-bit term
    const BYTES: bool;

    fn words(&self) -> &Int16Block;
    fn bytes(&self) -> &Int8Block;
}

impl Terms for Int16Block {
    const WORDS: Option<&'static [i16; 16]> = Some(&CODE_BOOK_INT16);
    const BYTES: bool = false;

    #[inline(always)]
    fn words(&self) -> &Int16Block {
        self
    }
    fn bytes(&self) -> &Int8Block {
        unreachable!("has 16 bits")
    }
}

impl Terms for Int8Block {
    const WORDS: Option<&'static [i16; 16]> = None;
    const BYTES: bool = true;

    fn words(&self) -> &Int16Block {
        unreachable!("has 8 bits")
    }
    #[inline(always)]
    fn bytes(&self) -> &Int8Block {
        self
    }
}

impl Terms for WideBlock {
    const WORDS: Option<&'static [i16; 16]> = Some(&CODE_BOOK_WIDE);
    const BYTES: bool = true;

    #[inline(always)]
    fn words(&self) -> &Int16Block {
        &self.coarse
    }
    #[inline(always)]
    fn bytes(&self) -> &Int8Block {
        &self.rest
    }
}

#[inline(always)]
fn tile_row_body<S: Simd, X: Terms>(
    s: S,
    tiles: &[Tile<u16>],
    unit: f32,
    x: &[X],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert_eq!(x.len(), tiles.len() * x_tokens);
    assert_eq!(c.len(), tokens.len());
    match tokens.len() {
        0 => {}
        1 => few::<S, X, 1>(s, tiles, x, x_tokens, tokens, c),
        2 => few::<S, X, 2>(s, tiles, x, x_tokens, tokens, c),
        // Where registers hold two tokens, reading the tiles twice costs less than storing what was
        // looked up.
        3 | 4 if S::MAX_TOKENS <= 2 => {
            let (two, rest) = c.split_at_mut(2);
            few::<S, X, 2>(s, tiles, x, x_tokens, &tokens[..2], two);
            match rest.len() {
                1 => few::<S, X, 1>(s, tiles, x, x_tokens, &tokens[2..], rest),
                _ => few::<S, X, 2>(s, tiles, x, x_tokens, &tokens[2..], rest),
            }
        }
        // Two terms want more registers than there are.
        n if n > S::MAX_TOKENS || (n > 6 && X::BYTES && X::WORDS.is_some()) => {
            many(s, tiles, x, x_tokens, tokens, c)
        }
        3 => few::<S, X, 3>(s, tiles, x, x_tokens, tokens, c),
        4 => few::<S, X, 4>(s, tiles, x, x_tokens, tokens, c),
        5 => few::<S, X, 5>(s, tiles, x, x_tokens, tokens, c),
        6 => few::<S, X, 6>(s, tiles, x, x_tokens, tokens, c),
        7 => few::<S, X, 7>(s, tiles, x, x_tokens, tokens, c),
        8 => few::<S, X, 8>(s, tiles, x, x_tokens, tokens, c),
        9 => few::<S, X, 9>(s, tiles, x, x_tokens, tokens, c),
        10 => few::<S, X, 10>(s, tiles, x, x_tokens, tokens, c),
        11 => few::<S, X, 11>(s, tiles, x, x_tokens, tokens, c),
        _ => few::<S, X, 12>(s, tiles, x, x_tokens, tokens, c),
    }
    let unit = s.splat(unit);
    for v in lanes_mut(c.as_flattened_mut()) {
        s.store(s.mul(s.load(v), unit), v);
    }
}

/// The lookup tables of both terms.
struct Tables<S: Simd> {
    words: S::WordTable,
    bytes: S::ByteTable,
}

impl<S: Simd> Tables<S> {
    #[inline(always)]
    fn of<X: Terms>(s: S) -> Self {
        Tables {
            words: s.word_table(X::WORDS.unwrap_or(&CODE_BOOK_INT16)),
            bytes: s.byte_table(),
        }
    }
}

/// As many tokens as registers: weights go from the table straight into the products.
#[inline(always)]
fn few<S: Simd, X: Terms, const N: usize>(
    s: S,
    tiles: &[Tile<u16>],
    x: &[X],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    if N > S::MAX_TOKENS.max(2) {
        unreachable!("more tokens than registers");
    }
    let tables = Tables::<S>::of::<X>(s);
    let mut sums = [[s.splat(0.0); 2]; N];
    for (kb, tile) in tiles.iter().enumerate() {
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        let mut blocks = [&x[tokens[0] as usize]; N];
        s.prefetch((tile as *const Tile<u16>).wrapping_add(TILES_AHEAD));
        for (block, &token) in blocks.iter_mut().zip(tokens) {
            *block = &x[token as usize];
            if N > 1 {
                s.prefetch((*block as *const X).wrapping_add(x_tokens));
            }
        }
        if X::WORDS.is_some() {
            let blocks = blocks.map(X::words);
            let pairs = blocks.map(|block| &block.pairs);
            // AVX2 has registers for the sums of 16 rows, AVX-512 for those of 32.
            let mut dots = [[s.splat_i32(0); N]; 2];
            if S::MAX_TOKENS > 2 {
                dots = s.dot_words::<N, 2>(tables.words, &tile.codes, 0, pairs);
            } else {
                dots[0] = s.dot_words::<N, 1>(tables.words, &tile.codes, 0, pairs)[0];
                dots[1] = s.dot_words::<N, 1>(tables.words, &tile.codes, 1, pairs)[0];
            }
            add_scaled(s, &mut sums, dots, tile, blocks.map(|b| b.scale));
        }
        if X::BYTES {
            let blocks = blocks.map(X::bytes);
            let mut dots = [[s.splat_i32(0); N]; 2];
            if S::MAX_TOKENS > 2 {
                dots = dot_bytes::<S, N, 2>(s, tables.bytes, tile, 0, &blocks);
            } else {
                dots[0] = dot_bytes::<S, N, 1>(s, tables.bytes, tile, 0, &blocks)[0];
                dots[1] = dot_bytes::<S, N, 1>(s, tables.bytes, tile, 1, &blocks)[0];
            }
            add_scaled(s, &mut sums, dots, tile, blocks.map(|b| b.scale));
        }
    }
    for (c, sums) in c.iter_mut().zip(sums) {
        let c = lanes_mut(c);
        s.store(sums[0], &mut c[0]);
        s.store(sums[1], &mut c[1]);
    }
}

/// `sums += dots * absmax * scales`
#[inline(always)]
fn add_scaled<S: Simd, const N: usize>(
    s: S,
    sums: &mut [[S::F32; 2]; N],
    dots: [[S::I32; N]; 2],
    tile: &Tile<u16>,
    scales: [f32; N],
) {
    for half in 0..2 {
        let absmax = s.load_u16(&lanes(&tile.absmax)[half]);
        for i in 0..N {
            let scale = s.mul(absmax, s.splat(scales[i]));
            sums[i][half] = s.mul_add(s.to_f32(dots[half][i]), scale, sums[i][half]);
        }
    }
}

/// Products of bytes of `H` halves of a tile, 16 rows each, with one block of each token.
#[inline(always)]
fn dot_bytes<S: Simd, const N: usize, const H: usize>(
    s: S,
    table: S::ByteTable,
    tile: &Tile<u16>,
    first_half: usize,
    blocks: &[&Int8Block; N],
) -> [[S::I32; N]; H] {
    let mut out = [[s.splat_i32(0); N]; H];
    for half in 0..H {
        for i in 0..N {
            out[half][i] = s.byte_start(blocks[i].offset);
        }
    }
    // A second set for the odd codes: VNNI adds with the latency of its multiplier.
    let mut odd_sums = [[s.splat_i32(0); N]; H];
    for (group, codes) in tile.codes.iter().enumerate() {
        for half in 0..H {
            let codes = s.load_u32(&lanes(codes)[first_half + half]);
            let [even, odd] = s.nf4_bytes(table, codes);
            for i in 0..N {
                let quads = &blocks[i].quads;
                let (x, odd_x) = (quads[2 * group], quads[2 * group + 1]);
                out[half][i] = s.dot_bytes(out[half][i], even, s.splat_i32(x));
                if N == 1 {
                    odd_sums[half][i] = s.dot_bytes(odd_sums[half][i], odd, s.splat_i32(odd_x));
                } else {
                    out[half][i] = s.dot_bytes(out[half][i], odd, s.splat_i32(odd_x));
                }
            }
        }
    }
    if N == 1 {
        for half in 0..H {
            out[half][0] = s.add_i32(out[half][0], odd_sums[half][0]);
        }
    }
    out
}

/// Any number of tokens: a tile is looked up once and used for all of them.
#[inline(always)]
fn many<S: Simd, X: Terms>(
    s: S,
    tiles: &[Tile<u16>],
    x: &[X],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    let tables = Tables::<S>::of::<X>(s);
    let mut words: Words = [[0; TILE_ROWS]; 32];
    let mut quads: Quads = [[0; TILE_ROWS]; 16];
    c.fill([0.0; TILE_ROWS]);
    // Groups of nearly equal size: thirteen tokens are 7 + 6, not 12 + 1.
    let groups = tokens.len().div_ceil(S::MAX_TOKENS);
    let group_len = tokens.len().div_ceil(groups);
    for (kb, tile) in tiles.iter().enumerate() {
        s.prefetch((tile as *const Tile<u16>).wrapping_add(TILES_AHEAD));
        if X::WORDS.is_some() {
            look_up_words(s, tables.words, &tile.codes, &mut words);
        }
        if X::BYTES {
            look_up_bytes(s, tables.bytes, &tile.codes, &mut quads);
        }
        let product = Product {
            words: &words,
            quads: &quads,
            absmax: &tile.absmax,
            x: &x[kb * x_tokens..(kb + 1) * x_tokens],
        };
        for (tokens, c) in tokens.chunks(group_len).zip(c.chunks_mut(group_len)) {
            match tokens.len() {
                1 => product.add_to::<S, 1>(s, tokens, c),
                2 => product.add_to::<S, 2>(s, tokens, c),
                3 => product.add_to::<S, 3>(s, tokens, c),
                4 => product.add_to::<S, 4>(s, tokens, c),
                5 => product.add_to::<S, 5>(s, tokens, c),
                6 => product.add_to::<S, 6>(s, tokens, c),
                7 => product.add_to::<S, 7>(s, tokens, c),
                8 => product.add_to::<S, 8>(s, tokens, c),
                9 => product.add_to::<S, 9>(s, tokens, c),
                10 => product.add_to::<S, 10>(s, tokens, c),
                11 => product.add_to::<S, 11>(s, tokens, c),
                _ => product.add_to::<S, 12>(s, tokens, c),
            }
        }
    }
}

#[inline(always)]
fn look_up_words<S: Simd>(
    s: S,
    table: S::WordTable,
    codes: &[[u32; TILE_ROWS]; 8],
    words: &mut Words,
) {
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

#[inline(always)]
fn look_up_bytes<S: Simd>(
    s: S,
    table: S::ByteTable,
    codes: &[[u32; TILE_ROWS]; 8],
    quads: &mut Quads,
) {
    for (group, codes) in codes.iter().enumerate() {
        for half in 0..2 {
            let looked_up = s.nf4_bytes(table, s.load_u32(&lanes(codes)[half]));
            for odd in 0..2 {
                s.store_i32(
                    looked_up[odd],
                    &mut lanes_mut(&mut quads[2 * group + odd])[half],
                );
            }
        }
    }
}

/// One tile, looked up, and the activations of its columns.
struct Product<'a, X> {
    words: &'a Words,
    quads: &'a Quads,
    absmax: &'a [u16; TILE_ROWS],
    x: &'a [X],
}

impl<X: Terms> Product<'_, X> {
    /// Adds the products of `N` tokens to `c`.
    #[inline(always)]
    fn add_to<S: Simd, const N: usize>(&self, s: S, tokens: &[u32], c: &mut [[f32; TILE_ROWS]]) {
        if N > S::MAX_TOKENS {
            unreachable!("groups have at most {} tokens", S::MAX_TOKENS);
        }
        let mut blocks = [&self.x[tokens[0] as usize]; N];
        for (block, &token) in blocks.iter_mut().zip(tokens) {
            *block = &self.x[token as usize];
        }
        if X::WORDS.is_some() {
            let blocks = blocks.map(X::words);
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
            self.add_scaled(s, sums, blocks.map(|b| b.scale), c);
        }
        if X::BYTES {
            let blocks = blocks.map(X::bytes);
            let mut sums = [[s.splat_i32(0); 2]; N];
            for i in 0..N {
                sums[i] = [s.byte_start(blocks[i].offset); 2];
            }
            for (q, quads) in self.quads.iter().enumerate() {
                let quads = lanes(quads);
                let (low, high) = (s.load_i32(&quads[0]), s.load_i32(&quads[1]));
                for i in 0..N {
                    let x = s.splat_i32(blocks[i].quads[q]);
                    sums[i][0] = s.dot_bytes(sums[i][0], low, x);
                    sums[i][1] = s.dot_bytes(sums[i][1], high, x);
                }
            }
            self.add_scaled(s, sums, blocks.map(|b| b.scale), c);
        }
    }

    /// `c += sums * absmax * scales`
    #[inline(always)]
    fn add_scaled<S: Simd, const N: usize>(
        &self,
        s: S,
        sums: [[S::I32; 2]; N],
        scales: [f32; N],
        c: &mut [[f32; TILE_ROWS]],
    ) {
        for half in 0..2 {
            let absmax = s.load_u16(&lanes(self.absmax)[half]);
            for (i, c) in c.iter_mut().enumerate().take(N) {
                let c = &mut lanes_mut(c)[half];
                let scale = s.mul(absmax, s.splat(scales[i]));
                let sum = s.mul_add(s.to_f32(sums[i][half]), scale, s.load(c));
                s.store(sum, c);
            }
        }
    }
}
