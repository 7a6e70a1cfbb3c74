//! A shared, immutable stretch of bytes: part of a mapped file, of the binary, or of memory.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// Bytes that stay valid for as long as anyone holds them; cloning and slicing copy nothing.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    range: Range<usize>,
}

enum Owner {
    Mapped(Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Owner {
    fn as_slice(&self) -> &[u8] {
        match self {
            Owner::Mapped(map) => map,
            Owner::Static(bytes) => bytes,
            Owner::Owned(bytes) => bytes,
        }
    }
}

impl Bytes {
    fn new(owner: Owner) -> Self {
        let range = 0..owner.as_slice().len();
        Bytes {
            owner: Arc::new(owner),
            range,
        }
    }

    /// The part of these bytes that `range` names, relative to their start.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        Bytes {
            owner: Arc::clone(&self.owner),
            range: start + range.start..start + range.end,
        }
    }
}

impl From<Mmap> for Bytes {
    fn from(map: Mmap) -> Self {
        Bytes::new(Owner::Mapped(map))
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Self {
        Bytes::new(Owner::Static(bytes))
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::new(Owner::Owned(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_slice()[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}
