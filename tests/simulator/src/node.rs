//! One node: the node agent's core, and the records and VMs that outlive it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use towline_node_core::{
    Effect, Failure, Found, FoundVm, Gate, Input, NodeAgent, Record, Run, Watcher,
};
use towline_proto::ids::{ForkId, SandboxId};
use towline_proto::v1::{self, Capacity, Desired};

/// Room for a few sandboxes, so that runs meet refusals.
pub(crate) const CAPACITY: Capacity = Capacity { cpus: 16, memory_mib: 4096, disk_mib: 64 << 10 };

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) life: u64,
    pub(crate) agent: Option<NodeAgent>,
    watcher: Watcher,
    pub(crate) session: Option<u64>,
    records: BTreeMap<SandboxId, Record>,
    /// VMs that live, and their size.
    pub(crate) vms: BTreeMap<SandboxId, u64>,
    /// Those of them that are halted.
    pub(crate) halted: BTreeSet<SandboxId>,
    /// Those of them that are copies and do not know it yet.
    unaware: BTreeSet<SandboxId>,
    /// What was saved to make copies of.
    pub(crate) forks: BTreeSet<ForkId>,
    /// Copies that were handed out too early.
    let_in: BTreeSet<SandboxId>,
    /// Started since the record's last rest.
    started: BTreeSet<SandboxId>,
}

impl Node {
    pub(crate) fn new(number: usize) -> Self {
        Self {
            name: format!("node-{number}"),
            life: 0,
            agent: None,
            watcher: Watcher::new(),
            session: None,
            records: BTreeMap::new(),
            vms: BTreeMap::new(),
            halted: BTreeSet::new(),
            unaware: BTreeSet::new(),
            forks: BTreeSet::new(),
            let_in: BTreeSet::new(),
            started: BTreeSet::new(),
        }
    }

    /// Starts the agent; the first input is what the earlier one left.
    pub(crate) fn start(&mut self) -> Input {
        self.agent = Some(NodeAgent::new(CAPACITY));
        self.watcher = Watcher::new();
        let found = self.records.iter().map(|(id, record)| Found::Known {
            record: Box::new(record.clone()),
            vm: if self.vms.contains_key(id) {
                FoundVm::Alive
            } else if record.rest.is_none() && self.started.contains(id) {
                FoundVm::Ended { reason: "the VM ended while the node agent was away".to_owned() }
            } else {
                FoundVm::None
            },
        });
        Input::Recovered(found.collect())
    }

    /// The agent dies; with `host` the machine does, and the VMs with it.
    pub(crate) fn crash(&mut self, host: bool) {
        self.agent = None;
        self.session = None;
        self.life += 1;
        if host {
            self.vms.clear();
            self.halted.clear();
            self.unaware.clear();
        }
    }

    pub(crate) fn step(&mut self, now: u64, input: Input) -> Result<Vec<Effect>, String> {
        if self.agent.is_some() {
            self.told(&input);
        }
        let Some(agent) = &mut self.agent else { return Ok(Vec::new()) };
        let effects = agent.step(Duration::from_millis(now), input.clone());
        let named = |error: String| format!("{}: {error}", self.name);
        self.watcher.observe(&input, &effects).map_err(named)?;
        towline_node_core::check(agent).map_err(named)?;
        Ok(effects)
    }

    pub(crate) fn register(&self) -> v1::RegisterNode {
        v1::RegisterNode {
            name: self.name.clone(),
            boot_id: "boot".to_owned(),
            capacity: Some(CAPACITY),
            link_endpoint: "127.0.0.1:1".to_owned(),
            drivers: vec![v1::Driver {
                name: "model".to_owned(),
                isolation: v1::Isolation::Vm.into(),
                fork: true,
                ..Default::default()
            }],
            embedded: true,
            version: String::new(),
            machine_cpus: 2,
        }
    }

    /// Does what the agent's effect says, at once where a crash could come between; gives the
    /// answer that comes later.
    pub(crate) fn perform(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Persist { version, record } => {
                let sandbox = record.assignment.sandbox;
                if record.rest.is_some() {
                    self.started.remove(&sandbox);
                }
                self.records.insert(sandbox, *record);
                Some(Input::Persisted { sandbox, version })
            }
            Effect::Prepare { run, assignment } => {
                let sandbox = assignment.sandbox;
                if let Some(fork) = assignment.copies()
                    && !self.forks.contains(&fork.id)
                {
                    if !self.vms.contains_key(&fork.source) || self.halted.contains(&fork.source) {
                        let reason = "what it is a copy of does not run".to_owned();
                        let failure = Failure { reason, transient: false };
                        return Some(Input::PrepareFailed { sandbox, run, failure });
                    }
                    self.forks.insert(fork.id);
                }
                Some(Input::Prepared { sandbox, run, image_digest: String::new() })
            }
            Effect::StartVm { run, assignment } => {
                let sandbox = assignment.sandbox;
                if let Some(fork) = assignment.copies() {
                    if !self.forks.contains(&fork.id) {
                        let reason = "what it is a copy of is gone".to_owned();
                        let failure = Failure { reason, transient: false };
                        return Some(Input::VmFailed { sandbox, run, failure });
                    }
                    self.unaware.insert(sandbox);
                }
                let shape = assignment.spec.shape.unwrap_or_default();
                self.vms.insert(sandbox, shape.memory_mib);
                self.started.insert(sandbox);
                Some(started(sandbox, run, "cold"))
            }
            Effect::AdoptVm { run, assignment } if assignment.desired == Desired::Paused => {
                self.halted.insert(assignment.sandbox);
                Some(Input::VmPaused { sandbox: assignment.sandbox, run })
            }
            Effect::AdoptVm { run, assignment } => Some(started(assignment.sandbox, run, "")),
            Effect::PauseVm { sandbox, run } => {
                self.halted.insert(sandbox);
                Some(Input::VmPaused { sandbox, run })
            }
            Effect::ResumeVm { run, assignment } => {
                self.halted.remove(&assignment.sandbox);
                Some(Input::VmResumed { sandbox: assignment.sandbox, run })
            }
            Effect::KeepForks { forks } => {
                self.forks.retain(|fork| forks.contains(fork));
                None
            }
            Effect::Gate { sandbox, gate: Gate::Open { .. } } => {
                self.let_in.extend(self.unaware.get(&sandbox));
                None
            }
            Effect::Probe { sandbox, run } => Some(Input::ProbeAnswered { sandbox, run }),
            Effect::StopVm { sandbox, run, .. } | Effect::KillVm { sandbox, run } => {
                self.end(sandbox);
                Some(Input::VmExited { sandbox, run, reason: "it was stopped".to_owned() })
            }
            Effect::Destroy { sandbox } => {
                self.end(sandbox);
                self.records.remove(&sandbox);
                self.started.remove(&sandbox);
                Some(Input::Destroyed { sandbox, freed_bytes: 1 })
            }
            Effect::Gate { .. } | Effect::Report { .. } => None,
        }
    }

    /// The VM of a sandbox ends.
    fn end(&mut self, sandbox: SandboxId) {
        self.vms.remove(&sandbox);
        self.halted.remove(&sandbox);
        self.unaware.remove(&sandbox);
    }

    /// What the node's machine does before it tells: a copy is told who it is.
    fn told(&mut self, input: &Input) {
        // One that is taken up is told nothing.
        if let Input::VmStarted { sandbox, start, .. } = input
            && !start.is_empty()
        {
            self.unaware.remove(sandbox);
        }
    }

    /// All VMs' memory fits the machine, and no copy was handed out that does not know that it is.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(sandbox) = self.let_in.first() {
            return Err(format!("{sandbox} was handed out before it was told who it is"));
        }
        let used: u64 = self.vms.values().sum();
        if used > CAPACITY.memory_mib {
            return Err(format!(
                "{} runs VMs of {used} MiB and has {}",
                self.name, CAPACITY.memory_mib
            ));
        }
        Ok(())
    }

    /// What is here, for the end of a run.
    pub(crate) fn has(&self) -> BTreeSet<SandboxId> {
        self.records.keys().copied().collect()
    }
}

fn started(sandbox: SandboxId, run: Run, start: &str) -> Input {
    Input::VmStarted {
        sandbox,
        run,
        driver: "model".to_owned(),
        isolation: "vm (model)".to_owned(),
        start: start.to_owned(),
    }
}
