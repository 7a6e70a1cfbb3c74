//! The stages of one layer, which each worker goes through on its own.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use bytemuck::cast_slice;

use super::super::activations::{Activations, Block, IntegerParts, Integers};
use super::super::experts::{Expert, add_weighted, swiglu};
use super::super::isa::Isa;
use super::super::layout::{TILE_COLS, TILE_ROWS};
use super::super::linear::{Panel, View, Weights};
use super::super::threads::{Backoff, Parts, Shares};
use super::{Asked, Request, prepare};
use crate::backend::{BackendError, Result};

/// How far a layer is.
pub struct Progress {
    up: Shares,
    down: Shares,
    /// Of each block of intermediate values: quarters that are done, 32 rows of gate or of up
    quarters: Vec<AtomicU32>,
    /// Of each chosen expert: blocks that are done
    blocks: Vec<AtomicUsize>,
    /// Tile rows of the sum that are done
    rows: AtomicUsize,
    /// The layer will not be finished
    pub failed: AtomicBool,
}

impl Progress {
    pub fn new(workers: usize) -> Self {
        Progress {
            up: Shares::new(workers),
            down: Shares::new(workers),
            quarters: Vec::new(),
            blocks: Vec::new(),
            rows: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// For a layer of up to `experts` of so many blocks each.
    pub fn begin(&mut self, experts: usize, blocks: usize) {
        self.up.reset();
        self.down.reset();
        // After a failure some would be left half done.
        self.quarters.clear();
        self.quarters
            .resize_with(experts * blocks, AtomicU32::default);
        self.blocks.clear();
        self.blocks.resize_with(experts, AtomicUsize::default);
        *self.rows.get_mut() = 0;
        *self.failed.get_mut() = false;
    }

    /// Waits until `there`; `false` if the layer failed before.
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

/// A layer while it is worked on.
pub struct Layer<'a> {
    pub isa: Isa,
    pub workers: usize,
    pub experts: &'a [Expert],
    pub at_most: usize,
    /// Of intermediate values of each expert
    pub blocks: usize,
    pub request: &'a dyn Request,
    pub progress: &'a Progress,
    pub x: Parts<'a, Activations>,
    /// Intermediate values, before that what gate gave
    pub hidden: Parts<'a, f32>,
    /// What up gave
    pub up: Parts<'a, f32>,
    pub hidden_integers: Option<(Integers, IntegerParts<'a>)>,
    pub out: Parts<'a, f32>,
}

impl Layer<'_> {
    pub fn work(&self, worker: usize) {
        let _failed = OnPanic(&self.progress.failed);
        let asked = || self.request.asked().is_some();
        (self.progress).wait(|| self.request.foreseen().is_some() || asked());
        self.fetch(worker, self.request.foreseen().unwrap_or(&[]));
        let known = self.progress.wait(asked);
        if known && self.check().is_ok() {
            self.compute(worker);
        }
    }

    /// Whether there are the experts that are asked for.
    pub fn check(&self) -> Result<()> {
        let (asked, count) = (self.asked(), self.experts.len());
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

    fn asked(&self) -> Asked<'_> {
        self.request.asked().expect("a request that is known")
    }

    /// Brings this worker's share of experts into its caches until the request is there.
    pub fn fetch(&self, worker: usize, ids: &[i32]) {
        let enough = || self.request.asked().is_some();
        for &id in ids {
            let Some(expert) = self.experts.get(id as usize) else {
                return;
            };
            for linear in [&expert.gate, &expert.up, &expert.down] {
                let Weights::Nf4Int16(tiles) = &linear.weights else {
                    return;
                };
                let rows = linear.tile_rows();
                let kblocks = tiles.range.len() / rows.max(1);
                let tiles = &tiles.arena[tiles.range.clone()];
                let share = worker * rows / self.workers..(worker + 1) * rows / self.workers;
                for tiles in tiles[share.start * kblocks..share.end * kblocks].chunks(4) {
                    if enough() {
                        return;
                    }
                    touch(cast_slice(tiles));
                }
            }
        }
    }

    /// Takes part in all stages until nothing is left to begin.
    pub fn compute(&self, worker: usize) {
        let (isa, progress) = (self.isa, self.progress);
        let asked = self.asked();
        let count = asked.ids.len();
        let expert = |i: usize| &self.experts[asked.ids[i] as usize];
        let rows = self.experts[0].down.tile_rows();
        if progress.rows.load(Ordering::Relaxed) == rows {
            return;
        }
        // SAFETY: each worker has its own.
        let x = unsafe { self.x.item(worker) };
        prepare(isa, x, asked.x, &self.experts[0].gate);
        let x = x.view();
        // All experts' first rows come first: so a worker has the same rows of every expert,
        // whichever experts they are, and finds them where it fetched them.
        progress.up.take(worker, 4 * self.blocks * count, |item| {
            let (tile_row, item) = (item / (2 * count), item % (2 * count));
            self.gate_or_up(expert(item / 2), item, tile_row, x);
        });
        progress.down.take(worker, rows, |tile_row| {
            let mut sum = [[0.0; TILE_ROWS]];
            for i in 0..count {
                let done = || progress.blocks[i].load(Ordering::Acquire) == self.blocks;
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
            let last = self.experts[0].down.rows.min(first + TILE_ROWS);
            // SAFETY: each item has output rows of its own.
            let out = unsafe { self.out.slice(first..last) };
            out.copy_from_slice(&sum[0][..last - first]);
            if progress.rows.fetch_add(1, Ordering::AcqRel) + 1 == rows {
                self.request.answered();
            }
        });
    }

    /// 32 rows of gate, or for odd `item` of up, of the chosen expert number `item / 2`.
    fn gate_or_up(&self, expert: &Expert, item: usize, tile_row: usize, x: View) {
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
        if self.progress.quarters[block].fetch_add(1, Ordering::AcqRel) == 3 {
            // SAFETY: all are written, and a block is finished once.
            unsafe { self.finish(block) };
            self.progress.blocks[i].fetch_add(1, Ordering::Release);
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
