//! Device memory for many small things: pieces of a few large allocations.
//!
//! The driver hands out whole pages of 2 MiB; one allocation per matrix would waste a tenth of what
//! dense weights take.

use bytemuck::Pod;

use super::device::{Buffer, Device, Stream};
use crate::backend::Result;

/// Pieces start on 256 bytes, as allocations of their own would.
const ALIGN: usize = 256;
const CHUNK_BYTES: usize = 64 << 20;

pub struct Arena {
    device: Device,
    chunk_bytes: usize,
    /// Each with the bytes used so far
    chunks: Vec<(Buffer, usize)>,
}

impl Arena {
    pub fn new(device: &Device) -> Self {
        Arena {
            device: device.clone(),
            chunk_bytes: CHUNK_BYTES,
            chunks: Vec::new(),
        }
    }

    /// `bytes` zeroed bytes; the address stays valid while the arena lives.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn alloc(&mut self, bytes: usize, stream: &Stream) -> Result<u64> {
        let bytes = bytes.next_multiple_of(ALIGN).max(ALIGN);
        let room = self
            .chunks
            .iter_mut()
            .find(|(b, used)| b.bytes() - *used >= bytes);
        let (buffer, used) = match room {
            Some(found) => found,
            None => {
                // What is nearly a chunk gets an allocation of just its size.
                let size = if 2 * bytes > self.chunk_bytes {
                    bytes
                } else {
                    self.chunk_bytes
                };
                self.chunks.push((self.device.alloc(size, stream)?, 0));
                self.chunks.last_mut().expect("just pushed")
            }
        };
        let address = buffer.at(*used);
        *used += bytes;
        Ok(address)
    }

    /// Copies `data` to the device and waits.
    ///
    /// # Errors
    /// If the device's memory is short.
    pub fn upload<T: Pod>(&mut self, data: &[T], stream: &Stream) -> Result<u64> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let address = self.alloc(bytes.len(), stream)?;
        // SAFETY: the piece is as long as `bytes`, which live until the wait below.
        unsafe { stream.copy_to_device(address, bytes.as_ptr(), bytes.len())? };
        stream.synchronize()?;
        Ok(address)
    }

    /// Bytes taken from the device.
    pub fn bytes(&self) -> u64 {
        self.chunks.iter().map(|(b, _)| b.bytes() as u64).sum()
    }
}
