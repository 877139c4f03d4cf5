//! The daemon's life: one per user, a task per connection, gone half an hour after its last use.
//!
//! Whoever holds the lock owns the socket's name. A daemon that leaves (another version was asked
//! for, a signal) first gives up name and lock, so that the next one can start while its last
//! streams end.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::SandboxId;
use towline_proto::v1::daemon_answer::Answer;
use towline_proto::v1::daemon_request::Request;
use towline_proto::v1::{
    DaemonAnswer, DaemonLeaving, DaemonRequest, DaemonStatus, PortMapping, PublishedPort,
    PublishedPorts,
};
use towline_streams::FrameReader;

use super::VERSION;
use super::client::{READY, TAKEN};
use super::clusters::Clusters;
use super::failure::DaemonFailure;
use super::place::Place;
use super::ports::{Mapping, Ports, Scope};
use super::request;

/// Gone so long after the last use.
const IDLE_MAX: Duration = Duration::from_secs(30 * 60);
/// Bound on a client's first frame.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// Connections at once.
const CONNECTIONS_MAX: usize = 4096;
/// The log begins anew when it is longer.
const LOG_MAX: u64 = 1 << 20;

/// Runs the daemon until it is of no more use; says on stdout when it can be reached. Inside a
/// multi-threaded runtime, in a process of its own.
pub async fn run() -> anyhow::Result<()> {
    let place = Place::discover()?;
    // Not the terminal's any more: neither its signals nor its end.
    let _ = rustix::process::setsid();
    let lock = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(place.lock())
        .with_context(|| format!("opening {}", place.lock().display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return say(TAKEN);
    }
    let listener = bind(&place)?;
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
        .map(signal)
        .into_iter()
        .collect::<io::Result<Vec<_>>>()
        .context("catching signals")?;
    say(READY)?;
    rustix::stdio::dup2_stdout(io::stderr()).context("leaving stdout")?;
    tracing::info!(version = VERSION, pid = std::process::id(), "daemon ready");
    let ended = serve(&place, listener, lock, &mut signals).await;
    tracing::info!("daemon left");
    ended
}

fn say(what: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(what).and_then(|()| stdout.flush()).context("telling that it is ready")
}

/// Takes the socket's name, which only the lock's holder may do.
fn bind(place: &Place) -> anyhow::Result<UnixListener> {
    let socket = place.socket();
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", socket.display()));
        }
        _ => {}
    }
    UnixListener::bind(&socket).with_context(|| format!("listening at {}", socket.display()))
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    clusters: Arc<Clusters>,
    ports: Arc<Ports>,
    streams: AtomicU32,
}

/// Why the daemon leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// Another version is wanted: streams end by themselves.
    WhenIdle,
    /// Asked to: streams end now.
    Now,
}

async fn serve(
    place: &Place,
    listener: UnixListener,
    lock: fs::File,
    signals: &mut [Signal],
) -> anyhow::Result<()> {
    raise_files_limit();
    let clusters = Arc::<Clusters>::default();
    let ports = Ports::new(Arc::clone(&clusters), place.ports()?);
    ports.take_up().await;
    let shared = Arc::new(Shared { clusters, ports, streams: AtomicU32::new(0) });
    let (leave, mut leaving) = mpsc::channel(16);
    let mut connections = JoinSet::new();
    let mut idle_at = Instant::now() + IDLE_MAX;
    let why = loop {
        tokio::select! {
            accepted = listener.accept() => {
                idle_at = Instant::now() + IDLE_MAX;
                bound_log();
                match accepted {
                    Ok((stream, _)) if may_connect(&stream, connections.len()) => {
                        let (shared, leave) = (Arc::clone(&shared), leave.clone());
                        connections.spawn(async move { connection(stream, shared, leave).await });
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(%error, "accept failed");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {
                idle_at = Instant::now() + IDLE_MAX;
            }
            () = sleep_until(idle_at), if connections.is_empty() => {
                if !shared.ports.are_in_use().await {
                    break Leave::WhenIdle;
                }
                idle_at = Instant::now() + IDLE_MAX;
            }
            Some(why) = leaving.recv() => break why,
            () = any(signals) => break Leave::Now,
        }
    };
    drop(listener);
    shared.ports.leave().await;
    let _ = fs::remove_file(place.socket());
    drop(lock);
    drop(leaving); // whoever waits to be told that name and lock are free
    tracing::info!(?why, streams = shared.streams.load(Ordering::Relaxed), "daemon leaves");
    if why == Leave::WhenIdle {
        let ended = async {
            while connections.join_next().await.is_some() {}
            shared.ports.drained().await;
        };
        tokio::select! {
            () = ended => {}
            () = any(signals) => {}
        }
    }
    connections.shutdown().await;
    shared.clusters.close().await;
    Ok(())
}

async fn any(signals: &mut [Signal]) {
    let mut waiting: Vec<_> = signals.iter_mut().map(|s| Box::pin(s.recv())).collect();
    std::future::poll_fn(|cx| {
        let ready = waiting.iter_mut().any(|s| s.as_mut().poll(cx).is_ready());
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// Only this user's processes, and only so many.
fn may_connect(stream: &UnixStream, connections: usize) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == ours && connections < CONNECTIONS_MAX => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), connections, "connection refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "connection refused");
            false
        }
    }
}

async fn connection(stream: UnixStream, shared: Arc<Shared>, leave: mpsc::Sender<Leave>) {
    let mut reader = FrameReader::new(stream);
    let request = match timeout(REQUEST_MAX, reader.next()).await {
        Ok(Ok(Some(frame))) if frame.is(FrameKind::DaemonRequest) => {
            frame.decode::<DaemonRequest>()
        }
        _ => return,
    };
    let (mut stream, early) = reader.into_parts();
    let Ok(DaemonRequest { version, context, config, request: Some(request) }) = request else {
        let failure = DaemonFailure::invalid("the request cannot be read");
        return answer(&mut stream, Answer::Error(failure.into())).await;
    };
    match request {
        Request::Status(_) => {
            let status = shared.status().await;
            answer(&mut stream, Answer::Status(status)).await;
        }
        Request::Shutdown(_) => {
            answer(&mut stream, Answer::Leaving(DaemonLeaving {})).await;
            let _ = leave.send(Leave::Now).await;
            // The client waits for the end of this connection, which comes with the daemon's.
            tokio::time::sleep(REQUEST_MAX).await;
        }
        _ if version != VERSION => {
            tracing::info!(wanted = version, "another version is wanted");
            let _ = leave.send(Leave::WhenIdle).await;
            leave.closed().await; // the name and the lock are given up
            answer(&mut stream, Answer::Leaving(DaemonLeaving {})).await;
        }
        Request::Publish(publish) => {
            let scope = shared.scope(config, &context, &publish.sandbox_id).await;
            let (name, leased) = (&publish.sandbox_name, publish.leased);
            self::publish(&shared, &mut stream, scope, name, &publish.ports, leased).await;
        }
        Request::Unpublish(unpublish) => {
            let ports = async {
                let scope = shared.scope(config, &context, &unpublish.sandbox_id).await?;
                shared.ports.unpublish(&scope, &mappings(&unpublish.ports)?).await
            };
            let ports = ports.await;
            answer_ports(&mut stream, ports).await;
        }
        Request::ListPorts(list) => {
            let ports = shared.list_ports(config, &context, &list.sandbox_id).await;
            answer_ports(&mut stream, ports).await;
        }
        Request::Open(open) => {
            shared.streams.fetch_add(1, Ordering::Relaxed);
            let _count = Count(&shared.streams);
            // Never entered: links and channels that are made on the way would keep it alive.
            let span = tracing::info_span!("stream", context, sandbox = open.sandbox_name);
            let serve = async {
                let config = request::config_path(config)?;
                let cluster = shared.clusters.get(&config, &context).await?;
                request::serve(&cluster, &mut stream, open, early).await
            };
            let opened = serve.await;
            drop(span);
            if let Err(failure) = opened {
                tracing::info!(error = %failure, context, "stream not opened");
                answer(&mut stream, Answer::Error(failure.into())).await;
            }
        }
    }
}

/// Publishes ports; a lease lasts as long as the client's connection.
async fn publish(
    shared: &Shared,
    stream: &mut UnixStream,
    scope: Result<Scope, DaemonFailure>,
    name: &str,
    wire: &[PortMapping],
    leased: bool,
) {
    let published = async {
        let (scope, wanted) = (scope?, mappings(wire)?);
        let ports = shared.ports.publish(&scope, name, &wanted, leased).await?;
        Ok((scope, wanted, ports))
    };
    let (scope, wanted, ports) = match published.await {
        Ok(published) => published,
        Err(failure) => return answer_ports(stream, Err(failure)).await,
    };
    answer_ports(stream, Ok(ports)).await;
    if leased {
        // The client says nothing more: what can be read is its end.
        let mut nothing = [0];
        let _ = tokio::io::AsyncReadExt::read(stream, &mut nothing).await;
        shared.ports.release(&scope, &wanted).await;
    }
}

fn mappings(wire: &[PortMapping]) -> Result<Vec<Mapping>, DaemonFailure> {
    wire.iter().map(Mapping::parse).collect()
}

async fn answer_ports(stream: &mut UnixStream, ports: Result<Vec<PublishedPort>, DaemonFailure>) {
    let said = match ports {
        Ok(ports) => Answer::Ports(PublishedPorts { ports }),
        Err(failure) => Answer::Error(failure.into()),
    };
    answer(stream, said).await;
}

/// Each forwarded connection is a descriptor: as many as the system allows.
fn raise_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Counts a stream until it ends, however it ends.
struct Count<'a>(&'a AtomicU32);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn answer(stream: &mut UnixStream, answer: Answer) {
    use tokio::io::AsyncWriteExt;
    let frame = Frame::message(FrameKind::DaemonAnswer, &DaemonAnswer { answer: Some(answer) });
    if let Err(error) = stream.write_all(&frame.to_bytes()).await {
        tracing::debug!(%error, "client left before its answer");
    }
}

impl Shared {
    /// Whose ports are meant.
    async fn scope(
        &self,
        config: Vec<u8>,
        context: &str,
        sandbox: &[u8],
    ) -> Result<Scope, DaemonFailure> {
        let sandbox = SandboxId::try_from(sandbox)
            .map_err(|error| DaemonFailure::invalid(error.to_string()))?;
        let config = request::config_path(config)?;
        // The current context may be another one tomorrow: its name counts.
        let cluster = self.clusters.get(&config, context).await?;
        Ok(Scope { config, context: cluster.session.name().to_owned(), sandbox })
    }

    async fn list_ports(
        &self,
        config: Vec<u8>,
        context: &str,
        sandbox: &[u8],
    ) -> Result<Vec<PublishedPort>, DaemonFailure> {
        let sandbox = match sandbox.is_empty() {
            true => None,
            false => Some(
                SandboxId::try_from(sandbox)
                    .map_err(|error| DaemonFailure::invalid(error.to_string()))?,
            ),
        };
        let config = request::config_path(config)?;
        let cluster = self.clusters.get(&config, context).await?;
        Ok(self.ports.list(&config, cluster.session.name(), sandbox).await)
    }

    async fn status(&self) -> DaemonStatus {
        let links = self.clusters.links().await;
        let ports = self.ports.count().await;
        DaemonStatus {
            pid: std::process::id(),
            version: VERSION.into(),
            links: u32::try_from(links).unwrap_or(u32::MAX),
            streams: self.streams.load(Ordering::Relaxed),
            ports: u32::try_from(ports).unwrap_or(u32::MAX),
        }
    }
}

/// Begins the log anew when it is long; stderr appends, so nothing else has to know.
fn bound_log() {
    let stderr = io::stderr();
    let Ok(meta) = rustix::fs::fstat(stderr.as_fd()) else { return };
    let regular = rustix::fs::FileType::from_raw_mode(meta.st_mode).is_file();
    if regular && u64::try_from(meta.st_size).unwrap_or(0) > LOG_MAX {
        let _ = rustix::fs::ftruncate(stderr.as_fd(), 0);
    }
}
