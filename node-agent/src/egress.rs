//! A sandbox's only way out: the node decides about each connection, datagram flow and name that a
//! guest asks for, resolves, checks the address that it got, and dials that very address.
//!
//! A guest may forge anything: nothing it says is used but a name or address and a port, and what
//! it may have open at once is bounded. [`policy`] decides and is pure; the other files do.

pub mod dial;
pub mod lookup;
pub mod name;
pub mod own;
pub mod policy;
pub mod resolver;
pub mod rules;
pub mod special;
mod tcp;
mod udp;

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{
    EgressDecision, EgressOpen, EgressOpened, EgressProtocol, StreamError, StreamErrorCode,
    egress_open,
};
use towline_streams::{FrameReader, FrameWriter};

use crate::feed::Feed;
use crate::gates::{Gates, Refused};
use crate::streams;
use dial::{Dialler, Target};
use name::TargetName;
use own::Own;
use policy::{Decision, Policy};
use resolver::Resolve;
use rules::OperatorRules;

/// TCP connections of one sandbox, open or being opened: a package manager wants some tens.
pub const TCP_MAX: usize = 512;
/// Datagram flows of one sandbox.
pub const UDP_MAX: usize = 256;
/// Names of one sandbox that are looked up at once; more wait. Far less than all sandboxes may, so
/// that one with names that nobody answers does not stop the others.
pub const LOOKUPS_MAX: usize = 16;

/// What all sandboxes of a node share.
#[derive(Debug)]
pub struct Egress {
    dialler: Dialler,
    /// Descriptors that all of them may hold, so that the node agent always has some left.
    sockets: Arc<Semaphore>,
}

impl Egress {
    /// One that asks this resolver and counts these as the node. `sockets_max` bounds all sandboxes
    /// together.
    pub fn new(
        rules: OperatorRules,
        own: Own,
        resolver: Arc<dyn Resolve>,
        sockets_max: usize,
    ) -> Arc<Self> {
        let sockets = Arc::new(Semaphore::new(sockets_max));
        Arc::new(Self { dialler: Dialler { rules, own, resolver }, sockets })
    }

    /// One sandbox's share.
    pub fn of_sandbox(
        self: &Arc<Self>,
        sandbox: SandboxId,
        policy: Policy,
        feed: Arc<Feed>,
        gates: Arc<Gates>,
    ) -> Arc<SandboxEgress> {
        Arc::new(SandboxEgress {
            node: Arc::clone(self),
            sandbox,
            policy,
            feed,
            gates,
            tcp: Arc::new(Semaphore::new(TCP_MAX)),
            udp: Arc::new(Semaphore::new(UDP_MAX)),
            lookups: Semaphore::new(LOOKUPS_MAX),
        })
    }
}

/// One sandbox's way out.
#[derive(Debug)]
pub struct SandboxEgress {
    node: Arc<Egress>,
    sandbox: SandboxId,
    policy: Policy,
    feed: Arc<Feed>,
    gates: Arc<Gates>,
    tcp: Arc<Semaphore>,
    udp: Arc<Semaphore>,
    lookups: Semaphore,
}

/// Held while a connection is open.
#[derive(Debug)]
struct Permit {
    _sandbox: OwnedSemaphorePermit,
    _node: OwnedSemaphorePermit,
}

impl SandboxEgress {
    /// Serves a stream that began with `open`, until it or the sandbox ends.
    pub(crate) async fn serve<R, W>(
        &self,
        open: EgressOpen,
        reader: FrameReader<R>,
        mut writer: FrameWriter<W>,
    ) where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let pass = match self.gates.enter_running(self.sandbox) {
            Ok(pass) => pass,
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        tokio::select! {
            () = self.connect(&open, reader, writer) => {}
            // Dropping it resets both ends.
            () = pass.revoked() => {}
        }
    }

    async fn connect<R, W>(
        &self,
        open: &EgressOpen,
        reader: FrameReader<R>,
        mut writer: FrameWriter<W>,
    ) where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (protocol, target, port) = match understand(open) {
            Ok(understood) => understood,
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        let permit = match self.permit(protocol) {
            Ok(permit) => permit,
            Err(refused) => return streams::refuse(&mut writer, &refused).await,
        };
        let wanted = (protocol, &target, port);
        match protocol {
            EgressProtocol::Udp => match self.flow(wanted).await {
                Ok(socket) => udp::relay(&socket, reader, writer).await,
                Err(refused) => streams::refuse(&mut writer, &refused).await,
            },
            EgressProtocol::Tcp | EgressProtocol::Unspecified => {
                match self.connection(wanted).await {
                    Ok(upstream) => {
                        let ended = tcp::relay(upstream, reader, writer).await;
                        tracing::debug!(sandbox = %self.sandbox, ?ended, "connection ended");
                    }
                    Err(refused) => streams::refuse(&mut writer, &refused).await,
                }
            }
        }
        drop(permit);
    }

    async fn connection(
        &self,
        wanted: (EgressProtocol, &Target, u16),
    ) -> Result<tcp::Upstream, Refused> {
        let allowed = self.decide(wanted).await?;
        dial::connect(&allowed, wanted.2).await.map(tcp::Upstream::new)
    }

    async fn flow(
        &self,
        wanted: (EgressProtocol, &Target, u16),
    ) -> Result<tokio::net::UdpSocket, Refused> {
        let allowed = self.decide(wanted).await?;
        dial::flow(&allowed, wanted.2).await
    }

    /// Which addresses may be dialled; what was decided goes into the feed.
    async fn decide(
        &self,
        (protocol, target, port): (EgressProtocol, &Target, u16),
    ) -> Result<Vec<std::net::IpAddr>, Refused> {
        let lookup = match target {
            Target::Name(_) => Some(self.lookups.acquire().await),
            Target::Address(_) => None,
        };
        let chosen = self.node.dialler.choose(self.policy, target, port, protocol).await?;
        drop(lookup);
        let record = |decision: &Decision, address: String| {
            self.feed.egress(decision_of(protocol, target, port, address, decision));
        };
        let shown = |address: std::net::IpAddr| match target {
            Target::Name(_) => address.to_string(),
            Target::Address(_) => String::new(),
        };
        match chosen {
            dial::Chosen::Allowed(addresses) => {
                if let Some((address, decision)) = addresses.first() {
                    record(decision, shown(*address));
                }
                Ok(addresses.into_iter().map(|(address, _)| address).collect())
            }
            dial::Chosen::Blocked(address, decision) => {
                record(&decision, address.map(shown).unwrap_or_default());
                let message = format!("blocked by rule `{}`", decision.rule);
                Err(Refused::new(StreamErrorCode::Blocked, message))
            }
        }
    }

    fn permit(&self, protocol: EgressProtocol) -> Result<Permit, Refused> {
        let limit = |message: String| Refused::new(StreamErrorCode::Limit, message);
        let (own, max, what) = match protocol {
            EgressProtocol::Udp => (&self.udp, UDP_MAX, "datagram flows"),
            EgressProtocol::Tcp | EgressProtocol::Unspecified => {
                (&self.tcp, TCP_MAX, "connections")
            }
        };
        let sandbox = Arc::clone(own).try_acquire_owned().map_err(|_| {
            limit(format!("the sandbox has {max} {what} open, which is the most it may have"))
        })?;
        let node = Arc::clone(&self.node.sockets).try_acquire_owned().map_err(|_| {
            limit("the node's sandboxes have as many connections as it allows".into())
        })?;
        Ok(Permit { _sandbox: sandbox, _node: node })
    }
}

fn decision_of(
    protocol: EgressProtocol,
    target: &Target,
    port: u16,
    address: String,
    decision: &Decision,
) -> EgressDecision {
    EgressDecision {
        protocol: protocol.into(),
        target: target.to_string(),
        port: port.into(),
        address,
        allowed: decision.allowed,
        rule: decision.rule.clone(),
        hint: decision.hint.clone(),
        count: 1,
    }
}

/// Checks what a guest asks for.
pub fn understand(open: &EgressOpen) -> Result<(EgressProtocol, Target, u16), Refused> {
    let invalid = |message: String| Refused::new(StreamErrorCode::Invalid, message);
    let protocol = match open.protocol() {
        EgressProtocol::Unspecified => {
            return Err(invalid("the protocol is neither TCP nor UDP".into()));
        }
        protocol => protocol,
    };
    let port = u16::try_from(open.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| invalid(format!("{} is not a port", open.port)))?;
    let target = match &open.target {
        Some(egress_open::Target::Name(name)) => {
            Target::Name(TargetName::parse(name).map_err(|error| invalid(error.to_string()))?)
        }
        Some(egress_open::Target::Address(bytes)) => Target::Address(
            address(bytes).ok_or_else(|| invalid("an address has 4 or 16 bytes".into()))?,
        ),
        None => return Err(invalid("nothing is named".into())),
    };
    Ok((protocol, target, port))
}

fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}

/// Does to any bytes what is done to those with which a guest asks for the network; for fuzzing.
pub fn fuzz(bytes: &[u8]) {
    use prost::Message as _;
    if let Ok(open) = towline_proto::v1::LookupOpen::decode(bytes) {
        let _ = TargetName::parse(&open.name);
    }
    let Ok(open) = EgressOpen::decode(bytes) else { return };
    let Ok((protocol, Target::Address(address), port)) = understand(&open) else { return };
    let (rules, own) = (OperatorRules::default(), policy::OwnAddresses::default());
    let wanted = policy::Wanted { name: None, address, port, protocol };
    let decision = policy::decide(Policy::Public, &rules, &own, wanted);
    let special = special::special(address).is_some();
    assert!(!(decision.allowed && special), "{address} is allowed");
    assert!(!policy::decide(Policy::None, &rules, &own, wanted).allowed);
}

/// Says that it is open.
async fn say_opened<W: AsyncWrite + Unpin>(writer: &mut FrameWriter<W>) -> std::io::Result<()> {
    writer.send(&Frame::message(FrameKind::EgressOpened, &EgressOpened {})).await
}

/// The error of a socket as the guest is told it.
fn refused_by(error: &std::io::Error) -> Refused {
    use std::io::ErrorKind;
    let code = match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => {
            StreamErrorCode::ConnectionRefused
        }
        ErrorKind::TimedOut => StreamErrorCode::TimedOut,
        _ if [Some(libc::EMFILE), Some(libc::ENFILE)].contains(&error.raw_os_error()) => {
            StreamErrorCode::Limit
        }
        // No route, a firewall, an address family that this machine does not have.
        _ => StreamErrorCode::Unreachable,
    };
    Refused::new(code, error.to_string())
}

fn error_frame(refused: &Refused) -> Frame {
    let error = StreamError { code: refused.code.into(), message: refused.message.clone() };
    Frame::message(FrameKind::Error, &error)
}

#[cfg(test)]
mod tests;
