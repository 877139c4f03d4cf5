//! A driver made of nothing: keeps the effects that the core asked for until a test answers them,
//! checks every step with the shared watcher, and plays the control plane's end of the reports.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use towline_node_core::{
    Assignment, Effect, Failure, Fork, Found, FoundVm, Gate, Input, NodeAgent,
};
use towline_node_core::{Record, Watcher};
use towline_proto::ids::{ForkId, NodeId, SandboxId};
use towline_proto::v1::{Capacity, Desired, Observed, Phase, SandboxSpec, Shape};

pub(crate) fn id(n: u8) -> SandboxId {
    SandboxId::from_bytes([n; 16])
}

pub(crate) fn capacity() -> Capacity {
    Capacity { cpus: 8, memory_mib: 8192, disk_mib: 100_000 }
}

pub(crate) fn assignment(n: u8, epoch: u64, generation: u64, desired: Desired) -> Assignment {
    let shape = Shape { cpus: 2, memory_mib: 2048, disk_mib: 20_000, processes_max: 4096 };
    Assignment {
        sandbox: id(n),
        epoch,
        generation,
        desired,
        reason: String::new(),
        ran: false,
        spec: SandboxSpec { shape: Some(shape), ..SandboxSpec::default() },
        image_digest: String::new(),
        revision: generation,
        fork: None,
    }
}

/// One that begins as a copy of sandbox 9.
pub(crate) fn copy(n: u8, epoch: u64, generation: u64, desired: Desired) -> Assignment {
    let fork = Fork { source: id(9), id: ForkId::from_bytes([n; 16]) };
    Assignment { fork: Some(fork), ..assignment(n, epoch, generation, desired) }
}

/// The world around one core, which outlives the core.
pub(crate) struct World {
    pub(crate) core: NodeAgent,
    pub(crate) now: Duration,
    pub(crate) session: u64,
    watcher: Watcher,
    /// Effects that wait for an answer.
    pub(crate) waiting: Vec<Effect>,
    /// What would be found after a restart.
    pub(crate) disk: BTreeMap<SandboxId, Record>,
    pub(crate) alive: BTreeSet<SandboxId>,
    /// Those of them that are halted.
    pub(crate) halted: BTreeSet<SandboxId>,
    /// What was said last to be kept.
    pub(crate) forks: Option<BTreeSet<ForkId>>,
    pub(crate) gates: BTreeMap<SandboxId, Gate>,
    /// What the control plane has committed.
    pub(crate) committed: BTreeMap<SandboxId, Observed>,
    pub(crate) reports: usize,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self {
            core: NodeAgent::new(capacity()),
            now: Duration::from_secs(1),
            session: 0,
            watcher: Watcher::new(),
            waiting: Vec::new(),
            disk: BTreeMap::new(),
            alive: BTreeSet::new(),
            halted: BTreeSet::new(),
            forks: None,
            gates: BTreeMap::new(),
            committed: BTreeMap::new(),
            reports: 0,
        };
        world.input(Input::Recovered(vec![]));
        world
    }

    pub(crate) fn input(&mut self, input: Input) {
        let effects = self.core.step(self.now, input.clone());
        self.watcher.observe(&input, &effects).unwrap_or_else(|broken| {
            panic!("{broken}\n after {input:?}\n came {effects:?}");
        });
        towline_node_core::check(&self.core).expect("the state is sound");
        for effect in effects {
            match effect {
                Effect::Gate { sandbox, gate } => {
                    self.gates.insert(sandbox, gate);
                }
                Effect::KeepForks { forks } => self.forks = Some(forks),
                effect => self.waiting.push(effect),
            }
        }
    }

    pub(crate) fn connect(&mut self) {
        self.session += 1;
        let node = NodeId::from_bytes([9; 16]);
        self.input(Input::Registered { session: self.session, node });
    }

    pub(crate) fn want(&mut self, assignment: Assignment) {
        self.input(Input::Desired { session: self.session, assignment: Box::new(assignment) });
    }

    pub(crate) fn bookmark(&mut self) {
        self.input(Input::Bookmark { session: self.session, revision: 1 });
    }

    /// Takes the effect at `index` and answers it, well or badly.
    pub(crate) fn answer(&mut self, index: usize, well: bool) {
        let effect = self.waiting.remove(index);
        // What has ended cannot be taken up.
        let well = match &effect {
            Effect::AdoptVm { assignment, .. } => well && self.alive.contains(&assignment.sandbox),
            _ => well,
        };
        let failure = || Failure { reason: "broken".into(), transient: true };
        match effect {
            Effect::Persist { version, record } => {
                let sandbox = record.assignment.sandbox;
                if well {
                    self.disk.insert(sandbox, *record);
                    self.input(Input::Persisted { sandbox, version });
                } else {
                    let reason = "no space".into();
                    self.input(Input::PersistFailed { sandbox, version, reason });
                }
            }
            Effect::Prepare { run, assignment } => {
                let sandbox = assignment.sandbox;
                self.input(match well {
                    true => Input::Prepared { sandbox, run, image_digest: "sha256:1".into() },
                    false => Input::PrepareFailed { sandbox, run, failure: failure() },
                });
            }
            Effect::AdoptVm { run, assignment }
                if well && assignment.desired == Desired::Paused =>
            {
                let sandbox = assignment.sandbox;
                if self.core.run(sandbox) == Some(run) {
                    self.halted.insert(sandbox);
                    self.input(Input::VmPaused { sandbox, run });
                }
            }
            Effect::StartVm { run, assignment } | Effect::AdoptVm { run, assignment } => {
                let sandbox = assignment.sandbox;
                // A start that was given up meanwhile answers late, and starts nothing.
                self.halted.remove(&sandbox);
                if well && self.core.run(sandbox) == Some(run) {
                    self.alive.insert(sandbox);
                    let (driver, isolation) = ("qemu".into(), "vm".into());
                    let start = "cold".into();
                    self.input(Input::VmStarted { sandbox, run, driver, isolation, start });
                } else {
                    self.alive.remove(&sandbox);
                    self.input(Input::VmFailed { sandbox, run, failure: failure() });
                }
            }
            // What has ended since cannot be halted.
            Effect::PauseVm { sandbox, .. } if !self.alive.contains(&sandbox) => {}
            Effect::PauseVm { sandbox, run } if well => {
                self.halted.insert(sandbox);
                self.input(Input::VmPaused { sandbox, run });
            }
            Effect::PauseVm { sandbox, run } => {
                self.input(Input::PauseFailed { sandbox, run, reason: "busy".into() });
            }
            Effect::ResumeVm { run, assignment } => {
                let sandbox = assignment.sandbox;
                self.halted.remove(&sandbox);
                if well {
                    self.input(Input::VmResumed { sandbox, run });
                } else {
                    self.alive.remove(&sandbox);
                    self.input(Input::VmFailed { sandbox, run, failure: failure() });
                }
            }
            Effect::Probe { sandbox, run } => self.input(match well {
                true => Input::ProbeAnswered { sandbox, run },
                false => Input::ProbeFailed { sandbox, run, reason: "silence".into() },
            }),
            Effect::StopVm { sandbox, run, .. } | Effect::KillVm { sandbox, run } => {
                self.alive.remove(&sandbox);
                self.halted.remove(&sandbox);
                // What was being done for the run is given up with it.
                self.waiting.retain(|other| !begins(other, run));
                self.input(Input::VmExited { sandbox, run, reason: "it ended".into() });
            }
            Effect::Destroy { sandbox } => {
                if well {
                    self.alive.remove(&sandbox);
                    self.halted.remove(&sandbox);
                    self.disk.remove(&sandbox);
                    self.waiting.retain(|other| !is_about(other, sandbox));
                    self.input(Input::Destroyed { sandbox, freed_bytes: 1 });
                } else {
                    self.input(Input::DestroyFailed { sandbox, reason: "busy".into() });
                }
            }
            Effect::Report { session, sequence, observed } => {
                if session == self.session && well {
                    self.reports += 1;
                    for fact in observed {
                        let id = SandboxId::try_from(&fact.sandbox_id[..]).expect("an id");
                        self.committed.insert(id, fact);
                    }
                    self.input(Input::Acknowledged { session, sequence });
                } else if session == self.session {
                    self.cut();
                }
            }
            Effect::Gate { .. } | Effect::KeepForks { .. } => unreachable!("answered at once"),
        }
    }

    pub(crate) fn cut(&mut self) {
        self.input(Input::Disconnected { session: self.session });
    }

    /// Answers everything well, oldest first, until nothing is asked for any more.
    pub(crate) fn settle(&mut self) {
        for _ in 0..1000 {
            if self.waiting.is_empty() {
                return;
            }
            self.answer(0, true);
        }
        panic!("the core asks for more and more: {:?}", self.waiting);
    }

    /// Lets time pass to the next deadline, as often as there is one.
    pub(crate) fn settle_with_time(&mut self) {
        for _ in 0..100 {
            self.settle();
            let Some(deadline) = self.core.next_deadline() else { return };
            self.now = self.now.max(deadline);
            self.input(Input::Tick);
        }
        panic!("there is always another deadline");
    }

    /// kill -9 of the node agent, and a new one on what it left.
    pub(crate) fn restart(&mut self) {
        let found = self.disk.values().map(|record| {
            let vm = match (self.alive.contains(&record.assignment.sandbox), &record.rest) {
                (true, _) => FoundVm::Alive,
                (false, Some(_)) => FoundVm::None,
                (false, None) if record.came_up => FoundVm::Ended { reason: "gone".into() },
                (false, None) => FoundVm::None,
            };
            Found::Known { record: Box::new(record.clone()), vm }
        });
        let found = found.collect();
        self.core = NodeAgent::new(capacity());
        self.watcher = Watcher::new();
        self.waiting.clear();
        self.gates.clear();
        self.forks = None;
        self.input(Input::Recovered(found));
    }

    pub(crate) fn phase(&self, n: u8) -> Option<Phase> {
        self.committed.get(&id(n)).map(Observed::phase)
    }

    pub(crate) fn reason(&self, n: u8) -> &str {
        self.committed.get(&id(n)).map_or("", |fact| fact.reason.as_str())
    }

    /// The index of the first waiting effect that this likes.
    pub(crate) fn find(&self, likes: impl Fn(&Effect) -> bool) -> usize {
        let found = self.waiting.iter().position(likes);
        found.unwrap_or_else(|| panic!("not among {:?}", self.waiting))
    }
}

fn begins(effect: &Effect, of: u64) -> bool {
    match effect {
        Effect::Prepare { run, .. }
        | Effect::StartVm { run, .. }
        | Effect::AdoptVm { run, .. }
        | Effect::ResumeVm { run, .. }
        | Effect::PauseVm { run, .. }
        | Effect::Probe { run, .. }
        | Effect::StopVm { run, .. }
        | Effect::KillVm { run, .. } => *run == of,
        _ => false,
    }
}

fn is_about(effect: &Effect, id: SandboxId) -> bool {
    match effect {
        Effect::Persist { record, .. } => record.assignment.sandbox == id,
        Effect::Prepare { assignment, .. }
        | Effect::StartVm { assignment, .. }
        | Effect::AdoptVm { assignment, .. }
        | Effect::ResumeVm { assignment, .. } => assignment.sandbox == id,
        Effect::PauseVm { sandbox, .. }
        | Effect::Probe { sandbox, .. }
        | Effect::StopVm { sandbox, .. }
        | Effect::KillVm { sandbox, .. }
        | Effect::Destroy { sandbox } => *sandbox == id,
        Effect::Gate { .. } | Effect::KeepForks { .. } | Effect::Report { .. } => false,
    }
}
