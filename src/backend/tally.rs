//! Bytes that sequences hold: who allocates counts, and what is dropped is taken off again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A sum of bytes; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<AtomicUsize>);

impl Tally {
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `bytes` for as long as the result lives.
    pub fn count(&self, bytes: usize) -> Counted {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Counted {
            tally: self.clone(),
            bytes,
        }
    }
}

/// Bytes in a [`Tally`], to keep beside what they are the bytes of. A clone counts once more.
#[derive(Debug)]
pub struct Counted {
    tally: Tally,
    bytes: usize,
}

impl Counted {
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        self.tally.count(self.bytes)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.tally.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
