//! The one task that owns the core: inputs in, effects out.
//!
//! Records are written by one writer, in order; the core waits for it before it acts. The work for
//! a sandbox is one task at a time, given up before its VM is killed or its folder removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use towline_node_core::{Effect, Found, Input, NodeAgent, Record, Watcher};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{NodeRegistered, Observed, ObservedBatch, Phase};

use crate::capacity::boottime;
use crate::gates::Gates;
use crate::machine::Machine;
use crate::store::Store;
use crate::tunnel::Tunnel;
use crate::uplink::Outgoing;

/// Inputs that wait: each comes from a task that waits too when there is no room.
pub const INPUTS_MAX: usize = 1024;
/// Records that wait to be written. The core coalesces nothing here, so this bounds memory only.
const RECORDS_MAX: usize = 1024;

/// The driver.
#[derive(Debug)]
pub struct Driver {
    core: NodeAgent,
    watcher: Watcher,
    machine: Arc<Machine>,
    gates: Arc<Gates>,
    tunnel: Arc<Tunnel>,
    reports: mpsc::Sender<Outgoing>,
    records: mpsc::Sender<Job>,
    registered: watch::Receiver<Option<NodeRegistered>>,
    work: BTreeMap<SandboxId, Task>,
    _writer: Task,
}

/// A task that ends with its holder.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the driver is made of.
#[derive(Debug)]
pub struct Parts {
    /// A new core.
    pub core: NodeAgent,
    /// Does what it decides.
    pub machine: Arc<Machine>,
    /// Streams' gates.
    pub gates: Arc<Gates>,
    /// Where ticket keys go.
    pub tunnel: Arc<Tunnel>,
    /// Reports for the uplink.
    pub reports: mpsc::Sender<Outgoing>,
    /// What the control plane said at registration.
    pub registered: watch::Receiver<Option<NodeRegistered>>,
}

impl Driver {
    /// Makes the driver and starts its writer of records.
    pub fn new(parts: Parts) -> Self {
        let Parts { core, machine, gates, tunnel, reports, registered } = parts;
        let (records, waiting) = mpsc::channel(RECORDS_MAX);
        let writer = write_records(Arc::clone(&machine.store), waiting, machine.inputs.clone());
        let _writer = Task(tokio::spawn(writer));
        let watcher = Watcher::new();
        let work = BTreeMap::new();
        Self { core, watcher, machine, gates, tunnel, reports, records, registered, work, _writer }
    }

    /// Takes up what an earlier node agent left, then runs until `stop` is ready. VMs live on.
    pub async fn run(
        mut self,
        mut inputs: mpsc::Receiver<Input>,
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<()> {
        if let Some(registered) = self.machine.store.registered() {
            self.tunnel.registered(&registered);
        }
        let found = self.find().await?;
        self.step(Input::Recovered(found)).await;
        tokio::pin!(stop);
        loop {
            let now = boottime();
            let wait = self.core.next_deadline().map(|deadline| deadline.saturating_sub(now));
            let input = tokio::select! {
                biased;
                () = &mut stop => return Ok(()),
                input = inputs.recv() => input.expect("the machine holds a sender"),
                () = tokio::time::sleep(wait.unwrap_or(Duration::MAX)), if wait.is_some() => Input::Tick,
            };
            self.step(input).await;
        }
    }

    /// Looks at every sandbox's folder.
    async fn find(&self) -> anyhow::Result<Vec<Found>> {
        let machine = Arc::clone(&self.machine);
        let sandboxes = machine.store.sandboxes()?;
        let mut found = Vec::new();
        for sandbox in sandboxes {
            let one = match machine.store.sandbox(sandbox).record() {
                Some(record) if record.assignment.sandbox == sandbox => {
                    let vm = machine.found_vm(&record);
                    tracing::info!(%sandbox, ?vm, "sandbox found");
                    Found::Known { record: Box::new(record), vm }
                }
                _ => {
                    tracing::warn!(%sandbox, "sandbox found without a record");
                    machine.end_leftover(sandbox).await;
                    Found::Leftover(sandbox)
                }
            };
            found.push(one);
        }
        Ok(found)
    }

    async fn step(&mut self, input: Input) {
        tracing::trace!(?input);
        if let Input::Registered { node, .. } = &input {
            self.on_registered(&node.to_string());
        }
        let effects = self.core.step(boottime(), input.clone());
        let checked = self.watcher.observe(&input, &effects);
        if let Err(broken) = checked.and_then(|()| towline_node_core::check(&self.core)) {
            tracing::error!(broken, "an invariant of the node agent does not hold");
        }
        let (offered, promised) = (self.core.capacity(), self.core.promised());
        self.machine.ready.free(offered.memory_mib.saturating_sub(promised.memory_mib));
        for effect in effects {
            tracing::trace!(?effect);
            self.effect(effect).await;
        }
        if let Input::Destroyed { sandbox, .. } = input {
            self.machine.feeds.forget(sandbox);
            self.gates.forget(sandbox);
            self.work.remove(&sandbox);
        }
    }

    fn on_registered(&mut self, node: &str) {
        let registered = self.registered.borrow_and_update().clone();
        let Some(registered) = registered else { return };
        self.tunnel.registered(&registered);
        let store = Arc::clone(&self.machine.store);
        tracing::info!(node, epoch = registered.epoch, "node registered");
        tokio::task::spawn_blocking(move || {
            // Without it tickets wait for the first registration after a restart; no more is lost.
            if let Err(error) = store.set_registered(&registered) {
                tracing::warn!(reason = crate::chain(&error), "registration not kept");
            }
        });
    }

    async fn effect(&mut self, effect: Effect) {
        let machine = Arc::clone(&self.machine);
        match effect {
            Effect::Persist { version, record } => {
                // The writer lives as long as the driver, and never waits for it.
                let _ = self.records.send(Job::Write(version, record)).await;
            }
            Effect::Prepare { run, assignment } => {
                self.begin(assignment.sandbox, machine.prepare(run, *assignment));
            }
            Effect::StartVm { run, assignment } => {
                self.begin(assignment.sandbox, machine.start(run, *assignment));
            }
            Effect::AdoptVm { run, assignment } => {
                self.begin(assignment.sandbox, machine.adopt(run, *assignment));
            }
            Effect::PauseVm { sandbox, run } => self.begin(sandbox, machine.pause(sandbox, run)),
            Effect::ResumeVm { run, assignment } => {
                self.begin(assignment.sandbox, machine.resume(run, *assignment));
            }
            Effect::KeepForks { forks } => machine.keep_forks(forks),
            Effect::Probe { sandbox, run } => self.begin(sandbox, machine.probe(sandbox, run)),
            Effect::StopVm { sandbox, grace, .. } => machine.stop(sandbox, grace),
            Effect::KillVm { sandbox, run } => {
                self.after_giving_up(sandbox, machine.kill(sandbox, run));
            }
            Effect::Destroy { sandbox } => {
                // No record may be written once the folder is gone.
                let (written, all) = oneshot::channel();
                let _ = self.records.send(Job::Barrier(written)).await;
                self.after_giving_up(sandbox, async move {
                    let _ = all.await;
                    machine.destroy(sandbox).await;
                });
            }
            Effect::Gate { sandbox, gate } => self.gates.set(sandbox, gate),
            Effect::Report { session, sequence, observed } => {
                for fact in &observed {
                    self.note(fact);
                }
                let batch = ObservedBatch { sequence, observed };
                // One is under way per session, so there is room unless the uplink is gone; then
                // the next session is told everything.
                if self.reports.try_send(Outgoing { session, batch }).is_err() {
                    tracing::warn!(session, sequence, "report dropped, there is no uplink");
                }
            }
        }
    }

    /// Tells what was reported to whoever reads the log, and the sandbox's owner by its feed.
    fn note(&self, fact: &Observed) {
        let sandbox = SandboxId::try_from(&fact.sandbox_id[..]).ok();
        let (phase, reason) = (fact.phase(), &fact.reason);
        tracing::info!(?sandbox, phase = phase.as_str_name(), reason, "reported");
        let word = match phase {
            Phase::Running => "running",
            Phase::Paused => "paused",
            Phase::Stopped => "stopped",
            Phase::Failed => "failed",
            // On the way; or there is no feed any more.
            _ => return,
        };
        if let Some(feed) = sandbox.and_then(|sandbox| self.machine.feeds.existing(sandbox)) {
            let colon = if reason.is_empty() { "" } else { ": " };
            feed.note(&format!("{word}{colon}{reason}"));
        }
    }

    fn begin(&mut self, sandbox: SandboxId, work: impl Future<Output = ()> + Send + 'static) {
        // What was there has told its end, or its run is over.
        self.work.insert(sandbox, Task(tokio::spawn(work)));
    }

    /// Gives up what is being done for a sandbox, waits until it is given up, then does this.
    fn after_giving_up(
        &mut self,
        sandbox: SandboxId,
        then: impl Future<Output = ()> + Send + 'static,
    ) {
        let old = self.work.remove(&sandbox);
        let work = tokio::spawn(async move {
            if let Some(mut old) = old {
                old.0.abort();
                let _ = (&mut old.0).await;
            }
            then.await;
        });
        self.work.insert(sandbox, Task(work));
    }
}

/// What the writer of records does.
#[derive(Debug)]
enum Job {
    Write(u64, Box<Record>),
    /// All before it are done.
    Barrier(oneshot::Sender<()>),
}

/// Writes records one after another.
async fn write_records(
    store: Arc<Store>,
    mut records: mpsc::Receiver<Job>,
    inputs: mpsc::Sender<Input>,
) {
    while let Some(job) = records.recv().await {
        let (version, record) = match job {
            Job::Write(version, record) => (version, record),
            Job::Barrier(written) => {
                let _ = written.send(());
                continue;
            }
        };
        let sandbox = record.assignment.sandbox;
        let dir = store.sandbox(sandbox);
        let written = tokio::task::spawn_blocking(move || dir.set_record(&record)).await;
        let reason = match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(crate::chain(&error)),
            Err(error) => Some(error.to_string()),
        };
        let input = match reason {
            None => Input::Persisted { sandbox, version },
            Some(reason) => {
                tracing::error!(%sandbox, reason, "record not written");
                Input::PersistFailed { sandbox, version, reason }
            }
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}
