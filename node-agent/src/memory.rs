//! Keeps the allocator from holding what was freed: looking at a machine's system takes a hundred
//! megabytes for a second, and an idle node agent should be small.
#![expect(unsafe_code, reason = "glibc's allocator is told by C functions")]

/// Allocations from this size on are mappings of their own, returned when they are freed. Set, it
/// stays; unset, glibc raises it with the first large allocation that is freed.
const MAPPED_FROM: libc::c_int = 256 << 10;
/// Arenas: each keeps its own leftovers.
const ARENAS_MAX: libc::c_int = 4;

/// Sets the allocator up. Call it before the first thread starts.
pub fn be_frugal() {
    // SAFETY: both options take any number and only change how glibc allocates from here on.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

/// Returns free memory to the system, after something large.
pub fn give_back() {
    // SAFETY: it may be called at any time by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
