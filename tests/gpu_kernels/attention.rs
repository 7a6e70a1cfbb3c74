//! attention.cu and attention_prefill.cu: the cache, one token, chunks.

use half::f16;
use moectl::backend::AttentionShape;
use moectl::backend::cuda::abi::{KvCache, Step};
use moectl::backend::cuda::device::{Buffer, Geometry};
use moectl::backend::cuda::geometry::{self, AttentionParts};
use moectl::backend::cuda::variants;
use moectl::planning::Precision;

use crate::{EPS, Gpu, Rng, args, check, rms_norm, sigmoid};

/// What is in the cache is exact in f16; all else is f32, and sums have up to a few hundred terms.
const TOLERANCE: f64 = 1e-4;
/// int8 caches are turned into f16 by prefill: 2^-12 of every key and value more.
const TOLERANCE_INT8_CHUNK: f64 = 2e-3;
/// The fast variant rounds queries and probabilities to f16.
const TOLERANCE_FAST: f64 = 1e-2;
/// The same with scores so large that 2^-11 of them matters.
const TOLERANCE_FAST_OUTLIERS: f64 = 1e-1;

const SCALE_BLOCK: usize = 32;

struct Layer {
    shape: AttentionShape,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    inverse: Vec<f32>,
}

impl Layer {
    fn random(rng: &mut Rng, heads: usize, kv_heads: usize, hd: usize, rotary: usize) -> Layer {
        let frequency = |j: usize| 1e7f32.powf(-2.0 * j as f32 / rotary as f32);
        Layer {
            shape: AttentionShape {
                num_attention_heads: heads,
                num_key_value_heads: kv_heads,
                head_dim: hd,
                rotary_dim: rotary,
                rope_theta: 1e7,
            },
            q_norm: rng.factors(hd),
            k_norm: rng.factors(hd),
            inverse: (0..rotary / 2).map(frequency).collect(),
        }
    }

    fn norm_and_rotate(&self, x: &[f32], norm: &[f32], position: usize) -> Vec<f64> {
        let mut y = rms_norm(x, norm);
        let half = self.inverse.len();
        for (j, &inverse) in self.inverse.iter().enumerate() {
            // The angle as every backend has it: a product in f32.
            let angle = f64::from(position as f32 * inverse);
            let (a, b) = (y[j], y[j + half]);
            y[j] = a * angle.cos() - b * angle.sin();
            y[j + half] = b * angle.cos() + a * angle.sin();
        }
        y
    }

    /// Output of one head for its query and gate, over the first rows of `keys` and `values`.
    fn head(
        &self,
        query: &[f64],
        gate: &[f32],
        keys: &[Vec<f64>],
        values: &[Vec<f64>],
    ) -> Vec<f64> {
        let hd = self.shape.head_dim;
        let score = |key: &Vec<f64>| -> f64 {
            key.iter().zip(query).map(|(k, q)| k * q).sum::<f64>() / (hd as f64).sqrt()
        };
        let scores: Vec<f64> = keys.iter().map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; hd];
        for (weight, value) in weights.iter().zip(values) {
            out.iter_mut()
                .zip(value)
                .for_each(|(o, v)| *o += weight / total * v);
        }
        out.iter_mut()
            .zip(gate)
            .for_each(|(o, &g)| *o *= sigmoid(g.into()));
        out
    }
}

/// A cache on the device.
struct Cache {
    k: Buffer,
    v: Buffer,
    k_scales: Buffer,
    v_scales: Buffer,
    capacity: usize,
    int8: bool,
    kv_heads: usize,
    hd: usize,
}

impl Cache {
    /// Full of NaN, which must never be read.
    fn new(gpu: &Gpu, layer: &Layer, capacity: usize, int8: bool) -> Cache {
        let (kv_heads, hd) = (layer.shape.num_key_value_heads, layer.shape.head_dim);
        let count = kv_heads * capacity * hd;
        let nan = f16::NAN;
        let scales = if int8 { count / SCALE_BLOCK } else { 8 };
        let values = || match int8 {
            true => gpu.up(&vec![77i8; count]),
            false => gpu.up(&vec![nan; count]),
        };
        Cache {
            k: values(),
            v: values(),
            k_scales: gpu.up(&vec![nan; scales]),
            v_scales: gpu.up(&vec![nan; scales]),
            capacity,
            int8,
            kv_heads,
            hd,
        }
    }

    fn abi(&self) -> KvCache {
        KvCache {
            k: self.k.address(),
            v: self.v.address(),
            k_scales: self.k_scales.address(),
            v_scales: self.v_scales.address(),
            capacity: self.capacity as i32,
            format: self.int8.into(),
        }
    }

    /// What it holds of the first `tokens`: of each KV head the rows of its keys, or values.
    fn rows(&self, gpu: &Gpu, values: bool, tokens: usize) -> Vec<Vec<Vec<f64>>> {
        let (data, scales) = match values {
            false => (&self.k, &self.k_scales),
            true => (&self.v, &self.v_scales),
        };
        let all: Vec<f64> = match self.int8 {
            false => gpu.down::<f16>(data).iter().map(|x| x.to_f64()).collect(),
            true => {
                let scales: Vec<f16> = gpu.down(scales);
                let data: Vec<i8> = gpu.down(data);
                let scale = |i: usize| scales[i / SCALE_BLOCK].to_f64();
                data.iter()
                    .enumerate()
                    .map(|(i, &x)| f64::from(x) * scale(i))
                    .collect()
            }
        };
        let of_head = |head: &[f64]| -> Vec<Vec<f64>> {
            head.chunks_exact(self.hd)
                .take(tokens)
                .map(<[f64]>::to_vec)
                .collect()
        };
        all.chunks_exact(self.capacity * self.hd)
            .map(of_head)
            .collect()
    }

    /// The row that stands for `expected` is as near as the format allows.
    fn check_row(&self, what: &str, found: &[f64], expected: &[f64]) {
        for (found, expected) in found.chunks(SCALE_BLOCK).zip(expected.chunks(SCALE_BLOCK)) {
            let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            for (a, b) in found.iter().zip(expected) {
                // Half a unit, and what f32 was off before; a scale that was rounded up, too.
                let bound = match self.int8 {
                    true => 0.502 / 127.0 * largest,
                    false => b.abs() / 2040.0 + 6e-8,
                } + 3e-6 * largest;
                assert!((a - b).abs() <= bound, "{what}: {a} in the cache for {b}");
            }
        }
    }
}

/// q and gate of each head, k and v.
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Inputs {
    fn random(rng: &mut Rng, s: &AttentionShape, tokens: usize, outliers: bool) -> Inputs {
        let mut inputs = Inputs {
            q: rng.gausses(tokens * s.q_proj_rows(), 1.0),
            k: rng.gausses(tokens * s.kv_rows(), 3.0),
            v: rng.gausses(tokens * s.kv_rows(), 0.3),
        };
        if outliers {
            for _ in 0..4 * tokens {
                let Inputs { q, k, v } = &mut inputs;
                for (x, size) in [(q, 60.0), (k, 100.0), (v, 1000.0)] {
                    let i = rng.below(x.len());
                    x[i] = size * rng.gauss();
                }
            }
        }
        inputs
    }
}

/// A chunk through prefill_qkv and prefill_attention: the exact variant first, then those of one f16,
/// Hopper's where it runs.
fn chunk(
    gpu: &Gpu,
    layer: &Layer,
    cache: &Cache,
    start: usize,
    tokens: usize,
    x: &Inputs,
) -> Vec<(&'static str, Vec<f32>)> {
    let s = &layer.shape;
    let (heads, kv_heads, hd) = (
        s.num_attention_heads as i32,
        s.num_key_value_heads as i32,
        s.head_dim as i32,
    );
    let (q, k, v) = (gpu.up(&x.q), gpu.up(&x.k), gpu.up(&x.v));
    let (q_norm, k_norm) = (gpu.up(&layer.q_norm), gpu.up(&layer.k_norm));
    let inverse = gpu.up(&layer.inverse);
    let count = tokens * s.o_proj_cols();
    let [q_high, q_low] = [(); 2].map(|()| gpu.up(&vec![f16::NAN; count]));
    let q_scales = gpu.nans(tokens * s.num_attention_heads);
    gpu.launch(
        "prefill_qkv",
        geometry::prefill_qkv(s, tokens),
        args![
            q.address(),
            k.address(),
            v.address(),
            q_norm.address(),
            k_norm.address(),
            EPS,
            inverse.address(),
            s.rotary_dim as i32,
            start as i32,
            tokens as i32,
            cache.abi(),
            q_high.address(),
            q_low.address(),
            q_scales.address(),
            heads,
            kv_heads,
            hd
        ],
    );
    let attention = |kernel: &'static str, geometry: Geometry, q_low: u64| {
        let out = gpu.nans(count);
        gpu.launch(
            kernel,
            geometry,
            args![
                q_high.address(),
                q_low,
                q_scales.address(),
                q.address(),
                cache.abi(),
                start as i32,
                tokens as i32,
                heads,
                kv_heads,
                hd,
                out.address()
            ],
        );
        (kernel, gpu.down::<f32>(&out))
    };
    let geometry = |precision| geometry::prefill_attention(s, tokens, precision);
    let (exact, f16) = (geometry(Precision::Exact), geometry(Precision::F16));
    let mut results = vec![
        attention("prefill_attention", exact, q_low.address()),
        attention("prefill_attention_fast", f16, 0),
    ];
    let facts = gpu.device.facts();
    let best = variants::prefill_attention(s, tokens, cache.int8, Precision::F16, &facts);
    if best.name != "prefill_attention_fast" {
        results.push(attention(best.name, best.geometry, 0));
    }
    results
}

/// One token through decode_attention.
fn step(
    gpu: &Gpu,
    layer: &Layer,
    cache: &Cache,
    position: usize,
    parts: &AttentionParts,
    x: &Inputs,
) -> Vec<f32> {
    let s = &layer.shape;
    let (q, k, v) = (gpu.up(&x.q), gpu.up(&x.k), gpu.up(&x.v));
    let (q_norm, k_norm) = (gpu.up(&layer.q_norm), gpu.up(&layer.k_norm));
    let inverse = gpu.up(&layer.inverse);
    let step = gpu.up(&[Step {
        position: position as i32,
        number: 1,
        state: 0,
    }]);
    let partial = gpu.nans(parts.partial);
    let counters = gpu.zeros(4 * parts.counters);
    let out = gpu.nans(s.o_proj_cols());
    gpu.launch(
        "decode_attention",
        geometry::attention(s, parts, cache.int8),
        args![
            step.address(),
            q.address(),
            k.address(),
            v.address(),
            q_norm.address(),
            k_norm.address(),
            EPS,
            inverse.address(),
            s.rotary_dim as i32,
            cache.abi(),
            s.num_attention_heads as i32,
            s.num_key_value_heads as i32,
            s.head_dim as i32,
            parts.splits as i32,
            partial.address(),
            counters.address(),
            out.address()
        ],
    );
    assert!(
        gpu.down::<u32>(&counters).iter().all(|&c| c == 0),
        "counters start again from 0"
    );
    gpu.down(&out)
}

#[derive(Clone, Copy)]
struct Case<'a> {
    heads: usize,
    kv_heads: usize,
    hd: usize,
    rotary: usize,
    int8: bool,
    outliers: bool,
    /// Lengths of the chunks, 0 for a single step
    lengths: &'a [usize],
    /// The multiprocessors that decode thinks it has
    multiprocessors: usize,
}

fn run(gpu: &Gpu, case: Case, seed: u64) {
    let mut rng = Rng::new(seed);
    let Case {
        heads,
        kv_heads,
        hd,
        ..
    } = case;
    let layer = Layer::random(&mut rng, heads, kv_heads, hd, case.rotary);
    let s = &layer.shape;
    let total: usize = case.lengths.iter().map(|&t| t.max(1)).sum();
    let capacity = total.next_multiple_of(64) + 64 * (seed as usize % 2);
    let cache = Cache::new(gpu, &layer, capacity, case.int8);
    let parts = geometry::attention_parts(s, case.multiprocessors);
    let mut start = 0;
    for &length in case.lengths {
        let tokens = length.max(1);
        let what = format!(
            "{heads} heads, {kv_heads} for KV, of {hd}, {} rotate, int8 {}, outliers {}, {} splits: \
             {length} at {start}",
            case.rotary, case.int8, case.outliers, parts.splits
        );
        let x = Inputs::random(&mut rng, s, tokens, case.outliers);
        let results = match length {
            0 => vec![("step", step(gpu, &layer, &cache, start, &parts, &x))],
            _ => chunk(gpu, &layer, &cache, start, tokens, &x),
        };
        let (keys, values) = (
            cache.rows(gpu, false, start + tokens),
            cache.rows(gpu, true, start + tokens),
        );
        for t in 0..tokens {
            for head in 0..cache.kv_heads {
                let at = (t * kv_heads + head) * hd;
                let key = layer.norm_and_rotate(&x.k[at..at + hd], &layer.k_norm, start + t);
                cache.check_row(&format!("{what}: key"), &keys[head][start + t], &key);
                let value: Vec<f64> = x.v[at..at + hd].iter().map(|&x| x.into()).collect();
                cache.check_row(&format!("{what}: value"), &values[head][start + t], &value);
            }
        }
        let mut expected = Vec::new();
        for t in 0..tokens {
            for head in 0..heads {
                let at = (t * heads + head) * 2 * hd;
                let query = layer.norm_and_rotate(&x.q[at..at + hd], &layer.q_norm, start + t);
                let kv = head / (heads / kv_heads);
                let seen = start + t + 1;
                let gate = &x.q[at + hd..at + 2 * hd];
                expected.extend(layer.head(&query, gate, &keys[kv][..seen], &values[kv][..seen]));
            }
        }
        let exact = match case.int8 && length > 0 {
            true if case.outliers => TOLERANCE_FAST_OUTLIERS,
            true => TOLERANCE_INT8_CHUNK,
            false => TOLERANCE,
        };
        check(&what, &results[0].1, &expected, exact);
        for (kernel, found) in &results[1..] {
            let bound = if case.outliers {
                TOLERANCE_FAST_OUTLIERS
            } else {
                TOLERANCE_FAST
            };
            check(&format!("{what}: {kernel}"), found, &expected, bound);
        }
        start += tokens;
    }
}

/// Steps at contexts 1, 15, 16, 17, 65, 300 and around them, and chunks of 1 .. 130.
const LENGTHS: [usize; 16] = [0, 0, 7, 5, 0, 0, 0, 2, 45, 0, 1, 63, 64, 65, 44, 0];

#[test]
fn heads_of_every_size_share_keys_and_values() {
    let Some(gpu) = Gpu::open() else { return };
    let mut seed = 0;
    for int8 in [false, true] {
        for hd in [32, 64, 128, 256] {
            for group in [2, 4, 8] {
                // The emulator takes long for large heads: few of them see all lengths.
                let lengths = if hd * group <= 256 || !gpu.emulated {
                    &LENGTHS[..]
                } else {
                    &LENGTHS[..11]
                };
                seed += 1;
                let case = Case {
                    heads: 2 * group,
                    kv_heads: 2,
                    hd,
                    rotary: hd / 4,
                    int8,
                    outliers: false,
                    lengths,
                    multiprocessors: 2 * (1 + seed % 5),
                };
                run(&gpu, case, seed as u64);
            }
        }
    }
}

#[test]
fn one_head_odd_groups_and_groups_above_eight() {
    let Some(gpu) = Gpu::open() else { return };
    for int8 in [false, true] {
        for (i, (heads, kv_heads, hd, rotary, lengths)) in [
            (1, 1, 64, 64, &[0, 130, 1, 3, 0][..]),
            (3, 1, 32, 8, &[130, 5, 0]),
            (16, 1, 64, 16, &[5, 40, 0, 0]),
            (12, 1, 32, 32, &[0, 64, 0]),
        ]
        .into_iter()
        .enumerate()
        {
            let case = Case {
                heads,
                kv_heads,
                hd,
                rotary,
                int8,
                outliers: false,
                lengths,
                multiprocessors: 3,
            };
            run(&gpu, case, 100 + i as u64);
        }
    }
}

#[test]
fn outliers_in_queries_keys_and_values() {
    let Some(gpu) = Gpu::open() else { return };
    for int8 in [false, true] {
        for (i, hd) in [32, 256].into_iter().enumerate() {
            let case = Case {
                heads: 8,
                kv_heads: 2,
                hd,
                rotary: hd / 4,
                int8,
                outliers: true,
                lengths: &[33, 0, 40, 0, 0],
                multiprocessors: 8,
            };
            run(&gpu, case, 200 + i as u64);
        }
    }
}

/// More than sixteen blocks of a head merge in two levels.
#[test]
fn many_splits_merge_in_two_levels() {
    let Some(gpu) = Gpu::open() else { return };
    for int8 in [false, true] {
        for multiprocessors in [17, 40, 132] {
            let case = Case {
                heads: 2,
                kv_heads: 1,
                hd: 32,
                rotary: 8,
                int8,
                outliers: false,
                lengths: &[300, 0, 340, 0, 0],
                multiprocessors,
            };
            run(&gpu, case, multiprocessors as u64);
        }
    }
    if !gpu.emulated {
        let case = Case {
            heads: 16,
            kv_heads: 2,
            hd: 256,
            rotary: 64,
            int8: false,
            outliers: false,
            lengths: &[2000, 0, 0],
            multiprocessors: gpu.multiprocessors(),
        };
        run(&gpu, case, 300);
    }
}

/// A NaN shows where it is, and nowhere else; zeros are no trouble.
#[test]
fn a_nan_stays_in_its_head_and_zeros_give_zeros() {
    let Some(gpu) = Gpu::open() else { return };
    let (heads, kv_heads, hd, before) = (8, 2, 64, 40);
    for int8 in [false, true] {
        for what in ["query", "zeros", "key", "value"] {
            let mut rng = Rng::new(7);
            let layer = Layer::random(&mut rng, heads, kv_heads, hd, 16);
            let s = &layer.shape;
            let cache = Cache::new(&gpu, &layer, 64, int8);
            let parts = geometry::attention_parts(s, 4);
            let mut first = Inputs::random(&mut rng, s, before, false);
            let mut x = Inputs::random(&mut rng, s, 1, false);
            match what {
                "query" => x.q[2 * 5 * hd + 3] = f32::NAN,
                "key" => x.k[hd + 1] = f32::INFINITY,
                "value" => x.v[hd + 1] = f32::NAN,
                _ => {
                    for x in [&mut first, &mut x] {
                        x.q.fill(0.0);
                        x.k.fill(0.0);
                        x.v.fill(0.0);
                    }
                }
            }
            chunk(&gpu, &layer, &cache, 0, before, &first);
            let out = step(&gpu, &layer, &cache, before, &parts, &x);
            for (i, &y) in out.iter().enumerate() {
                let (head, dim) = (i / hd, i % hd);
                let expected = match what {
                    "query" => head == 5,
                    "key" => head >= 4,
                    "value" => head >= 4 && (dim == 1 || int8 && dim < SCALE_BLOCK),
                    _ => false,
                };
                assert_eq!(
                    y.is_nan(),
                    expected,
                    "{what}, int8 {int8}: head {head}, dim {dim}"
                );
                assert!(what != "zeros" || y == 0.0, "int8 {int8}: {y}");
            }
        }
    }
}
