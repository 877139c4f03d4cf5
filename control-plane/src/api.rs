//! The services: who calls, what may be asked, and how a refusal travels. Decoding, authorising,
//! one input to the core, one answer. Nothing is decided here.

pub(crate) mod client;
pub(crate) mod node;
pub(crate) mod operator;

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Status};
use towline_control_core::{Caller, Refusal, RefusalKind, Role};
use towline_link::identity::Role as LinkRole;
use towline_link::peer::Peer;
use towline_link::status::RpcError;

use crate::driver::Handle;
use crate::keys::Keys;

/// When to try again what is refused for now.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What every service needs.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) core: Handle,
    pub(crate) keys: Arc<Keys>,
}

/// Who is at the other end.
pub(crate) fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    request
        .extensions()
        .get::<Peer>()
        .cloned()
        .ok_or_else(|| Status::internal("the connection did not say who is at its other end"))
}

/// The caller that a peer is. The owner of this machine's data directory, and root, are operators
/// over the admin socket.
pub(crate) fn caller(peer: &Peer) -> Result<Caller, Status> {
    if let Some(uid) = peer.uid {
        let own = rustix::process::getuid().as_raw();
        if uid != own && uid != 0 {
            return Err(Status::permission_denied(format!(
                "the admin socket belongs to uid {own}, and you are uid {uid}"
            )));
        }
        return Ok(Caller { role: Role::Operator, name: format!("uid-{uid}") });
    }
    let Some(identity) = &peer.identity else {
        return Ok(Caller { role: Role::Stranger, name: String::new() });
    };
    let role = match identity.role() {
        LinkRole::User => Role::User,
        LinkRole::Operator => Role::Operator,
        LinkRole::Node => Role::Node,
        LinkRole::Member => Role::Stranger,
    };
    Ok(Caller { role, name: identity.name().to_owned() })
}

pub(crate) fn caller_of<T>(request: &Request<T>) -> Result<Caller, Status> {
    caller(&peer(request)?)
}

/// A refusal in the vocabulary of the wire.
pub(crate) fn status(refusal: &Refusal) -> Status {
    let reason = refusal.message.clone();
    match refusal.kind {
        RefusalKind::Invalid => RpcError::Invalid(reason),
        RefusalKind::NotFound => RpcError::NotFound(reason),
        RefusalKind::AlreadyExists | RefusalKind::Precondition | RefusalKind::Exhausted => {
            RpcError::Refused { reason }
        }
        RefusalKind::Denied => RpcError::Unauthenticated(reason),
        RefusalKind::NotLeader { .. } | RefusalKind::Unavailable | RefusalKind::Raced => {
            RpcError::Busy { reason, retry_after: RETRY_AFTER }
        }
        RefusalKind::Unknown => RpcError::Unreachable(reason),
    }
    .into()
}
