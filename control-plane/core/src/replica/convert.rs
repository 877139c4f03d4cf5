//! Our records and raft-rs's types, field by field. Its old protobuf code never sees a byte that
//! came from disk or network. What is out of range is an error, never a panic.

use raft::eraftpb;
use towline_proto::v1;

/// Why a record cannot be raft's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a raft message or record has an unknown kind {0}")]
pub(crate) struct UnknownKind(u32);

pub(crate) fn entry_to_raft(entry: v1::LogEntry) -> Result<eraftpb::Entry, UnknownKind> {
    let mut raft = eraftpb::Entry::default();
    raft.set_entry_type(match entry.kind {
        0 => eraftpb::EntryType::EntryNormal,
        1 => eraftpb::EntryType::EntryConfChange,
        2 => eraftpb::EntryType::EntryConfChangeV2,
        other => return Err(UnknownKind(other)),
    });
    raft.index = entry.index;
    raft.term = entry.term;
    raft.data = entry.data;
    raft.context = entry.context;
    Ok(raft)
}

pub(crate) fn entry_from_raft(entry: &eraftpb::Entry) -> v1::LogEntry {
    v1::LogEntry {
        index: entry.index,
        term: entry.term,
        kind: match entry.get_entry_type() {
            eraftpb::EntryType::EntryNormal => 0,
            eraftpb::EntryType::EntryConfChange => 1,
            eraftpb::EntryType::EntryConfChangeV2 => 2,
        },
        data: entry.data.clone(),
        context: entry.context.clone(),
    }
}

pub(crate) fn hard_state_to_raft(hard: &v1::HardState) -> eraftpb::HardState {
    eraftpb::HardState {
        term: hard.term,
        vote: hard.vote,
        commit: hard.commit,
        ..Default::default()
    }
}

pub(crate) fn hard_state_from_raft(hard: &eraftpb::HardState) -> v1::HardState {
    v1::HardState { term: hard.term, vote: hard.vote, commit: hard.commit }
}

pub(crate) fn conf_to_raft(conf: &v1::ConfState) -> eraftpb::ConfState {
    let mut raft = eraftpb::ConfState::default();
    raft.voters.clone_from(&conf.voters);
    raft.learners.clone_from(&conf.learners);
    raft.voters_outgoing.clone_from(&conf.voters_outgoing);
    raft.learners_next.clone_from(&conf.learners_next);
    raft.auto_leave = conf.auto_leave;
    raft
}

pub(crate) fn conf_from_raft(conf: &eraftpb::ConfState) -> v1::ConfState {
    v1::ConfState {
        voters: conf.voters.clone(),
        learners: conf.learners.clone(),
        voters_outgoing: conf.voters_outgoing.clone(),
        learners_next: conf.learners_next.clone(),
        auto_leave: conf.auto_leave,
    }
}

pub(crate) fn change_to_raft(
    change: &v1::MembershipChange,
) -> Result<eraftpb::ConfChangeV2, UnknownKind> {
    use eraftpb::{ConfChangeTransition, ConfChangeType};
    let mut raft = eraftpb::ConfChangeV2::default();
    raft.set_transition(match change.transition {
        0 => ConfChangeTransition::Auto,
        1 => ConfChangeTransition::Implicit,
        2 => ConfChangeTransition::Explicit,
        other => return Err(UnknownKind(other)),
    });
    raft.context = change.context.clone().into();
    for step in &change.changes {
        let mut single = eraftpb::ConfChangeSingle { node_id: step.member, ..Default::default() };
        single.set_change_type(match step.kind {
            0 => ConfChangeType::AddNode,
            1 => ConfChangeType::RemoveNode,
            2 => ConfChangeType::AddLearnerNode,
            other => return Err(UnknownKind(other)),
        });
        raft.mut_changes().push(single);
    }
    Ok(raft)
}

pub(crate) fn snapshot_to_raft(snapshot: v1::SnapshotRecord) -> eraftpb::Snapshot {
    let mut raft = eraftpb::Snapshot::default();
    let metadata = raft.mut_metadata();
    metadata.index = snapshot.index;
    metadata.term = snapshot.term;
    metadata.set_conf_state(conf_to_raft(&snapshot.conf_state.unwrap_or_default()));
    raft.data = snapshot.state.into();
    raft
}

pub(crate) fn snapshot_from_raft(raft: &eraftpb::Snapshot) -> v1::SnapshotRecord {
    let metadata = raft.get_metadata();
    v1::SnapshotRecord {
        index: metadata.index,
        term: metadata.term,
        conf_state: Some(conf_from_raft(metadata.get_conf_state())),
        state: raft.data.to_vec(),
    }
}

pub(crate) fn message_to_raft(message: v1::RaftMessage) -> Result<eraftpb::Message, UnknownKind> {
    let mut raft = eraftpb::Message::default();
    raft.set_msg_type(kind_to_raft(message.kind)?);
    raft.to = message.to;
    raft.from = message.from;
    raft.term = message.term;
    raft.log_term = message.log_term;
    raft.index = message.index;
    for entry in message.entries {
        raft.mut_entries().push(entry_to_raft(entry)?);
    }
    raft.commit = message.commit;
    raft.commit_term = message.commit_term;
    if let Some(snapshot) = message.snapshot {
        raft.set_snapshot(snapshot_to_raft(snapshot));
    }
    raft.request_snapshot = message.request_snapshot;
    raft.reject = message.reject;
    raft.reject_hint = message.reject_hint;
    raft.context = message.context.into();
    raft.priority = message.priority;
    Ok(raft)
}

pub(crate) fn message_from_raft(raft: &eraftpb::Message) -> v1::RaftMessage {
    let has_snapshot = !raft.get_snapshot().get_metadata().get_conf_state().voters.is_empty()
        || raft.get_snapshot().get_metadata().index != 0;
    v1::RaftMessage {
        kind: kind_from_raft(raft.get_msg_type()),
        to: raft.to,
        from: raft.from,
        term: raft.term,
        log_term: raft.log_term,
        index: raft.index,
        entries: raft.entries.iter().map(entry_from_raft).collect(),
        commit: raft.commit,
        commit_term: raft.commit_term,
        snapshot: has_snapshot.then(|| snapshot_from_raft(raft.get_snapshot())),
        request_snapshot: raft.request_snapshot,
        reject: raft.reject,
        reject_hint: raft.reject_hint,
        context: raft.context.to_vec(),
        priority: raft.priority,
    }
}

/// The kinds that travel. The others are raft's talk to itself, or a forwarded proposal, which we
/// do not do: a follower answers with the leader's name instead.
const KINDS: [(u32, eraftpb::MessageType); 12] = {
    use eraftpb::MessageType as T;
    [
        (3, T::MsgAppend),
        (4, T::MsgAppendResponse),
        (5, T::MsgRequestVote),
        (6, T::MsgRequestVoteResponse),
        (7, T::MsgSnapshot),
        (8, T::MsgHeartbeat),
        (9, T::MsgHeartbeatResponse),
        (14, T::MsgTimeoutNow),
        (15, T::MsgReadIndex),
        (16, T::MsgReadIndexResp),
        (17, T::MsgRequestPreVote),
        (18, T::MsgRequestPreVoteResponse),
    ]
};

fn kind_to_raft(kind: u32) -> Result<eraftpb::MessageType, UnknownKind> {
    let found = KINDS.iter().find(|(ours, _)| *ours == kind);
    found.map(|(_, theirs)| *theirs).ok_or(UnknownKind(kind))
}

fn kind_from_raft(kind: eraftpb::MessageType) -> u32 {
    KINDS.iter().find(|(_, theirs)| *theirs == kind).map_or(0, |(ours, _)| *ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip() {
        let entry =
            v1::LogEntry { index: 3, term: 2, kind: 0, data: "x".into(), ..Default::default() };
        let conf = v1::ConfState { voters: vec![1, 2, 3], ..Default::default() };
        let message = v1::RaftMessage {
            kind: 7,
            to: 1,
            from: 2,
            term: 3,
            log_term: 4,
            index: 5,
            entries: vec![entry],
            commit: 6,
            commit_term: 7,
            snapshot: Some(v1::SnapshotRecord {
                index: 9,
                term: 8,
                conf_state: Some(conf),
                state: vec![1],
            }),
            request_snapshot: 10,
            reject: true,
            reject_hint: 11,
            context: vec![2],
            priority: 12,
        };
        let raft = message_to_raft(message.clone()).unwrap();
        assert_eq!(message_from_raft(&raft), message);
    }

    #[test]
    fn local_kinds_are_refused() {
        for kind in [0, 1, 2, 10, 11, 12, 13, 19, u32::MAX] {
            let message = v1::RaftMessage { kind, ..Default::default() };
            assert_eq!(message_to_raft(message), Err(UnknownKind(kind)));
        }
    }
}
