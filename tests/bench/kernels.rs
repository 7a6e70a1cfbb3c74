//! Times every kernel per instruction set, and a slice of the 80B model. Not a test.
//!
//! `cargo bench --bench kernels -- [FILTER]` runs what has FILTER in its name. Each figure is the
//! median of many short runs, with the 10th and 90th percentile; GB/s counts weight bytes, GFLOP/s
//! counts two per multiply-add.
//!
//! `isa-ab` as FILTER compares the products of NF4 on all instruction sets, interleaved, which says
//! more on a machine with noisy neighbours.

mod interleaved;
mod offload;
#[path = "../support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use half::f16;
use moectl::backend::cpu::activations::{Activations, Integers};
use moectl::backend::cpu::attention::{Attend, CHUNK, Stats};
use moectl::backend::cpu::conv::conv_silu;
use moectl::backend::cpu::delta_rule::{HeadInputs, delta_rule};
use moectl::backend::cpu::isa::Isa;
use moectl::backend::cpu::kv_cache::{KvCache, KvData};
use moectl::backend::cpu::linear::{Linear, Panels};
use moectl::backend::cpu::load::load;
use moectl::backend::cpu::rms_norm::rms_norm;
use moectl::backend::cpu::router::softmax;
use moectl::backend::cpu::threads::Pool;
use moectl::backend::cpu::{Cpu, CpuOptions, CpuPrecision};
use moectl::backend::tally::Tally;
use moectl::backend::weights::{AttentionWeights, DeltaNetWeights};
use moectl::backend::*;
use moectl::formats::matrix::DenseMatrix;
use moectl::formats::nf4::{Absmax, Nf4Matrix};
use moectl::formats::{Bytes, Dtype, Matrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{One, one};

/// Seconds of wall time.
fn wall() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Seconds that this thread had a core.
fn own() -> f64 {
    // SAFETY: zero bits are a valid `timespec`, which the call overwrites.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
        time
    };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

struct Bench {
    filter: Option<String>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|f| name.contains(f.as_str()) || f.starts_with(name))
    }

    /// Prints how many `units` (in 1e9, named by `unit`) one call of `f` does per second.
    ///
    /// `clock` is [`wall`], or [`own`] for work of one thread on a machine that is shared.
    fn time(&self, name: &str, units: f64, unit: &str, clock: fn() -> f64, f: impl FnMut()) {
        if self.wants(name) {
            self.repeat(name, units, unit, clock, 101, f);
        }
    }

    fn repeat(
        &self,
        name: &str,
        units: f64,
        unit: &str,
        clock: fn() -> f64,
        runs: usize,
        mut f: impl FnMut(),
    ) {
        f();
        let start = clock();
        f();
        let calls = (0.002 / (clock() - start)).clamp(1.0, 1e6) as usize;
        let mut rates: Vec<f64> = (0..runs)
            .map(|_| {
                let start = clock();
                for _ in 0..calls {
                    f();
                }
                units * calls as f64 / (clock() - start) / 1e9
            })
            .collect();
        rates.sort_by(f64::total_cmp);
        println!(
            "{name:<44} {:>9.2} {unit:<8} ({:.2} .. {:.2})",
            rates[runs / 2],
            rates[runs / 10],
            rates[runs * 9 / 10]
        );
    }
}

fn random(len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// NF4 of one shared block of random codes: what is read later is the packed copy.
fn nf4(rows: usize, cols: usize) -> Matrix {
    let mut packed = vec![0u8; rows * cols / 2];
    ChaCha8Rng::seed_from_u64(1).fill(&mut packed[..]);
    let absmax = (0.5 / (cols as f32).sqrt()).to_le_bytes();
    Matrix::Nf4(Nf4Matrix {
        packed: Bytes::from(packed),
        absmax: Absmax::Plain(Bytes::from(absmax.repeat(rows * cols / 64))),
        first: 0,
        rows,
        cols,
    })
}

fn bf16(rows: usize, cols: usize) -> Matrix {
    let row: Vec<u8> = random(cols)
        .iter()
        .flat_map(|v| half::bf16::from_f32(v * 0.05).to_le_bytes())
        .collect();
    Matrix::Dense(DenseMatrix {
        data: Bytes::from(row.repeat(rows)),
        dtype: Dtype::Bf16,
        rows,
        cols,
    })
}

fn activations(
    pool: &mut Pool,
    isa: Isa,
    tokens: usize,
    cols: usize,
    kind: Option<Integers>,
) -> Activations {
    let x = random(tokens * cols);
    let mut out = Activations::default();
    out.fill(pool, isa, tokens, cols, kind, &|t, row| {
        row.copy_from_slice(&x[t * cols..(t + 1) * cols]);
    })
    .unwrap();
    out
}

fn project(pool: &mut Pool, isa: Isa, linear: &Linear, x: &Activations, out: &mut Panels) {
    let all: Vec<u32> = (0..x.tokens as u32).collect();
    out.project(pool, isa, &[linear], x.view(), &all).unwrap();
}

/// One core, weights in L2: what a kernel can do.
fn matrix_kernels(bench: &Bench, isa: Isa) {
    let mut pool = Pool::new(Some(1)).unwrap();
    let mut panels = Panels::default();
    let forms = [
        ("nf4-int8", nf4(512, 2048), CpuPrecision::Int8),
        ("nf4-int16", nf4(512, 2048), CpuPrecision::Int16),
        ("nf4-wide", nf4(512, 2048), CpuPrecision::Int16),
        ("nf4-f32", nf4(512, 2048), CpuPrecision::F32),
        ("bf16", bf16(128, 2048), CpuPrecision::F32),
    ];
    for (form, matrix, precision) in forms {
        let mut linear = load(&mut pool, &[(&matrix, precision)]).unwrap().remove(0);
        if form == "nf4-wide" {
            linear.integers = Integers::Wide;
        }
        for tokens in [1, 2, 4, 6, 8, 10, 12, 16, 24, 64, 512] {
            let x = activations(&mut pool, isa, tokens, 2048, linear.reads_integers());
            let flops = 2.0 * (matrix.rows() * matrix.cols() * tokens) as f64;
            let (units, unit) = if tokens <= 4 {
                (linear.bytes() as f64, "GB/s")
            } else {
                (flops, "GFLOP/s")
            };
            let name = format!("{form} {} M={tokens}", isa.name());
            bench.time(&name, units, unit, own, || {
                project(&mut pool, isa, &linear, &x, &mut panels);
            });
        }
    }
}

fn other_kernels(bench: &Bench, isa: Isa) {
    let name = isa.name();
    let x = random(2048);
    let mut y = vec![0.0; 2048];
    bench.time(
        &format!("rms-norm {name} 2048"),
        2048.0,
        "Gelem/s",
        own,
        || {
            rms_norm(isa, black_box(&x), &x, 1e-6, &mut y);
        },
    );
    let mut p = random(512);
    bench.time(
        &format!("softmax {name} 512"),
        512.0,
        "Gelem/s",
        own,
        || {
            softmax(isa, black_box(&mut p));
        },
    );
    for tokens in [1, 64] {
        let (dk, dv) = (128, 128);
        let mut k = random(tokens * dk);
        k.iter_mut().for_each(|k| *k *= 0.1);
        let (v, decay) = (random(tokens * dv), vec![0.9; tokens]);
        let (mut state, mut out) = (vec![0.0; dk * dv], vec![0.0; tokens * dv]);
        let inputs = HeadInputs {
            key_dim: dk,
            q: &k,
            k: &k,
            stride: dk,
            v: &v,
            decay: &decay,
            beta: &decay,
        };
        let flops = (tokens * dk * dv * 7) as f64;
        bench.time(
            &format!("delta-rule {name} T={tokens}"),
            flops,
            "GFLOP/s",
            own,
            || {
                delta_rule(isa, &inputs, dv, black_box(&mut state), &mut out);
            },
        );
        let (input, taps) = (random((3 + tokens) * dv), random(4 * dv));
        let flops = (tokens * dv * 8) as f64;
        bench.time(
            &format!("conv {name} T={tokens}"),
            flops,
            "GFLOP/s",
            own,
            || {
                conv_silu(isa, black_box(&input), &taps, dv, &mut out);
            },
        );
    }
    let dim = 256;
    for dtype in KvDtype::ALL {
        let KvCache {
            mut data, layout, ..
        } = KvCache::new(dtype, 1, dim, CHUNK, &Tally::default());
        match &mut data {
            KvData::F32(kv) => drop(kv.writer(layout, 0..CHUNK)),
            KvData::F16(kv) => drop(kv.writer(layout, 0..CHUNK)),
            KvData::Int8(kv) => drop(kv.writer(layout, 0..CHUNK)),
        }
        for n in [1, 8, 128] {
            let queries = random(n * dim);
            let (mut stats, mut values) = (vec![Stats::NOTHING; n], vec![0.0; n * dim]);
            let visible = vec![CHUNK; n];
            let flops = (4 * n * dim * CHUNK) as f64;
            bench.time(
                &format!("attention {name} {dtype} queries={n}"),
                flops,
                "GFLOP/s",
                own,
                || match &data {
                    KvData::F32(kv) => {
                        let chunk = kv.chunk(layout, 0, 0);
                        f32::attend_chunk(isa, &queries, &visible, chunk, &mut stats, &mut values);
                    }
                    KvData::F16(kv) => {
                        let chunk = kv.chunk(layout, 0, 0);
                        f16::attend_chunk(isa, &queries, &visible, chunk, &mut stats, &mut values);
                    }
                    KvData::Int8(kv) => {
                        let chunk = kv.chunk(layout, 0, 0);
                        i8::attend_chunk(isa, &queries, &visible, chunk, &mut stats, &mut values);
                    }
                },
            );
        }
    }
}

/// All cores, weights in RAM: how much of the memory's bandwidth arrives.
fn memory_bound(bench: &Bench) {
    let mut pool = Pool::new(None).unwrap();
    let isa = Isa::detect().unwrap();
    let bytes = 512 << 20;
    let memory: Vec<u64> = vec![1; bytes / 8];
    let chunks: Vec<&[u64]> = memory.chunks(1 << 14).collect();
    bench.time("ram read", bytes as f64, "GB/s", wall, || {
        pool.run(chunks.len(), &|i| {
            black_box(chunks[i].iter().fold(0u64, |a, b| a ^ b));
        })
        .unwrap();
    });
    drop(memory);
    let large_nf4 = || nf4(1 << 18, 2048);
    let large_bf16 = || bf16(1 << 16, 2048);
    let forms: [(&str, CpuPrecision, &dyn Fn() -> Matrix); 3] = [
        ("nf4-int16", CpuPrecision::Int16, &large_nf4),
        ("nf4-f32", CpuPrecision::F32, &large_nf4),
        ("bf16", CpuPrecision::F32, &large_bf16),
    ];
    for (form, precision, matrix) in forms {
        let name = format!("ram {form} M=1");
        if !bench.wants(&name) {
            continue;
        }
        let linear = load(&mut pool, &[(&matrix(), precision)])
            .unwrap()
            .remove(0);
        let x = activations(&mut pool, isa, 1, 2048, linear.reads_integers());
        let mut panels = Panels::default();
        bench.time(&name, linear.bytes() as f64, "GB/s", wall, || {
            project(&mut pool, isa, &linear, &x, &mut panels);
        });
    }
    if bench.wants("pack") {
        let matrix = nf4(1 << 14, 2048);
        let mut one = Pool::new(Some(1)).unwrap();
        bench.repeat(
            "pack",
            matrix.stored_bytes() as f64,
            "GB/s",
            own,
            21,
            || {
                black_box(load(&mut one, &[(&matrix, CpuPrecision::Int16)]).unwrap());
            },
        );
    }
    bench.time("pool dispatch", 1e3, "M/s", wall, || {
        pool.run(2, &|_| {}).unwrap();
    });
}

/// Some layers of the 80B model with random weights.
fn slice(layers: usize) -> (ModelShape, ModelWeights) {
    let shape = ModelShape {
        vocab_size: 151_936,
        hidden_size: 2048,
        rms_norm_eps: 1e-6,
        mixers: (0..layers)
            .map(|i| match i % 4 {
                3 => MixerKind::GatedAttention,
                _ => MixerKind::GatedDeltaNet,
            })
            .collect(),
        attention: AttentionShape {
            num_attention_heads: 16,
            num_key_value_heads: 2,
            head_dim: 256,
            rotary_dim: 64,
            rope_theta: 1e7,
        },
        delta_net: DeltaNetShape {
            num_key_heads: 16,
            num_value_heads: 32,
            key_head_dim: 128,
            value_head_dim: 128,
            conv_kernel_dim: 4,
        },
        moe: MoeShape {
            num_experts: 512,
            num_experts_per_tok: 10,
            moe_intermediate_size: 512,
            shared_expert_intermediate_size: 512,
            norm_topk_prob: true,
        },
    };
    let expert = expert();
    let delta = MixerWeights::GatedDeltaNet(Box::new(DeltaNetWeights {
        in_proj_qkvz: nf4(12288, 2048),
        in_proj_ba: nf4(64, 2048),
        conv1d: random(8192 * 4),
        a_log: vec![0.0; 32],
        dt_bias: vec![0.0; 32],
        norm: vec![1.0; 128],
        out_proj: nf4(2048, 4096),
    }));
    let attention = MixerWeights::GatedAttention(Box::new(AttentionWeights {
        q_proj: nf4(8192, 2048),
        k_proj: nf4(512, 2048),
        v_proj: nf4(512, 2048),
        o_proj: nf4(2048, 4096),
        q_norm: vec![0.0; 256],
        k_norm: vec![0.0; 256],
    }));
    let router: Vec<u8> = random(512 * 2048)
        .iter()
        .flat_map(|v| half::bf16::from_f32(v * 0.05).to_le_bytes())
        .collect();
    let moe = MoeWeights {
        gate: Matrix::Dense(DenseMatrix {
            data: Bytes::from(router),
            dtype: Dtype::Bf16,
            rows: 512,
            cols: 2048,
        }),
        experts: vec![expert.clone(); 512],
        shared_expert: expert,
        shared_expert_gate: nf4(1, 2048),
    };
    let layers = shape
        .mixers
        .iter()
        .map(|kind| LayerWeights {
            input_layernorm: vec![0.0; 2048],
            mixer: match kind {
                MixerKind::GatedDeltaNet => delta.clone(),
                MixerKind::GatedAttention => attention.clone(),
            },
            post_attention_layernorm: vec![0.0; 2048],
            moe: moe.clone(),
        })
        .collect();
    let lm_head = bf16(151_936, 2048);
    let mut embedding = vec![0u8; 4096 * 2048 * 2];
    for (out, v) in embedding.chunks_exact_mut(2).zip(random(4096 * 2048)) {
        out.copy_from_slice(&half::bf16::from_f32(v).to_le_bytes());
    }
    let weights = ModelWeights {
        embed_tokens: Matrix::Dense(DenseMatrix {
            data: Bytes::from(embedding),
            dtype: Dtype::Bf16,
            rows: 4096,
            cols: 2048,
        }),
        layers,
        norm: vec![0.0; 2048],
        lm_head,
    };
    (shape, weights)
}

/// An expert of the 80B model.
fn expert() -> ExpertWeights {
    ExpertWeights {
        gate_proj: nf4(512, 2048),
        up_proj: nf4(512, 2048),
        down_proj: nf4(2048, 512),
    }
}

/// Decode and prefill of a whole model; `vocab` bounds the token ids that are fed.
///
/// One thread is timed by its own clock, several by the wall's.
fn model(
    bench: &Bench,
    name: &str,
    threads: Option<usize>,
    (shape, weights): (ModelShape, ModelWeights),
    vocab: u32,
) {
    let options = CpuOptions {
        threads,
        ..CpuOptions::default()
    };
    let stored: usize = weights
        .layers
        .iter()
        .flat_map(|l| &l.moe.experts)
        .flat_map(|e| [&e.gate_proj, &e.up_proj, &e.down_proj])
        .map(|m| m.stored_bytes())
        .sum();
    let start = Instant::now();
    let cpu = Cpu::new(shape, &weights, options, &|_, _| {}).unwrap();
    let rate = stored as f64 / start.elapsed().as_secs_f64() / 1e9;
    drop(weights);
    let (name, clock) = match cpu.threads() {
        1 => (format!("{name} one-thread"), own as fn() -> f64),
        _ => (name.to_string(), wall as fn() -> f64),
    };
    println!("{:<44} {rate:>9.2} GB/s", format!("{name} load"));
    let bytes = cpu.weight_bytes_per_token() as f64;
    let mut sequence = one(cpu, 4096);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let prompt: Vec<u32> = (0..512).map(|_| rng.random_range(0..vocab)).collect();
    let feed = |ids: &[u32], sequence: &mut One<BlockExecutor<Cpu>>| {
        if sequence.position() + ids.len() > 4096 {
            sequence.reset(4096).unwrap();
        }
        let mut ignore = |_: usize, _: usize, _: &Routing| {};
        black_box(sequence.forward(ids, LogitRows::Last, &mut ignore)).unwrap();
    };
    let mut next = prompt.iter().cycle();
    bench.repeat(&format!("{name} decode"), 1e9, "tok/s", clock, 21, || {
        feed(&[*next.next().unwrap()], &mut sequence);
    });
    let mut next = prompt.iter().cycle();
    bench.repeat(&format!("{name} decode"), bytes, "GB/s", clock, 21, || {
        feed(&[*next.next().unwrap()], &mut sequence);
    });
    bench.repeat(
        &format!("{name} prefill 512"),
        512e9,
        "tok/s",
        clock,
        9,
        || feed(&prompt, &mut sequence),
    );
}

fn main() {
    // `cargo bench` passes --bench; the other argument is the filter.
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    if filter.as_deref() == Some("isa-ab") {
        return interleaved::instruction_sets();
    }
    let bench = Bench { filter };
    for isa in Isa::available() {
        matrix_kernels(&bench, isa);
        // With AMX these are those of AVX-512.
        if !matches!(isa, Isa::Amx(_)) {
            other_kernels(&bench, isa);
        }
    }
    memory_bound(&bench);
    if bench.wants("offload") {
        offload::offload(&expert());
    }
    for threads in [Some(1), None] {
        if bench.wants("tiny") {
            let tiny = support::open(&support::tiny_moe());
            model(&bench, "tiny", threads, tiny, 8192);
        }
        if bench.wants("slice") {
            model(&bench, "slice", threads, slice(4), 4096);
        }
    }
}
