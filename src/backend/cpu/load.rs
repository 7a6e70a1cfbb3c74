//! From the checkpoint's matrices to the kernels' form, by all workers.

use std::sync::Arc;

use half::bf16;

use super::CpuPrecision;
use super::layout::{TILE_COLS, TILE_ROWS, Tile, pack_tile_row, tile_count};
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

/// Packs `requests` in order; tiles of all of them lie together, in that order.
///
/// # Errors
/// If memory is short.
pub fn load(pool: &mut Pool, requests: &[Request]) -> Result<Vec<Linear>> {
    let forms: Vec<Form> = requests.iter().map(Form::of).collect();
    let int16 = pack(pool, &forms, |form| match form {
        Form::Int16(m, tiles) => Some((m, *tiles)),
        _ => None,
    })?;
    let f32 = pack(pool, &forms, |form| match form {
        Form::F32(m, tiles) => Some((m, *tiles)),
        _ => None,
    })?;
    let (int16, f32) = (Arc::new(int16), Arc::new(f32));
    let (mut int16_end, mut f32_end) = (0, 0);
    let mut linears = Vec::with_capacity(requests.len());
    for ((matrix, _), form) in requests.iter().zip(&forms) {
        let weights = match form {
            Form::Int16(_, tiles) => {
                int16_end += tiles;
                Weights::Nf4Int16(Tiles {
                    arena: Arc::clone(&int16),
                    range: int16_end - tiles..int16_end,
                })
            }
            Form::F32(_, tiles) => {
                f32_end += tiles;
                Weights::Nf4F32(Tiles {
                    arena: Arc::clone(&f32),
                    range: f32_end - tiles..f32_end,
                })
            }
            Form::DenseBf16 => Weights::Bf16(widen::<bf16>(pool, matrix)?),
            Form::DenseF32 => Weights::F32(widen::<f32>(pool, matrix)?),
        };
        linears.push(Linear {
            rows: matrix.rows(),
            cols: matrix.cols(),
            weights,
        });
    }
    Ok(linears)
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
                    CpuPrecision::Int16 => Form::Int16(m, tiles),
                    CpuPrecision::F32 => Form::F32(m, tiles),
                },
                _ => Form::DenseF32,
            },
        }
    }
}

/// Packs the matrices that `pick` picks, one after the other.
fn pack<'a, A: Weight + Send + Sync>(
    pool: &mut Pool,
    forms: &'a [Form],
    pick: impl Fn(&'a Form) -> Option<(&'a Nf4Matrix, usize)>,
) -> Result<Huge<Tile<A>>>
where
    Tile<A>: bytemuck::Zeroable,
{
    let mut jobs = Vec::new();
    let mut total = 0;
    for (matrix, tiles) in forms.iter().filter_map(pick) {
        let tile_rows = matrix.rows.div_ceil(TILE_ROWS);
        for row in (0..tile_rows).step_by(ROWS_PER_JOB) {
            let rows = row..tile_rows.min(row + ROWS_PER_JOB);
            jobs.push((matrix, total, rows));
        }
        total += tiles;
    }
    let mut arena = Huge::<Tile<A>>::zeroed(total)?;
    let parts = Parts::new(&mut arena);
    pool.run(jobs.len(), &|job| {
        let (matrix, first, rows) = &jobs[job];
        let kblocks = matrix.cols / TILE_COLS;
        for row in rows.clone() {
            let start = first + row * kblocks;
            // SAFETY: every tile row of every matrix belongs to one job, which is run once.
            let tiles = unsafe { parts.slice(start..start + kblocks) };
            pack_tile_row(matrix, row, tiles);
        }
    })?;
    Ok(arena)
}

/// Plain rows of `W`, each padded to whole blocks of 64. Exact if `W` holds what the matrix does.
fn widen<W: Weight + Send + Sync>(
    pool: &mut Pool,
    matrix: &Matrix,
) -> Result<Huge<[W; TILE_COLS]>> {
    let cols = matrix.cols();
    let kblocks = cols.div_ceil(TILE_COLS);
    let mut out = Huge::<[W; TILE_COLS]>::zeroed(matrix.rows() * kblocks)?;
    pool.for_each_chunk(&mut out, kblocks, &|row, blocks| {
        let mut values = vec![0.0; cols];
        matrix.dequantize_rows(row..row + 1, &mut values);
        for (w, v) in blocks.as_flattened_mut().iter_mut().zip(values) {
            *w = W::from_f32(v);
        }
    })?;
    Ok(out)
}
