//! What this GPU, the bus and the RAM before it deliver: the figures that plans are made from.
//!
//! Bandwidths of copies are the device's alone; everything else is taken from the kernels, graphs
//! and hand-offs of decode steps of the model that is loaded, so that what is measured is what runs.

use std::time::{Duration, Instant};

use super::abi::{Format, Linear};
use super::device::{Buffer, Event, Pinned, Stream};
use super::state::kv_token_bytes;
use super::weights::{Head, Mixer};
use super::{Cuda, Residency};
use crate::backend::cpu::layout::{TILE_COLS, TILE_ROWS, Tile};
use crate::backend::cpu::offload::Asked;
use crate::backend::{BackendError, Diagnostics, MixerKind, Result};
use crate::hardware::gpu_probe::{CopyRate, ExpertWait, GpuProbe, Micros};
use crate::hardware::probe::{Rate, median};

/// Sizes of copies: part of an expert of the 80B model, about one, ten, and a stretch of prefill.
const COPY_BYTES: [usize; 4] = [256 << 10, 1_671_168, 16 << 20, 64 << 20];
/// Copied within the device, half to half: several times what its caches hold.
const VRAM_BYTES: usize = 512 << 20;
/// Repetitions: as many as fit the time, within these bounds.
const TIME_PER_FIGURE: Duration = Duration::from_millis(700);
const REPETITIONS: std::ops::RangeInclusive<usize> = 3..=15;
/// Steps are timed together for about this long.
const SAMPLE_SECONDS: f64 = 0.04;
/// How often each of what is compared has its turn.
const TURNS: usize = 3;
/// Shares of the experts that are not in VRAM.
const MISSING: [f64; 4] = [0.25, 0.5, 0.75, 1.0];
/// Kernels of a layer and step: norm and projections, mixer, output projection, router; gate and up, down.
/// Where the CPU takes part, one more adds up.
const DENSE_KERNELS_PER_LAYER: usize = 4;
const EXPERT_KERNELS_PER_LAYER: usize = 2;
/// The experts' two, and the router, without which they would not know which experts.
const EXPERT_KERNELS: [&str; 3] = ["decode_router", "decode_experts_up", "decode_experts_down"];

/// Samples of one figure.
fn repeat(mut sample: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    // The first one warms up.
    sample()?;
    let since = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < *REPETITIONS.start()
        || (samples.len() < *REPETITIONS.end() && since.elapsed() < TIME_PER_FIGURE)
    {
        samples.push(sample()?);
    }
    Ok(samples)
}

/// GB/s; an emulated clock may stand still.
fn gb_s(bytes: usize, seconds: f64) -> f64 {
    bytes as f64 / seconds.max(1e-9) / 1e9
}

/// What is left of a time without a part of it; both were measured, and noise must not make it nothing.
fn rest(all: f64, part: f64) -> f64 {
    (all - part).max(0.02 * all)
}

/// Steps with a share of each layer's experts in RAM.
#[derive(Default)]
struct Waits {
    missing: f64,
    pcie_percent: usize,
    /// What the experts of a layer took, samples in microseconds
    us: Vec<f64>,
    steps: u64,
    /// Experts that the CPU computed, those of them that it had predicted, and that the GPU read
    cpu: u64,
    predicted: u64,
    pcie: u64,
}

/// Pinned memory, a device buffer beside it, and two streams with events.
struct Bench<'a> {
    host: Pinned<u8>,
    device: Buffer,
    streams: [&'a Stream; 2],
    events: [Event; 2],
}

impl Bench<'_> {
    /// Seconds of `work` on the first stream, by its events.
    fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let stream = self.streams[0];
        stream.record(&self.events[0])?;
        work()?;
        stream.record(&self.events[1])?;
        stream.synchronize()?;
        Ok(f64::from(self.events[1].ms_since(&self.events[0])?) / 1e3)
    }

    /// `count` copies of `bytes` each, to the device or back, side by side in the buffers.
    fn copy(&self, stream: &Stream, bytes: usize, count: usize, to_device: bool) -> Result<()> {
        let room = self.device.bytes() / bytes;
        for i in 0..count {
            let at = i % room * bytes;
            // SAFETY: both ranges are inside buffers that outlive every wait here.
            unsafe {
                match to_device {
                    true => {
                        stream.copy_to_device(self.device.at(at), self.host.pointer(at), bytes)?
                    }
                    false => {
                        stream.copy_to_host(self.host.pointer(at), self.device.at(at), bytes)?
                    }
                }
            }
        }
        Ok(())
    }

    fn rates(&self, to_device: bool) -> Result<Vec<CopyRate>> {
        let largest = COPY_BYTES[COPY_BYTES.len() - 1];
        let of_size = |bytes: usize| {
            let count = (largest / bytes).min(16);
            let samples = repeat(|| {
                let s = self.timed(|| self.copy(self.streams[0], bytes, count, to_device))?;
                Ok(gb_s(count * bytes, s))
            })?;
            Ok(CopyRate {
                bytes: bytes as u64,
                rate: Rate::of(samples),
            })
        };
        COPY_BYTES.into_iter().map(of_size).collect()
    }

    /// Both directions together, the sum.
    fn both_ways(&self) -> Result<Rate> {
        let bytes = self.device.bytes() / 2;
        Ok(Rate::of(repeat(|| {
            let start = Instant::now();
            let [a, b] = self.streams;
            // SAFETY: each direction has its half of buffers that outlive the waits below.
            unsafe {
                a.copy_to_device(self.device.at(0), self.host.pointer(0), bytes)?;
                b.copy_to_host(self.host.pointer(bytes), self.device.at(bytes), bytes)?;
            }
            a.synchronize()?;
            b.synchronize()?;
            Ok(gb_s(2 * bytes, start.elapsed().as_secs_f64()))
        })?))
    }

    /// Copies from one half of `buffer` to the other, bytes read and bytes written.
    fn within_device(&self, buffer: &Buffer) -> Result<Rate> {
        let bytes = buffer.bytes() / 2;
        Ok(Rate::of(repeat(|| {
            let s = self.timed(|| {
                // SAFETY: two halves of a buffer that outlives the wait.
                unsafe { self.streams[0].copy_on_device(buffer.at(bytes), buffer.at(0), bytes) }
            })?;
            Ok(gb_s(2 * bytes, s))
        })?))
    }
}

impl Cuda {
    /// Measures the device with the model that is loaded, whose experts must all fit. The sequence
    /// starts over, and experts are where the options ask afterwards.
    ///
    /// # Errors
    /// If memory is short, or the driver reports an error.
    pub(super) fn measure_device(&mut self, model: &str) -> Result<GpuProbe> {
        let started = Instant::now();
        let asked = self.options.residency.clone();
        let mut probe = GpuProbe {
            name: self.device.facts().name,
            vram_bytes: self.device.facts().total_bytes,
            model: model.into(),
            ..GpuProbe::default()
        };
        self.measure_copies(&mut probe)?;
        let measured = self.measure_steps(&mut probe);
        self.decode.hand_over_always = false;
        self.decode.look_ahead(false, &self.device)?;
        self.set_pcie_share(0)?;
        self.options.residency = asked;
        self.fill_slots()?;
        self.forget_sequences()?;
        measured?;
        probe.seconds = started.elapsed().as_secs_f64();
        Ok(probe)
    }

    fn measure_copies(&mut self, probe: &mut GpuProbe) -> Result<()> {
        let bytes = 2 * COPY_BYTES[COPY_BYTES.len() - 1];
        let bench = Bench {
            host: self.device.alloc_host(bytes)?,
            device: self.device.alloc(bytes, &self.model.stream)?,
            streams: [&self.model.stream, &self.copies],
            events: [self.device.new_event()?, self.device.new_event()?],
        };
        self.model.stream.synchronize()?;
        probe.h2d = bench.rates(true)?;
        probe.d2h = bench.rates(false)?;
        probe.both_ways = bench.both_ways()?;
        let large = self.device.alloc(VRAM_BYTES, &self.model.stream)?;
        probe.vram = bench.within_device(&large)?;
        drop(large);

        // The CPU's experts, alone and while copies run that are never waited for.
        let experts = self.model.shape.moe.num_experts;
        let k = self.model.shape.moe.num_experts_per_tok;
        let x = vec![0.1; self.model.shape.hidden_size];
        let mut out = x.clone();
        let (mut round, layers) = (0, &self.model.store.layers);
        let step_bytes = layers.len() * k * self.model.store.layout.blob_bytes as usize;
        let offload = &mut self.offload;
        let mut compute = || -> Result<f64> {
            let start = Instant::now();
            round += k;
            for layer in layers {
                let ids: Vec<i32> = (0..k).map(|i| ((round + i) % experts) as i32).collect();
                let asked = Asked {
                    ids: &ids,
                    weights: &vec![0.1; k],
                    x: &x,
                };
                offload.compute(&layer.experts, &[asked], &mut out)?;
            }
            Ok(start.elapsed().as_secs_f64())
        };
        let alone = repeat(&mut compute)?;
        probe.cpu_experts = Rate::of(alone.iter().map(|&s| gb_s(step_bytes, s)).collect());
        let (mut cpu, mut bus) = (Vec::new(), Vec::new());
        let copy_bytes = COPY_BYTES[COPY_BYTES.len() - 1];
        // So many that they run longer than the experts.
        let seconds = middle(&alone);
        let rate = probe.h2d.last().map_or(1.0, |c| c.rate.median_gb_s);
        let count = (2.0 * seconds * rate * 1e9 / copy_bytes as f64)
            .ceil()
            .max(1.0) as usize;
        repeat(|| {
            bench.copy(bench.streams[0], copy_bytes, count, true)?;
            let start = Instant::now();
            let s = compute()?;
            bench.streams[0].synchronize()?;
            bus.push(gb_s(count * copy_bytes, start.elapsed().as_secs_f64()));
            cpu.push(gb_s(step_bytes, s));
            Ok(s)
        })?;
        probe.cpu_experts_beside_h2d = Rate::of(cpu);
        probe.h2d_beside_cpu_experts = Rate::of(bus);
        Ok(())
    }

    fn measure_steps(&mut self, probe: &mut GpuProbe) -> Result<()> {
        let moe = &self.model.shape.moe;
        let (layers, k) = (self.model.shape.num_layers(), moe.num_experts_per_tok);
        let blob_bytes = self.model.store.layout.blob_bytes as usize;
        let routed_bytes = layers * k * blob_bytes;

        self.give_slots(Residency::Fill)?;
        if !self.model.store.all_resident() {
            return Err(BackendError::Other(
                "the model to measure with does not fit the GPU with all its experts".into(),
            ));
        }
        // Kernels are timed with what a step leaves: of a hidden state of zeros all experts tie, and the
        // router has to rank them all.
        self.timed_step(0)?;
        probe.kernel_node = Micros::of(repeat(|| self.decode.kernel_node_us(&self.model, false))?);
        probe.step_kernel = Micros::of(repeat(|| self.decode.kernel_node_us(&self.model, true))?);
        probe.flag_round_trip = Micros::of(repeat(|| self.decode.flag_round_trip_us(&self.model))?);
        // What a kernel takes in any case.
        let least_s = probe.step_kernel.median_us / 1e6;
        let experts_least_s = (layers * EXPERT_KERNELS_PER_LAYER) as f64 * least_s;
        let dense_least_s = (layers * DENSE_KERNELS_PER_LAYER) as f64 * least_s;
        let in_vram = self.expert_kernel_seconds()?;
        let shared_bytes = layers * self.model.shared_layout.blob_bytes as usize;
        let of_vram = |&s: &f64| gb_s(routed_bytes + shared_bytes, rest(s, experts_least_s));
        probe.expert_kernel = Rate::of(in_vram.iter().map(of_vram).collect());
        let in_vram = middle(&in_vram);
        let dense_bytes = self.dense_bytes();
        probe.dense_kernel = Rate::of(repeat(|| {
            let all = (self.decode).time_kernels(&self.model, &self.states.layout, &[])? / 1e6;
            Ok(gb_s(dense_bytes, rest(rest(all, in_vram), dense_least_s)))
        })?);
        self.measure_head_and_context(probe, least_s)?;

        // Steps with and without a hand-off that hands over nothing, by turns: a neighbour may be busy for
        // a second.
        let (mut alone, mut handed) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            self.decode.hand_over_always = false;
            alone.extend(self.step_seconds()?);
            self.decode.hand_over_always = true;
            handed.extend(self.step_seconds()?);
        }
        self.decode.hand_over_always = false;
        // The kernel that adds up is one of a step's own.
        let per_layer = |&s: &f64| 1e6 * ((s - middle(&alone)) / layers as f64 - least_s).max(0.0);
        probe.handoff = Micros::of(handed.iter().map(per_layer).collect());

        // Nothing resident: the same kernels read over PCIe, then CPU and GPU share the misses, and the
        // CPU fetches its own ahead.
        self.give_slots(Residency::Nothing)?;
        self.set_pcie_share(100)?;
        self.step_all(&[0], 0..1, &mut |_, _, _| {})?;
        let over_pcie = self.expert_kernel_seconds()?;
        let rates = over_pcie.iter().map(|&s| gb_s(routed_bytes, s));
        probe.expert_kernel_over_pcie = Rate::of(rates.collect());
        // What a step with a hand-off takes without its experts, but with their kernels' least.
        let base = (middle(&handed) - in_vram).max(0.0) + experts_least_s;
        let mut waits = Vec::new();
        for missing in MISSING {
            self.give_missing(missing)?;
            let pcie_percent = self.calibrate_share(&mut Vec::new())?;
            waits.push(Waits {
                missing,
                pcie_percent,
                ..Waits::default()
            });
        }
        for _ in 0..TURNS {
            for waits in &mut waits {
                self.give_missing(waits.missing)?;
                self.set_pcie_share(waits.pcie_percent)?;
                self.expert_wait(base, waits)?;
            }
        }
        let missing_bytes = |w: &Waits| {
            let of_layers = (w.steps.max(1) * layers as u64) as f64;
            (w.cpu + w.pcie) as f64 / of_layers * blob_bytes as f64
        };
        if let Some(all) = waits.last() {
            let rate = |us: &f64| missing_bytes(all) / us.max(1e-3) / 1e3;
            probe.cpu_and_pcie = Rate::of(all.us.iter().map(rate).collect());
        }
        probe.expert_wait = (waits.into_iter())
            .map(|w| ExpertWait {
                missing_bytes: missing_bytes(&w),
                pcie_percent: w.pcie_percent,
                predicted_percent: 100 * w.predicted / w.cpu.max(1),
                time: Micros::of(w.us),
            })
            .collect();
        Ok(())
    }

    /// The output head, and the keys and values of a long context.
    fn measure_head_and_context(&mut self, probe: &mut GpuProbe, least_s: f64) -> Result<()> {
        if let Head::Vram(linear) = &self.model.dense.lm_head {
            let bytes = bytes_of(linear);
            probe.head_kernel = Rate::of(repeat(|| {
                let s = self.decode.head_us(&self.model)? / 1e6;
                Ok(gb_s(bytes, rest(s, least_s)))
            })?);
        }
        let shape = &self.model.shape;
        let attention = shape
            .mixers
            .iter()
            .filter(|m| **m == MixerKind::GatedAttention);
        let token_bytes = attention.count() * kv_token_bytes(self.kv_dtype, shape);
        if token_bytes == 0 {
            return Ok(());
        }
        let at = |cuda: &mut Self, position: usize| {
            cuda.states.active_mut().position = position;
            // Kernels are told by a step where they are.
            cuda.timed_step(0)?;
            let (decode, model, state) = (&cuda.decode, &cuda.model, &cuda.states.layout);
            repeat(|| decode.time_kernels(model, state, &["decode_attention"]))
        };
        let tokens = self.states.max_tokens() - 2;
        let short = middle(&at(self, 0)?);
        let long = at(self, tokens)?;
        let of = |us: &f64| gb_s(tokens * token_bytes, rest(*us, short) / 1e6);
        probe.kv_kernel = Rate::of(long.iter().map(of).collect());
        self.forget_sequences()
    }

    /// Leaves this share of each layer's experts in RAM.
    fn give_missing(&mut self, missing: f64) -> Result<()> {
        let layers = self.model.shape.num_layers();
        let experts = self.model.shape.moe.num_experts;
        let here = ((1.0 - missing) * experts as f64).round() as usize;
        let all = (0..layers).flat_map(|layer| (0..here).map(move |expert| (layer, expert)));
        self.give_slots(Residency::Exactly(all.collect()))
    }

    /// Adds what the experts of a layer take as they are placed, in whole steps that take `base` seconds
    /// without them.
    fn expert_wait(&mut self, base: f64, waits: &mut Waits) -> Result<()> {
        let layers = self.model.shape.num_layers() as f64;
        self.take_times();
        let steps = self.step_seconds()?;
        let times = self.take_times();
        let of_layer = |s: &f64| ((s - base) * 1e6 / layers).max(0.0);
        waits.us.extend(steps.iter().map(of_layer));
        waits.steps += times.steps;
        waits.cpu += times.experts_cpu;
        waits.pcie += times.experts_pcie;
        waits.predicted += times.predicted;
        Ok(())
    }

    fn give_slots(&mut self, residency: Residency) -> Result<()> {
        self.options.residency = residency;
        self.fill_slots()?;
        self.forget_sequences()
    }

    /// Seconds of the expert kernels of a step, routers taken off.
    fn expert_kernel_seconds(&self) -> Result<Vec<f64>> {
        let (decode, model, state) = (&self.decode, &self.model, &self.states.layout);
        let routers = middle(&repeat(|| {
            decode.time_kernels(model, state, &EXPERT_KERNELS[..1])
        })?);
        repeat(|| {
            let all = decode.time_kernels(model, state, &EXPERT_KERNELS)?;
            Ok(rest(all, routers) / 1e6)
        })
    }

    /// Seconds of whole steps; where they are short, each the mean of many, of other tokens.
    fn step_seconds(&mut self) -> Result<Vec<f64>> {
        let mut number = 0;
        let mut step = || {
            number += 1;
            self.timed_step(number - 1)
        };
        step()?;
        let together = (SAMPLE_SECONDS / step()?).clamp(1.0, 32.0) as usize;
        repeat(|| {
            let total = (0..together).try_fold(0.0, |sum, _| step().map(|s| sum + s))?;
            Ok(total / together as f64)
        })
    }

    /// Bytes of weights and states that a step moves, experts and the head left out.
    fn dense_bytes(&self) -> usize {
        let net = &self.model.shape.delta_net;
        let state = 2 * 4 * net.value_dim() * net.key_head_dim;
        let of_layer = |layer: &super::weights::Layer| {
            let mixer = match &layer.mixer {
                Mixer::DeltaNet(n) => {
                    [&n.qkvz, &n.ba, &n.out].map(bytes_of).iter().sum::<usize>() + state
                }
                Mixer::Attention(a) => [&a.q, &a.k, &a.v, &a.out].map(bytes_of).iter().sum(),
            };
            mixer + bytes_of(&layer.router)
        };
        self.model.dense.layers.iter().map(of_layer).sum()
    }
}

fn bytes_of(linear: &Linear) -> usize {
    let (rows, kblocks) = (linear.rows as usize, linear.kblocks as usize);
    match linear.format {
        f if f == Format::Nf4Tiles as i32 => {
            rows.div_ceil(TILE_ROWS) * kblocks * size_of::<Tile<u16>>()
        }
        f if f == Format::Bf16Rows as i32 => rows * kblocks * TILE_COLS * 2,
        _ => rows * kblocks * TILE_COLS * 4,
    }
}

fn middle(samples: &[f64]) -> f64 {
    median(&mut samples.to_vec())
}
