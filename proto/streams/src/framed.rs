//! Frames over any byte stream. A reader is cancel-safe, a writer is not: a future of it that is
//! dropped half-way leaves the stream unusable.

use std::io::{self, IoSlice};

use bytes::BytesMut;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use towline_proto::frame::{self, Frame, FrameKind, HEADER_LEN};

/// Room made for one read: grows with what really comes, never with what a header announces.
const READ_STEP: usize = 64 << 10;

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `inner`.
    pub fn new(inner: R) -> Self {
        Self::with_buffer(inner, BytesMut::new())
    }

    /// Reads frames from `inner`, of which `buffer` has been read already.
    pub fn with_buffer(inner: R, buffer: BytesMut) -> Self {
        Self { inner, buffer }
    }

    /// The next frame; `None` at the end of the stream. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            match frame::decode(&mut self.buffer) {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
            self.make_room();
            if self.inner.read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the stream ended in the middle of a frame",
                ));
            }
        }
    }

    /// The stream, and bytes of it that were read but are not yet a frame.
    pub fn into_parts(self) -> (R, BytesMut) {
        (self.inner, self.buffer)
    }

    /// The stream.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    fn make_room(&mut self) {
        if self.buffer.capacity() - self.buffer.len() < READ_STEP / 4 {
            self.buffer.reserve(READ_STEP);
        }
    }
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes frames to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner }
    }

    /// Writes one frame.
    pub async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let header = frame::header(frame.kind, frame.body.len());
        self.write_both(&header, &frame.body).await
    }

    /// Writes a frame that holds a message.
    pub async fn send_message(
        &mut self,
        kind: FrameKind,
        message: &impl Message,
    ) -> io::Result<()> {
        self.send(&Frame::message(kind, message)).await
    }

    /// Writes a STDIN, STDOUT or STDERR frame without copying its payload.
    pub async fn send_data(
        &mut self,
        kind: FrameKind,
        offset: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut head = [0; HEADER_LEN + 8];
        head[..HEADER_LEN].copy_from_slice(&frame::header(kind as u8, 8 + bytes.len()));
        head[HEADER_LEN..].copy_from_slice(&offset.to_le_bytes());
        self.write_both(&head, bytes).await
    }

    /// Says that no frame follows.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.inner.shutdown().await
    }

    /// The stream.
    pub fn into_inner(self) -> W {
        self.inner
    }

    /// The stream.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }

    async fn write_both(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut done = 0;
        if self.inner.is_write_vectored() {
            done = self.inner.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]).await?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        if done < head.len() {
            self.inner.write_all(&head[done..]).await?;
            done = head.len();
        }
        self.inner.write_all(&body[done - head.len()..]).await?;
        // Nothing is held back by the streams that are used, except a TLS or buffered one.
        self.inner.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_pass_and_a_cut_one_is_an_error() {
        let (near, far) = tokio::io::duplex(7);
        let sender = tokio::spawn(async move {
            let mut writer = FrameWriter::new(near);
            writer.send_data(FrameKind::Stdout, 5, b"hello").await.unwrap();
            writer.send(&Frame::raw(FrameKind::Pong, &b""[..])).await.unwrap();
            writer.get_mut().write_all(&[1, 9, 0]).await.unwrap();
        });
        let mut reader = FrameReader::new(far);
        let first = reader.next().await.unwrap().unwrap();
        assert_eq!(first.split_data().unwrap(), (5, bytes::Bytes::from_static(b"hello")));
        assert!(reader.next().await.unwrap().unwrap().is(FrameKind::Pong));
        let cut = reader.next().await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        sender.await.unwrap();
    }
}
