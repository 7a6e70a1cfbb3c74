//! What the GPU tests run on.
#![allow(dead_code)] // each test binary uses its part

use moectl::backend::cuda::device::Device;

/// The first GPU; else the emulator, if it is built in; else `None`, after saying so.
pub fn open_device() -> Option<Device> {
    #[cfg(feature = "cuda")]
    if moectl::backend::cuda::driver::device_count().is_some_and(|count| count > 0) {
        return Some(Device::open(0).expect("the driver shows a device"));
    }
    #[cfg(feature = "emulate")]
    {
        use moectl::backend::cuda::driver::Emulated;
        println!("no CUDA device: on the emulator");
        Some(Device::new(std::sync::Arc::new(Emulated::default())))
    }
    #[cfg(not(feature = "emulate"))]
    {
        println!("skipped: no CUDA device");
        None
    }
}

/// Whether no real GPU is there; what takes too long then, or looks at its memory, is left out.
pub fn is_emulated(device: &Device) -> bool {
    device.facts().name.starts_with("emulated")
}
