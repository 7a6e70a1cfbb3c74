//! Rows of several stored matrices in an order of their own, without a copy until one is needed.

use std::ops::Range;

use half::{bf16, f16};

use super::matrix::DenseMatrix;
use super::nf4::{Absmax, Nf4Matrix};
use super::{Bytes, Dtype, Matrix};

/// A matrix made of runs of rows of others, all of the same width.
#[derive(Clone, Debug)]
pub struct Gathered {
    /// Which rows of which matrix follow each other
    runs: Vec<(Matrix, Range<usize>)>,
    rows: usize,
    cols: usize,
}

impl Gathered {
    /// # Panics
    /// If there are no runs, or one reaches beyond its matrix or has another width.
    pub fn new(runs: Vec<(Matrix, Range<usize>)>) -> Self {
        let cols = runs[0].0.cols();
        for (matrix, rows) in &runs {
            assert!(matrix.cols() == cols && rows.end <= matrix.rows());
        }
        Gathered {
            rows: runs.iter().map(|(_, rows)| rows.len()).sum(),
            cols,
            runs,
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The matrices that rows come from, perhaps several times.
    pub fn parts(&self) -> impl Iterator<Item = &Matrix> {
        self.runs.iter().map(|(matrix, _)| matrix)
    }

    /// Bytes that the rows take on disk.
    pub(super) fn stored_bytes(&self) -> usize {
        let run = |(matrix, rows): &(Matrix, Range<usize>)| {
            matrix.stored_bytes() * rows.len() / matrix.rows()
        };
        self.runs.iter().map(run).sum()
    }

    pub(super) fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let mut first = 0;
        for (matrix, run) in &self.runs {
            let from = rows.start.max(first);
            let to = rows.end.min(first + run.len());
            if from < to {
                let source = run.start + from - first..run.start + to - first;
                let out = &mut out[(from - rows.start) * self.cols..(to - rows.start) * self.cols];
                matrix.dequantize_rows(source, out);
            }
            first += run.len();
        }
    }

    /// The same weights stored in one piece: NF4 where every run is, with the same codes and
    /// scales, else floats of the widest type among them.
    pub fn materialize(&self) -> Matrix {
        self.nf4()
            .map_or_else(|| Matrix::Dense(self.dense()), Matrix::Nf4)
    }

    fn nf4(&self) -> Option<Nf4Matrix> {
        /// Weights per scale of the copy: a divisor of every block size that rows may have.
        const BLOCK: usize = super::nf4::BLOCKSIZE;
        let (mut packed, mut absmax) = (Vec::new(), Vec::new());
        for (matrix, rows) in &self.runs {
            let Matrix::Nf4(m) = matrix else { return None };
            let starts = [m.cols, m.first, m.blocksize];
            if starts.iter().any(|n| !n.is_multiple_of(BLOCK)) {
                return None;
            }
            let weights = m.first + rows.start * m.cols..m.first + rows.end * m.cols;
            packed.extend_from_slice(&m.packed[weights.start / 2..weights.end / 2]);
            let scales = weights.step_by(BLOCK).map(|i| m.scale(i).to_le_bytes());
            absmax.extend(scales.flatten());
        }
        Some(Nf4Matrix {
            packed: Bytes::from(packed),
            absmax: Absmax::Plain(Bytes::from(absmax)),
            blocksize: BLOCK,
            first: 0,
            rows: self.rows,
            cols: self.cols,
        })
    }

    fn dense(&self) -> DenseMatrix {
        let dtype_of = |matrix: &Matrix| match matrix {
            Matrix::Dense(m) => m.dtype,
            _ => Dtype::F32,
        };
        let first = dtype_of(&self.runs[0].0);
        let dtype = match self.parts().all(|matrix| dtype_of(matrix) == first) {
            true => first,
            false => Dtype::F32,
        };
        let mut data = Vec::with_capacity(self.rows * self.cols * dtype.size_bytes());
        let mut row = vec![0.0; self.cols];
        for i in 0..self.rows {
            self.dequantize_rows(i..i + 1, &mut row);
            // Exact: each value came from this type, or goes to f32.
            for value in &row {
                match dtype {
                    Dtype::Bf16 => data.extend(bf16::from_f32(*value).to_le_bytes()),
                    Dtype::F16 => data.extend(f16::from_f32(*value).to_le_bytes()),
                    _ => data.extend(value.to_le_bytes()),
                }
            }
        }
        DenseMatrix {
            data: Bytes::from(data),
            dtype,
            rows: self.rows,
            cols: self.cols,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::nf4::quantize::quantize;

    fn nf4(rows: usize, seed: usize) -> Matrix {
        let values = (0..rows * 128).map(|i| ((i * 7 + seed) as f32).sin());
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let weight = quantize("w", &bytes, Dtype::F32, &[rows, 128], false).unwrap();
        let part = |wanted: &str| {
            let mut parts = weight.clone().into_tensors().into_iter();
            Bytes::from(parts.find(|(suffix, _)| *suffix == wanted).unwrap().1)
        };
        Matrix::Nf4(Nf4Matrix {
            packed: part(""),
            absmax: Absmax::Plain(part(".absmax")),
            blocksize: 64,
            first: 0,
            rows,
            cols: 128,
        })
    }

    fn rows_of(matrix: &Matrix, rows: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * matrix.cols()];
        matrix.dequantize_rows(rows, &mut out);
        out
    }

    #[test]
    fn rows_are_those_of_the_parts_in_every_form() {
        let (a, b) = (nf4(6, 0), nf4(3, 5));
        let bf16 = Matrix::Dense(Gathered::new(vec![(a.clone(), 0..6)]).dense());
        for (first, second) in [(&a, &b), (&bf16, &b), (&bf16, &bf16)] {
            let runs = vec![
                (first.clone(), 2..4),
                (second.clone(), 0..3),
                (first.clone(), 0..1),
            ];
            let gathered = Gathered::new(runs);
            let expected = [
                rows_of(first, 2..4),
                rows_of(second, 0..3),
                rows_of(first, 0..1),
            ];
            let matrix = Matrix::Gathered(Box::new(gathered.clone()));
            assert_eq!(matrix.dequantize(), expected.concat());
            assert_eq!(gathered.materialize().dequantize(), expected.concat());
            assert_eq!(rows_of(&matrix, 1..5), expected.concat()[128..5 * 128]);
        }
        assert!(matches!(
            Gathered::new(vec![(a, 1..3), (b, 0..1)]).materialize(),
            Matrix::Nf4(_)
        ));
    }
}
