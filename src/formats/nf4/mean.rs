//! The mean of an f32 vector in torch's order of additions, to its last bit.
//!
//! The offset of double quantisation is such a mean; another order gives other bytes.
//!
//! Source: torch 2.15, `aten/src/ATen/native/cpu/SumKernel.cpp`, checked against recorded values.

/// f32 lanes of one vector: 8 in torch even on AVX-512 machines.
const LANES: usize = 8;
/// Vectors that torch sums side by side.
const COLUMNS: usize = 4;
/// Accumulators of the cascade: each takes the sums of the one before.
const LEVELS: usize = 4;

/// Mean as one thread of torch computes it; NaN for no values.
///
/// From 32,768 values, torch's result depends on its number of threads; this is that of one.
pub fn mean(values: &[f32]) -> f32 {
    sum(values) / values.len() as f32
}

fn sum(values: &[f32]) -> f32 {
    if values.len() < LANES {
        return column_sum::<1>(values)[0];
    }
    let (vectors, tail) = values.split_at(values.len() / LANES * LANES);
    let lanes = column_sum::<LANES>(vectors);
    let tail = tail.iter().fold(0.0, |sum, v| sum + v);
    lanes.iter().fold(tail, |sum, lane| sum + lane)
}

/// Lane-wise sum of `values: [_, L]`.
fn column_sum<const L: usize>(values: &[f32]) -> [f32; L] {
    let (vectors, rest) = values.as_chunks::<L>();
    assert!(rest.is_empty());
    let (rows, left_over) = vectors.as_chunks::<COLUMNS>();
    let [mut sum, others @ ..] = cascade_sum(rows);
    for vector in left_over.iter().chain(&others) {
        add(&mut sum, vector);
    }
    sum
}

/// Sums each column down the rows; level `j` takes over level `j - 1` every `2^(j * power)` rows,
/// which keeps the rounding error from growing with the length.
fn cascade_sum<const L: usize>(rows: &[[[f32; L]; COLUMNS]]) -> [[f32; L]; COLUMNS] {
    let power = (ceil_log2(rows.len()) / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; L]; COLUMNS]; LEVELS];
    let mut done = 0;
    let mut steps = rows.chunks_exact(step);
    for chunk in &mut steps {
        chunk.iter().for_each(|row| add_row(&mut levels[0], row));
        done += step;
        for j in 1..LEVELS {
            let below = std::mem::replace(&mut levels[j - 1], [[0.0; L]; COLUMNS]);
            add_row(&mut levels[j], &below);
            if done & ((step - 1) << (j * power)) != 0 {
                break;
            }
        }
    }
    let [mut sum, above @ ..] = levels;
    for row in steps.remainder().iter().chain(&above) {
        add_row(&mut sum, row);
    }
    sum
}

fn add_row<const L: usize>(to: &mut [[f32; L]; COLUMNS], row: &[[f32; L]; COLUMNS]) {
    to.iter_mut().zip(row).for_each(|(to, v)| add(to, v));
}

fn add<const L: usize>(to: &mut [f32; L], v: &[f32; L]) {
    to.iter_mut().zip(v).for_each(|(to, v)| *to += v);
}

/// As torch rounds it: 1 for 0, 1 and 2.
fn ceil_log2(n: usize) -> usize {
    n.max(2).next_power_of_two().ilog2() as usize
}
