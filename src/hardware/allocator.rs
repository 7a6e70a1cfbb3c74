//! The C library's allocator, told about a process that runs for long.

/// Has all threads allocate from few arenas, for a server: call it before there are other threads.
///
/// glibc gives threads up to eight arenas per core, each of which keeps the most that its threads ever used
/// at once; of a dozen threads that take turns at requests, each reaches that some hour or other, and the
/// process grows by megabytes meanwhile. Requests allocate little next to what they compute, so they don't
/// wait for each other here.
pub fn use_few_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const ARENAS: libc::c_int = 2;
        // SAFETY: sets a number inside the allocator, which takes it at any time.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }
}
