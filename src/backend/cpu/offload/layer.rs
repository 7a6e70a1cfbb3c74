//! The layers of one token, which each worker goes through on its own, stage by stage.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use bytemuck::cast_slice;

use super::super::activations::{Activations, Block, IntegerParts, Integers};
use super::super::experts::{Expert, add_weighted, swiglu};
use super::super::isa::Isa;
use super::super::layout::{TILE_COLS, TILE_ROWS};
use super::super::linear::{Panel, View, Weights};
use super::super::threads::{Backoff, Count, Paces, Parts, Shares};
use super::{Asked, Requests, prepare};
use crate::backend::{BackendError, Result};

/// How far each stage is, by rounds: each layer of each token is one.
pub struct Progress {
    up: Shares,
    down: Shares,
    /// Of each block of intermediate values: quarters that are done, 32 rows of gate or of up; four in a
    /// round
    quarters: Vec<AtomicU32>,
    /// Of each chosen expert: blocks that are done
    blocks: Vec<Count>,
    /// Tile rows of the sum that are done, the same number in every round
    rows: AtomicUsize,
    /// The last round that is over
    over: AtomicU32,
    /// Rounds of earlier tokens
    pub rounds: u32,
    /// The token will not be finished
    pub failed: AtomicBool,
}

impl Progress {
    pub fn new(paces: &Paces) -> Self {
        Progress {
            up: Shares::new(paces.clone()),
            down: Shares::new(paces.clone()),
            quarters: Vec::new(),
            blocks: Vec::new(),
            rows: AtomicUsize::new(0),
            over: AtomicU32::new(0),
            rounds: 0,
            failed: AtomicBool::new(false),
        }
    }

    /// For layers of up to `experts` of so many blocks each.
    pub fn begin(&mut self, experts: usize, blocks: usize) {
        if std::mem::take(self.failed.get_mut()) {
            // Some are half done.
            self.quarters.clear();
        }
        *self.rows.get_mut() = 0;
        self.quarters
            .resize_with(experts * blocks, AtomicU32::default);
        self.blocks.resize_with(experts, Count::default);
    }

    /// Waits until `there`; `false` if the token failed before.
    fn wait(&self, there: impl Fn() -> bool) -> bool {
        let mut waiting = Backoff::default();
        while !there() {
            if self.failed.load(Ordering::Relaxed) {
                return false;
            }
            waiting.pause();
        }
        true
    }
}

/// Tells the others of a panic, which would wait for ever for what this worker had begun.
pub struct OnPanic<'a>(pub &'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A token while it is worked on.
///
/// Nobody waits for a worker that lost its core with nothing begun: it finds later what is left.
pub struct Token<'a> {
    pub isa: Isa,
    pub requests: &'a dyn Requests,
    pub at_most: usize,
    /// Of intermediate values of each expert
    pub blocks: usize,
    pub progress: &'a Progress,
    pub x: Parts<'a, Activations>,
    /// Intermediate values, before that what gate gave
    pub hidden: Parts<'a, f32>,
    /// What up gave
    pub up: Parts<'a, f32>,
    pub hidden_integers: Option<(Integers, IntegerParts<'a>)>,
    /// `[layers, D]`
    pub out: Parts<'a, f32>,
}

impl Token<'_> {
    pub fn work(&self, worker: usize) {
        let _failed = OnPanic(&self.progress.failed);
        for layer in 0..self.requests.layers() {
            let asked = || self.requests.asked(layer).is_some();
            let predicted = || self.requests.predicted(layer).is_some();
            if !self.progress.wait(|| predicted() || asked()) {
                return;
            }
            self.fetch(layer, worker);
            if !self.progress.wait(asked) || self.check(layer).is_err() {
                return;
            }
            self.compute(layer, worker);
        }
    }

    /// Whether there are the experts that are asked for.
    ///
    /// # Errors
    /// If an id is beyond the layer's experts, or more are requested than may be.
    pub fn check(&self, layer: usize) -> Result<()> {
        let (asked, count) = (self.asked(layer), self.requests.experts(layer).len());
        if let Some(id) = asked.ids.iter().find(|&&id| id as usize >= count) {
            return Err(BackendError::Other(format!(
                "expert {id} of {count} was asked for"
            )));
        }
        match asked.ids.len() > self.at_most {
            true => Err(BackendError::Other(format!(
                "{} experts were asked for, at most {} can be",
                asked.ids.len(),
                self.at_most
            ))),
            false => Ok(()),
        }
    }

    fn asked(&self, layer: usize) -> Asked<'_> {
        self.requests.asked(layer).expect("a request that is known")
    }

    fn round(&self, layer: usize) -> u32 {
        self.progress.rounds.wrapping_add(1 + layer as u32)
    }

    /// Whether `layer` is answered.
    fn is_over(&self, layer: usize) -> bool {
        let over = self.progress.over.load(Ordering::Acquire);
        over.wrapping_sub(self.round(layer)) as i32 >= 0
    }

    /// Waits until the layer is answered; `false` if that will not happen.
    pub fn finish_layer(&self, layer: usize) -> bool {
        self.progress.wait(|| self.is_over(layer))
    }

    /// Brings this worker's share of what is predicted into its caches until the request is there.
    pub fn fetch(&self, layer: usize, worker: usize) {
        let enough = || self.requests.asked(layer).is_some();
        let experts = self.requests.experts(layer);
        for &id in self.requests.predicted(layer).unwrap_or(&[]) {
            let Some(expert) = experts.get(id as usize) else {
                return;
            };
            for linear in [&expert.gate, &expert.up, &expert.down] {
                let Weights::Nf4Int16(tiles) = &linear.weights else {
                    return;
                };
                let rows = linear.tile_rows();
                let kblocks = tiles.range.len() / rows.max(1);
                let tiles = &tiles.arena[tiles.range.clone()];
                // As `Shares` will hand them out.
                let share = self.progress.up.paces().part(rows, worker);
                for tiles in tiles[share.start * kblocks..share.end * kblocks].chunks(4) {
                    if enough() {
                        return;
                    }
                    touch(cast_slice(tiles));
                }
            }
        }
    }

    /// Takes part in all stages of a layer until nothing is left to begin.
    pub fn compute(&self, layer: usize, worker: usize) {
        if self.is_over(layer) {
            return;
        }
        let (isa, progress, round) = (self.isa, self.progress, self.round(layer));
        let (asked, experts) = (self.asked(layer), self.requests.experts(layer));
        let count = asked.ids.len();
        let expert = |i: usize| &experts[asked.ids[i] as usize];
        let (rows, dim) = (experts[0].down.tile_rows(), experts[0].down.rows);
        if count == 0 {
            // Nothing to share out.
            return progress.down.take(round, worker, 1, |_| {
                // SAFETY: nobody else writes the layer's output.
                unsafe { self.out.slice(layer * dim..(layer + 1) * dim) }.fill(0.0);
                self.answer(round, layer);
            });
        }
        // SAFETY: each worker has its own.
        let x = unsafe { self.x.item(worker) };
        prepare(isa, x, asked.x, &experts[0].gate);
        let x = x.view();
        // All experts' first rows come first: so a worker has the same rows of every expert,
        // whichever experts they are, and finds them where it fetched them.
        (progress.up).take(round, worker, 4 * self.blocks * count, |item| {
            let (tile_row, item) = (item / (2 * count), item % (2 * count));
            self.gate_or_up(round, expert(item / 2), item, tile_row, x);
        });
        progress.down.take(round, worker, rows, |tile_row| {
            let mut sum = [[0.0; TILE_ROWS]];
            for i in 0..count {
                let done = || progress.blocks[i].get(round) == Some(self.blocks as u32);
                if !progress.wait(done) {
                    return;
                }
                let mut c = [[0.0; TILE_ROWS]];
                // SAFETY: all blocks of this expert are done.
                let h = unsafe { self.intermediate(i) };
                (expert(i).down).tile_row(isa, tile_row, h, &[0], &mut c);
                add_weighted(isa, &c, &[0], &asked.weights[i..=i], &mut sum);
            }
            let first = tile_row * TILE_ROWS;
            let last = dim.min(first + TILE_ROWS);
            // SAFETY: each item has output rows of its own.
            let out = unsafe { self.out.slice(layer * dim + first..layer * dim + last) };
            out.copy_from_slice(&sum[0][..last - first]);
            if (progress.rows.fetch_add(1, Ordering::AcqRel) + 1).is_multiple_of(rows) {
                self.answer(round, layer);
            }
        });
    }

    fn answer(&self, round: u32, layer: usize) {
        self.progress.over.store(round, Ordering::Release);
        self.requests.answered(layer);
    }

    /// 32 rows of gate, or for odd `item` of up, of the chosen expert number `item / 2`.
    fn gate_or_up(&self, round: u32, expert: &Expert, item: usize, tile_row: usize, x: View) {
        let (i, is_up) = (item / 2, item % 2 == 1);
        let block = i * self.blocks + tile_row / 2;
        let (linear, out) = match is_up {
            false => (&expert.gate, &self.hidden),
            true => (&expert.up, &self.up),
        };
        let mut panel: [Panel; 1] = Default::default();
        linear.tile_row(self.isa, tile_row, x, &[0], &mut panel);
        let start = block * TILE_COLS + tile_row % 2 * TILE_ROWS;
        // SAFETY: every item has its own quarter of a block.
        unsafe { out.slice(start..start + TILE_ROWS) }.copy_from_slice(&panel[0]);
        // The last of four quarters sees the others' values.
        if self.progress.quarters[block].fetch_add(1, Ordering::AcqRel) % 4 == 3 {
            // SAFETY: all are written, and a block is finished once.
            unsafe { self.finish(block) };
            self.progress.blocks[i].add(round);
        }
    }

    /// `silu(gate) * up` of a block, also as integers.
    ///
    /// # Safety
    /// Nobody else reads or writes the block.
    unsafe fn finish(&self, block: usize) {
        let range = block * TILE_COLS..(block + 1) * TILE_COLS;
        // SAFETY: the caller's promise.
        let (hidden, up) = unsafe { (self.hidden.slice(range.clone()), self.up.shared(range)) };
        let mut whole: [Block; 1] = [[0.0; TILE_COLS]];
        let (gate, up) = (hidden.as_chunks().0, up.as_chunks().0);
        for half in 0..2 {
            swiglu(
                self.isa,
                &gate[half..=half],
                &up[half..=half],
                half,
                &mut whole,
            );
        }
        hidden.copy_from_slice(&whole[0]);
        if let Some((kind, quantized)) = &self.hidden_integers {
            // SAFETY: the caller's promise.
            unsafe { quantized.quantize(self.isa, *kind, block, &whole[0]) };
        }
    }

    /// # Safety
    /// All blocks of the chosen expert number `i` must be done.
    unsafe fn intermediate(&self, i: usize) -> View<'_> {
        let range = i * self.blocks..(i + 1) * self.blocks;
        let values = range.start * TILE_COLS..range.end * TILE_COLS;
        // SAFETY: nobody writes them any more.
        unsafe {
            let blocks = self.hidden.shared(values).as_chunks().0;
            match &self.hidden_integers {
                Some((_, integers)) => integers.view(blocks, range),
                None => View::of_blocks(blocks),
            }
        }
    }
}

/// Asks for every line of `bytes`.
fn touch(bytes: &[u8]) {
    const LINE: usize = 64;
    for line in bytes.chunks(LINE) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of x86-64, and a prefetch faults on no address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        std::hint::black_box(line[0]);
    }
}
