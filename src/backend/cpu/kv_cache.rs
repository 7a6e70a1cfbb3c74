//! Keys and values of one layer and sequence, in the order attention reads them.

use half::f16;

use super::simd::{LANES, Simd};
use crate::backend::kv::{KV_BLOCK, KvDtype};

/// Positions of one chunk.
pub const CHUNK: usize = 128;

/// Keys and values of one layer and one sequence.
pub struct KvCache {
    /// Positions filled
    pub len: usize,
    pub capacity: usize,
    pub layout: KvLayout,
    pub data: KvData,
}

/// Where the elements of one head lie.
#[derive(Clone, Copy, Debug)]
pub struct KvLayout {
    /// head_dim, padded to whole vectors
    pub padded_dim: usize,
    /// capacity, padded to whole chunks
    pub positions: usize,
}

/// The cache in its type.
pub enum KvData {
    F32(Kv<f32>),
    F16(Kv<f16>),
    Int8(Kv<i8>),
}

/// Elements of all heads; `C` chunks, `D` padded_dim, `B` scales per row.
pub struct Kv<T> {
    /// `[kv_heads, C, CHUNK / 16, D, 16]`: 16 positions side by side, so that one load meets one
    /// dimension of 16 keys and scores need no sums across lanes
    pub k: Vec<T>,
    /// `[kv_heads, C, CHUNK, D]`
    pub v: Vec<T>,
    /// `[kv_heads, C, CHUNK / 16, B, 16]`; empty if the type needs none
    pub k_scales: Vec<f16>,
    /// `[kv_heads, C, B, CHUNK]`: all positions of a block side by side, to scale weights with
    pub v_scales: Vec<f16>,
}

/// A stored key or value.
pub trait KvElement: Copy + Default + Send + Sync {
    /// Whether [`KV_BLOCK`] of them share a scale
    const SCALED: bool;

    fn load<S: Simd>(s: S, v: &[Self; LANES]) -> S::F32;
    /// Stores one block, at most [`KV_BLOCK`] values, by `put(i, element)`; returns its scale.
    fn encode(block: &[f32], put: impl FnMut(usize, Self)) -> f16;
}

impl KvElement for f32 {
    const SCALED: bool = false;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[f32; LANES]) -> S::F32 {
        s.load(v)
    }
    fn encode(block: &[f32], mut put: impl FnMut(usize, f32)) -> f16 {
        block.iter().enumerate().for_each(|(i, &v)| put(i, v));
        f16::ONE
    }
}

impl KvElement for f16 {
    const SCALED: bool = false;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[f16; LANES]) -> S::F32 {
        s.load_f16(v)
    }
    fn encode(block: &[f32], mut put: impl FnMut(usize, f16)) -> f16 {
        let half = |(i, &v): (usize, &f32)| put(i, f16::from_f32(v));
        block.iter().enumerate().for_each(half);
        f16::ONE
    }
}

impl KvElement for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[i8; LANES]) -> S::F32 {
        s.load_i8(v)
    }
    fn encode(block: &[f32], mut put: impl FnMut(usize, i8)) -> f16 {
        let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        // Values are rounded by the scale as it is stored. A scale too small for f16 means zeros.
        let scale = f16::from_f32(max / 127.0);
        let steps = match scale.to_f32() {
            0.0 => 0.0,
            scale => 1.0 / scale,
        };
        for (i, v) in block.iter().enumerate() {
            put(i, (v * steps).round_ties_even().clamp(-127.0, 127.0) as i8);
        }
        scale
    }
}

impl KvLayout {
    /// Elements of `k`, and of `v`, that belong to one head.
    pub fn head_len(self) -> usize {
        self.positions * self.padded_dim
    }

    /// Scales of one position and head.
    fn blocks(self) -> usize {
        self.padded_dim.div_ceil(KV_BLOCK)
    }

    /// Scales of keys, and of values, that belong to one head.
    pub fn head_scales<T: KvElement>(self) -> usize {
        if T::SCALED {
            self.positions * self.blocks()
        } else {
            0
        }
    }
}

/// One head's part of a cache, to write to.
pub struct HeadMut<'a, T> {
    pub layout: KvLayout,
    pub k: &'a mut [T],
    pub v: &'a mut [T],
    pub k_scales: &'a mut [f16],
    pub v_scales: &'a mut [f16],
}

impl<T: KvElement> HeadMut<'_, T> {
    /// Writes the key and value of `position`.
    pub fn write(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let dim = self.layout.padded_dim;
        let blocks = self.layout.blocks();
        let (group, lane) = (position / LANES, position % LANES);
        let keys = &mut self.k[group * LANES * dim..(group + 1) * LANES * dim];
        for (b, part) in key.chunks(KV_BLOCK).enumerate() {
            let first = b * KV_BLOCK;
            let scale = T::encode(part, |i, k| keys[(first + i) * LANES + lane] = k);
            if T::SCALED {
                self.k_scales[(group * blocks + b) * LANES + lane] = scale;
            }
        }
        let values = &mut self.v[position * dim..(position + 1) * dim];
        for (b, part) in value.chunks(KV_BLOCK).enumerate() {
            let scale = T::encode(part, |i, v| values[b * KV_BLOCK + i] = v);
            if T::SCALED {
                let chunk = position / CHUNK * blocks + b;
                self.v_scales[chunk * CHUNK + position % CHUNK] = scale;
            }
        }
    }
}

/// One head's keys and values of one chunk, to read.
#[derive(Clone, Copy)]
pub struct Chunk<'a, T> {
    pub padded_dim: usize,
    pub k: &'a [T],
    pub v: &'a [T],
    pub k_scales: &'a [f16],
    pub v_scales: &'a [f16],
}

impl<T: KvElement> Kv<T> {
    fn new(heads: usize, layout: KvLayout) -> Self {
        let (len, scales) = (heads * layout.head_len(), heads * layout.head_scales::<T>());
        Kv {
            k: vec![T::default(); len],
            v: vec![T::default(); len],
            k_scales: vec![f16::ZERO; scales],
            v_scales: vec![f16::ZERO; scales],
        }
    }

    pub fn chunk(&self, layout: KvLayout, head: usize, chunk: usize) -> Chunk<'_, T> {
        let start = head * layout.head_len() + chunk * CHUNK * layout.padded_dim;
        let range = start..start + CHUNK * layout.padded_dim;
        let scales = match T::SCALED {
            true => {
                let start = head * layout.head_scales::<T>() + chunk * CHUNK * layout.blocks();
                start..start + CHUNK * layout.blocks()
            }
            false => 0..0,
        };
        Chunk {
            padded_dim: layout.padded_dim,
            k: &self.k[range.clone()],
            v: &self.v[range],
            k_scales: &self.k_scales[scales.clone()],
            v_scales: &self.v_scales[scales],
        }
    }
}

impl KvCache {
    pub fn new(dtype: KvDtype, kv_heads: usize, head_dim: usize, capacity: usize) -> Self {
        let layout = KvLayout {
            padded_dim: head_dim.next_multiple_of(LANES),
            positions: capacity.next_multiple_of(CHUNK),
        };
        let data = match dtype {
            KvDtype::F32 => KvData::F32(Kv::new(kv_heads, layout)),
            KvDtype::F16 => KvData::F16(Kv::new(kv_heads, layout)),
            KvDtype::Int8 => KvData::Int8(Kv::new(kv_heads, layout)),
        };
        KvCache {
            len: 0,
            capacity,
            layout,
            data,
        }
    }
}

/// Runs `$body` with the cache's data in its own type.
macro_rules! with_kv {
    ($data:expr, $kv:ident => $body:expr) => {
        match $data {
            $crate::backend::cpu::kv_cache::KvData::F32($kv) => $body,
            $crate::backend::cpu::kv_cache::KvData::F16($kv) => $body,
            $crate::backend::cpu::kv_cache::KvData::Int8($kv) => $body,
        }
    };
}
pub(crate) use with_kv;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::tests::random_vector;

    #[test]
    fn int8_blocks_are_within_half_a_step_of_their_largest() {
        for seed in 0..20 {
            let mut block = random_vector(32, seed);
            match seed % 4 {
                0 => block[5] = 300.0,
                1 => block.iter_mut().for_each(|v| *v *= 1e-4),
                2 => block.truncate(16),
                _ => {}
            }
            let max = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let mut stored = vec![0i8; block.len()];
            let scale = i8::encode(&block, |i, v| stored[i] = v).to_f32();
            for (stored, v) in stored.iter().zip(&block) {
                let error = (f32::from(*stored) * scale - v).abs();
                // The scale itself is off by up to one part in 2000, more where f16 is subnormal.
                assert!(error <= max / 127.0 * 0.51 + max * 6e-4 + 6e-8 * 127.0);
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut stored = [1i8; 32];
        let scale = i8::encode(&[0.0; 32], |i, v| stored[i] = v);
        assert!(stored == [0; 32] && scale == f16::ZERO);
    }

    #[test]
    fn bytes_are_those_of_the_cache() {
        for dtype in KvDtype::ALL {
            let cache = KvCache::new(dtype, 2, 256, CHUNK);
            let bytes = with_kv!(&cache.data, kv => size_of_val(&kv.k[..])
                + size_of_val(&kv.v[..]) + size_of_val(&kv.k_scales[..])
                + size_of_val(&kv.v_scales[..]));
            assert_eq!(bytes, 2 * CHUNK * dtype.bytes(2, 256), "{dtype}");
        }
    }
}
