//! raft-rs's `RawNode`, wrapped: what is committed comes out in order, what must be written or sent
//! comes out as effects.
//!
//! Two things are ours. Messages that promise durability are held until the driver says `Persisted`.
//! And after every call the election timeout is overridden by a pure function of (seed, member,
//! term, role changes), because raft-rs draws it from a thread's generator and a run could not be
//! repeated. Left out: what entries mean.

mod convert;

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message as _;
use raft::eraftpb::{self, ConfState, EntryType, MessageType};
use raft::{Config, ProgressState, RawNode, SnapshotStatus, StateRole};
use towline_proto::v1;

use crate::command::Halt;
use crate::input::Effect;
use crate::random::mix;
use crate::storage::LogStorage;

/// An election starts after so many ticks of silence, at least and at most (exclusive).
const ELECTION_TICKS: std::ops::Range<usize> = 10..20;
const HEARTBEAT_TICKS: usize = 2;
/// Bytes of entries in one message.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of proposals that are not committed; beyond it proposals are refused.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of entries applied between two looks at other inputs.
const COMMITTED_BYTES_MAX: u64 = 4 << 20;
/// Ticks after which a snapshot that nobody reported on counts as lost, so that its receiver is
/// not forgotten.
const SNAPSHOT_TICKS_MAX: u64 = 300;

/// What one round of raft brought.
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) effects: Vec<Effect>,
    pub(crate) snapshot: Option<v1::SnapshotRecord>,
    pub(crate) committed: Vec<Committed>,
    /// Reads that were confirmed: (context, index that must be applied).
    pub(crate) reads: Vec<(u64, u64)>,
}

/// A committed entry of ours. Entries of raft's own have no data.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) data: Bytes,
}

pub(crate) struct Replica {
    raw: RawNode<LogStorage>,
    seed: u64,
    role: StateRole,
    role_changes: u64,
    ticks: u64,
    applied: u64,
    /// Messages that may go once the write of this number is on disk.
    held: BTreeMap<u64, Vec<v1::RaftMessage>>,
    /// Snapshots on their way: member to tick of sending.
    sending: BTreeMap<u64, u64>,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica")
            .field("member", &self.member())
            .field("term", &self.term())
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// What a member starts from.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) member: u64,
    pub(crate) seed: u64,
    pub(crate) base: (u64, u64),
    pub(crate) conf_state: v1::ConfState,
    pub(crate) hard_state: v1::HardState,
    pub(crate) entries: Vec<v1::LogEntry>,
}

impl Replica {
    pub(crate) fn new(start: Start) -> Result<Self, String> {
        let config = Config {
            id: start.member,
            election_tick: ELECTION_TICKS.start,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: ELECTION_TICKS.start,
            max_election_tick: ELECTION_TICKS.end,
            applied: start.base.0,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let storage = storage_from(&start)?;
        let alone = start.conf_state.voters == [start.member];
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&config, storage, &logger).map_err(|error| error.to_string())?;
        let mut replica = Self {
            raw,
            seed: start.seed,
            role: StateRole::Follower,
            role_changes: 0,
            ticks: 0,
            applied: start.base.0,
            held: BTreeMap::new(),
            sending: BTreeMap::new(),
        };
        replica.pin_timeout();
        if alone {
            // Nobody else could win: do not wait for a timeout.
            let _ = replica.raw.campaign();
            replica.pin_timeout();
        }
        Ok(replica)
    }

    pub(crate) fn tick(&mut self) {
        self.ticks += 1;
        self.raw.tick();
        self.pin_timeout();
        self.give_up_on_snapshots();
    }

    /// Appends to the leader's log; gives (term, index) by which to know the entry again.
    pub(crate) fn propose(&mut self, data: Bytes) -> Result<(u64, u64), String> {
        let result = self.raw.propose(Vec::new(), data.to_vec());
        self.pin_timeout();
        result.map_err(|error| error.to_string())?;
        Ok((self.raw.raft.term, self.raw.raft.raft_log.last_index()))
    }

    /// Takes a message in. One that cannot be right is dropped: raft-rs would abort on some.
    pub(crate) fn receive(&mut self, message: v1::RaftMessage) {
        let Ok(message) = convert::message_to_raft(message) else { return };
        if !self.is_plausible(&message) {
            return;
        }
        let rejected = message.get_msg_type() == MessageType::MsgAppendResponse && message.reject;
        let from = message.from;
        let _ = self.raw.step(message);
        if rejected && self.leads() {
            self.mend_progress(from);
        }
        self.pin_timeout();
    }

    fn is_plausible(&self, message: &eraftpb::Message) -> bool {
        let contiguous = message.entries.windows(2).all(|pair| pair[0].index + 1 == pair[1].index);
        let follows = message.entries.first().is_none_or(|entry| entry.index == message.index + 1);
        let known = message.commit <= self.raw.raft.raft_log.last_index()
            || message.get_msg_type() != MessageType::MsgHeartbeat;
        message.to == self.member()
            && message.from != self.member()
            && contiguous
            && follows
            && known
    }

    /// raft-rs 0.7.0 lets a late rejection pull `next_idx` below what is matched (raft-rs #557).
    fn mend_progress(&mut self, member: u64) {
        if let Some(progress) = self.raw.raft.mut_prs().get_mut(member) {
            progress.next_idx = progress.next_idx.max(progress.matched + 1);
        }
    }

    pub(crate) fn persisted(&mut self, number: u64) -> Vec<Effect> {
        self.raw.on_persist_ready(number);
        self.pin_timeout();
        self.applied(self.applied);
        let later = self.held.split_off(&(number + 1));
        let free: Vec<_> =
            std::mem::replace(&mut self.held, later).into_values().flatten().collect();
        if free.is_empty() { vec![] } else { vec![Effect::Send(free)] }
    }

    pub(crate) fn read_index(&mut self, context: u64) {
        self.raw.read_index(context.to_be_bytes().to_vec());
        self.pin_timeout();
    }

    pub(crate) fn snapshot_sent(&mut self, to: u64, arrived: bool) {
        self.sending.remove(&to);
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raw.report_snapshot(to, status);
        self.pin_timeout();
    }

    /// raft-rs sends a member nothing until it hears what became of its snapshot.
    fn give_up_on_snapshots(&mut self) {
        let lost: Vec<u64> = self
            .sending
            .iter()
            .filter(|(_, sent)| self.ticks - **sent > SNAPSHOT_TICKS_MAX)
            .map(|(to, _)| *to)
            .collect();
        for to in lost {
            self.snapshot_sent(to, false);
        }
    }

    /// One round, or nothing to do. The caller applies what is committed, then calls `applied`.
    pub(crate) fn round(&mut self) -> Result<Option<Round>, Halt> {
        if !self.raw.has_ready() {
            return Ok(None);
        }
        let mut ready = self.raw.ready();
        let mut round = Round::default();
        let now = ready.take_messages();
        self.send(now, &mut round);
        let read_states = ready.take_read_states();
        round.reads = read_states.iter().filter_map(read_state).collect();
        self.keep(&mut ready, &mut round)?;
        let committed = ready.take_committed_entries();
        self.raw.advance_append_async(ready);
        self.pin_timeout();
        for entry in committed {
            self.commit(entry, &mut round)?;
        }
        Ok(Some(round))
    }

    /// Puts what is new into the storage and asks the driver to write it.
    fn keep(&mut self, ready: &mut raft::Ready, round: &mut Round) -> Result<(), Halt> {
        let number = ready.number();
        let sync = ready.must_sync();
        let held = ready.take_persisted_messages();
        if !held.is_empty() {
            self.note_snapshots(&held);
            self.held.insert(number, held.iter().map(convert::message_from_raft).collect());
        }
        let entries = ready.take_entries();
        let storage = self.raw.mut_store();
        if let Some(hard) = ready.hs() {
            storage.hard_state = hard.clone();
        }
        if !ready.snapshot().get_metadata().get_conf_state().voters.is_empty() {
            let snapshot = convert::snapshot_from_raft(ready.snapshot());
            let conf = convert::conf_to_raft(&snapshot.conf_state.clone().unwrap_or_default());
            storage.restore(snapshot.index, snapshot.term, conf);
            storage.append(&entries);
            let hard_state = convert::hard_state_from_raft(&storage.hard_state);
            let entries = entries.iter().map(convert::entry_from_raft).collect();
            round.snapshot = Some(snapshot.clone());
            round.effects.push(Effect::InstallSnapshot { number, snapshot, hard_state, entries });
            return Ok(());
        }
        storage.append(&entries);
        round.effects.push(Effect::Persist {
            number,
            entries: entries.iter().map(convert::entry_from_raft).collect(),
            hard_state: Some(convert::hard_state_from_raft(&storage.hard_state)),
            sync,
        });
        Ok(())
    }

    fn commit(&mut self, entry: eraftpb::Entry, round: &mut Round) -> Result<(), Halt> {
        match entry.get_entry_type() {
            EntryType::EntryNormal => round.committed.push(Committed {
                index: entry.index,
                term: entry.term,
                data: entry.data,
            }),
            EntryType::EntryConfChange => return Err(Halt::Command { index: entry.index }),
            EntryType::EntryConfChangeV2 => {
                self.change_members(&entry)?;
                let (index, term) = (entry.index, entry.term);
                round.committed.push(Committed { index, term, data: Bytes::new() });
            }
        }
        Ok(())
    }

    fn change_members(&mut self, entry: &eraftpb::Entry) -> Result<(), Halt> {
        let halt = |reason: String| Halt::Decode { index: entry.index, reason };
        let change = v1::MembershipChange::decode(entry.data.as_ref())
            .map_err(|error| halt(error.to_string()))?;
        let change = convert::change_to_raft(&change).map_err(|error| halt(error.to_string()))?;
        let conf: ConfState =
            self.raw.apply_conf_change(&change).map_err(|error| halt(error.to_string()))?;
        self.raw.mut_store().conf_state = conf;
        self.pin_timeout();
        Ok(())
    }

    /// What is applied up to `index`. raft hears of it when it is on disk too: a snapshot is
    /// applied before it is.
    pub(crate) fn applied(&mut self, index: u64) {
        self.applied = index;
        let log = &self.raw.raft.raft_log;
        if index > log.applied && index <= log.persisted {
            self.raw.advance_apply_to(index);
            self.pin_timeout();
        }
    }

    fn send(&mut self, messages: Vec<eraftpb::Message>, round: &mut Round) {
        if messages.is_empty() {
            return;
        }
        self.note_snapshots(&messages);
        let ours = messages.iter().map(convert::message_from_raft).collect();
        round.effects.push(Effect::Send(ours));
    }

    fn note_snapshots(&mut self, messages: &[eraftpb::Message]) {
        let snapshots = messages.iter().filter(|m| m.get_msg_type() == MessageType::MsgSnapshot);
        for message in snapshots {
            self.sending.insert(message.to, self.ticks);
        }
    }

    /// Whether raft asked for a snapshot of the state for a member that is far behind.
    pub(crate) fn snapshot_wanted(&self) -> bool {
        self.raw.store().take_snapshot_wanted()
    }

    pub(crate) fn offer_snapshot(&self, snapshot: v1::SnapshotRecord) {
        self.raw.store().offer_snapshot(convert::snapshot_to_raft(snapshot));
    }

    /// Index, term and membership of what is applied, to label a snapshot of the state.
    pub(crate) fn label(&self, index: u64) -> v1::SnapshotRecord {
        v1::SnapshotRecord {
            index,
            term: self.raw.store().term_of(index).unwrap_or(0),
            conf_state: Some(convert::conf_from_raft(&self.raw.store().conf_state)),
            state: Vec::new(),
        }
    }

    pub(crate) fn compact(&mut self, index: u64) {
        self.raw.mut_store().compact(index);
    }

    /// Bytes of entries in memory.
    pub(crate) fn log_bytes(&self) -> usize {
        self.raw.store().bytes()
    }

    pub(crate) fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// The lowest index that all voters have, for how much of the log to keep.
    pub(crate) fn slowest(&self) -> Option<u64> {
        if !self.leads() {
            return None;
        }
        let progress = self.raw.raft.prs().iter();
        progress.filter(|(_, p)| p.state != ProgressState::Snapshot).map(|(_, p)| p.matched).min()
    }

    pub(crate) fn member(&self) -> u64 {
        self.raw.raft.id
    }

    pub(crate) fn leader(&self) -> u64 {
        self.raw.raft.leader_id
    }

    pub(crate) fn term(&self) -> u64 {
        self.raw.raft.term
    }

    pub(crate) fn commit_index(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    pub(crate) fn voters(&self) -> usize {
        self.raw.store().conf_state.voters.len()
    }

    fn pin_timeout(&mut self) {
        if self.raw.raft.state != self.role {
            self.role = self.raw.raft.state;
            self.role_changes += 1;
        }
        let mixed = mix(self.seed ^ mix(self.raw.raft.id))
            ^ mix(self.raw.raft.term)
            ^ mix(self.role_changes.rotate_left(32));
        let spread = (ELECTION_TICKS.end - ELECTION_TICKS.start) as u64;
        let extra = usize::try_from(mix(mixed) % spread).unwrap_or(0);
        self.raw.raft.set_randomized_election_timeout(ELECTION_TICKS.start + extra);
    }
}

fn storage_from(start: &Start) -> Result<LogStorage, String> {
    let mut hard = convert::hard_state_to_raft(&start.hard_state);
    let conf = convert::conf_to_raft(&start.conf_state);
    let entries: Result<Vec<_>, _> =
        start.entries.iter().cloned().map(convert::entry_to_raft).collect();
    let entries = entries.map_err(|error| error.to_string())?;
    let last = entries.last().map_or(start.base.0, |entry| entry.index);
    if hard.commit > last {
        return Err(format!(
            "the log ends at {last} but {} was known to be committed: acknowledged changes are \
             missing",
            hard.commit
        ));
    }
    hard.commit = hard.commit.max(start.base.0);
    hard.term = hard.term.max(start.base.1);
    let mut storage = LogStorage::new(start.base, hard, conf);
    storage.append(&entries);
    Ok(storage)
}

fn read_state(state: &raft::ReadState) -> Option<(u64, u64)> {
    let context = <[u8; 8]>::try_from(state.request_ctx.as_slice()).ok()?;
    Some((u64::from_be_bytes(context), state.index))
}
