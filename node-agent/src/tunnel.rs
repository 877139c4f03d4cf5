//! The node's end of the link: laptops' streams, each let in by its ticket and then only copied.
//!
//! A stream's first frame carries the ticket, which the guest never sees. What the guest has no part
//! in is served here: pings, feeds and image imports.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use towline_images::Collected;
use towline_link::endpoint::{LinkConnection, LinkServer};
use towline_link::stream::{LinkStream, Priority, RESET_CANCELLED};
use towline_link::ticket::{
    CheckedTicket, TicketContext, TicketTarget, TicketVerifier, keep_digest,
};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::image_ref::Source;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{ImagesCollected, LayerOpen, NodeRegistered, StreamErrorCode, StreamOpen};
use towline_streams::{Priority as GuestPriority, splice};

use crate::feed::{self, Feeds};
use crate::gates::{Gates, Refused};
use crate::guests::Guests;
use crate::image_pull::Pulls;
use crate::image_push::Pushes;
use crate::images::Images;
use crate::save::{self, Saves};
use crate::store::Store;
use crate::{image_export, image_import, streams};

/// Connections of laptops at once.
const CONNECTIONS_MAX: usize = 1024;
/// Imports at once: each unpacks on all CPUs.
const IMPORTS_MAX: usize = 2;
/// Exports at once: each reads from the disk as fast as its laptop takes.
const EXPORTS_MAX: usize = 8;
/// A node that has just been started for the first time is given this long to be registered.
const REGISTERED_WAIT: Duration = Duration::from_secs(5);

/// Who this node is to ticket holders.
#[derive(Debug)]
struct Authority {
    node: NodeId,
    cluster_id: String,
    verifier: TicketVerifier,
}

/// What streams are served with.
#[derive(Debug)]
pub struct Tunnel {
    gates: Arc<Gates>,
    guests: Arc<Guests>,
    images: Arc<Images>,
    feeds: Arc<Feeds>,
    authority: watch::Sender<Option<Arc<Authority>>>,
    imports: Arc<Semaphore>,
    pulls: Pulls,
    saves: Saves,
    sandboxes: Arc<Store>,
    exports: Semaphore,
    pushes: Pushes,
}

impl Tunnel {
    /// One that lets nobody in until it knows who signs tickets.
    pub fn new(
        gates: Arc<Gates>,
        guests: Arc<Guests>,
        images: Arc<Images>,
        feeds: Arc<Feeds>,
        sandboxes: Arc<Store>,
    ) -> Arc<Self> {
        let imports = Arc::new(Semaphore::new(IMPORTS_MAX));
        let pulls = Pulls::new(&images, Arc::clone(&imports));
        let (exports, pushes) = (Semaphore::new(EXPORTS_MAX), Pushes::new(&images));
        let saves = Saves::new(images.store().clone());
        let authority = watch::Sender::default();
        Arc::new(Self {
            gates,
            guests,
            images,
            feeds,
            authority,
            imports,
            pulls,
            exports,
            pushes,
            saves,
            sandboxes,
        })
    }

    /// Takes what the control plane said at registration.
    pub fn registered(&self, registered: &NodeRegistered) {
        let Ok(node) = NodeId::try_from(&registered.node_id[..]) else { return };
        let authority = Authority {
            node,
            cluster_id: registered.cluster_id.clone(),
            verifier: TicketVerifier::new(&registered.ticket_keys),
        };
        self.authority.send_replace(Some(Arc::new(authority)));
    }

    /// Accepts connections until the server is closed.
    pub async fn serve(self: Arc<Self>, server: Arc<LinkServer>) {
        let mut connections = JoinSet::new();
        while let Some(handshake) = server.accept().await {
            while connections.try_join_next().is_some() {}
            if connections.len() >= CONNECTIONS_MAX {
                tracing::warn!(CONNECTIONS_MAX, "too many laptops connected, one was refused");
                continue;
            }
            let tunnel = Arc::clone(&self);
            connections.spawn(async move {
                match handshake.finish().await {
                    Ok(connection) => tunnel.connection(connection).await,
                    Err(error) => tracing::debug!(%error, "link handshake failed"),
                }
            });
        }
    }

    async fn connection(self: Arc<Self>, connection: LinkConnection) {
        let address = connection.peer().address;
        let identity = connection.peer().identity.as_ref().map(ToString::to_string);
        tracing::debug!(?address, ?identity, "laptop connected");
        // The transport bounds how many there are at once.
        let mut open = JoinSet::new();
        while let Ok(stream) = connection.accept().await {
            while open.try_join_next().is_some() {}
            let (tunnel, connection) = (Arc::clone(&self), connection.clone());
            open.spawn(async move { tunnel.stream(&connection, stream).await });
        }
        tracing::debug!(?address, "laptop left");
    }

    async fn stream(&self, connection: &LinkConnection, mut stream: LinkStream) {
        let open = match streams::read_open(&mut stream.reader).await {
            Ok(open) => open,
            Err(refused) => return streams::refuse(&mut stream.writer, &refused).await,
        };
        stream.writer.get_mut().set_priority(Priority::of(open.kind.as_ref()));
        let checked = match self.check(connection, &open.ticket).await {
            Ok(checked) => checked,
            Err(refused) => {
                tracing::info!(reason = refused.message, "stream refused");
                return streams::refuse(&mut stream.writer, &refused).await;
            }
        };
        self.admitted(checked, open, stream).await;
    }

    async fn admitted(&self, checked: CheckedTicket, open: StreamOpen, mut stream: LinkStream) {
        let refusal = match (&open.kind, checked.target) {
            (Some(Kind::Ping(ping)), _) if !ping.guest => {
                let pong = Frame::raw(FrameKind::Pong, &b""[..]);
                if stream.writer.send(&pong).await.is_ok() {
                    let _ = stream.writer.finish().await;
                }
                return;
            }
            (
                Some(
                    Kind::Exec(_)
                    | Kind::Files(_)
                    | Kind::ExecList(_)
                    | Kind::Ping(_)
                    | Kind::Tcp(_)
                    | Kind::PortList(_)
                    | Kind::Forward(_)
                    | Kind::Copy(_)
                    | Kind::Diff(_),
                ),
                TicketTarget::Sandbox(sandbox),
            ) => match self.to_guest(sandbox, checked.epoch, open, stream).await {
                Ok(()) => return,
                Err((refused, mut stream)) => {
                    return streams::refuse(&mut stream.writer, &refused).await;
                }
            },
            (Some(Kind::Feed(open)), TicketTarget::Sandbox(sandbox)) => {
                // Whatever the sandbox is doing: why it does not run is of interest too.
                match self.feeds.existing(sandbox) {
                    Some(feed) => return feed::serve(feed, *open, stream).await,
                    None => Refused::new(
                        StreamErrorCode::NotRunning,
                        "the node does not have this sandbox (yet)",
                    ),
                }
            }
            (Some(Kind::Save(save)), TicketTarget::Sandbox(sandbox)) => {
                match self.source(sandbox, checked.epoch).await {
                    Ok(source) => {
                        return Box::pin(self.saves.serve(save.clone(), source, stream)).await;
                    }
                    Err(refused) => refused,
                }
            }
            (Some(Kind::ImageImport(import)), TicketTarget::Images) => {
                let Ok(_permit) = self.imports.acquire().await else { return };
                let (store, name) = (self.images.store().clone(), import.name.clone());
                return image_import::serve(store, name, stream).await;
            }
            (Some(Kind::ImagePull(pull)), TicketTarget::Images) => {
                return self.pulls.serve(pull.clone(), stream).await;
            }
            (Some(Kind::ImageExport(open)), TicketTarget::Images) => {
                let Ok(_permit) = self.exports.acquire().await else { return };
                return image_export::serve(self.images.store().clone(), open, stream).await;
            }
            (Some(Kind::ImagePush(push)), TicketTarget::Images) => {
                return Box::pin(self.pushes.serve(push.clone(), stream)).await;
            }
            (Some(Kind::ImageCollect(open)), TicketTarget::Images) => {
                match self.collect(&checked.keep_sha256, open.keep.clone()).await {
                    Ok(collected) => {
                        let frame = Frame::message(FrameKind::ImagesCollected, &collected);
                        if stream.writer.send(&frame).await.is_ok() {
                            let _ = stream.writer.finish().await;
                        }
                        return;
                    }
                    Err(refused) => refused,
                }
            }
            (Some(Kind::ImageCollect(_)), TicketTarget::Sandbox(_)) => {
                Refused::new(StreamErrorCode::Ticket, "this needs a ticket to collect images")
            }
            (
                Some(
                    Kind::ImageImport(_)
                    | Kind::ImagePull(_)
                    | Kind::ImageExport(_)
                    | Kind::ImagePush(_),
                ),
                TicketTarget::Sandbox(_),
            ) => Refused::new(StreamErrorCode::Ticket, "this needs a ticket for images"),
            (
                Some(
                    Kind::Exec(_)
                    | Kind::Files(_)
                    | Kind::ExecList(_)
                    | Kind::Ping(_)
                    | Kind::Tcp(_)
                    | Kind::PortList(_)
                    | Kind::Forward(_)
                    | Kind::Copy(_)
                    | Kind::Diff(_)
                    | Kind::Save(_)
                    | Kind::Feed(_),
                ),
                TicketTarget::Images,
            ) => Refused::new(StreamErrorCode::Ticket, "this needs a ticket for a sandbox"),
            (Some(Kind::Control(_) | Kind::Fuse(_) | Kind::Egress(_) | Kind::Lookup(_)), _) => {
                Refused::new(StreamErrorCode::Unsupported, "only guests open such streams")
            }
            (Some(Kind::Layer(_)), _) => {
                Refused::new(StreamErrorCode::Unsupported, "only nodes open such streams")
            }
            (None, _) => Refused::new(
                StreamErrorCode::Unsupported,
                "this node agent does not know this kind of stream; is it older than `tow`?",
            ),
        };
        streams::refuse(&mut stream.writer, &refusal).await;
    }

    /// Removes images; only what the control plane said is not used.
    async fn collect(&self, wanted: &[u8], keep: Vec<String>) -> Result<ImagesCollected, Refused> {
        if wanted.is_empty() || keep_digest(&keep) != wanted {
            let why = "the ticket does not name this list of images to keep";
            return Err(Refused::new(StreamErrorCode::Ticket, why));
        }
        let images = Arc::clone(&self.images);
        let collected = tokio::task::spawn_blocking(move || images.collect(&keep)).await;
        let collected = collected
            .map_err(|error| Refused::new(StreamErrorCode::Internal, error.to_string()))??;
        tracing::info!(?collected, "images collected");
        let Collected { images, files, bytes } = collected;
        Ok(ImagesCollected { images, files, bytes })
    }

    /// What a sandbox is saved from.
    async fn source(&self, sandbox: SandboxId, epoch: u64) -> Result<save::Source, Refused> {
        let pass = self.gates.enter(sandbox, epoch)?;
        let not_running = |why: &str| Refused::new(StreamErrorCode::NotRunning, why);
        let guest = self.guests.get(sandbox).ok_or_else(|| not_running("its VM has just ended"))?;
        let record = self.sandboxes.sandbox(sandbox).record();
        let record = record.ok_or_else(|| not_running("the node does not have this sandbox"))?;
        let image = record.assignment.spec.image.as_ref().and_then(|image| image.source.as_ref());
        let Some(Source::Oci(name)) = image else {
            let why = "the sandbox is of this machine's own system (`--image local`), which no \
                       image can hold: save one that was made of an image";
            return Err(Refused::new(StreamErrorCode::Unsupported, why));
        };
        let base = record.image_digest.parse().map_err(|_| {
            Refused::new(StreamErrorCode::Internal, "the node does not know the sandbox's image")
        })?;
        let priority = priority(Some(&Kind::Layer(LayerOpen::default())));
        let guest = guest.open(priority).await?;
        Ok(save::Source { base, base_name: name.clone(), guest, pass })
    }

    /// Copies between laptop and guest until both ended, or until the sandbox's streams must end.
    async fn to_guest(
        &self,
        sandbox: SandboxId,
        epoch: u64,
        open: StreamOpen,
        stream: LinkStream,
    ) -> Result<(), (Refused, LinkStream)> {
        let pass = match self.gates.enter(sandbox, epoch) {
            Ok(pass) => pass,
            Err(refused) => return Err((refused, stream)),
        };
        let Some(guest) = self.guests.get(sandbox) else {
            let refused = Refused::new(StreamErrorCode::NotRunning, "its VM has just ended");
            return Err((refused, stream));
        };
        let (mut send, recv) = match guest.open(priority(open.kind.as_ref())).await {
            Ok(halves) => halves,
            Err(refused) => return Err((refused, stream)),
        };
        drop(guest);
        let open = Frame::message(FrameKind::Open, &StreamOpen { ticket: Vec::new(), ..open });
        let (from_laptop, rest, to_laptop) = stream.into_io();
        let copy = async {
            send.write_all(&open.to_bytes()).await?;
            send.write_all(&rest).await?;
            send.flush().await?;
            splice(from_laptop, to_laptop, recv, send).await
        };
        tokio::select! {
            result = copy => match result {
                Ok((up, down)) => tracing::debug!(%sandbox, up, down, "stream ended"),
                Err(error) => tracing::debug!(%sandbox, %error, "stream broke"),
            },
            // Dropping the copy resets both of its streams.
            () = pass.revoked() => tracing::debug!(%sandbox, "stream ended with its sandbox"),
        }
        Ok(())
    }

    async fn check(
        &self,
        connection: &LinkConnection,
        ticket: &[u8],
    ) -> Result<CheckedTicket, Refused> {
        let refused = |message: String| Refused::new(StreamErrorCode::Ticket, message);
        let spki = connection.peer().spki_sha256;
        let spki = spki.ok_or_else(|| refused("the connection has no certificate".into()))?;
        let mut known = self.authority.subscribe();
        let authority = match timeout(REGISTERED_WAIT, known.wait_for(Option::is_some)).await {
            Ok(Ok(known)) => known.clone(),
            Ok(Err(_)) | Err(_) => None,
        };
        let authority = authority.ok_or_else(|| {
            refused("this node is not registered with a control plane yet; try again".into())
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let context = TicketContext {
            cluster_id: &authority.cluster_id,
            node_id: authority.node,
            client_spki_sha256: &spki,
            now_unix_s: now.as_secs(),
        };
        authority.verifier.verify(ticket, &context).map_err(|error| refused(error.to_string()))
    }
}

fn priority(kind: Option<&Kind>) -> GuestPriority {
    match kind {
        Some(Kind::Exec(_)) => GuestPriority::Interactive,
        Some(Kind::Files(_)) => GuestPriority::Bulk,
        Some(Kind::Fuse(_)) => GuestPriority::Demand,
        Some(
            Kind::ImageImport(_)
            | Kind::ImagePull(_)
            | Kind::ImageExport(_)
            | Kind::ImagePush(_)
            | Kind::Copy(_)
            | Kind::Diff(_)
            | Kind::Save(_)
            | Kind::Layer(_),
        ) => GuestPriority::Bulk,
        Some(Kind::Tcp(_) | Kind::Egress(_)) => GuestPriority::Interactive,
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
        | None => GuestPriority::Control,
    }
}

/// Gives a stream up whose laptop is gone.
pub(crate) fn give_up(stream: LinkStream) {
    stream.reset(RESET_CANCELLED);
}
