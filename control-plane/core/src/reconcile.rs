//! What each node is told: first all that is wanted of it and a bookmark, then each change, always
//! as full records. A node has one session; a newer one ends the older.

use std::collections::BTreeMap;

use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::{self, node_directive::Directive};

use crate::input::{Effect, SessionId};
use crate::refusal::Refusal;
use crate::state::{Changes, State};

/// A registered session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Session {
    pub(crate) node: NodeId,
    pub(crate) epoch: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_id: BTreeMap<SessionId, Session>,
    by_node: BTreeMap<NodeId, SessionId>,
}

impl Sessions {
    pub(crate) fn get(&self, id: SessionId) -> Option<Session> {
        self.by_id.get(&id).copied()
    }

    /// A registration was applied: tells the node its epoch and all that is wanted there.
    pub(crate) fn open(&mut self, id: SessionId, session: Session, state: &State) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(older) = self.by_node.insert(session.node, id)
            && older != id
        {
            self.by_id.remove(&older);
            effects.push(must_reset(older, "the node opened a newer session"));
            effects.push(Effect::EndSession(
                older,
                Refusal::precondition("the node opened a newer session"),
            ));
        }
        self.by_id.insert(id, session);
        let registered = v1::NodeRegistered {
            node_id: session.node.to_vec(),
            epoch: session.epoch,
            cluster_id: state.cluster_id.clone(),
            // The driver holds the keys and fills them in.
            ticket_keys: Vec::new(),
        };
        let mut directives = vec![directive(Directive::Registered(registered))];
        directives
            .extend(state.sandboxes.on_node(session.node).filter_map(|id| desired(state, id)));
        directives.push(bookmark(state));
        effects.push(Effect::Directives(id, directives));
        effects
    }

    pub(crate) fn close(&mut self, id: SessionId) {
        if let Some(session) = self.by_id.remove(&id)
            && self.by_node.get(&session.node) == Some(&id)
        {
            self.by_node.remove(&session.node);
        }
    }

    /// Tells nodes what changed for them.
    pub(crate) fn tell(&self, state: &State, changes: &Changes) -> Vec<Effect> {
        let mut by_session: BTreeMap<SessionId, Vec<v1::NodeDirective>> = BTreeMap::new();
        for id in &changes.desired {
            let Some(session) = self.session_of(state, *id) else { continue };
            by_session.entry(session).or_default().extend(desired(state, *id));
        }
        by_session
            .into_iter()
            .map(|(session, mut directives)| {
                directives.push(bookmark(state));
                Effect::Directives(session, directives)
            })
            .collect()
    }

    fn session_of(&self, state: &State, id: SandboxId) -> Option<SessionId> {
        let sandbox = state.sandboxes.get(id)?.sandbox.as_ref()?;
        let node = NodeId::try_from(sandbox.node_id.as_slice()).ok()?;
        self.by_node.get(&node).copied()
    }

    /// Ends all: this member does not lead any more.
    pub(crate) fn end_all(&mut self, why: &Refusal) -> Vec<Effect> {
        let all = std::mem::take(self);
        all.by_id.into_keys().map(|id| Effect::EndSession(id, why.clone())).collect()
    }
}

/// The session is of an older epoch.
pub(crate) fn must_reset(session: SessionId, reason: &str) -> Effect {
    let reset = v1::MustReset { reason: reason.to_owned() };
    Effect::Directives(session, vec![directive(Directive::MustReset(reset))])
}

pub(crate) fn directive(directive: Directive) -> v1::NodeDirective {
    v1::NodeDirective { directive: Some(directive) }
}

fn bookmark(state: &State) -> v1::NodeDirective {
    directive(Directive::Bookmark(v1::Bookmark { revision: state.revision }))
}

fn desired(state: &State, id: SandboxId) -> Option<v1::NodeDirective> {
    let record = state.sandboxes.get(id)?;
    let sandbox = record.sandbox.as_ref()?;
    Some(directive(Directive::Desired(v1::DesiredSandbox {
        sandbox_id: sandbox.id.clone(),
        epoch: sandbox.epoch,
        generation: sandbox.generation,
        desired: sandbox.desired,
        spec: sandbox.spec.clone(),
        image_digest: record.image_digest.clone(),
        revision: sandbox.revision,
        reason: sandbox.desired_reason.clone(),
        // A node names the driver once it has started a VM; that is kept over later starts.
        ran: sandbox.observed.as_ref().is_some_and(|observed| !observed.driver.is_empty()),
        forked_from: sandbox.forked_from.clone(),
    })))
}
