//! The two halves of a stream as tokio sees them. Dropping a half that has not come to its end tells
//! the other end so.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use towline_proto::mux::StreamId;

use super::shared::Shared;

/// Slices looked at in one vectored write: a header and a body need two.
const SLICES_MAX: usize = 8;

/// Writes one stream. `shutdown` says that nothing follows and waits until all of it is under way;
/// dropping it before resets the stream.
#[derive(Debug)]
pub struct MuxSend {
    shared: Arc<Shared>,
    id: StreamId,
}

/// Reads one stream. Dropping it before its end makes the other end's writes fail.
#[derive(Debug)]
pub struct MuxRecv {
    shared: Arc<Shared>,
    id: StreamId,
}

pub(super) fn pair(shared: &Arc<Shared>, id: StreamId) -> (MuxSend, MuxRecv) {
    (MuxSend { shared: Arc::clone(shared), id }, MuxRecv { shared: Arc::clone(shared), id })
}

impl MuxSend {
    /// Gives up: the other end's reader gets an error with this code.
    pub fn reset(self, code: u32) {
        self.shared.reset(self.id, code);
    }
}

impl Drop for MuxSend {
    fn drop(&mut self) {
        self.shared.release_sender(self.id);
    }
}

impl Drop for MuxRecv {
    fn drop(&mut self) {
        self.shared.release_receiver(self.id);
    }
}

impl AsyncWrite for MuxSend {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.shared.poll_write(cx, self.id, &[bytes])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut list: [&[u8]; SLICES_MAX] = [&[]; SLICES_MAX];
        for (place, slice) in list.iter_mut().zip(slices) {
            *place = slice;
        }
        self.shared.poll_write(cx, self.id, &list)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The driver holds nothing back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.poll_finish(cx, self.id)
    }
}

impl AsyncRead for MuxRecv {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let space = into.initialize_unfilled();
        if space.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let len = std::task::ready!(self.shared.poll_read(cx, self.id, space))?;
        into.advance(len);
        Poll::Ready(Ok(()))
    }
}
