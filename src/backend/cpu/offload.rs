//! The experts of one token that a GPU leaves to the CPU, computed where they lie in RAM.
//!
//! One job of the pool per token. In each layer workers go from stage to stage on their own:
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
//! have the same order for any number of workers.

mod layer;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::CpuPrecision;
use super::activations::{Activations, Block, IntegerBlocks};
use super::experts::{Buffers, add_picks};
pub use super::experts::{Expert, Pick};
use super::isa::Isa;
use super::layout::{TILE_COLS, Tile};
use super::linear::{Linear, Weights, add_product};
use super::load;
use super::memory::Huge;
use super::rms_norm::rms_norm;
use super::threads::{Parts, Pool};
use crate::backend::{BackendError, ExpertWeights, Result};
use layer::{OnPanic, Progress, Token};

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

/// What is asked of the CPU for one token, layer by layer, as it becomes known. Workers look on from
/// all sides, some of them at layers that are over.
pub trait Requests: Sync {
    fn layers(&self) -> usize;

    /// Of one size in all layers.
    fn experts(&self, layer: usize) -> &[Expert];

    /// Experts that will probably be asked for, once that is known.
    fn predicted(&self, layer: usize) -> Option<&[i32]>;

    /// What is asked, once it is known. No layer asks before the one before it is answered.
    fn asked(&self, layer: usize) -> Option<Asked<'_>>;

    /// Called once for each layer, by any worker, when the answer is complete.
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
    asked: Asked<'a>,
}

impl Requests for AtOnce<'_> {
    fn layers(&self) -> usize {
        1
    }

    fn experts(&self, _: usize) -> &[Expert] {
        self.experts
    }

    fn predicted(&self, _: usize) -> Option<&[i32]> {
        None
    }

    fn asked(&self, _: usize) -> Option<Asked<'_>> {
        Some(self.asked)
    }

    fn answered(&self, _: usize) {}
}

/// See [`Offload::answer`].
pub type Wait<'a> = dyn FnMut(usize, &dyn Fn()) -> Result<()> + 'a;

/// Workers and buffers for one token at a time.
pub struct Offload {
    isa: Isa,
    pool: Pool,
    /// Of each worker, which is quicker than waiting for one that makes it for all
    x: Vec<Activations>,
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
            x: (0..pool.threads())
                .map(|_| Activations::default())
                .collect(),
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

    /// Writes what `asked` asks of `experts` to `out`, `[D]`.
    ///
    /// # Errors
    /// An id out of range, or a panic in a worker.
    pub fn compute(&mut self, experts: &[Expert], asked: Asked, out: &mut [f32]) -> Result<()> {
        let requests = AtOnce { experts, asked };
        self.answer(&requests, asked.ids.len(), &mut |_, _| Ok(()), out)
    }

    /// Waits for the requests of a token and writes the answers to `out`, `[layers, D]`. Meanwhile
    /// workers bring what is predicted into the caches where they will need it.
    ///
    /// - `at_most`: experts in a request
    /// - `wait(layer, fetch)`: returns when the layer's request is there, its error ends the call; may use
    ///   the time by calling `fetch`, which fetches this thread's share and returns when the request is
    ///   there or all is fetched
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
        let first = &requests.experts(0)[0];
        let (isa, blocks) = (self.isa, first.blocks());
        assert_eq!(out.len(), layers * first.down.rows);
        let integers = first.down.reads_integers();
        self.hidden.resize(at_most * blocks, [0.0; TILE_COLS]);
        self.up.resize(at_most * blocks, [0.0; TILE_COLS]);
        self.hidden_integers.resize(isa, at_most * blocks, integers);
        self.progress.begin(at_most, blocks);
        let token = Token {
            isa,
            requests,
            at_most,
            blocks,
            progress: &self.progress,
            x: Parts::new(&mut self.x),
            hidden: Parts::new(self.hidden.as_flattened_mut()),
            up: Parts::new(self.up.as_flattened_mut()),
            hidden_integers: integers.map(|kind| (kind, self.hidden_integers.parts())),
            out: Parts::new(out),
        };
        let own = || {
            let _failed = OnPanic(&token.progress.failed);
            let result = (0..layers).try_for_each(|layer| {
                wait(layer, &|| token.fetch(layer, 0))?;
                token.check(layer)?;
                token.compute(layer, 0);
                match token.finish_layer(layer) {
                    true => Ok(()),
                    // Its panic is reported in place of this.
                    false => Err(BackendError::Other("a worker gave up".into())),
                }
            });
            if result.is_err() {
                token.progress.failed.store(true, Ordering::Relaxed);
            }
            result
        };
        let result = self.pool.beside(&|worker| token.work(worker), own);
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

    /// `out = linear norm(hidden)`: the output head of one token.
    ///
    /// - `hidden`, `scale`: `[D]`, the norm's scale as a factor
    /// - `out`: `[rows]`
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
        rms_norm(self.isa, hidden, scale, eps, &mut normed);
        let x = &mut self.x[0];
        prepare(self.isa, x, &normed, linear);
        out.fill(0.0);
        add_product(&mut self.pool, self.isa, linear, x.view(), &[0], out)
    }
}

/// Cuts `values` into blocks, and quantises them as `linear` reads them.
fn prepare(isa: Isa, x: &mut Activations, values: &[f32], linear: &Linear) {
    let integers = linear.reads_integers();
    x.resize(isa, 1, values.len(), integers);
    let padded = x.blocks.as_flattened_mut();
    padded[..values.len()].copy_from_slice(values);
    padded[values.len()..].fill(0.0);
    if let Some(kind) = integers {
        let quantized = x.integers.parts();
        for (i, block) in x.blocks.iter().enumerate() {
            // SAFETY: one thread.
            unsafe { quantized.quantize(isa, kind, i, block) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::backend::Routing;
    use crate::backend::cpu::experts::add_experts;
    use crate::backend::cpu::tests::{random_nf4, random_vector};

    fn layer(count: usize, dim: usize, inner: usize) -> Vec<ExpertWeights> {
        (0..count as u64)
            .map(|e| ExpertWeights {
                gate_proj: random_nf4(inner, dim, 3 * e),
                up_proj: random_nf4(inner, dim, 3 * e + 1),
                down_proj: random_nf4(dim, inner, 3 * e + 2),
            })
            .collect()
    }

    /// The same sum through the batched path, as the difference to a block without routed experts.
    #[test]
    fn offloaded_experts_give_what_the_batched_path_gives() {
        for (count, dim, inner) in [(4, 64, 64), (6, 128, 192), (16, 256, 64)] {
            for threads in [1, 2] {
                let mut offload = Offload::new(Some(threads)).unwrap();
                let weights = layer(count, dim, inner);
                let layer = load_layer(offload.pool(), &weights, CpuPrecision::Int16).unwrap();
                assert!(layer.arena.is_some());
                let mut shared = load_layer(offload.pool(), &weights[..1], CpuPrecision::Int16)
                    .unwrap()
                    .experts;
                let x = random_vector(dim, 5);
                let ids = [count as i32 - 1, 0, 2];
                let topk_weights = vec![0.5, 0.3, 0.2];
                let mut out = vec![f32::NAN; dim];
                for _ in 0..2 {
                    let asked = Asked {
                        ids: &ids,
                        weights: &topk_weights,
                        x: &x,
                    };
                    offload.compute(&layer.experts, asked, &mut out).unwrap();
                }
                let routing = Routing {
                    num_experts_per_tok: 3,
                    topk_ids: ids.iter().map(|&id| id as u16).collect(),
                    topk_weights,
                };
                let mut expected = vec![0.0; dim];
                let shared = shared.remove(0);
                let isa = offload.isa();
                add_experts(
                    &mut offload.pool,
                    isa,
                    &layer.experts,
                    &shared,
                    &routing,
                    &[0.0],
                    &offload.x[0],
                    &[0],
                    &mut Buffers::default(),
                    &mut expected,
                )
                .unwrap();
                for (a, b) in out.iter().zip(&expected) {
                    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} for {b}");
                }
            }
        }
    }

    #[test]
    fn no_experts_are_zero_and_unknown_ones_an_error() {
        let mut offload = Offload::new(Some(1)).unwrap();
        let layer = load_layer(offload.pool(), &layer(2, 64, 64), CpuPrecision::Int16).unwrap();
        let mut out = vec![1.0; 64];
        let x = vec![0.0; 64];
        let asked = |ids, weights| Asked {
            ids,
            weights,
            x: &x,
        };
        offload
            .compute(&layer.experts, asked(&[], &[]), &mut out)
            .unwrap();
        assert!(out.iter().all(|&v| v == 0.0));
        let unknown = offload.compute(&layer.experts, asked(&[2], &[1.0]), &mut out);
        assert!(unknown.is_err());
        let many = asked(&[0, 1], &[1.0, 1.0]);
        let many = AtOnce {
            experts: &layer.experts,
            asked: many,
        };
        let too_many = offload.answer(&many, 1, &mut |_, _| Ok(()), &mut out);
        assert!(too_many.is_err());
    }

    #[test]
    fn after_a_panic_within_a_layer_the_next_token_is_exact() {
        for threads in [1, 2] {
            let mut offload = Offload::new(Some(threads)).unwrap();
            let mut load = |weights: &[ExpertWeights]| {
                load_layer(offload.pool(), weights, CpuPrecision::Int16)
                    .unwrap()
                    .experts
            };
            let experts = load(&layer(2, 128, 64));
            // A matrix that claims more rows than it has tiles: its second tile row panics, with the
            // expert's first one done.
            let mut broken = load(&layer(2, 128, 64));
            broken[1].up = load(&layer(1, 128, 32)).remove(0).up;
            broken[1].up.rows = 64;
            let x = random_vector(128, 5);
            let asked = Asked {
                ids: &[0, 1],
                weights: &[0.6, 0.4],
                x: &x,
            };
            let (mut expected, mut out) = (vec![0.0; 128], vec![0.0; 128]);
            offload.compute(&experts, asked, &mut expected).unwrap();
            for _ in 0..10 {
                let error = offload.compute(&broken, asked, &mut out).unwrap_err();
                assert!(error.to_string().contains("panicked"), "{error}");
                out.fill(f32::NAN);
                offload.compute(&experts, asked, &mut out).unwrap();
                assert_eq!(out, expected);
            }
        }
    }

    /// Asks after a while, as a GPU does, and for the next layer once this one is answered.
    struct Later<'a> {
        experts: &'a [Expert],
        asked: Asked<'a>,
        /// Layers that are requested; the GPU stalls before it requests the next one.
        requested: usize,
        looks: [AtomicUsize; 5],
        answers: [AtomicUsize; 5],
    }

    impl Later<'_> {
        /// Whether `layer` was looked at so often since the one before it was answered.
        fn is_time(&self, layer: usize, looks: usize) -> bool {
            let answers = |layer: usize| self.answers[layer].load(Ordering::Acquire);
            let may_ask = layer == 0 || answers(layer - 1) > 0;
            may_ask && self.looks[layer].fetch_add(1, Ordering::AcqRel) > looks
        }
    }

    impl Requests for Later<'_> {
        fn layers(&self) -> usize {
            self.answers.len()
        }

        fn experts(&self, _: usize) -> &[Expert] {
            self.experts
        }

        fn predicted(&self, layer: usize) -> Option<&[i32]> {
            // An expert that does not exist must be no worse than one that is not asked for.
            self.is_time(layer, 10).then_some(&[1, 0, 99])
        }

        fn asked(&self, layer: usize) -> Option<Asked<'_>> {
            (layer < self.requested && self.is_time(layer, 100)).then_some(self.asked)
        }

        fn answered(&self, layer: usize) {
            self.answers[layer].fetch_add(1, Ordering::AcqRel);
        }
    }

    #[test]
    fn requests_are_answered_once_and_an_error_while_waiting_ends_the_token() {
        for threads in [1, 2] {
            let mut offload = Offload::new(Some(threads)).unwrap();
            let layer =
                load_layer(offload.pool(), &layer(3, 128, 64), CpuPrecision::Int16).unwrap();
            let x = random_vector(128, 5);
            let mut expected = vec![0.0; 128];
            let mut out = vec![0.0; 5 * 128];
            let asked = Asked {
                ids: &[2, 0],
                weights: &[0.6, 0.4],
                x: &x,
            };
            (offload.compute(&layer.experts, asked, &mut expected)).unwrap();
            for round in 0..200 {
                let stands_still = round % 4;
                let later = Later {
                    experts: &layer.experts,
                    asked,
                    requested: stands_still,
                    looks: Default::default(),
                    answers: Default::default(),
                };
                let mut wait = |layer: usize, fetch: &dyn Fn()| {
                    if layer == stands_still {
                        return Err(BackendError::Other("the GPU stands still".into()));
                    }
                    fetch();
                    while later.asked(layer).is_none() {}
                    Ok(())
                };
                out.fill(f32::NAN);
                let answer = offload.answer(&later, 4, &mut wait, &mut out);
                assert!(answer.is_err());
                let answered: Vec<usize> = later
                    .answers
                    .iter()
                    .map(|a| a.load(Ordering::Relaxed))
                    .collect();
                for (layer, out) in out.chunks_exact(128).enumerate() {
                    let is_answered = layer < stands_still;
                    assert_eq!(answered[layer], usize::from(is_answered), "layer {layer}");
                    assert!(!is_answered || out == expected, "layer {layer}");
                }
                let later = Later {
                    requested: 5,
                    answers: Default::default(),
                    looks: Default::default(),
                    ..later
                };
                let mut wait = |layer: usize, _: &dyn Fn()| {
                    while later.asked(layer).is_none() {}
                    Ok(())
                };
                offload.answer(&later, 4, &mut wait, &mut out).unwrap();
                assert!(out.chunks_exact(128).all(|out| out == expected));
                assert!(later.answers.iter().all(|a| a.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
