//! Causal softmax attention over a cache of keys and values, a piece of the context at a time.
//!
//! Each query visits the context in chunks of [`CHUNK`] positions, and merges what it found there
//! in order. Chunks depend on nothing but the position, so decode may give them to different
//! workers, and prefill may take many queries at once, without changing a bit of the result.

use super::isa::dispatch;
use super::math::exp;
use super::simd::{LANES, Simd, lanes, lanes_mut};

/// Positions of one chunk.
pub const CHUNK: usize = 128;

/// Keys and values of one layer and one sequence.
pub struct KvCache {
    /// Positions filled.
    pub len: usize,
    pub capacity: usize,
    /// head_dim, padded to whole vectors
    pub padded_dim: usize,
    /// `[kv_heads, chunks, CHUNK / 16, padded_dim, 16]`: 16 positions side by side, so that one
    /// load meets one dimension of 16 keys and scores need no sums across lanes
    pub k: Vec<f32>,
    /// `[kv_heads, chunks, CHUNK, padded_dim]`
    pub v: Vec<f32>,
}

impl KvCache {
    pub fn new(kv_heads: usize, head_dim: usize, capacity: usize) -> Self {
        let padded_dim = head_dim.next_multiple_of(LANES);
        let len = kv_heads * capacity.next_multiple_of(CHUNK) * padded_dim;
        KvCache {
            len: 0,
            capacity,
            padded_dim,
            k: vec![0.0; len],
            v: vec![0.0; len],
        }
    }

    /// Elements of `k`, and of `v`, that belong to one head.
    pub fn head_len(&self) -> usize {
        self.capacity.next_multiple_of(CHUNK) * self.padded_dim
    }

    /// Keys and values of one head and chunk.
    pub fn chunk(&self, head: usize, chunk: usize) -> (&[f32], &[f32]) {
        let start = head * self.head_len() + chunk * CHUNK * self.padded_dim;
        let range = start..start + CHUNK * self.padded_dim;
        (&self.k[range.clone()], &self.v[range])
    }
}

/// Writes the key and value of `position` into one head's part of `k` and `v`.
pub fn write_kv(
    k_head: &mut [f32],
    v_head: &mut [f32],
    padded_dim: usize,
    position: usize,
    key: &[f32],
    value: &[f32],
) {
    let block = &mut k_head[position / LANES * LANES * padded_dim..][..LANES * padded_dim];
    for (d, &key) in key.iter().enumerate() {
        block[d * LANES + position % LANES] = key;
    }
    v_head[position * padded_dim..][..value.len()].copy_from_slice(value);
}

/// What a query found so far: the largest score, and relative to it the sum of `exp(score)`.
///
/// The sum of `exp(score) * value` lies beside it, as a row of `padded_dim`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    pub max: f32,
    pub sum: f32,
}

impl Stats {
    pub const NOTHING: Stats = Stats {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

dispatch! {
    /// Some queries over one chunk.
    ///
    /// - `queries`: `[n, padded_dim]`, scaled
    /// - `visible`: `[n]` leading positions of the chunk that each may see, up to [`CHUNK`]
    /// - `k`, `v`: the chunk, as [`KvCache::chunk`] has it
    /// - `stats`: `[n]`; `values`: `[n, padded_dim]`
    pub fn attend_chunk(
        queries: &[f32],
        visible: &[usize],
        k: &[f32],
        v: &[f32],
        stats: &mut [Stats],
        values: &mut [f32],
    ) = attend_chunk_body
}

/// Queries at once.
const QUERIES: usize = 4;

#[inline(always)]
fn attend_chunk_body<S: Simd>(
    s: S,
    queries: &[f32],
    visible: &[usize],
    k: &[f32],
    v: &[f32],
    stats: &mut [Stats],
    values: &mut [f32],
) {
    let n = visible.len();
    let dim = k.len() / CHUNK;
    assert!(stats.len() == n && queries.len() == n * dim && values.len() == n * dim);
    let mut i = 0;
    while i < n {
        let count = if n - i >= QUERIES { QUERIES } else { 1 };
        let rows = i * dim..(i + count) * dim;
        let group = Group {
            queries: &queries[rows.clone()],
            visible: &visible[i..i + count],
            k: lanes(k),
            v: lanes(v),
            dim,
        };
        let (stats, values) = (&mut stats[i..i + count], &mut values[rows]);
        if count == QUERIES {
            group.attend::<S, QUERIES>(s, stats, values);
        } else {
            group.attend::<S, 1>(s, stats, values);
        }
        i += count;
    }
}

struct Group<'a> {
    queries: &'a [f32],
    visible: &'a [usize],
    k: &'a [[f32; LANES]],
    v: &'a [[f32; LANES]],
    dim: usize,
}

impl Group<'_> {
    #[inline(always)]
    fn attend<S: Simd, const N: usize>(&self, s: S, stats: &mut [Stats], values: &mut [f32]) {
        let longest = self.visible.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            stats.fill(Stats::NOTHING);
            values.fill(0.0);
            return;
        }
        let mut scores = [[0.0; CHUNK]; N];
        self.score::<S, N>(s, longest, &mut scores);
        for i in 0..N {
            stats[i] = softmax(s, &mut scores[i], self.visible[i]);
        }
        let vectors = self.dim / LANES;
        let mut first = 0;
        while first < vectors {
            if vectors - first >= 2 {
                self.mix::<S, N, 2>(s, longest, &scores, first, values);
                first += 2;
            } else {
                self.mix::<S, N, 1>(s, longest, &scores, first, values);
                first += 1;
            }
        }
    }

    /// Dot products with the leading `positions` keys, 32 at a time.
    #[inline(always)]
    fn score<S: Simd, const N: usize>(
        &self,
        s: S,
        positions: usize,
        scores: &mut [[f32; CHUNK]; N],
    ) {
        let dim = self.dim;
        let mut queries = [self.queries; N];
        for (i, q) in queries.iter_mut().enumerate() {
            *q = &self.queries[i * dim..(i + 1) * dim];
        }
        for (pair, keys) in self.k.chunks_exact(2 * dim).enumerate() {
            if pair * 2 * LANES >= positions {
                break;
            }
            let (low, high) = keys.split_at(dim);
            let mut sums = [[s.splat(0.0); 2]; N];
            for d in 0..dim {
                let (low, high) = (s.load(&low[d]), s.load(&high[d]));
                for i in 0..N {
                    let q = s.splat(queries[i][d]);
                    sums[i][0] = s.mul_add(low, q, sums[i][0]);
                    sums[i][1] = s.mul_add(high, q, sums[i][1]);
                }
            }
            for i in 0..N {
                let scores = lanes_mut(&mut scores[i]);
                s.store(sums[i][0], &mut scores[2 * pair]);
                s.store(sums[i][1], &mut scores[2 * pair + 1]);
            }
        }
    }

    /// Values weighted by `scores`, `M` vectors of each row from vector `first`.
    #[inline(always)]
    fn mix<S: Simd, const N: usize, const M: usize>(
        &self,
        s: S,
        positions: usize,
        scores: &[[f32; CHUNK]; N],
        first: usize,
        values: &mut [f32],
    ) {
        let vectors = self.dim / LANES;
        let mut sums = [[s.splat(0.0); M]; N];
        for (p, row) in self.v.chunks_exact(vectors).enumerate().take(positions) {
            let row = &row[first..first + M];
            for i in 0..N {
                let score = s.splat(scores[i][p]);
                for j in 0..M {
                    sums[i][j] = s.mul_add(score, s.load(&row[j]), sums[i][j]);
                }
            }
        }
        for (values, sums) in lanes_mut(values).chunks_exact_mut(vectors).zip(sums) {
            for j in 0..M {
                s.store(sums[j], &mut values[first + j]);
            }
        }
    }
}

/// Turns the leading `visible` scores into `exp(score - max)` and the others into 0.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32; CHUNK], visible: usize) -> Stats {
    if visible == 0 {
        scores.fill(0.0);
        return Stats::NOTHING;
    }
    scores[visible..].fill(f32::MIN);
    let mut max = s.splat(f32::MIN);
    for v in lanes(scores) {
        max = s.max(max, s.load(v));
    }
    let max = s.reduce_max(max);
    for v in lanes_mut(scores) {
        s.store(exp(s, s.sub(s.load(v), s.splat(max))), v);
    }
    scores[visible..].fill(0.0);
    let mut sum = s.splat(0.0);
    for v in lanes(scores) {
        sum = s.add(sum, s.load(v));
    }
    Stats {
        max,
        sum: s.reduce_add(sum),
    }
}

dispatch! {
    /// Joins what a query found in a further chunk to what it found before.
    pub fn merge(stats: &mut Stats, values: &mut [f32], more: Stats, more_values: &[f32])
        = merge_body
}

#[inline(always)]
fn merge_body<S: Simd>(
    s: S,
    stats: &mut Stats,
    values: &mut [f32],
    more: Stats,
    more_values: &[f32],
) {
    if more.sum == 0.0 {
        return;
    }
    if stats.sum == 0.0 {
        *stats = more;
        values.copy_from_slice(more_values);
        return;
    }
    let max = stats.max.max(more.max);
    let (a, b) = ((stats.max - max).exp(), (more.max - max).exp());
    *stats = Stats {
        max,
        sum: stats.sum * a + more.sum * b,
    };
    for (v, more) in lanes_mut(values).iter_mut().zip(lanes(more_values)) {
        let scaled = s.mul(s.load(v), s.splat(a));
        s.store(s.mul_add(s.load(more), s.splat(b), scaled), v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::cpu::tests::{assert_close, random_vector};

    /// Softmax attention of one query in f64.
    fn definition(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f32> {
        let dot =
            |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
        let scores: Vec<f64> = keys.iter().map(|k| dot(q, k)).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        (0..q.len())
            .map(|d| {
                let sum: f64 = scores
                    .iter()
                    .zip(values)
                    .map(|(s, v)| (s - max).exp() * f64::from(v[d]))
                    .sum();
                (sum / total) as f32
            })
            .collect()
    }

    #[test]
    fn attention_over_chunks_is_softmax_attention() {
        for (dim, positions) in [(32, 1), (48, 31), (64, 128), (256, 129), (16, 400)] {
            let keys: Vec<_> = (0..positions)
                .map(|p| random_vector(dim, p as u64))
                .collect();
            let values: Vec<_> = (0..positions)
                .map(|p| random_vector(dim, 1000 + p as u64))
                .collect();
            let mut cache = KvCache::new(1, dim, positions);
            for p in 0..positions {
                write_kv(&mut cache.k, &mut cache.v, dim, p, &keys[p], &values[p]);
            }
            // Six queries: a group of four and two single ones, with different horizons.
            let n = 6;
            let mut queries = random_vector(n * dim, 77);
            queries[0] = 30.0;
            let horizons: Vec<usize> = (0..n).map(|i| (positions - i % positions).max(1)).collect();
            for isa in Isa::available() {
                let (mut stats, mut found) = (vec![Stats::NOTHING; n], vec![0.0; n * dim]);
                for chunk in 0..positions.div_ceil(CHUNK) {
                    let visible: Vec<usize> = horizons
                        .iter()
                        .map(|h| h.saturating_sub(chunk * CHUNK).min(CHUNK))
                        .collect();
                    let (k, v) = cache.chunk(0, chunk);
                    let (mut more, mut more_values) = (stats.clone(), found.clone());
                    attend_chunk(isa, &queries, &visible, k, v, &mut more, &mut more_values);
                    for i in 0..n {
                        let row = i * dim..(i + 1) * dim;
                        merge(
                            isa,
                            &mut stats[i],
                            &mut found[row.clone()],
                            more[i],
                            &more_values[row],
                        );
                    }
                }
                for i in 0..n {
                    let row: Vec<f32> = found[i * dim..(i + 1) * dim]
                        .iter()
                        .map(|v| v / stats[i].sum)
                        .collect();
                    let expected = definition(
                        &queries[i * dim..(i + 1) * dim],
                        &keys[..horizons[i]],
                        &values[..horizons[i]],
                    );
                    assert_close(&row, &expected, 2e-5);
                }
            }
        }
    }
}
