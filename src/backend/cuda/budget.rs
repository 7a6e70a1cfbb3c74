//! What the process holds on the device, and what its budget leaves.

use super::device::Device;
use crate::backend::{BackendError, Result};

/// Left free below the budget: the driver takes memory in pages, and grows a little at first
/// launches.
const MARGIN_BYTES: u64 = 48 << 20;

/// Memory others held on the device before this process made its context.
#[derive(Clone, Copy, Debug)]
pub struct Baseline {
    others: Option<u64>,
}

/// Follows this process's memory on a device.
#[derive(Clone, Debug)]
pub struct Usage {
    device: Device,
    others: u64,
}

impl Usage {
    /// Looks at the device before there is a context.
    pub fn before_context(index: usize) -> Baseline {
        let nvml = nvml_wrapper::Nvml::init().ok();
        let memory = nvml.and_then(|nvml| {
            let device = nvml.device_by_index(index as u32).ok()?;
            device.memory_info().ok()
        });
        Baseline {
            // The driver's own reserve counts as used there, and is not in what the context sees.
            others: memory.map(|m| m.total - m.free),
        }
    }

    /// A device that nobody else uses.
    pub fn alone(device: &Device) -> Usage {
        Baseline { others: None }.with(device)
    }

    /// Bytes held now, context included.
    pub fn now(&self) -> Result<u64> {
        let (free, total) = self.device.memory()?;
        Ok((total - free).saturating_sub(self.others))
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
            None => Err(BackendError::Other(format!(
                "the model without experts takes {held} B on the device, the budget is {budget} B; \
                 raise --vram, or lower --ctx"
            ))),
        }
    }
}

impl Baseline {
    /// Usage on the device that was looked at.
    pub fn with(self, device: &Device) -> Usage {
        Usage {
            device: device.clone(),
            others: self.others.unwrap_or(0),
        }
    }
}
