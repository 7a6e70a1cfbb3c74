//! Every kernel of `kernels/*.cu` against plain f64 arithmetic, at edge sizes.
//!
//! Kernels run through the crate's own driver, with its launch sizes. On a machine without a GPU the
//! emulator runs them, if it is built in.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod attention;
mod batch;
mod delta_net;
mod experts;
mod linear;
mod prefill;
mod prefill_experts;
mod router;
mod sample;
mod speed;

#[path = "../gpu/mod.rs"]
mod gpu;

use bytemuck::{Pod, Zeroable};
use half::bf16;
use moectl::backend::cpu::layout::{TILE_COLS, TILE_ROWS, Tile, column, pack_tile_row};
use moectl::backend::cuda::abi::{self, ExpertLayout, Format};
use moectl::backend::cuda::device::{Args, Buffer, Device, DeviceFacts, Geometry, Stream};
use moectl::backend::cuda::geometry;
use moectl::backend::cuda::variants::Kernel;
use moectl::formats::Bytes;
use moectl::formats::nf4::{Absmax, CODE_BOOK, Nf4Matrix};
use moectl::planning::Precision;

pub const EPS: f32 = 1e-6;

pub const FORMATS: [Format; 3] = [Format::Nf4Tiles, Format::Bf16Rows, Format::F32Rows];

/// A device, a stream on it, and how to launch and check.
pub struct Gpu {
    pub device: Device,
    pub stream: Stream,
    pub emulated: bool,
}

/// `args![a, b, c]`: plain values as kernel arguments.
macro_rules! args {
    ($($value:expr),* $(,)?) => {{
        let mut args = moectl::backend::cuda::device::Args::default();
        $(args.push($value);)*
        args
    }};
}
pub(crate) use args;

#[cfg(feature = "emulate")]
fn check_parameters(kernel: &str, args: &Args) {
    unsafe extern "C" {
        fn moectl_emulate_params(kernel: *const std::ffi::c_char, sizes: *mut u32, max: i32)
        -> i32;
    }
    let name = std::ffi::CString::new(kernel).unwrap();
    let mut sizes = [0u32; 64];
    // SAFETY: there is room for `max` sizes.
    let count = unsafe { moectl_emulate_params(name.as_ptr(), sizes.as_mut_ptr(), 64) };
    let expected: Vec<usize> = sizes[..count.max(0) as usize]
        .iter()
        .map(|&size| size as usize)
        .collect();
    assert_eq!(args.sizes(), expected, "sizes of the arguments of {kernel}");
}
#[cfg(not(feature = "emulate"))]
fn check_parameters(_: &str, _: &Args) {}

impl Gpu {
    pub fn open() -> Option<Gpu> {
        let device = gpu::open_device()?;
        Some(Gpu {
            stream: device.new_stream().unwrap(),
            emulated: gpu::is_emulated(&device),
            device,
        })
    }

    pub fn multiprocessors(&self) -> usize {
        self.device.facts().multiprocessors as usize
    }

    pub fn resident_blocks(&self) -> usize {
        geometry::resident_blocks(&self.device.facts())
    }

    pub fn up<T: Pod>(&self, data: &[T]) -> Buffer {
        self.device.upload(data, &self.stream).unwrap()
    }

    /// `count` floats that no kernel may leave as they are.
    pub fn nans(&self, count: usize) -> Buffer {
        self.up(&vec![f32::NAN; count])
    }

    pub fn zeros(&self, bytes: usize) -> Buffer {
        self.device.alloc(bytes, &self.stream).unwrap()
    }

    pub fn down<T: Pod + Zeroable>(&self, buffer: &Buffer) -> Vec<T> {
        let mut out = vec![T::zeroed(); buffer.bytes() / size_of::<T>()];
        buffer.read(0, &mut out, &self.stream).unwrap();
        out
    }

    pub fn launch(&self, kernel: &'static str, geometry: Geometry, args: Args) {
        check_parameters(kernel, &args);
        // SAFETY: the emulator knows the sizes of the parameters; buffers outlive the wait.
        unsafe { self.stream.launch(kernel, geometry, args, false).unwrap() };
        self.stream.synchronize().unwrap();
    }
}

/// The kernels that `choose` names: exact, the portable one of one f16 per factor, and the device's own.
pub fn variants_of(
    gpu: &Gpu,
    choose: impl Fn(Precision, &DeviceFacts) -> Kernel,
) -> Vec<(Kernel, Precision)> {
    let own = gpu.device.facts();
    let portable = DeviceFacts {
        compute_capability: (8, 0),
        ..own.clone()
    };
    let mut variants = vec![
        (choose(Precision::Exact, &own), Precision::Exact),
        (choose(Precision::F16, &portable), Precision::F16),
    ];
    let best = choose(Precision::F16, &own);
    if best.name != variants[1].0.name {
        variants.push((best, Precision::F16));
    }
    variants
}

/// Small, fast and the same everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() % (1 << 24)) as f32 / (1 << 24) as f32
    }

    /// About a normal distribution.
    pub fn gauss(&mut self) -> f32 {
        (0..6).map(|_| self.uniform() - 0.5).sum::<f32>() * 1.414
    }

    pub fn gausses(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.gauss() * scale).collect()
    }

    /// Factors of a norm: around 1.
    pub fn factors(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| 1.0 + 0.2 * self.gauss()).collect()
    }

    pub fn vector(&mut self, n: usize, kind: Kind) -> Vec<f32> {
        let mut x = self.gausses(n, 1.0);
        match kind {
            Kind::Normal => {}
            Kind::Zeros => x.fill(0.0),
            Kind::Tiny => x.iter_mut().for_each(|x| *x *= 1e-12),
            Kind::Sparse => (0..n).filter(|i| i % 7 != 3).for_each(|i| x[i] = 0.0),
            Kind::Outliers => {
                for _ in 0..1 + n / 64 {
                    let i = self.below(n);
                    x[i] *= 3000.0;
                }
            }
        }
        x
    }
}

/// What activations are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Normal,
    Outliers,
    Zeros,
    Tiny,
    Sparse,
}

pub const KINDS: [Kind; 5] = [
    Kind::Normal,
    Kind::Outliers,
    Kind::Zeros,
    Kind::Tiny,
    Kind::Sparse,
];

/// A matrix as kernels read it, and its values.
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub format: Format,
    pub bytes: Vec<u8>,
    pub units: Vec<f32>,
    pub values: Vec<f64>,
}

/// A [`Matrix`] on the device.
pub struct Uploaded {
    pub linear: abi::Linear,
    _weights: Buffer,
    _units: Buffer,
}

impl Matrix {
    /// Values of about `scale`, some blocks with much larger or smaller ones, one of zeros.
    pub fn random(rng: &mut Rng, rows: usize, cols: usize, format: Format, scale: f32) -> Matrix {
        let kblocks = cols.div_ceil(TILE_COLS);
        let mut values = vec![0.0; rows * cols];
        let mut units = Vec::new();
        let mut bytes = Vec::new();
        match format {
            Format::Nf4Tiles => {
                assert!(cols.is_multiple_of(TILE_COLS));
                let absmax: Vec<f32> = (0..rows * kblocks)
                    .map(|i| match i % 11 {
                        3 => 0.0,
                        7 => 5.0 * scale,
                        _ => scale * (0.5 + rng.uniform()),
                    })
                    .collect();
                let matrix = Nf4Matrix {
                    packed: Bytes::from(
                        (0..rows * cols / 2)
                            .map(|_| rng.bits() as u8)
                            .collect::<Vec<u8>>(),
                    ),
                    absmax: Absmax::Plain(Bytes::from(
                        bytemuck::cast_slice::<f32, u8>(&absmax).to_vec(),
                    )),
                    blocksize: 64,
                    first: 0,
                    rows,
                    cols,
                };
                for tile_row in 0..rows.div_ceil(TILE_ROWS) {
                    let mut tiles: Vec<Tile<u16>> = vec![Tile::zeroed(); kblocks];
                    let unit = pack_tile_row(&matrix, tile_row, &mut tiles);
                    for r in 0..TILE_ROWS.min(rows - tile_row * TILE_ROWS) {
                        let row = tile_row * TILE_ROWS + r;
                        for (kb, tile) in tiles.iter().enumerate() {
                            let scale = f64::from(tile.absmax[r]) * f64::from(unit);
                            for (group, words) in tile.codes.iter().enumerate() {
                                for n in 0..8 {
                                    let code = words[r] >> (4 * n) & 15;
                                    let c = kb * TILE_COLS + column(group / 4, group % 4, n);
                                    values[row * cols + c] =
                                        f64::from(CODE_BOOK[code as usize]) * scale;
                                }
                            }
                        }
                    }
                    bytes.extend_from_slice(bytemuck::cast_slice(&tiles));
                    units.push(unit);
                }
                // What was stored, read plainly: the layout is as its head says.
                let row = rows / 2;
                for c in 0..cols {
                    let byte = matrix.packed[(row * cols + c) / 2];
                    let code = if c % 2 == 0 { byte >> 4 } else { byte & 15 };
                    let plain = f64::from(CODE_BOOK[usize::from(code)])
                        * f64::from(absmax[row * kblocks + c / TILE_COLS]);
                    let diff = (plain - values[row * cols + c]).abs();
                    assert!(diff <= 1e-4 * f64::from(5.0 * scale), "tile layout");
                }
            }
            Format::Bf16Rows | Format::F32Rows => {
                for row in 0..rows {
                    for c in 0..kblocks * TILE_COLS {
                        let outlier = if rng.below(97) == 0 { 8.0 } else { 1.0 };
                        let value = if c < cols {
                            rng.gauss() * scale * outlier
                        } else {
                            0.0
                        };
                        let value = match format {
                            Format::Bf16Rows => {
                                let value = bf16::from_f32(value);
                                bytes.extend_from_slice(&value.to_le_bytes());
                                value.to_f32()
                            }
                            _ => {
                                bytes.extend_from_slice(&value.to_le_bytes());
                                value
                            }
                        };
                        if c < cols {
                            values[row * cols + c] = f64::from(value);
                        }
                    }
                }
            }
        }
        Matrix {
            rows,
            cols,
            format,
            bytes,
            units,
            values,
        }
    }

    pub fn upload(&self, gpu: &Gpu) -> Uploaded {
        let weights = gpu.up(&self.bytes);
        let units = gpu.up(&self.units);
        Uploaded {
            linear: abi::Linear {
                weights: weights.address(),
                units: if self.units.is_empty() {
                    0
                } else {
                    units.address()
                },
                rows: self.rows as i32,
                cols: self.cols as i32,
                kblocks: self.cols.div_ceil(TILE_COLS) as i32,
                format: self.format as i32,
            },
            _weights: weights,
            _units: units,
        }
    }

    /// `W x`, `[rows]`.
    pub fn times(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.cols);
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
        self.values.chunks_exact(self.cols).map(dot).collect()
    }

    /// `|W| |x|`, the largest of its rows: what rounded factors are measured by.
    pub fn largest_sum(&self, x: &[f64]) -> f64 {
        let sum = |row: &[f64]| row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum();
        self.values
            .chunks_exact(self.cols)
            .map(sum)
            .fold(0.0, f64::max)
    }
}

/// Whether tiles can hold rows of `cols`.
pub fn fits(format: Format, cols: usize) -> bool {
    format != Format::Nf4Tiles || cols.is_multiple_of(TILE_COLS)
}

/// Gate, up and down of some experts, as one blob each.
pub struct Experts {
    pub layout: ExpertLayout,
    pub each: Vec<[Matrix; 3]>,
}

impl Experts {
    pub fn random(
        rng: &mut Rng,
        count: usize,
        dim: usize,
        intermediate: usize,
        format: Format,
    ) -> Experts {
        let each: Vec<[Matrix; 3]> = (0..count)
            .map(|_| {
                [
                    Matrix::random(rng, intermediate, dim, format, 0.1),
                    Matrix::random(rng, intermediate, dim, format, 0.1),
                    Matrix::random(rng, dim, intermediate, format, 0.1),
                ]
            })
            .collect();
        let bytes = each[0].each_ref().map(|m| m.bytes.len() as i64);
        let units = each[0].each_ref().map(|m| m.units.len() as i32);
        Experts {
            layout: ExpertLayout {
                up_offset: bytes[0],
                down_offset: bytes[0] + bytes[1],
                blob_bytes: bytes.iter().sum(),
                intermediate: intermediate as i32,
                format: format as i32,
                up_unit: units[0],
                down_unit: units[0] + units[1],
                num_units: units.iter().sum(),
                padding: 0,
            },
            each,
        }
    }

    pub fn blob(&self, expert: usize) -> Vec<u8> {
        self.each[expert]
            .iter()
            .flat_map(|m| m.bytes.iter().copied())
            .collect()
    }

    /// Of all experts, side by side.
    pub fn blobs(&self) -> Vec<u8> {
        (0..self.each.len()).flat_map(|e| self.blob(e)).collect()
    }

    pub fn units(&self) -> Vec<f32> {
        let mut units: Vec<f32> = self
            .each
            .iter()
            .flatten()
            .flat_map(|m| m.units.iter().copied())
            .collect();
        units.push(0.0);
        units
    }

    /// `silu(gate x) * (up x)`
    pub fn hidden(&self, expert: usize, x: &[f64]) -> Vec<f64> {
        let [gate, up, _] = &self.each[expert];
        gate.times(x)
            .iter()
            .zip(up.times(x))
            .map(|(&g, u)| silu(g) * u)
            .collect()
    }
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `x / rms(x) * scale`
pub fn rms_norm(x: &[f32], scale: &[f32]) -> Vec<f64> {
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let factor = 1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter()
        .zip(scale)
        .map(|(&x, &s)| f64::from(x) * factor * f64::from(s))
        .collect()
}

/// Values differ by at most `tolerance` times the largest expected one.
#[track_caller]
pub fn check(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    check_by(what, found, expected, tolerance, largest);
}

/// As [`check`], of `largest` instead.
#[track_caller]
pub fn check_by(what: &str, found: &[f32], expected: &[f64], tolerance: f64, largest: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        let diff = (f64::from(a) - b).abs();
        assert!(
            diff <= tolerance * largest + 1e-30,
            "{what}: [{i}] is {a}, not {b}; off by {:.1e} of the largest, {largest}",
            diff / largest
        );
    }
}
