//! The two ends' loops over the pipe: write what the session has to say in large batches, read what
//! comes, find where sessions start.
//!
//! A guest's port reports its end while no node is connected; only the marker of a new session counts.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep};
use towline_proto::mux::End;
use towline_proto::mux::preamble::{
    Found, GuestScan, HostScan, Marker, Nonce, answer, pad_after, preamble,
};
use towline_proto::mux::terms::Terms;

use super::shared::Shared;
use super::{GuestSession, handles};

/// Bytes written at once: a guest's port takes 32 KiB, and a pad may follow a node's batch.
const BATCH: usize = 32 << 10;
/// Room for what is read: many reads of a guest's port (4 KiB each) share one allocation.
const READ_ROOM: usize = 128 << 10;
/// Least room that a read is offered.
const READ_ROOM_MIN: usize = 4 << 10;
/// Reads taken before it is written again.
const READS_PER_ROUND: usize = 16;
/// How long a guest waits before it asks its port again while no node is connected: at first, and
/// at most, doubling between.
const ABSENT_PAUSE: Duration = Duration::from_millis(5);
const ABSENT_PAUSE_MAX: Duration = Duration::from_millis(80);

pub(super) async fn run_host<S>(
    io: S,
    shared: Arc<Shared>,
    markers: Vec<Marker>,
    nonce: Nonce,
    terms: Terms,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _end = EndOnDrop(Arc::clone(&shared));
    let mut pipe = Pipe::new(io);
    pipe.out = BytesMut::from(&preamble(&markers, &nonce, terms)[..]);
    let mut scan = HostScan::new(&markers, &nonce);
    let result = poll_fn(|cx| {
        loop {
            if let Some(error) = shared.error() {
                return Poll::Ready(Err(error));
            }
            let wrote = pipe.poll_write(cx, |cx, out| {
                shared.transmit(cx, out, BATCH);
                pad_after(out, &markers);
            })?;
            let read = pipe.poll_read(cx, |bytes| match bytes {
                Some(bytes) => take_from_guest(&shared, &mut scan, bytes),
                None => Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the guest link's socket was closed by the other side",
                )),
            })?;
            if !wrote && !read {
                return Poll::<io::Result<()>>::Pending;
            }
        }
    })
    .await;
    if let Err(error) = &result {
        shared.end(error.kind(), &error.to_string());
    }
    result
}

fn take_from_guest(shared: &Shared, scan: &mut HostScan, bytes: Bytes) -> io::Result<()> {
    let agreed = scan.terms().is_some();
    let bytes = scan.push(bytes).map_err(invalid)?;
    if let Some(terms) = scan.terms().filter(|_| !agreed) {
        shared.agree(terms);
    }
    shared.receive(bytes).map_err(invalid)
}

pub(super) async fn run_guest<S>(
    io: S,
    ours: Terms,
    mut scan: GuestScan,
    marker: Arc<Mutex<Marker>>,
    sessions: mpsc::Sender<GuestSession>,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut pipe = Pipe::new(io);
    let mut current: Option<(Arc<Shared>, EndOnDrop)> = None;
    let mut found = Vec::new();
    let mut pause: Option<Pin<Box<Sleep>>> = None;
    let mut absent_pause = ABSENT_PAUSE;
    poll_fn(|cx| {
        loop {
            let wrote = match &current {
                Some((shared, _)) => {
                    pipe.poll_write(cx, |cx, out| shared.transmit(cx, out, BATCH))?
                }
                None => false,
            };
            if let Some(wait) = &mut pause {
                ready!(wait.as_mut().poll(cx));
                pause = None;
            }
            let mut absent = false;
            let read = pipe.poll_read(cx, |bytes| {
                match bytes {
                    Some(bytes) => {
                        let wanted = *marker.lock().unwrap_or_else(PoisonError::into_inner);
                        if wanted != scan.marker() {
                            scan.set_marker(wanted);
                        }
                        scan.push(bytes, &mut found);
                    }
                    None => absent = true,
                }
                Ok(())
            })?;
            for item in found.drain(..) {
                match item {
                    Found::Session(nonce, host) => {
                        current = None;
                        let answer = answer(&scan.marker(), &nonce, ours.answer_to(host));
                        match start_session(&sessions, ours, host) {
                            Some(session) => current = Some(session),
                            None => continue,
                        }
                        pipe.out = BytesMut::from(&answer[..]);
                    }
                    Found::Bytes(bytes) => {
                        let Some((shared, _)) = &current else { continue };
                        if let Err(error) = shared.receive(bytes) {
                            shared.end(io::ErrorKind::InvalidData, &error.to_string());
                            current = None;
                            scan.end_session();
                        }
                    }
                }
            }
            if read {
                absent_pause = ABSENT_PAUSE;
            }
            if absent {
                pause = Some(Box::pin(sleep(absent_pause)));
                absent_pause = (absent_pause * 2).min(ABSENT_PAUSE_MAX);
            } else if !wrote && !read {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Makes a session and hands it out; `None` while nobody takes the ones before, or at all.
fn start_session(
    sessions: &mpsc::Sender<GuestSession>,
    ours: Terms,
    host: Terms,
) -> Option<(Arc<Shared>, EndOnDrop)> {
    let shared = Arc::new(Shared::new(End::Guest, ours));
    shared.agree(host);
    let end = EndOnDrop(Arc::clone(&shared));
    let (handle, incoming) = handles(&shared);
    sessions.try_send(GuestSession { handle, incoming }).ok()?;
    Some((shared, end))
}

/// Fails a session's handles when its driver is gone.
struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(io::ErrorKind::ConnectionReset, "the guest link's session is over");
    }
}

/// The pipe with its two buffers.
struct Pipe<S> {
    io: S,
    out: BytesMut,
    room: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Pipe<S> {
    fn new(io: S) -> Self {
        Self { io, out: BytesMut::with_capacity(BATCH + 64), room: BytesMut::new() }
    }

    /// Writes until the pipe is full or there is nothing more; whether anything moved.
    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        mut fill: impl FnMut(&mut Context<'_>, &mut BytesMut),
    ) -> io::Result<bool> {
        let mut moved = false;
        loop {
            if self.out.is_empty() {
                self.out.clear();
                fill(cx, &mut self.out);
                if self.out.is_empty() {
                    return Ok(moved);
                }
            }
            match Pin::new(&mut self.io).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(len)) => {
                    self.out.advance(len);
                    moved = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(moved),
            }
        }
    }

    /// Reads what is there, up to a bound; `None` is the pipe's end. Whether anything came.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(Option<Bytes>) -> io::Result<()>,
    ) -> io::Result<bool> {
        let (mut end, mut came) = (false, false);
        for _ in 0..READS_PER_ROUND {
            if self.room.capacity() - self.room.len() < READ_ROOM_MIN {
                if !self.room.is_empty() {
                    came = true;
                    take(Some(self.room.split().freeze()))?;
                }
                self.room.reserve(READ_ROOM);
            }
            match poll_read_into(&mut self.io, cx, &mut self.room) {
                Poll::Ready(Ok(0)) => {
                    end = true;
                    break;
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        if !self.room.is_empty() {
            came = true;
            take(Some(self.room.split().freeze()))?;
        }
        if end {
            take(None)?;
        }
        Ok(came)
    }
}

fn poll_read_into<S: AsyncRead + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    room: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    tokio_util::io::poll_read_buf(Pin::new(io), cx, room)
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Gives so many bytes, and then none for now.
    struct Once(usize);

    impl AsyncRead for Once {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let len = self.0.min(into.remaining());
            if len == 0 {
                return Poll::Pending;
            }
            into.put_slice(&vec![1; len]);
            self.0 -= len;
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Once {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// What was taken may have something to be written follow, which nothing else wakes the driver
    /// for: also when it was taken because the room was nearly full.
    #[test]
    fn whatever_comes_is_said_to_have_come() {
        for bytes in (1..200).chain(READ_ROOM - READ_ROOM_MIN..READ_ROOM + READ_ROOM_MIN) {
            let mut pipe = Pipe::new(Once(bytes));
            let mut taken = 0;
            let mut cx = Context::from_waker(Waker::noop());
            let came = pipe.poll_read(&mut cx, |bytes| {
                taken += bytes.map_or(0, |bytes| bytes.len());
                Ok(())
            });
            assert_eq!((came.unwrap(), taken), (true, bytes));
            assert!(!pipe.poll_read(&mut cx, |_| unreachable!()).unwrap());
        }
    }
}
