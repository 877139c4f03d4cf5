//! The table of sandboxes, and the commands that create, steer and observe them.
//!
//! A sandbox reserves its disk from creation until its record goes, and its CPU and memory
//! (`computing`) from creation or a start until its node says that it does not run. Left out:
//! which node (`placement`). The invariant: `Node.reserved` is the sum over its sandboxes.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::{self, Desired, Phase, SandboxRecord};

use super::expiry::expiry;
use super::{Changes, Done, State};
use crate::names;
use crate::refusal::{Refusal, RefusalKind};
use crate::resources::{Resources, Short, amount};

/// Longest text that a node may say about a sandbox.
const REASON_MAX: usize = 1024;
/// Most names that are tried for a sandbox without one.
const NAME_ATTEMPTS_MAX: u32 = 10_000;

/// Sandboxes with their indexes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sandboxes {
    pub(super) by_id: BTreeMap<SandboxId, SandboxRecord>,
    /// (project, name) of those that are not being deleted.
    by_name: BTreeMap<(String, String), SandboxId>,
    by_node: BTreeMap<NodeId, BTreeSet<SandboxId>>,
    /// (`expires_ms`, id) of those that have one.
    pub(super) by_expiry: BTreeSet<(u64, SandboxId)>,
}

impl Sandboxes {
    /// One by id.
    pub fn get(&self, id: SandboxId) -> Option<&SandboxRecord> {
        self.by_id.get(&id)
    }

    /// A live one by name.
    pub fn by_name(&self, project: &str, name: &str) -> Option<(SandboxId, &SandboxRecord)> {
        let id = *self.by_name.get(&(project.to_owned(), name.to_owned()))?;
        Some((id, self.by_id.get(&id)?))
    }

    /// All, in order of id, from after `from`.
    pub fn after(
        &self,
        from: Option<SandboxId>,
    ) -> impl Iterator<Item = (SandboxId, &SandboxRecord)> {
        let start = from.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.by_id.range((start, std::ops::Bound::Unbounded)).map(|(id, record)| (*id, record))
    }

    /// Those placed on a node.
    pub fn on_node(&self, node: NodeId) -> impl Iterator<Item = SandboxId> + '_ {
        self.by_node.get(&node).into_iter().flatten().copied()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Takes a record in, with its indexes. Used by creation and by reading a snapshot.
    pub(crate) fn insert(&mut self, record: SandboxRecord) -> Result<SandboxId, Refusal> {
        let sandbox = record.sandbox.as_ref().ok_or_else(|| Refusal::invalid("no sandbox"))?;
        let id = sandbox_id(&sandbox.id)?;
        let node = node_id(&sandbox.node_id)?;
        if self.by_id.contains_key(&id) {
            return Err(Refusal::new(RefusalKind::AlreadyExists, format!("{id} exists already")));
        }
        if sandbox.desired() != Desired::Deleted {
            self.by_name.insert(name_key(sandbox), id);
        }
        self.by_node.entry(node).or_default().insert(id);
        if sandbox.expires_ms != 0 {
            self.by_expiry.insert((sandbox.expires_ms, id));
        }
        self.by_id.insert(id, record);
        Ok(id)
    }

    fn remove(&mut self, id: SandboxId) -> Option<SandboxRecord> {
        let record = self.by_id.remove(&id)?;
        if let Some(sandbox) = &record.sandbox {
            self.free_name(id, sandbox);
            self.by_expiry.remove(&(sandbox.expires_ms, id));
            if let Ok(node) = node_id(&sandbox.node_id)
                && let Some(there) = self.by_node.get_mut(&node)
            {
                there.remove(&id);
                if there.is_empty() {
                    self.by_node.remove(&node);
                }
            }
        }
        Some(record)
    }

    /// The sandbox that is meant, if it is this owner's; to another it is as if it were not there. An
    /// empty owner may mean any.
    pub(super) fn owned(
        &self,
        id: &[u8],
        owner: &str,
    ) -> Result<(SandboxId, &SandboxRecord), Refusal> {
        let id = sandbox_id(id)?;
        let is_owners = |record: &&SandboxRecord| {
            let owned_by = record.sandbox.as_ref().map_or("", |sandbox| sandbox.owner.as_str());
            owner.is_empty() || owned_by == owner
        };
        let record = self.get(id).filter(is_owners).ok_or_else(|| no_sandbox(id))?;
        Ok((id, record))
    }

    fn free_name(&mut self, id: SandboxId, sandbox: &v1::Sandbox) {
        let key = name_key(sandbox);
        if self.by_name.get(&key) == Some(&id) {
            self.by_name.remove(&key);
        }
    }

    fn free_name_from_id(&self, project: &str, id: SandboxId) -> Option<String> {
        (0..NAME_ATTEMPTS_MAX)
            .map(|attempt| names::from_id(id, attempt))
            .find(|name| !self.by_name.contains_key(&(project.to_owned(), name.clone())))
    }
}

/// What a new sandbox is made of.
#[derive(Debug)]
pub(super) struct New {
    pub(super) id: SandboxId,
    pub(super) project: String,
    pub(super) owner: String,
    pub(super) spec: v1::SandboxSpec,
    pub(super) node_id: Vec<u8>,
    pub(super) forked_from: Option<v1::ForkOrigin>,
}

impl State {
    pub(super) fn create_sandbox(
        &mut self,
        create: &v1::CreateSandboxCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let id = sandbox_id(&create.id)?;
        if create.node_id.is_empty() {
            return Err(Refusal::new(RefusalKind::Raced, "the request that this repeats failed"));
        }
        let node = node_id(&create.node_id)?;
        let mut spec = create.spec.clone().ok_or_else(|| Refusal::invalid("no spec"))?;
        let shape = spec.shape.ok_or_else(|| Refusal::invalid("no shape"))?;
        let image_digest = self.images.digest_of(spec.image.as_ref())?;
        if self.sandboxes.by_id.contains_key(&id) {
            return Err(Refusal::new(RefusalKind::AlreadyExists, format!("{id} exists already")));
        }
        spec.name = self.take_name(&create.project, &spec.name, id)?;
        let want = Resources::of_shape(&shape);
        self.nodes.reserve_on_ready(node, want).map_err(|_| {
            Refusal::new(RefusalKind::Raced, format!("{node} has no room any more; try again"))
        })?;
        let sandbox = self.new_sandbox(New {
            id,
            project: create.project.clone(),
            owner: create.owner.clone(),
            spec,
            node_id: create.node_id.clone(),
            forked_from: None,
        });
        let record =
            SandboxRecord { sandbox: Some(sandbox.clone()), image_digest, computing: true };
        self.sandboxes.insert(record)?;
        changes.sandboxes.insert(id);
        changes.desired.insert(id);
        Ok(Done::Sandbox(Box::new(sandbox)))
    }

    /// A sandbox that was just placed; the caller has reserved what it needs.
    pub(super) fn new_sandbox(&mut self, new: New) -> v1::Sandbox {
        self.revision += 1;
        let observed = v1::Observed {
            sandbox_id: new.id.to_vec(),
            epoch: 1,
            generation: 1,
            phase: Phase::Placed.into(),
            ..Default::default()
        };
        let mut sandbox = v1::Sandbox {
            id: new.id.to_vec(),
            project: new.project,
            owner: new.owner,
            spec: Some(new.spec),
            desired: Desired::Running.into(),
            generation: 1,
            epoch: 1,
            node_id: new.node_id,
            expires_ms: 0,
            desired_reason: String::new(),
            observed: Some(observed),
            revision: self.revision,
            created_ms: self.now_ms,
            since_ms: self.now_ms,
            forked_from: new.forked_from,
        };
        sandbox.expires_ms = expiry(&sandbox, self.now_ms);
        sandbox
    }

    fn take_name(&self, project: &str, wanted: &str, id: SandboxId) -> Result<String, Refusal> {
        if wanted.is_empty() {
            return self
                .sandboxes
                .free_name_from_id(project, id)
                .ok_or_else(|| Refusal::invalid("no made-up name is free; give one with --name"));
        }
        match self.sandboxes.by_name(project, wanted) {
            None => Ok(wanted.to_owned()),
            Some((taken, _)) => Err(Refusal::new(
                RefusalKind::AlreadyExists,
                format!("the name `{wanted}` is taken by {taken}: remove it or choose another"),
            )),
        }
    }

    pub(super) fn set_desired(
        &mut self,
        set: &v1::SetDesiredCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let (id, record) = self.sandboxes.owned(&set.id, &set.owner)?;
        let sandbox = record.sandbox.clone().unwrap_or_default();
        if set.expect_generation != 0 && set.expect_generation != sandbox.generation {
            return Err(Refusal::precondition(format!(
                "{id} is at generation {}, not {}: look at it again",
                sandbox.generation, set.expect_generation
            )));
        }
        let desired = set.desired();
        if desired != Desired::Deleted {
            stays(id, &sandbox)?;
        }
        let again = desired == Desired::Running && has_ended(&sandbox);
        if sandbox.desired() == desired && !again {
            return Ok(Done::Sandbox(Box::new(self.view(record))));
        }
        if desired == Desired::Paused
            && (sandbox.desired() != Desired::Running || has_ended(&sandbox))
        {
            let name = sandbox.spec.as_ref().map_or("", |spec| spec.name.as_str());
            return Err(Refusal::precondition(format!(
                "`{name}` does not run, so it cannot be paused: `tow start {name}` first"
            )));
        }
        self.reserve_again(record.computing, &sandbox, desired)?;
        Ok(Done::Sandbox(Box::new(self.steer(id, desired, "", changes))))
    }

    /// Reserves CPU and memory anew for a sandbox that is started after it gave them back.
    fn reserve_again(
        &mut self,
        computing: bool,
        sandbox: &v1::Sandbox,
        desired: Desired,
    ) -> Result<(), Refusal> {
        if desired != Desired::Running || computing {
            return Ok(());
        }
        let node = node_id(&sandbox.node_id)?;
        let want = shape_of(sandbox).compute();
        self.nodes.reserve(node, want).map_err(|short| {
            let (free, name) = self.nodes.free_and_name(node);
            let (what, wanted, left) = match short {
                Some(Short::Memory) => ("memory", amount(want.memory_mib), amount(free.memory_mib)),
                Some(Short::Cpus) => ("CPUs", want.cpus.to_string(), free.cpus.to_string()),
                _ => ("room", "some".into(), "none".into()),
            };
            Refusal::new(
                RefusalKind::Exhausted,
                format!(
                    "cannot start: it needs {wanted} of {what} and node `{name}`, which has its \
                     disk, has {left} free: stop another sandbox there first"
                ),
            )
        })
    }

    /// Wants something else of a sandbox; `reason` says why if nobody asked.
    pub(super) fn steer(
        &mut self,
        id: SandboxId,
        desired: Desired,
        reason: &str,
        changes: &mut Changes,
    ) -> v1::Sandbox {
        self.revision += 1;
        let (now_ms, revision) = (self.now_ms, self.revision);
        let Some(record) = self.sandboxes.by_id.get_mut(&id) else {
            return v1::Sandbox::default();
        };
        let sandbox = record.sandbox.get_or_insert_default();
        // Paused or resumed: it stays what it is, and its timeout goes on.
        let stays_up = sandbox.desired().is_up() && desired.is_up() && !has_ended(sandbox);
        sandbox.set_desired(desired);
        reason.clone_into(&mut sandbox.desired_reason);
        sandbox.generation += 1;
        sandbox.revision = revision;
        if desired == Desired::Running && !stays_up {
            record.computing = true;
            let generation = sandbox.generation;
            let observed = sandbox.observed.get_or_insert_default();
            observed.set_phase(Phase::Placed);
            observed.generation = generation;
            observed.reason.clear();
            observed.main_exit = None;
            sandbox.since_ms = now_ms;
        }
        if !stays_up {
            self.sandboxes.count_anew(id, now_ms);
        }
        let sandbox = self.sandboxes.get(id).and_then(|record| record.sandbox.clone());
        let sandbox = sandbox.unwrap_or_default();
        if desired == Desired::Deleted {
            self.sandboxes.free_name(id, &sandbox);
        }
        changes.sandboxes.insert(id);
        changes.desired.insert(id);
        sandbox
    }

    pub(super) fn report_observed(
        &mut self,
        report: &v1::ReportObservedCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let node = node_id(&report.node_id)?;
        let known = self.nodes.get(node).and_then(|record| record.node.as_ref());
        let epoch = known.map(|node| node.epoch);
        if epoch != Some(report.node_epoch) {
            return Err(Refusal::precondition(format!(
                "{node} registered again since: this session is over"
            )));
        }
        for observed in &report.observed {
            self.observe(node, observed, changes);
        }
        Ok(Done::Nothing)
    }

    /// Takes in what a node says of one sandbox; what is stale or not its business is ignored.
    fn observe(&mut self, node: NodeId, observed: &v1::Observed, changes: &mut Changes) {
        let Ok(id) = sandbox_id(&observed.sandbox_id) else { return };
        let Some(record) = self.sandboxes.by_id.get_mut(&id) else { return };
        let Some(sandbox) = record.sandbox.as_mut() else { return };
        let seen = sandbox.observed.as_ref().map_or(0, |o| o.generation);
        let stale = observed.epoch != sandbox.epoch || observed.generation < seen;
        if sandbox.node_id != node.as_bytes()
            || stale
            || observed.generation > sandbox.generation
            || !may_report(observed.phase())
            || (runs(observed.phase()) && !record.computing)
        {
            return;
        }
        let deleted = sandbox.desired() == Desired::Deleted;
        if observed.phase() == Phase::Gone && deleted {
            self.forget(id, observed, changes);
            return;
        }
        let mut observed = observed.clone();
        if observed.phase() == Phase::Gone {
            observed.set_phase(Phase::Lost);
            "the node destroyed it without being asked to".clone_into(&mut observed.reason);
        }
        shorten(&mut observed.reason);
        // A node agent that was restarted does not know what an earlier one started it with.
        if let Some(before) = sandbox.observed.as_ref().filter(|_| observed.driver.is_empty()) {
            observed.driver.clone_from(&before.driver);
            observed.isolation.clone_from(&before.isolation);
        }
        if sandbox.observed.as_ref() == Some(&observed) {
            return;
        }
        self.revision += 1;
        sandbox.revision = self.revision;
        if sandbox.observed.as_ref().map(v1::Observed::phase) != Some(observed.phase()) {
            sandbox.since_ms = self.now_ms;
        }
        let ended = observed.generation == sandbox.generation && is_end(observed.phase());
        sandbox.observed = Some(observed);
        if ended && record.computing {
            record.computing = false;
            let freed = shape_of(sandbox).compute();
            self.nodes.release(node, freed);
        }
        if ended {
            self.sandboxes.count_anew(id, self.now_ms);
        }
        changes.sandboxes.insert(id);
    }

    /// Drops the record of a sandbox that its node has destroyed.
    fn forget(&mut self, id: SandboxId, observed: &v1::Observed, changes: &mut Changes) {
        let Some(record) = self.sandboxes.remove(id) else { return };
        self.revision += 1;
        let held = held_by(&record);
        let mut sandbox = record.sandbox.unwrap_or_default();
        if let Ok(node) = node_id(&sandbox.node_id) {
            self.nodes.release(node, held);
        }
        sandbox.revision = self.revision;
        sandbox.since_ms = self.now_ms;
        sandbox.observed = Some(observed.clone());
        changes.sandboxes.insert(id);
        changes.removed.push(sandbox);
    }
}

/// What a record holds of its node.
pub(crate) fn held_by(record: &SandboxRecord) -> Resources {
    let shape = record.sandbox.as_ref().map(shape_of).unwrap_or_default();
    if record.computing { shape } else { shape.storage() }
}

/// Whether the node's silence makes the phase unknown: it runs, or should soon.
pub(super) fn is_moving(sandbox: &v1::Sandbox) -> bool {
    let phase = sandbox.observed.as_ref().map(v1::Observed::phase);
    phase.is_none_or(|phase| !is_end(phase))
}

/// `running`, `stopped`: a phase for people.
pub fn phase_name(phase: Phase) -> String {
    phase.as_str_name().trim_start_matches("PHASE_").to_lowercase()
}

pub(crate) fn has_ended(sandbox: &v1::Sandbox) -> bool {
    sandbox
        .observed
        .as_ref()
        .is_some_and(|o| o.generation == sandbox.generation && is_end(o.phase()))
}

fn is_end(phase: Phase) -> bool {
    matches!(phase, Phase::Stopped | Phase::Failed | Phase::Lost)
}

/// Whether the phase takes CPU and memory. Once given back, only a start takes them again.
pub(crate) fn runs(phase: Phase) -> bool {
    matches!(phase, Phase::Preparing | Phase::Booting | Phase::Running | Phase::Paused)
}

fn may_report(phase: Phase) -> bool {
    !matches!(phase, Phase::Unspecified | Phase::Placed | Phase::Unknown)
}

pub(super) fn shape_of(sandbox: &v1::Sandbox) -> Resources {
    let shape = sandbox.spec.as_ref().and_then(|spec| spec.shape.as_ref());
    shape.map(Resources::of_shape).unwrap_or_default()
}

fn name_key(sandbox: &v1::Sandbox) -> (String, String) {
    let name = sandbox.spec.as_ref().map_or("", |spec| spec.name.as_str());
    (sandbox.project.clone(), name.to_owned())
}

fn shorten(reason: &mut String) {
    if reason.len() > REASON_MAX {
        let end = (0..=REASON_MAX).rev().find(|&at| reason.is_char_boundary(at)).unwrap_or(0);
        reason.truncate(end);
    }
}

/// Refuses what is meant for a sandbox that stays.
pub(super) fn stays(id: SandboxId, sandbox: &v1::Sandbox) -> Result<(), Refusal> {
    match sandbox.desired() == Desired::Deleted {
        true => Err(Refusal::precondition(format!("{id} is being deleted"))),
        false => Ok(()),
    }
}

pub(crate) fn no_sandbox(id: SandboxId) -> Refusal {
    Refusal::not_found(format!("no sandbox {id}"))
}

pub(crate) fn sandbox_id(bytes: &[u8]) -> Result<SandboxId, Refusal> {
    SandboxId::try_from(bytes).map_err(|error| Refusal::invalid(format!("sandbox id: {error}")))
}

pub(crate) fn node_id(bytes: &[u8]) -> Result<NodeId, Refusal> {
    NodeId::try_from(bytes).map_err(|error| Refusal::invalid(format!("node id: {error}")))
}
