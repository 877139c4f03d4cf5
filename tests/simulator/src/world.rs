//! The world: who is up, what is on its way, what goes wrong, and what must hold after each event.

use std::collections::{BTreeMap, BTreeSet};

use towline_control_core::{Effect, Input, RequestId, SessionId, invariants, planted};
use towline_node_core::{Assignment, Effect as NodeEffect, Input as NodeInput};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, Desired, Phase, node_directive::Directive};

use crate::client::{Client, mark_of};
use crate::event::{Event, Queue};
use crate::member::Member;
use crate::node::Node;
use crate::rng::Rng;

/// A bug to plant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// None.
    None,
    /// Writes are reported as done before they are synced.
    AckBeforePersist,
    /// A restarted member drops the last entry of its log.
    TailDropped,
    /// `fits()` says yes to everything.
    FitsSkipped,
    /// Repeated requests are done again.
    DedupSkipped,
    /// No timeout stops anything.
    ExpirySkipped,
    /// A sandbox that runs is resized.
    ResizeUnguarded,
}

/// What to play.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Of everything that is by chance.
    pub seed: u64,
    /// Members of the control plane.
    pub members: usize,
    /// Nodes.
    pub nodes: usize,
    /// Clients.
    pub clients: usize,
    /// Operations of each client.
    pub operations: u64,
    /// Whether things go wrong.
    pub faults: bool,
    /// What is planted.
    pub bug: Bug,
}

impl Setup {
    /// A usual run with faults.
    pub fn new(seed: u64, members: usize) -> Self {
        Self { seed, members, nodes: 2, clients: 3, operations: 25, faults: true, bug: Bug::None }
    }
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Hash over every event in order.
    pub trace: u64,
    /// How many.
    pub events: u64,
    /// Simulated milliseconds.
    pub time_ms: u64,
    /// Changes that were acknowledged.
    pub acknowledged: usize,
    /// Crashes of members.
    pub crashes: u64,
}

/// A broken rule, with how to see it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Which event.
    pub event: u64,
    /// What is wrong.
    pub what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, event, what } = self;
        write!(
            f,
            "seed {seed:#x}, event {event}: {what}\nreplay with: TOWLINE_SIM_SEED={seed:#x} cargo nextest run -p towline-simulator replay"
        )
    }
}

/// When faults end, and how long everything may then take to settle.
const FAULTS_MS: u64 = 40_000;
const SETTLE_MS: u64 = 600_000;
/// A client waits so long for an answer.
const PATIENCE_MS: u64 = 1500;

#[derive(Debug)]
struct Session {
    node: usize,
    node_life: u64,
    member: usize,
    member_life: u64,
    /// Streams keep order: nothing arrives before this time.
    up_at: u64,
    down_at: u64,
}

#[derive(Debug)]
struct World {
    setup: Setup,
    rng: Rng,
    now: u64,
    events: u64,
    trace: u64,
    queue: Queue,
    members: Vec<Member>,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    /// Pairs of members that do not hear each other.
    cut: BTreeSet<(usize, usize)>,
    /// Requests that members hold: (client, attempt).
    asked: BTreeMap<u64, (usize, u64)>,
    next_request: u64,
    /// By index: a hash of the state after applying it.
    agreed: BTreeMap<u64, u64>,
    crashes: u64,
}

/// Plays one seed to its end.
pub fn run(setup: Setup) -> Result<Report, Failure> {
    planted::plant_fits_skipped(setup.bug == Bug::FitsSkipped);
    planted::plant_dedup_skipped(setup.bug == Bug::DedupSkipped);
    planted::plant_expiry_skipped(setup.bug == Bug::ExpirySkipped);
    planted::plant_resize_unguarded(setup.bug == Bug::ResizeUnguarded);
    let mut world = World::new(setup);
    let result = world.play();
    planted::plant_fits_skipped(false);
    planted::plant_dedup_skipped(false);
    planted::plant_expiry_skipped(false);
    planted::plant_resize_unguarded(false);
    result.map_err(|what| Failure { seed: setup.seed, event: world.events, what })
}

pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut queue = Queue::default();
        for member in 0..setup.members {
            queue.at(0, Event::StartMember(member));
        }
        for node in 0..setup.nodes {
            queue.at(1, Event::StartNode(node));
        }
        for client in 0..setup.clients {
            queue.at(2000, Event::Attempt { client, operation: 1, attempt: 0 });
        }
        if setup.faults {
            queue.at(3000, Event::Nemesis);
        }
        Self {
            setup,
            rng: Rng::new(setup.seed),
            now: 0,
            events: 0,
            trace: 0,
            queue,
            members: (1..=setup.members as u64).map(Member::new).collect(),
            nodes: (0..setup.nodes).map(Node::new).collect(),
            clients: (0..setup.clients)
                .map(|number| Client::new(number, setup.seed, setup.operations))
                .collect(),
            sessions: BTreeMap::new(),
            next_session: 0,
            cut: BTreeSet::new(),
            asked: BTreeMap::new(),
            next_request: 0,
            agreed: BTreeMap::new(),
            crashes: 0,
        }
    }

    fn play(&mut self) -> Result<Report, String> {
        let end = if self.setup.faults { FAULTS_MS } else { 0 };
        while let Some((time, event)) = self.queue.pop() {
            self.now = time;
            self.events += 1;
            let line = format!("{time} {event:?}");
            self.trace = self.trace.rotate_left(7) ^ hash(line.as_bytes());
            self.happen(event)?;
            if self.now > end && self.events.is_multiple_of(256) && self.settled()? {
                return Ok(self.report());
            }
            if self.now > end + SETTLE_MS {
                return Err(format!("it does not settle: {}", self.unsettled()));
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn report(&self) -> Report {
        Report {
            trace: self.trace,
            events: self.events,
            time_ms: self.now,
            acknowledged: self.clients.iter().map(|client| client.acknowledged.len()).sum(),
            crashes: self.crashes,
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        if let Some(member) = member_of(&event, &self.sessions)
            && self.members[member].paused_until > self.now
        {
            let later = self.members[member].paused_until;
            self.queue.at(later, event);
            return Ok(());
        }
        match event {
            Event::Tick { member, life } => {
                if self.members[member].life == life {
                    self.queue.at(self.now + 100, Event::Tick { member, life });
                    self.member_input(member, Input::Tick)?;
                }
            }
            Event::Written { member, life, sync, input } => {
                if self.members[member].life == life {
                    if sync {
                        self.members[member].sync()?;
                    }
                    if !(sync && self.setup.bug == Bug::AckBeforePersist) {
                        self.member_input(member, input)?;
                    }
                }
            }
            Event::Raft(message) => self.deliver(message)?,
            Event::SnapshotSent { member, to, arrived } => {
                self.member_input(member, Input::SnapshotSent { to, arrived })?;
            }
            Event::Attempt { client, operation, attempt } => {
                self.attempt(client, operation, attempt);
            }
            Event::Ask { member, client, attempt, request } => {
                self.next_request += 1;
                self.asked.insert(self.next_request, (client, attempt));
                let caller = self.clients[client].caller();
                let id = RequestId(self.next_request);
                self.member_input(member, Input::Request(id, caller, *request))?;
            }
            Event::Reply { client, attempt, answer } => {
                let client_state = &mut self.clients[client];
                if client_state.attempt == attempt {
                    let done = client_state.answered(&answer)?;
                    let operation = client_state.operation + u64::from(done);
                    let pause = self.rng.range(1, 400);
                    self.queue.at(self.now + pause, Event::Attempt { client, operation, attempt });
                }
            }
            Event::Connect { node, life } => self.connect(node, life),
            Event::ToMember { session, input } => {
                if let Some(open) = self.sessions.get(&session)
                    && self.members[open.member].life == open.member_life
                {
                    self.member_input(open.member, *input)?;
                }
            }
            Event::ToNode { session, directives } => self.directed(session, directives)?,
            Event::Cut { session } => self.cut_session(session)?,
            Event::Beat { node, life } => self.beat(node, life)?,
            Event::Done { node, life, input } => {
                if self.nodes[node].life == life {
                    self.node_input(node, *input)?;
                }
            }
            Event::Nemesis => self.nemesis(),
            Event::StartMember(member) => self.start_member(member)?,
            Event::StartNode(node) => {
                let life = self.nodes[node].life;
                let found = self.nodes[node].start();
                self.node_input(node, found)?;
                self.queue.at(self.now + 5, Event::Connect { node, life });
                self.queue.at(self.now + 500, Event::Beat { node, life });
            }
            Event::Heal(a, b) => {
                self.cut.remove(&(a, b));
            }
        }
        Ok(())
    }

    // Members.

    fn start_member(&mut self, member: usize) -> Result<(), String> {
        let (seed, bug) = (self.setup.seed, self.setup.bug);
        let state = &mut self.members[member];
        // A first start has nothing to forget.
        let bug = if state.life == 0 { Bug::None } else { bug };
        state.start(seed, self.setup.members as u64, bug)?;
        let life = state.life;
        self.queue.at(self.now + 100, Event::Tick { member, life });
        self.member_input(member, Input::Batch(Vec::new()))
    }

    fn member_input(&mut self, member: usize, input: Input) -> Result<(), String> {
        let effects = self.members[member].step(self.now, input);
        for effect in effects {
            self.member_effect(member, effect)?;
        }
        self.check_member(member)
    }

    fn check_member(&mut self, member: usize) -> Result<(), String> {
        let state = &mut self.members[member];
        // Nothing changes without an entry that is applied.
        let Some((index, digest)) = state.new_digest() else { return Ok(()) };
        let Some(core) = &state.core else { return Ok(()) };
        invariants::check(core.state())
            .map_err(|violation| format!("member {}: {violation}", state.id))?;
        match self.agreed.insert(index, digest) {
            Some(other) if other != digest => {
                Err(format!("members do not agree on the state at index {index}"))
            }
            _ => Ok(()),
        }
    }

    fn member_effect(&mut self, member: usize, effect: Effect) -> Result<(), String> {
        match effect {
            Effect::Send(messages) => messages.into_iter().for_each(|m| self.send(member, m)),
            Effect::Answer(RequestId(id), answer) => {
                if let Some((client, attempt)) = self.asked.remove(&id) {
                    let at = self.now + self.rng.range(1, 20);
                    self.queue.at(at, Event::Reply { client, attempt, answer: Box::new(answer) });
                }
            }
            Effect::Directives(SessionId(session), directives) => {
                let at = self.now + self.rng.range(1, 20);
                if let Some(open) = self.sessions.get_mut(&session) {
                    open.down_at = open.down_at.max(at);
                    self.queue.at(open.down_at, Event::ToNode { session, directives });
                }
            }
            Effect::EndSession(SessionId(session), _) => {
                let at = self.now + self.rng.range(1, 20);
                let at = self.sessions.get(&session).map_or(at, |open| open.down_at.max(at));
                self.queue.at(at, Event::Cut { session });
            }
            Effect::Halt(why) => return Err(format!("a member halts: {why}")),
            Effect::WatchUpdate(..) | Effect::WatchEnd(..) => {}
            write => self.write(member, write)?,
        }
        Ok(())
    }

    fn write(&mut self, member: usize, effect: Effect) -> Result<(), String> {
        let Some(writing) = self.members[member].write(effect)? else { return Ok(()) };
        let takes = if writing.sync { self.rng.range(1, 25) } else { 0 };
        let at = self.members[member].written_at(self.now + takes);
        let life = self.members[member].life;
        let (input, sync) = (writing.input, writing.sync);
        if sync && self.setup.bug == Bug::AckBeforePersist {
            let early = input.clone();
            self.queue.at(self.now, Event::Written { member, life, sync: false, input: early });
        }
        self.queue.at(at, Event::Written { member, life, sync, input });
        Ok(())
    }

    fn send(&mut self, from: usize, message: v1::RaftMessage) {
        let to = usize::try_from(message.to).unwrap_or(1) - 1;
        let cut = self.cut.contains(&(from.min(to), from.max(to)));
        let lost = cut || (self.setup.faults && self.now < FAULTS_MS && self.rng.percent(2));
        // Every third message takes long: messages overtake each other.
        let delay =
            if self.rng.percent(30) { self.rng.range(1, 150) } else { self.rng.range(1, 5) };
        if message.snapshot.is_some() {
            let sent = Event::SnapshotSent { member: from, to: message.to, arrived: !lost };
            self.queue.at(self.now + delay + 1, sent);
        }
        if !lost {
            self.queue.at(self.now + delay, Event::Raft(message));
        }
    }

    fn deliver(&mut self, message: v1::RaftMessage) -> Result<(), String> {
        let to = usize::try_from(message.to).unwrap_or(1) - 1;
        self.member_input(to, Input::Received(message))
    }

    // Clients.

    fn attempt(&mut self, client: usize, operation: u64, attempt: u64) {
        let state = &mut self.clients[client];
        // Only the newest plan counts: an answer makes the time-out of its attempt void.
        if state.attempt != attempt || operation < state.operation {
            return;
        }
        if operation == state.operation {
            state.missed();
        }
        let Some(request) = state.next() else { return };
        let (operation, attempt) = (state.operation, state.attempt);
        let member = self.rng.index(self.members.len());
        let at = self.now + self.rng.range(1, 20);
        let lost = self.setup.faults && self.now < FAULTS_MS && self.rng.percent(5);
        if !lost {
            self.queue.at(at, Event::Ask { member, client, attempt, request: Box::new(request) });
        }
        self.queue.at(self.now + PATIENCE_MS, Event::Attempt { client, operation, attempt });
    }

    // Nodes.

    fn connect(&mut self, node: usize, life: u64) {
        let state = &self.nodes[node];
        if state.life != life || state.session.is_some() {
            return;
        }
        let member = self.rng.index(self.members.len());
        if self.members[member].core.is_none() {
            self.queue.at(self.now + 200, Event::Connect { node, life });
            return;
        }
        self.next_session += 1;
        let session = self.next_session;
        let register = self.nodes[node].register();
        self.nodes[node].session = Some(session);
        let at = self.now + self.rng.range(1, 20);
        let open = Session {
            node,
            node_life: life,
            member,
            member_life: self.members[member].life,
            up_at: at,
            down_at: at,
        };
        self.sessions.insert(session, open);
        let input = Box::new(Input::OpenSession(SessionId(session), register));
        self.queue.at(at, Event::ToMember { session, input });
    }

    fn tell_member(&mut self, session: u64, input: Input) {
        let at = self.now + self.rng.range(1, 20);
        if let Some(open) = self.sessions.get_mut(&session) {
            open.up_at = open.up_at.max(at);
            self.queue.at(open.up_at, Event::ToMember { session, input: Box::new(input) });
        }
    }

    fn beat(&mut self, node: usize, life: u64) -> Result<(), String> {
        if self.nodes[node].life != life {
            return Ok(());
        }
        self.queue.at(self.now + 500, Event::Beat { node, life });
        if let Some(session) = self.nodes[node].session {
            let beat = v1::Heartbeat { sent_boottime_ms: self.now };
            self.tell_member(session, Input::Heartbeat(SessionId(session), beat));
        }
        self.node_input(node, NodeInput::Tick)
    }

    fn directed(&mut self, session: u64, directives: Vec<v1::NodeDirective>) -> Result<(), String> {
        let Some(open) = self.sessions.get(&session) else { return Ok(()) };
        let (node, life) = (open.node, open.node_life);
        if self.nodes[node].life != life || self.nodes[node].session != Some(session) {
            return Ok(());
        }
        for directive in directives {
            let input = match directive.directive {
                Some(Directive::Registered(registered)) => NodeInput::Registered {
                    session,
                    node: registered.node_id.as_slice().try_into().map_err(wrong)?,
                },
                Some(Directive::Desired(desired)) => NodeInput::Desired {
                    session,
                    assignment: Box::new(Assignment::try_from(desired).map_err(wrong)?),
                },
                Some(Directive::Bookmark(mark)) => {
                    NodeInput::Bookmark { session, revision: mark.revision }
                }
                Some(Directive::ObservedAck(ack)) => {
                    NodeInput::Acknowledged { session, sequence: ack.sequence }
                }
                Some(Directive::MustReset(_)) => return self.cut_session(session),
                Some(Directive::Heartbeat(_)) | None => continue,
            };
            self.node_input(node, input)?;
        }
        Ok(())
    }

    fn cut_session(&mut self, session: u64) -> Result<(), String> {
        let Some(open) = self.sessions.remove(&session) else { return Ok(()) };
        let close = Input::CloseSession(SessionId(session));
        if self.members[open.member].life == open.member_life {
            self.member_input(open.member, close)?;
        }
        let node = &mut self.nodes[open.node];
        if node.life != open.node_life || node.session != Some(session) {
            return Ok(());
        }
        node.session = None;
        let again = self.now + self.rng.range(20, 400);
        self.queue.at(again, Event::Connect { node: open.node, life: open.node_life });
        self.node_input(open.node, NodeInput::Disconnected { session })
    }

    fn node_input(&mut self, node: usize, input: NodeInput) -> Result<(), String> {
        let effects = self.nodes[node].step(self.now, input)?;
        for effect in effects {
            if let NodeEffect::Report { session, sequence, observed } = effect {
                let batch = v1::ObservedBatch { sequence, observed };
                self.tell_member(session, Input::Observed(SessionId(session), batch));
            } else if let Some(answer) = self.nodes[node].perform(effect) {
                let at = self.now + self.rng.range(1, 60);
                let life = self.nodes[node].life;
                self.queue.at(at, Event::Done { node, life, input: Box::new(answer) });
            }
        }
        self.nodes[node].check()?;
        self.check_single(node)
    }

    /// No sandbox runs on two nodes.
    fn check_single(&self, node: usize) -> Result<(), String> {
        let others = self.nodes.iter().enumerate().filter(|(other, _)| *other != node);
        for (_, other) in others {
            if let Some(twice) = self.nodes[node].vms.keys().find(|id| other.vms.contains_key(id)) {
                return Err(format!("{twice} runs on two nodes"));
            }
        }
        Ok(())
    }

    // Faults.

    fn nemesis(&mut self) {
        if self.now >= FAULTS_MS {
            return;
        }
        let next = self.now + self.rng.range(100, 2500);
        self.queue.at(next, Event::Nemesis);
        let member = self.rng.index(self.members.len());
        match self.rng.range(0, 9) {
            0..5 => self.crash_member(member),
            5..7 => {
                let other = self.rng.index(self.members.len());
                let pair = (member.min(other), member.max(other));
                if pair.0 != pair.1 && self.cut.insert(pair) {
                    let heal = self.now + self.rng.range(200, 5000);
                    self.queue.at(heal, Event::Heal(pair.0, pair.1));
                }
            }
            7 => {
                self.members[member].paused_until = self.now + self.rng.range(100, 4000);
            }
            _ => self.crash_node(),
        }
    }

    fn crash_member(&mut self, member: usize) {
        if self.members[member].core.is_none() {
            return;
        }
        self.crashes += 1;
        self.members[member].crash();
        let mut rng = Rng::new(self.rng.next());
        self.members[member].disk.crash(&mut rng);
        let cut: Vec<u64> = self.sessions_where(|session| session.member == member);
        for session in cut {
            let at = self.now + self.rng.range(1, 50);
            self.queue.at(at, Event::Cut { session });
        }
        let back = self.now + self.rng.range(50, 3000);
        self.queue.at(back, Event::StartMember(member));
    }

    fn crash_node(&mut self) {
        let node = self.rng.index(self.nodes.len());
        if self.nodes[node].agent.is_none() {
            return;
        }
        let host = self.rng.percent(30);
        self.nodes[node].crash(host);
        for session in self.sessions_where(|session| session.node == node) {
            let at = self.now + self.rng.range(1, 50);
            self.queue.at(at, Event::Cut { session });
        }
        let back = self.now + self.rng.range(50, 15_000);
        self.queue.at(back, Event::StartNode(node));
    }

    fn sessions_where(&self, wanted: impl Fn(&Session) -> bool) -> Vec<u64> {
        self.sessions.iter().filter(|(_, s)| wanted(s)).map(|(id, _)| *id).collect()
    }

    // The end.

    fn leader(&self) -> Option<&towline_control_core::State> {
        let cores = self.members.iter().filter_map(|member| member.core.as_ref());
        let leaders = cores.filter(|core| core.leads());
        leaders.max_by_key(|core| core.term()).map(|core| core.state())
    }

    /// Whether all is answered and every node has what is wanted; then what was acknowledged must
    /// be there.
    fn settled(&self) -> Result<bool, String> {
        if !self.unsettled().is_empty() {
            return Ok(false);
        }
        let Some(state) = self.leader() else { return Ok(false) };
        let mut found: BTreeMap<String, &v1::Sandbox> = BTreeMap::new();
        for (_, record) in state.sandboxes.after(None) {
            let Some(sandbox) = &record.sandbox else { continue };
            if found.insert(mark_of(sandbox), sandbox).is_some() {
                return Err(format!("{} was made twice", mark_of(sandbox)));
            }
        }
        for client in &self.clients {
            for (mark, known) in &client.acknowledged {
                let there = found.remove(mark);
                let right = match (there, known.desired) {
                    _ if known.unsure => true,
                    (None, Desired::Deleted) => true,
                    (Some(sandbox), desired) => {
                        sandbox.id == known.id
                            && (sandbox.desired() == desired || was_timed_out(sandbox, desired))
                    }
                    (None, _) => false,
                };
                if !right {
                    return Err(format!(
                        "{mark}: {known:?} was acknowledged, and there is {there:?}"
                    ));
                }
            }
            for mark in &client.maybe {
                found.remove(mark);
            }
        }
        match found.keys().next() {
            Some(mark) => Err(format!("{mark} is there and nobody was told")),
            None => Ok(true),
        }
    }

    /// What is not as it should be yet.
    fn unsettled(&self) -> String {
        if let Some(client) = self.clients.iter().find(|client| !client.is_done()) {
            return format!("{} waits for an answer", client.name);
        }
        let Some(state) = self.leader() else { return "nobody leads".to_owned() };
        let mut wanted: BTreeSet<SandboxId> = BTreeSet::new();
        for (id, record) in state.sandboxes.after(None) {
            let view = state.view(record);
            let observed = view.observed.clone().unwrap_or_default();
            let fits = match view.desired() {
                // It may have ended by itself, or with its host while it came up.
                Desired::Running => {
                    matches!(observed.phase(), Phase::Running | Phase::Stopped | Phase::Failed)
                }
                Desired::Paused => {
                    matches!(observed.phase(), Phase::Paused | Phase::Stopped | Phase::Failed)
                }
                Desired::Stopped => observed.phase() == Phase::Stopped,
                Desired::Deleted | Desired::Unspecified => false,
            };
            if !fits || observed.generation != view.generation {
                return format!("{id} is wanted {:?} and is {observed:?}", view.desired());
            }
            wanted.insert(id);
        }
        let has: BTreeSet<SandboxId> = self.nodes.iter().flat_map(Node::has).collect();
        if has != wanted {
            return format!("nodes have {has:?}, and wanted is {wanted:?}");
        }
        String::new()
    }
}

/// The member that an event is for, to hold it back while the member is paused.
fn member_of(event: &Event, sessions: &BTreeMap<u64, Session>) -> Option<usize> {
    match event {
        Event::Tick { member, .. }
        | Event::Written { member, .. }
        | Event::SnapshotSent { member, .. }
        | Event::Ask { member, .. }
        | Event::StartMember(member) => Some(*member),
        Event::Raft(message) => usize::try_from(message.to).ok().map(|to| to - 1),
        Event::ToMember { session, .. } => sessions.get(session).map(|open| open.member),
        _ => None,
    }
}

/// Whether a timeout stopped what was acknowledged as running. It never does more than that.
fn was_timed_out(sandbox: &v1::Sandbox, acknowledged: Desired) -> bool {
    acknowledged.is_up()
        && sandbox.desired() == Desired::Stopped
        && sandbox.desired_reason.starts_with("timeout ")
}

fn wrong(error: impl std::fmt::Display) -> String {
    error.to_string()
}
