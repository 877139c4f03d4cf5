//! What was proposed and is not applied yet: who waits for it, and what it will reserve. Known
//! again by (term, index); when this member stops leading, the fate of all of it is unknown.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::NodeId;
use towline_proto::v1;

use crate::input::{Caller, RequestId, SessionId};
use crate::resources::Resources;

/// Most commands in flight; beyond it requests are refused as busy.
pub(crate) const IN_FLIGHT_MAX: usize = 50_000;

/// Who waits for a command.
#[derive(Debug, Clone)]
pub(crate) enum Waiter {
    /// A caller.
    Request(RequestId),
    /// A caller whose sandbox was placed; if the room was taken meanwhile, it is placed again.
    Create(Box<Creation>),
    /// A node that reported.
    Observed(SessionId, u64),
    /// A node that registers.
    Open(SessionId),
    /// Nobody.
    Nobody,
}

/// A creation on its way.
#[derive(Debug, Clone)]
pub(crate) struct Creation {
    pub(crate) request_id: RequestId,
    pub(crate) caller: Caller,
    pub(crate) request: v1::CreateSandboxRequest,
    pub(crate) attempts: u32,
    /// Where, and what it reserves there; none for a repetition of one in flight.
    pub(crate) placed: Option<(NodeId, Resources)>,
}

type Key = (String, Vec<u8>);

#[derive(Debug, Default)]
pub(crate) struct Proposals {
    by_index: BTreeMap<u64, (u64, Vec<Waiter>)>,
    reserved: BTreeMap<NodeId, Resources>,
    keys: BTreeSet<Key>,
    count: usize,
}

impl Proposals {
    pub(crate) fn is_full(&self) -> bool {
        self.count >= IN_FLIGHT_MAX
    }

    pub(crate) fn reserved(&self) -> &BTreeMap<NodeId, Resources> {
        &self.reserved
    }

    /// Whether a creation with this key is on its way.
    pub(crate) fn has_key(&self, caller: &Caller, key: &[u8]) -> bool {
        self.keys.contains(&(caller.name.clone(), key.to_vec()))
    }

    /// A creation was placed: others must not count on that room.
    pub(crate) fn begin(&mut self, creation: &Creation) {
        let Some((node, amount)) = creation.placed else { return };
        let reserved = self.reserved.entry(node).or_default();
        *reserved = reserved.plus(amount);
        self.keys.insert((creation.caller.name.clone(), creation.request.idempotency_key.clone()));
    }

    pub(crate) fn end(&mut self, creation: &Creation) {
        let Some((node, amount)) = creation.placed else { return };
        if let Some(reserved) = self.reserved.get_mut(&node) {
            *reserved = reserved.minus(amount);
            if *reserved == Resources::default() {
                self.reserved.remove(&node);
            }
        }
        self.keys.remove(&(creation.caller.name.clone(), creation.request.idempotency_key.clone()));
    }

    pub(crate) fn add(&mut self, (term, index): (u64, u64), waiters: Vec<Waiter>) {
        self.count += waiters.len();
        self.by_index.insert(index, (term, waiters));
    }

    /// Who waits for the entry that was just applied. An entry of another term is another entry:
    /// then its waiters are the error.
    pub(crate) fn take(&mut self, term: u64, index: u64) -> Result<Vec<Waiter>, Vec<Waiter>> {
        let Some((proposed, waiters)) = self.by_index.remove(&index) else { return Ok(vec![]) };
        self.count -= waiters.len();
        if proposed == term { Ok(waiters) } else { Err(waiters) }
    }

    /// All who wait: this member does not lead any more.
    pub(crate) fn take_all(&mut self) -> Vec<Waiter> {
        let all = std::mem::take(self);
        all.by_index.into_values().flat_map(|(_, waiters)| waiters).collect()
    }
}
