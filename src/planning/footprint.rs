//! What a model weighs, item by item: the input of every plan.
//!
//! The published NF4 layout follows from config.json alone, so a 41 GB model can be planned before
//! it is downloaded. A caller that has the headers overwrites the items it knows better.

use serde::{Deserialize, Serialize};

/// NF4 in the layout that the kernels read: tiles of 32 rows x 64 columns, 1,024 bytes of codes and
/// one u16 absmax per row.
const TILE_ROWS: u64 = 32;
const TILE_COLS: u64 = 64;
const TILE_BYTES: u64 = TILE_ROWS * TILE_COLS / 2 + TILE_ROWS * 2;

/// Values of one int8 KV block, and the bytes beside its codes: one f16 scale.
const KV_BLOCK: u64 = 32;
const KV_BLOCK_EXTRA_BYTES: u64 = 2;

/// What a CUDA context takes on the card before anything is loaded; an estimate.
const CONTEXT_BYTES: u64 = 450_000_000;
/// Activations, logits and scratch of the decode step; an estimate. Prefill borrows expert slots.
const WORKSPACE_BYTES: u64 = 350_000_000;

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    #[default]
    F16,
    Int8,
}

impl KvDtype {
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F16 => "f16",
            KvDtype::Int8 => "int8",
        }
    }
}

/// Sizes of a model under the names of config.json.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeNumbers {
    pub vocab_size: u64,
    pub hidden_size: u64,
    /// Layers with gated attention.
    pub num_attention_layers: u64,
    /// Layers with a gated delta net.
    pub num_delta_net_layers: u64,
    pub num_attention_heads: u64,
    pub num_key_value_heads: u64,
    pub head_dim: u64,
    pub linear_num_key_heads: u64,
    pub linear_num_value_heads: u64,
    pub linear_key_head_dim: u64,
    pub linear_value_head_dim: u64,
    pub linear_conv_kernel_dim: u64,
    pub num_experts: u64,
    pub num_experts_per_tok: u64,
    pub moe_intermediate_size: u64,
    pub shared_expert_intermediate_size: u64,
}

/// Bytes and arithmetic of a model; everything a plan asks about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    pub shape: ShapeNumbers,
    pub num_layers: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    /// Attention, delta nets and shared experts in NF4, norms and convolutions in f32.
    pub dense_bytes: u64,
    pub router_bytes: u64,
    pub lm_head_bytes: u64,
    /// Stays in host memory: a token reads one row.
    pub embedding_bytes: u64,
    /// One routed expert in the kernel's layout; also the size of a slot.
    pub expert_bytes: u64,
    /// Arithmetic of one routed expert for one token.
    pub expert_flops: u64,
    pub kv_f16_bytes_per_token: u64,
    pub kv_int8_bytes_per_token: u64,
    pub delta_state_bytes: u64,
    pub conv_state_bytes: u64,
    pub context_bytes: u64,
    pub workspace_bytes: u64,
    /// Arithmetic of one token outside attention scores.
    pub flops_per_token: u64,
    /// Arithmetic of one token per token of context: scores and their weighted sum.
    pub attention_flops_per_context_token: u64,
}

impl Footprint {
    /// The published layout: Linears in NF4, router, embedding and lm_head in bf16.
    pub fn published(shape: &ShapeNumbers) -> Self {
        let s = shape;
        let layers = s.num_attention_layers + s.num_delta_net_layers;
        let key_dim = s.linear_num_key_heads * s.linear_key_head_dim;
        let value_dim = s.linear_num_value_heads * s.linear_value_head_dim;
        let conv_dim = 2 * key_dim + value_dim;
        let kv_rows = s.num_key_value_heads * s.head_dim;
        let q_cols = s.num_attention_heads * s.head_dim;
        let d = s.hidden_size;

        let attention = [(2 * q_cols, d), (kv_rows, d), (kv_rows, d), (d, q_cols)];
        let delta_net = [
            (2 * key_dim + 2 * value_dim, d),
            (2 * s.linear_num_value_heads, d),
            (d, value_dim),
        ];
        let shared_size = s.shared_expert_intermediate_size;
        let shared = [(shared_size, d), (shared_size, d), (d, shared_size), (1, d)];
        let expert_size = s.moe_intermediate_size;
        let expert = [(expert_size, d), (expert_size, d), (d, expert_size)];

        let per_layer_kind = |bytes: fn(&[(u64, u64)]) -> u64| {
            s.num_attention_layers * bytes(&attention)
                + s.num_delta_net_layers * bytes(&delta_net)
                + layers * bytes(&shared)
        };
        let vectors = layers * 2 * d
            + d
            + s.num_attention_layers * 2 * s.head_dim
            + s.num_delta_net_layers
                * (conv_dim * s.linear_conv_kernel_dim
                    + 2 * s.linear_num_value_heads
                    + s.linear_value_head_dim);
        let router_weights = layers * s.num_experts * d;
        let state = s.num_delta_net_layers * value_dim * s.linear_key_head_dim;
        let kv_values = 2 * s.num_attention_layers * kv_rows;
        let kv_blocks =
            2 * s.num_attention_layers * s.num_key_value_heads * s.head_dim.div_ceil(KV_BLOCK);
        let active = per_layer_kind(weights)
            + router_weights
            + layers * s.num_experts_per_tok * weights(&expert);

        Footprint {
            num_layers: layers as usize,
            num_experts: s.num_experts as usize,
            num_experts_per_tok: s.num_experts_per_tok as usize,
            dense_bytes: per_layer_kind(nf4_bytes) + 4 * vectors,
            router_bytes: 2 * router_weights,
            lm_head_bytes: 2 * s.vocab_size * d,
            embedding_bytes: 2 * s.vocab_size * d,
            expert_bytes: nf4_bytes(&expert),
            expert_flops: 2 * weights(&expert),
            kv_f16_bytes_per_token: 2 * kv_values,
            kv_int8_bytes_per_token: kv_values + KV_BLOCK_EXTRA_BYTES * kv_blocks,
            delta_state_bytes: 4 * state,
            // The projections of the last tokens, whole, as the kernels keep them.
            conv_state_bytes: 4
                * s.num_delta_net_layers
                * (2 * key_dim + 2 * value_dim)
                * s.linear_conv_kernel_dim,
            context_bytes: CONTEXT_BYTES,
            workspace_bytes: WORKSPACE_BYTES,
            shape: shape.clone(),
            // Per state element: decay, read by key, update, read by query.
            flops_per_token: 2 * active + 8 * state,
            attention_flops_per_context_token: 4 * s.num_attention_layers * q_cols,
        }
    }

    /// VRAM of one sequence: its keys and values of `ctx_tokens`, and its states.
    pub fn sequence_bytes(&self, ctx_tokens: u64, kv_dtype: KvDtype) -> u64 {
        let kv_bytes = ctx_tokens.saturating_mul(self.kv_bytes_per_token(kv_dtype));
        kv_bytes.saturating_add(self.delta_state_bytes + self.conv_state_bytes)
    }

    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> u64 {
        match dtype {
            KvDtype::F16 => self.kv_f16_bytes_per_token,
            KvDtype::Int8 => self.kv_int8_bytes_per_token,
        }
    }

    /// All routed experts of all layers.
    pub fn experts_bytes(&self) -> u64 {
        self.total_experts() as u64 * self.expert_bytes
    }

    pub fn total_experts(&self) -> usize {
        self.num_layers * self.num_experts
    }

    /// Weights every token reads, whatever the router picks.
    pub fn always_read_bytes(&self) -> u64 {
        self.dense_bytes + self.router_bytes + self.lm_head_bytes
    }

    /// On the card before the first expert: everything but KV cache and slots.
    pub fn fixed_vram_bytes(&self) -> u64 {
        self.fixed_vram_bytes_without_head() + self.lm_head_bytes
    }

    /// The same where the output matrix stays in RAM.
    pub fn fixed_vram_bytes_without_head(&self) -> u64 {
        self.dense_bytes
            + self.router_bytes
            + self.delta_state_bytes
            + self.conv_state_bytes
            + self.context_bytes
            + self.workspace_bytes
    }
}

fn weights(matrices: &[(u64, u64)]) -> u64 {
    matrices.iter().map(|(rows, cols)| rows * cols).sum()
}

/// Bytes of one NF4 matrix in the layout that the kernels read, scales included.
pub fn nf4_matrix_bytes(rows: u64, cols: u64) -> u64 {
    rows.div_ceil(TILE_ROWS) * cols.div_ceil(TILE_COLS) * TILE_BYTES
}

fn nf4_bytes(matrices: &[(u64, u64)]) -> u64 {
    matrices
        .iter()
        .map(|&(rows, cols)| nf4_matrix_bytes(rows, cols))
        .sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Qwen3-Next-80B-A3B.
    pub(crate) fn qwen3_next_80b() -> Footprint {
        Footprint::published(&ShapeNumbers {
            vocab_size: 151_936,
            hidden_size: 2048,
            num_attention_layers: 12,
            num_delta_net_layers: 36,
            num_attention_heads: 16,
            num_key_value_heads: 2,
            head_dim: 256,
            linear_num_key_heads: 16,
            linear_num_value_heads: 32,
            linear_key_head_dim: 128,
            linear_value_head_dim: 128,
            linear_conv_kernel_dim: 4,
            num_experts: 512,
            num_experts_per_tok: 10,
            moe_intermediate_size: 512,
            shared_expert_intermediate_size: 512,
        })
    }

    #[test]
    fn the_80b_weighs_what_its_published_layout_says() {
        let f = qwen3_next_80b();
        assert_eq!((f.num_layers, f.num_experts), (48, 512));
        assert_eq!(f.expert_bytes, 1_671_168);
        assert_eq!(f.experts_bytes(), 24_576 * 1_671_168);
        assert_eq!(f.kv_f16_bytes_per_token, 24_576);
        assert_eq!(f.kv_int8_bytes_per_token, 13_056);
        assert_eq!(f.attention_flops_per_context_token, 196_608);
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let near = |found: f64, expected: f64| {
            assert!(
                (found - expected).abs() < 0.008,
                "{found} GB, expected {expected}"
            );
        };
        near(gb(f.dense_bytes), 0.90);
        near(gb(f.router_bytes), 0.10);
        near(gb(f.lm_head_bytes), 0.62);
        near(gb(f.delta_state_bytes + f.conv_state_bytes), 0.08);
        near(gb(f.always_read_bytes()), 1.628);
        assert!((gb(f.flops_per_token) - 6.7).abs() < 0.1);
    }

    /// Each item as worked out by hand from config.json.
    #[test]
    fn every_item_of_the_80b_is_exact() {
        let f = qwen3_next_80b();
        let tile = 32 * 64 / 2 + 32 * 2;
        let tiles = |rows: u64, cols: u64| rows.div_ceil(32) * cols.div_ceil(64) * tile;
        let attention = tiles(8192, 2048) + 2 * tiles(512, 2048) + tiles(2048, 4096);
        let delta_net = tiles(12_288, 2048) + tiles(64, 2048) + tiles(2048, 4096);
        let shared = 2 * tiles(512, 2048) + tiles(2048, 512) + tiles(1, 2048);
        let vectors = 48 * 2 * 2048 + 2048 + 12 * 2 * 256 + 36 * (8192 * 4 + 2 * 32 + 128);
        let dense = 12 * attention + 36 * delta_net + 48 * shared + 4 * vectors;
        assert_eq!((f.dense_bytes, dense), (905_489_408, 905_489_408));
        assert_eq!(f.router_bytes, 48 * 512 * 2048 * 2);
        assert_eq!(f.lm_head_bytes, 151_936 * 2048 * 2);
        assert_eq!(f.embedding_bytes, 151_936 * 2048 * 2);
        assert_eq!(f.delta_state_bytes, 36 * 32 * 128 * 128 * 4);
        assert_eq!(f.conv_state_bytes, 36 * 12_288 * 4 * 4);
        assert_eq!(f.context_bytes + f.workspace_bytes, 800_000_000);
        assert_eq!(f.expert_flops, 2 * 3 * 512 * 2048);
        assert_eq!(f.flops_per_token, 6_653_411_328);
        let without_head = f.fixed_vram_bytes_without_head();
        let parts = [905_489_408, 100_663_296, 75_497_472, 7_077_888, 800_000_000];
        assert_eq!(without_head, parts.iter().sum::<u64>());
        assert_eq!(f.fixed_vram_bytes(), without_head + 622_329_856);
        assert_eq!(
            f.always_read_bytes(),
            905_489_408 + 100_663_296 + 622_329_856
        );
    }
}
