//! Grid, block and shared memory of each kernel: what the head comments in `kernels/*.cu` ask for.

use super::abi::{ExpertLayout, Format, Linear};
use super::device::{DeviceFacts, Geometry};
use crate::backend::{AttentionShape, DeltaNetShape, ModelShape};
use crate::planning::Precision;

fn geometry(x: usize, block: usize, shared_bytes: usize) -> Geometry {
    Geometry {
        grid: [x.max(1) as u32, 1, 1],
        block: [block as u32, 1],
        shared_bytes: shared_bytes as u32,
    }
}

pub fn begin(dim: usize) -> Geometry {
    geometry(dim.div_ceil(1024), 256, 0)
}

/// Blocks of [`norm_linear`] that the GPU holds at once: their shared memory limits them.
pub fn resident_blocks(facts: &DeviceFacts) -> usize {
    let per_multiprocessor = match facts.compute_capability {
        // Ada, consumer Ampere and Blackwell have 100 KB of shared memory, datacentre chips more.
        (8, 6 | 9) | (12, _) => 2,
        _ => 3,
    };
    per_multiprocessor * facts.multiprocessors as usize
}

/// The most dynamic shared memory of a block, in bytes.
pub fn most_shared_bytes(facts: &DeviceFacts) -> usize {
    match facts.compute_capability {
        (8, 0 | 7) => 163 << 10,
        (9..=11, _) => 227 << 10,
        _ => 99 << 10,
    }
}

/// The first matrix, if it is rows of bf16 or f32, is gone through in a loop by blocks that are all
/// on the GPU at once.
pub fn norm_linear(linears: [&Linear; 3], resident_blocks: usize) -> Geometry {
    let blocks = |i: usize| match linears[i] {
        Linear { weights: 0, .. } => 0,
        m if m.format == Format::Nf4Tiles as i32 => (m.rows as usize).div_ceil(32),
        m if i == 0 => (m.rows as usize).div_ceil(8).min(resident_blocks),
        m => (m.rows as usize).div_ceil(8),
    };
    geometry(blocks(0) + blocks(1) + blocks(2), 256, 40_960)
}

/// Tokens of a group, which the kernels named `_batch` take at once.
const GROUP: usize = 4;

/// [`norm_linear`] of several tokens, which has as many blocks for each group of them.
pub fn norm_linear_batch(linears: [&Linear; 3], resident_blocks: usize, tokens: usize) -> Geometry {
    let rows = |m: &&Linear| m.weights != 0 && m.format != Format::Nf4Tiles as i32;
    let kept_x = linears.into_iter().filter(rows).map(|m| m.kblocks as usize);
    let kept_bytes = kept_x.max().unwrap_or(0) * 64 * 4 * GROUP + 128;
    Geometry {
        shared_bytes: kept_bytes.max(65_536) as u32,
        ..norm_linear(linears, resident_blocks).for_tokens(tokens.div_ceil(GROUP))
    }
}

/// Logits of a chunk of `sample_best`: many chunks, each with a maximum of its own, at most 1024.
pub fn sample_chunk(vocab_size: usize) -> usize {
    vocab_size.div_ceil(768).next_multiple_of(32).max(64)
}

pub fn sample_best(vocab_size: usize) -> Geometry {
    let chunks = vocab_size.div_ceil(sample_chunk(vocab_size));
    geometry(chunks.div_ceil(8), 256, 0)
}

pub fn linear_add(linear: &Linear) -> Geometry {
    geometry((linear.rows as usize).div_ceil(16), 512, 49_152)
}

/// The same of several tokens, for tiles.
pub fn linear_add_batch(linear: &Linear, tokens: usize) -> Geometry {
    Geometry {
        shared_bytes: 98_304,
        ..linear_add(linear).for_tokens(tokens.div_ceil(GROUP))
    }
}

/// Above 4096 rows of bf16 or f32, a warp takes four.
pub fn linear_small(linear: &Linear) -> Geometry {
    let rows = linear.rows as usize;
    let per_block = match linear.format == Format::Nf4Tiles as i32 || rows > 4096 {
        true => 32,
        false => 8,
    };
    geometry(rows.div_ceil(per_block), 256, 40_960)
}

pub fn delta_net(s: &DeltaNetShape) -> Geometry {
    Geometry {
        block: [288, 1],
        ..tiles(
            s.value_head_dim.div_ceil(4096 / s.key_head_dim),
            s.num_value_heads,
            0,
        )
    }
}

/// Of tokens that are kept, those that the ring has room for.
pub fn keep_ring(s: &DeltaNetShape, tokens: usize) -> Geometry {
    prefill_ring(s, tokens)
}

/// Grid and buffers of decode attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParts {
    /// Parts that the context is divided into
    pub splits: usize,
    /// KV heads times passes over at most 8 query heads each
    pub head_blocks: usize,
    /// Floats
    pub partial: usize,
    pub counters: usize,
}

pub fn attention_parts(s: &AttentionShape, multiprocessors: usize) -> AttentionParts {
    let group = s.num_attention_heads / s.num_key_value_heads.max(1);
    let head_blocks = s.num_key_value_heads * group.div_ceil(8);
    let splits = (multiprocessors / head_blocks.max(1)).clamp(1, 256);
    AttentionParts {
        splits,
        head_blocks,
        partial: head_blocks * splits * group.min(8) * (s.head_dim + 2),
        counters: 64 * head_blocks,
    }
}

pub fn attention(s: &AttentionShape, parts: &AttentionParts, int8: bool) -> Geometry {
    let hd = s.head_dim;
    let shared = match int8 {
        false => 192 * hd * 2 + 4 * hd + 336,
        true => 320 * hd * 17 / 16 + 4 * hd + 336,
    };
    Geometry {
        block: [128, 1],
        ..tiles(parts.splits, parts.head_blocks, shared)
    }
}

/// One block more writes the normed input for the CPU, if `with_x`.
pub fn router(router: &Linear, shared_gate: &Linear, with_x: bool) -> Geometry {
    let blocks = |m: &Linear| match m.format == Format::Nf4Tiles as i32 {
        true => (m.rows as usize).div_ceil(16),
        false => (m.rows as usize).div_ceil(4),
    };
    geometry(
        blocks(router) + blocks(shared_gate) + usize::from(with_x),
        512,
        49_152,
    )
}

pub fn experts_up(shape: &ModelShape, layouts: [&ExpertLayout; 2]) -> Geometry {
    let rows = layouts.map(|l| l.intermediate as usize);
    let rows = rows[0].max(rows[1]).div_ceil(16);
    tiles(rows, shape.moe.num_experts_per_tok + 1, 40_960)
}

pub fn experts_down(dim: usize) -> Geometry {
    geometry(dim.div_ceil(16), 512, 49_152)
}

/// Dynamic shared memory of the matrix products of prefill.
fn matmul_shared_bytes(precision: Precision) -> usize {
    match precision {
        Precision::Exact => 99_328,
        Precision::F16 => 66_560,
    }
}

/// One dimension.
pub fn rows(blocks: usize, block: usize) -> Geometry {
    geometry(blocks, block, 0)
}

/// Row tiles times token tiles.
pub fn tiles(rows: usize, tokens: usize, shared_bytes: usize) -> Geometry {
    Geometry {
        grid: [rows as u32, tokens as u32, 1],
        block: [256, 1],
        shared_bytes: shared_bytes as u32,
    }
}

/// Shared out so that few multiprocessors idle, and large products keep their tokens.
pub fn matmul(
    rows: usize,
    tokens: usize,
    multiprocessors: usize,
    precision: Precision,
) -> Geometry {
    let (r, t) = (rows.div_ceil(256), tokens.div_ceil(128));
    let (r, t) = match r * t {
        blocks if blocks < multiprocessors => {
            (r, tokens.div_ceil(16).min(t.max(multiprocessors / r)))
        }
        blocks if blocks >= 8 * multiprocessors => (r.div_ceil(4), t),
        _ => (r, t),
    };
    tiles(r, t, matmul_shared_bytes(precision))
}

pub fn prefill_conv(s: &DeltaNetShape, tokens: usize) -> Geometry {
    tiles(
        tokens.div_ceil(16),
        (2 * s.num_key_heads + s.num_value_heads).div_ceil(8),
        0,
    )
}

pub fn prefill_delta_rule(s: &DeltaNetShape) -> Geometry {
    Geometry {
        block: [128, 1],
        ..tiles(
            s.value_head_dim.div_ceil(4096 / s.key_head_dim),
            s.num_value_heads,
            0,
        )
    }
}

/// Tokens of a chunk of the delta rule.
pub const DELTA_CHUNK: usize = 64;

/// Bytes of keys and queries of a key head's chunk, and of what else a value head's has.
fn delta_images(s: &DeltaNetShape) -> [usize; 2] {
    [512 * s.key_head_dim, 4 * 8192 + 768]
}

/// Scratch memory of one chunk of the delta rule.
pub fn delta_scratch_bytes(s: &DeltaNetShape) -> usize {
    let [keys, head] = delta_images(s);
    s.num_key_heads * keys + s.num_value_heads * head
}

/// What the chunks of `tokens` need beside the state.
pub fn prefill_delta_prepare(s: &DeltaNetShape, tokens: usize) -> Geometry {
    let [keys, head] = delta_images(s);
    Geometry {
        block: [128, 1],
        ..tiles(
            tokens.div_ceil(DELTA_CHUNK),
            s.num_key_heads,
            keys + head + 512,
        )
    }
}

/// One chunk after the other, with one or two in shared memory; see [`super::variants`].
pub fn prefill_delta_chunks(s: &DeltaNetShape, stages: usize) -> Geometry {
    let [keys, head] = delta_images(s);
    Geometry {
        block: [128, 1],
        ..tiles(
            s.value_head_dim / 32,
            s.num_value_heads,
            stages * (keys + head + 9216),
        )
    }
}

pub fn prefill_ring(s: &DeltaNetShape, tokens: usize) -> Geometry {
    tiles(
        s.qkvz_rows().div_ceil(256),
        tokens.min(s.conv_kernel_dim),
        0,
    )
}

pub fn prefill_router(experts: usize, tokens: usize, multiprocessors: usize) -> Geometry {
    let tokens = tokens.div_ceil(128);
    let wide = tokens * experts.div_ceil(128);
    let per_block = if 4 * wide >= 3 * multiprocessors {
        128
    } else {
        64
    };
    tiles(tokens, experts.div_ceil(per_block), 0)
}

pub fn prefill_experts_up(stride: usize, bound: usize, precision: Precision) -> Geometry {
    tiles(stride.div_ceil(128), bound, matmul_shared_bytes(precision))
}

pub fn prefill_experts_down(
    rows: usize,
    tokens: usize,
    bound: usize,
    precision: Precision,
) -> Geometry {
    let blocks = rows.div_ceil(256);
    let blocks = if rows >= 2048 && tokens >= 2048 {
        blocks / 2
    } else {
        blocks
    };
    tiles(blocks, bound, matmul_shared_bytes(precision))
}

/// Counting and scattering of the sort by expert.
pub fn prefill_group(experts: usize, tokens: usize) -> Geometry {
    geometry(tokens.div_ceil(64), 256, 8 * experts)
}

/// Fetching of host arrays, the longest of which has `longest` words.
pub fn prefill_fetch(longest: usize) -> Geometry {
    Geometry {
        grid: [longest.div_ceil(16 * 256).clamp(1, 64) as u32, 8, 1],
        ..geometry(1, 256, 0)
    }
}

pub fn prefill_combine(tokens: usize) -> Geometry {
    Geometry {
        block: [64, 4],
        ..geometry(tokens.div_ceil(4), 256, 0)
    }
}

pub fn combine(dim: usize) -> Geometry {
    geometry(dim.div_ceil(1024), 256, 0)
}

pub fn prefill_qkv(s: &AttentionShape, tokens: usize) -> Geometry {
    let heads = s.num_attention_heads + 2 * s.num_key_value_heads;
    geometry((tokens * heads).div_ceil(8), 256, 0)
}

pub fn prefill_attention(s: &AttentionShape, tokens: usize, precision: Precision) -> Geometry {
    let group = s.num_attention_heads / s.num_key_value_heads.max(1);
    let rows = (tokens * group).div_ceil(64);
    let shared = match precision {
        Precision::Exact => 384,
        Precision::F16 => 256,
    };
    Geometry {
        block: [128, 1],
        ..tiles(rows, s.num_key_value_heads, shared * s.head_dim)
    }
}

/// One f16 term, for compute capability 9.0 and head_dim 256.
pub fn prefill_attention_sm90(s: &AttentionShape, tokens: usize, int8: bool) -> Geometry {
    let group = s.num_attention_heads / s.num_key_value_heads.max(1);
    let (block, shared) = match int8 {
        false => (384, 197_632),
        true => (512, 232_448),
    };
    Geometry {
        block: [block, 1],
        ..tiles(
            (tokens * group).div_ceil(128),
            s.num_key_value_heads,
            shared,
        )
    }
}
