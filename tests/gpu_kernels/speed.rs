//! Rates of prefill's kernels at the 80B model's sizes, each variant's result compared with another's.
//!
//! Needs a GPU and is not run by default:
//! `cargo test --release --features cuda --test gpu_kernels -- --ignored --nocapture speed`

use half::f16;
use moectl::backend::cuda::abi::KvCache;
use moectl::backend::cuda::device::{Args, Buffer};
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants::{self, Kernel};
use moectl::backend::{AttentionShape, DeltaNetShape, Rope};
use moectl::planning::Precision;

use crate::{Gpu, Rng, args};

const RUNS: usize = 5;

impl Gpu {
    /// Median milliseconds of a launch.
    fn time(&self, kernel: Kernel, args: impl Fn() -> Args) -> f64 {
        self.launch(kernel.name, kernel.geometry, args());
        let [start, end] = [(); 2].map(|()| self.device.new_event().unwrap());
        let mut times: Vec<f32> = (0..RUNS)
            .map(|_| {
                self.stream.record(&start).unwrap();
                // SAFETY: as the launch before, whose arguments were checked.
                unsafe {
                    self.stream
                        .launch(kernel.name, kernel.geometry, args(), false)
                        .unwrap();
                }
                self.stream.record(&end).unwrap();
                self.stream.synchronize().unwrap();
                end.ms_since(&start).unwrap()
            })
            .collect();
        times.sort_by(f32::total_cmp);
        f64::from(times[RUNS / 2])
    }

    /// `count` values of a million random ones, over and over.
    fn random<T: bytemuck::Pod>(&self, count: usize, value: impl Fn(&mut Rng) -> T) -> Buffer {
        let mut rng = Rng::new(count as u64);
        let some: Vec<T> = (0..count.min(1_000_003)).map(|_| value(&mut rng)).collect();
        let all: Vec<T> = some.iter().copied().cycle().take(count).collect();
        self.up(&all)
    }
}

/// `‖a - b‖ / ‖b‖`
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(&a, &b)| f(a.into(), b.into())).sum()
    };
    (sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b)).sqrt()
}

const ATTENTION: AttentionShape = AttentionShape {
    num_attention_heads: 16,
    num_key_value_heads: 2,
    head_dim: 256,
    rotary_dim: 64,
    rope: Rope::plain(1e7),
};

/// Chunks of `tokens` after `start`: the exact variant, the portable one of one f16, and the one chosen.
#[test]
#[ignore = "times kernels"]
fn speed_of_attention() {
    let Some(gpu) = Gpu::open() else { return };
    let s = &ATTENTION;
    for (tokens, start) in [(4096, 0), (8192, 24_576), (16_384, 114_688)] {
        for int8 in [false, true] {
            let capacity = start + tokens;
            let count = 2 * capacity * s.head_dim;
            let cache: Vec<Buffer> = (0..2)
                .map(|_| match int8 {
                    true => gpu.random(count, |rng| rng.below(255) as i8),
                    false => gpu.random(count, |rng| f16::from_f32(rng.gauss())),
                })
                .collect();
            let scales = gpu.random(count / 32, |rng| f16::from_f32(0.02 * rng.uniform()));
            let cache = KvCache {
                k: cache[0].address(),
                v: cache[1].address(),
                k_scales: scales.address(),
                v_scales: scales.address(),
                capacity: capacity as i32,
                format: int8.into(),
            };
            let rows = tokens * s.num_attention_heads;
            // Scores of size 1, as trained heads have: weights differ, none is alone.
            let q_high = gpu.random(rows * s.head_dim, |rng| f16::from_f32(1000.0 * rng.gauss()));
            let q_low = gpu.random(rows * s.head_dim, |rng| f16::from_f32(0.2 * rng.gauss()));
            let q_scales = gpu.random(rows, |rng| 2e-4 * rng.uniform());
            let gates = gpu.random(2 * rows * s.head_dim, Rng::gauss);
            let out = gpu.nans(rows * s.head_dim);
            let exact = Kernel {
                name: "prefill_attention",
                geometry: geometry::prefill_attention(s, tokens, Precision::Exact),
            };
            let portable = Kernel {
                name: "prefill_attention_fast",
                geometry: geometry::prefill_attention(s, tokens, Precision::F16),
            };
            let chosen =
                variants::prefill_attention(s, tokens, int8, Precision::F16, &gpu.device.facts());
            let context = start as f64 + tokens as f64 / 2.0;
            let flop = 4.0 * (rows * s.head_dim) as f64 * context;
            let mut expected: Vec<f32> = Vec::new();
            for kernel in [exact, portable, chosen] {
                let ms = gpu.time(kernel, || {
                    args![
                        q_high.address(),
                        q_low.address(),
                        q_scales.address(),
                        gates.address(),
                        cache,
                        start as i32,
                        tokens as i32,
                        s.num_attention_heads as i32,
                        s.num_key_value_heads as i32,
                        s.head_dim as i32,
                        out.address()
                    ]
                });
                let found: Vec<f32> = gpu.down(&out);
                if expected.is_empty() {
                    expected.clone_from(&found);
                }
                let off = distance(&found, &expected);
                println!(
                    "{tokens:>6} tokens at {start:>6}, int8 {int8:<5} {:<28} {ms:>8.3} ms {:>5.0} TFLOP/s, \
                     off by {off:.1e}",
                    kernel.name,
                    flop / ms / 1e9
                );
                assert!(off < 5e-3, "{} differs from the exact one", kernel.name);
            }
        }
    }
}

const DELTA_NET: DeltaNetShape = DeltaNetShape {
    num_key_heads: 16,
    num_value_heads: 32,
    key_head_dim: 128,
    value_head_dim: 128,
    conv_kernel_dim: 4,
};

/// The recurrence token by token, in chunks with two f16 terms, and with one.
#[test]
#[ignore = "times kernels"]
fn speed_of_the_delta_rule() {
    let Some(gpu) = Gpu::open() else { return };
    let s = &DELTA_NET;
    let (dk, facts) = (s.key_head_dim, gpu.device.facts());
    for tokens in [512, 4096, 16_384] {
        let key_scale = 1.0 / (dk as f32).sqrt();
        let q = gpu.random(tokens * s.key_dim(), |rng| {
            rng.gauss() * key_scale * key_scale
        });
        let k = gpu.random(tokens * s.key_dim(), |rng| 0.9 * rng.gauss() * key_scale);
        let v = gpu.random(tokens * s.value_dim(), Rng::gauss);
        let heads = tokens * s.num_value_heads;
        let decay = gpu.random(heads, |rng| 1.0 - 0.05 * rng.uniform());
        let beta = gpu.random(heads, Rng::uniform);
        let recurrent = Kernel {
            name: "prefill_delta_rule",
            geometry: geometry::prefill_delta_rule(s),
        };
        let exact = variants::prefill_delta_rule(s, tokens, Precision::Exact, &facts);
        let fast = variants::prefill_delta_rule(s, tokens, Precision::F16, &facts);
        let mut expected: Vec<f32> = Vec::new();
        for (kernel, tolerance) in [(recurrent, 0.0), (exact, 1e-5), (fast, 3e-3)] {
            let launch = |state: &Buffer, o: &Buffer| {
                args![
                    q.address(),
                    k.address(),
                    v.address(),
                    decay.address(),
                    beta.address(),
                    state.address(),
                    o.address(),
                    tokens as i32,
                    s.num_key_heads as i32,
                    s.num_value_heads as i32,
                    dk as i32,
                    s.value_head_dim as i32
                ]
            };
            let state = gpu.zeros(4 * s.value_dim() * dk);
            let o = gpu.nans(tokens * s.value_dim());
            gpu.launch(kernel.name, kernel.geometry, launch(&state, &o));
            let found: Vec<f32> = gpu.down(&o);
            if expected.is_empty() {
                expected.clone_from(&found);
            }
            let off = distance(&found, &expected);
            let ms = gpu.time(kernel, || launch(&state, &o));
            println!(
                "{tokens:>6} tokens {:<28} {} B shared {ms:>8.3} ms, {:>6.1} ns a token, off by {off:.1e}",
                kernel.name,
                kernel.geometry.shared_bytes,
                1e6 * ms / tokens as f64
            );
            assert!(off <= tolerance, "{} differs", kernel.name);
        }
    }
}
