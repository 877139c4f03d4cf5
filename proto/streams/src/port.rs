//! A guest's virtio-serial port as an async pipe.
//!
//! The kernel reports hang-up while no node is connected, and tokio remembers a hang-up for ever; so
//! the port is registered anew then. A read of zero bytes means "nobody there", not the end.
#![expect(unsafe_code, reason = "tokio asks for a promise about the file's descriptor")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Linux' O_NONBLOCK, the same on all its 64-bit machines that have virtio-serial ports.
const O_NONBLOCK: i32 = 0o4000;
/// What the driver takes in one write.
const WRITE_MAX: usize = 32 << 10;
/// How long a writer waits before it asks again after a hang-up.
const PAUSE: Duration = Duration::from_millis(5);

/// An open virtio-serial port. A port can be opened once only.
#[derive(Debug)]
pub struct Port {
    /// `None` only inside `renew`.
    file: Option<AsyncFd<File>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Port {
    /// Opens the port's device. Must be called within a tokio runtime with IO and time.
    pub fn open(device: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(device)?;
        Ok(Self { file: Some(register(file)?), pause: None })
    }

    /// Finds the device of the port with this name, from /sys.
    pub fn find(name: &str) -> io::Result<std::path::PathBuf> {
        for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
            let entry = entry?;
            let found = std::fs::read_to_string(entry.path().join("name"));
            if found.is_ok_and(|found| found.trim_end() == name) {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port is named `{name}`")))
    }

    fn file(&self) -> io::Result<&AsyncFd<File>> {
        self.file.as_ref().ok_or_else(|| io::Error::other("the port could not be registered anew"))
    }

    /// Registers the port anew, which forgets a hang-up that was seen.
    fn renew(&mut self) -> io::Result<()> {
        if let Some(old) = self.file.take() {
            self.file = Some(register(old.into_inner())?);
        }
        Ok(())
    }

    fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        Poll::Ready(())
    }
}

fn register(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns one descriptor, which stays the same and open until it is dropped.
    unsafe { Ok(AsyncFd::register(file)?) }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.file()?.poll_read_ready(cx))?;
            let hung_up = guard.ready().is_read_closed();
            let result = guard.try_io(|file| file.get_ref().read(into.initialize_unfilled()));
            match result {
                Ok(Ok(0)) => {
                    self.renew()?;
                    return Poll::Ready(Ok(()));
                }
                Ok(Ok(len)) => {
                    into.advance(len);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // The node is back, but tokio remembers that it was away.
                Err(_) if hung_up => self.renew()?,
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_pause(cx));
        loop {
            let mut guard = ready!(self.file()?.poll_write_ready(cx))?;
            let hung_up = guard.ready().is_write_closed();
            let piece = &bytes[..bytes.len().min(WRITE_MAX)];
            match guard.try_io(|file| file.get_ref().write(piece)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_) if hung_up => {
                    // Nobody takes it now. The reader sees when somebody does; ask again later.
                    self.renew()?;
                    self.pause = Some(Box::pin(sleep(PAUSE)));
                    ready!(self.poll_pause(cx));
                }
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
