//! The layers of one step, which each worker goes through on its own, stage by stage.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use bytemuck::cast_slice;

use super::super::activations::{Activations, Block, IntegerParts, Integers};
use super::super::experts::{add_weighted, swiglu};
use super::super::isa::Isa;
use super::super::layout::{TILE_COLS, TILE_ROWS};
use super::super::linear::{Panel, View, Weights};
use super::super::threads::{Backoff, Count, Paces, Parts, Shares};
use super::picks::{Group, Picks};
use super::{Asked, MAX_TOKENS, Requests, few_tokens, prepare};
use crate::backend::{BackendError, Result};

/// How far each stage is, by rounds: each layer of each step is one.
pub struct Progress {
    up: Shares,
    down: Shares,
    /// Of each group's blocks of intermediate values: quarters that are done, 32 rows of gate or of up;
    /// four in a round
    quarters: Vec<AtomicU32>,
    /// Of each group, that is a chosen expert: blocks that are done
    blocks: Vec<Count>,
    /// Tile rows of the sum that are done, the same number in every round
    rows: AtomicUsize,
    /// The last round that is over
    over: AtomicU32,
    /// Rounds of earlier steps
    pub rounds: u32,
    /// The step will not be finished
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

    /// Waits until `there`; `false` if the step failed before.
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

/// What each worker keeps for itself, which is quicker than waiting for one that makes it for all.
#[derive(Default)]
pub struct Worker {
    /// All tokens
    pub x: Activations,
    picks: Picks,
    /// Of each pick, 32 rows
    panels: Vec<Panel>,
}

/// A step while it is worked on.
///
/// Nobody waits for a worker that lost its core with nothing begun: it finds later what is left.
pub struct Step<'a> {
    pub isa: Isa,
    pub requests: &'a dyn Requests,
    pub tokens: usize,
    /// Experts that a token asks for
    pub at_most: usize,
    /// Of intermediate values of each expert
    pub blocks: usize,
    pub progress: &'a Progress,
    pub workers: Parts<'a, Worker>,
    /// Intermediate values, before that what gate gave: of each group of picks `[blocks, tokens]`
    pub hidden: Parts<'a, f32>,
    /// What up gave
    pub up: Parts<'a, f32>,
    pub hidden_integers: Option<(Integers, IntegerParts<'a>)>,
    /// `[layers, tokens, D]`
    pub out: Parts<'a, f32>,
}

impl Step<'_> {
    pub fn work(&self, worker: usize) {
        let _failed = OnPanic(&self.progress.failed);
        for layer in 0..self.requests.layers() {
            let asked = || self.is_asked(layer);
            let predicted = |token| self.requests.predicted(layer, token).is_some();
            let all_predicted = || (0..self.tokens).all(predicted);
            if !self.progress.wait(|| all_predicted() || asked()) {
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
        let count = self.requests.experts(layer).len();
        for token in 0..self.tokens {
            let asked = self.asked(layer, token);
            if let Some(id) = asked.ids.iter().find(|&&id| id as usize >= count) {
                return Err(BackendError::Other(format!(
                    "expert {id} of {count} was asked for"
                )));
            }
            if asked.ids.len() > self.at_most {
                return Err(BackendError::Other(format!(
                    "{} experts were asked for, at most {} can be",
                    asked.ids.len(),
                    self.at_most
                )));
            }
        }
        Ok(())
    }

    fn is_asked(&self, layer: usize) -> bool {
        (0..self.tokens).all(|token| self.requests.asked(layer, token).is_some())
    }

    fn asked(&self, layer: usize, token: usize) -> Asked<'_> {
        (self.requests.asked(layer, token)).expect("a request that is known")
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

    /// Brings this worker's share of what is predicted into its caches until the requests are there.
    pub fn fetch(&self, layer: usize, worker: usize) {
        for token in 0..self.tokens {
            for &id in self.requests.predicted(layer, token).unwrap_or(&[]) {
                if !self.fetch_expert(layer, id, worker) {
                    return;
                }
            }
        }
    }

    /// Whether to go on.
    fn fetch_expert(&self, layer: usize, id: i32, worker: usize) -> bool {
        let Some(expert) = self.requests.experts(layer).get(id as usize) else {
            return false;
        };
        for linear in [&expert.gate, &expert.up, &expert.down] {
            let Weights::Nf4Int16(tiles) = &linear.weights else {
                return false;
            };
            let rows = linear.tile_rows();
            let kblocks = tiles.range.len() / rows.max(1);
            let tiles = &tiles.arena[tiles.range.clone()];
            // As `Shares` will hand them out.
            let share = self.progress.up.paces().part(rows, worker);
            for tiles in tiles[share.start * kblocks..share.end * kblocks].chunks(4) {
                if self.is_asked(layer) {
                    return false;
                }
                touch(cast_slice(tiles));
            }
        }
        true
    }

    /// Takes part in all stages of a layer until nothing is left to begin.
    pub fn compute(&self, layer: usize, worker: usize) {
        if self.is_over(layer) {
            return;
        }
        let (isa, progress, round) = (self.isa, self.progress, self.round(layer));
        let experts = self.requests.experts(layer);
        // SAFETY: each worker has its own.
        let Worker { x, picks, panels } = unsafe { self.workers.item(worker) };
        picks.sort((0..self.tokens).map(|token| self.asked(layer, token)));
        let groups = picks.groups();
        let (rows, dim) = (experts[0].down.tile_rows(), experts[0].down.rows);
        if groups.is_empty() {
            // Nothing to share out.
            return progress.down.take(round, worker, 1, |_| {
                let start = layer * self.tokens * dim;
                // SAFETY: nobody else writes the layer's output.
                unsafe { self.out.slice(start..start + self.tokens * dim) }.fill(0.0);
                self.answer(round, layer);
            });
        }
        let mut values: [&[f32]; MAX_TOKENS] = [&[]; MAX_TOKENS];
        for (token, values) in values[..self.tokens].iter_mut().enumerate() {
            *values = self.asked(layer, token).x;
        }
        prepare(isa, x, &values[..self.tokens], &experts[0].gate);
        let x = few_tokens(x);
        panels.resize(picks.count().max(panels.len()), [0.0; TILE_ROWS]);
        // All experts' first rows come first: so a worker has the same rows of every expert,
        // whichever experts they are, and finds them where it fetched them.
        let count = groups.len();
        (progress.up).take(round, worker, 4 * self.blocks * count, |item| {
            let (tile_row, item) = (item / (2 * count), item % (2 * count));
            let group = &groups[item / 2];
            let expert = &experts[group.expert];
            let linear = [&expert.gate, &expert.up][item % 2];
            let panels = &mut panels[group.places()];
            linear.tile_row(isa, tile_row, x, picks.tokens(group), panels);
            self.keep_up(round, item, group, tile_row, panels);
        });
        progress.down.take(round, worker, rows, |tile_row| {
            for (i, group) in groups.iter().enumerate() {
                let done = || progress.blocks[i].get(round) == Some(self.blocks as u32);
                if !progress.wait(done) {
                    return;
                }
                // SAFETY: all blocks of this expert are done.
                let h = unsafe { self.intermediate(group) };
                let down = &experts[group.expert].down;
                let panels = &mut panels[group.places()];
                down.tile_row(isa, tile_row, h, group.numbers(), panels);
            }
            let first = tile_row * TILE_ROWS;
            let last = dim.min(first + TILE_ROWS);
            for token in 0..self.tokens {
                let mut sum = [[0.0; TILE_ROWS]];
                for &(place, weight) in picks.of_token(token) {
                    let panel = &panels[place..=place];
                    add_weighted(isa, panel, &[0], &[weight], &mut sum);
                }
                let start = (layer * self.tokens + token) * dim;
                // SAFETY: each item has output rows of its own.
                let out = unsafe { self.out.slice(start + first..start + last) };
                out.copy_from_slice(&sum[0][..last - first]);
            }
            if (progress.rows.fetch_add(1, Ordering::AcqRel) + 1).is_multiple_of(rows) {
                self.answer(round, layer);
            }
        });
    }

    fn answer(&self, round: u32, layer: usize) {
        self.progress.over.store(round, Ordering::Release);
        self.requests.answered(layer);
    }

    /// The values of a group's block, token by token.
    fn block_of(&self, group: &Group, block: usize) -> Range<usize> {
        let places = group.places();
        let start = places.start * self.blocks + block * places.len();
        start..start + places.len()
    }

    /// Keeps 32 rows of gate, or for odd `item` of up, of group number `item / 2`.
    fn keep_up(&self, round: u32, item: usize, group: &Group, tile_row: usize, panels: &[Panel]) {
        let out = [&self.hidden, &self.up][item % 2];
        let block = tile_row / 2;
        for (at, panel) in self.block_of(group, block).zip(panels) {
            let start = at * TILE_COLS + tile_row % 2 * TILE_ROWS;
            // SAFETY: every item has its own quarters of blocks.
            unsafe { out.slice(start..start + TILE_ROWS) }.copy_from_slice(panel);
        }
        // The last of four quarters sees the others' values.
        let quarters = &self.progress.quarters[item / 2 * self.blocks + block];
        if quarters.fetch_add(1, Ordering::AcqRel) % 4 == 3 {
            for at in self.block_of(group, block) {
                // SAFETY: all are written, and a block is finished once.
                unsafe { self.finish(at) };
            }
            self.progress.blocks[item / 2].add(round);
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
    /// All blocks of the group must be done.
    unsafe fn intermediate(&self, group: &Group) -> View<'_> {
        let places = group.places();
        let range = places.start * self.blocks..places.end * self.blocks;
        let values = range.start * TILE_COLS..range.end * TILE_COLS;
        // SAFETY: nobody writes them any more.
        unsafe {
            let blocks = self.hidden.shared(values).as_chunks().0;
            match &self.hidden_integers {
                Some((_, integers)) => integers.view(places.len(), blocks, range),
                None => View::of_blocks(places.len(), blocks),
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
