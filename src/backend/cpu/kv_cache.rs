//! Keys and values of one layer and sequence, in the order attention reads them.
//!
//! They lie in pages of [`CHUNK`] positions, which sequences with the same beginning share: a clone
//! of a cache costs no memory, and a page is copied when one of its holders writes to it.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use super::attention::CHUNK;
use super::simd::{LANES, Simd};
use super::threads::Parts;
use crate::backend::executor::SharedPage;
use crate::backend::kv::{KV_BLOCK, KvDtype};
use crate::backend::tally::{Counted, Tally};

/// Keys and values of one layer and one sequence.
#[derive(Clone)]
pub struct KvCache {
    /// Positions filled
    pub len: usize,
    pub capacity: usize,
    pub layout: KvLayout,
    pub data: KvData,
}

/// How a page is laid out.
#[derive(Clone, Copy, Debug)]
pub struct KvLayout {
    pub heads: usize,
    /// head_dim, padded to whole vectors
    pub padded_dim: usize,
}

/// The cache in its type.
#[derive(Clone)]
pub enum KvData {
    F32(Kv<f32>),
    F16(Kv<f16>),
    Int8(Kv<i8>),
}

/// Pages of [`CHUNK`] positions each, in order; those of positions not yet written are absent.
#[derive(Clone)]
pub struct Kv<T> {
    pages: Vec<Arc<Page<T>>>,
    tally: Tally,
}

/// Keys and values of [`CHUNK`] positions, all heads; `D` padded_dim, `B` scales per row.
#[derive(Clone)]
struct Page<T> {
    /// `[kv_heads, CHUNK / 16, D, 16]`: 16 positions side by side, so that one load meets one
    /// dimension of 16 keys and scores need no sums across lanes
    k: Vec<T>,
    /// `[kv_heads, CHUNK, D]`
    v: Vec<T>,
    /// `[kv_heads, CHUNK / 16, B, 16]`; empty if the type needs none
    k_scales: Vec<f16>,
    /// `[kv_heads, B, CHUNK]`: all positions of a block side by side, to scale weights with
    v_scales: Vec<f16>,
    _counted: Counted,
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
    /// Elements of a page's keys, and of its values, that belong to one head.
    fn head_len(self) -> usize {
        CHUNK * self.padded_dim
    }

    /// Scales of one position and head.
    fn blocks(self) -> usize {
        self.padded_dim.div_ceil(KV_BLOCK)
    }

    /// Scales of a page's keys, and of its values, that belong to one head.
    fn head_scales<T: KvElement>(self) -> usize {
        match T::SCALED {
            true => CHUNK * self.blocks(),
            false => 0,
        }
    }

    /// Bytes of a page.
    fn page_bytes<T: KvElement>(self) -> usize {
        let values = self.head_len() * size_of::<T>();
        2 * self.heads * (values + self.head_scales::<T>() * size_of::<f16>())
    }
}

/// The pages that some positions lie in, to write to.
pub struct Writer<'a, T> {
    layout: KvLayout,
    /// Number of the first page
    first: usize,
    pages: Vec<PageParts<'a, T>>,
}

struct PageParts<'a, T> {
    k: Parts<'a, T>,
    v: Parts<'a, T>,
    k_scales: Parts<'a, f16>,
    v_scales: Parts<'a, f16>,
}

impl<T: KvElement> Writer<'_, T> {
    /// Writes the key and value of `position`, `[head_dim]` each.
    ///
    /// # Safety
    /// Nobody else writes to this head meanwhile.
    pub unsafe fn write(&self, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let KvLayout {
            padded_dim: dim, ..
        } = self.layout;
        let blocks = self.layout.blocks();
        let page = &self.pages[position / CHUNK - self.first];
        let within = position % CHUNK;
        let part = |len: usize| head * len..(head + 1) * len;
        let (elements, scales) = (
            part(self.layout.head_len()),
            part(self.layout.head_scales::<T>()),
        );
        // SAFETY: the head's own part, by the caller's promise.
        let (k, v, k_scales, v_scales) = unsafe {
            (
                page.k.slice(elements.clone()),
                page.v.slice(elements),
                page.k_scales.slice(scales.clone()),
                page.v_scales.slice(scales),
            )
        };
        let (group, lane) = (within / LANES, within % LANES);
        let keys = &mut k[group * LANES * dim..(group + 1) * LANES * dim];
        for (b, part) in key.chunks(KV_BLOCK).enumerate() {
            let first = b * KV_BLOCK;
            let scale = T::encode(part, |i, k| keys[(first + i) * LANES + lane] = k);
            if T::SCALED {
                k_scales[(group * blocks + b) * LANES + lane] = scale;
            }
        }
        let values = &mut v[within * dim..(within + 1) * dim];
        for (b, part) in value.chunks(KV_BLOCK).enumerate() {
            let scale = T::encode(part, |i, v| values[b * KV_BLOCK + i] = v);
            if T::SCALED {
                v_scales[b * CHUNK + within] = scale;
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
    fn new(tally: &Tally) -> Self {
        Kv {
            pages: Vec::new(),
            tally: tally.clone(),
        }
    }

    /// The pages of `positions`, made where they are not there, copied where they are shared.
    /// Positions before them have pages.
    pub fn writer(&mut self, layout: KvLayout, positions: Range<usize>) -> Writer<'_, T> {
        let (first, end) = (positions.start / CHUNK, positions.end.div_ceil(CHUNK));
        assert!(first <= self.pages.len());
        while self.pages.len() < end {
            self.pages.push(Arc::new(Page::new(layout, &self.tally)));
        }
        let pages = self.pages[first..end].iter_mut().map(|page| {
            let Page {
                k,
                v,
                k_scales,
                v_scales,
                ..
            } = Arc::make_mut(page);
            PageParts {
                k: Parts::new(k),
                v: Parts::new(v),
                k_scales: Parts::new(k_scales),
                v_scales: Parts::new(v_scales),
            }
        });
        Writer {
            layout,
            first,
            pages: pages.collect(),
        }
    }

    pub fn chunk(&self, layout: KvLayout, head: usize, chunk: usize) -> Chunk<'_, T> {
        let page = &*self.pages[chunk];
        let part = |len: usize| head * len..(head + 1) * len;
        let (elements, scales) = (part(layout.head_len()), part(layout.head_scales::<T>()));
        Chunk {
            padded_dim: layout.padded_dim,
            k: &page.k[elements.clone()],
            v: &page.v[elements],
            k_scales: &page.k_scales[scales.clone()],
            v_scales: &page.v_scales[scales],
        }
    }
}

impl<T: KvElement> Page<T> {
    fn new(layout: KvLayout, tally: &Tally) -> Self {
        let len = layout.heads * layout.head_len();
        let scales = layout.heads * layout.head_scales::<T>();
        Page {
            k: vec![T::default(); len],
            v: vec![T::default(); len],
            k_scales: vec![f16::ZERO; scales],
            v_scales: vec![f16::ZERO; scales],
            _counted: tally.count(layout.page_bytes::<T>()),
        }
    }
}

impl KvCache {
    /// An empty cache, whose pages are counted by `tally`.
    pub fn new(
        dtype: KvDtype,
        kv_heads: usize,
        head_dim: usize,
        capacity: usize,
        tally: &Tally,
    ) -> Self {
        let layout = KvLayout {
            heads: kv_heads,
            padded_dim: head_dim.next_multiple_of(LANES),
        };
        let data = match dtype {
            KvDtype::F32 => KvData::F32(Kv::new(tally)),
            KvDtype::F16 => KvData::F16(Kv::new(tally)),
            KvDtype::Int8 => KvData::Int8(Kv::new(tally)),
        };
        KvCache {
            len: 0,
            capacity,
            layout,
            data,
        }
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len);
        self.len = len;
        with_kv!(&mut self.data, kv => kv.pages.truncate(len.div_ceil(CHUNK)));
    }

    /// Each page: an id that no other living page has, and its bytes.
    pub fn pages(&self) -> Vec<SharedPage> {
        fn of<T: KvElement>(kv: &Kv<T>, layout: KvLayout) -> Vec<SharedPage> {
            let page = |page: &Arc<Page<T>>| SharedPage {
                id: Arc::as_ptr(page) as usize,
                bytes: layout.page_bytes::<T>(),
            };
            kv.pages.iter().map(page).collect()
        }
        with_kv!(&self.data, kv => of(kv, self.layout))
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
            let tally = Tally::default();
            let mut cache = KvCache::new(dtype, 2, 256, CHUNK, &tally);
            assert_eq!(tally.bytes(), 0);
            let layout = cache.layout;
            let bytes = with_kv!(&mut cache.data, kv => {
                kv.writer(layout, 0..1);
                let page = &kv.pages[0];
                size_of_val(&page.k[..]) + size_of_val(&page.v[..])
                    + size_of_val(&page.k_scales[..]) + size_of_val(&page.v_scales[..])
            });
            assert_eq!(bytes, 2 * CHUNK * dtype.bytes(2, 256), "{dtype}");
            assert_eq!(tally.bytes(), bytes);
        }
    }

    #[test]
    fn a_clone_shares_pages_until_one_of_both_writes() {
        let tally = Tally::default();
        let mut cache = KvCache::new(KvDtype::F32, 2, 32, 4 * CHUNK, &tally);
        let write = |cache: &mut KvCache, positions: Range<usize>, value: f32| {
            let layout = cache.layout;
            cache.len = positions.end;
            let KvData::F32(kv) = &mut cache.data else {
                unreachable!("made with this type")
            };
            let writer = kv.writer(layout, positions.clone());
            for position in positions {
                for head in 0..2 {
                    // SAFETY: one thread.
                    unsafe { writer.write(head, position, &[value; 32], &[value; 32]) };
                }
            }
        };
        let key_of = |cache: &KvCache, position: usize| -> f32 {
            let KvData::F32(kv) = &cache.data else {
                unreachable!("made with this type")
            };
            let chunk = kv.chunk(cache.layout, 1, position / CHUNK);
            chunk.k[(position % CHUNK) / LANES * LANES * 32 + position % LANES]
        };
        write(&mut cache, 0..CHUNK + 10, 1.0);
        let page = tally.bytes() / 2;
        let mut other = cache.clone();
        assert_eq!(tally.bytes(), 2 * page);
        write(&mut other, CHUNK + 10..CHUNK + 11, 2.0);
        assert_eq!(tally.bytes(), 3 * page, "the page that was written to");
        assert_eq!(cache.pages()[0].id, other.pages()[0].id);
        write(&mut cache, CHUNK + 10..CHUNK + 12, 3.0);
        assert_eq!(tally.bytes(), 3 * page, "nobody else had that one any more");
        assert_eq!(
            (key_of(&cache, CHUNK + 9), key_of(&other, CHUNK + 9)),
            (1.0, 1.0)
        );
        assert_eq!(
            (key_of(&cache, CHUNK + 10), key_of(&other, CHUNK + 10)),
            (3.0, 2.0)
        );
        drop(cache);
        assert_eq!(tally.bytes(), 2 * page);
        other.truncate(CHUNK);
        assert_eq!(tally.bytes(), page);
        drop(other);
        assert_eq!(tally.bytes(), 0);
    }
}
