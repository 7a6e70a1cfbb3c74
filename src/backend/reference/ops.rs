//! Small operations that several blocks share.

use candle_core::{D, Device, Result, Tensor};

use crate::formats::Matrix;

/// Most weights held dequantized at a time: one projection of one expert of the 80B model.
const PANEL: usize = 512 * 2048;

/// `y = x Wᵀ` with `x: [T, K]`, `W: [N, K]`, `y: [T, N]`, dequantizing a panel of rows at a time.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn linear(x: &Tensor, w: &Matrix) -> Result<Tensor> {
    let (rows, cols) = (w.rows(), w.cols());
    let panel = (PANEL / cols).clamp(1, rows);
    let mut parts = Vec::with_capacity(rows.div_ceil(panel));
    for start in (0..rows).step_by(panel) {
        let end = rows.min(start + panel);
        let mut dense = vec![0.0; (end - start) * cols];
        w.dequantize_rows(start..end, &mut dense);
        let dense = Tensor::from_vec(dense, (end - start, cols), &Device::Cpu)?;
        parts.push(x.matmul(&dense.t()?)?);
    }
    if parts.len() == 1 {
        Ok(parts.remove(0))
    } else {
        Tensor::cat(&parts, 1)
    }
}

/// Zero-centred RMSNorm over the last dimension: `x * rsqrt(mean(x^2) + eps) * (1 + w)`.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn rms_norm(x: &Tensor, w: &[f32], eps: f32) -> Result<Tensor> {
    let scale: Vec<f32> = w.iter().map(|w| 1.0 + w).collect();
    normalize(x, eps)?.broadcast_mul(&Tensor::from_vec(scale, w.len(), x.device())?)
}

/// `x * rsqrt(mean(x^2) + eps)` over the last dimension.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn normalize(x: &Tensor, eps: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)
}

/// `x * rsqrt(sum(x^2) + 1e-6)` over the last dimension; the eps is a constant of the model.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn l2norm(x: &Tensor) -> Result<Tensor> {
    let sum = x.sqr()?.sum_keepdim(D::Minus1)?;
    x.broadcast_div(&(sum + 1e-6)?.sqrt()?)
}

/// The logistic function.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

/// `x * sigmoid(x)`.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// Softmax over the last dimension.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}
