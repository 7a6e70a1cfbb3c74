//! Qwen3 mixtures of experts: 30B-A3B, Coder-30B, 235B-A22B. Source: transformers 4.57.6 and 5.24,
//! `Qwen3MoeConfig` and `modeling_qwen3_moe.py`.
//!
//! Attention has no output gate, and there is no shared expert. Both are written here in the blocks
//! of Qwen3-Next, so that every backend runs them: gates whose rows are zero are one half for every
//! input, and values twice as large make up for it, without any rounding; the shared expert is the
//! smallest that kernels take, of zeros. The price is a query projection of twice the size.

use super::{Attention, Defaults, Family, Norms};
use crate::backend::weights::AttentionWeights;
use crate::backend::{AttentionShape, ExpertWeights};
use crate::formats::matrix::DenseMatrix;
use crate::formats::nf4::{Absmax, BLOCKSIZE, Nf4Matrix};
use crate::formats::{Bytes, Dtype, Gathered, Matrix};

pub const FAMILY: Family = Family {
    model_types: &["qwen3_moe"],
    defaults: Defaults {
        vocab_size: 151_936,
        layers: 24,
        num_experts: 128,
        num_experts_per_tok: 8,
        num_attention_heads: 32,
        num_key_value_heads: 4,
        head_dim: None,
        partial_rotary_factor: 1.0,
        moe_intermediate_size: 768,
        norm_topk_prob: false,
    },
    always_norm_topk: false,
    prefix: "model",
    delta_net: None,
    attention: Attention::Plain,
    norms: Norms::Plain,
    shared_expert: false,
};

/// Intermediate size of the shared expert that stands for none.
pub const NO_SHARED_EXPERT: usize = BLOCKSIZE;

/// Attention without a gate as attention whose gates are all one half.
///
/// - `q_proj`: `[heads * head_dim, D]`, to which a gate of zeros is added for each head
pub fn with_constant_gates(shape: &AttentionShape, weights: AttentionWeights) -> AttentionWeights {
    let dim = shape.head_dim;
    let gates = zeros(dim, weights.q_proj.cols(), &weights.q_proj);
    let runs = (0..shape.num_attention_heads).flat_map(|head| {
        let query = (weights.q_proj.clone(), head * dim..(head + 1) * dim);
        [query, (gates.clone(), 0..dim)]
    });
    AttentionWeights {
        q_proj: Matrix::Gathered(Box::new(Gathered::new(runs.collect()))),
        v_proj: doubled(&weights.v_proj),
        ..weights
    }
}

/// The shared expert that adds nothing, and its gate: stored as `like` is.
pub fn no_shared_expert(hidden: usize, like: &Matrix) -> (ExpertWeights, Matrix) {
    let expert = ExpertWeights {
        gate_proj: zeros(NO_SHARED_EXPERT, hidden, like),
        up_proj: zeros(NO_SHARED_EXPERT, hidden, like),
        down_proj: zeros(hidden, NO_SHARED_EXPERT, like),
    };
    (expert, zeros(1, hidden, like))
}

/// Zeros in the form of `like`.
fn zeros(rows: usize, cols: usize, like: &Matrix) -> Matrix {
    let n = rows * cols;
    match like {
        Matrix::Nf4(_) if n.is_multiple_of(BLOCKSIZE) => {
            // Code 7 is an exact zero. Scales beside which those of real rows lose nothing.
            let scale = 1e-30f32.to_le_bytes();
            Matrix::Nf4(Nf4Matrix {
                packed: Bytes::from(vec![0x77; n / 2]),
                absmax: Absmax::Plain(Bytes::from(scale.repeat(n / BLOCKSIZE))),
                blocksize: BLOCKSIZE,
                first: 0,
                rows,
                cols,
            })
        }
        Matrix::Dense(DenseMatrix { dtype, .. }) => dense_zeros(rows, cols, *dtype),
        _ => dense_zeros(rows, cols, Dtype::F32),
    }
}

fn dense_zeros(rows: usize, cols: usize, dtype: Dtype) -> Matrix {
    Matrix::Dense(DenseMatrix {
        data: Bytes::from(vec![0; rows * cols * dtype.size_bytes()]),
        dtype,
        rows,
        cols,
    })
}

/// The matrix times two: another exponent, the same digits.
fn doubled(matrix: &Matrix) -> Matrix {
    match matrix {
        Matrix::Nf4(m) => {
            let absmax = match &m.absmax {
                Absmax::Plain(scales) => Absmax::Plain(doubled_f32(scales)),
                Absmax::Nested {
                    codes,
                    nested_absmax,
                    quant_map,
                    offset,
                } => Absmax::Nested {
                    codes: codes.clone(),
                    nested_absmax: doubled_f32(nested_absmax),
                    quant_map: quant_map.clone(),
                    offset: 2.0 * offset,
                },
            };
            Matrix::Nf4(Nf4Matrix {
                absmax,
                ..m.clone()
            })
        }
        _ => {
            let data = matrix.dequantize().into_iter();
            let dtype = match matrix {
                Matrix::Dense(m) if m.dtype == Dtype::Bf16 => Dtype::Bf16,
                _ => Dtype::F32,
            };
            let data: Vec<u8> = match dtype {
                Dtype::Bf16 => data
                    .flat_map(|w| half::bf16::from_f32(2.0 * w).to_le_bytes())
                    .collect(),
                _ => data.flat_map(|w| (2.0 * w).to_le_bytes()).collect(),
            };
            Matrix::Dense(DenseMatrix {
                data: Bytes::from(data),
                dtype,
                rows: matrix.rows(),
                cols: matrix.cols(),
            })
        }
    }
}

fn doubled_f32(values: &Bytes) -> Bytes {
    let (values, _) = values.as_chunks::<4>();
    let doubled = values.iter().map(|v| 2.0 * f32::from_le_bytes(*v));
    Bytes::from(doubled.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
}
