//! One stream, from a client's request to its end: who is meant, a ticket, a link, OPEN, and then
//! bytes both ways.
//!
//! A ticket that the node refuses is got anew, without the client noticing: until the node's first
//! frame, or [`EARLY_MAX`] bytes, what the client said is kept to be said again. OPEN may be sent
//! more than once therefore; everything that it opens is idempotent by its ids.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use towline_link::stream::{LinkStream, Priority, RESET_CANCELLED};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::daemon_answer::Answer;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    DaemonAnswer, GetSandboxRequest, ListNodesRequest, NodeState, OpenSandboxStream, StreamError,
    StreamErrorCode, StreamOpen, StreamOpened, get_sandbox_request,
};

use super::copy::{copy_both, is_gone};
use super::failure::DaemonFailure;
use super::links::{Lease, Links};
use super::tickets::{CALL, Target, Ticket, Tickets};
use crate::session::Session;

/// Bytes of a client that are kept until the node's first frame.
const EARLY_MAX: usize = 64 << 10;
/// Before each attempt with another ticket: the first refusal means that ours is of an older epoch,
/// the next ones that the node is starting and has not been told yet who signs tickets.
const TICKET_PAUSES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1000),
];
/// Bound on opening a stream of a link that is up.
const OPEN_MAX: Duration = Duration::from_secs(5);

/// One cluster as the daemon knows it.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) session: Arc<Session>,
    pub(super) links: Arc<Links>,
    pub(super) tickets: Arc<Tickets>,
}

impl Cluster {
    pub(super) fn new(session: Arc<Session>) -> Result<Self, DaemonFailure> {
        let links = Arc::new(Links::new(Arc::clone(&session))?);
        let tickets = Arc::new(Tickets::new(Arc::clone(&session)));
        Ok(Self { session, links, tickets })
    }
}

/// A stream on its way: nothing of its answer has been read.
struct Dialled {
    stream: LinkStream,
    lease: Lease,
}

/// Serves an OpenSandboxStream: `early` is what the client has said since. An error is for the
/// daemon's answer: nothing has been answered yet.
pub(super) async fn serve(
    cluster: &Cluster,
    client: &mut UnixStream,
    open: OpenSandboxStream,
    early: BytesMut,
) -> Result<(), DaemonFailure> {
    let target = target(cluster, &open).await?;
    let open = open.open.ok_or_else(|| DaemonFailure::invalid("the request opens nothing"))?;
    let dialled = dial(cluster, target, &open, false).await?;
    if let Err(error) = answer_opened(client, target).await {
        tracing::debug!(%error, "client left");
        return Ok(());
    }
    if let Err(failure) = carry(cluster, client, target, &open, dialled, early).await {
        tracing::debug!(error = %failure, ?target, "stream broke");
        // What may pass is a broken stream to the client, which it takes up again.
        if !failure.retry {
            let error = StreamError { code: failure.code.into(), message: failure.message };
            let _ = client.write_all(&Frame::message(FrameKind::Error, &error).to_bytes()).await;
        }
    }
    Ok(())
}

/// Carries the stream from OPEN to its end.
async fn carry(
    cluster: &Cluster,
    client: &mut UnixStream,
    target: Target,
    open: &StreamOpen,
    mut dialled: Dialled,
    mut early: BytesMut,
) -> Result<(), DaemonFailure> {
    if !early.is_empty() {
        write(&mut dialled, &early).await?;
    }
    let mut finished = false;
    let mut pauses = TICKET_PAUSES.iter();
    let first = loop {
        match first_frame(client, &mut dialled, &mut early, &mut finished).await {
            First::Frame(frame) if is_ticket_refusal(&frame) => {
                let Some(pause) = pauses.next() else { break Some(frame) };
                tracing::debug!(?target, "ticket refused, trying a new one");
                tokio::time::sleep(*pause).await;
                cluster.tickets.forget(target);
                dialled = dial(cluster, target, open, true).await?;
                write(&mut dialled, &early).await?;
                if finished {
                    dialled.stream.writer.finish().await.map_err(link_broke)?;
                }
            }
            First::Frame(frame) => break Some(frame),
            First::Undecided => break None,
            First::Ended => return Ok(()),
            First::ClientGone => {
                dialled.stream.reset(RESET_CANCELLED);
                return Ok(());
            }
        }
    };
    drop(early);
    let (receive, rest, send) = dialled.stream.into_io();
    let mut head = first.map(|frame| BytesMut::from(&frame.to_bytes()[..])).unwrap_or_default();
    head.extend_from_slice(&rest);
    client.write_all(&head).await.map_err(link_broke)?;
    // From here on errors are the stream's own: both ends see it break and take it up again.
    copy_both(client, receive, send).await.map_err(link_broke)
}

/// Finds out who is meant.
async fn target(cluster: &Cluster, open: &OpenSandboxStream) -> Result<Target, DaemonFailure> {
    let kind = open.open.as_ref().and_then(|open| open.kind.as_ref());
    if !open.sandbox_id.is_empty() {
        let id = SandboxId::try_from(open.sandbox_id.as_slice())
            .map_err(|e| DaemonFailure::invalid(e.to_string()))?;
        return Ok(Target::Sandbox(id));
    }
    if !open.sandbox_name.is_empty() {
        return named(cluster, &open.sandbox_name).await.map(Target::Sandbox);
    }
    if !open.node_id.is_empty() {
        let id = NodeId::try_from(open.node_id.as_slice())
            .map_err(|e| DaemonFailure::invalid(e.to_string()))?;
        return Ok(Target::Images(id));
    }
    match kind {
        Some(
            Kind::ImageImport(_) | Kind::ImagePull(_) | Kind::ImageExport(_) | Kind::ImagePush(_),
        ) => any_node(cluster).await.map(Target::Images),
        _ => Err(DaemonFailure::invalid("the request names neither a sandbox nor a node")),
    }
}

/// Opens a stream to a sandbox for the daemon itself; the lease must live as long.
pub(super) async fn dial_sandbox(
    cluster: &Cluster,
    sandbox: SandboxId,
    open: &StreamOpen,
    anew: bool,
) -> Result<(LinkStream, Lease), DaemonFailure> {
    let target = Target::Sandbox(sandbox);
    if anew {
        cluster.tickets.forget(target);
    }
    let dialled = dial(cluster, target, open, anew).await?;
    Ok((dialled.stream, dialled.lease))
}

async fn named(cluster: &Cluster, name: &str) -> Result<SandboxId, DaemonFailure> {
    let which = Some(get_sandbox_request::Which::Name(name.to_owned()));
    let request = GetSandboxRequest { which };
    let sandbox = cluster
        .session
        .call_within(CALL, |mut client| {
            let request = request.clone();
            async move { client.get_sandbox(request).await }
        })
        .await
        .map_err(|e| control_plane(cluster, e))?;
    SandboxId::try_from(sandbox.id.as_slice()).map_err(|e| {
        DaemonFailure::new(StreamErrorCode::Internal, format!("sandbox `{name}` has no id: {e}"))
    })
}

async fn any_node(cluster: &Cluster) -> Result<NodeId, DaemonFailure> {
    let nodes = cluster
        .session
        .call_within(CALL, |mut client| async move { client.list_nodes(ListNodesRequest {}).await })
        .await
        .map_err(|e| control_plane(cluster, e))?
        .nodes;
    let ready = nodes.iter().find(|node| node.state() == NodeState::Ready);
    let node = ready.ok_or_else(|| {
        DaemonFailure::passing(format!("none of the cluster's {} nodes is ready", nodes.len()))
            .hint("tow node ls")
    })?;
    NodeId::try_from(node.id.as_slice())
        .map_err(|e| DaemonFailure::new(StreamErrorCode::Internal, e.to_string()))
}

fn control_plane(cluster: &Cluster, error: towline_link::status::RpcError) -> DaemonFailure {
    DaemonFailure::from_control_plane(&cluster.session.context().endpoint, error)
}

/// Opens the stream and says OPEN. A kept ticket is used only over a link that is up already; a
/// new link is made only to where the control plane says now that the node is.
async fn dial(
    cluster: &Cluster,
    target: Target,
    open: &StreamOpen,
    anew: bool,
) -> Result<Dialled, DaemonFailure> {
    let kept = if anew { None } else { cluster.tickets.kept(target) };
    if let Some(ticket) = &kept
        && let Some(lease) = cluster.links.existing(ticket.node, &ticket.endpoint).await
    {
        match say_open(lease, ticket, open).await {
            Ok(dialled) => return Ok(dialled),
            Err(error) => tracing::debug!(%error, ?target, "kept link is of no use"),
        }
    }
    let ticket = match (cluster.tickets.fetch(target).await, kept) {
        (Ok(ticket), _) => ticket,
        // Without a control plane a ticket is good as long as it says.
        (Err(failure), Some(kept)) if failure.retry => kept,
        (Err(failure), _) => return Err(failure),
    };
    let lease = cluster.links.get(ticket.node, &ticket.endpoint).await?;
    say_open(lease, &ticket, open).await
}

async fn say_open(
    lease: Lease,
    ticket: &Ticket,
    open: &StreamOpen,
) -> Result<Dialled, DaemonFailure> {
    let priority = Priority::of(open.kind.as_ref());
    let stream = timeout(OPEN_MAX, lease.connection.open(priority))
        .await
        .map_err(|_| DaemonFailure::passing("the link has as many streams as the node allows"))?;
    let mut stream = stream.map_err(link_broke)?;
    // A client that brings a ticket of its own wants that one used: ours is of another kind.
    let signed = if open.ticket.is_empty() { &ticket.signed } else { &open.ticket };
    let open = StreamOpen { ticket: signed.clone(), ..open.clone() };
    stream.writer.send_message(FrameKind::Open, &open).await.map_err(link_broke)?;
    Ok(Dialled { stream, lease })
}

async fn write(dialled: &mut Dialled, bytes: &[u8]) -> Result<(), DaemonFailure> {
    dialled.stream.writer.get_mut().write_all(bytes).await.map_err(link_broke)
}

enum First {
    /// The node's first frame.
    Frame(Frame),
    /// The client has said so much that it cannot be said again.
    Undecided,
    /// The stream ended or broke without a frame.
    Ended,
    /// The client does not wait any more.
    ClientGone,
}

/// Waits for the node's first frame and passes on what the client says meanwhile.
async fn first_frame(
    client: &mut UnixStream,
    dialled: &mut Dialled,
    early: &mut BytesMut,
    finished: &mut bool,
) -> First {
    let LinkStream { reader, writer } = &mut dialled.stream;
    loop {
        let before = early.len();
        if before >= EARLY_MAX {
            return First::Undecided;
        }
        early.reserve(EARLY_MAX / 4);
        // Both branches are cancel-safe.
        tokio::select! {
            frame = reader.next() => return match frame {
                Ok(Some(frame)) => First::Frame(frame),
                Ok(None) | Err(_) => First::Ended,
            },
            read = client.read_buf(early), if !*finished => match read {
                Ok(0) if is_gone(client) => return First::ClientGone,
                Ok(0) => {
                    *finished = true;
                    let _ = writer.finish().await;
                }
                // A node that stopped listening has said why: the reader will tell.
                Ok(_) => { let _ = writer.get_mut().write_all(&early[before..]).await; }
                Err(_) => return First::ClientGone,
            },
        }
    }
}

fn is_ticket_refusal(frame: &Frame) -> bool {
    frame.is(FrameKind::Error)
        && frame.decode::<StreamError>().is_ok_and(|error| error.code() == StreamErrorCode::Ticket)
}

async fn answer_opened(client: &mut UnixStream, target: Target) -> std::io::Result<()> {
    let sandbox_id = match target {
        Target::Sandbox(id) => id.to_vec(),
        Target::Images(_) => Vec::new(),
    };
    let answer = Some(Answer::Opened(StreamOpened { sandbox_id }));
    let frame = Frame::message(FrameKind::DaemonAnswer, &DaemonAnswer { answer });
    client.write_all(&frame.to_bytes()).await
}

fn link_broke(error: std::io::Error) -> DaemonFailure {
    DaemonFailure::passing(format!("the link to the node broke: {error}"))
}

/// The configuration file of a request.
pub(super) fn config_path(bytes: Vec<u8>) -> Result<PathBuf, DaemonFailure> {
    use std::os::unix::ffi::OsStringExt;
    let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(DaemonFailure::invalid("the request names no configuration file"))
    }
}
