//! All sandboxes of one node: which records are taken, what is no longer wanted, what is told.
//!
//! Left to `lifecycle`: what one sandbox does next. Records are level-triggered: the newest by
//! (epoch, generation) counts, an older or equal one changes nothing. After a session's first
//! bookmark, a sandbox that the session did not name is destroyed. The first input is `Recovered`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use towline_proto::ids::{ForkId, NodeId, SandboxId};
use towline_proto::v1::{Capacity, Desired, Observed, Phase};

use crate::capacity::Promised;
use crate::input::{Assignment, Effect, Found, FoundVm, Input, Record, Rest, Run, Session};
use crate::lifecycle::{Context, Sandbox, Stage};
use crate::reports::Reports;

/// Destroyed sandboxes whose late records are still refused. Old ones go first; an id is never
/// used again, so forgetting one is harmless unless a member is thousands of changes behind.
const GONE_MAX: usize = 4096;

/// The node agent's core.
#[derive(Debug, Clone)]
pub struct NodeAgent {
    capacity: Capacity,
    node: Option<NodeId>,
    sandboxes: BTreeMap<SandboxId, Sandbox>,
    /// Folders without a record, until somebody wants them or the bookmark comes.
    leftovers: BTreeSet<SandboxId>,
    /// Newest (epoch, generation) of what is gone.
    gone: BTreeMap<SandboxId, (u64, u64)>,
    /// Named by the present session; `None` after its first bookmark.
    named: Option<BTreeSet<SandboxId>>,
    /// What was told last to keep; `None` before all that is wanted here was told once.
    forks: Option<BTreeSet<ForkId>>,
    reports: Reports,
    numbers: u64,
}

impl NodeAgent {
    /// A node that offers `capacity` and knows nothing yet.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            node: None,
            sandboxes: BTreeMap::new(),
            leftovers: BTreeSet::new(),
            gone: BTreeMap::new(),
            named: None,
            forks: None,
            reports: Reports::default(),
            numbers: 0,
        }
    }

    /// Takes one input at time `now` and returns what should happen, in order.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.take(now, input, &mut effects);
        self.keep_forks(&mut effects);
        let Self { reports, sandboxes, .. } = self;
        effects.extend(reports.next(|id| sandboxes.get(&id)?.observed()));
        effects
    }

    /// Tells when some are not needed any more (or are newly wanted, which does no harm).
    fn keep_forks(&mut self, effects: &mut Vec<Effect>) {
        let Some(told) = &mut self.forks else { return };
        let wanted: BTreeSet<_> = self.sandboxes.values().filter_map(Sandbox::wants_fork).collect();
        if *told != wanted {
            told.clone_from(&wanted);
            effects.push(Effect::KeepForks { forks: wanted });
        }
    }

    /// When the next `Tick` is wanted.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.sandboxes.values().filter_map(Sandbox::deadline).min()
    }

    /// This node's id, once it was registered.
    pub fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// What this node offers.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// What is promised to sandboxes now.
    pub fn promised(&self) -> Promised {
        self.promised_without(None)
    }

    /// The sandboxes of this node.
    pub fn sandboxes(&self) -> impl Iterator<Item = SandboxId> + '_ {
        self.sandboxes.keys().copied()
    }

    /// What this node would report of a sandbox now: `None` for one that it does not have, or that
    /// is not settled.
    pub fn observed(&self, sandbox: SandboxId) -> Option<Observed> {
        self.sandboxes.get(&sandbox)?.observed()
    }

    /// The newest run of a sandbox.
    pub fn run(&self, sandbox: SandboxId) -> Option<Run> {
        self.sandboxes.get(&sandbox).map(|sandbox| sandbox.run)
    }

    fn take(&mut self, now: Duration, input: Input, effects: &mut Vec<Effect>) {
        match input {
            Input::Recovered(found) => {
                found.into_iter().for_each(|found| self.recover(found, now, effects));
            }
            Input::Tick => self.tick(now, effects),
            Input::CapacityChanged(capacity) => self.capacity = capacity,
            Input::Registered { session, node } => {
                self.node = Some(node);
                self.named = Some(BTreeSet::new());
                self.reports.begin(session, self.sandboxes.keys().copied());
            }
            Input::Disconnected { session } if self.is_session(session) => {
                self.named = None;
                self.reports.end();
            }
            Input::Desired { session, assignment } if self.is_session(session) => {
                self.assign(*assignment, now, effects);
            }
            Input::Bookmark { session, .. } if self.is_session(session) => {
                self.destroy_unnamed(now, effects);
            }
            Input::Acknowledged { session, sequence } if self.is_session(session) => {
                self.acknowledged(sequence);
            }
            // Told by a session that is over: the present one tells all of it again.
            Input::Disconnected { .. }
            | Input::Desired { .. }
            | Input::Bookmark { .. }
            | Input::Acknowledged { .. } => {}
            input => self.happened(now, input, effects),
        }
    }

    fn is_session(&self, session: Session) -> bool {
        self.reports.session() == Some(session)
    }

    /// Hands what happened to a sandbox to it, unless it is about an older run.
    fn happened(&mut self, now: Duration, input: Input, effects: &mut Vec<Effect>) {
        let Some((id, run)) = about(&input) else { return };
        let numbers = &mut self.numbers;
        let Some(sandbox) = self.sandboxes.get_mut(&id) else { return };
        if run.is_some_and(|run| run != sandbox.run) {
            return;
        }
        tell(sandbox, input, &mut Context { now, numbers, effects });
        self.after_change(id);
    }

    // ---- restart ----

    fn recover(&mut self, found: Found, now: Duration, effects: &mut Vec<Effect>) {
        let (record, vm) = match found {
            Found::Known { record, vm } => (*record, vm),
            Found::Leftover(id) => {
                self.leftovers.insert(id);
                return;
            }
        };
        let id = record.assignment.sandbox;
        let mut sandbox = Sandbox::new(record);
        let cx = &mut Context { now, numbers: &mut self.numbers, effects };
        recover_one(&mut sandbox, vm, cx);
        self.sandboxes.insert(id, sandbox);
    }

    // ---- what is wanted ----

    fn assign(&mut self, assignment: Assignment, now: Duration, effects: &mut Vec<Effect>) {
        let id = assignment.sandbox;
        if let Some(named) = &mut self.named {
            named.insert(id);
        }
        self.leftovers.remove(&id);
        if self.is_stale(&assignment) {
            return;
        }
        let refusal = self.refusal(&assignment);
        let cx = &mut Context { now, numbers: &mut self.numbers, effects };
        let sandbox = self.sandboxes.entry(id).or_insert_with(|| {
            let record = Record {
                assignment: assignment.clone(),
                came_up: false,
                rest: None,
                main_exit: None,
                image_digest: assignment.image_digest.clone(),
            };
            Sandbox::new(record)
        });
        sandbox.unwanted = false;
        sandbox.assign(assignment, refusal, cx);
        self.reports.changed(id);
    }

    /// Whether it is no newer than what is known. One that is named again after the node had been
    /// told that it is not wanted counts as news, so that its end is reported.
    fn is_stale(&self, assignment: &Assignment) -> bool {
        let newness = (assignment.epoch, assignment.generation);
        if let Some(sandbox) = self.sandboxes.get(&assignment.sandbox) {
            let known = &sandbox.record.assignment;
            let known = (known.epoch, known.generation);
            return newness < known || newness == known && !sandbox.unwanted;
        }
        // To be told to remove it once more is harmless: its end is told once more.
        let removal = assignment.desired == Desired::Deleted;
        let gone = self.gone.get(&assignment.sandbox);
        gone.is_some_and(|gone| newness < *gone || newness == *gone && !removal)
    }

    fn refusal(&self, assignment: &Assignment) -> Option<String> {
        let shape = assignment.spec.shape.unwrap_or_default();
        self.promised_without(Some(assignment.sandbox)).refusal(&shape, &self.capacity)
    }

    fn promised_without(&self, without: Option<SandboxId>) -> Promised {
        let mut promised = Promised::default();
        for sandbox in self.sandboxes.values().filter(|sandbox| Some(sandbox.id()) != without) {
            promised.add(&sandbox.shape(), sandbox.holds_memory(), sandbox.holds_disk());
        }
        promised
    }

    fn destroy_unnamed(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(named) = self.named.take() else { return };
        for (id, sandbox) in &mut self.sandboxes {
            if !named.contains(id) {
                sandbox.unwanted = true;
                sandbox.destroy(&mut Context { now, numbers: &mut self.numbers, effects });
            }
        }
        if self.forks.is_none() {
            // Others may have been left by an earlier node agent.
            let forks: BTreeSet<_> =
                self.sandboxes.values().filter_map(Sandbox::wants_fork).collect();
            effects.push(Effect::KeepForks { forks: forks.clone() });
            self.forks = Some(forks);
        }
        let leftovers = std::mem::take(&mut self.leftovers);
        effects.extend(leftovers.into_iter().map(|sandbox| Effect::Destroy { sandbox }));
        let gone: Vec<_> = self.sandboxes.keys().copied().collect();
        gone.into_iter().for_each(|id| self.after_change(id));
    }

    fn tick(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        for (id, sandbox) in &mut self.sandboxes {
            sandbox.tick(&mut Context { now, numbers: &mut self.numbers, effects });
            self.reports.changed(*id);
        }
    }

    // ---- what is told ----

    fn acknowledged(&mut self, sequence: u64) {
        for (id, fact) in self.reports.acknowledged(sequence) {
            if fact.phase() == Phase::Gone && self.observed(id) == Some(fact) {
                self.forget(id);
            }
        }
    }

    /// Marks a sandbox as changed; forgets one that is gone and that nobody waits for.
    fn after_change(&mut self, id: SandboxId) {
        self.reports.changed(id);
        let Some(sandbox) = self.sandboxes.get(&id) else { return };
        if sandbox.unwanted && sandbox.stage == Stage::Gone {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SandboxId) {
        self.reports.forget(id);
        let Some(sandbox) = self.sandboxes.remove(&id) else { return };
        let last = &sandbox.record.assignment;
        self.gone.insert(id, (last.epoch, last.generation));
        if self.gone.len() > GONE_MAX {
            self.gone.pop_first();
        }
    }
}

/// What a restarted node agent does about one sandbox.
fn recover_one(sandbox: &mut Sandbox, vm: FoundVm, cx: &mut Context<'_>) {
    let came_up = sandbox.record.came_up;
    match (sandbox.record.assignment.desired, vm) {
        (Desired::Deleted, _) => sandbox.destroy(cx),
        (_, FoundVm::Alive) if !came_up && sandbox.record.assignment.copies().is_some() => {
            sandbox.end_unfinished_copy(cx);
        }
        (_, FoundVm::Alive) => {
            sandbox.record.rest = None;
            sandbox.adopt(cx);
        }
        (_, FoundVm::Ended { reason }) if came_up => sandbox.rest(Rest::Stopped { reason }, cx),
        (_, FoundVm::Ended { reason }) => sandbox.rest(Rest::Failed { reason }, cx),
        // It rests already; its stage says so from the start.
        (_, FoundVm::None) if sandbox.record.rest.is_some() => {}
        (Desired::Running | Desired::Paused, FoundVm::None) => sandbox.resume_start(cx),
        (Desired::Stopped | Desired::Unspecified, FoundVm::None) => {
            sandbox.rest(Rest::Stopped { reason: "stopped".into() }, cx);
        }
    }
}

/// Which sandbox, and which run of it, an input is about.
fn about(input: &Input) -> Option<(SandboxId, Option<Run>)> {
    match input {
        Input::Persisted { sandbox, .. }
        | Input::PersistFailed { sandbox, .. }
        | Input::Destroyed { sandbox, .. }
        | Input::DestroyFailed { sandbox, .. } => Some((*sandbox, None)),
        Input::PrepareProgress { sandbox, run, .. }
        | Input::Prepared { sandbox, run, .. }
        | Input::PrepareFailed { sandbox, run, .. }
        | Input::VmStarted { sandbox, run, .. }
        | Input::VmFailed { sandbox, run, .. }
        | Input::VmPaused { sandbox, run }
        | Input::PauseFailed { sandbox, run, .. }
        | Input::VmResumed { sandbox, run }
        | Input::ProbeAnswered { sandbox, run }
        | Input::ProbeFailed { sandbox, run, .. }
        | Input::GuestLost { sandbox, run, .. }
        | Input::VmExited { sandbox, run, .. }
        | Input::MainExited { sandbox, run, .. }
        | Input::GuestNotice { sandbox, run, .. } => Some((*sandbox, Some(*run))),
        Input::Recovered(_)
        | Input::Tick
        | Input::CapacityChanged(_)
        | Input::Registered { .. }
        | Input::Disconnected { .. }
        | Input::Desired { .. }
        | Input::Bookmark { .. }
        | Input::Acknowledged { .. } => None,
    }
}

fn tell(sandbox: &mut Sandbox, input: Input, cx: &mut Context<'_>) {
    match input {
        Input::Persisted { version, .. } => sandbox.persisted(version, cx),
        Input::PersistFailed { version, reason, .. } => sandbox.persist_failed(version, &reason),
        Input::PrepareProgress { text, .. } => sandbox.progressed(text),
        Input::Prepared { image_digest, .. } => sandbox.prepared(image_digest, cx),
        Input::PrepareFailed { failure, .. } | Input::VmFailed { failure, .. } => {
            sandbox.failed(failure, cx);
        }
        Input::VmStarted { driver, isolation, start, .. } => {
            sandbox.vm_started(driver, isolation, start, cx);
        }
        Input::VmPaused { .. } => sandbox.vm_paused(cx),
        Input::PauseFailed { reason, .. } => sandbox.pause_failed(&reason, cx),
        Input::VmResumed { .. } => sandbox.vm_resumed(cx),
        Input::ProbeAnswered { .. } => sandbox.probe_answered(cx),
        Input::ProbeFailed { reason, .. } => sandbox.probe_failed(&reason, cx),
        Input::GuestLost { reason, .. } => sandbox.guest_lost(reason, cx),
        Input::VmExited { reason, .. } => sandbox.ended(reason, cx),
        Input::MainExited { status, .. } => sandbox.main_exited(status, cx),
        Input::GuestNotice { text, .. } => sandbox.noticed(text),
        Input::Destroyed { freed_bytes, .. } => sandbox.destroyed(freed_bytes, cx),
        Input::DestroyFailed { reason, .. } => sandbox.destroy_failed(&reason, cx),
        Input::Recovered(_)
        | Input::Tick
        | Input::CapacityChanged(_)
        | Input::Registered { .. }
        | Input::Disconnected { .. }
        | Input::Desired { .. }
        | Input::Bookmark { .. }
        | Input::Acknowledged { .. } => {}
    }
}
