//! Rates of prefill's kernels at the 80B model's sizes, each variant's result compared with another's.
//!
//! Needs a GPU and is not run by default:
//! `cargo test --release --features cuda --test gpu_kernels -- --ignored --nocapture speed`

use half::f16;
use moectl::backend::cuda::abi::{ExpertLayout, Format, KvCache, Linear};
use moectl::backend::cuda::device::{Args, Buffer, DeviceFacts};
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants::{self, Kernel};
use moectl::backend::{AttentionShape, DeltaNetShape, Rope};
use moectl::planning::Precision;

use crate::{Gpu, Rng, args, variants_of};

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

/// The recurrence token by token, and in chunks.
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
        let gates = tokens * s.num_value_heads;
        let decay = gpu.random(gates, |rng| 1.0 - 0.05 * rng.uniform());
        let beta = gpu.random(gates, Rng::uniform);
        let heads = (s.num_key_heads as i32, s.num_value_heads as i32);
        let (count, dk, dv) = (tokens as i32, dk as i32, s.value_head_dim as i32);
        let [q, k, v, decay, beta] = [&q, &k, &v, &decay, &beta].map(Buffer::address);
        let o = gpu.nans(tokens * s.value_dim());
        let state_bytes = 4 * s.value_dim() * s.key_head_dim;
        let recurrent = Kernel {
            name: "prefill_delta_rule",
            geometry: geometry::prefill_delta_rule(s),
        };
        let token_by_token = |state: &Buffer| {
            args![
                q,
                k,
                v,
                decay,
                beta,
                state.address(),
                o.address(),
                count,
                heads.0,
                heads.1,
                dk,
                dv
            ]
        };
        let state = gpu.zeros(state_bytes);
        gpu.launch(recurrent.name, recurrent.geometry, token_by_token(&state));
        let expected: Vec<f32> = gpu.down(&o);
        let ms = gpu.time(recurrent, || token_by_token(&state));
        println!(
            "{tokens:>6} tokens, one by one {ms:>8.3} ms, {:>6.1} ns each",
            1e6 * ms / tokens as f64
        );
        let [prepare, chunks] = variants::prefill_delta_chunks(s, tokens, &facts).expect("it fits");
        let scratch_bytes = geometry::delta_scratch_bytes(s);
        let scratch_buffer = gpu.zeros(tokens.div_ceil(64) * scratch_bytes);
        let scratch = scratch_buffer.address();
        let prepare_args = || {
            args![
                q, k, decay, beta, scratch, 0i32, count, heads.0, heads.1, dk
            ]
        };
        let state = gpu.zeros(state_bytes);
        let chunk_args = || {
            args![
                v,
                scratch,
                state.address(),
                o.address(),
                0i32,
                count,
                heads.0,
                heads.1,
                dk,
                dv
            ]
        };
        gpu.launch(prepare.name, prepare.geometry, prepare_args());
        gpu.launch(chunks.name, chunks.geometry, chunk_args());
        let off = distance(&gpu.down(&o), &expected);
        let times = [
            gpu.time(prepare, prepare_args),
            gpu.time(chunks, chunk_args),
        ];
        println!(
            "{tokens:>6} tokens, in chunks: {:>8.3} ms to prepare, {:>8.3} ms, {:>6.1} ns \
             a token together, off by {off:.1e}",
            times[0],
            times[1],
            1e6 * (times[0] + times[1]) / tokens as f64
        );
        assert!(off <= 1e-5, "in chunks it differs");
    }
}

/// Bytes of a matrix in tiles of 32 x 64.
const fn tile_bytes(rows: usize, cols: usize) -> usize {
    rows / 32 * (cols / 64) * 1088
}

/// x as prefill_split leaves it, `[tokens, cols]`.
struct Terms {
    high: Buffer,
    low: Buffer,
    scale: Buffer,
}

impl Terms {
    fn random(gpu: &Gpu, tokens: usize, cols: usize) -> Terms {
        Terms {
            high: gpu.random(tokens * cols, |rng| f16::from_f32(3000.0 * rng.gauss())),
            low: gpu.random(tokens * cols, |rng| f16::from_f32(0.3 * rng.gauss())),
            scale: gpu.up(&vec![1.0f32 / 4096.0; tokens]),
        }
    }
}

/// Times the variants that `choose` names, and compares what they leave in `out` with the exact one's.
fn compare(
    gpu: &Gpu,
    what: &str,
    flop: f64,
    out: &Buffer,
    choose: impl Fn(Precision, &DeviceFacts) -> Kernel,
    args: impl Fn() -> Args,
) {
    let mut expected: Vec<f32> = Vec::new();
    for (kernel, _) in variants_of(gpu, choose) {
        let ms = gpu.time(kernel, &args);
        let found: Vec<f32> = gpu.down(out);
        if expected.is_empty() {
            expected.clone_from(&found);
        }
        let off = distance(&found, &expected);
        println!(
            "{what} {:<28} {ms:>8.3} ms {:>5.0} TFLOP/s, off by {off:.1e}",
            kernel.name,
            flop / ms / 1e9
        );
        assert!(off < 3e-3, "{} differs from the exact one", kernel.name);
    }
}

/// Dense products: with two f16 terms, one, and one by the device's own variant.
#[test]
#[ignore = "times kernels"]
fn speed_of_dense_products() {
    let Some(gpu) = Gpu::open() else { return };
    for (rows, cols) in [(12_288, 2048), (2048, 4096), (512, 2048)] {
        let weights = gpu.random(tile_bytes(rows, cols), |rng| rng.bits() as u8);
        let units = gpu.up(&vec![1e-6f32; rows / 32]);
        let linear = Linear {
            weights: weights.address(),
            units: units.address(),
            rows: rows as i32,
            cols: cols as i32,
            kblocks: (cols / 64) as i32,
            format: Format::Nf4Tiles as i32,
        };
        for tokens in [512, 4096, 16_384] {
            let x = Terms::random(&gpu, tokens, cols);
            let out = gpu.nans(tokens * rows);
            compare(
                &gpu,
                &format!("{rows:>6} x {cols} {tokens:>6} tokens"),
                2.0 * (rows * cols * tokens) as f64,
                &out,
                |precision, facts| variants::prefill_linear(rows, tokens, precision, facts),
                || {
                    args![
                        x.high.address(),
                        x.low.address(),
                        x.scale.address(),
                        tokens as i32,
                        linear,
                        out.address(),
                        0i32
                    ]
                },
            );
        }
    }
}

const EXPERTS: usize = 512;
const TOP_K: usize = 10;
const DIM: usize = 2048;
const INTERMEDIATE: usize = 512;
const EXPERT_MATRIX: usize = tile_bytes(INTERMEDIATE, DIM);

const EXPERT_LAYOUT: ExpertLayout = ExpertLayout {
    up_offset: EXPERT_MATRIX as i64,
    down_offset: 2 * EXPERT_MATRIX as i64,
    blob_bytes: 3 * EXPERT_MATRIX as i64,
    intermediate: INTERMEDIATE as i32,
    format: Format::Nf4Tiles as i32,
    up_unit: (INTERMEDIATE / 32) as i32,
    down_unit: (INTERMEDIATE / 16) as i32,
    num_units: (INTERMEDIATE / 16 + DIM / 32) as i32,
    padding: 0,
};

/// Tokens that have picked ten experts each by chance, sorted by expert.
struct Grouped {
    tiles: Buffer,
    tile_offsets: Buffer,
    rows: Buffer,
    /// Of tiles
    bound: usize,
}

impl Grouped {
    fn random(gpu: &Gpu, tokens: usize) -> Grouped {
        let mut rng = Rng::new(tokens as u64);
        let mut all: Vec<i32> = (0..EXPERTS as i32).collect();
        let mut ids: Vec<i32> = Vec::new();
        for _ in 0..tokens {
            for i in 0..TOP_K {
                let j = i + rng.below(EXPERTS - i);
                all.swap(i, j);
            }
            ids.extend(&all[..TOP_K]);
        }
        let ids = gpu.up(&ids);
        let rows = tokens * (TOP_K + 1);
        let bound = (tokens * TOP_K).div_ceil(128) + EXPERTS + tokens.div_ceil(128) + 1;
        let (t, k, e) = (tokens as i32, TOP_K as i32, EXPERTS as i32);
        let counts = gpu.zeros(4 * tokens.div_ceil(64) * EXPERTS);
        let [offsets, tile_offsets] = [(); 2].map(|()| gpu.zeros(4 * (EXPERTS + 2)));
        let [row_tokens, positions] = [(); 2].map(|()| gpu.zeros(4 * rows));
        let tiles = gpu.zeros(16 * bound);
        let chunks = geometry::prefill_group(EXPERTS, tokens);
        let [ids, counts] = [&ids, &counts].map(Buffer::address);
        let places = [&offsets, &tiles, &tile_offsets].map(Buffer::address);
        gpu.launch("prefill_group_count", chunks, args![ids, t, k, e, counts]);
        gpu.launch(
            "prefill_group_scan",
            geometry::rows(1, 1024),
            args![counts, t, k, e, places[0], places[1], places[2]],
        );
        let sorted = [&row_tokens, &positions].map(Buffer::address);
        gpu.launch(
            "prefill_group_scatter",
            chunks,
            args![ids, t, k, e, counts, sorted[0], sorted[1]],
        );
        Grouped {
            tiles,
            tile_offsets,
            rows: row_tokens,
            bound,
        }
    }
}

/// Gate and up, then down, of all experts and the shared one.
#[test]
#[ignore = "times kernels"]
fn speed_of_experts() {
    let Some(gpu) = Gpu::open() else { return };
    let blobs = gpu.random((EXPERTS + 1) * 3 * EXPERT_MATRIX, |rng| rng.bits() as u8);
    let units = gpu.up(&vec![1e-6f32; EXPERT_LAYOUT.num_units as usize]);
    let addresses: Vec<u64> = (0..=EXPERTS)
        .map(|e| blobs.at(e * 3 * EXPERT_MATRIX))
        .collect();
    let blob_table = gpu.up(&addresses);
    let unit_table = gpu.up(&vec![units.address(); EXPERTS + 1]);
    let (e, dim, groups) = (EXPERTS as i32, DIM as i32, EXPERTS as i32 + 1);
    for tokens in [512, 4096, 16_384] {
        let grouped = Grouped::random(&gpu, tokens);
        let rows = tokens * (TOP_K + 1);
        let flop = 2.0 * (rows * DIM * INTERMEDIATE) as f64;
        let x = Terms::random(&gpu, tokens, DIM);
        let h = gpu.nans(rows * INTERMEDIATE);
        compare(
            &gpu,
            &format!("experts up   {tokens:>6} tokens"),
            2.0 * flop,
            &h,
            |precision, facts| {
                variants::prefill_experts_up(INTERMEDIATE, grouped.bound, precision, facts)
            },
            || {
                args![
                    x.high.address(),
                    x.low.address(),
                    x.scale.address(),
                    grouped.rows.address(),
                    grouped.tiles.address(),
                    grouped.tile_offsets.address(),
                    blob_table.address(),
                    unit_table.address(),
                    EXPERT_LAYOUT,
                    EXPERT_LAYOUT,
                    e,
                    dim,
                    0i32,
                    groups,
                    h.address(),
                    INTERMEDIATE as i32
                ]
            },
        );
        let x = Terms::random(&gpu, rows, INTERMEDIATE);
        let y = gpu.nans(rows * DIM);
        compare(
            &gpu,
            &format!("experts down {tokens:>6} tokens"),
            flop,
            &y,
            |precision, facts| {
                variants::prefill_experts_down(DIM, tokens, grouped.bound, precision, facts)
            },
            || {
                args![
                    x.high.address(),
                    x.low.address(),
                    x.scale.address(),
                    grouped.tiles.address(),
                    grouped.tile_offsets.address(),
                    blob_table.address(),
                    unit_table.address(),
                    EXPERT_LAYOUT,
                    EXPERT_LAYOUT,
                    e,
                    dim,
                    INTERMEDIATE as i32,
                    0i32,
                    groups,
                    0i32,
                    dim,
                    y.address()
                ]
            },
        );
    }
}
