//! Calls of the kernels that multiply with weights outside the experts: for one token, or for several that
//! read them once.

use super::super::abi::{Format, Linear};
use super::super::device::{Args, Geometry, args};
use super::super::geometry;
use super::Decode;
use crate::backend::DeltaNetShape;

/// A kernel's name, launch and arguments.
pub type Call = (&'static str, Geometry, Args);

fn is_tiles(linear: &Linear) -> bool {
    linear.format == Format::Nf4Tiles as i32
}

/// Matrices that a normed row is multiplied with, and where their products go.
pub struct Projections<'a> {
    pub norm: u64,
    pub eps: f32,
    pub linears: [&'a Linear; 3],
    pub outputs: [u64; 3],
    /// Slots of the rings that the first output is a place in; 0 where it is not
    pub ring_slots: i32,
}

impl Decode {
    /// Projections of the normed rows of `hidden`, `[tokens, D]`.
    pub fn norm_linear(&self, hidden: u64, tokens: usize, to: &Projections) -> Call {
        let Projections {
            linears: [a, b, c],
            outputs,
            ..
        } = *to;
        let batch = geometry::norm_linear_batch(to.linears, self.resident_blocks, tokens);
        let mut args = args![self.step];
        let (name, geometry) = match tokens > 1 && batch.shared_bytes as usize <= self.most_shared {
            true => {
                args.push(tokens as i32);
                ("decode_norm_linear_batch", batch)
            }
            false => {
                let geometry = geometry::norm_linear(to.linears, self.resident_blocks);
                ("decode_norm_linear", geometry.for_tokens(tokens))
            }
        };
        args.push(hidden);
        args.push(to.norm);
        args.push(to.eps);
        [a, b, c].iter().for_each(|&&linear| args.push(linear));
        outputs.into_iter().for_each(|output| args.push(output));
        args.push(to.ring_slots);
        (name, geometry, args)
    }

    /// Adds `linear x` to the rows of `hidden`.
    pub fn linear_add(&self, x: u64, linear: &Linear, hidden: u64, tokens: usize) -> Call {
        let geometry = geometry::linear_add(linear);
        match tokens > 1 && is_tiles(linear) {
            true => (
                "decode_linear_add_batch",
                geometry::linear_add_batch(linear, tokens),
                args![tokens as i32, x, *linear, hidden],
            ),
            false => (
                "decode_linear_add",
                geometry.for_tokens(tokens),
                args![x, *linear, hidden],
            ),
        }
    }

    /// Adds the product with the gated norm of delta nets' outputs to the rows of `hidden`. Gates are in
    /// rings of so many slots, or without slots in rows.
    #[allow(clippy::too_many_arguments)]
    pub fn delta_out(
        &self,
        shape: &DeltaNetShape,
        [ring, slots]: [u64; 2],
        norm: u64,
        eps: f32,
        linear: &Linear,
        hidden: u64,
        tokens: usize,
    ) -> Call {
        let mut args = args![self.step];
        let (name, geometry) = match tokens > 1 && is_tiles(linear) {
            true => {
                args.push(tokens as i32);
                let geometry = geometry::linear_add_batch(linear, tokens);
                ("decode_delta_out_batch", geometry)
            }
            false => {
                let geometry = geometry::linear_add(linear).for_tokens(tokens);
                ("decode_delta_out", geometry)
            }
        };
        args.push(self.mixed);
        args.push(ring);
        args.push(slots as i32);
        args.push(shape.qkvz_rows() as i32);
        args.push(norm);
        args.push(eps);
        args.push(shape.num_key_heads as i32);
        args.push(shape.num_value_heads as i32);
        args.push(shape.key_head_dim as i32);
        args.push(shape.value_head_dim as i32);
        args.push(*linear);
        args.push(hidden);
        (name, geometry, args)
    }
}
