//! What can happen, and when.

use std::collections::BTreeMap;

use towline_control_core::{Answer, Input, Refusal, Request};
use towline_node_core::Input as NodeInput;
use towline_proto::v1;

/// One thing that happens. `life` numbers tell the lives of a process apart: what was meant for an
/// earlier one is lost.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A member's clock.
    Tick { member: usize, life: u64 },
    /// A member's disk has done what was asked up to here.
    Written { member: usize, life: u64, sync: bool, input: Input },
    /// A raft message arrives.
    Raft(v1::RaftMessage),
    /// A member hears what became of a snapshot it sent.
    SnapshotSent { member: usize, to: u64, arrived: bool },
    /// A client's next operation, or the next attempt at it.
    Attempt { client: usize, operation: u64, attempt: u64 },
    /// A client's request arrives.
    Ask { member: usize, client: usize, attempt: u64, request: Box<Request> },
    /// A client's answer arrives.
    Reply { client: usize, attempt: u64, answer: Box<Result<Answer, Refusal>> },
    /// A node tries to open a session.
    Connect { node: usize, life: u64 },
    /// What a node sent in a session arrives.
    ToMember { session: u64, input: Box<Input> },
    /// What a member sent in a session arrives.
    ToNode { session: u64, directives: Vec<v1::NodeDirective> },
    /// A session is cut, as a node sees it.
    Cut { session: u64 },
    /// A node's clock.
    Beat { node: usize, life: u64 },
    /// A node's disk, VM or guest answers.
    Done { node: usize, life: u64, input: Box<NodeInput> },
    /// Something goes wrong.
    Nemesis,
    /// A member or node comes back.
    StartMember(usize),
    /// As above.
    StartNode(usize),
    /// Two members hear each other again.
    Heal(usize, usize),
}

/// Events in order of time; those of one time in order of scheduling.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    events: BTreeMap<(u64, u64), Event>,
    next: u64,
}

impl Queue {
    pub(crate) fn at(&mut self, time: u64, event: Event) {
        self.next += 1;
        self.events.insert((time, self.next), event);
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, Event)> {
        self.events.pop_first().map(|((time, _), event)| (time, event))
    }
}
