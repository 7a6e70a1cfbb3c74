//! linear_batch.cu: every token gets the bits that linear.cu gives it alone.

use moectl::backend::cuda::abi::{Format, Linear, MAX_BATCH, Step};
use moectl::backend::cuda::device::{Buffer, Geometry};
use moectl::backend::cuda::geometry;

use crate::{EPS, FORMATS, Gpu, KINDS, Matrix, Rng, args, fits};

/// Tokens of a launch: within a group, a whole one, two.
const TOKENS: [usize; 6] = [1, 2, 3, 4, 5, 8];

/// Rows of tile rows that are whole and not, and of more than resident blocks take at once; columns of
/// chunks that are whole and not.
const SIZES: [(usize, usize); 8] = [
    (1, 64),
    (8, 100),
    (31, 128),
    (33, 64),
    (33, 320),
    (64, 1024),
    (200, 128),
    (320, 2048),
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Each token's own kind of values, one row after the other.
fn rows_of(rng: &mut Rng, tokens: usize, cols: usize) -> Vec<Vec<f32>> {
    (0..tokens)
        .map(|t| rng.vector(cols, KINDS[t % KINDS.len()]))
        .collect()
}

/// A token at each position, whose sequence's states lie at `states[token]`.
fn steps(gpu: &Gpu, positions: &[usize], states: &[u64]) -> Buffer {
    let step = |(&position, &state): (&usize, &u64)| Step {
        position: position as i32,
        number: 1,
        state,
    };
    let steps: Vec<Step> = positions.iter().zip(states).map(step).collect();
    gpu.up(&steps)
}

/// Projections with three matrices of different rows, the first one into rings if `ring_slots` is not 0.
struct Projection<'a> {
    linears: [&'a Linear; 3],
    norm: u64,
    ring_slots: usize,
}

impl Projection<'_> {
    /// The outputs of each token, with one launch for all or with one for each.
    fn run(&self, gpu: &Gpu, x: &[Vec<f32>], together: bool) -> Vec<Vec<u32>> {
        let tokens = x.len();
        let rows = self.linears.map(|m| m.rows as usize);
        let [a, b, c] = self.linears.map(|m| *m);
        let rings: Vec<Buffer> = (0..tokens)
            .map(|_| gpu.nans(self.ring_slots.max(1) * rows[0]))
            .collect();
        let positions: Vec<usize> = (0..tokens).map(|t| 3 * t + 2).collect();
        let bases: Vec<u64> = rings.iter().map(Buffer::address).collect();
        let step = steps(gpu, &positions, &bases);
        let hidden = gpu.up(&x.concat());
        let outputs = rows.map(|rows| gpu.nans(tokens * rows.max(1)));
        let blocks = gpu.resident_blocks();
        let first = match self.ring_slots {
            0 => outputs[0].address(),
            _ => 0,
        };
        if together {
            let geometry = geometry::norm_linear_batch(self.linears, blocks, tokens);
            let slots = self.ring_slots as i32;
            gpu.launch(
                "decode_norm_linear_batch",
                geometry,
                args![
                    step.address(),
                    tokens as i32,
                    hidden.address(),
                    self.norm,
                    EPS,
                    a,
                    b,
                    c,
                    first,
                    outputs[1].address(),
                    outputs[2].address(),
                    slots
                ],
            );
        } else {
            for t in 0..tokens {
                let row = |i: usize| outputs[i].at(4 * t * rows[i]);
                gpu.launch(
                    "decode_norm_linear",
                    geometry::norm_linear(self.linears, blocks),
                    args![
                        step.at(t * size_of::<Step>()),
                        hidden.at(4 * t * x[0].len()),
                        self.norm,
                        EPS,
                        a,
                        b,
                        c,
                        if self.ring_slots == 0 { row(0) } else { 0 },
                        row(1),
                        row(2),
                        self.ring_slots as i32
                    ],
                );
            }
        }
        let mut found: Vec<Vec<u32>> = Vec::new();
        found.extend(outputs.iter().map(|o| bits(&gpu.down::<f32>(o))));
        found.extend(rings.iter().map(|ring| bits(&gpu.down::<f32>(ring))));
        found
    }
}

#[test]
fn projections_of_several_tokens_have_the_bits_of_each_alone() {
    let Some(gpu) = Gpu::open() else { return };
    for (index, (rows, cols)) in SIZES.into_iter().enumerate() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            if !fits(format, cols) {
                continue;
            }
            let mut rng = Rng::new((100 * index + i) as u64);
            let other = FORMATS[(i + index) % 3];
            let other = if fits(other, cols) { other } else { format };
            let matrices = [(rows, format), (5, other), (40, format)]
                .map(|(rows, format)| Matrix::random(&mut rng, rows, cols, format, 0.05));
            let uploaded = matrices.each_ref().map(|m| m.upload(&gpu));
            let norm = gpu.up(&rng.factors(cols));
            let none = Linear::default();
            let [a, b, c] = uploaded.each_ref().map(|m| &m.linear);
            for (n, tokens) in TOKENS.into_iter().enumerate() {
                let projection = Projection {
                    linears: if n.is_multiple_of(2) {
                        [a, b, c]
                    } else {
                        [a, &none, &none]
                    },
                    norm: if n == 3 { 0 } else { norm.address() },
                    ring_slots: if n % 3 == 1 { 4 } else { 0 },
                };
                let x = rows_of(&mut rng, tokens, cols);
                let found = projection.run(&gpu, &x, true);
                let expected = projection.run(&gpu, &x, false);
                assert!(
                    found == expected,
                    "{rows} x {cols} {format:?} {other:?}, {tokens} tokens"
                );
            }
        }
    }
}

/// Adds a product to rows of `[tokens, rows]`, with one launch for all tokens or with one for each.
fn add(
    gpu: &Gpu,
    before: &[f32],
    tokens: usize,
    together: Option<Geometry>,
    launch: impl Fn(Option<Geometry>, usize, u64),
) -> Vec<u32> {
    let hidden = gpu.up(before);
    match together {
        Some(geometry) => launch(Some(geometry), 0, hidden.address()),
        None => {
            let row = before.len() / tokens;
            (0..tokens).for_each(|t| launch(None, t, hidden.at(4 * t * row)));
        }
    }
    bits(&gpu.down::<f32>(&hidden))
}

#[test]
fn products_added_to_several_tokens_have_the_bits_of_each_alone() {
    let Some(gpu) = Gpu::open() else { return };
    for (index, (rows, cols)) in SIZES.into_iter().enumerate() {
        if !fits(Format::Nf4Tiles, cols) {
            continue;
        }
        let mut rng = Rng::new(index as u64);
        let matrix = Matrix::random(&mut rng, rows, cols, Format::Nf4Tiles, 0.05).upload(&gpu);
        let linear = matrix.linear;
        for tokens in TOKENS {
            let x = gpu.up(&rows_of(&mut rng, tokens, cols).concat());
            let before = rng.gausses(tokens * rows, 1.0);
            let launch = |batch: Option<Geometry>, token: usize, hidden: u64| match batch {
                Some(geometry) => gpu.launch(
                    "decode_linear_add_batch",
                    geometry,
                    args![tokens as i32, x.address(), linear, hidden],
                ),
                None => gpu.launch(
                    "decode_linear_add",
                    geometry::linear_add(&linear),
                    args![x.at(4 * token * cols), linear, hidden],
                ),
            };
            let batch = geometry::linear_add_batch(&linear, tokens);
            let found = add(&gpu, &before, tokens, Some(batch), launch);
            let expected = add(&gpu, &before, tokens, None, launch);
            assert!(found == expected, "{rows} x {cols}, {tokens} tokens");
        }
    }
}

#[test]
fn gated_norms_of_several_tokens_have_the_bits_of_each_alone() {
    let Some(gpu) = Gpu::open() else { return };
    let shapes = [
        (1, 2, 32, 32),
        (1, 3, 64, 64),
        (2, 4, 128, 128),
        (4, 8, 32, 64),
    ];
    for (index, (key_heads, value_heads, dk, dv)) in shapes.into_iter().enumerate() {
        let mut rng = Rng::new(index as u64);
        let (cols, rows, taps) = (value_heads * dv, [33, 8, 320, 31][index], 4);
        let qkvz_rows = key_heads * 2 * dk + 2 * value_heads * dv;
        let matrix = Matrix::random(&mut rng, rows, cols, Format::Nf4Tiles, 0.05).upload(&gpu);
        let linear = matrix.linear;
        let norm = gpu.up(&rng.factors(dv));
        for tokens in TOKENS {
            let o = gpu.up(&rows_of(&mut rng, tokens, cols).concat());
            let rings: Vec<Buffer> = (0..tokens)
                .map(|_| gpu.up(&rng.gausses(taps * qkvz_rows, 2.0)))
                .collect();
            let bases: Vec<u64> = rings.iter().map(Buffer::address).collect();
            let positions: Vec<usize> = (0..tokens).map(|t| 3 * t + 2).collect();
            let step = steps(&gpu, &positions, &bases);
            let before = rng.gausses(tokens * rows, 1.0);
            let launch = |batch: Option<Geometry>, token: usize, hidden: u64| {
                let (name, geometry) = match batch {
                    Some(geometry) => ("decode_delta_out_batch", geometry),
                    None => ("decode_delta_out", geometry::linear_add(&linear)),
                };
                let mut args = args![step.at(token * size_of::<Step>())];
                if batch.is_some() {
                    args.push(tokens as i32);
                }
                args.push(o.at(4 * token * cols));
                args.push(0u64);
                args.push(taps as i32);
                args.push(qkvz_rows as i32);
                args.push(norm.address());
                args.push(EPS);
                for n in [key_heads, value_heads, dk, dv] {
                    args.push(n as i32);
                }
                args.push(linear);
                args.push(hidden);
                gpu.launch(name, geometry, args);
            };
            let batch = geometry::linear_add_batch(&linear, tokens);
            let found = add(&gpu, &before, tokens, Some(batch), launch);
            let expected = add(&gpu, &before, tokens, None, launch);
            assert!(
                found == expected,
                "{value_heads} heads of {dv}, {tokens} tokens"
            );
        }
    }
    assert!(TOKENS.iter().all(|&tokens| tokens <= MAX_BATCH));
}
