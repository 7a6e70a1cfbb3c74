//! delta_net.cu and delta_net_prefill.cu: sequences that are cut into chunks and steps.

use moectl::backend::DeltaNetShape;
use moectl::backend::cuda::abi::Step;
use moectl::backend::cuda::device::Buffer;
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants;

use crate::{EPS, Gpu, Rng, args, check, check_by, rms_norm, sigmoid, silu};

/// f32 all the way; states carry what steps before them rounded off.
const TOLERANCE: f64 = 2e-5;

struct Net {
    shape: DeltaNetShape,
    conv: Vec<f32>,
    negative_a: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

impl Net {
    fn random(rng: &mut Rng, shape: DeltaNetShape) -> Net {
        Net {
            conv: rng.gausses(shape.conv_dim() * shape.conv_kernel_dim, 0.5),
            negative_a: (0..shape.num_value_heads)
                .map(|_| -rng.gauss().exp())
                .collect(),
            dt_bias: rng.gausses(shape.num_value_heads, 1.0),
            norm: rng.gausses(shape.value_head_dim, 1.0),
            shape,
        }
    }

    /// Value heads of a key head.
    fn share(&self) -> usize {
        self.shape.num_value_heads / self.shape.num_key_heads
    }

    /// Rows of a key head in qkvz: its q, its k, its value heads' v, then their z.
    fn rows_per_head(&self) -> usize {
        2 * self.shape.key_head_dim + 2 * self.share() * self.shape.value_head_dim
    }
}

/// The whole layer between its projections, one token at a time.
struct Reference<'a> {
    net: &'a Net,
    /// `[value_heads, dv, dk]`
    state: Vec<f64>,
    past: Vec<Vec<f32>>,
}

/// What a step has computed on its way.
#[derive(Default)]
struct Traces {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    decay: Vec<f64>,
    beta: Vec<f64>,
    o: Vec<f64>,
    /// Sum of the sizes of an output's terms, the largest of all
    largest_sum: f64,
}

impl<'a> Reference<'a> {
    fn new(net: &'a Net) -> Self {
        let s = &net.shape;
        Reference {
            net,
            state: vec![0.0; s.value_dim() * s.key_head_dim],
            past: Vec::new(),
        }
    }

    fn step(&mut self, qkvz: &[f32], ba: &[f32], traces: &mut Traces) {
        let net = self.net;
        let s = &net.shape;
        let (dk, dv, taps, share) = (
            s.key_head_dim,
            s.value_head_dim,
            s.conv_kernel_dim,
            net.share(),
        );
        self.past.push(qkvz.to_vec());
        let now = self.past.len() - 1;
        let convolved = |row: usize, channel: usize| {
            let sum: f64 = (0..taps)
                .filter(|j| now + 1 + j >= taps)
                .map(|j| {
                    let x = self.past[now + 1 + j - taps][row];
                    f64::from(net.conv[channel * taps + j]) * f64::from(x)
                })
                .sum();
            silu(sum)
        };
        let normed = |x: Vec<f64>, scale: f64| -> Vec<f64> {
            let squares: f64 = x.iter().map(|x| x * x).sum();
            x.iter()
                .map(|x| x / (squares + 1e-6).sqrt() * scale)
                .collect()
        };
        for head in 0..s.num_value_heads {
            let (key_head, within) = (head / share, head % share);
            let row = key_head * net.rows_per_head();
            let q = (0..dk)
                .map(|c| convolved(row + c, key_head * dk + c))
                .collect();
            let q = normed(q, 1.0 / (dk as f64).sqrt());
            let k_channel = (s.num_key_heads + key_head) * dk;
            let k = (0..dk)
                .map(|c| convolved(row + dk + c, k_channel + c))
                .collect();
            let k = normed(k, 1.0);
            let v_row = row + 2 * dk + within * dv;
            let v_channel = 2 * s.key_dim() + head * dv;
            let v: Vec<f64> = (0..dv)
                .map(|c| convolved(v_row + c, v_channel + c))
                .collect();
            let b = f64::from(ba[key_head * 2 * share + within]);
            let a =
                f64::from(ba[key_head * 2 * share + share + within]) + f64::from(net.dt_bias[head]);
            let softplus = if a > 20.0 { a } else { a.exp().ln_1p() };
            let decay = (f64::from(net.negative_a[head]) * softplus).exp();
            let beta = sigmoid(b);
            for (c, &value) in v.iter().enumerate() {
                let at = (head * dv + c) * dk;
                let state = &mut self.state[at..at + dk];
                state.iter_mut().for_each(|s| *s *= decay);
                let read: f64 = state.iter().zip(&k).map(|(s, k)| s * k).sum();
                let delta = (value - read) * beta;
                state.iter_mut().zip(&k).for_each(|(s, k)| *s += k * delta);
                let terms = || state.iter().zip(&q).map(|(s, q)| s * q);
                traces.o.push(terms().sum());
                let sum = terms().map(f64::abs).sum();
                traces.largest_sum = traces.largest_sum.max(sum);
            }
            if within == 0 {
                traces.q.extend(&q);
                traces.k.extend(&k);
            }
            traces.v.extend(&v);
            traces.decay.push(decay);
            traces.beta.push(beta);
        }
    }
}

/// The rule in chunks, with one or two of them in shared memory, and so many tokens a range.
#[derive(Debug)]
struct InChunks {
    stages: usize,
    range: usize,
}

const CHUNK_VARIANTS: [InChunks; 2] = [
    InChunks {
        stages: 1,
        range: 1024,
    },
    InChunks {
        stages: 2,
        range: 64,
    },
];

/// Outputs and state after `t` tokens; q, k, v, decay and beta as `prefill_delta_rule` has them.
fn in_chunks(
    gpu: &Gpu,
    s: &DeltaNetShape,
    variant: &InChunks,
    t: usize,
    [q, k, v, decay, beta]: [&Buffer; 5],
    state: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let InChunks { stages, range } = *variant;
    let heads = (s.num_key_heads as i32, s.num_value_heads as i32);
    let (dk, dv) = (s.key_head_dim as i32, s.value_head_dim as i32);
    let (state, o) = (gpu.up(state), gpu.nans(t * s.value_dim()));
    let chunks = t.min(range).div_ceil(geometry::DELTA_CHUNK);
    let floats = chunks * geometry::delta_scratch_bytes(s) / 4;
    let scratch = gpu.nans(floats);
    let names = variants::prefill_delta_chunks(s, t, &gpu.device.facts())
        .expect("a chunk fits")
        .map(|kernel| kernel.name);
    for first in (0..t).step_by(range) {
        let tokens = range.min(t - first);
        let (first, count) = (first as i32, tokens as i32);
        gpu.launch(
            names[0],
            geometry::prefill_delta_prepare(s, tokens),
            args![
                q.address(),
                k.address(),
                decay.address(),
                beta.address(),
                scratch.address(),
                first,
                count,
                heads.0,
                heads.1,
                dk
            ],
        );
        gpu.launch(
            names[1],
            geometry::prefill_delta_chunks(s, stages),
            args![
                v.address(),
                scratch.address(),
                state.address(),
                o.address(),
                first,
                count,
                heads.0,
                heads.1,
                dk,
                dv
            ],
        );
    }
    (gpu.down(&o), gpu.down(&state))
}

fn run(gpu: &Gpu, shape: DeltaNetShape, chunks: &[usize], steps: usize, outliers: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let net = Net::random(&mut rng, shape);
    let s = &net.shape;
    let (rows, taps) = (s.qkvz_rows(), s.conv_kernel_dim);
    let (dk, dv) = (s.key_head_dim, s.value_head_dim);
    let (key_heads, value_heads) = (s.num_key_heads, s.num_value_heads);
    let heads = (key_heads as i32, value_heads as i32, dk as i32, dv as i32);
    let mut reference = Reference::new(&net);
    let ring = gpu.zeros(4 * taps * rows);
    let state = gpu.zeros(4 * reference.state.len());
    let conv = gpu.up(&net.conv);
    let (negative_a, dt_bias) = (gpu.up(&net.negative_a), gpu.up(&net.dt_bias));
    let norm = gpu.up(&net.norm);
    let mut position = 0;
    for &t in chunks {
        let what = format!("{s:?}, {t} tokens at {position}, outliers {outliers}");
        let mut x = rng.gausses(t * rows, 1.0);
        let ba = rng.gausses(t * 2 * value_heads, 2.0);
        if outliers {
            for _ in 0..3 * t {
                let i = rng.below(x.len());
                x[i] *= 1000.0;
            }
        }
        let mut traces = Traces::default();
        for token in 0..t {
            let ba = &ba[token * 2 * value_heads..(token + 1) * 2 * value_heads];
            reference.step(&x[token * rows..(token + 1) * rows], ba, &mut traces);
        }
        let (qkvz, ba) = (gpu.up(&x), gpu.up(&ba));
        let [q, k] = [(); 2].map(|()| gpu.nans(t * s.key_dim()));
        let [v, out] = [(); 2].map(|()| gpu.nans(t * s.value_dim()));
        let [decay, beta] = [(); 2].map(|()| gpu.nans(t * value_heads));
        gpu.launch(
            "prefill_conv",
            geometry::prefill_conv(s, t),
            args![
                qkvz.address(),
                ba.address(),
                ring.address(),
                taps as i32,
                position as i32,
                conv.address(),
                negative_a.address(),
                dt_bias.address(),
                q.address(),
                k.address(),
                v.address(),
                decay.address(),
                beta.address(),
                t as i32,
                heads.0,
                heads.1,
                heads.2,
                heads.3,
                taps as i32
            ],
        );
        for variant in CHUNK_VARIANTS {
            let inputs = [&q, &k, &v, &decay, &beta];
            let (o, state) = in_chunks(gpu, s, &variant, t, inputs, &gpu.down(&state));
            let what = format!("{what}, {variant:?}");
            // Terms may cancel, and here they are added in another order than in the definition.
            let largest = traces.largest_sum;
            check_by(&format!("{what}: o"), &o, &traces.o, TOLERANCE, largest);
            check(
                &format!("{what}: state"),
                &state,
                &reference.state,
                TOLERANCE,
            );
        }
        let o = gpu.nans(t * s.value_dim());
        gpu.launch(
            "prefill_delta_rule",
            geometry::prefill_delta_rule(s),
            args![
                q.address(),
                k.address(),
                v.address(),
                decay.address(),
                beta.address(),
                state.address(),
                o.address(),
                t as i32,
                heads.0,
                heads.1,
                heads.2,
                heads.3
            ],
        );
        gpu.launch(
            "prefill_gated_norm",
            geometry::rows((t * value_heads).div_ceil(8), 256),
            args![
                o.address(),
                qkvz.address(),
                norm.address(),
                EPS,
                out.address(),
                t as i32,
                heads.0,
                heads.1,
                heads.2,
                heads.3
            ],
        );
        gpu.launch(
            "prefill_ring",
            geometry::prefill_ring(s, t),
            args![
                qkvz.address(),
                ring.address(),
                taps as i32,
                position as i32,
                t as i32,
                rows as i32
            ],
        );
        for (name, found, expected) in [
            ("q", &q, &traces.q),
            ("k", &k, &traces.k),
            ("v", &v, &traces.v),
            ("decay", &decay, &traces.decay),
            ("beta", &beta, &traces.beta),
            ("o", &o, &traces.o),
            ("state", &state, &reference.state),
        ] {
            check(
                &format!("{what}: {name}"),
                &gpu.down::<f32>(found),
                expected,
                TOLERANCE,
            );
        }
        // Of what the kernel before it gave, so that small heads are compared, too.
        let o: Vec<f32> = gpu.down(&o);
        let mut expected = Vec::new();
        for (i, o) in o.chunks_exact(dv).enumerate() {
            let (token, head) = (i / value_heads, i % value_heads);
            let (key_head, within) = (head / net.share(), head % net.share());
            let at = token * rows
                + key_head * net.rows_per_head()
                + 2 * dk
                + (net.share() + within) * dv;
            let normed = rms_norm(o, &net.norm);
            expected.extend(
                normed
                    .iter()
                    .zip(&x[at..])
                    .map(|(o, &z)| o * silu(z.into())),
            );
        }
        check(
            &format!("{what}: gated norm"),
            &gpu.down::<f32>(&out),
            &expected,
            TOLERANCE,
        );
        position += t;
        let ring: Vec<f32> = gpu.down(&ring);
        for p in position.saturating_sub(taps)..position {
            let slot = &ring[p % taps * rows..(p % taps + 1) * rows];
            assert_eq!(slot, reference.past[p], "{what}: ring at {p}");
        }
    }
    for i in 0..steps {
        let what = format!("{s:?}, a step at {position}");
        let scale = if outliers && i % 3 == 1 { 1000.0 } else { 1.0 };
        let (x, ba) = (rng.gausses(rows, scale), rng.gausses(2 * value_heads, 2.0));
        let mut traces = Traces::default();
        reference.step(&x, &ba, &mut traces);
        let bytes: &[u8] = bytemuck::cast_slice(&x);
        ring.write(4 * (position % taps) * rows, bytes, &gpu.stream)
            .unwrap();
        let step = gpu.up(&[Step {
            position: position as i32,
            number: 1,
            state: 0,
        }]);
        let (ba, o) = (gpu.up(&ba), gpu.nans(s.value_dim()));
        gpu.launch(
            "decode_delta_net",
            geometry::delta_net(s),
            args![
                step.address(),
                ring.address(),
                taps as i32,
                rows as i32,
                ba.address(),
                conv.address(),
                negative_a.address(),
                dt_bias.address(),
                state.address(),
                o.address(),
                heads.0,
                heads.1,
                heads.2,
                heads.3
            ],
        );
        check(
            &format!("{what}: o"),
            &gpu.down::<f32>(&o),
            &traces.o,
            TOLERANCE,
        );
        check(
            &format!("{what}: state"),
            &gpu.down::<f32>(&state),
            &reference.state,
            TOLERANCE,
        );
        position += 1;
    }
}

fn shape(key_heads: usize, value_heads: usize, dk: usize, dv: usize, taps: usize) -> DeltaNetShape {
    DeltaNetShape {
        num_key_heads: key_heads,
        num_value_heads: value_heads,
        key_head_dim: dk,
        value_head_dim: dv,
        conv_kernel_dim: taps,
    }
}

#[test]
fn heads_of_every_size() {
    let Some(gpu) = Gpu::open() else { return };
    for (i, dk) in [32, 64, 128].into_iter().enumerate() {
        for (j, dv) in [32, 64, 128].into_iter().enumerate() {
            let seed = (3 * i + j) as u64;
            run(&gpu, shape(1, 2, dk, dv, 4), &[1, 2, 7, 17], 6, false, seed);
        }
    }
}

#[test]
fn chunks_and_steps_of_every_length() {
    let Some(gpu) = Gpu::open() else { return };
    run(&gpu, shape(2, 4, 32, 64, 4), &[], 9, false, 20);
    run(
        &gpu,
        shape(2, 2, 64, 64, 4),
        &[63, 64, 65, 130],
        2,
        false,
        21,
    );
    run(&gpu, shape(2, 8, 32, 32, 4), &[130, 1, 2], 3, true, 22);
}

#[test]
fn convolutions_of_other_lengths_and_outliers() {
    let Some(gpu) = Gpu::open() else { return };
    run(&gpu, shape(1, 1, 32, 32, 2), &[1, 3, 16], 5, true, 30);
    run(&gpu, shape(1, 3, 32, 32, 8), &[1, 2, 3, 33], 10, true, 31);
    run(&gpu, shape(1, 2, 64, 32, 5), &[3], 10, false, 32);
    run(&gpu, shape(4, 8, 128, 128, 4), &[33], 2, true, 33);
    if !gpu.emulated {
        run(&gpu, shape(16, 32, 128, 128, 4), &[130, 1000], 5, true, 34);
    }
}
