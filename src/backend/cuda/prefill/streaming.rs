//! All missing experts of a long chunk on their way: groups of neighbours, gate and up of a layer's, then down.

use super::chunk::{Chunk, Uses};
use super::{Group, RING};
use crate::backend::Result;
use crate::planning::execution::Streaming;

impl Chunk<'_> {
    /// Where a part of each expert lies in its blob, and how long it is: gate and up, or down.
    pub fn part(&self, part: usize) -> (usize, usize) {
        let layout = &self.cuda.model.store.layout;
        let (up_bytes, blob_bytes) = (layout.down_offset as usize, layout.blob_bytes as usize);
        match part {
            0 => (0, up_bytes),
            _ => (up_bytes, blob_bytes - up_bytes),
        }
    }

    /// Where a ring buffer holds a group's expert, whose part there is `width` long.
    pub fn in_ring(&self, buffer: usize, group: &Group, expert: usize, width: usize) -> u64 {
        let group_bytes = self.cuda.prefill.sizes.ring_buffer_bytes(Streaming::All);
        let offset = buffer * group_bytes + (expert - group.first) * width;
        self.at(self.places.ring + offset)
    }

    /// Has copies go as far ahead of the kernels as the ring allows.
    ///
    /// # Errors
    /// If the driver reports one.
    pub fn stream_ahead(&self, groups: &[Vec<Group>], uses: &mut Uses) -> Result<()> {
        let end = uses.all.len().min(uses.computed + RING);
        for &(layer, group, part) in &uses.all[uses.sent..end] {
            self.stream_in(layer, &groups[layer][group], part)?;
        }
        uses.sent = end;
        Ok(())
    }

    /// Copies a part of a group's missing experts into its ring buffer.
    fn stream_in(&self, layer: usize, group: &Group, part: usize) -> Result<()> {
        let cuda = self.cuda;
        let copies = cuda.copies;
        let blob_bytes = cuda.model.store.layout.blob_bytes as usize;
        let (offset, width) = self.part(part);
        let Some(buffer) = group.ring.map(|buffers| buffers[part]) else {
            return Ok(());
        };
        copies.wait(&cuda.prefill.free[buffer])?;
        let missing = |e: usize| cuda.model.store.resident(layer, e) == 0;
        let mut expert = group.first;
        let end = group.first + group.count;
        while expert < end {
            let run = (expert..end).take_while(|&e| missing(e)).count();
            if run > 0 {
                let (from, _) = cuda.model.store.blob(layer, expert);
                let to = self.in_ring(buffer, group, expert, width);
                // SAFETY: `run` blobs follow each other in the store, and the buffer has room for
                // all experts of the group.
                unsafe {
                    copies.copy_rows_to_device(to, from.add(offset), width, blob_bytes, run)?;
                }
            }
            expert += run.max(1);
        }
        copies.record(&cuda.prefill.ready[buffer])
    }
}
