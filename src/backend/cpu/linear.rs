//! A weight matrix in the form its kernel reads, whatever that is.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::activations::{
    Activations, Block, Int8Block, Int16Block, IntegerBlocks, IntegerParts, Integers, WideBlock,
};
use super::byte_rows::{ByteRows, ByteRowsView};
use super::isa::Isa;
use super::layout::{TILE_COLS, TILE_ROWS, Tile};
use super::memory::Huge;
#[cfg(target_arch = "x86_64")]
use super::nf4_amx;
use super::threads::{Parts, Pool};
use super::{dense, nf4_f32, nf4_integers};
use crate::backend::Result;

/// 32 output rows of one token.
pub type Panel = [f32; TILE_ROWS];

/// `[rows, cols]`, computed in groups of 32 rows.
pub struct Linear {
    pub rows: usize,
    pub cols: usize,
    pub weights: Weights,
    /// How integer tiles are multiplied; other weights have one way only
    pub integers: Integers,
}

pub enum Weights {
    /// For all kinds of [`Integers`]
    Nf4Int16(Tiles<u16>),
    Nf4F32(Tiles<f32>),
    /// `[rows, ceil(cols / 64)]`, zero-padded
    Bf16(Huge<[bf16; TILE_COLS]>),
    F32(Huge<[f32; TILE_COLS]>),
}

/// The tiles of one matrix in memory that all matrices of a layer share.
pub struct Tiles<A> {
    pub arena: Arc<Huge<Tile<A>>>,
    pub range: Range<usize>,
    /// Unit of the scales of each tile row
    pub units: Vec<f32>,
}

impl<A> Tiles<A> {
    fn row(&self, tile_row: usize, kblocks: usize) -> &[Tile<A>] {
        &self.arena[self.range.clone()][tile_row * kblocks..(tile_row + 1) * kblocks]
    }
}

/// Activations that a kernel may read, `tokens` of them.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub tokens: usize,
    pub blocks: &'a [Block],
    pub int8: &'a [Int8Block],
    pub int16: &'a [Int16Block],
    pub wide: &'a [WideBlock],
    pub rows: ByteRowsView<'a>,
}

impl<'a> View<'a> {
    /// For kernels that read no integers.
    pub fn of_blocks(tokens: usize, blocks: &'a [Block]) -> Self {
        View {
            tokens,
            blocks,
            int8: &[],
            int16: &[],
            wide: &[],
            rows: ByteRowsView::default(),
        }
    }
}

impl Activations {
    pub fn view(&self) -> View<'_> {
        let all = 0..self.blocks.len();
        self.integers.view(self.tokens, &self.blocks, all)
    }
}

impl IntegerBlocks {
    /// Blocks `range`, of `tokens` tokens, in both forms; a list that is not filled stays empty.
    pub fn view<'a>(&'a self, tokens: usize, blocks: &'a [Block], range: Range<usize>) -> View<'a> {
        View {
            tokens,
            blocks: &blocks[range.clone()],
            int8: self.int8.get(range.clone()).unwrap_or(&[]),
            int16: self.int16.get(range.clone()).unwrap_or(&[]),
            wide: self.wide.get(range.clone()).unwrap_or(&[]),
            rows: self.rows.view().slice(range),
        }
    }
}

impl IntegerParts<'_> {
    /// `blocks` of a few tokens, whose integers are `range` of these. Without rows for tiles, which
    /// are for many tokens.
    ///
    /// # Safety
    /// Nobody writes these integers while the view lives.
    pub unsafe fn view<'a>(
        &'a self,
        tokens: usize,
        blocks: &'a [Block],
        range: Range<usize>,
    ) -> View<'a> {
        // SAFETY: the caller's promise.
        unsafe {
            View {
                int8: filled(&self.int8, &range),
                int16: filled(&self.int16, &range),
                wide: filled(&self.wide, &range),
                ..View::of_blocks(tokens, blocks)
            }
        }
    }
}

/// `range` of a list, or nothing if it is not filled.
///
/// # Safety
/// As [`Parts::shared`].
unsafe fn filled<'a, T>(list: &'a Parts<T>, range: &Range<usize>) -> &'a [T] {
    match list.is_empty() {
        true => &[],
        // SAFETY: the caller's promise.
        false => unsafe { list.shared(range.clone()) },
    }
}

impl Linear {
    /// Groups of 32 rows, the last one possibly partial.
    pub fn tile_rows(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// The integer activations that the kernel reads; otherwise it reads f32.
    pub fn reads_integers(&self) -> Option<Integers> {
        matches!(self.weights, Weights::Nf4Int16(_)).then_some(self.integers)
    }

    /// Rows `32 tile_row ..` times some tokens: `c[i]` for `tokens[i]`, 0 in rows there are not.
    pub fn tile_row(&self, isa: Isa, tile_row: usize, x: View, tokens: &[u32], c: &mut [Panel]) {
        if tile_row >= self.tile_rows() {
            return c.fill([0.0; TILE_ROWS]);
        }
        let kblocks = self.cols.div_ceil(TILE_COLS);
        let first = tile_row * TILE_ROWS;
        let dense_blocks = first * kblocks..self.rows.min(first + TILE_ROWS) * kblocks;
        match &self.weights {
            Weights::Nf4Int16(tiles) => {
                let unit = tiles.units[tile_row];
                let tiles = tiles.row(tile_row, kblocks);
                #[cfg(target_arch = "x86_64")]
                if let (Isa::Amx(amx), true) = (isa, nf4_amx::takes(x.rows, tokens)) {
                    let kind = self.integers;
                    assert_eq!(x.rows.len(), tiles.len() * x.tokens);
                    return nf4_amx::tile_row(amx, kind, tiles, unit, x.rows, tokens, c);
                }
                match self.integers {
                    Integers::Int8 => {
                        nf4_integers::tile_row_int8(isa, tiles, unit, x.int8, x.tokens, tokens, c)
                    }
                    Integers::Int16 => {
                        nf4_integers::tile_row_int16(isa, tiles, unit, x.int16, x.tokens, tokens, c)
                    }
                    Integers::Wide => {
                        nf4_integers::tile_row_wide(isa, tiles, unit, x.wide, x.tokens, tokens, c)
                    }
                }
            }
            Weights::Nf4F32(tiles) => {
                let tiles = tiles.row(tile_row, kblocks);
                nf4_f32::tile_row(isa, tiles, x.blocks, x.tokens, tokens, c);
            }
            Weights::Bf16(w) => {
                dense::rows_bf16(isa, &w[dense_blocks], x.blocks, x.tokens, tokens, c);
            }
            Weights::F32(w) => {
                dense::rows_f32(isa, &w[dense_blocks], x.blocks, x.tokens, tokens, c);
            }
        }
    }

    /// Bytes that a matrix-vector product reads.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Nf4Int16(tiles) => tiles.range.len() * size_of::<Tile<u16>>(),
            Weights::Nf4F32(tiles) => tiles.range.len() * size_of::<Tile<f32>>(),
            Weights::Bf16(w) => size_of_val::<[_]>(w),
            Weights::F32(w) => size_of_val::<[_]>(w),
        }
    }
}

/// Tokens that a matrix meets before the next ones come: their activations, which are read again for
/// every 32 rows, stay in the L2 cache.
const TOKENS_AT_ONCE: usize = 512;

/// Outputs of matrices in panels of 32 rows: `[panel, tokens]`. For one token that is plain order.
#[derive(Default)]
pub struct Panels {
    tokens: usize,
    data: Vec<Panel>,
}

impl Panels {
    /// `linears` one after the other, each times all tokens of `x`; `all_tokens` is 0, 1, 2, ..
    ///
    /// The rows of matrix `i` start at the panel after those of the matrices before it.
    ///
    /// # Errors
    /// If a worker thread failed.
    pub fn project(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        linears: &[&Linear],
        x: View,
        all_tokens: &[u32],
    ) -> Result<()> {
        let panels: usize = linears.iter().map(|l| l.tile_rows()).sum();
        self.tokens = x.tokens;
        self.data.resize(panels * x.tokens, [0.0; TILE_ROWS]);
        let parts = Parts::new(&mut self.data);
        for tokens in all_tokens[..x.tokens].chunks(TOKENS_AT_ONCE) {
            pool.run(panels, &|mut item| {
                let start = item * x.tokens + tokens[0] as usize;
                // SAFETY: each item has a panel of its own, and is run once for these tokens.
                let c = unsafe { parts.slice(start..start + tokens.len()) };
                for linear in linears {
                    if item < linear.tile_rows() {
                        return linear.tile_row(isa, item, x, tokens, c);
                    }
                    item -= linear.tile_rows();
                }
            })?;
        }
        Ok(())
    }

    /// The outputs of tokens from `first` on, counted from there.
    pub fn from(&self, first: usize) -> PanelsFrom<'_> {
        PanelsFrom {
            panels: self,
            first,
        }
    }

    /// Copies rows `rows`, counted from panel `first_panel`, of `token`.
    pub fn copy_rows(&self, first_panel: usize, token: usize, rows: Range<usize>, out: &mut [f32]) {
        let mut row = rows.start;
        let mut out = &mut out[..rows.len()];
        while row < rows.end {
            let panel = &self.data[(first_panel + row / TILE_ROWS) * self.tokens + token];
            let start = row % TILE_ROWS;
            let end = TILE_ROWS.min(start + rows.end - row);
            let (head, tail) = out.split_at_mut(end - start);
            head.copy_from_slice(&panel[start..end]);
            out = tail;
            row += end - start;
        }
    }

    /// One output.
    pub fn get(&self, first_panel: usize, token: usize, row: usize) -> f32 {
        self.data[(first_panel + row / TILE_ROWS) * self.tokens + token][row % TILE_ROWS]
    }
}

thread_local! {
    static PANELS: RefCell<Vec<Panel>> = const { RefCell::new(Vec::new()) };
}

/// Lends `f` this thread's scratch space of `len` panels; contents are arbitrary.
pub fn with_panels<R>(len: usize, f: impl FnOnce(&mut [Panel]) -> R) -> R {
    PANELS.with_borrow_mut(|panels| {
        if panels.len() < len {
            panels.resize(len, [0.0; TILE_ROWS]);
        }
        f(&mut panels[..len])
    })
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    static GATHERED: RefCell<(ByteRows, Vec<u32>)> = RefCell::default();
}

/// Lends `f` some tokens so that the kernels of `linears` read them fastest.
///
/// Tiles load tokens that lie one after the other; where enough of them do not, they are copied,
/// once for all that `f` multiplies.
pub fn with_tokens_for<R>(
    isa: Isa,
    linears: [&Linear; 2],
    x: View,
    tokens: &[u32],
    f: impl FnOnce(View, &[u32]) -> R,
) -> R {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Amx(_))
        && tokens.len() >= nf4_amx::MIN_TOKENS
        && !x.rows.is_empty()
        && !nf4_amx::takes(x.rows, tokens)
        && linears.iter().all(|l| l.reads_integers().is_some())
    {
        return GATHERED.with_borrow_mut(|(rows, numbers)| {
            rows.gather(isa, x.rows, x.tokens, tokens);
            numbers.clear();
            numbers.extend(0..tokens.len() as u32);
            let gathered = View {
                tokens: tokens.len(),
                blocks: &[],
                int8: &[],
                int16: &[],
                wide: &[],
                rows: rows.view(),
            };
            f(gathered, numbers)
        });
    }
    f(x, tokens)
}

/// See [`Panels::from`].
#[derive(Clone, Copy)]
pub struct PanelsFrom<'a> {
    panels: &'a Panels,
    first: usize,
}

impl PanelsFrom<'_> {
    /// As [`Panels::copy_rows`].
    pub fn copy_rows(&self, first_panel: usize, token: usize, rows: Range<usize>, out: &mut [f32]) {
        (self.panels).copy_rows(first_panel, self.first + token, rows, out);
    }

    /// As [`Panels::get`].
    pub fn get(&self, first_panel: usize, token: usize, row: usize) -> f32 {
        self.panels.get(first_panel, self.first + token, row)
    }
}

/// `hidden += W x`, `hidden: [tokens, rows]`.
///
/// # Errors
/// If a worker thread failed.
pub fn add_product(
    pool: &mut Pool,
    isa: Isa,
    linear: &Linear,
    x: View,
    all_tokens: &[u32],
    hidden: &mut [f32],
) -> Result<()> {
    assert_eq!(hidden.len(), x.tokens * linear.rows);
    let parts = Parts::new(hidden);
    for tokens in all_tokens[..x.tokens].chunks(TOKENS_AT_ONCE) {
        pool.run(linear.tile_rows(), &|item| {
            with_panels(tokens.len(), |c| {
                linear.tile_row(isa, item, x, tokens, c);
                let first = item * TILE_ROWS;
                let last = linear.rows.min(first + TILE_ROWS);
                for (&token, c) in tokens.iter().zip(c.iter()) {
                    let start = token as usize * linear.rows;
                    // SAFETY: each item has rows of its own, and is run once for these tokens.
                    let hidden = unsafe { parts.slice(start + first..start + last) };
                    for (h, c) in hidden.iter_mut().zip(c) {
                        *h += c;
                    }
                }
            });
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
