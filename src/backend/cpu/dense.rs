//! `y = W x` with W in bf16 or f32: output head, router, and checkpoints that are not quantised.

use super::activations::Block;
use super::isa::dispatch;
use super::layout::{TILE_COLS, TILE_ROWS};
use super::simd::{LANES, Simd, Weight, lanes};
use half::bf16;

dispatch! {
    /// Up to 32 rows of bf16 times some tokens: `c[i] = W x[tokens[i]]`.
    ///
    /// - `w`: `[rows, kblocks]` blocks of 64 weights
    /// - `x`: `[kblocks, x_tokens]`
    /// - `tokens`: `[n]`, each below `x_tokens`
    /// - `c`: `[n]` vectors; rows that `w` lacks become 0
    pub fn rows_bf16(
        w: &[[bf16; TILE_COLS]],
        x: &[Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = rows
}

dispatch! {
    /// [`rows_bf16`] for f32 weights.
    pub fn rows_f32(
        w: &[[f32; TILE_COLS]],
        x: &[Block],
        x_tokens: usize,
        tokens: &[u32],
        c: &mut [[f32; TILE_ROWS]],
    ) = rows
}

/// Rows at once, and tokens at once: 16 sums fit in the registers of AVX-512.
const ROWS: usize = 4;
const TOKENS: usize = 4;

#[inline(always)]
fn rows<S: Simd, W: Weight>(
    s: S,
    w: &[[W; TILE_COLS]],
    x: &[Block],
    x_tokens: usize,
    tokens: &[u32],
    c: &mut [[f32; TILE_ROWS]],
) {
    assert!(x_tokens > 0 && c.len() == tokens.len());
    let kblocks = x.len() / x_tokens;
    assert!(x.len() == kblocks * x_tokens && w.len().is_multiple_of(kblocks));
    assert!(w.len() / kblocks <= TILE_ROWS);
    c.fill([0.0; TILE_ROWS]);
    for (i, w) in w.chunks(ROWS * kblocks).enumerate() {
        let rows = w.len() / kblocks;
        // Rows beyond the last repeat it; their sums are dropped.
        let mut row_blocks = [&w[..kblocks]; ROWS];
        for (r, blocks) in row_blocks.iter_mut().enumerate() {
            let r = r.min(rows - 1);
            *blocks = &w[r * kblocks..(r + 1) * kblocks];
        }
        let mut group = 0;
        while group < tokens.len() {
            let left = tokens.len() - group;
            let x = (x, x_tokens);
            // A full group only where its sums fit in registers.
            let (done, sums) = if left >= TOKENS && S::MAX_TOKENS > 2 {
                let t = [0, 1, 2, 3].map(|j| tokens[group + j]);
                (TOKENS, products(s, row_blocks, x, t))
            } else {
                let mut sums = [[0.0; ROWS]; TOKENS];
                sums[0] = products(s, row_blocks, x, [tokens[group]])[0];
                (1, sums)
            };
            for (c, sums) in c[group..group + done].iter_mut().zip(sums) {
                c[ROWS * i..ROWS * i + rows].copy_from_slice(&sums[..rows]);
            }
            group += done;
        }
    }
}

/// Dot products of four rows with `N` tokens; the order of additions does not depend on `N`.
#[inline(always)]
fn products<S: Simd, W: Weight, const N: usize>(
    s: S,
    w: [&[[W; TILE_COLS]]; ROWS],
    (x, x_tokens): (&[Block], usize),
    tokens: [u32; N],
) -> [[f32; ROWS]; N] {
    let mut sums = [[s.splat(0.0); ROWS]; N];
    for kb in 0..w[0].len() {
        let x = &x[kb * x_tokens..(kb + 1) * x_tokens];
        if N == 1 {
            for w in w {
                // The same place four rows on, which is what comes next.
                s.prefetch(w.as_ptr().wrapping_add(kb + ROWS * w.len()));
            }
        }
        for v in 0..TILE_COLS / LANES {
            let mut weights = [s.splat(0.0); ROWS];
            for r in 0..ROWS {
                weights[r] = W::load(s, &lanes(&w[r][kb])[v]);
            }
            for i in 0..N {
                let x = s.load(&lanes(&x[tokens[i] as usize])[v]);
                for r in 0..ROWS {
                    sums[i][r] = s.mul_add(weights[r], x, sums[i][r]);
                }
            }
        }
    }
    let mut out = [[0.0; ROWS]; N];
    for i in 0..N {
        for r in 0..ROWS {
            out[i][r] = s.reduce_add(sums[i][r]);
        }
    }
    out
}
