//! Listeners in the sandbox whose connections the laptop takes: an agent's socket that was asked for
//! with `--forward ssh-agent`, and nothing else.
//!
//! The socket is in a folder of its own that only the sandbox's user may enter. It lives as long as
//! the client that asked for it: a link that breaks is given time to come back, a client that leaves
//! ends it. Connections that wait to be taken are bounded in number and time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    ForwardAccepted, ForwardListening, ForwardOpen, StreamErrorCode, User, forward_open::Listener,
};
use towline_streams::{FrameReader, FrameWriter};

use crate::refusal::Refusal;

/// Listeners at once.
const FORWARDS_MAX: usize = 64;
/// Connections of one listener that wait to be taken.
const WAITING_MAX: usize = 32;
/// How long a connection waits to be taken, and a listener for its client to come back.
const TAKE_MAX: Duration = Duration::from_secs(60);
/// The socket's name in its folder.
const SOCKET: &str = "agent.sock";

type Key = [u8; 16];

/// All listeners, and the connections that wait.
#[derive(Debug, Default)]
pub struct Forwards {
    listeners: Mutex<BTreeMap<Key, Arc<Forward>>>,
    waiting: Mutex<BTreeMap<Key, UnixStream>>,
}

/// One listener.
#[derive(Debug)]
struct Forward {
    path: Vec<u8>,
    _folder: Folder,
    listener: UnixListener,
    /// Counts the clients' streams: the newest serves it.
    stream: watch::Sender<u64>,
}

/// The folder of a socket, removed with it.
#[derive(Debug)]
struct Folder {
    run: OwnedFd,
    name: String,
}

impl Forwards {
    /// Takes a connection that was announced.
    pub(crate) fn take(&self, id: &[u8]) -> Result<UnixStream, Refusal> {
        let gone = || {
            Refusal::new(StreamErrorCode::NotFound, "nobody waits with this connection any more")
        };
        let key = Key::try_from(id).map_err(|_| gone())?;
        lock(&self.waiting).remove(&key).ok_or_else(gone)
    }

    /// The listener of an id, made beneath the workload's /run if it is not there.
    fn listen(&self, key: Key, run: &Path, user: &User) -> Result<Arc<Forward>, Refusal> {
        let mut listeners = lock(&self.listeners);
        if let Some(forward) = listeners.get(&key) {
            return Ok(Arc::clone(forward));
        }
        if listeners.len() >= FORWARDS_MAX {
            let text = format!("the sandbox has {FORWARDS_MAX} forwarded sockets already");
            return Err(Refusal::new(StreamErrorCode::Limit, text));
        }
        let forward = Forward::bind(run, user)
            .map_err(|error| Refusal::io("cannot make the forwarded socket", &error))?;
        let forward = Arc::new(forward);
        listeners.insert(key, Arc::clone(&forward));
        Ok(forward)
    }

    fn end(&self, key: &Key, stream: u64) {
        let mut listeners = lock(&self.listeners);
        if listeners.get(key).is_some_and(|f| *f.stream.borrow() == stream) {
            listeners.remove(key);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Forward {
    fn bind(run: &Path, user: &User) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let run = rustix::fs::open(run, flags, Mode::empty())?;
        // The id is the client's secret; the name says nothing about it.
        let name = format!("towline-{}", hex(&random::<8>()?));
        rustix::fs::mkdirat(&run, &name, Mode::from_raw_mode(0o700))?;
        let folder = Folder { run, name };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inside = rustix::fs::openat(&folder.run, &folder.name, flags, Mode::empty())?;
        let own = PathBuf::from(format!("/proc/self/fd/{}", inside.as_fd().as_raw_fd()));
        let listener = UnixListener::bind(own.join(SOCKET))?;
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        rustix::fs::chownat(&inside, SOCKET, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        rustix::fs::chmodat(&inside, SOCKET, Mode::from_raw_mode(0o600), AtFlags::empty())?;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(&folder.run, &folder.name, Some(uid), Some(gid), flags)?;
        let path = format!("/run/{}/{SOCKET}", folder.name).into_bytes();
        Ok(Self { path, _folder: folder, listener, stream: watch::Sender::new(0) })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(inside) = rustix::fs::openat(&self.run, &self.name, flags, Mode::empty()) {
            let _ = rustix::fs::unlinkat(&inside, SOCKET, AtFlags::empty());
        }
        let _ = rustix::fs::unlinkat(&self.run, &self.name, AtFlags::REMOVEDIR);
    }
}

/// Serves one forward stream whose OPEN was read. `run` is the workload's /run as the agent sees it.
pub async fn serve<R, W>(
    forwards: &Arc<Forwards>,
    open: ForwardOpen,
    run: &Path,
    user: &User,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let served = serve_or_refuse(forwards, &open, run, user, &mut reader, &mut writer).await;
    if let Err(refusal) = served {
        let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
    }
    let _ = writer.finish().await;
}

async fn serve_or_refuse<R, W>(
    forwards: &Arc<Forwards>,
    open: &ForwardOpen,
    run: &Path,
    user: &User,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Result<(), Refusal>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let key = Key::try_from(&open.forward_id[..])
        .map_err(|_| Refusal::invalid("a forward's id has 16 bytes"))?;
    match &open.listener {
        Some(Listener::SshAgent(_)) => {}
        None => {
            let text = "the guest agent does not know this kind of forward: it is older than `tow`";
            return Err(Refusal::new(StreamErrorCode::Unsupported, text));
        }
    }
    let forward = forwards.listen(key, run, user)?;
    let mut stream = 0;
    forward.stream.send_modify(|newest| {
        *newest += 1;
        stream = *newest;
    });
    let listening = ForwardListening { path: forward.path.clone() };
    let left = match writer.send_message(FrameKind::ForwardListening, &listening).await {
        Ok(()) => announce(forwards, &forward, stream, reader, writer).await,
        Err(error) => Err(error),
    };
    if left.is_ok() {
        forwards.end(&key, stream);
    } else {
        // The link broke: the client may come back for its listener.
        let forwards = Arc::clone(forwards);
        tokio::spawn(async move {
            tokio::time::sleep(TAKE_MAX).await;
            forwards.end(&key, stream);
        });
    }
    Ok(())
}

/// Announces connections until the client leaves (`Ok`) or the stream breaks.
async fn announce<R, W>(
    forwards: &Arc<Forwards>,
    forward: &Forward,
    stream: u64,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (send, mut queue) = mpsc::channel::<Key>(WAITING_MAX);
    let accept = async {
        loop {
            let (connection, _) = forward.listener.accept().await?;
            // Full: whoever connected sees its end.
            if let Ok(permit) = send.try_reserve() {
                permit.send(wait(forwards, connection)?);
            }
        }
    };
    let tell = async {
        while let Some(id) = queue.recv().await {
            let accepted = ForwardAccepted { connection_id: id.to_vec() };
            let frame = Frame::message(FrameKind::ForwardAccepted, &accepted);
            timeout(TAKE_MAX, writer.send(&frame)).await.map_err(io::Error::other)??;
        }
        Ok(())
    };
    let left = async {
        while reader.next().await?.is_some() {}
        Ok(())
    };
    // A newer stream serves the listener: this one only has not noticed yet.
    let mut newest = forward.stream.subscribe();
    tokio::select! {
        biased;
        _ = newest.wait_for(|newest| *newest != stream) => Err(io::ErrorKind::ConnectionAborted.into()),
        left = left => left,
        broke = accept => broke,
        broke = tell => broke,
    }
}

/// Keeps a connection until it is taken, for a while.
fn wait(forwards: &Arc<Forwards>, connection: UnixStream) -> io::Result<Key> {
    let id: Key = random()?;
    let mut waiting = lock(&forwards.waiting);
    if waiting.len() < WAITING_MAX * 2 {
        waiting.insert(id, connection);
        let forwards = Arc::clone(forwards);
        tokio::spawn(async move {
            tokio::time::sleep(TAKE_MAX).await;
            lock(&forwards.waiting).remove(&id);
        });
    }
    Ok(id)
}

/// Bytes that nobody can guess.
fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Whole at once: the kernel never cuts so few bytes.
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
