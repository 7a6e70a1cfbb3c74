//! A matrix of weights as it lies on disk: plain floats or NF4 codes.

use std::ops::Range;

use super::nf4::Nf4Matrix;
use super::{Bytes, Dtype, Gathered};

/// A weight `[rows, cols]`, row-major, still in its stored form. A view: cloning copies no data.
#[derive(Clone, Debug)]
pub enum Matrix {
    Dense(DenseMatrix),
    Nf4(Nf4Matrix),
    /// Rows of other matrices
    Gathered(Box<Gathered>),
}

/// Rows of plain floats.
#[derive(Clone, Debug)]
pub struct DenseMatrix {
    /// `rows * cols` elements of `dtype`, little-endian, not necessarily aligned
    pub data: Bytes,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
}

impl Matrix {
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Dense(m) => m.rows,
            Matrix::Nf4(m) => m.rows,
            Matrix::Gathered(m) => m.rows(),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Matrix::Dense(m) => m.cols,
            Matrix::Nf4(m) => m.cols,
            Matrix::Gathered(m) => m.cols(),
        }
    }

    /// The same for who keeps it while the model's other weights go: dense data is
    /// [`detached`](Bytes::detached).
    pub fn detached(&self) -> Matrix {
        match self {
            Matrix::Dense(m) => Matrix::Dense(DenseMatrix {
                data: m.data.detached(),
                ..m.clone()
            }),
            Matrix::Nf4(m) => Matrix::Nf4(m.clone()),
            Matrix::Gathered(m) => m.materialize(),
        }
    }

    /// Bytes it takes on disk, scales included, code books and JSON not.
    pub fn stored_bytes(&self) -> usize {
        match self {
            Matrix::Dense(m) => m.data.len(),
            Matrix::Nf4(m) => m.stored_bytes(),
            Matrix::Gathered(m) => m.stored_bytes(),
        }
    }

    /// Rows `rows` as f32 into `out: [rows.len(), cols]`, exactly as the file defines them.
    ///
    /// NF4 is not rounded to its original dtype: this is the f32 mode of transformers.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.rows());
        assert_eq!(out.len(), rows.len() * self.cols());
        match self {
            Matrix::Dense(m) => {
                let row_bytes = m.cols * m.dtype.size_bytes();
                m.dtype
                    .widen(&m.data[rows.start * row_bytes..rows.end * row_bytes], out);
            }
            Matrix::Nf4(m) => m.dequantize_rows(rows, out),
            Matrix::Gathered(m) => m.dequantize_rows(rows, out),
        }
    }

    /// Gives back the memory of a mapped file that reading rows `rows` took.
    pub fn release_rows(&self, rows: Range<usize>) {
        match self {
            Matrix::Dense(m) => {
                let row_bytes = m.cols * m.dtype.size_bytes();
                m.data.release(rows.start * row_bytes..rows.end * row_bytes);
            }
            Matrix::Nf4(m) => m.release_rows(rows),
            // Others may still want the same rows: all of it goes at the end.
            Matrix::Gathered(_) => {}
        }
    }

    /// [`release_rows`](Self::release_rows) of all of it, scales included.
    pub fn release(&self) {
        self.release_rows(0..self.rows());
        match self {
            Matrix::Dense(_) => {}
            Matrix::Nf4(m) => m.absmax_bytes().for_each(|b| b.release(0..b.len())),
            Matrix::Gathered(m) => m.parts().for_each(Matrix::release),
        }
    }

    /// Asks the system to read a mapped file ahead.
    pub fn read_ahead(&self) {
        match self {
            Matrix::Dense(m) => m.data.read_ahead(0..m.data.len()),
            Matrix::Nf4(m) => {
                m.packed.read_ahead(0..m.packed.len());
                m.absmax_bytes().for_each(|b| b.read_ahead(0..b.len()));
            }
            Matrix::Gathered(m) => m.parts().for_each(Matrix::read_ahead),
        }
    }

    /// The whole matrix as f32, `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows() * self.cols()];
        self.dequantize_rows(0..self.rows(), &mut out);
        out
    }
}
