//! Causal softmax attention over a cache of keys and values, a piece of the context at a time.
//!
//! Each query visits the context in chunks of [`CHUNK`] positions, and merges what it found there
//! in order. Chunks depend on nothing but the position, so decode may give them to different
//! workers, and prefill may take many queries at once, without changing a bit of the result.

use std::ops::Range;

use half::f16;

use super::isa::{Isa, dispatch};
use super::kv_cache::{Chunk, KvElement};
use super::math::exp;
use super::simd::{LANES, Simd, lanes, lanes_mut};
use crate::backend::kv::KV_BLOCK;

/// Positions of one chunk.
pub const CHUNK: usize = 128;

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

/// A type of KV cache that [`attend_chunk`](Self::attend_chunk) reads.
pub trait Attend: KvElement {
    /// Some queries over one chunk.
    ///
    /// - `queries`: `[n, padded_dim]`, scaled
    /// - `visible`: `[n]` leading positions of the chunk that each may see, up to [`CHUNK`]
    /// - `stats`: `[n]`; `values`: `[n, padded_dim]`
    fn attend_chunk(
        isa: Isa,
        queries: &[f32],
        visible: &[usize],
        chunk: Chunk<Self>,
        stats: &mut [Stats],
        values: &mut [f32],
    );
}

/// Compiles attention for one type of cache.
macro_rules! attend {
    ($element:ty, $name:ident) => {
        dispatch! {
            fn $name(
                queries: &[f32],
                visible: &[usize],
                chunk: Chunk<$element>,
                stats: &mut [Stats],
                values: &mut [f32],
            ) = attend_chunk_body
        }

        impl Attend for $element {
            fn attend_chunk(
                isa: Isa,
                queries: &[f32],
                visible: &[usize],
                chunk: Chunk<$element>,
                stats: &mut [Stats],
                values: &mut [f32],
            ) {
                $name(isa, queries, visible, chunk, stats, values);
            }
        }
    };
}
attend!(f32, attend_f32);
attend!(f16, attend_f16);
attend!(i8, attend_int8);

/// Queries at once.
const QUERIES: usize = 4;

#[inline(always)]
fn attend_chunk_body<S: Simd, T: KvElement>(
    s: S,
    queries: &[f32],
    visible: &[usize],
    chunk: Chunk<T>,
    stats: &mut [Stats],
    values: &mut [f32],
) {
    let n = visible.len();
    let dim = chunk.padded_dim;
    assert!(chunk.k.len() == CHUNK * dim && chunk.v.len() == CHUNK * dim);
    assert!(stats.len() == n && queries.len() == n * dim && values.len() == n * dim);
    let mut i = 0;
    while i < n {
        let count = if n - i >= QUERIES { QUERIES } else { 1 };
        let rows = i * dim..(i + count) * dim;
        let group = Group {
            queries: &queries[rows.clone()],
            visible: &visible[i..i + count],
            k: lanes(chunk.k),
            v: lanes(chunk.v),
            k_scales: lanes(chunk.k_scales),
            v_scales: chunk.v_scales,
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

struct Group<'a, T> {
    queries: &'a [f32],
    visible: &'a [usize],
    k: &'a [[T; LANES]],
    v: &'a [[T; LANES]],
    /// `[CHUNK / 16, blocks]`
    k_scales: &'a [[f16; LANES]],
    /// `[blocks, CHUNK]`
    v_scales: &'a [f16],
    dim: usize,
}

impl<T: KvElement> Group<'_, T> {
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
            if T::SCALED {
                let blocks = dim.div_ceil(KV_BLOCK);
                let scales = &self.k_scales[2 * pair * blocks..2 * (pair + 1) * blocks];
                for b in 0..blocks {
                    let dims = b * KV_BLOCK..dim.min((b + 1) * KV_BLOCK);
                    let mut part = [[s.splat(0.0); 2]; N];
                    add_dots(s, low, high, dims, &queries, &mut part);
                    let scales = [s.load_f16(&scales[b]), s.load_f16(&scales[blocks + b])];
                    for i in 0..N {
                        for half in 0..2 {
                            sums[i][half] = s.mul_add(part[i][half], scales[half], sums[i][half]);
                        }
                    }
                }
            } else {
                add_dots(s, low, high, 0..dim, &queries, &mut sums);
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
        let mut scaled;
        let mut scores = scores;
        if T::SCALED {
            // One block is two vectors, and pairs of vectors start with an even one.
            let block = first * LANES / KV_BLOCK;
            let scales = lanes(&self.v_scales[block * CHUNK..(block + 1) * CHUNK]);
            scaled = *scores;
            for scores in &mut scaled {
                for (v, scale) in lanes_mut(scores).iter_mut().zip(scales) {
                    s.store(s.mul(s.load(v), s.load_f16(scale)), v);
                }
            }
            scores = &scaled;
        }
        let mut sums = [[s.splat(0.0); M]; N];
        for (p, row) in self.v.chunks_exact(vectors).enumerate().take(positions) {
            let row = &row[first..first + M];
            for i in 0..N {
                let score = s.splat(scores[i][p]);
                for j in 0..M {
                    sums[i][j] = s.mul_add(score, T::load(s, &row[j]), sums[i][j]);
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

/// Adds `q[d] * k[d]` over `dims` for 2 x 16 keys and `N` queries.
#[inline(always)]
fn add_dots<S: Simd, T: KvElement, const N: usize>(
    s: S,
    low: &[[T; LANES]],
    high: &[[T; LANES]],
    dims: Range<usize>,
    queries: &[&[f32]; N],
    sums: &mut [[S::F32; 2]; N],
) {
    for d in dims {
        let (low, high) = (T::load(s, &low[d]), T::load(s, &high[d]));
        for i in 0..N {
            let q = s.splat(queries[i][d]);
            sums[i][0] = s.mul_add(low, q, sums[i][0]);
            sums[i][1] = s.mul_add(high, q, sums[i][1]);
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
    use crate::backend::cpu::isa::Scalar;
    use crate::backend::cpu::kv_cache::{Kv, KvCache, KvData, KvLayout};
    use crate::backend::cpu::tests::{assert_close, random_vector};
    use crate::backend::kv::KvDtype;
    use crate::backend::tally::Tally;

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

    /// The data of a cache whose type is known.
    trait AsKv<T> {
        fn as_kv(&mut self) -> &mut Kv<T>;
    }
    macro_rules! as_kv {
        ($t:ty, $variant:ident) => {
            impl AsKv<$t> for KvData {
                fn as_kv(&mut self) -> &mut Kv<$t> {
                    let KvData::$variant(kv) = self else {
                        unreachable!("made with this type")
                    };
                    kv
                }
            }
        };
    }
    as_kv!(f32, F32);
    as_kv!(f16, F16);
    as_kv!(i8, Int8);

    /// What the cache holds at one position: key and value.
    fn stored<T: Attend>(kv: &Kv<T>, layout: KvLayout, p: usize) -> [Vec<f32>; 2] {
        let (chunk, p) = (kv.chunk(layout, 0, p / CHUNK), p % CHUNK);
        let dim = layout.padded_dim;
        let blocks = dim.div_ceil(KV_BLOCK);
        let plain = |element: T| T::load(Scalar, &[element; LANES])[0];
        let scale = |scales: &[f16], i: usize| match T::SCALED {
            true => scales[i].to_f32(),
            false => 1.0,
        };
        let group = p / LANES;
        let key = |d: usize| {
            let at = (group * blocks + d / KV_BLOCK) * LANES + p % LANES;
            plain(chunk.k[(group * dim + d) * LANES + p % LANES]) * scale(chunk.k_scales, at)
        };
        let value = |d: usize| {
            plain(chunk.v[p * dim + d]) * scale(chunk.v_scales, d / KV_BLOCK * CHUNK + p)
        };
        [(0..dim).map(key).collect(), (0..dim).map(value).collect()]
    }

    #[test]
    fn attention_over_chunks_is_softmax_attention_over_what_the_cache_holds() {
        check::<f32>(KvDtype::F32, 0.0);
        check::<f16>(KvDtype::F16, 5e-4);
        check::<i8>(KvDtype::Int8, 5e-3);
    }

    /// `rounding`: of one stored value, relative to the largest of its row.
    fn check<T: Attend>(dtype: KvDtype, rounding: f32)
    where
        KvData: AsKv<T>,
    {
        for (dim, positions) in [(32, 1), (48, 31), (64, 128), (256, 129), (16, 400)] {
            let keys: Vec<_> = (0..positions)
                .map(|p| random_vector(dim, p as u64))
                .collect();
            let values: Vec<_> = (0..positions)
                .map(|p| random_vector(dim, 1000 + p as u64))
                .collect();
            let mut cache = KvCache::new(dtype, 1, dim, positions, &Tally::default());
            let layout = cache.layout;
            let kv: &mut Kv<T> = cache.data.as_kv();
            let writer = kv.writer(layout, 0..positions);
            for p in 0..positions {
                // SAFETY: one thread.
                unsafe { writer.write(0, p, &keys[p], &values[p]) };
            }
            let (mut held_keys, mut held_values) = (Vec::new(), Vec::new());
            for p in 0..positions {
                let [key, value] = stored(kv, layout, p);
                assert_close(&key, &keys[p], rounding);
                assert_close(&value, &values[p], rounding);
                held_keys.push(key);
                held_values.push(value);
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
                    let chunk = kv.chunk(layout, 0, chunk);
                    let (mut more, mut more_values) = (stats.clone(), found.clone());
                    T::attend_chunk(isa, &queries, &visible, chunk, &mut more, &mut more_values);
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
                        &held_keys[..horizons[i]],
                        &held_values[..horizons[i]],
                    );
                    assert_close(&row, &expected, 2e-5);
                }
            }
        }
    }
}
