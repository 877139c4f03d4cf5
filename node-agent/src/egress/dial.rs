//! From what was asked for to an open socket: resolve once, decide about every address of the
//! answer, dial those that are allowed, in the resolver's order.
//!
//! The invariant: what is dialled is what was decided about; there is no second look-up.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use towline_proto::v1::{EgressProtocol, StreamErrorCode};

use super::name::TargetName;
use super::own::Own;
use super::policy::{self, Decision, Policy, Wanted};
use super::refused_by;
use super::resolver::{Resolve, ResolveError};
use super::rules::OperatorRules;
use crate::gates::Refused;

/// Addresses of one name that are dialled.
const TRIES_MAX: usize = 6;
/// How long one of several is waited for, and the last or only one: as long as Linux tries by
/// default would keep a stream busy for two minutes.
const NEXT_AFTER: Duration = Duration::from_secs(4);
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// A peer that has vanished is noticed after this much silence and some probes.
const KEEPALIVE: Duration = Duration::from_secs(120);

/// What a workload asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// By name.
    Name(TargetName),
    /// By address.
    Address(IpAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// What was decided.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// These may be dialled; at least one.
    Allowed(Vec<(IpAddr, Decision)>),
    /// None may: the first of them and why, or no address where none was looked up.
    Blocked(Option<IpAddr>, Decision),
}

/// Resolves and decides.
#[derive(Debug)]
pub(crate) struct Dialler {
    pub(crate) rules: OperatorRules,
    pub(crate) own: Own,
    pub(crate) resolver: Arc<dyn Resolve>,
}

impl Dialler {
    /// Decides about every address of a target.
    pub(crate) async fn choose(
        &self,
        policy: Policy,
        target: &Target,
        port: u16,
        protocol: EgressProtocol,
    ) -> Result<Chosen, Refused> {
        if policy == Policy::None {
            return Ok(Chosen::Blocked(None, policy::closed()));
        }
        let (name, addresses) = match target {
            Target::Address(address) => (None, vec![*address]),
            Target::Name(name) => {
                let found = self.resolver.addresses(name.clone()).await;
                (Some(name), found.map_err(|error| not_found(name, &error))?)
            }
        };
        let (mut allowed, mut blocked) = (Vec::new(), None);
        for address in addresses {
            let own = self.own.addresses(address).await.map_err(|error| {
                let message = format!("the node does not know its own addresses: {error}");
                Refused::new(StreamErrorCode::Internal, message)
            })?;
            let wanted = Wanted { name, address, port, protocol };
            let decision = policy::decide(policy, &self.rules, &own, wanted);
            if decision.allowed {
                allowed.push((address, decision));
            } else {
                blocked.get_or_insert((address, decision));
            }
        }
        match (allowed.is_empty(), blocked) {
            (false, _) => Ok(Chosen::Allowed(allowed)),
            (true, Some((address, decision))) => Ok(Chosen::Blocked(Some(address), decision)),
            (true, None) => {
                Err(Refused::new(StreamErrorCode::NameNotFound, "the name has no addresses"))
            }
        }
    }
}

fn not_found(name: &TargetName, error: &ResolveError) -> Refused {
    let code = match error {
        ResolveError::NoSuchName | ResolveError::NoData => StreamErrorCode::NameNotFound,
        ResolveError::TimedOut => StreamErrorCode::TimedOut,
        ResolveError::Failed(_) => StreamErrorCode::Unreachable,
    };
    Refused::new(code, format!("{name}: {error}"))
}

/// Connects to the first of these that answers.
pub(crate) async fn connect(allowed: &[IpAddr], port: u16) -> Result<TcpStream, Refused> {
    let mut worst: Option<Refused> = None;
    let tries = allowed.len().min(TRIES_MAX);
    for (at, address) in allowed.iter().take(tries).enumerate() {
        let bound = if at + 1 == tries { CONNECT_MAX } else { NEXT_AFTER };
        let connected = timeout(bound, TcpStream::connect(SocketAddr::new(*address, port))).await;
        let refused = match connected {
            Ok(Ok(stream)) => match set_up(&stream) {
                Ok(()) => return Ok(stream),
                Err(error) => refused_by(&error),
            },
            Ok(Err(error)) => refused_by(&error),
            Err(_) => refused_by(&io::ErrorKind::TimedOut.into()),
        };
        if worst.as_ref().is_none_or(|worst| telling(worst) <= telling(&refused)) {
            worst = Some(refused);
        }
    }
    Err(worst.unwrap_or_else(|| Refused::new(StreamErrorCode::Unreachable, "no address to try")))
}

/// Which of several failures says most about the other end.
fn telling(refused: &Refused) -> u8 {
    match refused.code {
        StreamErrorCode::ConnectionRefused => 3,
        StreamErrorCode::Limit => 2,
        StreamErrorCode::TimedOut => 1,
        _ => 0,
    }
}

fn set_up(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
}

/// A socket for datagrams to the first of these that there is a way to.
pub(crate) async fn flow(allowed: &[IpAddr], port: u16) -> Result<UdpSocket, Refused> {
    let mut last = None;
    for address in allowed.iter().take(TRIES_MAX) {
        let any: SocketAddr = match address {
            IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            IpAddr::V6(_) => ([0u16; 8], 0).into(),
        };
        let connected = async {
            let socket = UdpSocket::bind(any).await?;
            socket.connect(SocketAddr::new(*address, port)).await?;
            io::Result::Ok(socket)
        };
        match connected.await {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(refused_by(&error)),
        }
    }
    Err(last.unwrap_or_else(|| Refused::new(StreamErrorCode::Unreachable, "no address to try")))
}
