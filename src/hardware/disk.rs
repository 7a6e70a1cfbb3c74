//! Room on the disk, asked before work that needs it.

use std::path::Path;

/// Bytes that an unprivileged program may still write to the file system of `path`; `None` where
/// the system does not tell.
#[cfg(unix)]
pub fn free_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;

    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in 0, and `stats` is a place for one `statvfs`.
    let failed = unsafe { libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) } != 0;
    if failed {
        return None;
    }
    // SAFETY: filled in by the successful call.
    let stats = unsafe { stats.assume_init() };
    // The fields are narrower on other systems.
    #[allow(clippy::unnecessary_cast)]
    (stats.f_bavail as u64).checked_mul(stats.f_frsize as u64)
}

#[cfg(not(unix))]
pub fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(unix)]
    fn the_folder_of_temporary_files_has_room() {
        assert!(super::free_bytes(&std::env::temp_dir()).is_some());
        assert!(super::free_bytes("/no/such/folder".as_ref()).is_none());
    }
}
