//! Tickets of one cluster, kept until shortly before they end and renewed before that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use towline_link::retry::RetryPolicy;
use towline_link::status::RpcError;
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::{IssueTicketRequest, StreamErrorCode};

use super::failure::DaemonFailure;
use crate::session::Session;

/// A ticket with less life than this is not used: the node's clock may be ahead.
const LIFE_MIN_S: u64 = 10;
/// A ticket with less life than this is renewed behind the scenes.
const RENEW_S: u64 = 60;
/// More than anybody has sandboxes; beyond it all are forgotten, which only costs a call each.
const TICKETS_MAX: usize = 1024;
/// A person waits for this.
pub(super) const CALL: RetryPolicy = RetryPolicy {
    first: Duration::from_millis(20),
    longest: Duration::from_millis(500),
    deadline: Duration::from_secs(4),
};

/// What a stream goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Target {
    /// A sandbox.
    Sandbox(SandboxId),
    /// A node's image store.
    Images(NodeId),
}

/// A ticket, and where it is good.
#[derive(Debug, Clone)]
pub(super) struct Ticket {
    pub(super) signed: Vec<u8>,
    pub(super) node: NodeId,
    pub(super) endpoint: String,
    expires_unix_s: u64,
}

impl Ticket {
    fn life_s(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.expires_unix_s.saturating_sub(now.as_secs())
    }
}

/// The tickets.
#[derive(Debug)]
pub(super) struct Tickets {
    session: Arc<Session>,
    kept: Mutex<HashMap<Target, Ticket>>,
}

impl Tickets {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session, kept: Mutex::default() }
    }

    /// A ticket that was got before and is still good.
    pub(super) fn kept(self: &Arc<Self>, target: Target) -> Option<Ticket> {
        let ticket = self.lock().get(&target).filter(|t| t.life_s() > LIFE_MIN_S).cloned()?;
        if ticket.life_s() < RENEW_S {
            let tickets = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = tickets.fetch(target).await {
                    tracing::debug!(%error, ?target, "ticket not renewed");
                }
            });
        }
        Some(ticket)
    }

    /// Asks for a new one.
    pub(super) async fn fetch(&self, target: Target) -> Result<Ticket, DaemonFailure> {
        let request = match target {
            Target::Sandbox(id) => {
                IssueTicketRequest { sandbox_id: id.to_vec(), ..Default::default() }
            }
            Target::Images(node) => {
                IssueTicketRequest { node_id: node.to_vec(), ..Default::default() }
            }
        };
        let answer = self
            .session
            .call_within(CALL, |mut client| {
                let request = request.clone();
                async move { client.issue_ticket(request).await }
            })
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                if !matches!(error, RpcError::Unreachable(_) | RpcError::Busy { .. }) {
                    self.forget(target);
                }
                let endpoint = &self.session.context().endpoint;
                return Err(DaemonFailure::from_control_plane(endpoint, error));
            }
        };
        let node = NodeId::try_from(answer.node_id.as_slice()).map_err(|e| {
            DaemonFailure::new(StreamErrorCode::Internal, format!("the ticket names no node: {e}"))
        })?;
        if answer.link_endpoint.is_empty() {
            return Err(DaemonFailure::passing(format!("{node} has not said where it is yet")));
        }
        let ticket = Ticket {
            signed: answer.ticket,
            node,
            endpoint: answer.link_endpoint,
            expires_unix_s: answer.expires_unix_s,
        };
        let mut kept = self.lock();
        if kept.len() >= TICKETS_MAX {
            kept.clear();
        }
        kept.insert(target, ticket.clone());
        Ok(ticket)
    }

    pub(super) fn forget(&self, target: Target) {
        self.lock().remove(&target);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Target, Ticket>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
