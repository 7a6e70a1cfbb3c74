//! linear_prefill.cu, router_prefill.cu and moe_prefill.cu: chunks of tokens.

use half::f16;
use moectl::backend::cuda::abi::Format;
use moectl::backend::cuda::device::{Buffer, Geometry};
use moectl::backend::cuda::geometry;

use crate::router::top_k;
use crate::{
    EPS, Experts, FORMATS, Gpu, KINDS, Kind, Matrix, Rng, args, check, check_by, fits, rms_norm,
    sigmoid, wide,
};

/// Two f16 per value lose 2^-22 of the token's largest; products are summed in f32.
const TOLERANCE: f64 = 2e-5;
/// One f16 per value and weight: 2^-11 of each, and terms may cancel.
const TOLERANCE_FAST: f64 = 2e-3;
/// The same of the sum of the terms' sizes.
const TOLERANCE_FAST_SUM: f64 = 1e-3;

const TOKENS: [usize; 7] = [1, 2, 7, 63, 64, 65, 130];

/// Tokens as two f16 and a scale each.
struct Split {
    high: Buffer,
    low: Buffer,
    scale: Buffer,
}

/// Splits `x`, or its norm, `[tokens, cols]`; the norm too, in f32, if `normed` is there.
fn split(
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

fn fast(geometry: Geometry) -> Geometry {
    Geometry {
        shared_bytes: 66_560,
        ..geometry
    }
}

/// `[tokens, cols]`, every token of another kind.
fn tokens_of_all_kinds(rng: &mut Rng, tokens: usize, cols: usize) -> Vec<f32> {
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
                    let exact = geometry::matmul(rows, tokens, gpu.multiprocessors());
                    for (kernel, geometry, low, tolerance) in [
                        ("prefill_linear", exact, s.low.address(), TOLERANCE),
                        ("prefill_linear_fast", fast(exact), 0, TOLERANCE_FAST_SUM),
                    ] {
                        let out = if add {
                            gpu.up(&before)
                        } else {
                            gpu.nans(tokens * rows)
                        };
                        gpu.launch(
                            kernel,
                            geometry,
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
                            let what = format!("{kernel} {what}: {t}");
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
            geometry::matmul(rows, tokens, gpu.multiprocessors()),
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

struct MoeCase {
    tokens: usize,
    experts: usize,
    k: usize,
    dim: usize,
    intermediate: [usize; 2],
    formats: [Format; 2],
    /// Experts that nobody picks, the first ones, and whether all tokens pick the same
    shy: usize,
    crowd: bool,
}

fn run_experts(gpu: &Gpu, case: &MoeCase, seed: u64) {
    let mut rng = Rng::new(seed);
    let MoeCase {
        tokens,
        experts,
        k,
        dim,
        ..
    } = *case;
    let what = format!(
        "{tokens} tokens, {k} of {experts}, dim {dim}, {:?} {:?}",
        case.intermediate, case.formats
    );
    let routed = Experts::random(
        &mut rng,
        experts,
        dim,
        case.intermediate[0],
        case.formats[0],
    );
    let shared = Experts::random(&mut rng, 1, dim, case.intermediate[1], case.formats[1]);
    let mut ids: Vec<i32> = Vec::new();
    for t in 0..tokens {
        let mut some: Vec<i32> = (case.shy as i32..experts as i32).collect();
        if !case.crowd || t % 16 == 15 {
            for i in 0..k {
                let j = i + rng.below(some.len() - i);
                some.swap(i, j);
            }
        }
        ids.extend(&some[..k]);
    }
    let weights: Vec<f32> = (0..tokens * k).map(|_| 0.01 + rng.uniform()).collect();
    let gates: Vec<f32> = (0..tokens).map(|_| rng.uniform()).collect();
    let x = tokens_of_all_kinds(&mut rng, tokens, dim);
    let before = rng.gausses(tokens * dim, 1.0);

    // Sorted by expert, by token within one; then all of them for the shared one.
    let (t, top, e) = (tokens as i32, k as i32, experts as i32);
    let all_rows = tokens * (k + 1);
    let ids_on_device = gpu.up(&ids);
    let counts = gpu.up(&vec![-1i32; tokens.div_ceil(64) * experts]);
    let offsets = gpu.up(&vec![-1i32; experts + 2]);
    let tile_offsets = gpu.up(&vec![-1i32; experts + 2]);
    let max_tiles = (tokens * k).div_ceil(128) + experts + tokens.div_ceil(128);
    let tiles = gpu.up(&vec![-1i32; 4 * max_tiles]);
    let (rows, positions) = (
        gpu.up(&vec![-1i32; all_rows]),
        gpu.up(&vec![-1i32; all_rows]),
    );
    let chunks = geometry::prefill_group(experts, tokens);
    gpu.launch(
        "prefill_group_count",
        chunks,
        args![ids_on_device.address(), t, top, e, counts.address()],
    );
    gpu.launch(
        "prefill_group_scan",
        geometry::rows(1, 1024),
        args![
            counts.address(),
            t,
            top,
            e,
            offsets.address(),
            tiles.address(),
            tile_offsets.address()
        ],
    );
    gpu.launch(
        "prefill_group_scatter",
        chunks,
        args![
            ids_on_device.address(),
            t,
            top,
            e,
            counts.address(),
            rows.address(),
            positions.address()
        ],
    );
    let mut expected_rows = Vec::new();
    let mut expected_offsets = Vec::new();
    let mut expected_positions = vec![0; all_rows];
    for expert in 0..=experts {
        expected_offsets.push(expected_rows.len() as i32);
        for token in 0..tokens {
            let picks = &ids[token * k..(token + 1) * k];
            let rank = match expert {
                _ if expert == experts => Some(k),
                _ => picks.iter().position(|&id| id == expert as i32),
            };
            if let Some(rank) = rank {
                expected_positions[token * (k + 1) + rank] = expected_rows.len() as i32;
                expected_rows.push(token as i32);
            }
        }
    }
    expected_offsets.push(expected_rows.len() as i32);
    assert_eq!(gpu.down::<i32>(&rows), expected_rows, "{what}");
    assert_eq!(gpu.down::<i32>(&positions), expected_positions, "{what}");
    assert_eq!(gpu.down::<i32>(&offsets), expected_offsets, "{what}");
    let (found_tiles, found_offsets): (Vec<i32>, Vec<i32>) =
        (gpu.down(&tiles), gpu.down(&tile_offsets));
    assert!(found_offsets[experts + 1] as usize <= max_tiles, "{what}");
    for expert in 0..=experts {
        let mut next = expected_offsets[expert];
        for tile in found_offsets[expert]..found_offsets[expert + 1] {
            let tile = &found_tiles[4 * tile as usize..][..4];
            assert_eq!(tile[0], expert as i32, "{what}: tile");
            assert!((0..=128).contains(&tile[2]), "{what}: tile of {}", tile[2]);
            assert!(
                tile[2] == 0 || tile[1] == next,
                "{what}: tile at {}",
                tile[1]
            );
            next += tile[2];
        }
        assert_eq!(
            next,
            expected_offsets[expert + 1],
            "{what}: tiles of {expert}"
        );
    }

    let split_x = split(gpu, &x, None, tokens, None);
    let (blobs, shared_blob) = (gpu.up(&routed.blobs()), gpu.up(&shared.blobs()));
    let (units, shared_units) = (gpu.up(&routed.units()), gpu.up(&shared.units()));
    let table = |each: u64, base: u64, last: u64| -> Vec<u64> {
        (0..experts as u64)
            .map(|e| base + e * each)
            .chain([last])
            .collect()
    };
    let blob_table = gpu.up(&table(
        routed.layout.blob_bytes as u64,
        blobs.address(),
        shared_blob.address(),
    ));
    let unit_table = gpu.up(&table(
        4 * routed.layout.num_units as u64,
        units.address(),
        shared_units.address(),
    ));
    let stride = case.intermediate[0]
        .max(case.intermediate[1])
        .next_multiple_of(64);
    // As the engine does: the shared expert, then groups of others.
    let cut = experts / 3;
    let bound = |count: usize| (tokens * k.min(count)).div_ceil(128) + count;
    let groups = [
        (experts, 1, tokens.div_ceil(128)),
        (0, cut, bound(cut)),
        (cut, experts - cut, bound(experts - cut)),
    ];
    let of = |expert: usize| {
        if expert < experts {
            (&routed, expert)
        } else {
            (&shared, 0)
        }
    };
    let mut expected_hidden = Vec::new();
    for expert in 0..=experts {
        let (set, i) = of(expert);
        let range = expected_offsets[expert] as usize..expected_offsets[expert + 1] as usize;
        for &token in &expected_rows[range] {
            let token = token as usize;
            let mut h = set.hidden(i, &wide(&x[token * dim..(token + 1) * dim]));
            h.resize(stride, 0.0);
            expected_hidden.push(h);
        }
    }
    for (suffix, tolerance) in [("", TOLERANCE), ("_fast", TOLERANCE_FAST)] {
        let is_fast = !suffix.is_empty();
        let shrink = |geometry| if is_fast { fast(geometry) } else { geometry };
        let shared_bytes = geometry::MATMUL_SHARED_BYTES;
        let h = gpu.nans(all_rows * stride);
        for (first, count, bound) in groups {
            if count == 0 {
                continue;
            }
            gpu.launch(
                if is_fast {
                    "prefill_experts_up_fast"
                } else {
                    "prefill_experts_up"
                },
                shrink(geometry::tiles(stride.div_ceil(128), bound, shared_bytes)),
                args![
                    split_x.high.address(),
                    split_x.low.address(),
                    split_x.scale.address(),
                    rows.address(),
                    tiles.address(),
                    tile_offsets.address(),
                    blob_table.address(),
                    unit_table.address(),
                    routed.layout,
                    shared.layout,
                    e,
                    dim as i32,
                    first as i32,
                    count as i32,
                    h.address(),
                    stride as i32
                ],
            );
        }
        let h: Vec<f32> = gpu.down(&h);
        for (row, expected) in expected_hidden.iter().enumerate() {
            let found = &h[row * stride..(row + 1) * stride];
            // A product of two: twice as far off.
            check(
                &format!("{what}: up{suffix} {row}"),
                found,
                expected,
                4.0 * tolerance,
            );
        }

        let split_h = split(gpu, &h, None, all_rows, None);
        let mut y = vec![f32::NAN; all_rows * dim];
        // All rows at once, and where there are enough, in two parts.
        let parts = if dim >= 128 {
            vec![(0, 64), (64, dim - 64)]
        } else {
            vec![(0, dim)]
        };
        for &(first_row, row_count) in &parts {
            let part = gpu.nans(all_rows * row_count);
            for (first, count, bound) in groups {
                if count == 0 {
                    continue;
                }
                gpu.launch(
                    if is_fast {
                        "prefill_experts_down_fast"
                    } else {
                        "prefill_experts_down"
                    },
                    shrink(geometry::prefill_experts_down(row_count, tokens, bound)),
                    args![
                        split_h.high.address(),
                        split_h.low.address(),
                        split_h.scale.address(),
                        tiles.address(),
                        tile_offsets.address(),
                        blob_table.address(),
                        unit_table.address(),
                        routed.layout,
                        shared.layout,
                        e,
                        dim as i32,
                        stride as i32,
                        first as i32,
                        count as i32,
                        first_row as i32,
                        row_count as i32,
                        part.address()
                    ],
                );
            }
            for (row, part) in gpu.down::<f32>(&part).chunks_exact(row_count).enumerate() {
                y[row * dim + first_row..][..row_count].copy_from_slice(part);
            }
        }
        for expert in 0..=experts {
            let (set, i) = of(expert);
            let down = &set.each[i][2];
            for row in expected_offsets[expert] as usize..expected_offsets[expert + 1] as usize {
                let h = wide(&h[row * stride..row * stride + down.cols]);
                let what = format!("{what}: down{suffix} {row}");
                check(
                    &what,
                    &y[row * dim..(row + 1) * dim],
                    &down.times(&h),
                    tolerance,
                );
            }
        }
        if is_fast {
            continue;
        }

        let (weights_on_device, gates_on_device) = (gpu.up(&weights), gpu.up(&gates));
        let hidden = gpu.up(&before);
        for &(first_row, row_count) in &parts {
            let part: Vec<f32> = (0..all_rows)
                .flat_map(|row| y[row * dim + first_row..][..row_count].to_vec())
                .collect();
            let part = gpu.up(&part);
            gpu.launch(
                "prefill_combine",
                geometry::prefill_combine(tokens),
                args![
                    part.address(),
                    positions.address(),
                    weights_on_device.address(),
                    gates_on_device.address(),
                    hidden.address(),
                    t,
                    top,
                    first_row as i32,
                    row_count as i32,
                    dim as i32
                ],
            );
        }
        let hidden: Vec<f32> = gpu.down(&hidden);
        for token in 0..tokens {
            let mut expected = wide(&before[token * dim..(token + 1) * dim]);
            for rank in 0..=k {
                let row = expected_positions[token * (k + 1) + rank] as usize;
                let weight = if rank < k {
                    weights[token * k + rank]
                } else {
                    gates[token]
                };
                let y = &y[row * dim..(row + 1) * dim];
                expected
                    .iter_mut()
                    .zip(y)
                    .for_each(|(x, &y)| *x += f64::from(weight) * f64::from(y));
            }
            let found = &hidden[token * dim..(token + 1) * dim];
            check(&format!("{what}: combine {token}"), found, &expected, 1e-6);
        }
    }
}

#[test]
fn experts_of_every_format_and_number_of_tokens() {
    let Some(gpu) = Gpu::open() else { return };
    let mut seed = 0;
    for (i, tokens) in TOKENS.into_iter().enumerate() {
        for (f, format) in FORMATS.into_iter().enumerate() {
            let (experts, k) = [(2, 1), (3, 2), (10, 3), (16, 4), (16, 10)][(i + 2 * f) % 5];
            let (dim, intermediate) = match (i + f) % 4 {
                0 => (64, [64, 64]),
                1 => (128, [64, 128]),
                2 => (192, [192, 64]),
                _ if format == Format::Nf4Tiles => (64, [128, 64]),
                _ => (100, [36, 100]),
            };
            let shared_format = match dim {
                100 => format,
                _ => FORMATS[(f + i % 2) % 3],
            };
            seed += 1;
            let case = MoeCase {
                tokens,
                experts,
                k,
                dim,
                intermediate,
                formats: [format, shared_format],
                shy: if experts - k > 2 { 2 } else { 0 },
                crowd: (i + f) % 3 == 2,
            };
            run_experts(&gpu, &case, seed);
        }
    }
}

#[test]
fn many_tokens_for_few_experts_take_several_tiles() {
    let Some(gpu) = Gpu::open() else { return };
    let tokens = if gpu.emulated { 300 } else { 1000 };
    for format in [Format::Nf4Tiles, Format::Bf16Rows] {
        let case = MoeCase {
            tokens,
            experts: 3,
            k: 2,
            dim: 64,
            intermediate: [64, 64],
            formats: [format, format],
            shy: 0,
            crowd: true,
        };
        run_experts(&gpu, &case, 500);
    }
    if !gpu.emulated {
        let case = MoeCase {
            tokens: 500,
            experts: 64,
            k: 10,
            dim: 2048,
            intermediate: [512, 512],
            formats: [Format::Nf4Tiles, Format::Nf4Tiles],
            shy: 3,
            crowd: false,
        };
        run_experts(&gpu, &case, 501);
    }
}
