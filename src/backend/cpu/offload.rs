//! The experts of one token that a GPU leaves to the CPU, computed where they lie in RAM.
//!
//! Two jobs of the pool per layer, as in [`experts`](super::experts), but cut finer: a decode step
//! has few experts, and sixteen workers want equal shares of them. Sums have the same order for any
//! number of workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::cast_slice;

use super::activations::{Activations, Block, IntegerBlocks};
use super::experts::{Expert, add_weighted, swiglu};
use super::isa::Isa;
use super::layout::{TILE_COLS, TILE_ROWS, Tile};
use super::linear::{Linear, Panel, View, Weights, add_product};
use super::load::{self, Request};
use super::memory::Huge;
use super::rms_norm::rms_norm;
use super::threads::{Parts, Pool};
use super::{CpuPrecision, layout};
use crate::backend::{BackendError, ExpertWeights, Result};

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
    let requests: Vec<Request> = experts
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

/// Workers and buffers for one token at a time.
pub struct Offload {
    isa: Isa,
    pool: Pool,
    x: Activations,
    hidden: Vec<Block>,
    hidden_integers: IntegerBlocks,
    /// Halves of each block of `hidden` that are done
    halves: Vec<AtomicU32>,
}

impl Offload {
    /// # Errors
    /// If threads cannot be started.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Ok(Offload {
            isa: Isa::detect()?,
            pool: Pool::new(threads)?,
            x: Activations::default(),
            hidden: Vec::new(),
            hidden_integers: IntegerBlocks::default(),
            halves: Vec::new(),
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

    /// `out = sum_i weights[i] * experts[ids[i]](x)`, summed in order of `i`.
    ///
    /// - `x`: `[D]`, normed
    /// - `out`: `[D]`
    ///
    /// # Errors
    /// An id out of range, or a panic in a worker.
    pub fn compute(
        &mut self,
        experts: &[Expert],
        ids: &[i32],
        weights: &[f32],
        x: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        if ids.is_empty() {
            out.fill(0.0);
            return Ok(());
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= experts.len()) {
            let count = experts.len();
            return Err(BackendError::Other(format!(
                "expert {id} of {count} was asked for"
            )));
        }
        let chosen: Vec<&Expert> = ids.iter().map(|&id| &experts[id as usize]).collect();
        let isa = self.isa;
        self.set_x(x, &chosen[0].gate);

        let blocks = chosen.iter().map(|e| e.blocks()).max().unwrap_or(0);
        let integers = chosen[0].down.reads_integers();
        self.hidden.resize(ids.len() * blocks, [0.0; TILE_COLS]);
        self.hidden_integers
            .resize(isa, ids.len() * blocks, integers);
        self.halves
            .resize_with(ids.len() * blocks, AtomicU32::default);
        let view = self.x.view();
        {
            let hidden = Parts::new(self.hidden.as_flattened_mut());
            let quantized = self.hidden_integers.parts();
            let halves = &self.halves;
            // All experts' first rows come first: so a worker has the same rows of every expert,
            // whichever experts they are, and finds them where it prefetched them.
            self.pool.run(2 * blocks * ids.len(), &|item| {
                let (tile_row, i) = (item / chosen.len(), item % chosen.len());
                let (block, half) = (i * blocks + tile_row / 2, tile_row % 2);
                let expert = chosen[i];
                let start = block * TILE_COLS + half * TILE_ROWS;
                // SAFETY: every item has its own half of a block.
                let out = unsafe { hidden.slice(start..start + TILE_ROWS) };
                gate_and_up(isa, expert, tile_row, view, out);
                // The second of two halves sees the first one's values.
                if halves[block].fetch_add(1, Ordering::AcqRel) == 1 {
                    halves[block].store(0, Ordering::Relaxed);
                    let whole = block * TILE_COLS..(block + 1) * TILE_COLS;
                    // SAFETY: both halves are written, and nobody else looks at them in this job.
                    let whole = unsafe { hidden.slice(whole) };
                    if let Some(kind) = integers {
                        let whole: &Block = (&*whole).try_into().expect("a block");
                        // SAFETY: a block is finished once.
                        unsafe { quantized.quantize(isa, kind, block, whole) };
                    }
                }
            })?;
        }
        let rows = chosen[0].down.rows;
        assert_eq!(out.len(), rows);
        let out = Parts::new(out);
        let (hidden, integers) = (&self.hidden, &self.hidden_integers);
        self.pool.run(chosen[0].down.tile_rows(), &|tile_row| {
            let mut sum = [[0.0; TILE_ROWS]];
            for (i, expert) in chosen.iter().enumerate() {
                let range = i * blocks..i * blocks + expert.blocks();
                let h = integers.view(1, hidden, range);
                let mut c = [[0.0; TILE_ROWS]];
                expert.down.tile_row(isa, tile_row, h, &[0], &mut c);
                add_weighted(isa, &c, &[0], &weights[i..i + 1], &mut sum);
            }
            let first = tile_row * TILE_ROWS;
            let last = rows.min(first + TILE_ROWS);
            // SAFETY: each item has output rows of its own.
            let out = unsafe { out.slice(first..last) };
            out.copy_from_slice(&sum[0][..last - first]);
        })
    }

    /// Brings experts that will probably be asked for into the caches of the workers that will
    /// compute them, until `enough` says so.
    ///
    /// # Errors
    /// A panic in a worker.
    pub fn prefetch(
        &mut self,
        experts: &[Expert],
        ids: &[i32],
        enough: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let workers = self.pool.threads();
        self.pool.run(workers, &|worker| {
            for expert in ids.iter().filter_map(|&id| experts.get(id as usize)) {
                for linear in [&expert.gate, &expert.up, &expert.down] {
                    let Weights::Nf4Int16(tiles) = &linear.weights else {
                        return;
                    };
                    let rows = linear.tile_rows();
                    let kblocks = tiles.range.len() / rows.max(1);
                    let share = worker * rows / workers..(worker + 1) * rows / workers;
                    let tiles = &tiles.arena[tiles.range.clone()];
                    for tiles in tiles[share.start * kblocks..share.end * kblocks].chunks(4) {
                        if enough() {
                            return;
                        }
                        touch(cast_slice(tiles));
                    }
                }
            }
        })
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
        let mut x = vec![0.0; hidden.len()];
        rms_norm(self.isa, hidden, scale, eps, &mut x);
        self.set_x(&x, linear);
        out.fill(0.0);
        add_product(&mut self.pool, self.isa, linear, self.x.view(), &[0], out)
    }

    /// Cuts `x` into blocks, and quantises them as `linear` reads them.
    fn set_x(&mut self, x: &[f32], linear: &Linear) {
        let integers = linear.reads_integers();
        self.x.resize(self.isa, 1, x.len(), integers);
        let values = self.x.blocks.as_flattened_mut();
        values[..x.len()].copy_from_slice(x);
        values[x.len()..].fill(0.0);
        if let Some(kind) = integers {
            let quantized = self.x.integers.parts();
            for (i, block) in self.x.blocks.iter().enumerate() {
                // SAFETY: one thread.
                unsafe { quantized.quantize(self.isa, kind, i, block) };
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
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        std::hint::black_box(line[0]);
    }
}

/// 32 intermediate values: `silu(gate x) * up x` of rows `32 tile_row ..`.
fn gate_and_up(isa: Isa, expert: &Expert, tile_row: usize, x: View, out: &mut [f32]) {
    let (mut gate, mut up): ([Panel; 1], [Panel; 1]) = Default::default();
    expert.gate.tile_row(isa, tile_row, x, &[0], &mut gate);
    expert.up.tile_row(isa, tile_row, x, &[0], &mut up);
    let mut block = [[0.0; layout::TILE_COLS]];
    swiglu(isa, &gate, &up, 0, &mut block);
    out.copy_from_slice(&block[0][..TILE_ROWS]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Routing;
    use crate::backend::cpu::experts::{Buffers, add_experts};
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
                    offload
                        .compute(&layer.experts, &ids, &topk_weights, &x, &mut out)
                        .unwrap();
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
                    &offload.x,
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
        offload
            .compute(&layer.experts, &[], &[], &x, &mut out)
            .unwrap();
        assert!(out.iter().all(|&v| v == 0.0));
        assert!(
            offload
                .compute(&layer.experts, &[2], &[1.0], &x, &mut out)
                .is_err()
        );
    }
}
