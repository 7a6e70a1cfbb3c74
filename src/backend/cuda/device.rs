//! A GPU as this backend uses it: memory, streams, kernels by name, captured graphs.
//!
//! Two drivers stand behind it: the real one ([`super::driver`]) and the emulator of
//! `kernels/emulate`, which runs the same kernels on the CPU ([`super::emulated`]). All that differs
//! between them is in [`Driver`].

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

#[cfg(not(feature = "cuda"))]
use crate::backend::BackendError;
use crate::backend::Result;

/// A handle of the driver's: a stream, an event or a graph.
pub type Handle = u64;

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub grid: [u32; 3],
    pub block: [u32; 2],
    pub shared_bytes: u32,
}

impl Geometry {
    /// The same for each of so many tokens of a decode step.
    pub fn for_tokens(mut self, tokens: usize) -> Self {
        self.grid[2] = tokens as u32;
        self
    }
}

/// Arguments of a kernel, in the order of its parameters.
#[derive(Default)]
pub struct Args {
    /// 16-byte units, so that every argument is aligned
    data: Vec<u128>,
    offsets: Vec<usize>,
    sizes: Vec<usize>,
}

impl Args {
    pub fn push<T: Pod>(&mut self, value: T) {
        let units = size_of::<T>().div_ceil(16);
        let start = self.data.len();
        self.offsets.push(start);
        self.sizes.push(size_of::<T>());
        self.data.resize(start + units, 0);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.data[start..]);
        bytes[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
    }

    /// Bytes of each argument.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Pointers to the arguments, as drivers want them; valid while `self` is not changed.
    pub fn pointers(&mut self) -> Vec<*mut c_void> {
        let data = self.data.as_mut_ptr();
        let pointer = |&start: &usize| {
            // SAFETY: offsets lie inside `data`.
            unsafe { data.add(start) }.cast()
        };
        self.offsets.iter().map(pointer).collect()
    }
}

/// `args![a, b, c]`: [`Args`] of plain values.
macro_rules! args {
    ($($value:expr),* $(,)?) => {{
        let mut args = $crate::backend::cuda::device::Args::default();
        $(args.push($value);)*
        args
    }};
}
pub(crate) use args;

/// The compute capability that kernels in `*_sm90.cu` are for, and no other runs.
pub const HOPPER: (u32, u32) = (9, 0);

/// Facts about a device.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    pub name: String,
    pub total_bytes: u64,
    pub multiprocessors: u32,
    /// Such as (9, 0)
    pub compute_capability: (u32, u32),
}

/// What a driver does. Addresses are the device's; sizes are bytes.
///
/// Calls that name a stream return at once; their buffers must live until the stream is
/// synchronised, which is what makes them `unsafe`.
pub trait Driver: Send + Sync {
    fn facts(&self) -> DeviceFacts;
    /// Free and total memory of the device.
    fn memory(&self) -> Result<(u64, u64)>;
    fn alloc(&self, bytes: usize) -> Result<u64>;
    fn free(&self, address: u64);
    /// Pinned host memory that the device can address: its host and device address.
    fn alloc_host(&self, bytes: usize) -> Result<(*mut u8, u64)>;
    fn free_host(&self, host: *mut u8, bytes: usize);
    /// Pins memory that exists; its device address.
    ///
    /// # Safety
    /// The memory must stay mapped until [`unregister`](Driver::unregister).
    unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<u64>;
    fn unregister(&self, host: *mut u8);

    fn new_stream(&self) -> Result<Handle>;
    fn free_stream(&self, stream: Handle);
    fn synchronize(&self, stream: Handle) -> Result<()>;
    /// Whether all work of the stream is done.
    fn is_idle(&self, stream: Handle) -> Result<bool>;
    fn new_event(&self) -> Result<Handle>;
    fn free_event(&self, event: Handle);
    fn record(&self, event: Handle, stream: Handle) -> Result<()>;
    /// Whether all work before the event's last record is done.
    fn has_happened(&self, event: Handle) -> Result<bool>;
    /// Waits for all work before the event's last record.
    fn synchronize_event(&self, event: Handle) -> Result<()>;
    /// Work added to `stream` later waits for `event`.
    fn wait_event(&self, stream: Handle, event: Handle) -> Result<()>;
    /// Milliseconds between two events that have happened.
    fn elapsed_ms(&self, from: Handle, to: Handle) -> Result<f32>;

    /// # Safety
    /// All ranges must be valid until the stream has done this.
    unsafe fn copy_to_device(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<()>;
    /// `rows` pieces of `width` bytes, `pitch` bytes apart on the host, side by side on the device.
    ///
    /// # Safety
    /// As [`copy_to_device`](Driver::copy_to_device).
    unsafe fn copy_rows_to_device(
        &self,
        to: u64,
        from: *const u8,
        width: usize,
        pitch: usize,
        rows: usize,
        stream: Handle,
    ) -> Result<()>;
    /// # Safety
    /// As [`copy_to_device`](Driver::copy_to_device).
    unsafe fn copy_to_host(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<()>;
    /// # Safety
    /// As [`copy_to_device`](Driver::copy_to_device).
    unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize, stream: Handle)
    -> Result<()>;
    /// # Safety
    /// As [`copy_to_device`](Driver::copy_to_device).
    unsafe fn fill_zero(&self, address: u64, bytes: usize, stream: Handle) -> Result<()>;
    /// Work added to `stream` later waits until the u32 at device address `flag` is at least
    /// `value`.
    ///
    /// # Safety
    /// As [`copy_to_device`](Driver::copy_to_device).
    unsafe fn wait_flag(&self, stream: Handle, flag: u64, value: u32) -> Result<()>;
    /// `overlap`: may start before the kernel before it ends, which it then waits for itself.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and all memory they name valid until the stream
    /// has done this.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        geometry: Geometry,
        args: Args,
        overlap: bool,
        stream: Handle,
    ) -> Result<()>;

    /// Records what is added to `stream` instead of doing it, until
    /// [`end_capture`](Driver::end_capture).
    fn begin_capture(&self, stream: Handle) -> Result<()>;
    /// The graph that was recorded, on the device already: its first launch takes no longer than others.
    fn end_capture(&self, stream: Handle) -> Result<Handle>;
    /// # Safety
    /// What was recorded must still be valid.
    unsafe fn launch_graph(&self, graph: Handle, stream: Handle) -> Result<()>;
    fn free_graph(&self, graph: Handle);
}

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
            return Ok(Device::new(Arc::new(super::emulated::Emulated::default())));
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
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.driver.memory()
    }

    /// `bytes` of device memory, zeroed.
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
    pub fn upload<T: Pod>(&self, data: &[T], stream: &Stream) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.alloc(bytes.len(), stream)?;
        buffer.write(0, bytes, stream)?;
        Ok(buffer)
    }

    /// `len` zeroed elements of pinned host memory.
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
    pub unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<Registered> {
        // SAFETY: the caller's promise.
        let address = unsafe { self.driver.register(host, bytes)? };
        Ok(Registered {
            device: self.clone(),
            host,
            address,
        })
    }

    pub fn new_stream(&self) -> Result<Stream> {
        Ok(Stream {
            handle: self.driver.new_stream()?,
            device: self.clone(),
        })
    }

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

    pub fn synchronize(&self) -> Result<()> {
        self.device.driver.synchronize(self.handle)
    }

    pub fn is_idle(&self) -> Result<bool> {
        self.device.driver.is_idle(self.handle)
    }

    pub fn record(&self, event: &Event) -> Result<()> {
        self.device.driver.record(event.handle, self.handle)
    }

    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.driver.wait_event(self.handle, event.handle)
    }

    /// # Safety
    /// See [`Driver::copy_to_device`].
    pub unsafe fn copy_to_device(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_to_device(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::copy_rows_to_device`].
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
    pub unsafe fn copy_to_host(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_to_host(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::copy_to_device`].
    pub unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.device.driver).copy_on_device(to, from, bytes, self.handle) }
    }

    /// # Safety
    /// See [`Driver::wait_flag`].
    pub unsafe fn wait_flag(&self, flag: u64, value: u32) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.driver.wait_flag(self.handle, flag, value) }
    }

    /// # Safety
    /// See [`Driver::launch`].
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
    pub fn has_happened(&self) -> Result<bool> {
        self.device.driver.has_happened(self.handle)
    }

    /// Waits for all work before the last record of this event.
    pub fn synchronize(&self) -> Result<()> {
        self.device.driver.synchronize_event(self.handle)
    }

    /// Milliseconds from `earlier` to this; both must have happened.
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
