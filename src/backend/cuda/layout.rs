//! What a sequence carries on, and where it lies: projections that the convolution still needs,
//! delta-rule memories, keys and values. All sequences of a pool have the same layout, so that a graph
//! knows places in it.

use std::ops::Range;

use super::abi::KvCache;
use crate::backend::kv::KV_BLOCK;
use crate::backend::{KvDtype, MixerKind, ModelShape};

/// Caches hold whole groups of this many tokens, so that kernels may read to the end of one.
const CAPACITY_UNIT: usize = 64;

/// Of one layer: addresses on the device, or places in a [`StateLayout`].
#[derive(Clone, Copy)]
pub enum LayerState {
    DeltaNet {
        /// `[taps, qkvz_rows]`: the projection of position p is in slot p % taps
        ring: u64,
        /// `[value_heads, value_head_dim, key_head_dim]`
        memory: u64,
    },
    Attention(KvCache),
}

impl LayerState {
    /// The addresses of these places in a state at `base`.
    pub fn at(self, base: u64) -> Self {
        match self {
            LayerState::DeltaNet { ring, memory } => LayerState::DeltaNet {
                ring: base + ring,
                memory: base + memory,
            },
            LayerState::Attention(cache) => LayerState::Attention(KvCache {
                k: base + cache.k,
                v: base + cache.v,
                k_scales: base + cache.k_scales,
                v_scales: base + cache.v_scales,
                ..cache
            }),
        }
    }
}

/// Bytes of the keys of one token in one layer, and of their scales; as many for its values.
fn kv_bytes(dtype: KvDtype, shape: &ModelShape) -> (usize, usize) {
    let values = shape.attention.kv_rows();
    match dtype {
        KvDtype::Int8 => (values, values / KV_BLOCK * 2),
        _ => (2 * values, 0),
    }
}

/// Bytes of the keys and values of one token in one layer.
pub fn kv_token_bytes(dtype: KvDtype, shape: &ModelShape) -> usize {
    let (values, scales) = kv_bytes(dtype, shape);
    2 * (values + scales)
}

/// Where the parts of a sequence's states lie, from its beginning on.
pub struct StateLayout {
    /// Places
    pub layers: Vec<LayerState>,
    pub bytes: usize,
    /// Tokens that there is room for
    pub capacity: usize,
    /// Byte ranges of states of fixed size: rings and memories
    pub fixed: Vec<Range<usize>>,
    /// One per layer of attention, head and kind: keys, values, and scales of each
    pub rows: Vec<TokenRows>,
}

/// A row per token.
#[derive(Clone, Copy)]
pub struct TokenRows {
    /// Place of the first
    pub start: usize,
    pub row_bytes: usize,
}

impl StateLayout {
    pub fn new(shape: &ModelShape, format: KvDtype, max_tokens: usize) -> Self {
        let capacity = max_tokens.next_multiple_of(CAPACITY_UNIT);
        let net = &shape.delta_net;
        let (values, scales) = kv_bytes(format, shape);
        let heads = shape.attention.num_key_value_heads;
        let mut layout = StateLayout {
            layers: Vec::new(),
            bytes: 0,
            capacity,
            fixed: Vec::new(),
            rows: Vec::new(),
        };
        for kind in &shape.mixers {
            let state = match kind {
                MixerKind::GatedDeltaNet => {
                    let first = layout.bytes;
                    let ring = layout.take(4 * net.conv_kernel_dim * net.qkvz_rows());
                    let memory = layout.take(4 * net.value_dim() * net.key_head_dim);
                    layout.fixed.push(first..layout.bytes);
                    LayerState::DeltaNet { ring, memory }
                }
                MixerKind::GatedAttention => LayerState::Attention(KvCache {
                    k: layout.take_rows(heads, values / heads),
                    v: layout.take_rows(heads, values / heads),
                    k_scales: layout.take_rows(heads, scales / heads),
                    v_scales: layout.take_rows(heads, scales / heads),
                    capacity: capacity as i32,
                    format: (format == KvDtype::Int8) as i32,
                }),
            };
            layout.layers.push(state);
        }
        layout
    }

    /// The place of the next part, rounded up to 256 bytes.
    fn take(&mut self, bytes: usize) -> u64 {
        let place = self.bytes as u64;
        self.bytes += bytes.next_multiple_of(256);
        place
    }

    /// The same of `[heads, capacity]` rows.
    fn take_rows(&mut self, heads: usize, row_bytes: usize) -> u64 {
        let place = self.take(heads * self.capacity * row_bytes);
        if row_bytes > 0 {
            let head = |head| TokenRows {
                start: place as usize + head * self.capacity * row_bytes,
                row_bytes,
            };
            self.rows.extend((0..heads).map(head));
        }
        place
    }
}
