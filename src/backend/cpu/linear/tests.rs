//! All forms of a matrix on all instruction sets against plain loops over dequantised weights.

use super::*;
use crate::backend::cpu::CpuPrecision;
use crate::backend::cpu::load::load;
use crate::backend::cpu::tests::{assert_close, random_nf4, random_vector};
use crate::formats::matrix::DenseMatrix;
use crate::formats::{Bytes, Dtype, Matrix};

/// `[tokens, rows]`
fn definition(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    let w = matrix.dequantize();
    let cols = matrix.cols();
    x.chunks_exact(cols)
        .flat_map(|x| {
            w.chunks_exact(cols)
                .map(move |w| w.iter().zip(x).map(|(w, x)| f64::from(w * x)).sum::<f64>() as f32)
        })
        .collect()
}

fn bf16_matrix(rows: usize, cols: usize) -> Matrix {
    let data: Vec<u8> = random_vector(rows * cols, 12)
        .iter()
        .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
        .collect();
    Matrix::Dense(DenseMatrix {
        data: Bytes::from(data),
        dtype: Dtype::Bf16,
        rows,
        cols,
    })
}

fn activations(
    pool: &mut Pool,
    isa: Isa,
    x: &[f32],
    cols: usize,
    kind: Option<Integers>,
) -> Activations {
    let mut out = Activations::default();
    out.fill(pool, isa, x.len() / cols, cols, kind, &|t, row| {
        row.copy_from_slice(&x[t * cols..(t + 1) * cols]);
    })
    .unwrap();
    out
}

/// `hidden = W x` through the pool.
fn product(pool: &mut Pool, isa: Isa, linear: &Linear, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / linear.cols;
    let all: Vec<u32> = (0..tokens as u32).collect();
    let mut out = vec![0.0; tokens * linear.rows];
    let x = activations(pool, isa, x, linear.cols, linear.reads_integers());
    add_product(pool, isa, linear, x.view(), &all, &mut out).unwrap();
    out
}

/// Every way to multiply, with its error.
const ARITHMETIC: [(CpuPrecision, Integers, f32); 4] = [
    (CpuPrecision::F32, Integers::Int16, 2e-6),
    (CpuPrecision::Int16, Integers::Wide, 6e-5),
    (CpuPrecision::Int16, Integers::Int16, 3e-4),
    // The inputs have an outlier that takes most of the eight bits.
    (CpuPrecision::Int8, Integers::Int8, 0.1),
];

fn load_one(
    pool: &mut Pool,
    matrix: &Matrix,
    precision: CpuPrecision,
    integers: Integers,
) -> Linear {
    let mut linear = load(pool, &[(matrix, precision)]).unwrap().remove(0);
    linear.integers = integers;
    linear
}

const TOKENS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 40];

#[test]
fn every_form_of_a_matrix_meets_the_dequantised_product() {
    let mut pool = Pool::new(None).unwrap();
    let matrices = [
        random_nf4(1, 64, 1),
        random_nf4(31, 128, 2),
        random_nf4(33, 64, 3),
        random_nf4(96, 512, 4),
        random_nf4(20, 96, 5),
        bf16_matrix(7, 33),
        bf16_matrix(65, 128),
    ];
    for matrix in &matrices {
        for (precision, integers, tolerance) in ARITHMETIC {
            let linear = load_one(&mut pool, matrix, precision, integers);
            for tokens in TOKENS {
                let mut x = random_vector(tokens * matrix.cols(), 21);
                x[matrix.cols() / 2] = 50.0;
                let expected = definition(matrix, &x);
                for isa in Isa::available() {
                    let found = product(&mut pool, isa, &linear, &x);
                    assert_close(&found, &expected, tolerance);
                }
            }
        }
    }
}

#[test]
fn one_token_gives_the_bits_of_many() {
    let mut pool = Pool::new(None).unwrap();
    for matrix in [random_nf4(70, 256, 6), bf16_matrix(70, 256)] {
        for (precision, integers, _) in ARITHMETIC {
            let linear = load_one(&mut pool, &matrix, precision, integers);
            for tokens in TOKENS {
                let x = random_vector(tokens * 256, 22);
                for isa in Isa::available() {
                    let together = product(&mut pool, isa, &linear, &x);
                    for (x, y) in x.chunks_exact(256).zip(together.chunks_exact(70)) {
                        assert_eq!(product(&mut pool, isa, &linear, x), y, "{}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn more_tokens_than_go_at_once_are_computed_like_one() {
    let mut pool = Pool::new(None).unwrap();
    let isa = Isa::detect().unwrap();
    let matrix = random_nf4(40, 64, 6);
    let linear = load_one(&mut pool, &matrix, CpuPrecision::Int16, Integers::Wide);
    let tokens = TOKENS_AT_ONCE + 3;
    let x = random_vector(tokens * 64, 22);
    let together = product(&mut pool, isa, &linear, &x);
    let mut panels = Panels::default();
    let all: Vec<u32> = (0..tokens as u32).collect();
    let view = activations(&mut pool, isa, &x, 64, linear.reads_integers());
    panels
        .project(&mut pool, isa, &[&linear], view.view(), &all)
        .unwrap();
    for (t, (x, y)) in x
        .chunks_exact(64)
        .zip(together.chunks_exact(40))
        .enumerate()
    {
        assert_eq!(product(&mut pool, isa, &linear, x), y);
        let mut row = [0.0; 40];
        panels.copy_rows(0, t, 0..40, &mut row);
        assert_eq!(row, y);
    }
}

#[test]
fn avx2_avx512_and_amx_agree_bit_for_bit() {
    let mut pool = Pool::new(None).unwrap();
    let matrix = random_nf4(64, 512, 8);
    for (precision, integers, _) in ARITHMETIC {
        let linear = load_one(&mut pool, &matrix, precision, integers);
        for tokens in [5, 20] {
            let x = random_vector(tokens * 512, 23);
            let mut results = Isa::available()
                .into_iter()
                .filter(|isa| *isa != Isa::Scalar(crate::backend::cpu::isa::Scalar))
                .map(|isa| product(&mut pool, isa, &linear, &x));
            if let Some(first) = results.next() {
                assert!(results.all(|r| r == first));
            }
        }
    }
}

#[test]
fn panels_hold_the_rows_of_all_matrices() {
    let mut pool = Pool::new(None).unwrap();
    let isa = Isa::detect().unwrap();
    let matrices = [random_nf4(40, 128, 1), random_nf4(64, 128, 2)];
    let requests = matrices.each_ref().map(|m| (m, CpuPrecision::F32));
    let linears = load(&mut pool, &requests).unwrap();
    let x = random_vector(3 * 128, 5);
    let mut panels = Panels::default();
    let view = activations(&mut pool, isa, &x, 128, None);
    let refs: Vec<&Linear> = linears.iter().collect();
    panels
        .project(&mut pool, isa, &refs, view.view(), &[0, 1, 2])
        .unwrap();
    for (first_panel, matrix) in [(0, &matrices[0]), (2, &matrices[1])] {
        let expected = definition(matrix, &x);
        for t in 0..3 {
            let mut row = vec![0.0; matrix.rows() - 3];
            panels.copy_rows(first_panel, t, 3..matrix.rows(), &mut row);
            let expected = &expected[t * matrix.rows()..(t + 1) * matrix.rows()];
            assert_close(&row, &expected[3..], 1e-5);
            assert_eq!(panels.get(first_panel, t, 3), row[0]);
        }
    }
}
