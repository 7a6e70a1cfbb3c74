//! What parts of a step take, measured from the very kernels and flags it is made of.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::super::device::{Graph, args};
use super::super::geometry;
use super::super::state::StateLayout;
use super::{Decode, Kind, Model, WATCHDOG, Wanted};
use crate::backend::{BackendError, Result};

/// Kernels, or flags, of one measurement.
const IN_A_ROW: usize = 64;
/// What launches of a graph that are timed together take about, microseconds.
const LAUNCHES_US: f64 = 1e4;

impl Decode {
    /// Microseconds that each kernel of a step takes on the GPU, all its launches in a row.
    ///
    /// Beside each other in a step they overlap a little; alone, small ones show what a launch
    /// costs. The sequence that steps are of is not the same afterwards.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn kernel_times(
        &mut self,
        model: &Model,
        states: &StateLayout,
    ) -> Result<Vec<(&'static str, f64)>> {
        const KERNELS: [&str; 9] = [
            "decode_norm_linear",
            "decode_delta_net",
            "decode_delta_out",
            "decode_attention",
            "decode_linear_add",
            "decode_router",
            "decode_experts_up",
            "decode_experts_down",
            "decode_combine",
        ];
        let time = |name| Ok((name, self.time_kernels(model, states, &[name])?));
        KERNELS.into_iter().map(time).collect()
    }

    /// Microseconds on the GPU of a step's kernels of these names, all of them if none is given. They run
    /// in a step's order, and wait for no CPU.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn time_kernels(&self, model: &Model, states: &StateLayout, only: &[&str]) -> Result<f64> {
        let kind = Kind {
            tokens: 1,
            few: false,
            head_from: 0,
            wanted: Wanted::Nothing,
            // Flags are for whole steps: without the CPU those must not wait.
            hybrid: !only.is_empty(),
        };
        let graph = (model.stream)
            .capture(|| self.record(model, states, kind, 0..model.shape.num_layers(), only))?;
        self.time_graph(model, &graph)
    }

    /// Microseconds of one kernel that has little to do, in a row of them in a graph; by itself, or as in
    /// a step, where it starts while the one before it ends.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn kernel_node_us(&self, model: &Model, overlap: bool) -> Result<f64> {
        let row = || (0..IN_A_ROW).try_for_each(|_| self.record_signal(model, 0, overlap));
        let graph = model.stream.capture(row)?;
        Ok(self.time_graph(model, &graph)? / IN_A_ROW as f64)
    }

    /// Microseconds of the output head on the device.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn head_us(&self, model: &Model) -> Result<f64> {
        let graph = (model.stream).capture(|| self.record_head(model, self.hidden, 1))?;
        self.time_graph(model, &graph)
    }

    /// Microseconds from a kernel that writes to the CPU's memory to the next one, which waits for
    /// the flag that the CPU then sets.
    ///
    /// # Errors
    /// If the driver reports one, or the GPU stands still.
    pub fn flag_round_trip_us(&self, model: &Model) -> Result<f64> {
        let device = model.stream.device();
        let (asked, answered) = (
            device.alloc_host::<u32>(IN_A_ROW)?,
            device.alloc_host::<u32>(IN_A_ROW)?,
        );
        let row = || {
            (0..IN_A_ROW).try_for_each(|i| {
                self.record_signal(model, asked.at(i), false)?;
                // SAFETY: both live until the graph is done, which is awaited below.
                unsafe { model.stream.wait_flag(answered.at(i), 1) }
            })
        };
        let graph = model.stream.capture(row)?;
        // SAFETY: u32s that only atomics and the GPU touch from here on.
        let word = |words: *mut u32| unsafe { AtomicU32::from_ptr(words) };
        for i in 0..IN_A_ROW {
            word(asked.pointer(i)).store(1, Ordering::Release);
        }
        // SAFETY: what it names lives until the end of this function.
        unsafe { model.stream.launch_graph(&graph)? };
        let since = Instant::now();
        let mut first = since;
        let mut served = Ok(());
        for i in 0..IN_A_ROW {
            // `decode_combine` clears the word it is given.
            while served.is_ok() && word(asked.pointer(i)).load(Ordering::Acquire) != 0 {
                std::hint::spin_loop();
                if since.elapsed() > WATCHDOG {
                    let reason = "the GPU did not answer a flag within 30 s";
                    served = Err(BackendError::Other(reason.into()));
                }
            }
            if i == 0 {
                first = Instant::now();
            }
            // In any case: a graph that waits for ever could not be ended.
            word(answered.pointer(i)).store(1, Ordering::Release);
        }
        let end = Instant::now();
        model.stream.synchronize()?;
        served?;
        // The first one also waited for the launch.
        Ok((end - first).as_secs_f64() * 1e6 / (IN_A_ROW - 1) as f64)
    }

    /// `decode_combine` on this struct's buffers, which clears `word` if that is not 0.
    fn record_signal(&self, model: &Model, word: u64, overlap: bool) -> Result<()> {
        let dim = model.shape.hidden_size;
        let args = args![self.moe, self.cpu_out.at(0), word, self.hidden, dim as i32];
        // SAFETY: arguments are those of the kernel; the buffers are this struct's.
        unsafe { (model.stream).launch("decode_combine", geometry::combine(dim), args, overlap) }
    }

    /// Microseconds of a launch: mean of so many that the driver, slow with a graph that is new to it, is
    /// ahead of the GPU.
    fn time_graph(&self, model: &Model, graph: &Graph) -> Result<f64> {
        let one_us = self.time_launches(model, graph, 1)?;
        let count = (LAUNCHES_US / one_us.max(1.0)).clamp(3.0, 64.0);
        self.time_launches(model, graph, count as usize)
    }

    /// Mean of `count` launches after one, microseconds.
    fn time_launches(&self, model: &Model, graph: &Graph, count: usize) -> Result<f64> {
        let device = model.stream.device();
        let (start, end) = (device.new_event()?, device.new_event()?);
        for launch in 0..=count {
            if launch == 1 {
                model.stream.record(&start)?;
            }
            // SAFETY: recorded for buffers that outlive the wait below.
            unsafe { model.stream.launch_graph(graph)? };
        }
        model.stream.record(&end)?;
        model.stream.synchronize()?;
        Ok(f64::from(end.ms_since(&start)?) * 1e3 / count as f64)
    }
}
