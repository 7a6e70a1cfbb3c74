//! How fast this machine reads its RAM: the wall every expert that is not in VRAM runs into.
//!
//! A sum over a buffer far larger than the L3, like STREAM without stores. Each thread reads the
//! part it wrote first, so that on a machine with several NUMA nodes every thread reads its own.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use super::{CpuFacts, MemoryFacts};

/// Sequential read bandwidth of DRAM, in GB/s (10^9 bytes).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DramProbe {
    pub buffer_bytes: u64,
    pub threads: usize,
    pub all_cores: Rate,
    pub one_core: Rate,
    /// The same loop over a buffer that fits the L1 or L2 of each core. Where it is not well above
    /// `all_cores`, the figure above is the loop's, not the memory's.
    pub in_cache: Rate,
}

/// Repetitions of one measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub best_gb_s: f64,
    pub median_gb_s: f64,
    /// Median absolute deviation from the median.
    pub mad_gb_s: f64,
    pub repetitions: usize,
}

/// The expert kernels of the `cpu` backend, by the number of tokens at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertProbe {
    /// The synthetic model
    pub model: String,
    pub kernels: String,
    pub threads: usize,
    /// Ascending
    pub batches: Vec<BatchRate>,
    pub seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchRate {
    pub tokens: usize,
    /// Weights that are read, each expert once
    pub weights: Rate,
    /// Arithmetic, a multiplication and an addition for each weight and token
    pub median_gflops: f64,
    pub mad_gflops: f64,
}

impl BatchRate {
    pub fn of(tokens: usize, weights: Rate, mut gflops: Vec<f64>) -> Self {
        let (median_gflops, mad_gflops) = median_and_mad(&mut gflops);
        BatchRate {
            tokens,
            weights,
            median_gflops,
            mad_gflops,
        }
    }
}

/// Far above any L3 share a virtual machine can hide, small enough to be filled in a moment.
const SMALLEST_BUFFER: u64 = 1 << 30;
const LARGEST_BUFFER: u64 = 2 << 30;
const IN_CACHE_WORDS_PER_THREAD: usize = 8 << 10; // 64 KiB
const REPETITIONS: usize = 15;
const TIME_PER_RATE: Duration = Duration::from_millis(450);

/// Measures with `threads` cores for about two seconds; `None` if there is not enough memory for
/// the buffer.
pub fn dram_read(cpu: &CpuFacts, memory: &MemoryFacts, threads: usize) -> Option<DramProbe> {
    with_buffer(cpu, memory, threads, |words, cores| DramProbe {
        buffer_bytes: size_of_val(words) as u64,
        threads: cores.len(),
        all_cores: measure(words, cores, 1),
        one_core: measure(words, &cores[..1], 1),
        in_cache: measure(
            &words[..cores.len() * IN_CACHE_WORDS_PER_THREAD],
            cores,
            512,
        ),
    })
}

/// Of that the rate of all cores alone, in less than a second.
pub fn dram_read_all_cores(cpu: &CpuFacts, memory: &MemoryFacts) -> Option<Rate> {
    with_buffer(cpu, memory, usize::MAX, |words, cores| {
        measure(words, cores, 1)
    })
}

/// Calls `read` with a buffer far beyond the caches, filled, and the cores to read it with.
fn with_buffer<T>(
    cpu: &CpuFacts,
    memory: &MemoryFacts,
    threads: usize,
    read: impl FnOnce(&[u64], &[usize]) -> T,
) -> Option<T> {
    let bytes = (4 * cpu.l3_bytes).clamp(SMALLEST_BUFFER, LARGEST_BUFFER);
    if bytes > memory.available_bytes / 2 {
        return None;
    }
    let threads = threads.min(cpu.usable_cores());
    let cores: Vec<usize> = cpu
        .physical_core_cpus
        .iter()
        .copied()
        .take(threads)
        .collect();
    if cores.is_empty() {
        return None;
    }
    let mut buffer = MmapMut::map_anon(bytes as usize).ok()?;
    // With 4 KiB pages the page walk would be part of what is measured. A refusal is no error.
    #[cfg(target_os = "linux")]
    let _ = buffer.advise(memmap2::Advice::HugePage);
    let words: &mut [u64] = bytemuck::cast_slice_mut(&mut buffer);
    fill(words, &cores);
    Some(read(words, &cores))
}

/// Writes every page from the thread that will read it: first touch decides the NUMA node.
fn fill(words: &mut [u64], cores: &[usize]) {
    let share = words.len().div_ceil(cores.len());
    std::thread::scope(|scope| {
        for (part, &core) in words.chunks_mut(share).zip(cores) {
            scope.spawn(move || {
                pin_to(core);
                part.fill(0x9e37_79b9_7f4a_7c15);
            });
        }
    });
}

/// Reads `words` `passes` times per repetition, split evenly over `cores`.
fn measure(words: &[u64], cores: &[usize], passes: usize) -> Rate {
    let share = words.len().div_ceil(cores.len());
    let bytes = (size_of_val(words) * passes) as f64;
    let started = Instant::now();
    let mut rates = Vec::new();
    while rates.len() < REPETITIONS && (rates.len() < 3 || started.elapsed() < TIME_PER_RATE) {
        let barrier = Barrier::new(cores.len());
        let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
            let threads: Vec<_> = words
                .chunks(share)
                .zip(cores)
                .map(|(part, &core)| {
                    let barrier = &barrier;
                    scope.spawn(move || timed_read(part, core, passes, barrier))
                })
                .collect();
            let join = |t: std::thread::ScopedJoinHandle<_>| t.join().expect("reader panicked");
            threads.into_iter().map(join).collect()
        });
        let first = spans.iter().map(|s| s.0).min().expect("at least one core");
        let last = spans.iter().map(|s| s.1).max().expect("at least one core");
        rates.push(bytes / (last - first).as_secs_f64() / 1e9);
    }
    Rate::of(rates)
}

fn timed_read(part: &[u64], core: usize, passes: usize, barrier: &Barrier) -> (Instant, Instant) {
    pin_to(core);
    barrier.wait();
    let start = Instant::now();
    for _ in 0..passes {
        black_box(sum(black_box(part)));
    }
    (start, Instant::now())
}

/// How far ahead lines are fetched, as the kernels do: without it, the hardware's prefetchers end
/// at every page and the figure is below what kernels reach.
const BYTES_AHEAD: usize = 8 << 10;

/// Fetches the two cache lines of a later block into L2, if there are any.
#[inline(always)]
fn prefetch(block: &[u64; 16]) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..2 {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let address = block.as_ptr().cast::<i8>();
        let address = address.wrapping_add(BYTES_AHEAD + 64 * line);
        // SAFETY: a prefetch of any address is allowed, and changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = block;
}

/// Sixteen independent sums: enough vector adds in flight that loads, not latency, set the pace.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    let (blocks, rest) = words.as_chunks::<16>();
    for block in blocks {
        prefetch(block);
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    let total = |sum: u64, word: &u64| sum.wrapping_add(*word);
    rest.iter().fold(sums.iter().fold(0, total), total)
}

/// Best effort: a thread that moves only widens the spread.
fn pin_to(core: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: an all-zero cpu_set_t is the empty set; CPU_SET panics, never writes, out of range.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = core;
}

impl Rate {
    /// Of samples in GB/s.
    pub fn of(mut rates: Vec<f64>) -> Self {
        let (median_gb_s, mad_gb_s) = median_and_mad(&mut rates);
        Self {
            best_gb_s: rates.iter().copied().fold(0.0, f64::max),
            median_gb_s,
            mad_gb_s,
            repetitions: rates.len(),
        }
    }
}

/// Median, and median absolute deviation from it; sorts `values`.
pub(super) fn median_and_mad(values: &mut [f64]) -> (f64, f64) {
    let middle = median(values);
    let mut deviations: Vec<f64> = values.iter().map(|v| (v - middle).abs()).collect();
    (middle, median(&mut deviations))
}

/// 0 of nothing; sorts `values`.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_covers_every_word() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let words: Vec<u64> = (0..len).collect();
            assert_eq!(sum(&words), (0..len).sum::<u64>());
        }
    }

    #[test]
    fn a_probe_is_positive_and_its_best_is_not_below_its_median() {
        let words = vec![1u64; 1 << 16];
        let rate = measure(&words, &[0], 1);
        assert!(rate.median_gb_s > 0.0 && rate.best_gb_s >= rate.median_gb_s);
        assert!(rate.repetitions >= 3);
    }

    #[test]
    fn too_little_memory_is_not_measured() {
        let cpu = CpuFacts {
            physical_core_cpus: vec![0],
            ..CpuFacts::default()
        };
        let memory = MemoryFacts {
            available_bytes: 100 << 20,
            ..MemoryFacts::default()
        };
        assert_eq!(dram_read(&cpu, &memory, 2), None);
    }
}
