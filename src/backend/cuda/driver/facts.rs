//! What the real driver tells of devices and kernels, and how its errors read.

use std::ffi::CStr;
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use super::DeviceFacts;
use crate::backend::{BackendError, Result};

/// An error of the driver's, in its own words.
pub(super) fn check(result: CUresult, what: &str) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver stores the address of a static string, or leaves null.
    let described = unsafe { sys::cuGetErrorString(result, &mut text) };
    let reason = if described == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: a C string that lives as long as the driver.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    } else {
        format!("{result:?}")
    };
    Err(BackendError::Other(format!("CUDA: {what}: {reason}")))
}

/// Number of GPUs; `None` without a driver.
pub fn device_count() -> Option<usize> {
    // SAFETY: only looks whether the library loads.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let mut count = 0;
    // SAFETY: the library is there; both calls only write what they are given.
    let found = unsafe {
        sys::cuInit(0) == CUresult::CUDA_SUCCESS
            && sys::cuDeviceGetCount(&mut count) == CUresult::CUDA_SUCCESS
    };
    found.then_some(count as usize)
}

/// Bytes of each parameter of a kernel.
pub(super) fn parameter_sizes(function: sys::CUfunction) -> Vec<usize> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded, outputs are ours; beyond the last it is an error.
        let found =
            unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) };
        if found != CUresult::CUDA_SUCCESS {
            return sizes;
        }
        sizes.push(size);
    }
}

/// Facts about a device that is there.
pub(super) fn facts(device: sys::CUdevice) -> Result<DeviceFacts> {
    use sys::CUdevice_attribute as Attribute;
    let attribute = |a| -> Result<u32> {
        let mut value = 0;
        check(
            // SAFETY: the device exists.
            unsafe { sys::cuDeviceGetAttribute(&mut value, a, device) },
            "read attributes",
        )?;
        Ok(value as u32)
    };
    let mut name = [0u8; 256];
    let mut total_bytes = 0;
    // SAFETY: the buffer is as long as said.
    unsafe {
        check(
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device),
            "read the name",
        )?;
        check(
            sys::cuDeviceTotalMem_v2(&mut total_bytes, device),
            "read the size",
        )?;
    }
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(DeviceFacts {
        name: name.to_string_lossy().into_owned(),
        total_bytes: total_bytes as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
    })
}
