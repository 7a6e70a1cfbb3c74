//! The gated delta rule in its two forms: token by token (the definition) and chunk by chunk.
//!
//! Per value head, state `S: [dk, dv]`, with `γ = exp(g)`, `q` and `k` already normalised:
//!
//! ```text
//! S ← γ S;   d = (v - Sᵀ k) β;   S ← S + k dᵀ;   o = Sᵀ q
//! ```
//!
//! The chunked form does the same for 64 tokens with matrix products; see Gated Delta Networks,
//! arXiv:2412.06464. Both take `q, k: [T, H, dk]`, `v: [T, H, dv]`, `g, beta: [T, H]`, a state
//! `[H, dk, dv]`, and return `(o: [T, H, dv], state)`.

use candle_core::{DType, Device, Result, Tensor};

const CHUNK: usize = 64;

/// One token after the other: the definition.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn recurrent(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let mut s = state.clone();
    let mut outputs = Vec::with_capacity(q.dims()[0]);
    for t in 0..q.dims()[0] {
        let column = |x: &Tensor| x.get(t)?.unsqueeze(2); // [H, d, 1]
        let (q, k, v) = (column(q)?, column(k)?, column(v)?);
        let gamma = column(&g.exp()?.unsqueeze(2)?)?;
        let beta = column(&beta.unsqueeze(2)?)?;
        s = s.broadcast_mul(&gamma.reshape((gamma.dims()[0], 1, 1))?)?;
        let read = s.transpose(1, 2)?.matmul(&k)?;
        let d = (v - read)?.broadcast_mul(&beta.reshape((beta.dims()[0], 1, 1))?)?;
        s = (s + k.matmul(&d.transpose(1, 2)?)?)?;
        outputs.push(s.transpose(1, 2)?.matmul(&q)?.squeeze(2)?);
    }
    Ok((Tensor::stack(&outputs, 0)?, s))
}

/// 64 tokens at a time; the last chunk may be shorter, which padding with zeros would equal.
///
/// # Errors
/// If candle reports one, as for shapes that do not fit each other.
pub fn chunked(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let tokens = q.dims()[0];
    let mut s = state.clone();
    let mut outputs = Vec::with_capacity(tokens.div_ceil(CHUNK));
    for start in (0..tokens).step_by(CHUNK) {
        let len = CHUNK.min(tokens - start);
        // Heads first: [H, C, d] and [H, C].
        let part = |x: &Tensor| x.narrow(0, start, len)?.transpose(0, 1)?.contiguous();
        let (o, next) = one_chunk(&part(q)?, &part(k)?, &part(v)?, &part(g)?, &part(beta)?, &s)?;
        outputs.push(o.transpose(0, 1)?);
        s = next;
    }
    Ok((Tensor::cat(&outputs, 0)?, s))
}

/// `q, k: [H, C, dk]`, `v: [H, C, dv]`, `g, beta: [H, C]`, state `[H, dk, dv]`.
fn one_chunk(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    s: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let len = g.dims()[1];
    let total = g.cumsum(1)?; // G_i, the log of the decay from the chunk's start to token i
    let decay = decay_between(&total)?; // Γ_ij = exp(G_i - G_j), j <= i
    let from_start = total.exp()?.unsqueeze(2)?;
    let beta = beta.unsqueeze(2)?;
    let k_t = k.transpose(1, 2)?.contiguous()?;

    // A token's correction depends on those before it in the chunk: (I + A) U = β V.
    let a = (k.matmul(&k_t)? * &decay)?.broadcast_mul(&beta)?;
    let u = solve_unit_lower(&a, &v.broadcast_mul(&beta)?)?;
    let w = solve_unit_lower(&a, &k.broadcast_mul(&(&beta * &from_start)?)?)?;
    let n = (u - w.matmul(s)?)?;

    let within = (q.matmul(&k_t)? * &decay)?.matmul(&n)?;
    let o = (q.broadcast_mul(&from_start)?.matmul(s)? + within)?;

    let last = total.narrow(1, len - 1, 1)?; // [H, 1]
    let to_end = last.broadcast_sub(&total)?.exp()?.unsqueeze(2)?;
    let kept = s.broadcast_mul(&last.exp()?.unsqueeze(2)?)?;
    let added = k
        .broadcast_mul(&to_end)?
        .transpose(1, 2)?
        .contiguous()?
        .matmul(&n)?;
    Ok((o, (kept + added)?))
}

/// `exp(G_i - G_j)` for `j <= i`, else 0: `[H, C, C]`.
///
/// Masked before the exponential: above the diagonal the difference is positive and may overflow.
fn decay_between(total: &Tensor) -> Result<Tensor> {
    let len = total.dims()[1];
    let mask: Vec<f32> = (0..len * len)
        .map(|at| {
            if at % len <= at / len {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    let mask = Tensor::from_vec(mask, (len, len), &Device::Cpu)?;
    let difference = total.unsqueeze(2)?.broadcast_sub(&total.unsqueeze(1)?)?;
    // min(x, 0) leaves the kept half as it is and keeps inf - inf out of the other.
    difference.minimum(0.0)?.broadcast_add(&mask)?.exp()
}

/// `X` with `(I + tril(A, -1)) X = B`, by forward substitution: `A: [H, C, C]`, `B: [H, C, d]`.
fn solve_unit_lower(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (heads, len, dim) = b.dims3()?;
    let a = a.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut x = b.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    for h in 0..heads {
        let a = &a[h * len * len..(h + 1) * len * len];
        let x = &mut x[h * len * dim..(h + 1) * len * dim];
        for i in 1..len {
            let (solved, rest) = x.split_at_mut(i * dim);
            let row = &mut rest[..dim];
            for j in 0..i {
                let factor = a[i * len + j];
                for (r, s) in row.iter_mut().zip(&solved[j * dim..(j + 1) * dim]) {
                    *r -= factor * s;
                }
            }
        }
    }
    Tensor::from_vec(x, (heads, len, dim), &Device::Cpu)
}
