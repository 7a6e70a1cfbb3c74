//! Large zeroed arrays on huge pages, where weights live.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Zeroable;

use crate::backend::{BackendError, Result};

/// Bytes of a huge page on x86-64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// `len` zeroed elements in anonymous memory of their own, on huge pages if the system has them.
pub struct Huge<T> {
    data: NonNull<T>,
    len: usize,
    /// Start and length of the mapping, which is larger than the data by the alignment.
    mapping: (*mut libc::c_void, usize),
}

// SAFETY: `Huge` owns its memory as `Box<[T]>` does; nothing else points into it.
unsafe impl<T: Send> Send for Huge<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: Sync> Sync for Huge<T> {}

impl<T: Zeroable> Huge<T> {
    /// Reserves the memory; the system backs pages when they are first written.
    ///
    /// # Errors
    /// If the system has no room for it.
    pub fn zeroed(len: usize) -> Result<Self> {
        let bytes = len * size_of::<T>();
        if bytes == 0 {
            return Ok(Huge {
                data: NonNull::dangling(),
                len,
                mapping: (std::ptr::null_mut(), 0),
            });
        }
        let align = if bytes >= HUGE_PAGE_BYTES {
            HUGE_PAGE_BYTES
        } else {
            align_of::<T>()
        };
        let mapped = bytes + align;
        // SAFETY: a new private mapping touches no memory that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(BackendError::Other(format!(
                "no memory for {bytes} bytes of weights: {}",
                std::io::Error::last_os_error()
            )));
        }
        let offset = start.align_offset(align);
        // SAFETY: `offset < align`, so the result and `bytes` after it lie inside the mapping.
        let data = unsafe { start.byte_add(offset) };
        // Refused only where the kernel has no huge pages: slower, not wrong.
        // SAFETY: the range is inside the mapping just made.
        unsafe { libc::madvise(data, bytes, libc::MADV_HUGEPAGE) };
        Ok(Huge {
            data: NonNull::new(data.cast()).expect("mmap never returns null"),
            len,
            mapping: (start, mapped),
        })
    }
}

impl<T> Deref for Huge<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `data` is aligned, and `len` elements there are zeroed or were written since.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Huge<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T> Drop for Huge<T> {
    fn drop(&mut self) {
        let (start, bytes) = self.mapping;
        if bytes > 0 {
            // SAFETY: this is the mapping made in `zeroed`, and no reference outlives `self`.
            unsafe { libc::munmap(start, bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_starts_as_zeros_and_keeps_what_is_written() {
        for len in [0, 1, 1000, 3 << 20] {
            let mut memory = Huge::<u32>::zeroed(len).unwrap();
            assert!(memory.iter().all(|&v| v == 0));
            for (i, v) in memory.iter_mut().enumerate() {
                *v = i as u32;
            }
            assert!(memory.iter().enumerate().all(|(i, &v)| v == i as u32));
        }
    }

    #[test]
    fn large_arrays_start_on_a_huge_page() {
        let memory = Huge::<u8>::zeroed(5 << 20).unwrap();
        assert_eq!(memory.as_ptr().align_offset(HUGE_PAGE_BYTES), 0);
    }
}
