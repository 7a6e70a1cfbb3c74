//! Watches memory, CPU and GPU while something else runs.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// What a [`Monitor`] saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MonitorRecord {
    pub period_ms: f64,
    pub samples: Vec<Sample>,
    /// The kernel's own high-water mark of the process where it keeps one, else the largest sample.
    pub peak_rss_bytes: u64,
    /// The largest sample: this process' GPU memory, or the device's where it cannot be told apart.
    pub peak_vram_bytes: Option<u64>,
    /// Drawn by the GPU from start to stop.
    pub gpu_energy_j: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Since the start of the monitor.
    pub at_ms: f64,
    pub rss_bytes: u64,
    /// Cores kept busy by this process since the sample before.
    pub cpu_cores: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_utilisation_percent: Option<u32>,
    /// Share of the time in which VRAM was read or written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_utilisation_percent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_power_w: Option<f64>,
    /// Into the GPU, during some 20 ms at this sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcie_rx_gb_s: Option<f64>,
    /// Out of the GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcie_tx_gb_s: Option<f64>,
}

/// One look at a GPU. What its source does not tell is absent, never zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuReading {
    pub vram_bytes: Option<u64>,
    pub utilisation_percent: Option<u32>,
    pub memory_utilisation_percent: Option<u32>,
    pub power_w: Option<f64>,
    pub pcie_rx_gb_s: Option<f64>,
    pub pcie_tx_gb_s: Option<f64>,
}

/// Counters of a GPU that only grow; what its source does not count is absent.
///
/// The driver's counters of PCIe bytes are not among them: they have 32 bits, and begin anew several
/// times between two looks. Records of before 2026-12 hold their differences, which mean nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuCounters {
    pub energy_mj: Option<u64>,
}

/// Where a monitor reads a GPU: NVML ([`super::gpu::NvmlGpu`]), or what a test makes up.
pub trait GpuSource: Send {
    fn read(&mut self) -> GpuReading;
    fn counters(&mut self) -> GpuCounters;
}

impl MonitorRecord {
    /// A rate summed up over the time of the samples, each standing for the time since the one before;
    /// `None` if no sample has it. GB/s become bytes.
    pub fn total_bytes(&self, gb_s: fn(&Sample) -> Option<f64>) -> Option<u64> {
        let mut total = None;
        for pair in self.samples.windows(2) {
            if let Some(rate) = gb_s(&pair[1]) {
                let ms = pair[1].at_ms - pair[0].at_ms;
                *total.get_or_insert(0.0) += rate * 1e6 * ms.max(0.0);
            }
        }
        total.map(|bytes: f64| bytes.round() as u64)
    }
}

impl GpuCounters {
    /// What was counted since `earlier`; absent too where a counter ran backwards.
    pub fn since(&self, earlier: &Self) -> Self {
        let less = |now: Option<u64>, then: Option<u64>| now?.checked_sub(then?);
        Self {
            energy_mj: less(self.energy_mj, earlier.energy_mj),
        }
    }

    pub fn energy_j(&self) -> Option<f64> {
        self.energy_mj.map(|mj| mj as f64 / 1e3)
    }
}

/// A sampling thread; dropping it without [`stop`](Self::stop) ends the thread too.
pub struct Monitor {
    stop: Sender<()>,
    thread: JoinHandle<MonitorRecord>,
}

impl Monitor {
    /// Samples this process, and a GPU if there is one, once per `period`.
    pub fn start(period: Duration, gpu: Option<Box<dyn GpuSource>>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut sampler = Sampler::new(gpu);
            let mut samples = vec![sampler.sample()];
            while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                samples.push(sampler.sample());
            }
            samples.push(sampler.sample());
            let counted = sampler.counted_since_start();
            MonitorRecord {
                period_ms: period.as_secs_f64() * 1e3,
                peak_rss_bytes: high_water_mark()
                    .unwrap_or_else(|| samples.iter().map(|s| s.rss_bytes).max().unwrap_or(0)),
                peak_vram_bytes: samples.iter().filter_map(|s| s.vram_bytes).max(),
                gpu_energy_j: counted.energy_j(),
                samples,
            }
        });
        Self { stop, thread }
    }

    pub fn stop(self) -> MonitorRecord {
        // Fails only if the thread is gone, which `join` then reports.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_default()
    }
}

struct Sampler {
    started: Instant,
    pid: Pid,
    system: Option<System>,
    gpu: Option<Box<dyn GpuSource>>,
    at_start: GpuCounters,
}

impl Sampler {
    fn new(mut gpu: Option<Box<dyn GpuSource>>) -> Self {
        Self {
            started: Instant::now(),
            pid: Pid::from_u32(std::process::id()),
            system: System::new().ok(),
            at_start: gpu.as_mut().map(|gpu| gpu.counters()).unwrap_or_default(),
            gpu,
        }
    }

    fn sample(&mut self) -> Sample {
        if let Some(system) = &mut self.system {
            system.refresh_processes_specifics(
                ProcessesToUpdate::Some(&[self.pid]),
                false,
                ProcessRefreshKind::nothing().with_memory().with_cpu(),
            );
        }
        let process = self.system.as_ref().and_then(|s| s.process(self.pid));
        let at_ms = self.started.elapsed().as_secs_f64() * 1e3;
        let gpu = self.gpu.as_mut().map(|gpu| gpu.read()).unwrap_or_default();
        Sample {
            at_ms,
            rss_bytes: process.map_or(0, |p| p.memory()),
            cpu_cores: process.map_or(0.0, |p| f64::from(p.cpu_usage()) / 100.0),
            vram_bytes: gpu.vram_bytes,
            gpu_utilisation_percent: gpu.utilisation_percent,
            gpu_memory_utilisation_percent: gpu.memory_utilisation_percent,
            gpu_power_w: gpu.power_w,
            pcie_rx_gb_s: gpu.pcie_rx_gb_s,
            pcie_tx_gb_s: gpu.pcie_tx_gb_s,
        }
    }

    fn counted_since_start(&mut self) -> GpuCounters {
        let now = self.gpu.as_mut().map(|gpu| gpu.counters());
        now.unwrap_or_default().since(&self.at_start)
    }
}

/// The most RAM this process ever held at once (`VmHWM`), from its start, not the monitor's.
pub fn high_water_mark() -> Option<u64> {
    super::root::Root::system().field_bytes("proc/self/status", "VmHWM")
}

/// The RAM this process holds now (`VmRSS`).
pub fn resident_bytes() -> Option<u64> {
    super::root::Root::system().field_bytes("proc/self/status", "VmRSS")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_sees_the_memory_and_cpu_of_its_process() {
        let monitor = Monitor::start(Duration::from_millis(20), None);
        let mut pages = vec![0u8; 64 << 20];
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            pages
                .iter_mut()
                .step_by(4096)
                .for_each(|b| *b = b.wrapping_add(1));
        }
        let record = monitor.stop();
        assert_eq!(std::hint::black_box(&pages).len(), 64 << 20);
        assert!(record.samples.len() >= 3);
        assert!(record.peak_rss_bytes >= 64 << 20);
        assert!(record.samples.iter().any(|s| s.cpu_cores > 0.0));
        assert!(record.samples.windows(2).all(|w| w[0].at_ms < w[1].at_ms));
        assert_eq!(record.peak_vram_bytes, None);
    }

    /// Counts up with each look; knows no utilisation, and PCIe only one way.
    #[derive(Default)]
    struct Fake(u64);

    impl GpuSource for Fake {
        fn read(&mut self) -> GpuReading {
            self.0 += 1;
            GpuReading {
                vram_bytes: Some(if self.0 == 2 { 900 } else { 700 }),
                power_w: Some(50.5),
                pcie_rx_gb_s: Some(self.0 as f64),
                ..GpuReading::default()
            }
        }

        fn counters(&mut self) -> GpuCounters {
            GpuCounters {
                energy_mj: Some(1_000_000 + 1500 * self.0),
            }
        }
    }

    #[test]
    fn a_gpu_is_sampled_and_what_it_does_not_tell_is_absent() {
        let monitor = Monitor::start(Duration::from_millis(1), Some(Box::<Fake>::default()));
        std::thread::sleep(Duration::from_millis(30));
        let record = monitor.stop();
        let looks = record.samples.len();
        assert!(looks >= 3);
        assert_eq!(record.peak_vram_bytes, Some(900));
        assert_eq!(record.gpu_energy_j, Some(1.5 * looks as f64));
        assert!(record.total_bytes(|s| s.pcie_rx_gb_s).unwrap() > 0);
        assert_eq!(record.total_bytes(|s| s.pcie_tx_gb_s), None);
        assert_eq!(record.samples[1].pcie_rx_gb_s, Some(2.0));
        let json = serde_json::to_value(&record).unwrap();
        let sample = json["samples"][0].as_object().unwrap();
        assert!(sample.contains_key("gpu_power_w"));
        for absent in ["gpu_utilisation_percent", "pcie_tx_gb_s"] {
            assert!(!sample.contains_key(absent), "{absent}");
        }
    }

    #[test]
    fn a_counter_that_ran_backwards_counted_nothing() {
        let counters = |energy_mj| GpuCounters { energy_mj };
        assert_eq!(counters(Some(5)).since(&counters(Some(9))), counters(None));
        assert_eq!(
            counters(Some(9)).since(&counters(Some(5))),
            counters(Some(4))
        );
        assert_eq!(counters(Some(5)).since(&counters(None)), counters(None));
    }

    #[test]
    fn a_total_is_what_its_rates_come_to() {
        let sample = |at_ms, gb_s| Sample {
            at_ms,
            pcie_rx_gb_s: Some(gb_s),
            ..Sample::default()
        };
        // 40 GB/s for four seconds: forty times what a counter of 32 bits could tell.
        let record = MonitorRecord {
            samples: (0..=20)
                .map(|i| sample(200.0 * f64::from(i), 40.0))
                .collect(),
            ..MonitorRecord::default()
        };
        assert_eq!(
            record.total_bytes(|s| s.pcie_rx_gb_s),
            Some(160_000_000_000)
        );
    }
}
