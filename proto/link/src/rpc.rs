//! gRPC over mutual TLS and over Unix sockets: serving, connecting, and the generated services.
//!
//! What a service knows of its caller is the [`Peer`] in the request's extensions, put there by
//! the connection and by nothing that a caller can write.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
pub use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Server};

use crate::peer::Peer;
pub use crate::rpc_generated::control_plane_client::ControlPlaneClient;
pub use crate::rpc_generated::control_plane_server::{ControlPlane, ControlPlaneServer};
pub use crate::rpc_generated::node_uplink_client::NodeUplinkClient;
pub use crate::rpc_generated::node_uplink_server::{NodeUplink, NodeUplinkServer};

/// Largest gRPC message either side accepts: a page of 1000 sandboxes with long environments.
pub const MESSAGE_MAX: usize = 16 << 20;

/// A connection that shows no sign of life for this long is asked for one, and given this long.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bound on one handshake, and on how many are under way at once.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HANDSHAKES_MAX: usize = 256;

/// Bound on connecting, name resolution and handshake together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams that one connection may have open.
const H2_STREAMS_MAX: u32 = 1024;

/// Says why a connection could not be made or a listener stopped.
#[derive(Debug, thiserror::Error)]
pub enum RpcTransportError {
    /// Not `host:port`.
    #[error("`{0}` is not an address: host:port is expected")]
    Endpoint(String),
    /// Nobody there, or not who was expected.
    #[error("could not connect to `{endpoint}`")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The server ended with an error.
    #[error("serving stopped")]
    Serve(#[source] tonic::transport::Error),
}

/// Where a server listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP with TLS.
    Tcp(TcpListener, Arc<ServerConfig>),
    /// A Unix socket: the peer's uid is its identity.
    Unix(UnixListener),
}

/// Serves until `shutdown` is ready and the calls under way have ended, or are dropped with the
/// future.
pub async fn serve(
    listener: Listener,
    routes: Routes,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RpcTransportError> {
    let (accepted, incoming) = mpsc::channel(16);
    let mut acceptor = JoinSet::new(); // aborted when this future is dropped or returns
    match listener {
        Listener::Tcp(listener, tls) => acceptor.spawn(accept_tcp(listener, tls, accepted)),
        Listener::Unix(listener) => acceptor.spawn(accept_unix(listener, accepted)),
    };
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(H2_STREAMS_MAX)
        .add_routes(routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), shutdown)
        .await
        .map_err(RpcTransportError::Serve)
}

type Accepted = mpsc::Sender<io::Result<PeerStream>>;

async fn accept_tcp(listener: TcpListener, tls: Arc<ServerConfig>, accepted: Accepted) {
    let acceptor = TlsAcceptor::from(tls);
    let room = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut handshakes = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let tcp = tokio::select! {
            tcp = listener.accept() => tcp,
            () = accepted.closed() => return,
        };
        let Some(tcp) = survive(tcp.map(|(tcp, _)| tcp)).await else { continue };
        while handshakes.try_join_next().is_some() {}
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        handshakes.spawn(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(tcp, acceptor)).await;
            drop(permit);
            match handshake {
                Ok(Ok(stream)) => {
                    let _ = accepted.send(Ok(stream)).await;
                }
                Ok(Err(error)) => tracing::debug!(%error, "tls handshake failed"),
                Err(_) => tracing::debug!("tls handshake timed out"),
            }
        });
    }
}

async fn handshake(tcp: TcpStream, acceptor: TlsAcceptor) -> io::Result<PeerStream> {
    tcp.set_nodelay(true)?;
    let address = tcp.peer_addr()?;
    let tls = acceptor.accept(tcp).await?;
    let peer =
        Peer::from_chain(tls.get_ref().1.peer_certificates(), address).map_err(io::Error::other)?;
    Ok(PeerStream { io: Box::new(tls), peer })
}

async fn accept_unix(listener: UnixListener, accepted: Accepted) {
    loop {
        let unix = tokio::select! {
            unix = listener.accept() => unix,
            () = accepted.closed() => return,
        };
        let Some(unix) = survive(unix.map(|(unix, _)| unix)).await else { continue };
        let Ok(credentials) = unix.peer_cred() else { continue };
        let peer = Peer { uid: Some(credentials.uid()), ..Peer::default() };
        if accepted.send(Ok(PeerStream { io: Box::new(unix), peer })).await.is_err() {
            return;
        }
    }
}

/// A failed accept (out of descriptors, a peer that left already) is not the listener's end.
async fn survive<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::warn!(%error, "accept failed");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection and who is at its other end.
struct PeerStream {
    io: Box<dyn Io>,
    peer: Peer,
}

impl Connected for PeerStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Connects to `host:port` and says so when nobody, or somebody else, is there. The channel
/// connects again by itself when it is used after a break; its clients should be made by
/// [`control_plane`] or [`node_uplink`].
pub async fn connect(endpoint: &str, tls: Arc<ClientConfig>) -> Result<Channel, RpcTransportError> {
    let target = target(endpoint)?;
    let connector = tls_connector(endpoint.to_owned(), tls);
    let connector = tower::service_fn(connector);
    target
        .connect_with_connector(connector)
        .await
        .map_err(|source| RpcTransportError::Connect { endpoint: endpoint.into(), source })
}

/// As [`connect`], but the first call connects: a server that is down is that call's
/// `Unreachable`.
pub fn connect_lazy(endpoint: &str, tls: Arc<ClientConfig>) -> Result<Channel, RpcTransportError> {
    let target = target(endpoint)?;
    let connector = tls_connector(endpoint.to_owned(), tls);
    Ok(target.connect_with_connector_lazy(tower::service_fn(connector)))
}

type TlsIo = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;
type Connecting = Pin<Box<dyn Future<Output = io::Result<TlsIo>> + Send>>;

fn tls_connector(
    address: String,
    tls: Arc<ClientConfig>,
) -> impl FnMut(http::Uri) -> Connecting + Clone + Send + 'static {
    move |_| {
        let (address, connector) = (address.clone(), TlsConnector::from(Arc::clone(&tls)));
        Box::pin(async move { connect_tls(&address, connector).await.map(TokioIo::new) })
    }
}

/// Connects to a server on a Unix socket.
pub async fn connect_unix(path: &Path) -> Result<Channel, RpcTransportError> {
    let target = target("localhost:1")?; // only the authority of requests; nothing is dialled
    let socket: PathBuf = path.into();
    let connector = tower::service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    target.connect_with_connector(connector).await.map_err(|source| RpcTransportError::Connect {
        endpoint: path.display().to_string(),
        source,
    })
}

/// A client of the control plane with our message bounds.
pub fn control_plane(channel: Channel) -> ControlPlaneClient<Channel> {
    ControlPlaneClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

/// A client of the nodes' uplink with our message bounds.
pub fn node_uplink(channel: Channel) -> NodeUplinkClient<Channel> {
    NodeUplinkClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

/// A control plane service with our message bounds, for [`Routes`].
pub fn control_plane_server<S: ControlPlane>(service: S) -> ControlPlaneServer<S> {
    ControlPlaneServer::new(service)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

/// A node uplink service with our message bounds, for [`Routes`].
pub fn node_uplink_server<S: NodeUplink>(service: S) -> NodeUplinkServer<S> {
    NodeUplinkServer::new(service)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

async fn connect_tls(
    address: &str,
    connector: TlsConnector,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(crate::tls::SERVER_NAME).map_err(io::Error::other)?;
    connector.connect(name, tcp).await
}

fn target(endpoint: &str) -> Result<Endpoint, RpcTransportError> {
    let wrong = || RpcTransportError::Endpoint(endpoint.into());
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    let target = Endpoint::from_shared(format!("http://{endpoint}")).map_err(|_| wrong())?;
    Ok(target
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT))
}
