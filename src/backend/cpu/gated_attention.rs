//! The full-attention mixer: projections, head norms, rotary, attention, output gate.

use std::cell::RefCell;

use super::attention::{Attend, Stats, merge};
use super::isa::Isa;
use super::kv_cache::{CHUNK, Kv, KvCache, KvLayout, Writer, with_kv};
use super::linear::{Linear, PanelsFrom};
use super::math::sigmoid_f32;
use super::rms_norm::rms_norm;
use super::rope::Rotation;
use super::threads::{Parts, Pool};
use crate::backend::{AttentionShape, Result};

/// Tokens of one prefill job: enough queries to reuse each key, few enough to share the work.
const TOKENS_PER_JOB: usize = 16;

/// Chunks up to this many tokens are spread over the context instead of over tokens.
pub const FEW_TOKENS: usize = 4;

pub struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub out: Linear,
    /// `[head_dim]`, 1 + w
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    pub inverse_frequencies: Vec<f32>,
}

/// Buffers of one chunk, kept between calls.
#[derive(Default)]
pub struct Buffers {
    /// `[kv_heads, tokens, queries per kv head, padded_dim]`
    queries: Vec<f32>,
    /// Of decode: `[kv_heads, chunks, n]` and the same times padded_dim
    stats: Vec<Stats>,
    values: Vec<f32>,
}

/// Space of one worker.
#[derive(Default)]
struct Scratch {
    head: Vec<f32>,
    value: Vec<f32>,
    rotation: Rotation,
    visible: Vec<usize>,
    stats: Vec<Stats>,
    values: Vec<f32>,
    more: Vec<Stats>,
    more_values: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One call's facts, shared by its jobs.
struct Call<'a> {
    layer: &'a Attention,
    isa: Isa,
    shape: &'a AttentionShape,
    eps: f32,
    projected: PanelsFrom<'a>,
    tokens: usize,
    /// Position of the first token
    start: usize,
    layout: KvLayout,
    padded_dim: usize,
    /// Query heads per KV head
    share: usize,
}

impl Attention {
    /// From the projections of `tokens` tokens to the input of `o_proj`, `[tokens, H * head_dim]`.
    ///
    /// `projected` holds the panels of `q`, then `k`, then `v`. The cache has room.
    ///
    /// # Errors
    /// If a worker thread failed.
    #[allow(clippy::too_many_arguments)]
    pub fn mix(
        &self,
        pool: &mut Pool,
        isa: Isa,
        shape: &AttentionShape,
        eps: f32,
        projected: PanelsFrom<'_>,
        tokens: usize,
        cache: &mut KvCache,
        buffers: &mut Buffers,
        out: &mut [f32],
    ) -> Result<()> {
        let call = Call {
            layer: self,
            isa,
            shape,
            eps,
            projected,
            tokens,
            start: cache.len,
            layout: cache.layout,
            padded_dim: cache.layout.padded_dim,
            share: shape.num_attention_heads / shape.num_key_value_heads,
        };
        assert!(call.start + tokens <= cache.capacity);
        with_kv!(&mut cache.data, kv => call.attend(pool, kv, buffers, out))?;
        cache.len += tokens;
        Ok(())
    }
}

impl Call<'_> {
    /// Elements of `queries` of one KV head.
    fn head_queries_len(&self) -> usize {
        self.tokens * self.share * self.padded_dim
    }

    /// Everything, on a cache of one type.
    fn attend<T: Attend>(
        &self,
        pool: &mut Pool,
        kv: &mut Kv<T>,
        buffers: &mut Buffers,
        out: &mut [f32],
    ) -> Result<()> {
        self.prepare(pool, kv, buffers)?;
        if self.tokens <= FEW_TOKENS {
            self.attend_across_context(pool, kv, buffers, out)
        } else {
            self.attend_across_tokens(pool, kv, &buffers.queries, out)
        }
    }

    /// Fills `queries` and appends keys and values to the cache, one job per KV head.
    fn prepare<T: Attend>(
        &self,
        pool: &mut Pool,
        kv: &mut Kv<T>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let heads = self.shape.num_key_value_heads;
        let q_len = self.head_queries_len();
        buffers.queries.resize(heads * q_len, 0.0);
        let writer = kv.writer(self.layout, self.start..self.start + self.tokens);
        let queries = Parts::new(&mut buffers.queries);
        pool.run(heads, &|head| {
            // SAFETY: each job has the part of its own head, and is run once.
            let queries = unsafe { queries.slice(head * q_len..(head + 1) * q_len) };
            SCRATCH.with_borrow_mut(|scratch| self.prepare_head(head, &writer, queries, scratch));
        })
    }

    /// The only job that writes to this head.
    fn prepare_head<T: Attend>(
        &self,
        kv_head: usize,
        writer: &Writer<T>,
        queries: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let layer = self.layer;
        let dim = self.shape.head_dim;
        let Scratch {
            head,
            value,
            rotation,
            ..
        } = scratch;
        head.resize(dim, 0.0);
        value.resize(dim, 0.0);
        let k_panel = layer.q.tile_rows();
        let v_panel = k_panel + layer.k.tile_rows();
        let kv_rows = kv_head * dim..(kv_head + 1) * dim;
        let scale = (dim as f32).sqrt().recip();
        for (t, queries) in queries
            .chunks_exact_mut(self.share * self.padded_dim)
            .enumerate()
        {
            let position = self.start + t;
            rotation.set(position, &layer.inverse_frequencies);
            for (i, query) in queries.chunks_exact_mut(self.padded_dim).enumerate() {
                let row = 2 * dim * (kv_head * self.share + i);
                self.projected.copy_rows(0, t, row..row + dim, head);
                let (query, padding) = query.split_at_mut(dim);
                rms_norm(self.isa, head, &layer.q_norm, self.eps, query);
                rotation.apply(query);
                query.iter_mut().for_each(|q| *q *= scale);
                padding.fill(0.0);
            }
            self.projected.copy_rows(k_panel, t, kv_rows.clone(), value);
            rms_norm(self.isa, value, &layer.k_norm, self.eps, head);
            rotation.apply(head);
            self.projected.copy_rows(v_panel, t, kv_rows.clone(), value);
            // SAFETY: no other job has this head.
            unsafe { writer.write(kv_head, position, head, value) };
        }
    }

    /// How much of `chunk` the token at `position` sees.
    fn visible(position: usize, chunk: usize) -> usize {
        (position + 1).saturating_sub(chunk * CHUNK).min(CHUNK)
    }

    /// Decode: one job per KV head and chunk of the context, then one per query to merge.
    fn attend_across_context<T: Attend>(
        &self,
        pool: &mut Pool,
        kv: &Kv<T>,
        buffers: &mut Buffers,
        out: &mut [f32],
    ) -> Result<()> {
        let heads = self.shape.num_key_value_heads;
        let chunks = (self.start + self.tokens).div_ceil(CHUNK);
        let n = self.tokens * self.share;
        let (dim, q_len) = (self.padded_dim, self.head_queries_len());
        let Buffers {
            queries,
            stats,
            values,
        } = buffers;
        stats.resize(heads * chunks * n, Stats::NOTHING);
        values.resize(heads * chunks * n * dim, 0.0);
        {
            let stats = Parts::new(stats);
            let values = Parts::new(values);
            pool.run(heads * chunks, &|item| {
                let (head, chunk) = (item / chunks, item % chunks);
                let keys_and_values = kv.chunk(self.layout, head, chunk);
                // SAFETY: each item has a part of its own, and is run once.
                let (stats, values) = unsafe {
                    (
                        stats.slice(item * n..(item + 1) * n),
                        values.slice(item * n * dim..(item + 1) * n * dim),
                    )
                };
                SCRATCH.with_borrow_mut(|scratch| {
                    let visible = &mut scratch.visible;
                    visible.clear();
                    visible
                        .extend((0..n).map(|i| Self::visible(self.start + i / self.share, chunk)));
                    let queries = &queries[head * q_len..(head + 1) * q_len];
                    T::attend_chunk(self.isa, queries, visible, keys_and_values, stats, values);
                });
            })?;
        }
        let out = Parts::new(out);
        pool.run(heads * n, &|item| {
            let (head, i) = (item / n, item % n);
            SCRATCH.with_borrow_mut(|scratch| {
                let merged = &mut scratch.values;
                merged.resize(dim, 0.0);
                let mut found = Stats::NOTHING;
                for chunk in 0..chunks {
                    let part = (head * chunks + chunk) * n + i;
                    let row = &values[part * dim..(part + 1) * dim];
                    merge(self.isa, &mut found, &mut merged[..dim], stats[part], row);
                }
                self.write_out(head, i, found, merged, &mut scratch.head, &out);
            });
        })
    }

    /// Prefill: one job per KV head and some tokens, which walk along the context.
    fn attend_across_tokens<T: Attend>(
        &self,
        pool: &mut Pool,
        kv: &Kv<T>,
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let (dim, q_len) = (self.padded_dim, self.head_queries_len());
        let token_groups = self.tokens.div_ceil(TOKENS_PER_JOB);
        let out = Parts::new(out);
        pool.run(self.shape.num_key_value_heads * token_groups, &|item| {
            // The last tokens see most, so they go first.
            let (head, group) = (item / token_groups, token_groups - 1 - item % token_groups);
            let first = group * TOKENS_PER_JOB;
            let last = self.tokens.min(first + TOKENS_PER_JOB);
            let queries = &queries[head * q_len..(head + 1) * q_len];
            let queries = &queries[first * self.share * dim..last * self.share * dim];
            let n = (last - first) * self.share;
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch {
                    visible,
                    stats,
                    values,
                    more,
                    more_values,
                    ..
                } = scratch;
                stats.clear();
                stats.resize(n, Stats::NOTHING);
                more.resize(n, Stats::NOTHING);
                values.resize(n * dim, 0.0);
                more_values.resize(n * dim, 0.0);
                for chunk in 0..(self.start + last).div_ceil(CHUNK) {
                    visible.clear();
                    visible.extend(
                        (0..n).map(|i| Self::visible(self.start + first + i / self.share, chunk)),
                    );
                    let keys_and_values = kv.chunk(self.layout, head, chunk);
                    T::attend_chunk(
                        self.isa,
                        queries,
                        visible,
                        keys_and_values,
                        more,
                        more_values,
                    );
                    for i in 0..n {
                        let row = i * dim..(i + 1) * dim;
                        let values = &mut values[row.clone()];
                        merge(self.isa, &mut stats[i], values, more[i], &more_values[row]);
                    }
                }
                for i in 0..n {
                    let row = &scratch.values[i * dim..(i + 1) * dim];
                    let found = scratch.stats[i];
                    let query = first * self.share + i;
                    self.write_out(head, query, found, row, &mut scratch.head, &out);
                }
            });
        })
    }

    /// Divides by the softmax sum and multiplies by the gate; `query` counts `[tokens, share]`.
    fn write_out(
        &self,
        kv_head: usize,
        query: usize,
        found: Stats,
        values: &[f32],
        gate: &mut Vec<f32>,
        out: &Parts<f32>,
    ) {
        let dim = self.shape.head_dim;
        let (token, head) = (
            query / self.share,
            kv_head * self.share + query % self.share,
        );
        gate.resize(dim, 0.0);
        let gate_row = 2 * dim * head + dim;
        self.projected
            .copy_rows(0, token, gate_row..gate_row + dim, gate);
        let start = (token * self.shape.num_attention_heads + head) * dim;
        // SAFETY: every query has a row of its own in the output.
        let out = unsafe { out.slice(start..start + dim) };
        for ((out, value), gate) in out.iter_mut().zip(values).zip(gate) {
            *out = value / found.sum * sigmoid_f32(*gate);
        }
    }
}
