//! Keeps what `tow` was given by its shell (a lock, a pipe) from living on in the daemon.

#![expect(unsafe_code, reason = "a descriptor that is known only by its number")]

use std::fs;
use std::os::fd::BorrowedFd;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Marks every descriptor beyond the standard three as not for children. What cannot be listed or
/// marked is left as it is: that costs a descriptor, nothing more.
pub(super) fn keep_to_ourselves() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<i32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|&number| number > 2) {
        // SAFETY: only flags of the descriptor are read and set, at once; one that was closed
        // meanwhile (that of the listing itself is) gives EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if let Ok(flags) = fcntl_getfd(fd) {
            let _ = fcntl_setfd(fd, flags | FdFlags::CLOEXEC);
        }
    }
}
