//! The emulator as a driver: kernels run on the CPU, device memory is ordinary memory.
//!
//! For tests: small models go through the whole backend, streams, graphs and flags included, on a
//! machine without a GPU. A stream is a thread that does its work in order.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Args, DeviceFacts, Driver, Geometry, Handle};
use crate::backend::{BackendError, Result};

/// Device memory is aligned as the real one is.
const ALIGN: usize = 256;

/// What the pretended device has.
const TOTAL_BYTES: u64 = 64 << 30;

unsafe extern "C" {
    fn moectl_emulate_launch(
        kernel: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        arguments: *mut *mut c_void,
    ) -> c_int;
    /// Number of parameters, and the bytes of each of the first `max`; -1 for no such kernel
    fn moectl_emulate_params(kernel: *const c_char, sizes: *mut u32, max: c_int) -> c_int;
}

/// One piece of work, repeatable because graphs are launched many times.
type Op = Arc<dyn Fn() -> Result<()> + Send + Sync>;

#[derive(Default)]
pub struct Emulated {
    next: AtomicU64,
    used: AtomicU64,
    allocations: Mutex<HashMap<u64, Layout>>,
    streams: Mutex<HashMap<Handle, StreamThread>>,
    branches: Mutex<Branches>,
    events: Mutex<HashMap<Handle, Arc<EventState>>>,
    graphs: Mutex<HashMap<Handle, Vec<Op>>>,
}

struct StreamThread {
    ops: Sender<Op>,
    progress: Arc<Progress>,
    sent: u64,
    capturing: Option<Vec<Op>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Progress {
    state: Mutex<(u64, Option<String>)>,
    changed: Condvar,
}

/// Branches of graphs that are being recorded: streams that waited for an event recorded there, and
/// those events. What they do is recorded in the order of the calls, which is one that the graph
/// allows.
#[derive(Default)]
struct Branches {
    /// The stream that each began at
    streams: HashMap<Handle, Handle>,
    events: HashMap<Handle, Handle>,
}

#[derive(Default)]
struct EventState {
    /// How often it was recorded, how often that point was reached, and when last
    state: Mutex<(u64, u64, Option<Instant>)>,
    changed: Condvar,
}

fn error(message: impl Into<String>) -> BackendError {
    BackendError::Other(message.into())
}

impl Emulated {
    fn handle(&self) -> Handle {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn push(&self, stream: Handle, op: Op) -> Result<()> {
        let root = self.branches.lock().unwrap().streams.get(&stream).copied();
        let mut streams = self.streams.lock().unwrap();
        let stream = streams
            .get_mut(&root.unwrap_or(stream))
            .ok_or_else(|| error("emulator: no such stream"))?;
        match &mut stream.capturing {
            Some(ops) => ops.push(op),
            None => {
                stream.sent += 1;
                stream
                    .ops
                    .send(op)
                    .map_err(|_| error("emulator: the stream has ended"))?;
            }
        }
        Ok(())
    }

    /// The stream whose graph work on `stream` is recorded into, if it is.
    fn recording(&self, stream: Handle) -> Option<Handle> {
        if let Some(&root) = self.branches.lock().unwrap().streams.get(&stream) {
            return Some(root);
        }
        let streams = self.streams.lock().unwrap();
        let recording = streams.get(&stream).is_some_and(|s| s.capturing.is_some());
        recording.then_some(stream)
    }

    fn event(&self, handle: Handle) -> Arc<EventState> {
        Arc::clone(&self.events.lock().unwrap()[&handle])
    }
}

impl Driver for Emulated {
    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            name: "emulated GPU".into(),
            total_bytes: TOTAL_BYTES,
            multiprocessors: 4,
            compute_capability: (8, 0),
        }
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((TOTAL_BYTES - self.used.load(Ordering::Relaxed), TOTAL_BYTES))
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|e| error(e.to_string()))?;
        // SAFETY: the layout has a size above 0.
        let address = unsafe { alloc_zeroed(layout) } as u64;
        if address == 0 {
            return Err(error(format!("emulator: no memory for {bytes} B")));
        }
        self.used.fetch_add(bytes as u64, Ordering::Relaxed);
        self.allocations.lock().unwrap().insert(address, layout);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let streams: Vec<Handle> = self.streams.lock().unwrap().keys().copied().collect();
        for stream in streams {
            self.synchronize(stream).ok();
        }
        if let Some(layout) = self.allocations.lock().unwrap().remove(&address) {
            self.used.fetch_sub(layout.size() as u64, Ordering::Relaxed);
            // SAFETY: came from `alloc` with this layout.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }

    fn alloc_host(&self, bytes: usize) -> Result<(*mut u8, u64)> {
        let address = self.alloc(bytes)?;
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
        Ok((address as *mut u8, address))
    }

    fn free_host(&self, host: *mut u8, bytes: usize) {
        self.used.fetch_add(bytes as u64, Ordering::Relaxed);
        self.free(host as u64);
    }

    unsafe fn register(&self, host: *mut u8, _: usize) -> Result<u64> {
        Ok(host as u64)
    }

    fn unregister(&self, _: *mut u8) {}

    fn new_stream(&self) -> Result<Handle> {
        let (ops, inbox) = channel::<Op>();
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let thread = std::thread::Builder::new()
            .name("emulated-stream".into())
            .spawn(move || {
                for op in inbox {
                    let failed = shared.state.lock().unwrap().1.is_some();
                    let result = if failed { Ok(()) } else { op() };
                    let mut state = shared.state.lock().unwrap();
                    state.0 += 1;
                    if let Err(e) = result {
                        state.1.get_or_insert(e.to_string());
                    }
                    shared.changed.notify_all();
                }
            })
            .map_err(|e| error(e.to_string()))?;
        let handle = self.handle();
        let stream = StreamThread {
            ops,
            progress,
            sent: 0,
            capturing: None,
            thread: Some(thread),
        };
        self.streams.lock().unwrap().insert(handle, stream);
        Ok(handle)
    }

    fn free_stream(&self, stream: Handle) {
        let found = self.streams.lock().unwrap().remove(&stream);
        if let Some(StreamThread { ops, thread, .. }) = found {
            drop(ops);
            if let Some(thread) = thread {
                thread.join().ok();
            }
        }
    }

    fn synchronize(&self, stream: Handle) -> Result<()> {
        let (progress, sent) = {
            let streams = self.streams.lock().unwrap();
            let stream = streams
                .get(&stream)
                .ok_or_else(|| error("emulator: no such stream"))?;
            (Arc::clone(&stream.progress), stream.sent)
        };
        let state = progress.state.lock().unwrap();
        let state = progress.changed.wait_while(state, |s| s.0 < sent).unwrap();
        match &state.1 {
            Some(message) => Err(error(message.clone())),
            None => Ok(()),
        }
    }

    fn is_idle(&self, stream: Handle) -> Result<bool> {
        let streams = self.streams.lock().unwrap();
        let stream = streams
            .get(&stream)
            .ok_or_else(|| error("emulator: no such stream"))?;
        let state = stream.progress.state.lock().unwrap();
        match &state.1 {
            Some(message) => Err(error(message.clone())),
            None => Ok(state.0 >= stream.sent),
        }
    }

    fn new_event(&self) -> Result<Handle> {
        let handle = self.handle();
        self.events.lock().unwrap().insert(handle, Arc::default());
        Ok(handle)
    }

    fn free_event(&self, event: Handle) {
        self.events.lock().unwrap().remove(&event);
    }

    fn record(&self, event: Handle, stream: Handle) -> Result<()> {
        if let Some(root) = self.recording(stream) {
            self.branches.lock().unwrap().events.insert(event, root);
            return Ok(());
        }
        let event = self.event(event);
        event.state.lock().unwrap().0 += 1;
        self.push(
            stream,
            Arc::new(move || {
                let mut state = event.state.lock().unwrap();
                state.1 += 1;
                state.2 = Some(Instant::now());
                event.changed.notify_all();
                Ok(())
            }),
        )
    }

    fn has_happened(&self, event: Handle) -> Result<bool> {
        let event = self.event(event);
        let state = event.state.lock().unwrap();
        Ok(state.1 >= state.0)
    }

    fn synchronize_event(&self, event: Handle) -> Result<()> {
        let event = self.event(event);
        let state = event.state.lock().unwrap();
        let target = state.0;
        drop(event.changed.wait_while(state, |s| s.1 < target).unwrap());
        Ok(())
    }

    fn wait_event(&self, stream: Handle, event: Handle) -> Result<()> {
        let mut branches = self.branches.lock().unwrap();
        if let Some(&root) = branches.events.get(&event) {
            if stream != root {
                branches.streams.insert(stream, root);
            }
            return Ok(());
        }
        drop(branches);
        if self.recording(stream).is_some() {
            return Err(error("emulator: a graph waits for work outside of it"));
        }
        let event = self.event(event);
        let target = event.state.lock().unwrap().0;
        self.push(
            stream,
            Arc::new(move || {
                let state = event.state.lock().unwrap();
                drop(event.changed.wait_while(state, |s| s.1 < target).unwrap());
                Ok(())
            }),
        )
    }

    fn elapsed_ms(&self, from: Handle, to: Handle) -> Result<f32> {
        let when = |event: Handle| self.event(event).state.lock().unwrap().2;
        let (Some(from), Some(to)) = (when(from), when(to)) else {
            return Err(error("emulator: an event has not happened"));
        };
        Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
    }

    unsafe fn copy_to_device(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_on_device(to, from as u64, bytes, stream) }
    }

    unsafe fn copy_rows_to_device(
        &self,
        to: u64,
        from: *const u8,
        width: usize,
        pitch: usize,
        rows: usize,
        stream: Handle,
    ) -> Result<()> {
        (0..rows).try_for_each(|row| {
            // SAFETY: the caller's promise.
            unsafe {
                let from = from.add(row * pitch) as u64;
                self.copy_on_device(to + (row * width) as u64, from, width, stream)
            }
        })
    }

    unsafe fn copy_to_host(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_on_device(to as u64, from, bytes, stream) }
    }

    unsafe fn copy_on_device(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<()> {
        self.push(
            stream,
            Arc::new(move || {
                // SAFETY: the caller of this function keeps both ranges valid until now.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
                Ok(())
            }),
        )
    }

    unsafe fn fill_zero(&self, address: u64, bytes: usize, stream: Handle) -> Result<()> {
        self.push(
            stream,
            Arc::new(move || {
                // SAFETY: as in `copy_on_device`.
                unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
                Ok(())
            }),
        )
    }

    unsafe fn wait_flag(&self, stream: Handle, flag: u64, value: u32) -> Result<()> {
        self.push(
            stream,
            Arc::new(move || {
                // SAFETY: the caller keeps the flag valid, and u32s are aligned.
                let flag = unsafe { AtomicU32::from_ptr(flag as *mut u32) };
                while flag.load(Ordering::Acquire) < value {
                    std::thread::sleep(Duration::from_micros(5));
                }
                Ok(())
            }),
        )
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        geometry: Geometry,
        args: Args,
        _: bool,
        stream: Handle,
    ) -> Result<()> {
        let mut sizes = [0; 64];
        let name = CString::new(kernel).expect("kernel names have no NUL");
        // SAFETY: the name ends with NUL, `sizes` is as long as said.
        let count = unsafe { moectl_emulate_params(name.as_ptr(), sizes.as_mut_ptr(), 64) };
        if count >= 0 {
            let sizes: Vec<usize> = sizes[..count as usize]
                .iter()
                .map(|&s| s as usize)
                .collect();
            assert_eq!(args.sizes(), sizes, "arguments of {kernel}");
        }
        let args = Mutex::new(args);
        self.push(
            stream,
            Arc::new(move || {
                let name = CString::new(kernel).expect("kernel names have no NUL");
                let mut args = args.lock().unwrap();
                let mut pointers = args.pointers();
                let block = [geometry.block[0], geometry.block[1], 1];
                // SAFETY: the caller promises arguments that fit the kernel.
                let status = unsafe {
                    moectl_emulate_launch(
                        name.as_ptr(),
                        geometry.grid.as_ptr(),
                        block.as_ptr(),
                        geometry.shared_bytes,
                        pointers.as_mut_ptr(),
                    )
                };
                match status {
                    0 => Ok(()),
                    _ => Err(error(format!("emulator: no kernel `{kernel}`"))),
                }
            }),
        )
    }

    fn begin_capture(&self, stream: Handle) -> Result<()> {
        let mut streams = self.streams.lock().unwrap();
        let stream = streams
            .get_mut(&stream)
            .ok_or_else(|| error("emulator: no such stream"))?;
        stream.capturing = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self, stream: Handle) -> Result<Handle> {
        let mut branches = self.branches.lock().unwrap();
        branches.streams.retain(|_, root| *root != stream);
        branches.events.retain(|_, root| *root != stream);
        drop(branches);
        let mut streams = self.streams.lock().unwrap();
        let stream = streams
            .get_mut(&stream)
            .ok_or_else(|| error("emulator: no such stream"))?;
        let ops = stream
            .capturing
            .take()
            .ok_or_else(|| error("emulator: nothing recorded"))?;
        let handle = self.handle();
        self.graphs.lock().unwrap().insert(handle, ops);
        Ok(handle)
    }

    unsafe fn launch_graph(&self, graph: Handle, stream: Handle) -> Result<()> {
        let ops = self.graphs.lock().unwrap()[&graph].clone();
        ops.into_iter().try_for_each(|op| self.push(stream, op))
    }

    fn free_graph(&self, graph: Handle) {
        self.graphs.lock().unwrap().remove(&graph);
    }
}
