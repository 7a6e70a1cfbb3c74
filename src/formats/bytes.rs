//! A shared, immutable stretch of bytes: part of a mapped file, of the binary, or of memory, which may
//! be filled when it is read.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

use super::lazy::Lazy;

/// Bytes that stay valid for as long as anyone holds them; cloning and slicing copy nothing.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    range: Range<usize>,
    /// Of a lazy owner, the part that holds the range
    part: Option<usize>,
}

enum Owner {
    /// A file, read-only: pages that are dropped come back when they are read again
    File(Mmap),
    Lazy(Lazy),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Owner {
    fn len(&self) -> usize {
        match self {
            Owner::File(map) => map.len(),
            Owner::Lazy(lazy) => lazy.len(),
            Owner::Static(bytes) => bytes.len(),
            Owner::Owned(bytes) => bytes.len(),
        }
    }
}

/// Bytes around an access that the system maps at once (`fault_around_bytes`).
#[cfg(target_os = "linux")]
const FAULT_AROUND: usize = 64 << 10;

impl Bytes {
    /// Bytes of a file mapped for reading.
    pub fn of_file(map: Mmap) -> Self {
        Bytes::new(Owner::File(map))
    }

    /// Asks the system to read part of a file ahead; changes nothing else.
    pub fn read_ahead(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Owner::File(map) = &*self.owner {
            let start = self.range.start + range.start;
            // A refusal costs speed only.
            let _ = map.advise_range(memmap2::Advice::WillNeed, start, range.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Gives back the memory of part of a mapped file, which is read from the file again if anyone
    /// still wants it. Other bytes stay where they are.
    ///
    /// Of lazy memory it counts what was used, see [`Lazy::release`].
    pub fn release(&self, range: Range<usize>) {
        if let (Owner::Lazy(lazy), Some(part)) = (&*self.owner, self.part) {
            lazy.release(part, range.len());
        }
        #[cfg(target_os = "linux")]
        if let Owner::File(map) = &*self.owner {
            // All that reading this part can have mapped.
            let start = (self.range.start + range.start) / FAULT_AROUND * FAULT_AROUND;
            let end = (self.range.start + range.end).next_multiple_of(FAULT_AROUND);
            let len = end.min(map.len()) - start;
            // SAFETY: this is a private mapping of a file that nothing writes to through it, so
            // dropped pages come back with the same bytes, also under readers of this moment.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len)
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    fn new(owner: Owner) -> Self {
        let range = 0..owner.len();
        Bytes {
            owner: Arc::new(owner),
            range,
            part: None,
        }
    }

    /// Without reading them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The same bytes, in memory of their own if they are part of lazy memory, which would be kept for
    /// them.
    pub fn detached(&self) -> Bytes {
        let (Owner::Lazy(lazy), Some(part)) = (&*self.owner, self.part) else {
            return self.clone();
        };
        let whole = self.range.len() == lazy.part_len(part);
        if whole && !lazy.is_filled(part) {
            let mut bytes = vec![0; self.range.len()];
            lazy.fill_into(part, &mut bytes);
            return Bytes::from(bytes);
        }
        let bytes = self.to_vec();
        self.release(0..self.range.len());
        Bytes::from(bytes)
    }

    /// The part of these bytes that `range` names, relative to their start.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let start = self.range.start;
        let range = start + range.start..start + range.end;
        let part = match &*self.owner {
            Owner::Lazy(lazy) => lazy.part_of(&range),
            _ => None,
        };
        Bytes {
            owner: Arc::clone(&self.owner),
            range,
            part,
        }
    }
}

impl From<Lazy> for Bytes {
    fn from(lazy: Lazy) -> Self {
        Bytes::new(Owner::Lazy(lazy))
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
        match &*self.owner {
            Owner::File(map) => &map[self.range.clone()],
            Owner::Lazy(lazy) => lazy.bytes(self.part, self.range.clone()),
            Owner::Static(bytes) => &bytes[self.range.clone()],
            Owner::Owned(bytes) => &bytes[self.range.clone()],
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}
