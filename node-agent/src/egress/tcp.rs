//! Bytes between a guest and what was dialled for it, each way until its own end.
//!
//! A way that ends well is half-closed. One that breaks breaks the other too, by a reset on both
//! sides: nobody takes a cut upload for a whole one.

use std::io;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use towline_streams::{FrameReader, FrameWriter};

/// Bytes that are carried at once, to begin with and at most: idle connections hold little.
const FIRST: usize = 4 << 10;
const BUFFER_MAX: usize = 64 << 10;

/// A connection that is reset when it is dropped before its end.
#[derive(Debug)]
pub(super) struct Upstream {
    stream: TcpStream,
    clean: bool,
}

impl Upstream {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, clean: false }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !self.clean {
            // Closing sends RST then.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// Says that it is open, then copies until both ways have ended or one broke.
pub(super) async fn relay<R, W>(
    mut upstream: Upstream,
    guest_reader: FrameReader<R>,
    mut guest_writer: FrameWriter<W>,
) -> io::Result<(u64, u64)>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    super::say_opened(&mut guest_writer).await?;
    let (from_guest, first) = guest_reader.into_parts();
    let (from, mut to) = upstream.stream.split();
    let up = async {
        to.write_all(&first).await?;
        copy(from_guest, to).await
    };
    let done = tokio::try_join!(up, copy(from, guest_writer.into_inner()));
    upstream.clean = done.is_ok();
    done
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<u64> {
    let mut buffer = vec![0; FIRST];
    let mut total = 0;
    loop {
        let len = from.read(&mut buffer).await?;
        if len == 0 {
            to.shutdown().await?;
            return Ok(total);
        }
        to.write_all(&buffer[..len]).await?;
        to.flush().await?;
        total += len as u64;
        if len == buffer.len() && len < BUFFER_MAX {
            buffer.resize(len * 2, 0);
        }
    }
}
