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
//! tile, as [`byte_rows`](super::byte_rows) keeps them; the second has four columns of 16 weight
//! rows in each, as a lookup of codes leaves them. Columns go in the order of the codes, even
//! nibbles of a group before odd ones.
//!
//! An estimate, from Intel's tables and not measured, in cycles for 16 tokens x one tile, which is
//! two products: 16 for a product of bytes, 1 for a store of 64 bytes, 1/2 for a load or any other
//! vector instruction, VNNI included. Up to 64 tokens share the lookup of a tile.
//!
//! ```text
//!         tile products   stores   loads   vectors   lookup: stores   vectors   with VNNI
//! int8         32            64       80       48              32         40        300
//! int16       128           128      160      112              64         56        560
//! wide        160           192      240      160              96         72        860
//! ```
//!
//! Columns overlap as far as work does not wait for other work, which is what the order of
//! [`Pipeline`] is for. Tiles of bf16, the other kind, would take two products in place of four, but
//! their sums are f32, rounded in an order of their own.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::marker::PhantomData;

use super::activations::{Int8Block, Int16Block, Integers, WideBlock};
use super::byte_rows::{ByteRowsView, Row};
use super::isa::{Amx, Avx512};
use super::layout::{TILE_ROWS, TILES_AHEAD, Tile};
use super::nf4_integers::Terms;
use super::simd::{CODE_BOOK_INT8, LANES, Simd, lanes, lanes_mut};

/// From how many tokens on tiles should be faster than VNNI: an estimate like the above.
pub const MIN_TOKENS: usize = 8;

/// Tokens of one product, at most.
const TOKENS: usize = 16;

/// Tokens that meet a tile row before the next ones come, so that their totals and one block of their
/// activations stay in the L1 cache, beside the tiles looked up: 8 KB each, 16 KB.
const TOKENS_IN_L1: usize = 64;

/// What one tile register holds: 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Square([[i32; LANES]; 16]);

const ZERO: Square = Square([[0; LANES]; 16]);

/// Half the rows of a tile looked up, quads of bytes `[quad][row]`.
struct Weights {
    high: Square,
    low: Square,
    bytes: Square,
}

/// Sums of one product, `[token][row]`: high, mixed and low ones of words, or one of bytes.
#[repr(C, align(64))]
struct Sums([Square; 3]);

/// Sums of all blocks so far, `[half][row]`, in a cache line each, as a caller's panel may not be.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Total([[f32; LANES]; 2]);

struct Scratch {
    registers: Registers,
    sums: Sums,
    totals: [Total; TOKENS_IN_L1],
    /// `[block, even or odd][half]`: one block's are written while the other's are read
    weights: [[Weights; 2]; 2],
}

impl Scratch {
    const ZERO: Scratch = Scratch {
        registers: Registers {
            tokens: 0,
            odd: false,
            _of_this_thread: PhantomData,
        },
        sums: Sums([ZERO; 3]),
        totals: [Total([[0.0; LANES]; 2]); TOKENS_IN_L1],
        weights: [const {
            [const {
                Weights {
                    high: ZERO,
                    low: ZERO,
                    bytes: ZERO,
                }
            }; 2]
        }; 2],
    };
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch::ZERO));
}

/// Whether [`tile_row`] can multiply these tokens, and should.
///
/// - `x`: all tokens' activations
pub fn takes(x: ByteRowsView, tokens: &[u32]) -> bool {
    tokens.len() >= MIN_TOKENS && !x.is_empty() && tokens.is_sorted_by(|a, b| a + 1 == *b)
}

/// [`tile_row_int16`](super::nf4_integers::tile_row_int16) and its siblings on tiles, for tokens it
/// [`takes`] of activations of `kind`.
pub fn tile_row(
    amx: Amx,
    kind: Integers,
    tiles: &[Tile<u16>],
    unit: f32,
    x: ByteRowsView,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert!(takes(x, tokens));
    assert_eq!(c.len(), tokens.len());
    if tiles.is_empty() {
        return c.fill([0.0; TILE_ROWS]);
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let at_once = nearly_equal(tokens.len(), TOKENS_IN_L1);
        for (tokens, c) in tokens.chunks(at_once).zip(c.chunks_mut(at_once)) {
            let first = tokens[0] as usize;
            let totals = &mut scratch.totals[..tokens.len()];
            totals.fill(Total([[0.0; LANES]; 2]));
            // SAFETY: an `Amx` holds an `Avx512`, which exists only where these features were seen.
            unsafe {
                match kind {
                    Integers::Int8 => {
                        add_tile_row::<Int8Block>(amx, tiles, x, first, tokens.len(), scratch)
                    }
                    Integers::Int16 => {
                        add_tile_row::<Int16Block>(amx, tiles, x, first, tokens.len(), scratch)
                    }
                    Integers::Wide => {
                        add_tile_row::<WideBlock>(amx, tiles, x, first, tokens.len(), scratch)
                    }
                }
                scale(amx.avx512(), unit, &scratch.totals, c);
            }
        }
    });
}

/// Size of parts that `len` is cut into, at most `most`: seventeen are 9 + 8, not 16 + 1.
fn nearly_equal(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most))
}

/// `c = totals * unit`
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn scale(s: Avx512, unit: f32, totals: &[Total], c: &mut [[f32; TILE_ROWS]]) {
    for (total, c) in totals.iter().zip(c) {
        for (total, c) in total.0.iter().zip(lanes_mut(c)) {
            s.store(s.mul(s.load(total), s.splat(unit)), c);
        }
    }
}

/// Adds the products of all tiles and `tokens` from `first` on to the totals.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn add_tile_row<X: Terms>(
    amx: Amx,
    tiles: &[Tile<u16>],
    x: ByteRowsView,
    first: usize,
    tokens: usize,
    scratch: &mut Scratch,
) {
    let s = amx.avx512();
    let x_tokens = x.len() / tiles.len();
    // Groups of equal size: the last of 9 + 8 tokens begins with one that the first has as well, and
    // adds up the others only.
    let group_len = nearly_equal(tokens, TOKENS);
    let Scratch {
        registers,
        sums,
        weights,
        totals,
    } = scratch;
    registers.configure(amx, group_len);
    let mut pipeline = Pipeline {
        s,
        registers,
        sums,
        totals,
        steps: [None, None],
    };
    let [mut now, mut next] = weights.each_mut();
    for half in 0..2 {
        look_up::<X>(s, &tiles[0], half, &mut now[half]);
    }
    for (kb, tile) in tiles.iter().enumerate() {
        let x = x.slice(kb * x_tokens + first..kb * x_tokens + first + tokens);
        let next_tile = tiles.get(kb + 1);
        for half in 0..2 {
            let mut done = 0;
            while done < tokens {
                let start = done.min(tokens - group_len);
                let group = start..start + group_len;
                let added = done..group.end;
                let step = |words, scales| Step {
                    words,
                    absmax: &lanes(&tile.absmax)[half],
                    scales,
                    half,
                    token: done,
                    row: done - start,
                };
                if X::WORDS.is_some() {
                    let (high, low) = (&x.high[group.clone()], &x.low[group.clone()]);
                    pipeline.registers.multiply_words(high, low, &now[half]);
                    pipeline.advance(Some(step(true, &x.word_scales[added.clone()])));
                }
                if X::BYTES {
                    let bytes = &x.bytes[group.clone()];
                    pipeline.registers.multiply_bytes(bytes, &now[half]);
                    pipeline.advance(Some(step(false, &x.byte_scales[added])));
                }
                if let (0, Some(tile)) = (done, next_tile) {
                    look_up::<X>(s, tile, half, &mut next[half]);
                }
                done = group.end;
            }
        }
        (now, next) = (next, now);
    }
    pipeline.advance(None);
    pipeline.advance(None);
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

/// Half the weights of a tile.
#[target_feature(enable = "avx512f,avx512bw")]
fn look_up<X: Terms>(s: Avx512, tile: &Tile<u16>, half: usize, out: &mut Weights) {
    if half == 0 {
        s.prefetch((tile as *const Tile<u16>).wrapping_add(TILES_AHEAD));
    }
    // Not kept for all tiles: a struct of these vectors lost its alignment on the stack (LLVM 22
    // merged it with an array of i32), which ended in a fault.
    let [high, low, bytes] = const {
        let [high, low] = word_books(X::WORDS);
        [high, low, BYTE_BOOK]
    };
    let [high, low, bytes] = [s.load_i32(&high), s.load_i32(&low), s.load_i32(&bytes)];
    let nibbles = _mm512_set1_epi8(15);
    for (group, codes) in tile.codes.iter().enumerate() {
        let codes = s.load_u32(&lanes(codes)[half]);
        let even = _mm512_and_si512(codes, nibbles);
        let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibbles);
        let put = |table, Square(quads): &mut Square| {
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

/// One product on its way to the totals.
struct Step<'a> {
    /// Of words, or else of bytes
    words: bool,
    /// `[row]`
    absmax: &'a [u16; LANES],
    /// Of the tokens to add up
    scales: &'a [f32],
    half: usize,
    /// The first token, and its row of the sums
    token: usize,
    row: usize,
}

/// Three products are on their way at a time.
///
/// While tiles multiply one, vectors add up the one before the last, whose sums have been in memory
/// for a while, and then the last one's sums are stored in their place. So nothing waits for what
/// was only just begun: the sums of two products are in registers, in turns, and the schedulers
/// do not fill up with what cannot start.
struct Pipeline<'a> {
    s: Avx512,
    registers: &'a mut Registers,
    sums: &'a mut Sums,
    totals: &'a mut [Total],
    /// The last two that are not in the totals yet, the even and the odd one
    steps: [Option<Step<'a>>; 2],
}

impl<'a> Pipeline<'a> {
    /// Brings on the steps before `step`, which was given to the tile registers.
    #[target_feature(enable = "avx512f")]
    fn advance(&mut self, step: Option<Step<'a>>) {
        let now = usize::from(self.registers.odd);
        self.add_stored(now);
        if let Some(last) = &self.steps[1 - now] {
            self.registers.store_last(last.words, self.sums);
        }
        self.steps[now] = step;
        self.registers.odd ^= true;
    }

    /// `totals += sums * absmax * scales`
    #[target_feature(enable = "avx512f")]
    fn add_stored(&mut self, step: usize) {
        let Some(step) = &self.steps[step] else {
            return;
        };
        let s = self.s;
        let absmax = s.load_u16(step.absmax);
        let totals = &mut self.totals[step.token..];
        let totals = totals.iter_mut().zip(step.scales);
        let Sums([Square(high), Square(mixed), Square(low)]) = &*self.sums;
        let (high, mixed, low) = (&high[step.row..], &mixed[step.row..], &low[step.row..]);
        let add = |Total(total): &mut Total, sum, scale: f32| {
            let total = &mut total[step.half];
            let scale = s.mul(absmax, s.splat(scale));
            s.store(s.mul_add(s.to_f32(sum), scale, s.load(total)), total);
        };
        if step.words {
            let sums = high.iter().zip(mixed).zip(low);
            for ((total, &scale), ((high, mixed), low)) in totals.zip(sums) {
                let high = _mm512_slli_epi32::<16>(s.load_i32(high));
                let mixed = _mm512_slli_epi32::<8>(s.load_i32(mixed));
                let sum = s.add_i32(s.add_i32(high, mixed), s.load_i32(low));
                add(total, sum, scale);
            }
        } else {
            for ((total, &scale), sums) in totals.zip(high) {
                add(total, s.load_i32(sums), scale);
            }
        }
    }
}

/// The tile registers of this thread: 0 to 2 are the sums of even products, 3 to 5 those of odd ones,
/// 6 tokens, 7 weights.
///
/// Between the pieces of assembly, shapes and sums stay there, which are nothing the compiler knows
/// of: it has no use for tile registers of its own. Shapes stay between calls too, as in oneDNN
/// (`amx_tile_lazy_configure`), because setting them is slow; so the system saves the registers
/// when it stops a thread.
struct Registers {
    /// Rows of all tiles but weights, 0 before the first use
    tokens: usize,
    /// Whether the product now multiplied is an odd one
    odd: bool,
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

/// `asm!` for an even product, or for an odd one.
macro_rules! asm_for {
    ($odd:expr, $template:ident, $($operands:tt)*) => {
        if $odd {
            asm!($template!("tmm3", "tmm4", "tmm5"), $($operands)*)
        } else {
            asm!($template!("tmm0", "tmm1", "tmm2"), $($operands)*)
        }
    };
}

impl Registers {
    /// Gives the tiles of tokens and of sums `tokens` rows, at most 16.
    fn configure(&mut self, _: Amx, tokens: usize) {
        assert!((1..=TOKENS).contains(&tokens));
        if tokens == self.tokens {
            return;
        }
        let mut config = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(64);
        config.rows[..7].fill(tokens as u8);
        config.rows[7] = 16;
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
        self.tokens = tokens;
    }

    /// Begins a product of words: sums start at zero.
    #[inline(always)]
    fn multiply_words(&self, x_high: &[Row], x_low: &[Row], weights: &Weights) {
        assert_eq!((x_high.len(), x_low.len()), (self.tokens, self.tokens));
        macro_rules! template {
            ($high:literal, $mixed:literal, $low:literal) => {
                concat!(
                    "tileloadd tmm6, [{x_low} + {stride}]\n",
                    "tileloadd tmm7, [{w_high} + {stride}]\n",
                    "tilezero ",
                    $mixed,
                    "\n",
                    "tdpbusd ",
                    $mixed,
                    ", tmm6, tmm7\n",
                    "tileloadd tmm6, [{x_high} + {stride}]\n",
                    "tilezero ",
                    $high,
                    "\n",
                    "tdpbssd ",
                    $high,
                    ", tmm6, tmm7\n",
                    "tileloadd tmm7, [{w_low} + {stride}]\n",
                    "tdpbsud ",
                    $mixed,
                    ", tmm6, tmm7\n",
                    "tileloadd tmm6, [{x_low} + {stride}]\n",
                    "tilezero ",
                    $low,
                    "\n",
                    "tdpbuud ",
                    $low,
                    ", tmm6, tmm7",
                )
            };
        }
        // SAFETY: `configure` shaped the tiles, which takes an `Amx`. Loads read `tokens` rows of
        // 64 bytes, as long as the slices are, or squares.
        unsafe {
            asm_for!(
                self.odd, template,
                x_high = in(reg) x_high.as_ptr(),
                x_low = in(reg) x_low.as_ptr(),
                w_high = in(reg) &raw const weights.high,
                w_low = in(reg) &raw const weights.low,
                stride = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// Begins a product of bytes.
    #[inline(always)]
    fn multiply_bytes(&self, x: &[Row], weights: &Weights) {
        assert_eq!(x.len(), self.tokens);
        macro_rules! template {
            ($sums:literal, $_mixed:literal, $_low:literal) => {
                concat!(
                    "tileloadd tmm6, [{x} + {stride}]\n",
                    "tileloadd tmm7, [{w} + {stride}]\n",
                    "tilezero ",
                    $sums,
                    "\n",
                    "tdpbssd ",
                    $sums,
                    ", tmm6, tmm7",
                )
            };
        }
        // SAFETY: as for words.
        unsafe {
            asm_for!(
                self.odd, template,
                x = in(reg) x.as_ptr(),
                w = in(reg) &raw const weights.bytes,
                stride = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// Stores the sums of the product before the one now multiplied.
    #[inline(always)]
    fn store_last(&self, words: bool, sums: &mut Sums) {
        let [high, mixed, low] = sums.0.each_mut().map(|sums| &raw mut *sums);
        if words {
            macro_rules! template {
                ($high:literal, $mixed:literal, $low:literal) => {
                    concat!(
                        "tilestored [{high} + {stride}], ",
                        $high,
                        "\n",
                        "tilestored [{mixed} + {stride}], ",
                        $mixed,
                        "\n",
                        "tilestored [{low} + {stride}], ",
                        $low,
                    )
                };
            }
            // SAFETY: `configure` shaped the tiles, which takes an `Amx`. Stores write up to 16
            // rows, 64 bytes apart, of the squares that `sums` borrows.
            unsafe {
                asm_for!(
                    !self.odd, template,
                    high = in(reg) high,
                    mixed = in(reg) mixed,
                    low = in(reg) low,
                    stride = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
        } else {
            macro_rules! template {
                ($sums:literal, $_mixed:literal, $_low:literal) => {
                    concat!("tilestored [{sums} + {stride}], ", $sums)
                };
            }
            // SAFETY: as above.
            unsafe {
                asm_for!(
                    !self.odd, template,
                    sums = in(reg) high,
                    stride = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod emulator;
#[cfg(all(test, target_os = "linux"))]
mod tests;
