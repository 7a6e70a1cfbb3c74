//! linear.cu: dense matrices times one token, or a few.

use moectl::backend::cuda::abi::{Format, Linear, Step};
use moectl::backend::cuda::geometry;

use crate::{EPS, FORMATS, Gpu, KINDS, Kind, Matrix, Rng, args, check, fits, rms_norm, silu, wide};

/// Sums of f32 in another order, and norms: 2^-22 or so of the largest term.
const TOLERANCE: f64 = 2e-5;

const ROWS: [usize; 7] = [1, 4, 8, 31, 32, 33, 320];
const COLS: [usize; 4] = [64, 100, 128, 2048];

fn step(gpu: &Gpu, position: i32) -> moectl::backend::cuda::device::Buffer {
    gpu.up(&[Step {
        position,
        number: 1,
        state: 0,
    }])
}

/// Sizes, with the long columns only for some rows: the emulator takes its time.
fn sizes() -> impl Iterator<Item = (usize, usize)> {
    ROWS.into_iter()
        .flat_map(|rows| COLS.map(|cols| (rows, cols)))
        .filter(|&(rows, cols)| cols < 2048 || rows == 1 || rows == 33 || rows == 320)
}

#[test]
fn begin_copies_embedding_and_step() {
    let Some(gpu) = Gpu::open() else { return };
    for dim in [4, 64, 1020, 1024, 1028, 2048, 8192] {
        let mut rng = Rng::new(dim as u64);
        let values = rng.gausses(dim, 1.0);
        let mut embedding = gpu.device.alloc_host::<f32>(dim).unwrap();
        embedding.as_mut_slice().copy_from_slice(&values);
        let mut host_step = gpu.device.alloc_host::<Step>(1).unwrap();
        host_step.as_mut_slice()[0] = Step {
            position: 41,
            number: 0x8000_0002,
            state: 0,
        };
        let (hidden, step) = (gpu.nans(dim), gpu.zeros(size_of::<Step>()));
        gpu.launch(
            "decode_begin",
            geometry::begin(dim),
            args![
                embedding.at(0),
                host_step.at(0),
                hidden.address(),
                step.address(),
                dim as i32
            ],
        );
        assert_eq!(gpu.down::<f32>(&hidden), values);
        let step = gpu.down::<Step>(&step)[0];
        assert_eq!((step.position, step.number), (41, 0x8000_0002));
    }
}

#[test]
fn norm_linear_of_every_format_and_size() {
    let Some(gpu) = Gpu::open() else { return };
    for (index, (rows, cols)) in sizes().enumerate() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            // Beside it other ones, of other sizes and forms, or none.
            let others = [(5, FORMATS[(i + 1) % 3]), (40, FORMATS[(i + 2) % 3])];
            if !fits(format, cols) || (!fits(Format::Nf4Tiles, cols) && i == 0) {
                continue;
            }
            let mut rng = Rng::new((100 * index + i) as u64);
            let count = index % 3;
            let mut matrices = vec![Matrix::random(&mut rng, rows, cols, format, 0.05)];
            for &(rows, format) in others.iter().take(count) {
                let format = if fits(format, cols) {
                    format
                } else {
                    Format::F32Rows
                };
                matrices.push(Matrix::random(&mut rng, rows, cols, format, 0.05));
            }
            let kind = KINDS[(index + i) % KINDS.len()];
            let x = rng.vector(cols, kind);
            let scale = rng.factors(cols);
            let with_norm = (index + i) % 4 != 3;
            let slots = if index % 2 == 0 { 4 } else { 0 };
            let position = 7 + index as i32;

            let uploaded: Vec<_> = matrices.iter().map(|m| m.upload(&gpu)).collect();
            let linears: Vec<Linear> = (0..3)
                .map(|i| uploaded.get(i).map_or(Linear::default(), |u| u.linear))
                .collect();
            let out: Vec<_> = matrices
                .iter()
                .enumerate()
                .map(|(i, m)| gpu.nans(m.rows * if i == 0 { slots.max(1) } else { 1 }))
                .collect();
            let to = |i: usize| out.get(i).map_or(0, |b| b.address());
            let (hidden, norm) = (gpu.up(&x), gpu.up(&scale));
            let step = step(&gpu, position);
            gpu.launch(
                "decode_norm_linear",
                geometry::norm_linear(
                    [&linears[0], &linears[1], &linears[2]],
                    gpu.resident_blocks(),
                ),
                args![
                    step.address(),
                    hidden.address(),
                    if with_norm { norm.address() } else { 0 },
                    EPS,
                    linears[0],
                    linears[1],
                    linears[2],
                    to(0),
                    to(1),
                    to(2),
                    slots as i32
                ],
            );
            let x = if with_norm {
                rms_norm(&x, &scale)
            } else {
                wide(&x)
            };
            for (m, (matrix, out)) in matrices.iter().zip(&out).enumerate() {
                let what = format!("{rows} x {cols} {format:?} {kind:?} norm {with_norm}: {m}");
                let mut found: Vec<f32> = gpu.down(out);
                if m == 0 && slots > 0 {
                    let slot = position as usize % slots;
                    let used = slot * rows..(slot + 1) * rows;
                    let untouched = (0..found.len())
                        .filter(|i| !used.contains(i))
                        .all(|i| found[i].is_nan());
                    assert!(untouched, "{what}: other slots of the ring");
                    found = found[used].to_vec();
                }
                check(&what, &found, &matrix.times(&x), TOLERANCE);
            }
        }
    }
}

/// Rows so many that blocks go through several of them.
#[test]
fn a_long_head_is_gone_through_by_few_blocks() {
    let Some(gpu) = Gpu::open() else { return };
    for (format, rows, cols) in [
        (Format::Bf16Rows, 1003, 64),
        (Format::F32Rows, 700, 256),
        (Format::Bf16Rows, 257, 8192),
    ] {
        let mut rng = Rng::new(rows as u64);
        let matrix = Matrix::random(&mut rng, rows, cols, format, 0.05);
        let x = rng.vector(cols, Kind::Outliers);
        let scale = rng.factors(cols);
        let uploaded = matrix.upload(&gpu);
        let (hidden, norm, out) = (gpu.up(&x), gpu.up(&scale), gpu.nans(rows));
        let step = step(&gpu, 0);
        let none = Linear::default();
        for blocks in [1, 3, gpu.resident_blocks()] {
            gpu.launch(
                "decode_norm_linear",
                geometry::norm_linear([&uploaded.linear, &none, &none], blocks),
                args![
                    step.address(),
                    hidden.address(),
                    norm.address(),
                    EPS,
                    uploaded.linear,
                    none,
                    none,
                    out.address(),
                    0u64,
                    0u64,
                    0i32
                ],
            );
            let expected = matrix.times(&rms_norm(&x, &scale));
            check(
                &format!("{rows} x {cols}"),
                &gpu.down::<f32>(&out),
                &expected,
                TOLERANCE,
            );
        }
    }
}

#[test]
fn linear_add_adds() {
    let Some(gpu) = Gpu::open() else { return };
    for (index, (rows, cols)) in sizes().enumerate() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            if !fits(format, cols) {
                continue;
            }
            let mut rng = Rng::new((1000 + 100 * index + i) as u64);
            let matrix = Matrix::random(&mut rng, rows, cols, format, 0.05);
            let kind = KINDS[(index + i) % KINDS.len()];
            let x = rng.vector(cols, kind);
            let before = rng.gausses(rows, 1.0);
            let uploaded = matrix.upload(&gpu);
            let (on_device, hidden) = (gpu.up(&x), gpu.up(&before));
            gpu.launch(
                "decode_linear_add",
                geometry::linear_add(&uploaded.linear),
                args![on_device.address(), uploaded.linear, hidden.address()],
            );
            let mut expected = matrix.times(&wide(&x));
            expected
                .iter_mut()
                .zip(&before)
                .for_each(|(y, &x)| *y += f64::from(x));
            let what = format!("{rows} x {cols} {format:?} {kind:?}");
            check(&what, &gpu.down::<f32>(&hidden), &expected, TOLERANCE);
        }
    }
}

#[test]
fn delta_out_norms_gates_and_adds() {
    let Some(gpu) = Gpu::open() else { return };
    let shapes = [
        (1, 1, 32, 32),
        (2, 4, 32, 32),
        (1, 3, 64, 64),
        (2, 4, 128, 128),
        (4, 8, 32, 64),
    ];
    for (index, (key_heads, value_heads, dk, dv)) in shapes.into_iter().enumerate() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            let cols = value_heads * dv;
            if !fits(format, cols) {
                continue;
            }
            let mut rng = Rng::new((10 * index + i) as u64);
            let rows = [1, 8, 31, 33, 320][(index + i) % 5];
            let share = value_heads / key_heads;
            let qkvz_rows = key_heads * (2 * dk + 2 * share * dv);
            let taps = 4;
            let position = 5 + i;
            let matrix = Matrix::random(&mut rng, rows, cols, format, 0.05);
            let mut o = rng.vector(cols, if i == 1 { Kind::Outliers } else { Kind::Normal });
            if i == 2 {
                o[..dv].fill(0.0);
            }
            let mut ring = vec![f32::NAN; taps * qkvz_rows];
            let projection = rng.gausses(qkvz_rows, 2.0);
            let slot = position % taps;
            ring[slot * qkvz_rows..(slot + 1) * qkvz_rows].copy_from_slice(&projection);
            let norm = rng.factors(dv);
            let before = rng.gausses(rows, 1.0);

            let mut x = Vec::new();
            for head in 0..value_heads {
                let normed = rms_norm(&o[head * dv..(head + 1) * dv], &norm);
                let at =
                    head / share * (2 * dk + 2 * share * dv) + 2 * dk + (share + head % share) * dv;
                let z = &projection[at..at + dv];
                x.extend(normed.iter().zip(z).map(|(x, &z)| x * silu(f64::from(z))));
            }
            let mut expected = matrix.times(&x);
            expected
                .iter_mut()
                .zip(&before)
                .for_each(|(y, &x)| *y += f64::from(x));

            let uploaded = matrix.upload(&gpu);
            let (o, ring, norm) = (gpu.up(&o), gpu.up(&ring), gpu.up(&norm));
            let (hidden, step) = (gpu.up(&before), step(&gpu, position as i32));
            gpu.launch(
                "decode_delta_out",
                geometry::linear_add(&uploaded.linear),
                args![
                    step.address(),
                    o.address(),
                    ring.address(),
                    taps as i32,
                    qkvz_rows as i32,
                    norm.address(),
                    EPS,
                    key_heads as i32,
                    value_heads as i32,
                    dk as i32,
                    dv as i32,
                    uploaded.linear,
                    hidden.address()
                ],
            );
            let what = format!("{value_heads} heads of {dv}, {rows} rows {format:?}");
            check(&what, &gpu.down::<f32>(&hidden), &expected, TOLERANCE);
        }
    }
}

#[test]
fn linear_small_of_up_to_eight_tokens() {
    let Some(gpu) = Gpu::open() else { return };
    let many_rows = [(4100, 64)];
    for (index, (rows, cols)) in sizes().chain(many_rows).enumerate() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            if !fits(format, cols) {
                continue;
            }
            let tokens = 1 + (3 * index + i) % 8;
            let mut rng = Rng::new((2000 + 100 * index + i) as u64);
            let matrix = Matrix::random(&mut rng, rows, cols, format, 0.05);
            // Token by token another kind: each is scaled by itself.
            let x: Vec<Vec<f32>> = (0..tokens)
                .map(|t| rng.vector(cols, KINDS[(index + t) % KINDS.len()]))
                .collect();
            let uploaded = matrix.upload(&gpu);
            let (on_device, out) = (gpu.up(&x.concat()), gpu.nans(tokens * rows));
            gpu.launch(
                "linear_small",
                geometry::linear_small(&uploaded.linear),
                args![
                    on_device.address(),
                    tokens as i32,
                    uploaded.linear,
                    out.address()
                ],
            );
            let found: Vec<f32> = gpu.down(&out);
            for (t, x) in x.iter().enumerate() {
                let what = format!("{rows} x {cols} {format:?}, token {t} of {tokens}");
                let found = &found[t * rows..(t + 1) * rows];
                check(&what, found, &matrix.times(&wide(x)), TOLERANCE);
            }
        }
    }
}
