//! Loop devices that the kernel frees by itself when their last mount goes.
#![expect(unsafe_code, reason = "the loop driver's ioctls have no safe form")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// Others may take the free device that was found; then the next is tried.
const TRIES_MAX: u32 = 64;

/// A loop device; open until it is mounted, or it would be freed at once.
pub(super) struct Loop {
    pub(super) path: PathBuf,
    _device: File,
}

/// Puts a loop device before the file.
pub(super) fn attach(file: &File, writable: bool) -> io::Result<Loop> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
    const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
    const READ_ONLY: u32 = 1;
    const AUTOCLEAR: u32 = 4;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // `struct loop_config`: fd, block_size, then `struct loop_info64`, whose flags are at word 13.
    let mut config = [0u32; 76];
    config[0] = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
    config[2 + 13] = AUTOCLEAR | if writable { 0 } else { READ_ONLY };
    for _ in 0..TRIES_MAX {
        // SAFETY: takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(writable).open(&path)?;
        // SAFETY: the struct is as long as the kernel's.
        let set = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) };
        match io::Error::last_os_error() {
            _ if set == 0 => return Ok(Loop { path, _device: device }),
            error if error.raw_os_error() == Some(libc::EBUSY) => {}
            error => return Err(error),
        }
    }
    Err(io::Error::other("no loop device is free"))
}
