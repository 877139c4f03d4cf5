//! The table of nodes: what each offers, what is reserved on it, and whether it is heard of.
//!
//! Left out: when a node counts as silent (`liveness`). The invariant: `reserved` changes only
//! through `reserve` and `release` here.

use std::collections::BTreeMap;

use towline_proto::ids::NodeId;
use towline_proto::v1::{self, NodeRecord, NodeState};

use super::sandboxes::node_id;
use super::{Changes, Done, State};
use crate::refusal::Refusal;
use crate::resources::{Resources, Short, fits};

/// Nodes, by id and by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Nodes {
    by_id: BTreeMap<NodeId, NodeRecord>,
    by_name: BTreeMap<String, NodeId>,
}

impl Nodes {
    /// One by id.
    pub fn get(&self, id: NodeId) -> Option<&NodeRecord> {
        self.by_id.get(&id)
    }

    /// One by the name in its certificate.
    pub fn id_of(&self, name: &str) -> Option<NodeId> {
        self.by_name.get(name).copied()
    }

    /// All, in order of id.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &NodeRecord)> {
        self.by_id.iter().map(|(id, record)| (*id, record))
    }

    pub(crate) fn insert(&mut self, record: NodeRecord) -> Result<NodeId, Refusal> {
        let node = record.node.as_ref().ok_or_else(|| Refusal::invalid("no node"))?;
        let id = node_id(&node.id)?;
        self.by_name.insert(node.name.clone(), id);
        self.by_id.insert(id, record);
        Ok(id)
    }

    /// Reserves on a node that answers; the error names what is short, if that is the reason.
    pub(super) fn reserve_on_ready(
        &mut self,
        id: NodeId,
        want: Resources,
    ) -> Result<(), Option<Short>> {
        let ready = self.by_id.get(&id).is_some_and(is_ready);
        if ready { self.reserve(id, want) } else { Err(None) }
    }

    pub(super) fn reserve(&mut self, id: NodeId, want: Resources) -> Result<(), Option<Short>> {
        let node = self.by_id.get_mut(&id).and_then(|record| record.node.as_mut()).ok_or(None)?;
        let reserved = reserved_of(node);
        fits(limits_of(node), reserved, want).map_err(Some)?;
        node.reserved = Some(reserved.plus(want).into());
        Ok(())
    }

    pub(super) fn release(&mut self, id: NodeId, freed: Resources) {
        if let Some(node) = self.by_id.get_mut(&id).and_then(|record| record.node.as_mut()) {
            node.reserved = Some(reserved_of(node).minus(freed).into());
        }
    }

    pub(super) fn free_and_name(&self, id: NodeId) -> (Resources, String) {
        let node = self.by_id.get(&id).and_then(|record| record.node.as_ref());
        node.map_or_else(Default::default, |node| {
            (limits_of(node).minus(reserved_of(node)), node.name.clone())
        })
    }
}

impl State {
    pub(super) fn register_node(
        &mut self,
        command: &v1::RegisterNodeCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let said = command.node.as_ref().ok_or_else(|| Refusal::invalid("no node"))?;
        let id = match self.nodes.id_of(&said.name) {
            Some(id) => id,
            None => node_id(&command.id)?,
        };
        let known = self.nodes.get(id).and_then(|record| record.node.clone()).unwrap_or_default();
        let capacity = said.capacity.unwrap_or_default();
        let epoch = known.epoch + 1;
        let reserved = known.reserved.unwrap_or_default();
        let ceiling = Resources::from(&capacity).max(Resources::from(&reserved));
        let node = v1::Node {
            id: id.to_vec(),
            name: said.name.clone(),
            epoch,
            state: NodeState::Ready.into(),
            capacity: Some(capacity),
            reserved: Some(reserved),
            link_endpoint: said.link_endpoint.clone(),
            drivers: said.drivers.clone(),
            embedded: said.embedded,
            version: said.version.clone(),
            machine_cpus: said.machine_cpus,
        };
        let record = NodeRecord {
            node: Some(node),
            boot_id: said.boot_id.clone(),
            ceiling: Some(ceiling.into()),
            since_ms: self.now_ms,
        };
        self.nodes.insert(record)?;
        self.revision += 1;
        changes.sandboxes.extend(self.sandboxes.on_node(id));
        Ok(Done::Node { id, epoch })
    }

    pub(super) fn set_node_state(
        &mut self,
        set: &v1::SetNodeStateCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let id = node_id(&set.node_id)?;
        let wanted = set.state();
        let now_ms = self.now_ms;
        let record = self
            .nodes
            .by_id
            .get_mut(&id)
            .ok_or_else(|| Refusal::not_found(format!("no node {id}")))?;
        let node = record.node.get_or_insert_default();
        if node.epoch != set.expect_epoch {
            return Err(Refusal::precondition(format!("{id} registered again since")));
        }
        if wanted == NodeState::Unspecified || node.state() == wanted {
            return Ok(Done::Nothing);
        }
        node.set_state(wanted);
        record.since_ms = now_ms;
        self.revision += 1;
        changes.sandboxes.extend(self.sandboxes.on_node(id));
        Ok(Done::Nothing)
    }
}

/// Whether new sandboxes may be placed on it.
pub(crate) fn is_ready(record: &NodeRecord) -> bool {
    record.node.as_ref().is_some_and(|node| node.state() == NodeState::Ready)
}

/// Whether it was silent for longer than its lease.
pub(crate) fn is_silent(record: &NodeRecord) -> bool {
    record.node.as_ref().is_some_and(|node| node.state() == NodeState::Suspect)
}

/// Most that may be reserved on it: what it offers (the node agent knows what it lends twice).
pub(crate) fn limits_of(node: &v1::Node) -> Resources {
    node.capacity.as_ref().map(Resources::from).unwrap_or_default()
}

/// What is reserved on it.
pub(crate) fn reserved_of(node: &v1::Node) -> Resources {
    node.reserved.as_ref().map(Resources::from).unwrap_or_default()
}
