//! Forwarded connections from the laptop to a port in the sandbox, each by an id that outlives its
//! links: a client that comes back with the id goes on where it was, nothing lost or doubled.
//!
//! Only the sandbox's loopback can be reached. A connection whose link is gone is kept for a while,
//! then reset. The number of connections and the memory of all together are bounded.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use towline_proto::frame::FrameKind;
use towline_proto::limits::{TCP_FIRST_BYTES_MAX, TCP_STREAMS_MAX};
use towline_proto::v1::{StreamErrorCode, TcpConnected, TcpOpen, tcp_open::How};
use towline_streams::{Attachment, FrameReader, FrameWriter, Memory, Over, Pipe, Socket};

use crate::dial::Dialler;
use crate::forward::Forwards;
use crate::refusal::Refusal;

/// How long a connection without a link is kept: a laptop that sleeps over lunch finds it again.
const DETACHED_MAX: Duration = Duration::from_secs(60 * 60);
/// Bytes of all connections in memory before each is held to little: the agent must stay small
/// beside the workload.
const HELD_MAX: usize = 16 << 20;

/// A connection's id, as the client chose it.
type Key = [u8; 16];

/// All forwarded connections.
#[derive(Debug)]
pub struct TcpTable {
    entries: Mutex<BTreeMap<Key, Arc<Entry>>>,
    memory: Arc<Memory>,
    forwards: Arc<Forwards>,
    dialler: Arc<Dialler>,
}

#[derive(Debug)]
struct Entry {
    pipe: Arc<Pipe>,
    /// Whether the local end is there: `None` while it is being made.
    made: watch::Sender<Option<Result<(), Refusal>>>,
}

impl TcpTable {
    /// A table without connections; those that `forwards` announces can be taken through it.
    pub fn new(forwards: Arc<Forwards>) -> Arc<Self> {
        let (memory, dialler) = (Memory::new(HELD_MAX), Arc::default());
        Arc::new(Self { entries: Mutex::default(), memory, forwards, dialler })
    }

    /// How many connections are kept.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of an id, and whether it is new.
    fn insert(&self, key: Key) -> Result<(Arc<Entry>, bool), Refusal> {
        let mut entries = self.lock();
        if let Some(entry) = entries.get(&key) {
            return Ok((Arc::clone(entry), false));
        }
        if entries.len() >= TCP_STREAMS_MAX {
            // One that had a link and lost it, not one that is being made.
            let is_lost = |entry: &Entry| matches!(entry.pipe.attached(), (false, 1..));
            let lost = entries.iter().find(|(_, entry)| is_lost(entry));
            let Some(lost) = lost.map(|(key, _)| *key) else {
                return Err(Refusal::new(
                    StreamErrorCode::Limit,
                    format!("the sandbox has {TCP_STREAMS_MAX} forwarded connections already"),
                ));
            };
            if let Some(lost) = entries.remove(&lost) {
                lost.pipe.abandon();
            }
        }
        let entry =
            Arc::new(Entry { pipe: Pipe::new(&self.memory), made: watch::Sender::new(None) });
        entries.insert(key, Arc::clone(&entry));
        Ok((entry, true))
    }

    fn find(&self, key: &Key) -> Result<Arc<Entry>, Refusal> {
        self.lock().get(key).cloned().ok_or_else(|| {
            Refusal::new(
                StreamErrorCode::UnknownExec,
                "the sandbox does not know this connection: it ended, or the sandbox was restarted",
            )
        })
    }

    fn forget(&self, key: &Key, entry: &Arc<Entry>) {
        let mut entries = self.lock();
        if entries.get(key).is_some_and(|found| Arc::ptr_eq(found, entry)) {
            entries.remove(key);
        }
    }

    /// Makes the local end in a task of its own, and serves it: a client that leaves meanwhile must
    /// not leave half a connection.
    fn make<S: Socket + 'static>(
        self: &Arc<Self>,
        key: Key,
        entry: &Arc<Entry>,
        socket: impl Future<Output = Result<S, Refusal>> + Send + 'static,
    ) {
        let (table, entry) = (Arc::clone(self), Arc::clone(entry));
        tokio::spawn(async move {
            match socket.await {
                Ok(socket) => {
                    entry.made.send_replace(Some(Ok(())));
                    entry.pipe.local(socket).await;
                }
                Err(refusal) => {
                    table.forget(&key, &entry);
                    entry.made.send_replace(Some(Err(refusal)));
                }
            }
        });
    }

    /// A connection that lost its link is reset when nobody takes it up in time.
    fn expire(self: &Arc<Self>, key: Key, entry: &Arc<Entry>) {
        let (table, entry) = (Arc::clone(self), Arc::downgrade(entry));
        let Some(before) = entry.upgrade().map(|entry| entry.pipe.attached().1) else { return };
        tokio::spawn(async move {
            tokio::time::sleep(DETACHED_MAX).await;
            if let Some(entry) = entry.upgrade()
                && entry.pipe.attached() == (false, before)
            {
                table.forget(&key, &entry);
                entry.pipe.abandon();
            }
        });
    }
}

/// Serves one stream whose OPEN was read.
pub async fn serve<R, W>(
    table: &Arc<TcpTable>,
    open: TcpOpen,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if let Err(refusal) = serve_or_refuse(table, open, &mut reader, &mut writer).await {
        // A stream that is broken cannot be told.
        let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
    }
    let _ = writer.finish().await;
}

async fn serve_or_refuse<R, W>(
    table: &Arc<TcpTable>,
    open: TcpOpen,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Result<(), Refusal>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let key = Key::try_from(&open.stream_id[..])
        .map_err(|_| Refusal::invalid("a connection's id has 16 bytes"))?;
    let (entry, peer_received) = find_or_make(table, key, open.how)?;
    made(&entry).await?;
    let protocol =
        |error: towline_proto::durable::DurableError| Refusal::invalid(error.to_string());
    let attachment = entry.pipe.attach(peer_received).map_err(|error| {
        table.forget(&key, &entry);
        entry.pipe.abandon();
        protocol(error)
    })?;
    let over = carry(&entry, attachment, reader, writer).await;
    match over {
        Over::Complete | Over::Reset => table.forget(&key, &entry),
        Over::TakenOver => {}
        Over::Cut => table.expire(key, &entry),
        Over::Refused(_) | Over::Broken(_) => {
            table.forget(&key, &entry);
            entry.pipe.abandon();
        }
    }
    match over {
        Over::Broken(error) => Err(protocol(error)),
        Over::TakenOver => Err(Refusal::new(
            StreamErrorCode::TakenOver,
            "the connection was taken up by another stream",
        )),
        Over::Complete | Over::Reset | Over::Cut | Over::Refused(_) => Ok(()),
    }
}

async fn carry<R, W>(
    entry: &Entry,
    attachment: Attachment,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Over
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let connected = TcpConnected { received_offset: entry.pipe.received_offset() };
    // Both must be possible at once; a client that is gone already is noticed by `carry`.
    let _ = writer.send_message(FrameKind::TcpConnected, &connected).await;
    entry.pipe.carry(attachment, reader, writer).await
}

/// The connection that is meant, made if it should be; and what the client has received of it.
fn find_or_make(
    table: &Arc<TcpTable>,
    key: Key,
    how: Option<How>,
) -> Result<(Arc<Entry>, u64), Refusal> {
    match how {
        Some(How::Resume(resume)) => Ok((table.find(&key)?, resume.received_offset)),
        Some(How::Connect(connect)) => {
            let port = u16::try_from(connect.port).ok().filter(|&port| port > 0);
            let port = port.ok_or_else(|| {
                Refusal::invalid(format!("{} is no port; 1 to 65535 are", connect.port))
            })?;
            if connect.first.len() > TCP_FIRST_BYTES_MAX {
                return Err(Refusal::invalid("too many first bytes"));
            }
            let (entry, is_new) = table.insert(key)?;
            if is_new {
                let first = entry.pipe.on_first(Bytes::from(connect.first));
                first.map_err(|error| Refusal::invalid(error.to_string()))?;
                let dialler = Arc::clone(&table.dialler);
                table.make(key, &entry, async move { dialler.dial(port).await });
            }
            Ok((entry, 0))
        }
        Some(How::Accept(accept)) => {
            let id = accept.connection_id;
            let (entry, is_new) = table.insert(key)?;
            if is_new {
                let taken = table.forwards.take(&id);
                table.make(key, &entry, async { taken });
            }
            Ok((entry, 0))
        }
        None => Err(Refusal::invalid("a connection is made, accepted or resumed")),
    }
}

async fn made(entry: &Entry) -> Result<(), Refusal> {
    let mut made = entry.made.subscribe();
    let gone = || Refusal::new(StreamErrorCode::Internal, "the connection's task died");
    let made = made.wait_for(Option::is_some).await.map_err(|_| gone())?;
    made.clone().unwrap_or_else(|| Err(gone()))
}
