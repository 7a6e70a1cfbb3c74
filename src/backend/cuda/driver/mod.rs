//! What stands behind a [`Device`](super::device::Device): the real driver, or the emulator of
//! `kernels/emulate`, which runs the same kernels on the CPU. All that differs between them is in
//! [`Driver`].

#[cfg(feature = "emulate")]
mod emulated;
#[cfg(feature = "cuda")]
mod facts;
#[cfg(feature = "cuda")]
mod gpu;

use std::ffi::c_void;

use bytemuck::Pod;

use crate::backend::Result;

#[cfg(feature = "emulate")]
pub use emulated::Emulated;
#[cfg(feature = "cuda")]
pub use facts::device_count;
#[cfg(feature = "cuda")]
pub use gpu::Gpu;

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
        let mut args = $crate::backend::cuda::driver::Args::default();
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
