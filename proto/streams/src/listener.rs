//! The guest's end of a guest link that is a listening socket: whoever connects last is the node.
//!
//! It behaves as the virtio-serial port does, whose place it takes: a node that goes away is no
//! end, and what is written while nobody is connected waits. It never polls.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

/// A listening socket.
pub trait Accept {
    /// What a connection is.
    type Stream: AsyncRead + AsyncWrite + Unpin;

    /// Takes the next one.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Stream>>;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        Self::poll_accept(self, cx).map_ok(|(stream, _)| stream)
    }
}

/// A listening socket, as one pipe.
#[derive(Debug)]
pub struct LinkListener<L: Accept> {
    listener: L,
    node: Option<L::Stream>,
    /// Wants to write and waits for a node.
    writer: Option<Waker>,
}

impl LinkListener<UnixListener> {
    /// Takes a listening Unix socket. Must be called within a tokio runtime with IO.
    pub fn of_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::new(UnixListener::from_std(listener)?))
    }
}

impl<L: Accept> LinkListener<L> {
    /// Takes a listening socket.
    pub fn new(listener: L) -> Self {
        Self { listener, node: None, writer: None }
    }

    /// Takes whoever has connected since; the newest is the node.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let Poll::Ready(accepted) = self.listener.poll_accept(cx) {
            match accepted {
                Ok(stream) => {
                    self.node = Some(stream);
                    if let Some(writer) = self.writer.take() {
                        writer.wake();
                    }
                }
                // It has hung up before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl<L: Accept + Unpin> AsyncRead for LinkListener<L> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_accept(cx)?;
        let Some(node) = &mut self.node else { return Poll::Pending };
        let before = into.filled().len();
        match Pin::new(node).poll_read(cx, into) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if into.filled().len() > before => Poll::Ready(Ok(())),
            // The node is gone; the accept above has left a waker for the next.
            Poll::Ready(_) => {
                self.node = None;
                Poll::Pending
            }
        }
    }
}

impl<L: Accept + Unpin> AsyncWrite for LinkListener<L> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(node) = &mut self.node {
            match Pin::new(node).poll_write(cx, bytes) {
                // The reader sees the node's end, and drops it.
                Poll::Ready(Err(_)) => {}
                other => return other,
            }
        }
        self.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn one_node_follows_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut guest = LinkListener::of_unix(listener).unwrap();

        // Written before anybody is there: the first to come gets it.
        let write = async {
            guest.write_all(b"hello").await.unwrap();
            // Waiting to write does not accept; reading does, and wakes the writer.
        };
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), write).await;
        assert!(early.is_err(), "nobody takes it yet");

        let mut first = UnixStream::connect(&path).await.unwrap();
        first.write_all(b"1").await.unwrap();
        let mut byte = [0];
        guest.read_exact(&mut byte).await.unwrap();
        guest.write_all(b"a").await.unwrap();
        first.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, *b"a");

        // The second takes over although the first is still there.
        let mut second = UnixStream::connect(&path).await.unwrap();
        second.write_all(b"2").await.unwrap();
        guest.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, *b"2");
        assert_eq!(first.read(&mut byte).await.unwrap(), 0, "the first is hung up on");

        // Its end is not the guest's.
        drop(second);
        let mut third = UnixStream::connect(&path).await.unwrap();
        third.write_all(b"3").await.unwrap();
        guest.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, *b"3");
        guest.write_all(b"c").await.unwrap();
        third.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte, *b"c");
    }
}
