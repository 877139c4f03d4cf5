//! Streams of a link: a framed reader and writer over one QUIC stream each way.
//!
//! A stream's first frame is OPEN. A [`LinkSend`] that is dropped without `finish` (`shutdown`)
//! resets the stream, so that a peer never takes a broken one for one that ended.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
pub use quinn::RecvStream as LinkRecv;
use quinn::VarInt;
use tokio::io::AsyncWrite;
use towline_proto::v1::stream_open::Kind;
use towline_streams::{FrameReader, FrameWriter};

/// The stream's other side (guest, process, `tow`) went away.
pub const RESET_BROKEN: VarInt = VarInt::from_u32(1);
/// Nobody wants it any more.
pub const RESET_CANCELLED: VarInt = VarInt::from_u32(2);
/// The first frame was not one that this end serves.
pub const RESET_UNKNOWN: VarInt = VarInt::from_u32(3);

/// Who goes first when a link is full; higher goes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Packs, archives.
    Bulk = 10,
    /// Forwarded connections.
    Tcp = 60,
    /// What changed.
    SyncMeta = 80,
    /// A file that somebody waits for.
    Demand = 90,
    /// Terminals and processes.
    #[default]
    Exec = 100,
    /// Pings, lists.
    Control = 120,
}

impl Priority {
    /// The priority of a stream that is opened so.
    pub fn of(kind: Option<&Kind>) -> Self {
        match kind {
            Some(Kind::Exec(_)) => Self::Exec,
            Some(Kind::Files(_)) => Self::SyncMeta,
            Some(Kind::Fuse(_)) => Self::Demand,
            Some(
                Kind::ImageImport(_)
                | Kind::ImagePull(_)
                | Kind::ImageExport(_)
                | Kind::ImagePush(_)
                | Kind::Copy(_)
                | Kind::Diff(_)
                | Kind::Save(_)
                | Kind::Layer(_),
            ) => Self::Bulk,
            Some(Kind::Tcp(_) | Kind::Egress(_)) => Self::Tcp,
            Some(
                Kind::Control(_)
                | Kind::Ping(_)
                | Kind::ExecList(_)
                | Kind::Lookup(_)
                | Kind::ImageCollect(_)
                | Kind::Feed(_)
                | Kind::PortList(_)
                | Kind::Forward(_),
            )
            | None => Self::Control,
        }
    }
}

/// Both directions of a stream.
#[derive(Debug)]
pub struct LinkStream {
    /// What the peer sends.
    pub reader: FrameReader<LinkRecv>,
    /// What the peer is sent.
    pub writer: FrameWriter<LinkSend>,
}

impl LinkStream {
    pub(crate) fn new(receive: LinkRecv, send: quinn::SendStream, priority: Priority) -> Self {
        let send = LinkSend { inner: send, finished: false };
        send.set_priority(priority);
        Self { reader: FrameReader::new(receive), writer: FrameWriter::new(send) }
    }

    /// The bare streams, for splicing, and the bytes that were read and not yet taken.
    pub fn into_io(self) -> (LinkRecv, BytesMut, LinkSend) {
        let (receive, rest) = self.reader.into_parts();
        (receive, rest, self.writer.into_inner())
    }

    /// Gives the stream up both ways; the peer sees the code instead of an orderly end.
    pub fn reset(self, code: VarInt) {
        let (mut receive, _, send) = self.into_io();
        let _ = receive.stop(code);
        send.reset(code);
    }
}

/// What the peer is sent.
#[derive(Debug)]
pub struct LinkSend {
    inner: quinn::SendStream,
    finished: bool,
}

impl LinkSend {
    /// Changes what this end sends first. A stream that has ended already is left alone.
    pub fn set_priority(&self, priority: Priority) {
        let _ = self.inner.set_priority(priority as i32);
    }

    /// Sends a piece of bytes without copying it.
    pub async fn write_chunk(&mut self, chunk: Bytes) -> io::Result<()> {
        Ok(self.inner.write_chunk(chunk).await?)
    }

    /// Gives it up: what was not yet sent is not sent, and the peer sees the code.
    pub fn reset(mut self, code: VarInt) {
        self.finished = true;
        let _ = self.inner.reset(code);
    }

    /// Waits until the peer has everything, or wants nothing more. Only after `shutdown`.
    pub async fn acknowledged(&self) -> io::Result<()> {
        self.inner.stopped().await?;
        Ok(())
    }
}

impl Drop for LinkSend {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.inner.reset(RESET_BROKEN);
        }
    }
}

impl AsyncWrite for LinkSend {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.inner), cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished = true;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
