//! The link: one QUIC connection per laptop and node, mutual TLS, many streams.
//!
//! The transport's numbers and why they are so are in this file. The invariant that keeps a lossy
//! transfer from killing the connection: no stream's window is over 2 MB, so a full-size packet
//! cannot open more gaps than quinn-proto bears (1024). Larger paths are filled by more streams.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, ConnectionError, Endpoint, EndpointConfig, Incoming, MtuDiscoveryConfig,
    ServerConfig, TransportConfig, VarInt,
};
use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use crate::authority::CaCertificate;
use crate::identity::Role;
use crate::peer::Peer;
use crate::stream::{LinkStream, Priority};
use crate::tls::{self, ALPN_LINK, CertStore, ClientAuth, SERVER_NAME, TlsError, Trust};

/// See the file's comment: must stay at or below 2 MB.
const STREAM_WINDOW: u32 = 2_000_000;
/// What a connection may hold unread, and unacknowledged.
const CONNECTION_WINDOW: u32 = 32 << 20;
/// quinn's 100 stalls a forwarded browser.
const STREAMS_MAX: u32 = 4096;
/// A laptop asleep for longer opens a new connection and resumes by offsets.
const IDLE_TIMEOUT_MS: u32 = 30_000;
const KEEP_ALIVE: Duration = Duration::from_secs(8);
/// Removed all loss on loopback; the kernel gives what `net.core.rmem_max` allows.
const UDP_BUFFER: usize = 4 << 20;
/// Ten GSO segments of it stay under 64 KiB; over 6,500 sends fail and look like loss.
const LOOPBACK_MTU: u16 = 6000;
const UDP_PAYLOAD_MAX: u16 = 6500;
/// Datagrams carry only probes, which nobody reads: quinn drops the oldest.
const PROBES_BUFFER: usize = 16 << 10;
/// Bound on a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connection attempts that a node keeps waiting; more are refused.
const INCOMING_MAX: usize = 256;

/// Says why a link could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A certificate or key is bad.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No UDP socket.
    #[error("could not open a UDP socket at {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The node's name has no address.
    #[error("could not find the address of node `{endpoint}`")]
    Resolve {
        /// What was looked up.
        endpoint: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection could not be made or broke.
    #[error("no link to {address}: {reason}")]
    Connection {
        /// The other end.
        address: String,
        /// Why.
        reason: String,
    },
}

fn broken(address: impl ToString, reason: &impl ToString) -> LinkError {
    LinkError::Connection { address: address.to_string(), reason: reason.to_string() }
}

/// A node's side.
#[derive(Debug)]
pub struct LinkServer {
    endpoint: Endpoint,
    loopback: Arc<ServerConfig>,
}

impl LinkServer {
    /// Listens; must be called inside a tokio runtime.
    pub fn bind(
        address: SocketAddr,
        store: &CertStore,
        ca: &CaCertificate,
    ) -> Result<Self, LinkError> {
        let tls = tls::server_config(store, ca, ClientAuth::Required, &[ALPN_LINK])?;
        let crypto = QuicServerConfig::try_from(tls).map_err(|e| broken(address, &e))?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.max_incoming(INCOMING_MAX);
        config.transport_config(Arc::new(transport(false)));
        let mut loopback = config.clone();
        loopback.transport_config(Arc::new(transport(true)));
        let endpoint = endpoint(address, Some(config))?;
        Ok(Self { endpoint, loopback: Arc::new(loopback) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next attempt to connect, to be finished in a task of its own; `None` after
    /// [`Self::close`]. Cancel-safe.
    pub async fn accept(&self) -> Option<LinkHandshake> {
        let incoming = self.endpoint.accept().await?;
        let near = incoming.remote_address().ip().to_canonical().is_loopback();
        Some(LinkHandshake { incoming, loopback: near.then(|| Arc::clone(&self.loopback)) })
    }

    /// Ends every connection.
    pub fn close(&self, reason: &str) {
        self.endpoint.close(CLOSE_GOING_AWAY, reason.as_bytes());
    }

    /// Waits until the peers have been told, at most two seconds.
    pub async fn wait_closed(&self) {
        let _ = tokio::time::timeout(Duration::from_secs(2), self.endpoint.wait_idle()).await;
    }
}

/// An attempt to connect, not yet authenticated.
#[derive(Debug)]
pub struct LinkHandshake {
    incoming: Incoming,
    loopback: Option<Arc<ServerConfig>>,
}

impl LinkHandshake {
    /// Finishes the handshake: the peer holds a certificate of the cluster, or this fails.
    pub async fn finish(self) -> Result<LinkConnection, LinkError> {
        let address = self.incoming.remote_address();
        let connecting = match self.loopback {
            Some(config) => self.incoming.accept_with(config),
            None => self.incoming.accept(),
        };
        let connecting = connecting.map_err(|e| broken(address, &e))?;
        let connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting)
            .await
            .map_err(|_| broken(address, &"the handshake timed out"))?
            .map_err(|e| broken(address, &e))?;
        LinkConnection::new(connection)
    }
}

/// A laptop's side: one socket for all nodes.
#[derive(Debug)]
pub struct LinkClient {
    endpoint: Endpoint,
    near: ClientConfig,
    far: ClientConfig,
}

impl LinkClient {
    /// Opens the socket; must be called inside a tokio runtime.
    pub fn new(store: &CertStore, ca: &CaCertificate) -> Result<Self, LinkError> {
        let trust = Trust::Ca(ca.clone());
        let tls = tls::client_config(Some(store), trust, Role::Node, &[ALPN_LINK])?;
        let crypto = QuicClientConfig::try_from(tls).map_err(|e| broken("any node", &e))?;
        let crypto: Arc<QuicClientConfig> = Arc::new(crypto);
        let config = |loopback| {
            let mut transport = transport(loopback);
            transport
                .keep_alive_interval(Some(KEEP_ALIVE))
                // Nodes open nothing towards laptops.
                .max_concurrent_bidi_streams(VarInt::from_u32(0));
            let mut config = ClientConfig::new(Arc::clone(&crypto) as _);
            config.transport_config(Arc::new(transport));
            config
        };
        let (near, far) = (config(true), config(false));
        let endpoint = endpoint((Ipv6Addr::UNSPECIFIED, 0).into(), None)
            .or_else(|_| endpoint((Ipv4Addr::UNSPECIFIED, 0).into(), None))?;
        Ok(Self { endpoint, near, far })
    }

    /// Connects to a node at `host:port`, trying each of its addresses. With a `name` the node's
    /// certificate must have it.
    pub async fn connect(
        &self,
        node: &str,
        name: Option<&str>,
    ) -> Result<LinkConnection, LinkError> {
        let resolve = |source| LinkError::Resolve { endpoint: node.into(), source };
        let addresses = tokio::net::lookup_host(node).await.map_err(resolve)?;
        let mut last = resolve(io::Error::other("it has no address"));
        for address in addresses {
            match self.connect_to(address).await {
                Ok(connection) => return check_name(connection, name),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(&self, address: SocketAddr) -> Result<LinkConnection, LinkError> {
        let near = address.ip().to_canonical().is_loopback();
        let config = if near { &self.near } else { &self.far };
        let connecting = self
            .endpoint
            .connect_with(config.clone(), address, SERVER_NAME)
            .map_err(|e| broken(address, &e))?;
        let connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting)
            .await
            .map_err(|_| broken(address, &"no answer; is UDP allowed on the way?"))?
            .map_err(|e| broken(address, &e))?;
        LinkConnection::new(connection)
    }

    /// Ends every connection and tells the peers, waiting at most two seconds.
    pub async fn close(&self) {
        self.endpoint.close(CLOSE_DONE, b"");
        let _ = tokio::time::timeout(Duration::from_secs(2), self.endpoint.wait_idle()).await;
    }
}

fn check_name(link: LinkConnection, name: Option<&str>) -> Result<LinkConnection, LinkError> {
    let got = link.peer().identity.as_ref().map(|identity| identity.name());
    match name {
        Some(name) if got != Some(name) => {
            let reason = format!("it is node `{}`, not `{name}`", got.unwrap_or("?"));
            link.close(CLOSE_REFUSED, "another node was expected");
            Err(broken(link.connection.remote_address(), &reason))
        }
        _ => Ok(link),
    }
}

/// Closed because nothing is left to do.
pub const CLOSE_DONE: VarInt = VarInt::from_u32(0);
/// Closed because this end goes away; connect again.
pub const CLOSE_GOING_AWAY: VarInt = VarInt::from_u32(1);
/// Closed because this end refuses the other.
pub const CLOSE_REFUSED: VarInt = VarInt::from_u32(2);

/// An authenticated link. Clones are the same connection.
#[derive(Debug, Clone)]
pub struct LinkConnection {
    connection: quinn::Connection,
    peer: Arc<Peer>,
}

impl LinkConnection {
    fn new(connection: quinn::Connection) -> Result<Self, LinkError> {
        let address = connection.remote_address();
        let chain = connection
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let peer = Peer::from_chain(chain.as_deref().map(Vec::as_slice), address)
            .map_err(|e| broken(address, &e))?;
        if peer.identity.is_none() {
            return Err(broken(address, &"the peer has no certificate"));
        }
        Ok(Self { connection, peer: Arc::new(peer) })
    }

    /// Who is at the other end; its identity and key are always known.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Opens a stream. Nothing is sent until something is written. Waits while the peer's bound on
    /// streams is met.
    pub async fn open(&self, priority: Priority) -> io::Result<LinkStream> {
        let (send, receive) = self.connection.open_bi().await?;
        Ok(LinkStream::new(receive, send, priority))
    }

    /// The next stream that the peer opened. Cancel-safe. Answers travel with
    /// [`Priority::default`] until `set_priority`.
    pub async fn accept(&self) -> io::Result<LinkStream> {
        let (send, receive) = self.connection.accept_bi().await?;
        Ok(LinkStream::new(receive, send, Priority::default()))
    }

    /// Sends something that the peer acknowledges at once if it is there, also while QUIC's own
    /// timers have backed off after a silence.
    pub fn probe(&self) {
        let _ = self.connection.send_datagram(Bytes::from_static(b"?"));
    }

    /// Whether it has ended.
    pub fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Waits for its end and says why.
    pub async fn closed(&self) -> ConnectionError {
        self.connection.closed().await
    }

    /// Ends it, with all its streams.
    pub fn close(&self, code: VarInt, reason: &str) {
        self.connection.close(code, reason.as_bytes());
    }

    /// The smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Packets, bytes and losses so far.
    pub fn stats(&self) -> quinn::ConnectionStats {
        self.connection.stats()
    }
}

fn transport(loopback: bool) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(CONNECTION_WINDOW.into())
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
        .datagram_receive_buffer_size(Some(PROBES_BUFFER))
        .enable_segmentation_offload(true);
    if loopback {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(LOOPBACK_MTU);
        transport
            .initial_mtu(LOOPBACK_MTU)
            .mtu_discovery_config(Some(discovery))
            .initial_rtt(Duration::from_millis(10));
    }
    transport
}

fn endpoint(address: SocketAddr, server: Option<ServerConfig>) -> Result<Endpoint, LinkError> {
    let make = || -> io::Result<Endpoint> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() && address.ip().is_unspecified() {
            socket.set_only_v6(false)?;
        }
        // Less than asked for only costs speed.
        let _ = socket.set_recv_buffer_size(UDP_BUFFER);
        let _ = socket.set_send_buffer_size(UDP_BUFFER);
        socket.bind(&address.into())?;
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(UDP_PAYLOAD_MAX).map_err(io::Error::other)?;
        Endpoint::new(config, server, socket.into(), Arc::new(quinn::TokioRuntime))
    };
    make().map_err(|source| LinkError::Bind { address, source })
}
