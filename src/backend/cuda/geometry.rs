//! Grid, block and shared memory of each kernel: what the head comments in `kernels/*.cu` ask for.

use super::abi::{ExpertLayout, Linear};
use super::device::Geometry;
use crate::backend::{AttentionShape, DeltaNetShape, ModelShape};

fn geometry(x: usize, block: usize, shared_bytes: usize) -> Geometry {
    Geometry {
        grid: [x.max(1) as u32, 1, 1],
        block: block as u32,
        shared_bytes: shared_bytes as u32,
    }
}

pub fn begin(dim: usize) -> Geometry {
    geometry(dim.div_ceil(256), 256, 0)
}

pub fn norm_linear(_linears: [&Linear; 3]) -> Geometry {
    todo!()
}

pub fn linear_add(_linear: &Linear) -> Geometry {
    todo!()
}

pub fn delta_net(_shape: &DeltaNetShape) -> Geometry {
    todo!()
}

/// Parts that the context is divided into: two waves of blocks.
pub fn attention_splits(shape: &ModelShape, multiprocessors: usize) -> usize {
    (2 * multiprocessors / shape.attention.num_key_value_heads.max(1)).clamp(1, 256)
}

pub fn attention(_shape: &AttentionShape, _splits: usize) -> Geometry {
    todo!()
}

pub fn router(_shape: &ModelShape) -> Geometry {
    todo!()
}

pub fn experts_up(_shape: &ModelShape, _layouts: [&ExpertLayout; 2]) -> Geometry {
    todo!()
}

pub fn experts_down(_shape: &ModelShape, _layouts: [&ExpertLayout; 2]) -> Geometry {
    todo!()
}

pub fn combine(dim: usize) -> Geometry {
    geometry(dim.div_ceil(256), 256, 0)
}
