//! Reads our standard input on a thread of its own, because a read cannot be taken back.
//!
//! At most [`CHUNKS`] reads wait for the driver; the thread ends with the process.

use std::io;
use std::os::fd::AsFd;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::mpsc;
use towline_proto::limits::DATA_CHUNK_MAX;

/// Reads that may wait.
const CHUNKS: usize = 2;

/// Starts reading; the channel ends with the input.
pub(super) fn spawn() -> io::Result<mpsc::Receiver<Bytes>> {
    let (send, receive) = mpsc::channel(CHUNKS);
    std::thread::Builder::new().name("stdin".into()).spawn(move || read_all(&send))?;
    Ok(receive)
}

fn read_all(send: &mpsc::Sender<Bytes>) {
    let stdin = io::stdin();
    loop {
        match read_some(stdin.as_fd()) {
            Ok(bytes) if bytes.is_empty() => return,
            Ok(bytes) => {
                if send.blocking_send(bytes.into()).is_err() {
                    return;
                }
            }
            Err(error) => {
                // A terminal that is gone, a descriptor of another kind: no input from here on.
                tracing::debug!(%error, "standard input ended");
                return;
            }
        }
    }
}

fn read_some(fd: impl AsFd) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; DATA_CHUNK_MAX];
    loop {
        match rustix::io::read(&fd, &mut buffer[..]) {
            Ok(len) => {
                buffer.truncate(len);
                // What is held until acknowledged should not pin 64 KiB for each key typed.
                if len < DATA_CHUNK_MAX / 4 {
                    buffer.shrink_to_fit();
                }
                return Ok(buffer);
            }
            Err(Errno::INTR) => {}
            // Somebody who shares the descriptor made it non-blocking.
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
}
