//! What must always hold of the committed state. Checked by tests and by the simulator after every
//! event, and by a member after it restored a snapshot.

use std::collections::BTreeSet;

use towline_proto::ids::NodeId;
use towline_proto::v1::Desired;

use crate::resources::Resources;
use crate::state::State;
use crate::state::nodes::{limits_of, reserved_of};
use crate::state::sandboxes::{has_ended, held_by, runs};

/// A rule that the state breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invariant broken: {0}")]
pub struct Violation(pub String);

/// Checks every rule.
pub fn check(state: &State) -> Result<(), Violation> {
    every_sandbox_is_whole(state)?;
    names_are_unique(state)?;
    timeouts_are_kept(state)?;
    nothing_is_oversold(state)
}

fn every_sandbox_is_whole(state: &State) -> Result<(), Violation> {
    for (id, record) in state.sandboxes.after(None) {
        let Some(sandbox) = &record.sandbox else {
            return Err(Violation(format!("{id} has no record")));
        };
        let node = NodeId::try_from(sandbox.node_id.as_slice()).ok();
        if node.and_then(|node| state.nodes.get(node)).is_none() {
            return Err(Violation(format!("{id} is on a node that does not exist")));
        }
        let observed = sandbox.observed.clone().unwrap_or_default();
        if observed.generation > sandbox.generation || observed.epoch > sandbox.epoch {
            return Err(Violation(format!("{id} was observed at a generation not yet decided")));
        }
        if sandbox.revision > state.revision {
            return Err(Violation(format!("{id} is newer than the state")));
        }
        if runs(observed.phase()) && !record.computing {
            return Err(Violation(format!("{id} runs without CPU and memory reserved for it")));
        }
    }
    Ok(())
}

fn timeouts_are_kept(state: &State) -> Result<(), Violation> {
    let mut next = None;
    for (id, record) in state.sandboxes.after(None) {
        let Some(sandbox) = &record.sandbox else { continue };
        let timeout_s = sandbox.spec.as_ref().map_or(0, |spec| spec.timeout_s);
        let counts = timeout_s != 0 && sandbox.desired().is_up() && !has_ended(sandbox);
        if counts != (sandbox.expires_ms != 0) {
            return Err(Violation(format!(
                "{id} has a timeout of {timeout_s} s, is wanted {:?}, and expires at {}",
                sandbox.desired(),
                sandbox.expires_ms
            )));
        }
        if counts && sandbox.expires_ms <= state.now_ms {
            return Err(Violation(format!("{id} was not stopped by its timeout")));
        }
        next = next.into_iter().chain(counts.then_some(sandbox.expires_ms)).min();
    }
    if state.sandboxes.next_expiry_ms() != next {
        return Err(Violation(format!("the next timeout is at {next:?}, and is not found there")));
    }
    Ok(())
}

fn names_are_unique(state: &State) -> Result<(), Violation> {
    let mut names = BTreeSet::new();
    for (id, record) in state.sandboxes.after(None) {
        let Some(sandbox) = record.sandbox.as_ref() else { continue };
        if sandbox.desired() == Desired::Deleted {
            continue;
        }
        let name = sandbox.spec.as_ref().map_or("", |spec| spec.name.as_str());
        if name.is_empty() || !names.insert((sandbox.project.as_str(), name)) {
            return Err(Violation(format!("{id}: the name `{name}` is empty or twice there")));
        }
        if state.sandboxes.by_name(&sandbox.project, name).map(|(found, _)| found) != Some(id) {
            return Err(Violation(format!("{id} is not found by its name `{name}`")));
        }
    }
    Ok(())
}

fn nothing_is_oversold(state: &State) -> Result<(), Violation> {
    for (id, record) in state.nodes.iter() {
        let Some(node) = &record.node else {
            return Err(Violation(format!("{id} has no record")));
        };
        let held = state
            .sandboxes
            .on_node(id)
            .filter_map(|sandbox| state.sandboxes.get(sandbox))
            .map(held_by)
            .fold(Resources::default(), Resources::plus);
        if held != reserved_of(node) {
            return Err(Violation(format!(
                "{id} says that {:?} is reserved, and its sandboxes hold {held:?}",
                reserved_of(node)
            )));
        }
        let ceiling = record.ceiling.as_ref().map(Resources::from).unwrap_or_default();
        if !held.within(limits_of(node).max(ceiling)) {
            return Err(Violation(format!("{id} is oversold: {held:?} of {:?}", limits_of(node))));
        }
    }
    Ok(())
}
