//! The multiplexer of the guest link over real IO: handles for streams, and a driver future per end.
//!
//! A [`MuxDriver`] future owns the pipe; handles share the sans-IO state under a short lock and wake
//! it. When a session ends, by error, by its pipe's end or by a newer one, every handle of it fails.

mod driver;
mod half;
mod shared;

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use towline_proto::mux::preamble::{GuestScan, Marker, Nonce};
use towline_proto::mux::terms::Terms;
use towline_proto::mux::{End, Priority, WINDOW};

use driver::{run_guest, run_host};
use shared::Shared;

pub use half::{MuxRecv, MuxSend};

/// Makes the two ends' drivers.
#[derive(Debug)]
pub struct MuxDriver;

/// Opens streams of one session. Clones are the same session.
#[derive(Debug, Clone)]
pub struct MuxHandle {
    shared: Arc<Shared>,
}

/// Yields the streams that the other end opens.
#[derive(Debug)]
pub struct Incoming {
    shared: Arc<Shared>,
}

/// One session as the guest sees it.
#[derive(Debug)]
pub struct GuestSession {
    /// Opens streams to the node.
    pub handle: MuxHandle,
    /// The node's streams to here.
    pub incoming: Incoming,
}

/// Yields the sessions that the node starts, one after another.
#[derive(Debug)]
pub struct GuestSessions {
    sessions: mpsc::Receiver<GuestSession>,
    marker: Arc<std::sync::Mutex<Marker>>,
}

impl MuxDriver {
    /// Starts a session as the node. `markers` are all that the guest may have or be given while it
    /// lasts, the newest secret first (`[secret, Marker::BOOT]`): a guest holds back what looks like
    /// the start of its own, so a batch's end that was not padded for it waits for the next batch.
    /// `nonce` is random and new. The future is the driver: it must be polled for anything to move,
    /// and ends with an error when the pipe does.
    pub fn host<S>(
        io: S,
        markers: &[Marker],
        nonce: Nonce,
    ) -> (MuxHandle, Incoming, impl Future<Output = io::Result<()>> + Send + use<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        Self::host_with(io, markers, nonce, Terms::new(WINDOW))
    }

    /// As [`MuxDriver::host`], with terms of its own.
    pub fn host_with<S>(
        io: S,
        markers: &[Marker],
        nonce: Nonce,
        terms: Terms,
    ) -> (MuxHandle, Incoming, impl Future<Output = io::Result<()>> + Send + use<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let shared = Arc::new(Shared::new(End::Host, terms));
        let (handle, incoming) = handles(&shared);
        (handle, incoming, run_host(io, shared, markers.to_vec(), nonce, terms))
    }

    /// Waits for sessions as the guest. The pipe reporting its end (`read` = 0) is not the end: the
    /// node may come back. The future is the driver and ends only by an error of the pipe itself.
    pub fn guest<S>(
        io: S,
        marker: Marker,
    ) -> (GuestSessions, impl Future<Output = io::Result<()>> + Send + use<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        Self::guest_with(io, marker, Terms::new(WINDOW))
    }

    /// As [`MuxDriver::guest`], with terms of its own.
    pub fn guest_with<S>(
        io: S,
        marker: Marker,
        terms: Terms,
    ) -> (GuestSessions, impl Future<Output = io::Result<()>> + Send + use<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (sender, sessions) = mpsc::channel(4);
        let wanted = Arc::new(std::sync::Mutex::new(marker));
        let driver = run_guest(io, terms, GuestScan::new(marker), Arc::clone(&wanted), sender);
        (GuestSessions { sessions, marker: wanted }, driver)
    }
}

impl GuestSessions {
    /// The next session. All streams of the one before have ended then.
    pub async fn next(&mut self) -> Option<GuestSession> {
        self.sessions.recv().await
    }

    /// Replaces the marker for all later sessions (`GuestConfigure.resync_marker`).
    pub fn set_marker(&self, marker: Marker) {
        *self.marker.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = marker;
    }

    /// A setter of the marker for whoever handles CONFIGURE.
    pub fn marker_setter(&self) -> impl Fn(Marker) + Send + Sync + 'static + use<> {
        let shared = Arc::clone(&self.marker);
        move |marker| {
            *shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = marker;
        }
    }
}

impl MuxHandle {
    /// Opens a stream to the other end, which sees it with the first bytes.
    pub fn open(&self, priority: Priority) -> io::Result<(MuxSend, MuxRecv)> {
        let id = self.shared.open(priority)?;
        Ok(half::pair(&self.shared, id))
    }

    /// Whether the session is over.
    pub fn is_ended(&self) -> bool {
        self.shared.is_ended()
    }

    /// Waits until the session is over; says why.
    pub async fn ended(&self) -> io::Error {
        std::future::poll_fn(|cx| self.shared.poll_ended(cx)).await
    }

    /// Ends the session here: all streams fail, and the driver with them.
    pub fn close(&self) {
        self.shared.end(io::ErrorKind::ConnectionAborted, "the guest link was closed");
    }
}

impl Incoming {
    /// The next stream that the other end opened; `None` when the session is over. Cancel-safe.
    pub async fn next(&mut self) -> Option<(MuxSend, MuxRecv)> {
        let id = std::future::poll_fn(|cx| self.shared.poll_accept(cx)).await?;
        Some(half::pair(&self.shared, id))
    }
}

fn handles(shared: &Arc<Shared>) -> (MuxHandle, Incoming) {
    (MuxHandle { shared: Arc::clone(shared) }, Incoming { shared: Arc::clone(shared) })
}
