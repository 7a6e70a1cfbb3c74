//! Shared by the kernels' tests: random inputs and matrices, comparison with a tolerance.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::formats::nf4::{Absmax, Nf4Matrix};
use crate::formats::{Bytes, Matrix};

/// `len` numbers, roughly normal.
pub fn random_vector(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| (0..4).map(|_| rng.random_range(-1.0..1.0f32)).sum())
        .collect()
}

/// A `[rows, cols]` matrix with random codes and scales that differ by a factor of 100.
pub fn random_nf4(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut packed = vec![0u8; (rows * cols).div_ceil(2)];
    rng.fill(&mut packed[..]);
    let absmax: Vec<u8> = (0..(rows * cols).div_ceil(64))
        .flat_map(|_| (0.02f32 * 10f32.powf(rng.random_range(-1.0..1.0))).to_le_bytes())
        .collect();
    Matrix::Nf4(Nf4Matrix {
        packed: Bytes::from(packed),
        absmax: Absmax::Plain(Bytes::from(absmax)),
        blocksize: 64,
        first: 0,
        rows,
        cols,
    })
}

/// Asserts `|found - expected| <= tolerance * max|expected|`.
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() <= tolerance * scale,
            "element {i}: {f}, expected {e}, tolerance {} of {scale}",
            tolerance
        );
    }
}
