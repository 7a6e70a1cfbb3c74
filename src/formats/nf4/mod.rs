//! bitsandbytes NF4: 4-bit codes, one scale per block of weights, the scales themselves in 8 bits.
//!
//! Six tensors hold one weight `NAME`: the packed codes, `.absmax`, `.nested_absmax`,
//! `.nested_quant_map`, `.quant_map` and the JSON `.quant_state.bitsandbytes__nf4`. Without double
//! quantisation `absmax` is f32 and the `nested_*` tensors are absent.
//!
//! Source: bitsandbytes 0.50.2, `functional.py` and its CPU and CUDA kernels; QLoRA,
//! arXiv:2305.14314.

pub mod dequantize;
pub mod dynamic_map;
pub mod mean;
pub mod quantize;
pub mod state;

pub use dequantize::{Absmax, Nf4Matrix};
pub use state::QuantState;

/// Weights that share one scale where this program quantises: the default of bitsandbytes.
pub const BLOCKSIZE: usize = 64;

/// Every number of weights that bitsandbytes lets share a scale. 128 was its default on AMD CDNA
/// until February 2026.
///
/// Where a row is shorter than a block, or no multiple of it, bitsandbytes 0.50.2 agrees with itself on
/// a GPU only: its CPU kernel takes block `row * (cols / blocksize) + col / blocksize`, the first one's
/// scale for all rows of a narrow matrix. Weights are read here as they were quantised, and as its CUDA
/// kernels read them.
pub const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Scales that share one scale of scales.
pub const NESTED_BLOCKSIZE: usize = 256;

/// What follows a weight's name in the name of its state.
pub const STATE_SUFFIX: &str = ".quant_state.bitsandbytes__nf4";

/// The NF4 code book: quantiles of the normal distribution, scaled to [-1, 1], with an exact 0.
///
/// The bits are those of bitsandbytes; its dequantizers ignore a stored `quant_map` too.
pub const CODE_BOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_book_has_the_bits_of_bitsandbytes() {
        const BITS: [u32; 16] = [
            0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0,
            0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3,
            0x3f800000,
        ];
        assert_eq!(CODE_BOOK.map(f32::to_bits), BITS);
    }
}
