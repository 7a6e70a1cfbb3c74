//! linear_prefill.cu and router_prefill.cu: chunks of tokens.

use half::f16;
use moectl::backend::cuda::abi::Format;
use moectl::backend::cuda::device::Buffer;
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants;
use moectl::planning::Precision;

use crate::router::top_k;
use crate::{
    EPS, FORMATS, Gpu, KINDS, Kind, Matrix, Rng, args, check, check_by, fits, rms_norm, sigmoid,
    variants_of, wide,
};

/// Two f16 per value lose 2^-22 of the token's largest; products are summed in f32.
pub const TOLERANCE: f64 = 2e-5;
/// One f16 per value and weight: 2^-11 of each, and terms may cancel.
pub const TOLERANCE_FAST: f64 = 2e-3;
/// The same of the sum of the terms' sizes.
const TOLERANCE_FAST_SUM: f64 = 1e-3;

pub const TOKENS: [usize; 7] = [1, 2, 7, 63, 64, 65, 130];

/// Tokens as two f16 and a scale each.
pub struct Split {
    pub high: Buffer,
    pub low: Buffer,
    pub scale: Buffer,
}

/// Splits `x`, or its norm, `[tokens, cols]`; the norm too, in f32, if `normed` is there.
pub fn split(
    gpu: &Gpu,
    x: &[f32],
    norm: Option<&[f32]>,
    tokens: usize,
    normed: Option<&Buffer>,
) -> Split {
    let cols = x.len() / tokens;
    let padded = tokens * cols.next_multiple_of(64);
    let split = Split {
        high: gpu.up(&vec![f16::NAN; padded]),
        low: gpu.up(&vec![f16::NAN; padded]),
        scale: gpu.nans(tokens),
    };
    let x = gpu.up(x);
    let norm = norm.map(|norm| gpu.up(norm));
    gpu.launch(
        "prefill_split",
        geometry::rows(tokens.div_ceil(8), 256),
        args![
            x.address(),
            norm.as_ref().map_or(0, Buffer::address),
            EPS,
            split.high.address(),
            split.low.address(),
            split.scale.address(),
            normed.map_or(0, Buffer::address),
            tokens as i32,
            cols as i32
        ],
    );
    split
}

/// `[tokens, cols]`, every token of another kind.
pub fn tokens_of_all_kinds(rng: &mut Rng, tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens)
        .flat_map(|t| rng.vector(cols, KINDS[t % KINDS.len()]))
        .collect()
}

#[test]
fn split_keeps_what_f32_has() {
    let Some(gpu) = Gpu::open() else { return };
    for (i, tokens) in TOKENS.into_iter().enumerate() {
        for (j, cols) in [64, 100, 128, 97, 2048].into_iter().enumerate() {
            let mut rng = Rng::new((10 * i + j) as u64);
            let mut x = tokens_of_all_kinds(&mut rng, tokens, cols);
            let broken = (tokens > 2).then_some(2);
            if let Some(t) = broken {
                x[t * cols + 5] = if j % 2 == 0 { f32::NAN } else { f32::INFINITY };
            }
            let scale = rng.factors(cols);
            for with_norm in [false, true] {
                let what = format!("{tokens} tokens of {cols}, norm {with_norm}");
                let normed = gpu.nans(tokens * cols);
                let norm = with_norm.then_some(&scale[..]);
                let s = split(&gpu, &x, norm, tokens, Some(&normed));
                let padded = cols.next_multiple_of(64);
                let (high, low): (Vec<f16>, Vec<f16>) = (gpu.down(&s.high), gpu.down(&s.low));
                let scales: Vec<f32> = gpu.down(&s.scale);
                let normed: Vec<f32> = gpu.down(&normed);
                for t in 0..tokens {
                    let row = &x[t * cols..(t + 1) * cols];
                    let (high, low) = (
                        &high[t * padded..(t + 1) * padded],
                        &low[t * padded..(t + 1) * padded],
                    );
                    if broken == Some(t) {
                        assert!(scales[t].is_nan(), "{what}: scale of a broken token");
                        assert!(high.iter().chain(low).all(|x| x.to_f32() == 0.0), "{what}");
                        continue;
                    }
                    let expected = if with_norm {
                        rms_norm(row, &scale)
                    } else {
                        wide(row)
                    };
                    let found: Vec<f32> = (0..padded)
                        .map(|c| (high[c].to_f32() + low[c].to_f32()) * scales[t])
                        .collect();
                    check(&format!("{what}: {t}"), &found[..cols], &expected, 1e-6);
                    assert!(found[cols..].iter().all(|&x| x == 0.0), "{what}: padding");
                    check(&what, &normed[t * cols..(t + 1) * cols], &expected, 1e-6);
                    let largest = found.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let ratio = largest / scales[t];
                    let in_range = (8191.0..=16384.0).contains(&ratio);
                    assert!(
                        largest == 0.0 || in_range,
                        "{what}: largest is {ratio} in f16"
                    );
                    assert_eq!(scales[t].to_bits() & 0x7f_ffff, 0, "{what}: a power of two");
                }
            }
        }
    }
}

#[test]
fn linear_of_every_format_and_size() {
    let Some(gpu) = Gpu::open() else { return };
    let sizes = [
        (1, 64),
        (4, 128),
        (8, 64),
        (31, 100),
        (32, 64),
        (33, 128),
        (320, 192),
        (40, 2048),
    ];
    for (i, (rows, cols)) in sizes.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            if !fits(format, cols) {
                continue;
            }
            let mut rng = Rng::new((10 * i + f) as u64);
            let matrix = Matrix::random(&mut rng, rows, cols, format, 0.05);
            let w = matrix.upload(&gpu);
            let some = [TOKENS[(i + f) % 7], TOKENS[(i + 2 * f + 3) % 7]];
            let all = if rows == 33 { &TOKENS[..] } else { &some };
            for &tokens in all {
                let what = format!("{rows} x {cols} {format:?}, {tokens} tokens");
                let x = tokens_of_all_kinds(&mut rng, tokens, cols);
                let s = split(&gpu, &x, None, tokens, None);
                let before = rng.gausses(tokens * rows, 1.0);
                for add in [false, true] {
                    let expected: Vec<Vec<f64>> = (0..tokens)
                        .map(|t| {
                            let mut y = matrix.times(&wide(&x[t * cols..(t + 1) * cols]));
                            if add {
                                let before = &before[t * rows..(t + 1) * rows];
                                y.iter_mut()
                                    .zip(before)
                                    .for_each(|(y, &b)| *y += f64::from(b));
                            }
                            y
                        })
                        .collect();
                    for (kernel, precision) in variants_of(&gpu, |precision, facts| {
                        variants::prefill_linear(rows, tokens, precision, facts)
                    }) {
                        let (low, tolerance) = match precision {
                            Precision::Exact => (s.low.address(), TOLERANCE),
                            Precision::F16 => (0, TOLERANCE_FAST_SUM),
                        };
                        let out = if add {
                            gpu.up(&before)
                        } else {
                            gpu.nans(tokens * rows)
                        };
                        gpu.launch(
                            kernel.name,
                            kernel.geometry,
                            args![
                                s.high.address(),
                                low,
                                s.scale.address(),
                                tokens as i32,
                                w.linear,
                                out.address(),
                                add as i32
                            ],
                        );
                        let found: Vec<f32> = gpu.down(&out);
                        for (t, expected) in expected.iter().enumerate() {
                            let found = &found[t * rows..(t + 1) * rows];
                            let what = format!("{} {what}: {t}", kernel.name);
                            // Terms may cancel, which one f16 each does not survive as two do.
                            let x = wide(&x[t * cols..(t + 1) * cols]);
                            let largest = expected.iter().fold(0.0f64, |max, y| max.max(y.abs()));
                            let largest = match low {
                                0 => largest.max(matrix.largest_sum(&x)),
                                _ => largest,
                            };
                            check_by(&what, found, expected, tolerance, largest);
                        }
                    }
                }
            }
        }
    }
}

/// A broken token breaks its own outputs and no others.
#[test]
fn a_nan_stays_with_its_token() {
    let Some(gpu) = Gpu::open() else { return };
    for format in FORMATS {
        let mut rng = Rng::new(3);
        let (rows, cols, tokens) = (33, 64, 20);
        let w = Matrix::random(&mut rng, rows, cols, format, 0.05).upload(&gpu);
        let mut x = rng.gausses(tokens * cols, 1.0);
        x[11 * cols] = f32::NAN;
        let s = split(&gpu, &x, None, tokens, None);
        let out = gpu.zeros(4 * tokens * rows);
        gpu.launch(
            "prefill_linear",
            geometry::matmul(rows, tokens, gpu.multiprocessors(), Precision::Exact),
            args![
                s.high.address(),
                s.low.address(),
                s.scale.address(),
                tokens as i32,
                w.linear,
                out.address(),
                0i32
            ],
        );
        for (i, y) in gpu.down::<f32>(&out).into_iter().enumerate() {
            assert_eq!(y.is_nan(), i / rows == 11, "{format:?}: token {}", i / rows);
        }
    }
}

#[test]
fn router_and_choice() {
    let Some(gpu) = Gpu::open() else { return };
    let sizes = [
        (2, 1),
        (3, 2),
        (4, 4),
        (10, 3),
        (16, 4),
        (16, 10),
        (64, 8),
        (65, 8),
        (129, 10),
        (512, 10),
    ];
    for (i, (experts, k)) in sizes.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            let cols = match (i + f) % 4 {
                0 if experts <= 16 => 2048,
                1 if format != Format::Nf4Tiles => 100,
                _ => 64,
            };
            let gate_format = if cols == 100 {
                Format::F32Rows
            } else {
                FORMATS[(i + f) % 3]
            };
            let tokens = TOKENS[(i + 3 * f) % 7];
            let norm = (i + f) % 2 == 0;
            let what =
                format!("{k} of {experts} {format:?}, {tokens} tokens of {cols}, norm {norm}");
            let mut rng = Rng::new((10 * i + f) as u64);
            let router = Matrix::random(&mut rng, experts, cols, format, 0.05);
            let gate = Matrix::random(&mut rng, 1, cols, gate_format, 0.05);
            let mut x = Vec::new();
            for t in 0..tokens {
                x.extend(rng.vector(cols, [Kind::Normal, Kind::Sparse][t % 2]));
            }
            if tokens > 5 {
                x[5 * cols..6 * cols].fill(0.0); // all experts tie
            }
            let (w, g) = (router.upload(&gpu), gate.upload(&gpu));
            let normed = gpu.up(&x);
            let logits = gpu.nans(tokens * experts);
            gpu.launch(
                "prefill_router",
                geometry::prefill_router(experts, tokens, gpu.multiprocessors()),
                args![normed.address(), w.linear, logits.address(), tokens as i32],
            );
            let ids = gpu.up(&vec![-1i32; tokens * k]);
            let (weights, gates) = (gpu.nans(tokens * k), gpu.nans(tokens));
            gpu.launch(
                "prefill_topk",
                geometry::rows(tokens.div_ceil(8), 256),
                args![
                    logits.address(),
                    normed.address(),
                    g.linear,
                    tokens as i32,
                    experts as i32,
                    k as i32,
                    norm as i32,
                    ids.address(),
                    weights.address(),
                    gates.address()
                ],
            );
            let (logits, ids): (Vec<f32>, Vec<i32>) = (gpu.down(&logits), gpu.down(&ids));
            let (weights, gates): (Vec<f32>, Vec<f32>) = (gpu.down(&weights), gpu.down(&gates));
            for t in 0..tokens {
                let x = wide(&x[t * cols..(t + 1) * cols]);
                let what = format!("{what}: {t}");
                let expected = router.times(&x);
                check(
                    &what,
                    &logits[t * experts..(t + 1) * experts],
                    &expected,
                    TOLERANCE,
                );
                let (expected, probabilities) = top_k(&expected, k, norm);
                let found: Vec<usize> = ids[t * k..(t + 1) * k]
                    .iter()
                    .map(|&id| id as usize)
                    .collect();
                assert_eq!(found, expected, "{what}");
                check(
                    &what,
                    &weights[t * k..(t + 1) * k],
                    &probabilities,
                    TOLERANCE,
                );
                check(
                    &what,
                    &gates[t..=t],
                    &[sigmoid(gate.times(&x)[0])],
                    TOLERANCE,
                );
            }
        }
    }
}
