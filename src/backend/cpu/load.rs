//! From the checkpoint's matrices to the kernels' form, by all workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use half::bf16;

use super::CpuPrecision;
use super::activations::Integers;
use super::layout::{Absmax, TILE_COLS, TILE_ROWS, Tile, pack_tile_row, tile_count};
use super::linear::{Linear, Tiles, Weights};
use super::memory::Huge;
use super::simd::Weight;
use super::threads::{Parts, Pool};
use crate::backend::Result;
use crate::formats::nf4::Nf4Matrix;
use crate::formats::{Dtype, Matrix};

/// Tile rows that a worker packs at a time.
const ROWS_PER_JOB: usize = 4;

/// Matrices below this many rows are widened to f32: padding them to 32 rows would cost more.
const MIN_NF4_ROWS: usize = 16;

/// A matrix and the precision to compute with.
pub type Request<'a> = (&'a Matrix, CpuPrecision);

/// Where the time of loading goes, added up over workers.
#[derive(Default)]
pub struct Clock {
    read_ns: AtomicU64,
    pack_ns: AtomicU64,
}

impl Clock {
    /// Runs `pack` after bringing `bytes` into memory, each timed.
    fn time(&self, bytes: &[u8], pack: impl FnOnce()) {
        /// The smallest page there is.
        const PAGE: usize = 4096;
        let start = Instant::now();
        for byte in bytes.iter().step_by(PAGE) {
            std::hint::black_box(*byte);
        }
        let read = Instant::now();
        pack();
        let ns = |from: Instant, to: Instant| (to - from).as_nanos() as u64;
        let (read_ns, pack_ns) = (ns(start, read), ns(read, Instant::now()));
        self.read_ns.fetch_add(read_ns, Ordering::Relaxed);
        self.pack_ns.fetch_add(pack_ns, Ordering::Relaxed);
    }

    /// Seconds that each of `threads` workers spent, waiting for the disk and packing.
    pub fn seconds(&self, threads: usize) -> (f64, f64) {
        let seconds = |ns: &AtomicU64| ns.load(Ordering::Relaxed) as f64 * 1e-9 / threads as f64;
        (seconds(&self.read_ns), seconds(&self.pack_ns))
    }
}

/// Packs `requests` in order; tiles of all of them lie together, in that order.
///
/// The memory of mapped files is given back on the way, so that both forms never exist at once.
///
/// # Errors
/// If memory is short.
pub fn load(pool: &mut Pool, requests: &[Request]) -> Result<Vec<Linear>> {
    load_timed(pool, requests, &Clock::default())
}

/// [`load`], adding to `clock`.
///
/// # Errors
/// If memory is short.
pub fn load_timed(pool: &mut Pool, requests: &[Request], clock: &Clock) -> Result<Vec<Linear>> {
    let stored = requests;
    let copies: Vec<Option<Matrix>> = (requests.iter())
        .map(|(matrix, _)| match matrix {
            Matrix::Gathered(gathered) => Some(gathered.materialize()),
            _ => None,
        })
        .collect();
    let requests: Vec<Request> = (requests.iter().zip(&copies))
        .map(|(&(matrix, precision), copy)| (copy.as_ref().unwrap_or(matrix), precision))
        .collect();
    let forms: Vec<Form> = requests.iter().map(Form::of).collect();
    let int16 = pack(pool, clock, &forms, |form| match form {
        Form::Int16(m, tiles) => Some((m, *tiles)),
        _ => None,
    })?;
    let f32 = pack(pool, clock, &forms, |form| match form {
        Form::F32(m, tiles) => Some((m, *tiles)),
        _ => None,
    })?;
    let (mut int16, mut f32) = (int16.into_iter(), f32.into_iter());
    let packed = "every NF4 matrix was packed";
    let linears = requests
        .iter()
        .zip(&forms)
        .map(|((matrix, precision), form)| {
            let weights = match form {
                Form::Int16(..) => Weights::Nf4Int16(int16.next().expect(packed)),
                Form::F32(..) => Weights::Nf4F32(f32.next().expect(packed)),
                Form::DenseBf16 => Weights::Bf16(widen::<bf16>(pool, clock, matrix)?),
                Form::DenseF32 => Weights::F32(widen::<f32>(pool, clock, matrix)?),
            };
            Ok(Linear {
                rows: matrix.rows(),
                cols: matrix.cols(),
                weights,
                integers: match precision {
                    CpuPrecision::Int8 => Integers::Int8,
                    CpuPrecision::Int16 | CpuPrecision::F32 => Integers::Int16,
                },
            })
        })
        .collect();
    // Scales, and what a neighbouring job read again.
    stored.iter().for_each(|(matrix, _)| matrix.release());
    linears
}

/// What a matrix becomes.
enum Form<'a> {
    Int16(&'a Nf4Matrix, usize),
    F32(&'a Nf4Matrix, usize),
    DenseBf16,
    DenseF32,
}

impl<'a> Form<'a> {
    fn of(&(matrix, precision): &Request<'a>) -> Self {
        match matrix {
            Matrix::Dense(m) if m.dtype == Dtype::Bf16 => Form::DenseBf16,
            Matrix::Dense(_) => Form::DenseF32,
            Matrix::Nf4(m) => match tile_count(m) {
                Some(tiles) if m.rows >= MIN_NF4_ROWS => match precision {
                    CpuPrecision::Int8 | CpuPrecision::Int16 => Form::Int16(m, tiles),
                    CpuPrecision::F32 => Form::F32(m, tiles),
                },
                _ => Form::DenseF32,
            },
            Matrix::Gathered(_) => unreachable!("a copy took its place"),
        }
    }
}

/// Packs the matrices that `pick` picks, one after the other in one piece of memory.
fn pack<'a, A: Absmax>(
    pool: &mut Pool,
    clock: &Clock,
    forms: &'a [Form],
    pick: impl Fn(&'a Form) -> Option<(&'a Nf4Matrix, usize)>,
) -> Result<Vec<Tiles<A>>> {
    let picked: Vec<_> = forms.iter().filter_map(pick).collect();
    // Of each job: the matrix, its first tile, its first tile row among all, its rows to pack.
    let mut jobs = Vec::new();
    let (mut tiles, mut tile_rows) = (0, 0);
    for &(matrix, count) in &picked {
        let rows = matrix.rows.div_ceil(TILE_ROWS);
        for row in (0..rows).step_by(ROWS_PER_JOB) {
            jobs.push((matrix, tiles, tile_rows, row..rows.min(row + ROWS_PER_JOB)));
        }
        tiles += count;
        tile_rows += rows;
    }
    let mut arena = Huge::<Tile<A>>::zeroed(tiles)?;
    let mut units = vec![0.0; tile_rows];
    let arena_parts = Parts::new(&mut arena);
    let unit_parts = Parts::new(&mut units);
    pool.run(jobs.len(), &|job| {
        let (matrix, first_tile, first_row, rows) = &jobs[job];
        let kblocks = matrix.cols / TILE_COLS;
        let matrix_rows = rows.start * TILE_ROWS..matrix.rows.min(rows.end * TILE_ROWS);
        let first_byte = (matrix.first + matrix_rows.start * matrix.cols) / 2;
        let last_byte = (matrix.first + matrix_rows.end * matrix.cols) / 2;
        clock.time(&matrix.packed[first_byte..last_byte], || {
            for row in rows.clone() {
                let start = first_tile + row * kblocks;
                // SAFETY: every tile row of every matrix belongs to one job, which is run once.
                let (tiles, unit) = unsafe {
                    (
                        arena_parts.slice(start..start + kblocks),
                        unit_parts.item(first_row + row),
                    )
                };
                *unit = pack_tile_row(matrix, row, tiles);
            }
        });
        matrix.release_rows(matrix_rows);
    })?;

    let arena = Arc::new(arena);
    let (mut end, mut units) = (0, units.into_iter());
    let tiles = picked.into_iter().map(|(matrix, count)| {
        end += count;
        Tiles {
            arena: Arc::clone(&arena),
            range: end - count..end,
            units: units
                .by_ref()
                .take(matrix.rows.div_ceil(TILE_ROWS))
                .collect(),
        }
    });
    Ok(tiles.collect())
}

/// Plain rows of `W`, each padded to whole blocks of 64. Exact if `W` holds what the matrix does.
fn widen<W: Weight + Send + Sync>(
    pool: &mut Pool,
    clock: &Clock,
    matrix: &Matrix,
) -> Result<Huge<[W; TILE_COLS]>> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let kblocks = cols.div_ceil(TILE_COLS);
    let mut out = Huge::<[W; TILE_COLS]>::zeroed(rows * kblocks)?;
    pool.for_each_chunk(
        &mut out,
        ROWS_PER_JOB * TILE_ROWS * kblocks,
        &|job, blocks| {
            let first = job * ROWS_PER_JOB * TILE_ROWS;
            let rows = first..first + blocks.len() / kblocks;
            let stored = match matrix {
                Matrix::Dense(m) => {
                    let row_bytes = cols * m.dtype.size_bytes();
                    &m.data[rows.start * row_bytes..rows.end * row_bytes]
                }
                _ => &[],
            };
            clock.time(stored, || {
                for (row, blocks) in rows.clone().zip(blocks.chunks_exact_mut(kblocks)) {
                    let out = &mut blocks.as_flattened_mut()[..cols];
                    match matrix {
                        Matrix::Dense(m) if m.dtype == W::DTYPE => {
                            let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
                            bytes.copy_from_slice(
                                &m.data[row * bytes.len()..(row + 1) * bytes.len()],
                            );
                        }
                        _ => {
                            let mut values = vec![0.0; cols];
                            matrix.dequantize_rows(row..row + 1, &mut values);
                            for (w, v) in out.iter_mut().zip(values) {
                                *w = W::from_f32(v);
                            }
                        }
                    }
                }
            });
            matrix.release_rows(rows);
        },
    )?;
    Ok(out)
}
