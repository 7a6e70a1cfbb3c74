//! Writing NF4, byte for byte as bitsandbytes 0.50.2 does on the CPU.

use super::dynamic_map::{self, DYNAMIC_MAP};
use super::mean::mean;
use super::state::{NestedState, QuantState};
use super::{BLOCKSIZE, CODE_BOOK, NESTED_BLOCKSIZE, STATE_SUFFIX};
use crate::formats::{Dtype, FormatError};

/// Decision thresholds: a value above exactly `i` of them has code `i`.
const THRESHOLDS: [f32; 15] = {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        thresholds[i] = (CODE_BOOK[i] + CODE_BOOK[i + 1]) / 2.0;
        i += 1;
    }
    thresholds
};

/// The least scale a block is divided by, so that a block of zeros stays one.
const LEAST_ABSMAX: f32 = 1e-38;

/// A quantised weight, ready to be stored.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// `[ceil(n / 2)]`, high nibble first
    pub packed: Vec<u8>,
    pub absmax: QuantizedAbsmax,
    pub state: QuantState,
}

/// One scale per block of 64 weights.
#[derive(Clone, Debug)]
pub enum QuantizedAbsmax {
    /// `[blocks]`
    Plain(Vec<f32>),
    Nested {
        /// `[blocks]`, indices into the dynamic map
        codes: Vec<u8>,
        /// `[ceil(blocks / 256)]`
        nested_absmax: Vec<f32>,
    },
}

/// One of the tensors that a quantised weight is stored as.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// What follows the weight's name; empty for the packed codes
    pub suffix: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// The parts of a weight of `n` values, but for the JSON state, whose length depends on the data.
pub fn parts(n: usize, double_quant: bool) -> Vec<Part> {
    let part = |suffix, dtype, shape: &[usize]| Part {
        suffix,
        dtype,
        shape: shape.to_vec(),
    };
    let blocks = n.div_ceil(BLOCKSIZE);
    let mut parts = vec![
        part("", Dtype::U8, &[n.div_ceil(2), 1]),
        part(".quant_map", Dtype::F32, &[CODE_BOOK.len()]),
    ];
    if double_quant {
        let groups = blocks.div_ceil(NESTED_BLOCKSIZE);
        parts.extend([
            part(".absmax", Dtype::U8, &[blocks]),
            part(".nested_absmax", Dtype::F32, &[groups]),
            part(".nested_quant_map", Dtype::F32, &[256]),
        ]);
    } else {
        parts.push(part(".absmax", Dtype::F32, &[blocks]));
    }
    parts
}

/// The state of a weight before its offset is known.
pub fn state(dtype: Dtype, shape: &[usize], double_quant: bool) -> QuantState {
    QuantState {
        quant_type: "nf4".into(),
        blocksize: BLOCKSIZE,
        dtype: dtype.torch_name().expect("a float type").into(),
        shape: shape.to_vec(),
        nested: double_quant.then(|| NestedState {
            nested_blocksize: NESTED_BLOCKSIZE,
            nested_dtype: "float32".into(),
            nested_offset: 0.0,
        }),
    }
}

impl Quantized {
    /// Suffix and bytes of every tensor: those of [`parts`], in that order, and the JSON state.
    pub fn into_tensors(self) -> Vec<(&'static str, Vec<u8>)> {
        let json = self.state.to_json().into_bytes();
        let mut tensors = vec![("", self.packed), (".quant_map", le_bytes(&CODE_BOOK))];
        match self.absmax {
            QuantizedAbsmax::Plain(absmax) => tensors.push((".absmax", le_bytes(&absmax))),
            QuantizedAbsmax::Nested {
                codes,
                nested_absmax,
            } => tensors.extend([
                (".absmax", codes),
                (".nested_absmax", le_bytes(&nested_absmax)),
                (".nested_quant_map", le_bytes(&*DYNAMIC_MAP)),
            ]),
        }
        tensors.push((STATE_SUFFIX, json));
        tensors
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Quantises the weight `name` of the given shape.
///
/// - `data`: its little-endian bytes, row-major; needs no alignment
/// - `dtype`: a float type
///
/// # Errors
/// [`FormatError::NotFinite`] for NaN, infinity, or values whose mean overflows an f32.
pub fn quantize(
    name: &str,
    data: &[u8],
    dtype: Dtype,
    shape: &[usize],
    double_quant: bool,
) -> Result<Quantized, FormatError> {
    let width = dtype.size_bytes();
    assert_eq!(data.len(), shape.iter().product::<usize>() * width);
    let mut packed = Vec::with_capacity((data.len() / width).div_ceil(2));
    let mut absmax = Vec::with_capacity((data.len() / width).div_ceil(BLOCKSIZE));
    for block in data.chunks(BLOCKSIZE * width) {
        let len = block.len() / width;
        // The zeros behind a partial block never reach the file, but for the low nibble after an
        // odd last value: code 7, as bitsandbytes has it.
        let mut values = [0.0; BLOCKSIZE];
        dtype.widen(block, &mut values[..len]);
        let scale = abs_max(&values);
        if !scale.is_finite() {
            return Err(not_finite(name, absmax.len() * BLOCKSIZE, &values));
        }
        absmax.push(if len == BLOCKSIZE {
            // The product can pass 1 by a rounding, which no threshold sees: no clamp is needed.
            let reciprocal = 1.0 / scale.max(LEAST_ABSMAX);
            values.iter_mut().for_each(|v| *v *= reciprocal);
            scale
        } else {
            let scale = scale.max(LEAST_ABSMAX);
            values.iter_mut().for_each(|v| *v /= scale);
            scale
        });
        let codes = codes(&values);
        let pairs = codes.chunks_exact(2).take(len.div_ceil(2));
        packed.extend(pairs.map(|pair| pair[0] << 4 | pair[1]));
    }

    let mut state = state(dtype, shape, double_quant);
    let absmax = match &mut state.nested {
        None => QuantizedAbsmax::Plain(absmax),
        Some(nested) => {
            let offset = mean(&absmax);
            if !offset.is_finite() {
                return Err(FormatError::NotFinite {
                    name: name.into(),
                    what: "the mean of its absmax".into(),
                    found: offset,
                });
            }
            nested.nested_offset = f64::from(offset);
            absmax.iter_mut().for_each(|a| *a -= offset);
            let (codes, nested_absmax) = quantize_dynamic(&absmax);
            QuantizedAbsmax::Nested {
                codes,
                nested_absmax,
            }
        }
    };
    Ok(Quantized {
        packed,
        absmax,
        state,
    })
}

/// Eight-bit quantisation against the dynamic map: a code per value, a scale per group of 256.
pub fn quantize_dynamic(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut absmax = Vec::with_capacity(values.len().div_ceil(NESTED_BLOCKSIZE));
    for group in values.chunks(NESTED_BLOCKSIZE) {
        let scale = abs_max(group);
        absmax.push(scale);
        if scale == 0.0 {
            // Not the code of 0.0, which is 127: bitsandbytes leaves such a group untouched.
            codes.resize(codes.len() + group.len(), 0);
        } else {
            let reciprocal = 1.0 / scale;
            codes.extend(
                group
                    .iter()
                    .map(|v| dynamic_map::code((v * reciprocal).clamp(-1.0, 1.0))),
            );
        }
    }
    (codes, absmax)
}

/// Largest magnitude; NaN or infinite if any value is.
fn abs_max(values: &[f32]) -> f32 {
    // As integers, magnitudes order as the floats do, with infinity and NaN on top.
    let bits = values.iter().map(|v| v.to_bits() & 0x7fff_ffff).max();
    f32::from_bits(bits.unwrap_or(0))
}

/// Codes of normalised values. Counting thresholds has no branch and becomes SIMD.
fn codes(values: &[f32; BLOCKSIZE]) -> [u8; BLOCKSIZE] {
    let mut counts = [0u32; BLOCKSIZE];
    for (counts, values) in counts.chunks_mut(16).zip(values.chunks(16)) {
        for threshold in THRESHOLDS {
            for (count, v) in counts.iter_mut().zip(values) {
                *count += u32::from(*v > threshold);
            }
        }
    }
    counts.map(|c| c as u8)
}

fn not_finite(name: &str, first: usize, values: &[f32]) -> FormatError {
    let at = values.iter().position(|v| !v.is_finite());
    let at = at.expect("only called for such a block");
    FormatError::NotFinite {
        name: name.into(),
        what: format!("weight {}", first + at),
        found: values[at],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_have_the_bits_of_bitsandbytes() {
        const BITS: [u32; 15] = [
            0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871,
            0x3d22faff, 0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf,
            0x3f5c89da,
        ];
        assert_eq!(THRESHOLDS.map(f32::to_bits), BITS);
    }

    #[test]
    fn a_weight_that_is_not_a_number_is_refused_by_its_index() {
        let mut values = [1.0f32; 130];
        values[129] = f32::NAN;
        let error = quantize("w", &le_bytes(&values), Dtype::F32, &[10, 13], true).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w`: weight 129 is NaN, expected a finite number"
        );
    }

    /// bitsandbytes multiplies a whole block by the reciprocal of its scale and divides a partial one,
    /// which differs for values that lie on a threshold but for a rounding.
    #[test]
    fn a_partial_block_is_divided_by_its_scale_and_a_whole_one_multiplied_by_the_reciprocal() {
        let (mut differ, scales) = (0, [0.7f32, 0.0301, 1.9, 3.3e-5, 1234.5]);
        for scale in scales {
            for threshold in THRESHOLDS {
                for ulps in -2i32..=2 {
                    let near = (threshold * scale).to_bits().wrapping_add_signed(ulps);
                    let near = f32::from_bits(near);
                    let code = |v: f32| THRESHOLDS.iter().filter(|&&t| v > t).count() as u8;
                    let (divided, multiplied) = (code(near / scale), code(near * (1.0 / scale)));
                    differ += usize::from(divided != multiplied);
                    for (len, expected) in [(2, divided), (63, divided), (64, multiplied)] {
                        let mut values = vec![0.0; len];
                        (values[0], values[1]) = (near, -scale);
                        let found = quantize("w", &le_bytes(&values), Dtype::F32, &[len], false);
                        assert_eq!(found.unwrap().packed[0], expected << 4, "{near} of {scale}");
                    }
                }
            }
        }
        assert!(differ > 10, "{differ} values show no difference");
    }
}
