//! Sequences in pinned RAM: snapshots, and sequences that wait.
//!
//! Keys and values lie there in pages of [`PAGE_TOKENS`] tokens, which snapshots of one sequence share:
//! only what came since the last one is copied. Pinning takes longer than copying, so memory that is no
//! longer needed waits for the next snapshot.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::device::{Device, Pinned, Stream};
use super::layout::StateLayout;
use crate::backend::executor::SharedPage;
use crate::backend::tally::{Counted, Tally};
use crate::backend::{BackendError, Result};

/// Tokens of a page.
pub const PAGE_TOKENS: usize = 256;

/// Pinned blocks of two sizes.
pub struct HostStore {
    device: Device,
    tally: Tally,
    fixed_bytes: usize,
    page_bytes: usize,
    /// Not in use: of states, and of pages
    free: Mutex<[Vec<Pinned<u8>>; 2]>,
}

/// What a block is for.
#[derive(Clone, Copy)]
enum Use {
    Fixed = 0,
    Page = 1,
}

/// Pinned memory that goes back to its store.
struct Block {
    memory: Option<Pinned<u8>>,
    of: Use,
    store: Arc<HostStore>,
    _counted: Counted,
}

// SAFETY: a block is written by its maker only, who waits for the device before sharing it.
unsafe impl Sync for Block {}

impl Block {
    fn memory(&self) -> &Pinned<u8> {
        self.memory.as_ref().expect("only dropping takes it")
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let (Some(memory), Ok(mut free)) = (self.memory.take(), self.store.free.lock()) {
            free[self.of as usize].push(memory);
        }
    }
}

impl HostStore {
    pub fn new(device: &Device, layout: &StateLayout) -> Self {
        let token_bytes: usize = layout.rows.iter().map(|rows| rows.row_bytes).sum();
        HostStore {
            device: device.clone(),
            tally: Tally::default(),
            fixed_bytes: layout.fixed.iter().map(Range::len).sum(),
            page_bytes: PAGE_TOKENS * token_bytes,
            free: Mutex::default(),
        }
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.tally.bytes()
    }

    fn block(self: &Arc<Self>, of: Use) -> Result<Block> {
        let bytes = [self.fixed_bytes, self.page_bytes][of as usize];
        let free = self
            .free
            .lock()
            .ok()
            .and_then(|mut free| free[of as usize].pop());
        let memory = match free {
            Some(memory) => memory,
            None => self.device.alloc_host(bytes)?,
        };
        Ok(Block {
            memory: Some(memory),
            of,
            store: self.clone(),
            _counted: self.tally.count(bytes),
        })
    }
}

/// Keys and values of up to [`PAGE_TOKENS`] tokens: of each of a layout's [`rows`](StateLayout::rows), that
/// many rows.
pub struct HostPage {
    block: Block,
}

/// A sequence in RAM.
pub struct HostState {
    /// Tokens seen
    pub position: usize,
    /// Rings and memories; absent of a model that has none
    fixed: Option<Block>,
    /// Of all tokens; the last may be in part
    pages: Vec<Arc<HostPage>>,
    /// Of the store, to know the model by
    sizes: [usize; 2],
}

impl HostState {
    /// Copies a state of `layout` at device address `base`, but for the pages that `known` has; waits.
    pub(super) fn save(
        store: &Arc<HostStore>,
        layout: &StateLayout,
        base: u64,
        position: usize,
        known: &[Arc<HostPage>],
        stream: &Stream,
    ) -> Result<Self> {
        let mut pages = known[..known.len().min(position / PAGE_TOKENS)].to_vec();
        let fixed = match store.fixed_bytes {
            0 => None,
            _ => Some(store.block(Use::Fixed)?),
        };
        let copied = copy_out(
            store,
            layout,
            base,
            position,
            &mut pages,
            fixed.as_ref(),
            stream,
        );
        // Whatever happened: the device must not write to memory that others may get.
        let waited = stream.synchronize();
        copied.and(waited)?;
        Ok(HostState {
            position,
            fixed,
            pages,
            sizes: [store.fixed_bytes, store.page_bytes],
        })
    }

    /// Copies it into a state of `layout` at device address `base`, and waits.
    ///
    /// # Errors
    /// If it was saved of another model or type of keys and values.
    pub(super) fn load(&self, layout: &StateLayout, base: u64, stream: &Stream) -> Result<()> {
        let token_bytes: usize = layout.rows.iter().map(|rows| rows.row_bytes).sum();
        let fixed_bytes: usize = layout.fixed.iter().map(Range::len).sum();
        if self.sizes != [fixed_bytes, PAGE_TOKENS * token_bytes] {
            return Err(BackendError::Other(
                "this snapshot was taken of another model, or with another --kv-dtype".into(),
            ));
        }
        let copied = self.copy_in(layout, base, stream);
        let waited = stream.synchronize();
        copied.and(waited)
    }

    fn copy_in(&self, layout: &StateLayout, base: u64, stream: &Stream) -> Result<()> {
        if let Some(fixed) = &self.fixed {
            let mut offset = 0;
            for range in &layout.fixed {
                let from = fixed.memory().pointer(offset);
                // SAFETY: `fixed` has all ranges one after the other, as the sizes say; awaited by the
                // caller.
                unsafe { stream.copy_to_device(base + range.start as u64, from, range.len())? };
                offset += range.len();
            }
        }
        for (i, page) in self.pages.iter().enumerate() {
            each_row(layout, self.position, i, |place, offset, bytes| {
                let from = page.block.memory().pointer(offset);
                // SAFETY: a page has room for the rows of its tokens; awaited by the caller.
                unsafe { stream.copy_to_device(base + place as u64, from, bytes) }
            })?;
        }
        Ok(())
    }

    /// Those pages whose tokens are all there.
    pub fn whole_pages(&self) -> &[Arc<HostPage>] {
        &self.pages[..self.position / PAGE_TOKENS]
    }

    /// Bytes of states of fixed size.
    pub fn own_bytes(&self) -> usize {
        self.fixed.as_ref().map_or(0, |_| self.sizes[0])
    }

    pub fn shared_pages(&self) -> Vec<SharedPage> {
        let page = |page: &Arc<HostPage>| SharedPage {
            id: Arc::as_ptr(page) as usize,
            bytes: self.sizes[1],
        };
        self.pages.iter().map(page).collect()
    }
}

/// Starts copies of what `pages` lacks of the first `position` tokens, and of states of fixed size.
fn copy_out(
    store: &Arc<HostStore>,
    layout: &StateLayout,
    base: u64,
    position: usize,
    pages: &mut Vec<Arc<HostPage>>,
    fixed: Option<&Block>,
    stream: &Stream,
) -> Result<()> {
    if let Some(fixed) = fixed {
        let mut offset = 0;
        for range in &layout.fixed {
            let to = fixed.memory().pointer(offset);
            // SAFETY: `fixed` has room for all ranges; awaited by the caller.
            unsafe { stream.copy_to_host(to, base + range.start as u64, range.len())? };
            offset += range.len();
        }
    }
    for i in pages.len()..position.div_ceil(PAGE_TOKENS) {
        let page = Arc::new(HostPage {
            block: store.block(Use::Page)?,
        });
        pages.push(page.clone());
        each_row(layout, position, i, |place, offset, bytes| {
            let to = page.block.memory().pointer(offset);
            // SAFETY: a page has room for the rows of its tokens; awaited by the caller.
            unsafe { stream.copy_to_host(to, base + place as u64, bytes) }
        })?;
    }
    Ok(())
}

/// Calls `copy(place in the state, offset in the page, bytes)` for all that page `i` holds of a sequence
/// of `position` tokens.
fn each_row(
    layout: &StateLayout,
    position: usize,
    i: usize,
    mut copy: impl FnMut(usize, usize, usize) -> Result<()>,
) -> Result<()> {
    let first = i * PAGE_TOKENS;
    let tokens = (position - first).min(PAGE_TOKENS);
    let mut offset = 0;
    for rows in &layout.rows {
        let place = rows.start + first * rows.row_bytes;
        copy(place, offset, tokens * rows.row_bytes)?;
        offset += PAGE_TOKENS * rows.row_bytes;
    }
    Ok(())
}
