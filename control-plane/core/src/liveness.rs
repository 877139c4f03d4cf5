//! Which nodes are silent. Heartbeats are the leader's soft state; only the transitions become
//! commands. A new leader gives every node a full lease from its own start. Nothing is re-placed
//! here: a silent node's sandboxes are `unknown`.

use std::collections::BTreeMap;

use towline_proto::ids::NodeId;
use towline_proto::limits::NODE_LEASE;
use towline_proto::v1::{NodeState, SetNodeStateCommand};

use crate::state::State;

/// What the leader heard, on its own monotonic clock.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    leader_since_ms: u64,
    heard_ms: BTreeMap<NodeId, u64>,
    /// Transitions proposed and not yet applied.
    proposed: BTreeMap<NodeId, (u64, NodeState)>,
}

impl Liveness {
    /// Starts over: this member leads from now on.
    pub(crate) fn lead(&mut self, mono_ms: u64) {
        *self = Self { leader_since_ms: mono_ms, ..Self::default() };
    }

    pub(crate) fn heard(&mut self, node: NodeId, mono_ms: u64) {
        self.heard_ms.insert(node, mono_ms);
    }

    /// Transitions to propose now, each once.
    pub(crate) fn transitions(&mut self, state: &State, mono_ms: u64) -> Vec<SetNodeStateCommand> {
        let lease_ms = u64::try_from(NODE_LEASE.as_millis()).unwrap_or(u64::MAX);
        let mut transitions = Vec::new();
        for (id, record) in state.nodes.iter() {
            let Some(node) = &record.node else { continue };
            let heard = self.heard_ms.get(&id).copied().unwrap_or(0).max(self.leader_since_ms);
            let silent = mono_ms.saturating_sub(heard) > lease_ms;
            let to = match (node.state(), silent) {
                (NodeState::Ready, true) => NodeState::Suspect,
                (NodeState::Suspect, false) if self.heard_ms.contains_key(&id) => NodeState::Ready,
                _ => {
                    self.proposed.remove(&id);
                    continue;
                }
            };
            if self.proposed.insert(id, (node.epoch, to)) == Some((node.epoch, to)) {
                continue;
            }
            transitions.push(SetNodeStateCommand {
                node_id: id.to_vec(),
                expect_epoch: node.epoch,
                state: to.into(),
            });
        }
        transitions
    }
}
