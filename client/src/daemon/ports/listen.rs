//! Takes addresses on the laptop and accepts what comes there.
//!
//! Without an address that is named, only the loopbacks are taken: both under one port number, or
//! none. A port that is taken is replaced by a free one, and that is said.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use towline_proto::v1::StreamErrorCode;

use super::Mapping;
use super::dial::Way;
use crate::daemon::failure::DaemonFailure;

/// Connections that the kernel keeps for us until they are accepted.
const BACKLOG: u32 = 1024;
/// Ports after the one that is taken which are tried, before any.
const NEIGHBOURS: u16 = 20;
/// Tries to find one number that is free on both loopbacks.
const ANY_TRIES: usize = 16;
/// Before the next try when the system has no descriptor left.
const PAUSE: Duration = Duration::from_millis(50);

/// Sockets that listen, and are not accepted from yet.
#[derive(Debug)]
pub(super) struct Bound {
    listeners: Vec<TcpListener>,
    port: u16,
    problem: String,
}

/// A port that is served; dropping it ends that, but not its connections.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) port: u16,
    pub(super) addresses: Vec<SocketAddr>,
    /// Why it is not where it was asked for.
    pub(super) problem: String,
    _accepting: JoinSet<()>,
}

/// Takes the addresses of a mapping, preferably with this port.
pub(super) fn bind(asked: Mapping, preferred: u16) -> Result<Bound, DaemonFailure> {
    let mut problem = String::new();
    for port in candidates(preferred) {
        match take(asked.host, port) {
            Ok((listeners, port)) => {
                if asked.host_port != 0 && port != asked.host_port && problem.is_empty() {
                    problem = format!("port {} was in use on this machine", asked.host_port);
                }
                return Ok(Bound { listeners, port, problem });
            }
            Err(error) => match (error.kind(), asked.host) {
                (io::ErrorKind::AddrNotAvailable, Some(host)) => {
                    let text = format!("{host} is not an address of this machine");
                    return Err(DaemonFailure::invalid(text));
                }
                (io::ErrorKind::PermissionDenied, _) if problem.is_empty() => {
                    problem = format!("port {port} needs privileges on this machine");
                }
                (io::ErrorKind::AddrInUse, _) if problem.is_empty() => {
                    problem = format!("port {port} is in use on this machine");
                }
                (io::ErrorKind::PermissionDenied | io::ErrorKind::AddrInUse, _) => {}
                _ => {
                    let text = format!("cannot listen on port {port}: {error}");
                    return Err(DaemonFailure::new(StreamErrorCode::Internal, text));
                }
            },
        }
    }
    let text = format!("no port of this machine is free for port {} of the sandbox", asked.port);
    Err(DaemonFailure::new(StreamErrorCode::Limit, text))
}

fn candidates(preferred: u16) -> impl Iterator<Item = u16> {
    let near = (preferred..=preferred.saturating_add(NEIGHBOURS)).filter(|&port| port != 0);
    let near = near.filter(move |&port| port == preferred || port >= 1024);
    let near = (preferred != 0).then_some(near).into_iter().flatten();
    near.chain(std::iter::repeat_n(0, ANY_TRIES))
}

/// Listens on the address, or on both loopbacks with one port.
fn take(host: Option<IpAddr>, port: u16) -> io::Result<(Vec<TcpListener>, u16)> {
    if let Some(host) = host {
        let listener = listen(SocketAddr::new(host, port))?;
        let port = listener.local_addr()?.port();
        return Ok((vec![listener], port));
    }
    let first = listen(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))?;
    let port = first.local_addr()?.port();
    match listen(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)) {
        Ok(second) => Ok((vec![first, second], port)),
        // A machine without IPv6 has one loopback.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable || no_family(&error) => {
            Ok((vec![first], port))
        }
        Err(error) => Err(error),
    }
}

fn no_family(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::AFNOSUPPORT)
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A port that we have just left is ours again at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Listening {
    /// Accepts connections and sends each its way.
    pub(super) fn start(bound: Bound, way: &Way, slots: &Arc<Semaphore>) -> Self {
        let Bound { listeners, port, problem } = bound;
        let addresses = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn(accept(listener, way.clone(), Arc::clone(slots)));
        }
        Self { port, addresses, problem, _accepting: accepting }
    }
}

async fn accept(listener: TcpListener, way: Way, slots: Arc<Semaphore>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let way = way.clone();
        // Of its own: it goes on when the port is unpublished.
        tokio::spawn(async move {
            way.carry(stream).await;
            drop(slot);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_replaced_and_that_is_said() {
        // Either loopback being taken is reason enough.
        for holder in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(holder) = std::net::TcpListener::bind(holder) else { continue };
            let port = holder.local_addr().unwrap().port();
            let asked = Mapping { host: None, host_port: port, port: 80 };
            let bound = bind(asked, port).unwrap();
            assert_ne!(bound.port, port);
            assert_eq!(bound.problem, format!("port {port} is in use on this machine"));
            let numbers = bound.listeners.iter().map(|l| l.local_addr().unwrap().port());
            assert!(numbers.into_iter().all(|number| number == bound.port));
        }
    }

    #[tokio::test]
    async fn only_loopbacks_are_taken_unless_an_address_is_named() {
        let bound = bind(Mapping { host: None, host_port: 0, port: 80 }, 0).unwrap();
        assert!(bound.problem.is_empty());
        for listener in &bound.listeners {
            assert!(listener.local_addr().unwrap().ip().is_loopback());
        }
        let any = Mapping { host: Some(Ipv4Addr::UNSPECIFIED.into()), host_port: 0, port: 80 };
        let bound = bind(any, 0).unwrap();
        assert!(bound.listeners[0].local_addr().unwrap().ip().is_unspecified());
        let far = Mapping { host: Some("203.0.113.9".parse().unwrap()), host_port: 0, port: 80 };
        assert!(bind(far, 0).unwrap_err().message.contains("not an address of this machine"));
    }

    #[test]
    fn neighbours_are_tried_before_any() {
        let all: Vec<u16> = candidates(80).collect();
        assert_eq!(all[..2], [80, 0]);
        let all: Vec<u16> = candidates(8080).collect();
        assert_eq!(all[..3], [8080, 8081, 8082]);
        assert_eq!(candidates(0).count(), ANY_TRIES);
        assert_eq!(candidates(65_535).next(), Some(65_535));
    }
}
