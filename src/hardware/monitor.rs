//! Watches memory, CPU and GPU while something else runs.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::{Device, Nvml};
use serde::{Deserialize, Serialize};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

use super::gpu::used_by_this_process;

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_power_w: Option<f64>,
}

/// A sampling thread; dropping it without [`stop`](Self::stop) ends the thread too.
pub struct Monitor {
    stop: Sender<()>,
    thread: JoinHandle<MonitorRecord>,
}

impl Monitor {
    /// Samples this process, and GPU `gpu_index` if the driver shows it, once per `period`.
    pub fn start(period: Duration, gpu_index: Option<u32>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let nvml = gpu_index.and_then(|_| Nvml::init().ok());
            let gpu = nvml
                .as_ref()
                .and_then(|nvml| nvml.device_by_index(gpu_index?).ok());
            let mut sampler = Sampler::new(gpu.as_ref());
            let mut samples = vec![sampler.sample()];
            while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                samples.push(sampler.sample());
            }
            samples.push(sampler.sample());
            MonitorRecord {
                period_ms: period.as_secs_f64() * 1e3,
                peak_rss_bytes: high_water_mark()
                    .unwrap_or_else(|| samples.iter().map(|s| s.rss_bytes).max().unwrap_or(0)),
                peak_vram_bytes: samples.iter().filter_map(|s| s.vram_bytes).max(),
                gpu_energy_j: sampler.energy_since_start_j(),
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

struct Sampler<'a> {
    started: Instant,
    pid: Pid,
    system: Option<System>,
    gpu: Option<&'a Device<'a>>,
    energy_at_start_mj: Option<u64>,
}

impl<'a> Sampler<'a> {
    fn new(gpu: Option<&'a Device<'a>>) -> Self {
        Self {
            started: Instant::now(),
            pid: Pid::from_u32(std::process::id()),
            system: System::new().ok(),
            gpu,
            energy_at_start_mj: gpu.and_then(|gpu| gpu.total_energy_consumption().ok()),
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
        Sample {
            at_ms: self.started.elapsed().as_secs_f64() * 1e3,
            rss_bytes: process.map_or(0, |p| p.memory()),
            cpu_cores: process.map_or(0.0, |p| f64::from(p.cpu_usage()) / 100.0),
            vram_bytes: self.gpu.and_then(|gpu| {
                used_by_this_process(gpu).or_else(|| Some(gpu.memory_info().ok()?.used))
            }),
            gpu_utilisation_percent: self
                .gpu
                .and_then(|gpu| Some(gpu.utilization_rates().ok()?.gpu)),
            gpu_power_w: self
                .gpu
                .and_then(|gpu| Some(f64::from(gpu.power_usage().ok()?) / 1e3)),
        }
    }

    fn energy_since_start_j(&self) -> Option<f64> {
        let now_mj = self.gpu?.total_energy_consumption().ok()?;
        Some(now_mj.checked_sub(self.energy_at_start_mj?)? as f64 / 1e3)
    }
}

/// The most RAM this process ever held at once (`VmHWM`), from its start, not the monitor's.
pub fn high_water_mark() -> Option<u64> {
    super::root::Root::system().field_bytes("proc/self/status", "VmHWM")
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
}
