//! The core itself: one member's replica, state and soft state, and `step`.
//!
//! A step takes inputs in, proposes what they ask as few log entries, and runs raft's rounds until
//! nothing is left to do. Left out: IO of any kind. The invariant: callers and nodes hear only of
//! what is committed and applied.

mod apply;
mod requests;

use towline_proto::v1::{self, Command, command::What, node_directive::Directive};

use crate::command::{self, BATCH_BYTES_MAX, BATCH_COMMANDS_MAX, Halt, internal};
use crate::input::{Caller, Effect, Input, Now, Request, RequestId, SessionId, WatchId};
use crate::liveness::Liveness;
use crate::proposals::{Proposals, Waiter};
use crate::random::IdSource;
use crate::reconcile::{Sessions, directive, must_reset};
use crate::refusal::{Refusal, RefusalKind};
use crate::replica::{Replica, Start};
use crate::snapshot;
use crate::state::State;
use crate::watch::Watches;

/// Entries of the log that are kept behind a snapshot for slow members.
const TAIL_ENTRIES: u64 = 5000;
/// A snapshot is due after so many bytes of entries, whatever their number.
const SNAPSHOT_BYTES: usize = 16 << 20;
/// Ticks after which a read that raft dropped is asked again, and is given up.
const READ_AGAIN_TICKS: u64 = 3;
const READ_GIVE_UP_TICKS: u64 = 50;
/// Ticks between two entries that only bring time forward.
const ADVANCE_TICKS: u64 = 600;
/// Ticks after which time is asked to go forward again when a timeout has come and nothing happened.
const EXPIRE_AGAIN_TICKS: u64 = 10;
/// What a node is promised with each heartbeat's answer.
const LEASE_MS: u64 = towline_proto::limits::NODE_LEASE.as_secs() * 1000;

/// What a member is told about itself.
#[derive(Debug, Clone)]
pub struct Config {
    /// Raft id, never 0 and never used again.
    pub member: u64,
    /// Voters at the group's birth; a snapshot or the log overrides it.
    pub voters: Vec<u64>,
    /// The name of the cluster, written into the log once.
    pub cluster_id: String,
    /// For ids and election timeouts.
    pub seed: [u64; 2],
    /// A snapshot is due after so many entries.
    pub snapshot_entries: u64,
}

/// What was found on disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recovered {
    /// The newest snapshot.
    pub snapshot: Option<v1::SnapshotRecord>,
    /// The newest term, vote and commit.
    pub hard_state: v1::HardState,
    /// Entries, contiguous; those before the snapshot's end are ignored.
    pub entries: Vec<v1::LogEntry>,
}

/// One member of the control plane.
#[derive(Debug)]
pub struct ControlPlane {
    config: Config,
    now: Now,
    ticks: u64,
    replica: Replica,
    state: State,
    applied: u64,
    ids: IdSource,
    pending: Vec<(Waiter, Command)>,
    proposals: Proposals,
    reads: Reads,
    sessions: Sessions,
    watches: Watches,
    liveness: Liveness,
    led: bool,
    /// It leads and has applied an entry of its own term, so its state holds all that was ever
    /// acknowledged. Before that it must not decide on it.
    ready: bool,
    /// Requests that came before it was.
    early: Vec<(RequestId, Caller, Request)>,
    init_proposed: bool,
    advanced_at: u64,
    /// The expiry for which time was asked to go forward, and when.
    expiring: Option<(u64, u64)>,
    saving: Option<u64>,
    /// Index of the newest snapshot on disk.
    saved: u64,
    halted: bool,
}

/// Questions that wait until it is known that this member still leads.
#[derive(Debug, Default)]
struct Reads {
    fresh: Vec<Read>,
    asked: Vec<ReadRound>,
    context: u64,
}

#[derive(Debug)]
struct ReadRound {
    context: u64,
    asked_at: u64,
    first_asked_at: u64,
    /// Known once raft confirmed it.
    index: Option<u64>,
    reads: Vec<Read>,
}

#[derive(Debug)]
enum Read {
    Request(RequestId, Caller, Box<Request>),
    Watch(WatchId, Caller, v1::GetSandboxRequest),
}

impl ControlPlane {
    /// Starts from what is on disk.
    pub fn new(config: Config, recovered: Recovered) -> Result<Self, String> {
        let base = recovered.snapshot.as_ref().map_or((0, 0), |s| (s.index, s.term));
        let (state, conf_state) = match &recovered.snapshot {
            Some(record) => (
                snapshot::decode(record.index, &record.state).map_err(|halt| halt.to_string())?,
                record.conf_state.clone().unwrap_or_default(),
            ),
            None => (
                State::default(),
                v1::ConfState { voters: config.voters.clone(), ..Default::default() },
            ),
        };
        let entries = recovered.entries.into_iter().filter(|entry| entry.index > base.0).collect();
        let replica = Replica::new(Start {
            member: config.member,
            seed: config.seed[0],
            base,
            conf_state,
            hard_state: recovered.hard_state,
            entries,
        })?;
        let ids = IdSource::new(config.seed);
        Ok(Self {
            config,
            now: Now::default(),
            ticks: 0,
            replica,
            state,
            applied: base.0,
            ids,
            pending: Vec::new(),
            proposals: Proposals::default(),
            reads: Reads::default(),
            sessions: Sessions::default(),
            watches: Watches::default(),
            liveness: Liveness::default(),
            led: false,
            ready: false,
            early: Vec::new(),
            init_proposed: false,
            advanced_at: 0,
            expiring: None,
            saving: None,
            saved: base.0,
            halted: false,
        })
    }

    /// Takes one input (or a batch) in, and gives what must be done, in order.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        if self.halted {
            return effects;
        }
        self.now = now;
        self.take_in(input, &mut effects);
        // A creation that lost a race is placed again, which proposes again; attempts are bounded.
        loop {
            self.flush(&mut effects);
            if let Err(halt) = self.drive(&mut effects) {
                self.halt(&halt, &mut effects);
                break;
            }
            if self.ready {
                for (id, caller, request) in std::mem::take(&mut self.early) {
                    self.request(id, caller, request, &mut effects);
                }
            }
            if self.pending.is_empty() && self.reads.fresh.is_empty() && !self.init_due() {
                break;
            }
        }
        effects
    }

    /// The applied state, for checks.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether this member leads.
    pub fn leads(&self) -> bool {
        self.replica.leads()
    }

    /// Index of the last entry that was applied.
    pub fn applied_index(&self) -> u64 {
        self.applied
    }

    /// Raft's term.
    pub fn term(&self) -> u64 {
        self.replica.term()
    }

    /// Whether it stopped for good.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    fn halt(&mut self, halt: &Halt, effects: &mut Vec<Effect>) {
        self.halted = true;
        self.resign(effects);
        effects.push(Effect::Halt(halt.to_string()));
    }

    fn take_in(&mut self, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Batch(inputs) => {
                for input in inputs {
                    self.take_in(input, effects);
                }
            }
            Input::Tick => self.tick(effects),
            Input::Request(id, caller, request) => self.request(id, caller, request, effects),
            Input::Persisted(number) => effects.extend(self.replica.persisted(number)),
            Input::SnapshotSaved(index) => self.snapshot_saved(index, effects),
            Input::Received(message) => self.replica.receive(message),
            Input::SnapshotSent { to, arrived } => self.replica.snapshot_sent(to, arrived),
            Input::OpenSession(id, node) => self.open_session(id, node, effects),
            Input::Heartbeat(id, beat) => self.heartbeat(id, &beat, effects),
            Input::Observed(id, batch) => self.observed(id, batch, effects),
            Input::CloseSession(id) => self.sessions.close(id),
            Input::Watch(id, caller, which) => match self.not_leading() {
                None => self.reads.fresh.push(Read::Watch(id, caller, which)),
                Some(refusal) => effects.push(Effect::WatchEnd(id, Some(refusal))),
            },
            Input::Unwatch(id) => self.watches.remove(id),
        }
    }

    fn not_leading(&self) -> Option<Refusal> {
        if self.replica.leads() {
            return None;
        }
        let leader = self.replica.leader();
        let kind = RefusalKind::NotLeader { leader };
        Some(match leader {
            0 => Refusal::new(kind, "no member leads at the moment: try again"),
            _ => Refusal::new(kind, format!("member {leader} leads: ask it")),
        })
    }

    fn tick(&mut self, effects: &mut Vec<Effect>) {
        self.ticks += 1;
        self.replica.tick();
        if !self.replica.leads() {
            return;
        }
        self.read_again(effects);
        if !self.ready {
            return;
        }
        for set in self.liveness.transitions(&self.state, self.now.mono_ms) {
            self.pending.push((Waiter::Nobody, internal(What::SetNodeState(set))));
        }
        self.expire();
        let due = self.state.dedup.next_expiry_ms().is_some_and(|at| at <= self.now.unix_ms);
        if due && self.ticks - self.advanced_at >= ADVANCE_TICKS {
            self.advanced_at = self.ticks;
            self.pending.push((Waiter::Nobody, internal(What::AdvanceTime(true))));
        }
    }

    /// When a leader brings time forward next, because a timeout has come then.
    pub fn next_deadline_unix_ms(&self) -> Option<u64> {
        self.state.sandboxes.next_expiry_ms().filter(|_| self.replica.leads())
    }

    /// Proposes that time goes forward once the next timeout has come.
    fn expire(&mut self) {
        let next = self.next_deadline_unix_ms();
        let Some(at) = next.filter(|at| *at <= self.now.unix_ms.max(self.state.now_ms)) else {
            return;
        };
        let asked = self.expiring.is_some_and(|(expiry, asked_at)| {
            expiry == at && self.ticks - asked_at < EXPIRE_AGAIN_TICKS
        });
        if !asked {
            self.expiring = Some((at, self.ticks));
            self.pending.push((Waiter::Nobody, internal(What::AdvanceTime(true))));
        }
    }

    /// raft-rs drops reads before the first commit of a term and on other occasions, silently.
    fn read_again(&mut self, effects: &mut Vec<Effect>) {
        for mut round in std::mem::take(&mut self.reads.asked) {
            let waits = round.index.is_none();
            if waits && self.ticks - round.first_asked_at > READ_GIVE_UP_TICKS {
                let why = Refusal::unavailable("no majority of members answers: try again");
                effects.extend(round.reads.into_iter().map(|read| refuse_read(read, &why)));
                continue;
            }
            if waits && self.ticks - round.asked_at >= READ_AGAIN_TICKS {
                self.reads.context += 1;
                round.context = self.reads.context;
                round.asked_at = self.ticks;
                self.replica.read_index(round.context);
            }
            self.reads.asked.push(round);
        }
    }

    fn open_session(&mut self, id: SessionId, node: v1::RegisterNode, effects: &mut Vec<Effect>) {
        if let Some(refusal) = self.not_leading() {
            effects.push(Effect::EndSession(id, refusal));
            return;
        }
        let new_id = self.new_id();
        let command = v1::RegisterNodeCommand { id: new_id.to_vec(), node: Some(node) };
        self.pending.push((Waiter::Open(id), internal(What::RegisterNode(command))));
    }

    fn heartbeat(&mut self, id: SessionId, beat: &v1::Heartbeat, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get(id) else { return };
        self.liveness.heard(session.node, self.now.mono_ms);
        let answer =
            v1::HeartbeatAnswer { sent_boottime_ms: beat.sent_boottime_ms, lease_ms: LEASE_MS };
        effects.push(Effect::Directives(id, vec![directive(Directive::Heartbeat(answer))]));
    }

    fn observed(&mut self, id: SessionId, batch: v1::ObservedBatch, effects: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get(id) else {
            effects.push(must_reset(id, "this session is not registered"));
            return;
        };
        let command = v1::ReportObservedCommand {
            node_id: session.node.to_vec(),
            node_epoch: session.epoch,
            observed: batch.observed,
        };
        let waiter = Waiter::Observed(id, batch.sequence);
        self.pending.push((waiter, internal(What::ReportObserved(command))));
    }

    fn new_id(&mut self) -> [u8; 16] {
        let unix_ms = self.now.unix_ms.max(self.state.now_ms);
        *towline_proto::ids::SandboxId::from_parts(unix_ms, self.ids.next()).as_bytes()
    }

    fn init_due(&self) -> bool {
        self.ready && self.state.cluster_id.is_empty() && !self.init_proposed
    }

    /// Proposes what is pending, in as few entries as bounds allow, and asks raft about reads.
    fn flush(&mut self, effects: &mut Vec<Effect>) {
        if self.init_due() {
            self.init_proposed = true;
            let name = self.config.cluster_id.clone();
            self.pending.insert(0, (Waiter::Nobody, internal(What::InitCluster(name))));
        }
        let mut waiters = Vec::new();
        let mut commands = Vec::new();
        let mut bytes = 0;
        for (waiter, command) in std::mem::take(&mut self.pending) {
            let size = prost::Message::encoded_len(&command);
            let full = commands.len() >= BATCH_COMMANDS_MAX || bytes + size > BATCH_BYTES_MAX;
            if full && !commands.is_empty() {
                let batch = (std::mem::take(&mut waiters), std::mem::take(&mut commands));
                self.propose(batch.0, batch.1, effects);
                bytes = 0;
            }
            bytes += size;
            waiters.push(waiter);
            commands.push(command);
        }
        if !commands.is_empty() {
            self.propose(waiters, commands, effects);
        }
        let reads = std::mem::take(&mut self.reads.fresh);
        if !reads.is_empty() {
            self.reads.context += 1;
            self.reads.asked.push(ReadRound {
                context: self.reads.context,
                asked_at: self.ticks,
                first_asked_at: self.ticks,
                index: None,
                reads,
            });
            self.replica.read_index(self.reads.context);
        }
    }

    fn propose(&mut self, waiters: Vec<Waiter>, commands: Vec<Command>, effects: &mut Vec<Effect>) {
        let refusal = match self.not_leading() {
            Some(refusal) => refusal,
            None => {
                let now_ms = self.now.unix_ms.max(self.state.now_ms);
                match self.replica.propose(command::encode(now_ms, commands)) {
                    Ok(place) => return self.proposals.add(place, waiters),
                    Err(_) => Refusal::unavailable(
                        "the control plane has too much uncommitted work: try again shortly",
                    ),
                }
            }
        };
        for waiter in waiters {
            self.fail(waiter, &refusal, effects);
        }
    }

    fn fail(&mut self, waiter: Waiter, refusal: &Refusal, effects: &mut Vec<Effect>) {
        match waiter {
            Waiter::Request(id) => effects.push(Effect::Answer(id, Err(refusal.clone()))),
            Waiter::Create(creation) => {
                self.proposals.end(&creation);
                effects.push(Effect::Answer(creation.request_id, Err(refusal.clone())));
            }
            Waiter::Observed(session, _) | Waiter::Open(session) => {
                self.sessions.close(session);
                effects.push(Effect::EndSession(session, refusal.clone()));
            }
            Waiter::Nobody => {}
        }
    }

    fn snapshot_saved(&mut self, index: u64, effects: &mut Vec<Effect>) {
        self.saving = None;
        self.saved = self.saved.max(index);
        let keep = if self.replica.voters() > 1 { TAIL_ENTRIES } else { 0 };
        let slowest = self.replica.slowest().unwrap_or(index);
        let through = index.min(slowest.max(index.saturating_sub(keep)));
        self.replica.compact(through);
        effects.push(Effect::Compact(through));
    }

    /// Tells everybody that this member does not lead any more.
    fn resign(&mut self, effects: &mut Vec<Effect>) {
        let unknown = Refusal::unknown();
        for waiter in self.proposals.take_all() {
            self.fail(waiter, &unknown, effects);
        }
        let lost = Refusal::unavailable("this member leads no more: ask another");
        for (waiter, _) in std::mem::take(&mut self.pending) {
            self.fail(waiter, &lost, effects);
        }
        for (id, ..) in std::mem::take(&mut self.early) {
            effects.push(Effect::Answer(id, Err(lost.clone())));
        }
        let rounds = std::mem::take(&mut self.reads.asked);
        let fresh = std::mem::take(&mut self.reads.fresh);
        let reads = rounds.into_iter().flat_map(|round| round.reads).chain(fresh);
        effects.extend(reads.map(|read| refuse_read(read, &lost)));
        effects.extend(self.sessions.end_all(&lost));
        effects.extend(self.watches.end_all(&lost));
        self.proposals = Proposals::default();
        self.init_proposed = false;
        self.ready = false;
    }
}

fn refuse_read(read: Read, why: &Refusal) -> Effect {
    match read {
        Read::Request(id, ..) => Effect::Answer(id, Err(why.clone())),
        Read::Watch(id, ..) => Effect::WatchEnd(id, Some(why.clone())),
    }
}
