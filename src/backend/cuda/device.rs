//! A GPU as this backend uses it: memory, streams, kernels by name, captured graphs.
//!
//! Memory, streams, events and graphs are values here, which give back what they have of the driver's;
//! behind them is one of the [`Driver`]s.

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

#[cfg(not(feature = "cuda"))]
use crate::backend::BackendError;
use crate::backend::Result;

pub(crate) use super::driver::args;
pub use super::driver::{Args, DeviceFacts, Driver, Geometry, HOPPER, Handle};

/// One device; clones share it.
#[derive(Clone)]
pub struct Device {
    driver: Arc<dyn Driver>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.facts().fmt(f)
    }
}

impl Device {
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Device { driver }
    }

    /// GPU `index`, or the emulator where the variable `MOECTL_EMULATE` is set and it is built in.
    ///
    /// # Errors
    /// If there is no such GPU, and why.
    pub fn open(index: usize) -> Result<Device> {
        #[cfg(feature = "emulate")]
        if std::env::var_os("MOECTL_EMULATE").is_some_and(|v| v != "0") {
            return Ok(Device::new(Arc::new(super::driver::Emulated::default())));
        }
        #[cfg(feature = "cuda")]
        {
            Ok(Device::new(Arc::new(super::driver::Gpu::open(index)?)))
        }
        #[cfg(not(feature = "cuda"))]
        {
            Err(BackendError::Other(format!(
                "this build has no kernels for cuda:{index}; build it with --features cuda"
            )))
        }
    }

    pub fn facts(&self) -> DeviceFacts {
        self.driver.facts()
    }

    /// Free and total bytes.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.driver.memory()
    }

    /// `bytes` of device memory, zeroed.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn alloc(&self, bytes: usize, stream: &Stream) -> Result<Buffer> {
        let address = self.driver.alloc(bytes.max(16))?;
        let buffer = Buffer {
            device: self.clone(),
            address,
            bytes,
        };
        if bytes > 0 {
            // SAFETY: the range was just allocated, and freeing waits for the device.
            unsafe { self.driver.fill_zero(address, bytes, stream.handle)? };
        }
        Ok(buffer)
    }

    /// Device memory with a copy of `data`.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn upload<T: Pod>(&self, data: &[T], stream: &Stream) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.alloc(bytes.len(), stream)?;
        buffer.write(0, bytes, stream)?;
        Ok(buffer)
    }

    /// `len` zeroed elements of pinned host memory.
    ///
    /// # Errors
    /// If memory that can be pinned is short.
    pub fn alloc_host<T: Pod>(&self, len: usize) -> Result<Pinned<T>> {
        let bytes = (len * size_of::<T>()).max(16);
        let (host, address) = self.driver.alloc_host(bytes)?;
        // SAFETY: `bytes` were just allocated there.
        unsafe { host.write_bytes(0, bytes) };
        Ok(Pinned {
            device: self.clone(),
            host: host.cast(),
            address,
            len,
            bytes,
        })
    }

    /// Pins `bytes` at `host`, which the owner keeps mapped while the result lives.
    ///
    /// # Safety
    /// See above.
    ///
    /// # Errors
    /// If the driver cannot pin it.
    pub unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<Registered> {
        // SAFETY: the caller's promise.
        let address = unsafe { self.driver.register(host, bytes)? };
        Ok(Registered {
            device: self.clone(),
            host,
            address,
        })
    }

    /// Another stream of this device.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn new_stream(&self) -> Result<Stream> {
        Ok(Stream {
            handle: self.driver.new_stream()?,
            device: self.clone(),
        })
    }

    /// An event that has not happened.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn new_event(&self) -> Result<Event> {
        Ok(Event {
            handle: self.driver.new_event()?,
            device: self.clone(),
        })
    }
}

/// Device memory.
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Buffer {
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Address of byte `offset`.
    pub fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.bytes);
        self.address + offset as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `data` to byte `offset` and waits.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn write(&self, offset: usize, data: &[u8], stream: &Stream) -> Result<()> {
        assert!(offset + data.len() <= self.bytes);
        if data.is_empty() {
            return Ok(());
        }
        let to = self.address + offset as u64;
        let driver = &self.device.driver;
        // SAFETY: both ranges are in bounds and outlive the wait below.
        unsafe { driver.copy_to_device(to, data.as_ptr(), data.len(), stream.handle)? };
        stream.synchronize()
    }

    /// All elements from byte `offset` on that fit `out`, after waiting for the stream.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn read<T: Pod>(&self, offset: usize, out: &mut [T], stream: &Stream) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        assert!(offset + bytes.len() <= self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        let from = self.address + offset as u64;
        let driver = &self.device.driver;
        // SAFETY: both ranges are in bounds and outlive the wait below.
        unsafe { driver.copy_to_host(bytes.as_mut_ptr(), from, bytes.len(), stream.handle)? };
        stream.synchronize()
    }

    /// Sets all of it to zeros.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn fill_zero(&self, stream: &Stream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the whole buffer; freeing it waits for the device.
        unsafe { (self.device.driver).fill_zero(self.address, self.bytes, stream.handle) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.driver.free(self.address);
    }
}

/// Pinned host memory that kernels read and write too.
pub struct Pinned<T> {
    device: Device,
    host: *mut T,
    address: u64,
    len: usize,
    bytes: usize,
}

// SAFETY: `Pinned` owns its memory as `Box<[T]>` does; the device's accesses are ordered by flags
// and streams, and go through raw pointers on this side.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: Pod> Pinned<T> {
    /// The device's address of element `i`.
    pub fn at(&self, i: usize) -> u64 {
        assert!(i <= self.len);
        self.address + (i * size_of::<T>()) as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element `i`, for volatile or atomic access beside the device.
    pub fn pointer(&self, i: usize) -> *mut T {
        assert!(i < self.len);
        // SAFETY: in bounds.
        unsafe { self.host.add(i) }
    }

    /// The elements, which no kernel may be using now.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements; the caller has waited for the device.
        unsafe { std::slice::from_raw_parts(self.host, self.len) }
    }

    /// As [`as_slice`](Pinned::as_slice).
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above; `&mut self` keeps others on this side out.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        (self.device.driver).free_host(self.host.cast(), self.bytes);
    }
}

/// Memory of ours that was pinned.
pub struct Registered {
    device: Device,
    host: *mut u8,
    address: u64,
}

// SAFETY: only an address that is given back on drop.
unsafe impl Send for Registered {}

impl Registered {
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.device.driver.unregister(self.host);
    }
}

/// Work in order.
pub struct Stream {
    device: Device,
    handle: Handle,
}

impl Stream {
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits for all work so far.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn synchronize(&self) -> Result<()> {
        self.device.driver.synchronize(self.handle)
    }

    /// Whether all work so far is done.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn is_idle(&self) -> Result<bool> {
        self.device.driver.is_idle(self.handle)
    }

    /// Has `event` happen when all work so far is done.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.device.driver.record(event.handle, self.handle)
    }

    /// Has what follows wait for `event`.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.driver.wait_event(self.handle, event.handle)
    }

    /// # Safety
    /// See [`Driver::copy_to_device`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn copy_to_device(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_to_device(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::copy_rows_to_device`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn copy_rows_to_device(
        &self,
        to: u64,
        from: *const u8,
        width: usize,
        pitch: usize,
        rows: usize,
    ) -> Result<()> {
        let driver = &self.device.driver;
        // SAFETY: the caller's promise.
        unsafe { driver.copy_rows_to_device(to, from, width, pitch, rows, self.handle) }
    }

    /// # Safety
    /// See [`Driver::copy_to_device`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn copy_to_host(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_to_host(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::copy_to_device`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_on_device(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::wait_flag`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn wait_flag(&self, flag: u64, value: u32) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.driver.wait_flag(self.handle, flag, value) }
    }

    /// # Safety
    /// See [`Driver::launch`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn launch(
        &self,
        kernel: &'static str,
        geometry: Geometry,
        args: Args,
        overlap: bool,
    ) -> Result<()> {
        let driver = &self.device.driver;
        // SAFETY: the caller's promise.
        unsafe { driver.launch(kernel, geometry, args, overlap, self.handle) }
    }

    /// Records what `work` adds to this stream as a graph.
    ///
    /// # Errors
    /// What `work` returns, or the driver's.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let driver = &self.device.driver;
        driver.begin_capture(self.handle)?;
        let done = work();
        let graph = driver.end_capture(self.handle);
        done?;
        Ok(Graph {
            handle: graph?,
            device: self.device.clone(),
        })
    }

    /// # Safety
    /// See [`Driver::launch_graph`].
    ///
    /// # Errors
    /// If the driver reports one.
    pub unsafe fn launch_graph(&self, graph: &Graph) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).launch_graph(graph.handle, self.handle) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.driver.free_stream(self.handle);
    }
}

/// A point in a stream.
pub struct Event {
    device: Device,
    handle: Handle,
}

impl Event {
    /// Whether all work before the last record of this event is done.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn has_happened(&self) -> Result<bool> {
        self.device.driver.has_happened(self.handle)
    }

    /// Waits for all work before the last record of this event.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn synchronize(&self) -> Result<()> {
        self.device.driver.synchronize_event(self.handle)
    }

    /// Milliseconds from `earlier` to this; both must have happened.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32> {
        (self.device.driver).elapsed_ms(earlier.handle, self.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.driver.free_event(self.handle);
    }
}

/// Recorded work.
pub struct Graph {
    device: Device,
    handle: Handle,
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.driver.free_graph(self.handle);
    }
}
