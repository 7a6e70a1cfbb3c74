//! What the process holds on the device, and what its budget leaves.

use std::sync::Arc;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;

use super::device::Device;
use crate::backend::{BackendError, Result};
use crate::planning::execution::MARGIN_BYTES;

/// Follows this process's memory on a device.
#[derive(Clone)]
pub struct Usage {
    device: Device,
    /// The driver's management library and the device's number there, where it tells of processes
    driver: Option<(Arc<Nvml>, u32)>,
}

impl Usage {
    pub fn of(device: &Device, index: usize) -> Usage {
        let driver = Nvml::init().ok().map(|nvml| (Arc::new(nvml), index as u32));
        let driver = driver.filter(|(nvml, index)| process_bytes(nvml, *index).is_some());
        Usage {
            device: device.clone(),
            driver,
        }
    }

    /// A device that nobody else uses.
    pub fn alone(device: &Device) -> Usage {
        Usage {
            device: device.clone(),
            driver: None,
        }
    }

    /// Bytes held now, context included: the driver's own figure for this process, or, where it has
    /// none, all that is in use on the device.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn now(&self) -> Result<u64> {
        let of_process = self.driver.as_ref();
        if let Some(bytes) = of_process.and_then(|(nvml, index)| process_bytes(nvml, *index)) {
            return Ok(bytes);
        }
        let (free, total) = self.device.memory()?;
        Ok(total - free)
    }

    /// Bytes that may still be taken under `budget`, or of all that is free.
    ///
    /// # Errors
    /// If more is held than the budget allows.
    pub fn room(&self, budget: Option<u64>) -> Result<u64> {
        let (free, _) = self.device.memory()?;
        let free = free.saturating_sub(MARGIN_BYTES);
        let Some(budget) = budget else {
            return Ok(free);
        };
        let held = self.now()?;
        match budget.checked_sub(held) {
            Some(left) => Ok(left.saturating_sub(MARGIN_BYTES).min(free)),
            None => Err(BackendError::DoesNotFit {
                needed: held,
                budget,
            }),
        }
    }
}

/// Whether `bytes` more may be taken under `budget`.
///
/// # Errors
/// [`BackendError::DoesNotFit`].
pub(super) fn check(usage: &Usage, budget: Option<u64>, bytes: usize) -> Result<()> {
    let Some(limit) = budget else {
        return Ok(());
    };
    let (room, bytes) = (usage.room(budget)?, bytes as u64);
    match bytes <= room {
        true => Ok(()),
        false => Err(BackendError::DoesNotFit {
            needed: limit - room + bytes,
            budget: limit,
        }),
    }
}

/// Bytes that this process holds on the device, as the driver counts them.
fn process_bytes(nvml: &Nvml, index: u32) -> Option<u64> {
    let device = nvml.device_by_index(index).ok()?;
    let own = std::process::id();
    let processes = device.running_compute_processes().ok()?;
    let found = processes.iter().find(|process| process.pid == own)?;
    match found.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    }
}
