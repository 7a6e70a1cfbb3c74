//! The real driver, through cudarc, loaded at run time: a binary with kernels starts without it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Mutex;

use cudarc::driver::sys::{self, CUresult};

use super::facts::{check, device_count, facts, parameter_sizes};
use super::{Args, DeviceFacts, Driver, Geometry, HOPPER, Handle};
use crate::backend::{BackendError, Result};

mod fatbins {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// Shared memory above this needs a word to the driver first.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// The primary context of one GPU, with all kernels loaded.
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    /// Kernels met so far
    functions: Mutex<HashMap<&'static str, Kernel>>,
    facts: DeviceFacts,
}

/// A kernel, the dynamic shared memory it may use, and the bytes of each of its parameters.
type Kernel = (Function, u32, Vec<usize>);

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Gpu {}
// SAFETY: as above; the table of functions has its lock.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPU `index`.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or no kernels for it.
    pub fn open(index: usize) -> Result<Gpu> {
        let count = device_count().ok_or_else(|| {
            BackendError::Other("no CUDA driver on this machine; use --backend cpu".into())
        })?;
        if index >= count {
            return Err(BackendError::Other(format!(
                "cuda:{index}: this machine has {count} CUDA devices; use --backend cpu"
            )));
        }
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: the driver is initialised; outputs are ours.
        unsafe {
            check(sys::cuDeviceGet(&mut device, index as i32), "open device")?;
            // The engine waits for single steps: spinning answers soonest.
            let spin = sys::CUctx_flags_enum::CU_CTX_SCHED_SPIN as u32;
            check(
                sys::cuDevicePrimaryCtxSetFlags_v2(device, spin),
                "set flags",
            )?;
            check(
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
                "make a context",
            )?;
            check(sys::cuCtxSetCurrent(context), "use the context")?;
        }
        let mut gpu = Gpu {
            device,
            context,
            modules: Vec::new(),
            functions: Mutex::default(),
            facts: facts(device)?,
        };
        for (name, image) in fatbins::FATBINS {
            if name.ends_with("_sm90") && gpu.facts.compute_capability != HOPPER {
                continue;
            }
            let mut module = ptr::null_mut();
            // SAFETY: the image is a whole fatbin that nvcc wrote.
            let loaded = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            check(loaded, &format!("load kernels {name}"))?;
            gpu.modules.push(module);
        }
        Ok(gpu)
    }

    /// Every thread that calls the driver needs the context.
    fn bind(&self) -> Result<()> {
        check(
            // SAFETY: the context lives as long as `self`.
            unsafe { sys::cuCtxSetCurrent(self.context) },
            "use the context",
        )
    }

    /// A kernel that takes `args`.
    fn function(
        &self,
        name: &'static str,
        shared_bytes: u32,
        args: &Args,
    ) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap();
        let (function, allowed, sizes) = match functions.remove(name) {
            Some(found) => found,
            None => {
                let symbol = CString::new(name).expect("kernel names have no NUL");
                let mut function = ptr::null_mut();
                let found = self.modules.iter().any(|&module| {
                    // SAFETY: the module is loaded, the name ends with NUL.
                    let got =
                        unsafe { sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
                    got == CUresult::CUDA_SUCCESS
                });
                if !found {
                    return Err(BackendError::Other(format!("CUDA: no kernel `{name}`")));
                }
                (
                    Function(function),
                    DEFAULT_SHARED_BYTES,
                    parameter_sizes(function),
                )
            }
        };
        // The driver reads as many arguments as the kernel has, wherever they lie.
        assert_eq!(args.sizes(), sizes, "arguments of {name}");
        let allowed = if shared_bytes > allowed {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let set =
                unsafe { sys::cuFuncSetAttribute(function.0, attribute, shared_bytes as i32) };
            check(
                set,
                &format!("{shared_bytes} B of shared memory for {name}"),
            )?;
            shared_bytes
        } else {
            allowed
        };
        functions.insert(name, (function, allowed, sizes));
        Ok(function.0)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: everything made in this context holds the driver alive, so is gone by now.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            for &module in &self.modules {
                sys::cuModuleUnload(module);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

fn stream(handle: Handle) -> sys::CUstream {
    handle as sys::CUstream
}

fn event(handle: Handle) -> sys::CUevent {
    handle as sys::CUevent
}

impl Driver for Gpu {
    fn facts(&self) -> DeviceFacts {
        self.facts.clone()
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        check(
            // SAFETY: outputs are ours.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) },
            "read free memory",
        )?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: the output is ours.
        let allocated = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        check(allocated, &format!("allocate {bytes} B on the device"))?;
        Ok(address)
    }

    fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // SAFETY: came from `alloc`; freeing waits for work that uses it.
            unsafe { sys::cuMemFree_v2(address) };
        }
    }

    fn alloc_host(&self, bytes: usize) -> Result<(*mut u8, u64)> {
        self.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        let (mut host, mut address) = (ptr::null_mut(), 0);
        // SAFETY: outputs are ours.
        unsafe {
            check(
                sys::cuMemHostAlloc(&mut host, bytes, flags),
                &format!("pin {bytes} B of memory"),
            )?;
            check(
                sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0),
                "map pinned memory",
            )?;
        }
        Ok((host.cast(), address))
    }

    fn free_host(&self, host: *mut u8, _: usize) {
        if self.bind().is_ok() {
            // SAFETY: came from `alloc_host`.
            unsafe { sys::cuMemFreeHost(host.cast()) };
        }
    }

    unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<u64> {
        self.bind()?;
        let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_PORTABLE;
        let mut address = 0;
        // SAFETY: the caller keeps the memory mapped.
        unsafe {
            check(
                sys::cuMemHostRegister_v2(host.cast(), bytes, flags),
                &format!("pin {bytes} B of weights; is `ulimit -l` too low?"),
            )?;
            let mapped = check(
                sys::cuMemHostGetDevicePointer_v2(&mut address, host.cast(), 0),
                "map pinned weights",
            );
            // The caller unmaps what is not registered.
            if mapped.is_err() {
                sys::cuMemHostUnregister(host.cast());
            }
            mapped?;
        }
        Ok(address)
    }

    fn unregister(&self, host: *mut u8) {
        if self.bind().is_ok() {
            // SAFETY: came from `register`.
            unsafe { sys::cuMemHostUnregister(host.cast()) };
        }
    }

    fn new_stream(&self) -> Result<Handle> {
        self.bind()?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        check(
            // SAFETY: the output is ours.
            unsafe { sys::cuStreamCreate(&mut stream, flags) },
            "make a stream",
        )?;
        Ok(stream as Handle)
    }

    fn free_stream(&self, handle: Handle) {
        if self.bind().is_ok() {
            // SAFETY: came from `new_stream`; its work goes on to the end.
            unsafe { sys::cuStreamDestroy_v2(stream(handle)) };
        }
    }

    fn synchronize(&self, handle: Handle) -> Result<()> {
        self.bind()?;
        check(
            // SAFETY: the stream exists.
            unsafe { sys::cuStreamSynchronize(stream(handle)) },
            "run kernels",
        )
    }

    fn is_idle(&self, handle: Handle) -> Result<bool> {
        self.bind()?;
        // SAFETY: the stream exists.
        match unsafe { sys::cuStreamQuery(stream(handle)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check(result, "run kernels").map(|()| true),
        }
    }

    fn new_event(&self) -> Result<Handle> {
        self.bind()?;
        let mut event = ptr::null_mut();
        check(
            // SAFETY: the output is ours.
            unsafe { sys::cuEventCreate(&mut event, 0) },
            "make an event",
        )?;
        Ok(event as Handle)
    }

    fn free_event(&self, handle: Handle) {
        if self.bind().is_ok() {
            // SAFETY: came from `new_event`.
            unsafe { sys::cuEventDestroy_v2(event(handle)) };
        }
    }

    fn record(&self, handle: Handle, on: Handle) -> Result<()> {
        self.bind()?;
        check(
            // SAFETY: both exist.
            unsafe { sys::cuEventRecord(event(handle), stream(on)) },
            "record an event",
        )
    }

    fn has_happened(&self, handle: Handle) -> Result<bool> {
        self.bind()?;
        // SAFETY: the event exists.
        match unsafe { sys::cuEventQuery(event(handle)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check(result, "run kernels").map(|()| true),
        }
    }

    fn synchronize_event(&self, handle: Handle) -> Result<()> {
        self.bind()?;
        // SAFETY: the event exists.
        let waited = unsafe { sys::cuEventSynchronize(event(handle)) };
        check(waited, "run kernels")
    }

    fn wait_event(&self, on: Handle, handle: Handle) -> Result<()> {
        self.bind()?;
        // SAFETY: both exist.
        let waiting = unsafe { sys::cuStreamWaitEvent(stream(on), event(handle), 0) };
        check(waiting, "wait for an event")
    }

    fn elapsed_ms(&self, from: Handle, to: Handle) -> Result<f32> {
        self.bind()?;
        let mut ms = 0.0;
        // SAFETY: both exist.
        let read = unsafe { sys::cuEventElapsedTime_v2(&mut ms, event(from), event(to)) };
        check(read, "read the time of events")?;
        Ok(ms)
    }

    unsafe fn copy_to_device(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        on: Handle,
    ) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream(on)) };
        check(copied, "copy to the device")
    }

    unsafe fn copy_rows_to_device(
        &self,
        to: u64,
        from: *const u8,
        width: usize,
        pitch: usize,
        rows: usize,
        on: Handle,
    ) -> Result<()> {
        self.bind()?;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from.cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            dstPitch: width,
            WidthInBytes: width,
            Height: rows,
        };
        check(
            // SAFETY: the caller's promise.
            unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream(on)) },
            "copy rows to the device",
        )
    }

    unsafe fn copy_to_host(&self, to: *mut u8, from: u64, bytes: usize, on: Handle) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream(on)) };
        check(copied, "copy from the device")
    }

    unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize, on: Handle) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let copied = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream(on)) };
        check(copied, "copy on the device")
    }

    unsafe fn fill_zero(&self, address: u64, bytes: usize, on: Handle) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let filled = unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream(on)) };
        check(filled, "clear memory")
    }

    unsafe fn wait_flag(&self, on: Handle, flag: u64, value: u32) -> Result<()> {
        self.bind()?;
        let at_least = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: the caller's promise.
        let waiting = unsafe { sys::cuStreamWaitValue32_v2(stream(on), flag, value, at_least) };
        check(waiting, "wait for a flag of the CPU's")
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        geometry: Geometry,
        mut args: Args,
        overlap: bool,
        on: Handle,
    ) -> Result<()> {
        self.bind()?;
        let function = self.function(kernel, geometry.shared_bytes, &args)?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let overlap = overlap && self.facts.compute_capability.0 >= 9;
        let config = sys::CUlaunchConfig {
            gridDimX: geometry.grid[0],
            gridDimY: geometry.grid[1],
            gridDimZ: geometry.grid[2],
            blockDimX: geometry.block[0],
            blockDimY: geometry.block[1],
            blockDimZ: 1,
            sharedMemBytes: geometry.shared_bytes,
            hStream: stream(on),
            attrs: &mut attribute,
            numAttrs: u32::from(overlap),
        };
        let mut pointers: Vec<*mut c_void> = args.pointers();
        // SAFETY: the caller promises arguments that fit the kernel; they are copied here.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), ptr::null_mut())
        };
        check(launched, &format!("launch {kernel} with {geometry:?}"))
    }

    fn begin_capture(&self, on: Handle) -> Result<()> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        check(
            // SAFETY: the stream exists.
            unsafe { sys::cuStreamBeginCapture_v2(stream(on), mode) },
            "record a graph",
        )
    }

    fn end_capture(&self, on: Handle) -> Result<Handle> {
        self.bind()?;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: outputs are ours; the graph is not needed once it is instantiated, and nothing else
        // knows `exec` yet.
        unsafe {
            check(
                sys::cuStreamEndCapture(stream(on), &mut graph),
                "record a graph",
            )?;
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            check(made, "make a graph")?;
            // Else the first launch does it, while a token waits. Launches come after it on the stream.
            let uploaded = check(
                sys::cuGraphUpload(exec, stream(on)),
                "bring a graph to the GPU",
            );
            if let Err(error) = uploaded {
                sys::cuGraphExecDestroy(exec);
                return Err(error);
            }
        }
        Ok(exec as Handle)
    }

    unsafe fn launch_graph(&self, graph: Handle, on: Handle) -> Result<()> {
        self.bind()?;
        check(
            // SAFETY: the caller's promise.
            unsafe { sys::cuGraphLaunch(graph as sys::CUgraphExec, stream(on)) },
            "start a graph",
        )
    }

    fn free_graph(&self, graph: Handle) {
        if self.bind().is_ok() {
            // SAFETY: came from `end_capture`.
            unsafe { sys::cuGraphExecDestroy(graph as sys::CUgraphExec) };
        }
    }
}
