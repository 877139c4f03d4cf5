//! One end of a durable connection over real IO: a local socket on one side, one link after another
//! on the other. What is sent, kept and acknowledged is `towline_proto::durable`'s to decide.
//!
//! [`Pipe::local`] serves the socket for as long as the connection lives; [`Pipe::carry`] serves one
//! link and says why it ended. They share the state under a short lock, which is never held over an
//! await, and tell each other about changes.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use towline_proto::durable::{Durable, DurableError, Outgoing, Write};
use towline_proto::frame::FrameKind;
use towline_proto::limits::DATA_CHUNK_MAX;
use towline_proto::v1::StreamError;

use crate::{FrameReader, FrameWriter};

/// How long what came before a reset may take to be written: its reader may never read again.
const RESET_DRAIN_MAX: Duration = Duration::from_secs(2);

/// Memory that several pipes share; beyond the bound each is held to little.
#[derive(Debug)]
pub struct Memory {
    held: AtomicUsize,
    max: usize,
}

/// A socket that a pipe serves.
pub trait Socket: Send {
    /// Both directions.
    fn halves(
        &mut self,
    ) -> (impl AsyncRead + Unpin + Send + '_, impl AsyncWrite + Unpin + Send + '_);
    /// Ends it so that its peer sees a broken connection, where it can be told so.
    fn reset(self);
}

/// Why a link was left.
#[derive(Debug)]
pub enum Over {
    /// Both directions ended and both ends know.
    Complete,
    /// One end reset the connection.
    Reset,
    /// The link broke: take the connection up again.
    Cut,
    /// The connection has another link now.
    TakenOver,
    /// The other end gave up.
    Refused(StreamError),
    /// The other end broke the protocol.
    Broken(DurableError),
}

/// Names a link of a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment(u64);

/// One end of a durable connection.
#[derive(Debug)]
pub struct Pipe {
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
    memory: Arc<Memory>,
}

#[derive(Debug, Default)]
struct Inner {
    state: Durable,
    attachment: u64,
    attached: bool,
    /// What the peer said before its reset is written.
    reset_passed_on: bool,
    local_ended: bool,
}

enum Next {
    Send(Outgoing),
    Over(Over),
}

impl Memory {
    /// A bound for all pipes that get it.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { held: AtomicUsize::new(0), max })
    }

    fn count(&self, before: usize, after: usize) {
        match after.checked_sub(before) {
            Some(more) => self.held.fetch_add(more, Ordering::Relaxed),
            None => self.held.fetch_sub(before - after, Ordering::Relaxed),
        };
    }

    fn is_short(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.max
    }
}

impl Pipe {
    /// A new connection.
    pub fn new(memory: &Arc<Memory>) -> Arc<Self> {
        let inner = Mutex::default();
        Arc::new(Self { inner, changed: watch::Sender::new(()), memory: Arc::clone(memory) })
    }

    /// Serves the local socket until the connection has ended for it.
    pub async fn local(&self, mut socket: impl Socket) {
        let was_reset = {
            let (read, write) = socket.halves();
            let both = async { tokio::join!(self.read_all(read), self.write_all(write)) };
            let drained = async {
                self.until(|inner| inner.state.is_reset().then_some(())).await;
                tokio::time::sleep(RESET_DRAIN_MAX).await;
            };
            let broken = |inner: &mut Inner| {
                (inner.reset_passed_on || inner.state.is_locally_reset()).then_some(())
            };
            tokio::select! {
                biased;
                () = self.until(broken) => true,
                () = drained => true,
                _ = both => false,
            }
        };
        if was_reset {
            socket.reset();
        }
        self.change(|inner| inner.local_ended = true);
    }

    async fn read_all(&self, mut from: impl AsyncRead + Unpin) {
        let mut buffer = BytesMut::new();
        loop {
            let room = |inner: &mut Inner| Some(inner.state.room()).filter(|&room| room > 0);
            let room = self.until(room).await.min(DATA_CHUNK_MAX);
            buffer.reserve(room);
            let read = (&mut from).take(room as u64).read_buf(&mut buffer).await;
            match read {
                Ok(0) => return self.change(|inner| inner.state.on_read_end()),
                Ok(_) => {
                    let bytes = buffer.split().freeze();
                    self.change(|inner| inner.state.on_read(bytes));
                }
                Err(_) => return self.change(|inner| inner.state.on_local_reset()),
            }
        }
    }

    async fn write_all(&self, mut to: impl AsyncWrite + Unpin) {
        loop {
            let wrote = match self.until(|inner| inner.state.next_write()).await {
                Write::Bytes(bytes) => match to.write(&bytes).await {
                    Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                    Ok(len) => {
                        self.change(|inner| inner.state.written(len));
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                Write::End => {
                    // Who has left already needs no end.
                    let _ = to.shutdown().await;
                    return self.change(|inner| inner.state.end_written());
                }
                Write::Reset => return self.change(|inner| inner.reset_passed_on = true),
            };
            if wrote.is_err() {
                return self.change(|inner| inner.state.on_local_reset());
            }
        }
    }

    /// A link is there, whose other end has received this much. The link before is left.
    pub fn attach(&self, peer_received: u64) -> Result<Attachment, DurableError> {
        self.change(|inner| {
            inner.state.attach(peer_received)?;
            inner.attachment += 1;
            inner.attached = true;
            Ok(Attachment(inner.attachment))
        })
    }

    /// Serves one link.
    pub async fn carry<R, W>(
        &self,
        attachment: Attachment,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
    ) -> Over
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let over = tokio::select! {
            over = self.receive(attachment, reader) => over,
            over = self.send(attachment, writer) => over,
        };
        self.change(|inner| {
            if inner.attachment == attachment.0 {
                inner.state.detach();
                inner.attached = false;
            }
        });
        over
    }

    async fn receive<R: AsyncRead + Unpin>(
        &self,
        attachment: Attachment,
        reader: &mut FrameReader<R>,
    ) -> Over {
        loop {
            let Ok(Some(frame)) = reader.next().await else {
                let ended = |inner: &mut Inner| inner.over(attachment).unwrap_or(Over::Cut);
                return self.change(ended);
            };
            if frame.is(FrameKind::Error) {
                return Over::Refused(frame.decode().unwrap_or_default());
            }
            let taken = self.change(|inner| match inner.attachment == attachment.0 {
                true => inner.state.on_frame(&frame).map_err(Over::Broken),
                false => Err(Over::TakenOver),
            });
            if let Err(over) = taken {
                return over;
            }
        }
    }

    async fn send<W: AsyncWrite + Unpin>(
        &self,
        attachment: Attachment,
        writer: &mut FrameWriter<W>,
    ) -> Over {
        loop {
            let next = self.until(|inner| {
                if inner.attachment != attachment.0 {
                    return Some(Next::Over(Over::TakenOver));
                }
                let outgoing = inner.state.next_outgoing().map(Next::Send);
                outgoing.or_else(|| inner.over(attachment).map(Next::Over))
            });
            let sent = match next.await {
                Next::Over(over) => return over,
                Next::Send(Outgoing::Data(offset, bytes)) => {
                    writer.send_data(FrameKind::TcpData, offset, &bytes).await
                }
                Next::Send(outgoing) => writer.send(&outgoing.to_frame()).await,
            };
            if sent.is_err() {
                return Over::Cut;
            }
        }
    }

    /// Waits until there is something to send, or `bound` has passed.
    pub async fn first(&self, bound: Duration, max: usize) -> Bytes {
        let some = self.until(|inner| (inner.state.out_held() > 0).then_some(()));
        let _ = tokio::time::timeout(bound, some).await;
        self.change(|inner| inner.state.first(max))
    }

    /// Takes first bytes that came with the open.
    pub fn on_first(&self, bytes: Bytes) -> Result<(), DurableError> {
        self.change(|inner| inner.state.on_data(0, bytes))
    }

    /// What was received: said when a link is taken up.
    pub fn received_offset(&self) -> u64 {
        self.lock().state.received_offset()
    }

    /// Whether the local socket was told all that the peer had to say.
    pub fn is_in_ended(&self) -> bool {
        self.lock().state.is_in_ended()
    }

    /// Whether the local socket needs nothing more.
    pub fn is_local_ended(&self) -> bool {
        self.lock().local_ended
    }

    /// Waits until the local socket broke.
    pub async fn locally_reset(&self) {
        self.until(|inner| inner.state.is_locally_reset().then_some(())).await;
    }

    /// Whether a link serves it; and the number of links so far.
    pub fn attached(&self) -> (bool, u64) {
        let inner = self.lock();
        (inner.attached, inner.attachment)
    }

    /// Gives the connection up: the local socket is reset, and a link is left.
    pub fn abandon(&self) {
        self.change(|inner| inner.state.abandon());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let result = self.locked(change);
        self.changed.send_replace(());
        result
    }

    /// Changes the state and keeps the count of all memory right.
    fn locked<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.state.held();
        inner.state.set_pressed(self.memory.is_short());
        let result = change(&mut inner);
        self.memory.count(before, inner.state.held());
        result
    }

    /// Waits until `found` finds something in the state. Cancel-safe.
    async fn until<T>(&self, mut found: impl FnMut(&mut Inner) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            if let Some(result) = self.locked(&mut found) {
                return result;
            }
            // The sender lives in `self`, so this only fails when nobody can be here.
            let _ = changes.changed().await;
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.memory.count(self.lock().state.held(), 0);
    }
}

impl Inner {
    fn over(&self, attachment: Attachment) -> Option<Over> {
        if self.attachment != attachment.0 {
            Some(Over::TakenOver)
        } else if self.state.is_complete() {
            Some(Over::Complete)
        } else if self.state.is_reset() {
            Some(Over::Reset)
        } else {
            None
        }
    }
}

impl Socket for TcpStream {
    fn halves(
        &mut self,
    ) -> (impl AsyncRead + Unpin + Send + '_, impl AsyncWrite + Unpin + Send + '_) {
        self.split()
    }

    fn reset(self) {
        // Then closing it sends a RST.
        let _ = self.set_zero_linger();
    }
}

impl Socket for UnixStream {
    fn halves(
        &mut self,
    ) -> (impl AsyncRead + Unpin + Send + '_, impl AsyncWrite + Unpin + Send + '_) {
        self.split()
    }

    fn reset(self) {}
}
