//! NF4 times many tokens on the tile registers of Intel CPUs from Sapphire Rapids on (AMX).
//!
//! The sums over a block of 64 columns are integers, exact here as in
//! [`nf4_integers`](super::nf4_integers), and count `absmax * scale` in the same order: results are
//! the same bits. Tiles multiply bytes, so numbers of 16 bits go as `256 high + low`, high bytes
//! signed, low ones not:
//!
//! ```text
//! w x = 65536 w.high x.high + 256 (w.high x.low + w.low x.high) + w.low x.low
//! ```
//!
//! which are four products in three sums of 32 bits. Shifted and added, these wrap to the sum that
//! fits in 32 bits.
//!
//! One product is 16 tokens x 16 rows x 64 columns: the first factor has a token in each row of its
//! tile, the second has four columns of 16 weight rows in each, as a lookup of codes leaves them.
//! Columns go in the order of the codes, even nibbles of a group before odd ones.
//!
//! An estimate, from Intel's tables and not measured, in cycles for 16 tokens x one tile, which is
//! two products: 16 for a product of bytes, 1 for a store of 64 bytes, 1/2 for any other vector
//! instruction, VNNI included.
//!
//! ```text
//!         tile products   stores   vector instructions   kernel with VNNI   faster, at most
//! int8         32           80             50                  300                3.8
//! int16       128          160            145                  560                3.5
//! wide        160          210            190                  860                4.1
//! ```
//!
//! The first three columns overlap as far as work does not wait for other work, which is what the
//! order below is for: vectors add up sums while tiles multiply, and what a tile loads was stored a
//! product earlier, so that it has left the store buffer. Tiles of bf16, the other kind, would take
//! two products in place of four, but their sums are f32, rounded in an order of their own.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::marker::PhantomData;

use super::isa::{Amx, Avx512};
use super::layout::{TILE_ROWS, TILES_AHEAD, Tile};
use super::nf4_integers::Terms;
use super::simd::{CODE_BOOK_INT8, LANES, Simd, lanes, lanes_mut};

/// From how many tokens on tiles should be faster than VNNI: an estimate like the above.
pub const MIN_TOKENS: usize = 8;

/// Tokens of one product, at most.
const TOKENS: usize = 16;

/// What one tile register holds: 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Square([[i32; LANES]; 16]);

const ZERO: Square = Square([[0; LANES]; 16]);

/// One tile looked up, quads of bytes `[half][quad][row]`.
struct Weights {
    high: [Square; 2],
    low: [Square; 2],
    bytes: [Square; 2],
}

/// One block of up to 16 tokens, quads of bytes `[token][quad]`.
struct Staged {
    high: Square,
    low: Square,
    bytes: Square,
    word_scales: [f32; TOKENS],
    byte_scales: [f32; TOKENS],
}

/// Sums of one product, `[token][row]`.
struct Sums {
    high: Square,
    mixed: Square,
    low: Square,
    bytes: Square,
}

/// Two of each: one is written while the other is read.
struct Scratch {
    weights: [Weights; 2],
    staged: [Staged; 2],
    sums: [Sums; 2],
}

impl Scratch {
    const ZERO: Scratch = Scratch {
        weights: [const {
            Weights {
                high: [ZERO; 2],
                low: [ZERO; 2],
                bytes: [ZERO; 2],
            }
        }; 2],
        staged: [const {
            Staged {
                high: ZERO,
                low: ZERO,
                bytes: ZERO,
                word_scales: [0.0; TOKENS],
                byte_scales: [0.0; TOKENS],
            }
        }; 2],
        sums: [const {
            Sums {
                high: ZERO,
                mixed: ZERO,
                low: ZERO,
                bytes: ZERO,
            }
        }; 2],
    };
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch::ZERO));
}

/// [`nf4_integers::tile_row`](super::nf4_integers::tile_row) on tiles.
pub fn tile_row<X: Terms>(
    amx: Amx,
    tiles: &[Tile<u16>],
    unit: f32,
    x: &[X],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert_eq!(x.len(), tiles.len() * x_tokens);
    assert_eq!(c.len(), tokens.len());
    c.fill([0.0; TILE_ROWS]);
    if c.is_empty() || tiles.is_empty() {
        return;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: an `Amx` holds an `Avx512`, which exists only where these features were seen.
        unsafe { add_tile_row(amx, tiles, x, x_tokens, tokens, c, scratch) };
        // SAFETY: as above.
        unsafe { scale(amx.avx512(), unit, c) };
    });
}

/// `c *= unit`
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn scale(s: Avx512, unit: f32, c: &mut [[f32; TILE_ROWS]]) {
    for v in lanes_mut(c.as_flattened_mut()) {
        s.store(s.mul(s.load(v), s.splat(unit)), v);
    }
}

/// Adds the products of all tiles to `c`, one block of up to 16 tokens after the other.
///
/// A block has two products, one for each half of the tile's rows. After each was given to the tile
/// registers, vectors do what does not depend on it: add up the sums of the product before, and
/// prepare the next block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn add_tile_row<X: Terms>(
    amx: Amx,
    tiles: &[Tile<u16>],
    x: &[X],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
    scratch: &mut Scratch,
) {
    let s = amx.avx512();
    // Groups of nearly equal size: seventeen tokens are 9 + 8, not 16 + 1. Rows of the tiles that
    // the last group has no tokens for compute with what was there, and nobody looks.
    let group_len = tokens.len().div_ceil(tokens.len().div_ceil(TOKENS));
    let groups = tokens.len().div_ceil(group_len);
    let steps = tiles.len() * groups;
    let at = |step: usize| {
        let (kb, first) = (step / groups, step % groups * group_len);
        (kb, first..tokens.len().min(first + group_len))
    };

    let Scratch {
        weights,
        staged,
        sums: [first_sums, second_sums],
    } = scratch;
    let registers = Registers::configure(amx, group_len);
    look_up::<X>(s, &tiles[0], &mut weights[0]);
    stage(s, &x[..x_tokens], &tokens[..group_len], &mut staged[0]);
    let mut before = None;
    for step in 0..steps {
        let ((kb, range), now) = (at(step), step % 2);
        registers.multiply::<X>(&staged[now], &weights[kb % 2], 0, first_sums);
        if let Some((kb, range)) = before {
            second_sums.add_to::<X>(s, &tiles[kb], 1, &staged[1 - now], &mut c[range]);
        }
        if step + 1 < steps {
            let (next_kb, range) = at(step + 1);
            if next_kb != kb {
                look_up::<X>(s, &tiles[next_kb], &mut weights[next_kb % 2]);
            }
            let x = &x[next_kb * x_tokens..(next_kb + 1) * x_tokens];
            stage(s, x, &tokens[range], &mut staged[1 - now]);
        }
        registers.multiply::<X>(&staged[now], &weights[kb % 2], 1, second_sums);
        first_sums.add_to::<X>(s, &tiles[kb], 0, &staged[now], &mut c[range.clone()]);
        before = Some((kb, range));
    }
    if let Some((kb, range)) = before {
        second_sums.add_to::<X>(s, &tiles[kb], 1, &staged[(steps - 1) % 2], &mut c[range]);
    }
}

/// A code book of bytes, four times.
type Book = [i32; LANES];

const BYTE_BOOK: Book = {
    let (mut words, mut i) = ([0; 16], 0);
    while i < 16 {
        words[i] = CODE_BOOK_INT8[i] as i16;
        i += 1;
    }
    book(&words, 0)
};

/// Bits `shift..shift + 8` of each word.
const fn book(words: &[i16; 16], shift: u32) -> Book {
    let (mut out, mut i) = ([0; LANES], 0);
    while i < 64 {
        let byte = (words[i % 16] >> shift) as u8;
        out[i / 4] |= (byte as i32) << (i % 4 * 8);
        i += 1;
    }
    out
}

/// The books of high and of low bytes.
const fn word_books(words: Option<&[i16; 16]>) -> [Book; 2] {
    match words {
        Some(words) => [book(words, 8), book(words, 0)],
        None => [[0; LANES]; 2],
    }
}

/// All weights of a tile.
#[target_feature(enable = "avx512f,avx512bw")]
fn look_up<X: Terms>(s: Avx512, tile: &Tile<u16>, out: &mut Weights) {
    s.prefetch((tile as *const Tile<u16>).wrapping_add(TILES_AHEAD));
    // Not kept for all tiles: a struct of these vectors lost its alignment on the stack (LLVM 22
    // merged it with an array of i32), which ended in a fault.
    let [high, low, bytes] = const {
        let [high, low] = word_books(X::WORDS);
        [high, low, BYTE_BOOK]
    };
    let [high, low, bytes] = [s.load_i32(&high), s.load_i32(&low), s.load_i32(&bytes)];
    let nibbles = _mm512_set1_epi8(15);
    for (group, codes) in tile.codes.iter().enumerate() {
        for half in 0..2 {
            let codes = s.load_u32(&lanes(codes)[half]);
            let even = _mm512_and_si512(codes, nibbles);
            let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibbles);
            let put = |table, out: &mut [Square; 2]| {
                let quads = &mut out[half].0;
                s.store_i32(_mm512_shuffle_epi8(table, even), &mut quads[2 * group]);
                s.store_i32(_mm512_shuffle_epi8(table, odd), &mut quads[2 * group + 1]);
            };
            if X::WORDS.is_some() {
                put(high, &mut out.high);
                put(low, &mut out.low);
            }
            if X::BYTES {
                put(bytes, &mut out.bytes);
            }
        }
    }
}

/// Copies one block of `tokens` to where tiles can load it, `x` being that block of all tokens.
#[target_feature(enable = "avx512f,avx512bw")]
fn stage<X: Terms>(s: Avx512, x: &[X], tokens: &[u32], out: &mut Staged) {
    // Of each group's four pairs, the high bytes of even nibbles and of odd ones, then the low bytes.
    let split = _mm512_broadcast_i32x4(_mm_setr_epi8(
        1, 5, 3, 7, 9, 13, 11, 15, 0, 4, 2, 6, 8, 12, 10, 14,
    ));
    let high_quads = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    let low_quads = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    for (i, &token) in tokens.iter().enumerate() {
        let x = &x[token as usize];
        if X::WORDS.is_some() {
            let block = x.words();
            let pairs = lanes(&block.pairs);
            let a = _mm512_shuffle_epi8(s.load_i32(&pairs[0]), split);
            let b = _mm512_shuffle_epi8(s.load_i32(&pairs[1]), split);
            let high = _mm512_permutex2var_epi64(a, high_quads, b);
            s.store_i32(high, &mut out.high.0[i]);
            let low = _mm512_permutex2var_epi64(a, low_quads, b);
            s.store_i32(low, &mut out.low.0[i]);
            out.word_scales[i] = block.scale;
        }
        if X::BYTES {
            let block = x.bytes();
            s.store_i32(s.load_i32(&block.quads), &mut out.bytes.0[i]);
            out.byte_scales[i] = block.scale;
        }
    }
}

impl Sums {
    /// `c += sums * absmax * scales`, for the rows of `half`
    #[target_feature(enable = "avx512f")]
    fn add_to<X: Terms>(
        &self,
        s: Avx512,
        tile: &Tile<u16>,
        half: usize,
        x: &Staged,
        c: &mut [[f32; TILE_ROWS]],
    ) {
        let absmax = s.load_u16(&lanes(&tile.absmax)[half]);
        for i in 0..c.len().min(TOKENS) {
            let c = &mut lanes_mut(&mut c[i])[half];
            let mut total = s.load(c);
            if X::WORDS.is_some() {
                let [high, mixed, low] =
                    [&self.high, &self.mixed, &self.low].map(|sums| s.load_i32(&sums.0[i]));
                let high = s.add_i32(_mm512_slli_epi32::<8>(high), mixed);
                let sum = s.add_i32(_mm512_slli_epi32::<8>(high), low);
                let scale = s.mul(absmax, s.splat(x.word_scales[i]));
                total = s.mul_add(s.to_f32(sum), scale, total);
            }
            if X::BYTES {
                let sum = s.load_i32(&self.bytes.0[i]);
                let scale = s.mul(absmax, s.splat(x.byte_scales[i]));
                total = s.mul_add(s.to_f32(sum), scale, total);
            }
            s.store(total, c);
        }
    }
}

/// The tile registers of this thread, in use: 0 to 2 are sums, 3 and 4 tokens, 5 and 6 weights.
///
/// Between the pieces of assembly only their shapes stay, which are nothing the compiler knows of;
/// each piece loads what it multiplies and stores what comes out.
struct Registers {
    _of_this_thread: PhantomData<*const ()>,
}

/// Operand of `ldtilecfg`. Source: Intel SDM volume 1, section 18.2
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Registers {
    /// `tokens` is how many rows the tiles of tokens and sums have, at most 16.
    fn configure(_: Amx, tokens: usize) -> Registers {
        assert!((1..=TOKENS).contains(&tokens));
        let mut config = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..7].fill(64);
        config.rows[..5].fill(tokens as u8);
        config.rows[5..7].fill(16);
        // SAFETY: an `Amx` exists only where this instruction does and the system granted its
        // registers. It reads the 64 bytes of `config`, which are valid: palette 1 has eight tiles
        // of up to 16 rows and 64 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(readonly, nostack, preserves_flags)
            );
        }
        Registers {
            _of_this_thread: PhantomData,
        }
    }

    /// Products of the tokens with the rows of `half`.
    #[inline(always)]
    fn multiply<X: Terms>(&self, x: &Staged, weights: &Weights, half: usize, sums: &mut Sums) {
        if X::WORDS.is_some() {
            // SAFETY: `configure` shaped the tiles, which takes an `Amx`. Loads and stores touch up
            // to 16 rows, 64 bytes apart, of the squares that these references borrow.
            unsafe {
                asm!(
                    "tileloadd tmm3, [{x_high} + {stride}]",
                    "tileloadd tmm5, [{w_high} + {stride}]",
                    "tilezero tmm0",
                    "tdpbssd tmm0, tmm3, tmm5",
                    "tileloadd tmm4, [{x_low} + {stride}]",
                    "tilezero tmm1",
                    "tdpbusd tmm1, tmm4, tmm5",
                    "tileloadd tmm6, [{w_low} + {stride}]",
                    "tilezero tmm2",
                    "tdpbuud tmm2, tmm4, tmm6",
                    "tdpbsud tmm1, tmm3, tmm6",
                    "tilestored [{high} + {stride}], tmm0",
                    "tilestored [{low} + {stride}], tmm2",
                    "tilestored [{mixed} + {stride}], tmm1",
                    x_high = in(reg) &raw const x.high,
                    x_low = in(reg) &raw const x.low,
                    w_high = in(reg) &raw const weights.high[half],
                    w_low = in(reg) &raw const weights.low[half],
                    high = in(reg) &raw mut sums.high,
                    mixed = in(reg) &raw mut sums.mixed,
                    low = in(reg) &raw mut sums.low,
                    stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _,
                    options(nostack, preserves_flags)
                );
            }
        }
        if X::BYTES {
            // SAFETY: as above.
            unsafe {
                asm!(
                    "tileloadd tmm3, [{x} + {stride}]",
                    "tileloadd tmm5, [{w} + {stride}]",
                    "tilezero tmm0",
                    "tdpbssd tmm0, tmm3, tmm5",
                    "tilestored [{sums} + {stride}], tmm0",
                    x = in(reg) &raw const x.bytes,
                    w = in(reg) &raw const weights.bytes[half],
                    sums = in(reg) &raw mut sums.bytes,
                    stride = in(reg) 64usize,
                    out("tmm0") _, out("tmm3") _, out("tmm5") _,
                    options(nostack, preserves_flags)
                );
            }
        }
    }
}

impl Drop for Registers {
    /// Gives the registers back, so that the system need not save them.
    fn drop(&mut self) {
        // SAFETY: `configure` takes an `Amx`, which proves that the instruction exists.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod emulator;
#[cfg(all(test, target_os = "linux"))]
mod tests;
