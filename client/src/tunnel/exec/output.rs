//! Writes a command's output to our own descriptors, on one thread, in the order of arrival.
//!
//! The queue has no bound of its own: only what was written is acknowledged, so the guest's
//! window ([`towline_proto::limits::UNACKED_MAX`], checked in `client.rs`) bounds it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc as blocking;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::client::Stream;

/// What became of one piece.
#[derive(Debug)]
pub(super) enum Written {
    /// So many bytes are out.
    Bytes(Stream, usize),
    /// Nobody reads any more, or the disk is full: the rest was dropped.
    Failed(Stream, usize, io::Error),
}

/// The thread's queue.
#[derive(Debug)]
pub(super) struct Output {
    queue: blocking::Sender<(Stream, Bytes)>,
    written: mpsc::UnboundedReceiver<Written>,
}

impl Output {
    pub(super) fn spawn() -> io::Result<Self> {
        let (queue, pieces) = blocking::channel::<(Stream, Bytes)>();
        let (report, written) = mpsc::unbounded_channel();
        std::thread::Builder::new().name("output".into()).spawn(move || {
            for (stream, bytes) in pieces {
                let outcome = match write(stream, &bytes) {
                    Ok(()) => Written::Bytes(stream, bytes.len()),
                    Err(errno) => Written::Failed(stream, bytes.len(), errno.into()),
                };
                if report.send(outcome).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { queue, written })
    }

    /// Queues a piece.
    pub(super) fn write(&self, stream: Stream, bytes: Bytes) {
        // The thread ends only when this value is gone.
        let _ = self.queue.send((stream, bytes));
    }

    /// Waits for the next piece to be out. Cancel-safe.
    pub(super) async fn written(&mut self) -> Option<Written> {
        self.written.recv().await
    }
}

fn write(stream: Stream, bytes: &[u8]) -> Result<(), Errno> {
    match stream {
        Stream::Stdout => write_all(io::stdout().as_fd(), bytes),
        Stream::Stderr => write_all(io::stderr().as_fd(), bytes),
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
