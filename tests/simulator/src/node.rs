//! One node: the node agent's core, and the records and VMs that outlive it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use towline_node_core::{Effect, Found, FoundVm, Input, NodeAgent, Record, Run, Watcher};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, Capacity};

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
        }
    }

    pub(crate) fn step(&mut self, now: u64, input: Input) -> Result<Vec<Effect>, String> {
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
            Effect::Prepare { run, assignment } => Some(Input::Prepared {
                sandbox: assignment.sandbox,
                run,
                image_digest: String::new(),
            }),
            Effect::StartVm { run, assignment } => {
                let shape = assignment.spec.shape.unwrap_or_default();
                self.vms.insert(assignment.sandbox, shape.memory_mib);
                self.started.insert(assignment.sandbox);
                Some(started(assignment.sandbox, run))
            }
            Effect::AdoptVm { run, assignment } => Some(started(assignment.sandbox, run)),
            Effect::Probe { sandbox, run } => Some(Input::ProbeAnswered { sandbox, run }),
            Effect::StopVm { sandbox, run, .. } | Effect::KillVm { sandbox, run } => {
                self.vms.remove(&sandbox);
                Some(Input::VmExited { sandbox, run, reason: "it was stopped".to_owned() })
            }
            Effect::Destroy { sandbox } => {
                self.vms.remove(&sandbox);
                self.records.remove(&sandbox);
                self.started.remove(&sandbox);
                Some(Input::Destroyed { sandbox, freed_bytes: 1 })
            }
            Effect::Gate { .. } | Effect::Report { .. } => None,
        }
    }

    /// All VMs' memory fits the machine.
    pub(crate) fn check(&self) -> Result<(), String> {
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

fn started(sandbox: SandboxId, run: Run) -> Input {
    Input::VmStarted {
        sandbox,
        run,
        driver: "model".to_owned(),
        isolation: "vm (model)".to_owned(),
        start: "cold".to_owned(),
    }
}
