//! Bytes both ways between a client's socket and a link's stream, each way until its own end.
//!
//! Nothing is kept beyond one piece per way: a slow reader slows the writer down. A client that is
//! gone ends both ways; one that only has nothing more to say ends its own.

use std::io::{self, IoSlice};

use bytes::{Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use towline_link::stream::{LinkRecv, LinkSend, RESET_CANCELLED};

/// Bytes read at once from the client.
const PIECE: usize = 64 << 10;
/// Packets taken at once from the link.
const CHUNKS: usize = 64;

/// How the client's way ended.
enum Up {
    /// It has nothing more to say, and listens.
    Finished,
    /// It went away.
    Gone,
}

/// Copies until both ways have ended, the client is gone, or the link's stream breaks.
pub(super) async fn copy_both(
    client: &mut UnixStream,
    mut receive: LinkRecv,
    mut send: LinkSend,
) -> io::Result<()> {
    let (mut read, mut write) = client.split();
    let gone = {
        let mut up = std::pin::pin!(copy_up(&mut read, &mut send));
        let mut down = std::pin::pin!(copy_down(&mut receive, &mut write));
        tokio::select! {
            ended = &mut up => match ended {
                Ok(Up::Gone) => true,
                // The node may have stopped listening with an answer still on its way.
                Ok(Up::Finished) | Err(_) => {
                    down.await?;
                    false
                }
            },
            ended = &mut down => {
                ended?;
                // The node has said all. What the client still says goes on, if anybody listens.
                let _ = up.await;
                false
            }
        }
    };
    if gone {
        let _ = receive.stop(RESET_CANCELLED);
    }
    Ok(())
}

async fn copy_up(read: &mut ReadHalf<'_>, send: &mut LinkSend) -> io::Result<Up> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(PIECE);
        if read.read_buf(&mut buffer).await? == 0 {
            send.shutdown().await?;
            return Ok(if is_gone(read.as_ref()) { Up::Gone } else { Up::Finished });
        }
        send.write_chunk(buffer.split().freeze()).await?;
    }
}

async fn copy_down(receive: &mut LinkRecv, write: &mut WriteHalf<'_>) -> io::Result<()> {
    let mut chunks: Vec<Bytes> = vec![Bytes::new(); CHUNKS];
    while let Some(count) = receive.read_chunks(&mut chunks).await? {
        write_all(write, &mut chunks[..count]).await?;
    }
    write.shutdown().await
}

async fn write_all(write: &mut WriteHalf<'_>, chunks: &mut [Bytes]) -> io::Result<()> {
    let mut first = 0;
    while first < chunks.len() {
        let slices: Vec<IoSlice<'_>> = chunks[first..].iter().map(|c| IoSlice::new(c)).collect();
        let mut written = write.write_vectored(&slices).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while first < chunks.len() && written >= chunks[first].len() {
            written -= chunks[first].len();
            chunks[first] = Bytes::new();
            first += 1;
        }
        if written > 0 {
            let _ = chunks[first].split_to(written);
        }
    }
    Ok(())
}

/// Whether the other end of the socket is closed both ways, not only for writing.
pub(super) fn is_gone(client: &UnixStream) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
