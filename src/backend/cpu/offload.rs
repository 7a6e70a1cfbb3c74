//! The experts that a GPU leaves to the CPU, of one token or of a few at once, computed where they lie
//! in RAM: an expert that several tokens picked is read once.
//!
//! One job of the pool per step. In each layer workers go from stage to stage on their own:
//!
//! ```text
//! fetch         what will probably be asked for, each worker its share, until the request is there
//! gate, up      32 rows of an expert at a time
//! down          32 rows of the sum at a time, waiting for each expert's intermediate values
//! answer        by whoever finishes the last rows
//! ```
//!
//! So nobody stands still but for what is really missing, and nobody waits for a worker that lost its
//! core between items: a job of the pool costs 4 us on 16 cores, and a decode step has 48 layers. Sums
//! have the same order for any number of workers, and for a token whoever shares its step.

mod layer;
mod picks;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::CpuPrecision;
use super::activations::{Activations, Block, IntegerBlocks};
use super::byte_rows::ByteRowsView;
use super::experts::{Buffers, add_picks};
pub use super::experts::{Expert, Pick};
use super::isa::Isa;
use super::layout::{TILE_COLS, Tile};
use super::linear::{Linear, View, Weights, add_product};
use super::load;
use super::memory::Huge;
use super::rms_norm::rms_norm;
use super::threads::{Parts, Pool};
use crate::backend::{BackendError, ExpertWeights, Result};
use layer::{OnPanic, Progress, Step, Worker};
use picks::ALL_TOKENS;

/// All routed experts of a layer.
pub struct LayerExperts {
    pub experts: Vec<Expert>,
    /// Where their tiles lie, expert after expert and gate, up, down each; `None` if they are not
    /// all in integer NF4 tiles.
    pub arena: Option<Arc<Huge<Tile<u16>>>>,
}

/// Packs the experts of a layer into memory of their own.
///
/// # Errors
/// If memory is short.
pub fn load_layer(
    pool: &mut Pool,
    experts: &[ExpertWeights],
    precision: CpuPrecision,
) -> Result<LayerExperts> {
    let requests: Vec<load::Request> = experts
        .iter()
        .flat_map(|e| [&e.gate_proj, &e.up_proj, &e.down_proj])
        .map(|matrix| (matrix, precision))
        .collect();
    let mut linears = load::load(pool, &requests)?.into_iter();
    let mut next = || linears.next().expect("a matrix for each request");
    let experts: Vec<Expert> = experts
        .iter()
        .map(|_| Expert {
            gate: next(),
            up: next(),
            down: next(),
        })
        .collect();
    let all_tiles = (experts.iter())
        .flat_map(|e| [&e.gate, &e.up, &e.down])
        .all(|l| matches!(l.weights, Weights::Nf4Int16(_)));
    let arena = match experts.first().map(|e| &e.gate.weights) {
        Some(Weights::Nf4Int16(tiles)) if all_tiles => Some(Arc::clone(&tiles.arena)),
        _ => None,
    };
    Ok(LayerExperts { experts, arena })
}

/// Tokens that a step has at most.
pub const MAX_TOKENS: usize = 8;

/// What is asked of the CPU in one step, layer by layer, as it becomes known. Workers look on from
/// all sides, some of them at layers that are over.
pub trait Requests: Sync {
    fn layers(&self) -> usize;

    /// At least one, at most [`MAX_TOKENS`].
    fn tokens(&self) -> usize;

    /// Of one size in all layers.
    fn experts(&self, layer: usize) -> &[Expert];

    /// Experts that will probably be asked for, once that is known.
    fn predicted(&self, layer: usize, token: usize) -> Option<&[i32]>;

    /// What is asked, once it is known. No layer asks before the one before it is answered.
    fn asked(&self, layer: usize, token: usize) -> Option<Asked<'_>>;

    /// Called once for each layer, by any worker, when the answer for all tokens is complete.
    fn answered(&self, layer: usize);
}

/// `sum_i weights[i] * experts[ids[i]](x)`, summed in order of `i`.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub ids: &'a [i32],
    pub weights: &'a [f32],
    /// `[D]`, normed
    pub x: &'a [f32],
}

/// A request that is known from the start, and whose answer is seen when the call returns.
struct AtOnce<'a> {
    experts: &'a [Expert],
    asked: &'a [Asked<'a>],
}

impl Requests for AtOnce<'_> {
    fn layers(&self) -> usize {
        1
    }

    fn tokens(&self) -> usize {
        self.asked.len()
    }

    fn experts(&self, _: usize) -> &[Expert] {
        self.experts
    }

    fn predicted(&self, _: usize, _: usize) -> Option<&[i32]> {
        None
    }

    fn asked(&self, _: usize, token: usize) -> Option<Asked<'_>> {
        Some(self.asked[token])
    }

    fn answered(&self, _: usize) {}
}

/// See [`Offload::answer`].
pub type Wait<'a> = dyn FnMut(usize, &dyn Fn()) -> Result<()> + 'a;

/// Workers and buffers for one step at a time.
pub struct Offload {
    isa: Isa,
    pool: Pool,
    workers: Vec<Worker>,
    hidden: Vec<Block>,
    up: Vec<Block>,
    hidden_integers: IntegerBlocks,
    progress: Progress,
    many: Many,
}

/// Buffers for picks of many tokens.
#[derive(Default)]
struct Many {
    x: Activations,
    /// 0, 1, 2, ..
    all_tokens: Vec<u32>,
    buffers: Buffers,
}

impl Offload {
    /// # Errors
    /// If threads cannot be started.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let pool = Pool::new(threads)?;
        Ok(Offload {
            isa: Isa::detect()?,
            workers: (0..pool.threads()).map(|_| Worker::default()).collect(),
            hidden: Vec::new(),
            up: Vec::new(),
            hidden_integers: IntegerBlocks::default(),
            progress: Progress::new(pool.paces()),
            many: Many::default(),
            pool,
        })
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Writes what each token asks of `experts` to `out`, `[tokens, D]`.
    ///
    /// # Errors
    /// An id out of range, or a panic in a worker.
    pub fn compute(&mut self, experts: &[Expert], asked: &[Asked], out: &mut [f32]) -> Result<()> {
        let requests = AtOnce { experts, asked };
        let at_most = asked.iter().map(|asked| asked.ids.len()).max();
        self.answer(&requests, at_most.unwrap_or(0), &mut |_, _| Ok(()), out)
    }

    /// Waits for the requests of a step and writes the answers to `out`, `[layers, tokens, D]`.
    /// Meanwhile workers bring what is predicted into the caches where they will need it.
    ///
    /// - `at_most`: experts in a token's request
    /// - `wait(layer, fetch)`: returns when all tokens' requests of the layer are there, its error ends the
    ///   call; may use the time by calling `fetch`, which fetches this thread's share and returns when they
    ///   are there or all is fetched
    ///
    /// # Errors
    /// An id out of range, more experts than `at_most`, a panic in a worker, or that of `wait`. Of the
    /// layers from there on none is completed then, unless its request arrives before the workers see
    /// the error.
    pub fn answer(
        &mut self,
        requests: &dyn Requests,
        at_most: usize,
        wait: &mut Wait,
        out: &mut [f32],
    ) -> Result<()> {
        let layers = requests.layers();
        if layers == 0 || (0..layers).any(|layer| requests.experts(layer).is_empty()) {
            return Err(BackendError::Other(
                "a layer without experts was asked".into(),
            ));
        }
        let tokens = requests.tokens();
        assert!((1..=MAX_TOKENS).contains(&tokens));
        let first = &requests.experts(0)[0];
        let (isa, blocks) = (self.isa, first.blocks());
        assert_eq!(out.len(), layers * tokens * first.down.rows);
        let integers = first.down.reads_integers();
        let picks = at_most * tokens;
        self.hidden.resize(picks * blocks, [0.0; TILE_COLS]);
        self.up.resize(picks * blocks, [0.0; TILE_COLS]);
        self.hidden_integers.resize(isa, picks * blocks, integers);
        self.progress.begin(picks, blocks);
        let step = Step {
            isa,
            requests,
            tokens,
            at_most,
            blocks,
            progress: &self.progress,
            workers: Parts::new(&mut self.workers),
            hidden: Parts::new(self.hidden.as_flattened_mut()),
            up: Parts::new(self.up.as_flattened_mut()),
            hidden_integers: integers.map(|kind| (kind, self.hidden_integers.parts())),
            out: Parts::new(out),
        };
        let own = || {
            let _failed = OnPanic(&step.progress.failed);
            let result = (0..layers).try_for_each(|layer| {
                wait(layer, &|| step.fetch(layer, 0))?;
                step.check(layer)?;
                step.compute(layer, 0);
                match step.finish_layer(layer) {
                    true => Ok(()),
                    // Its panic is reported in place of this.
                    false => Err(BackendError::Other("a worker gave up".into())),
                }
            });
            if result.is_err() {
                step.progress.failed.store(true, Ordering::Relaxed);
            }
            result
        };
        let result = self.pool.beside(&|worker| step.work(worker), own);
        self.progress.rounds = self.progress.rounds.wrapping_add(layers as u32);
        result?
    }

    /// Writes to `out`, `[T, D]`, what `picks` ask of `experts`, each of which meets all of its tokens at
    /// once; picks in ascending order of tokens.
    ///
    /// - `rows`: `[T]`, where each token is in `x`
    /// - `x`: `[.., D]`, normed
    /// - `beside`: runs on this thread while the others begin
    ///
    /// # Errors
    /// A panic in a worker, or that of `beside`.
    pub fn compute_picks(
        &mut self,
        experts: &[Expert],
        picks: &[Pick],
        rows: &[u32],
        x: &[f32],
        beside: impl FnOnce() -> Result<()>,
        out: &mut [f32],
    ) -> Result<()> {
        let Some(first) = experts.first().filter(|_| !picks.is_empty()) else {
            out.fill(0.0);
            return beside();
        };
        let (cols, isa, tokens) = (first.gate.cols, self.isa, rows.len());
        let have = self.many.all_tokens.len();
        (self.many.all_tokens).extend(have as u32..tokens.max(have) as u32);
        let Many {
            x: activations,
            all_tokens,
            buffers,
        } = &mut self.many;
        let integers = first.gate.reads_integers();
        let out = Parts::new(out);
        activations.fill(&mut self.pool, isa, tokens, cols, integers, &|t, row| {
            let first = rows[t] as usize * cols;
            row.copy_from_slice(&x[first..first + cols]);
            // SAFETY: of each token once.
            unsafe { out.slice(t * cols..(t + 1) * cols).fill(0.0) };
        })?;
        let out = out.into_inner();
        add_picks(
            &mut self.pool,
            isa,
            experts,
            picks,
            activations,
            all_tokens,
            buffers,
            beside,
            out,
        )
    }

    /// `out = linear norm(hidden)`: the output head of some tokens, which is read once.
    ///
    /// - `hidden`: `[tokens, D]`, up to [`MAX_TOKENS`]
    /// - `scale`: `[D]`, the norm's scale as a factor
    /// - `out`: `[tokens, rows]`
    ///
    /// # Errors
    /// A panic in a worker.
    pub fn head(
        &mut self,
        linear: &Linear,
        hidden: &[f32],
        scale: &[f32],
        eps: f32,
        out: &mut [f32],
    ) -> Result<()> {
        let mut normed = vec![0.0; hidden.len()];
        let dim = scale.len();
        for (hidden, normed) in hidden.chunks(dim).zip(normed.chunks_mut(dim)) {
            rms_norm(self.isa, hidden, scale, eps, normed);
        }
        let x = &mut self.workers[0].x;
        let tokens: Vec<&[f32]> = normed.chunks(dim).collect();
        prepare(self.isa, x, &tokens, linear);
        out.fill(0.0);
        add_product(
            &mut self.pool,
            self.isa,
            linear,
            few_tokens(x),
            &ALL_TOKENS,
            out,
        )
    }
}

/// A few tokens, without the rows for tiles of AMX, which are for many.
fn few_tokens(x: &Activations) -> View<'_> {
    View {
        rows: ByteRowsView::default(),
        ..x.view()
    }
}

/// Cuts each token's values into blocks, and quantises them as `linear` reads them.
fn prepare(isa: Isa, x: &mut Activations, tokens: &[&[f32]], linear: &Linear) {
    let integers = linear.reads_integers();
    x.resize(isa, tokens.len(), linear.cols, integers);
    for (token, values) in tokens.iter().enumerate() {
        let blocks = x.blocks[token..].iter_mut().step_by(tokens.len());
        for (block, values) in blocks.zip(values.chunks(TILE_COLS)) {
            block[..values.len()].copy_from_slice(values);
            block[values.len()..].fill(0.0);
        }
    }
    if let Some(kind) = integers {
        let quantized = x.integers.parts();
        for (i, block) in x.blocks.iter().enumerate() {
            // SAFETY: one thread.
            unsafe { quantized.quantize(isa, kind, i, block) };
        }
    }
}

#[cfg(test)]
mod tests;
