//! The structures that kernels take by value or read from memory: `kernels/common.cuh`, field by
//! field.

use bytemuck::{Pod, Zeroable};

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Format {
    /// Tiles of 32 x 64, see [`cpu::layout`](crate::backend::cpu::layout)
    Nf4Tiles = 0,
    /// `[rows, kblocks * 64]` bf16, zero-padded
    Bf16Rows = 1,
    /// `[rows, kblocks * 64]` f32, zero-padded
    F32Rows = 2,
}

/// A `[rows, cols]` matrix; address 0 stands for no matrix.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Linear {
    pub weights: u64,
    /// `[ceil(rows / 32)]` f32, of NF4 tiles
    pub units: u64,
    pub rows: i32,
    pub cols: i32,
    /// `ceil(cols / 64)`
    pub kblocks: i32,
    /// A [`Format`]
    pub format: i32,
}

/// Where the three matrices of an expert lie in its blob: gate at 0, then up, then down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ExpertLayout {
    pub up_offset: i64,
    pub down_offset: i64,
    pub blob_bytes: i64,
    /// Rows of gate and up
    pub intermediate: i32,
    /// A [`Format`], of all three
    pub format: i32,
    /// First unit of up; gate's start at 0
    pub up_unit: i32,
    pub down_unit: i32,
    /// Units per expert
    pub num_units: i32,
    pub padding: i32,
}

/// An array that a kernel fetches from host memory: both addresses are the device's.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct HostArray {
    pub from: u64,
    pub to: u64,
    /// Words of four bytes
    pub count: i64,
}

/// `prefill_fetch`'s argument.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct HostArrays {
    pub each: [HostArray; 8],
}

/// Candidates that [`Best`] has room for.
pub const MAX_CANDIDATES: usize = 512;

/// The best logits of a token: `kernels/sample.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Best {
    /// Candidates, also if they don't fit
    pub count: i32,
    pub id: i32,
    /// Of `id`; NaN or +inf if any logit is, -inf if all are
    pub logit: f32,
    pub padding: i32,
    /// In any order
    pub ids: [i32; MAX_CANDIDATES],
    pub logits: [f32; MAX_CANDIDATES],
}

/// The most tokens of a decode step, one of each of as many sequences.
pub const MAX_BATCH: usize = 8;

/// What changes from one decode step to the next, of each of its tokens.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Step {
    /// Tokens seen before the one being decoded
    pub position: i32,
    /// Counts decode steps from 1, never repeats within a process
    pub number: u32,
    /// Where the sequence's states lie: added to the places that kernels are given
    pub state: u64,
}

/// The most experts a token may have.
pub const MAX_TOP_K: usize = 32;

/// Bytes of the `Decision` of `common.cuh`, which only kernels read and write.
pub const DECISION_BYTES: usize = 8 + (MAX_TOP_K + 1) * (8 + 8) + (MAX_TOP_K + 1) * 4 + 4;

/// What the router of one layer asks the CPU to compute; in host memory, written by the GPU.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Handoff {
    /// [`Step::number`], written last
    pub ready: u32,
    pub num_cpu: i32,
    /// In order of rank
    pub cpu_ids: [i32; MAX_TOP_K],
    pub cpu_weights: [f32; MAX_TOP_K],
    /// All experts of the token, best first
    pub topk_ids: [i32; MAX_TOP_K],
    pub topk_weights: [f32; MAX_TOP_K],
    pub padding: [i32; 2],
}

impl Handoff {
    /// The experts that the CPU is to compute.
    pub fn experts(&self) -> &[i32] {
        &self.cpu_ids[..(self.num_cpu.max(0) as usize).min(MAX_TOP_K)]
    }
}

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct KvCache {
    /// `[kv_heads, capacity, head_dim]`
    pub k: u64,
    pub v: u64,
    /// `[kv_heads, capacity, head_dim / 32]` f16, of int8
    pub k_scales: u64,
    pub v_scales: u64,
    pub capacity: i32,
    /// 0: f16, 1: int8
    pub format: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_kernels_ones() {
        assert_eq!(size_of::<Linear>(), 32);
        assert_eq!(size_of::<ExpertLayout>(), 48);
        assert_eq!(size_of::<HostArrays>(), 192);
        assert_eq!(size_of::<Step>(), 16);
        assert_eq!(size_of::<Handoff>(), 528);
        assert_eq!(size_of::<KvCache>(), 40);
        assert_eq!(DECISION_BYTES, 672);
    }
}
