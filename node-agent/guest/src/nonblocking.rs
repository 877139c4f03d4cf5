//! A descriptor of a pipe, terminal or device in tokio's reactor.
//!
//! tokio remembers a hang-up for ever, though a terminal can be opened again: a caller that finds
//! nothing to read on a hung-up descriptor is made to wait a tick instead of spinning.
#![expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;

/// How often a hung-up descriptor is asked again.
const HUNG_UP_TICK: Duration = Duration::from_millis(20);

/// A non-blocking descriptor.
#[derive(Debug)]
pub(crate) struct NonBlocking {
    fd: AsyncFd<OwnedFd>,
}

impl NonBlocking {
    /// Takes the descriptor over and makes it non-blocking. Needs a tokio runtime with IO.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: an `OwnedFd` is one descriptor, the same and open until it is dropped.
        Ok(Self { fd: unsafe { AsyncFd::register(fd) }? })
    }

    /// Reads what is there; `WouldBlock` when nothing is.
    pub(crate) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.fd.get_ref(), &mut *into) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Writes what fits; `WouldBlock` when nothing does.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(self.fd.get_ref(), bytes) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Waits until it is readable, and leaves it so: for a pidfd, which stays readable for ever.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        self.fd.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads as soon as something is there. Cancel-safe.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.fd.readable().await?;
            match guard.try_io(|_| self.try_read(into)) {
                Ok(result) => return result,
                Err(_) if guard.ready().is_read_closed() => tokio::time::sleep(HUNG_UP_TICK).await,
                Err(_) => {}
            }
        }
    }

    /// Writes as soon as something fits. Cancel-safe.
    pub(crate) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.fd.writable().await?;
            match guard.try_io(|_| self.try_write(bytes)) {
                Ok(result) => return result,
                Err(_) if guard.ready().is_write_closed() => {
                    tokio::time::sleep(HUNG_UP_TICK).await;
                }
                Err(_) => {}
            }
        }
    }
}

impl AsFd for NonBlocking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}
