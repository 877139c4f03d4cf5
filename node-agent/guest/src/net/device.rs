//! The TUN device that all of the workload's packets to the outside go through: made, given its
//! addresses and routes, and read and written as packets.
//!
//! Works in whatever network namespace the caller is in. Root in the sandbox may undo all of it, and
//! gains nothing: nothing else leads out.
#![expect(
    unsafe_code,
    reason = "TUNSETIFF has no safe form; tokio asks for a promise about the descriptor"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::fs::{Mode, OFlags};
use tokio::io::unix::AsyncFd;

use super::netlink::Netlink;

/// What `ip link` in the sandbox shows.
const NAME: &str = "tow0";
const TUN: &str = "/dev/net/tun";

/// The device. Closing it removes it.
#[derive(Debug)]
pub struct Tun {
    file: AsyncFd<OwnedFd>,
}

impl Tun {
    /// Makes the device in this network namespace, with its addresses and the default routes. Must
    /// be called within a tokio runtime with IO.
    pub fn create() -> io::Result<Self> {
        let named = |what: &'static str| {
            move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"))
        };
        let file = open().map_err(named("cannot make the network device by /dev/net/tun"))?;
        let mut netlink = Netlink::open(NAME).map_err(named("cannot find the network device"))?;
        netlink.set_up().map_err(named("cannot set the network device up"))?;
        // SAFETY: an `OwnedFd` is one descriptor, which stays the same and open until it is dropped.
        let file = unsafe { AsyncFd::register(file)? };
        Ok(Self { file })
    }

    /// Reads one packet.
    pub fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.file.poll_read_ready(cx))?;
            match guard.try_io(|file| Ok(rustix::io::read(file.get_ref(), &mut *into)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_) => {}
            }
        }
    }

    /// Sends one packet. One that the kernel has no room for is lost, as on any link.
    pub fn send(&self, packet: &[u8]) {
        let _ = rustix::io::write(self.file.get_ref(), packet);
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(TUN, flags, Mode::empty())?;
    // SAFETY: all-zero is a valid ifreq, whose name keeps its final NUL; the kernel reads it, and
    // writes the name back into it.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(NAME.as_bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL;
        request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request)
    };
    if result == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}
