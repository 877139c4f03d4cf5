//! All that can enter and leave the core: `Input` is what happened, `Effect` is what should happen.
//!
//! No IO type appears here, so the simulator and the real driver feed the same core. Times are
//! CLOCK_BOOTTIME as a `Duration`. The invariant: each VM start has a `run` number of its own, and
//! what is told about another run than the newest is ignored.

use std::collections::BTreeSet;
use std::time::Duration;

use towline_proto::ids::{ForkId, IdError, NodeId, SandboxId};
use towline_proto::v1::{
    Capacity, Desired, DesiredSandbox, ExitStatus, ForkOrigin, Observed, SandboxSpec,
};

/// One start of a sandbox's VM, numbered through the life of the core.
pub type Run = u64;

/// One session with the control plane, numbered by the driver; a later one has a higher number.
pub type Session = u64;

/// A checked desired record: what the control plane wants of one sandbox, in full.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// Which sandbox.
    pub sandbox: SandboxId,
    /// Fencing number of its placement.
    pub epoch: u64,
    /// Version of this record.
    pub generation: u64,
    /// What it should be.
    pub desired: Desired,
    /// Why, when nobody asked for it: "timeout 2h".
    pub reason: String,
    /// It has had a VM on this node, and so has a disk here.
    pub ran: bool,
    /// How it was asked for.
    pub spec: SandboxSpec,
    /// Manifest digest of its image; empty for a local image.
    pub image_digest: String,
    /// Revision of the control plane's state that this record is of.
    pub revision: u64,
    /// What it begins as a copy of.
    pub fork: Option<Fork>,
}

/// What a sandbox begins as a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// Whose memory and disk.
    pub source: SandboxId,
    /// At which moment: all copies of one fork are of the same.
    pub id: ForkId,
}

impl Assignment {
    /// What its next start makes a copy of; only its first start does.
    pub fn copies(&self) -> Option<Fork> {
        self.fork.filter(|_| !self.ran)
    }
}

/// Says why a desired record of the control plane makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssignmentError {
    /// The id is not one.
    #[error("a desired record names no sandbox")]
    Id(#[source] IdError),
    /// What it should be a copy of is no sandbox, or at no moment.
    #[error("the desired record of {sandbox} makes it a copy of something that is none")]
    Fork {
        /// Which sandbox.
        sandbox: SandboxId,
        /// Why.
        #[source]
        source: IdError,
    },
    /// Nothing known is wanted of it.
    #[error("the desired record of {sandbox} wants {desired}, which this node agent does not know")]
    Desired {
        /// Which sandbox.
        sandbox: SandboxId,
        /// The number that came.
        desired: i32,
    },
}

impl TryFrom<DesiredSandbox> for Assignment {
    type Error = AssignmentError;

    fn try_from(message: DesiredSandbox) -> Result<Self, AssignmentError> {
        let sandbox = SandboxId::try_from(&message.sandbox_id[..]).map_err(AssignmentError::Id)?;
        let desired = match Desired::try_from(message.desired) {
            Ok(Desired::Unspecified) | Err(_) => {
                return Err(AssignmentError::Desired { sandbox, desired: message.desired });
            }
            Ok(desired) => desired,
        };
        let fork = message.forked_from.as_ref().map(Fork::try_from).transpose();
        Ok(Self {
            fork: fork.map_err(|source| AssignmentError::Fork { sandbox, source })?,
            sandbox,
            epoch: message.epoch,
            generation: message.generation,
            desired,
            reason: message.reason,
            ran: message.ran,
            spec: message.spec.unwrap_or_default(),
            image_digest: message.image_digest,
            revision: message.revision,
        })
    }
}

impl From<&Assignment> for DesiredSandbox {
    fn from(assignment: &Assignment) -> Self {
        Self {
            sandbox_id: assignment.sandbox.to_vec(),
            epoch: assignment.epoch,
            generation: assignment.generation,
            desired: assignment.desired.into(),
            spec: Some(assignment.spec.clone()),
            image_digest: assignment.image_digest.clone(),
            revision: assignment.revision,
            reason: assignment.reason.clone(),
            ran: assignment.ran,
            forked_from: assignment.fork.map(|fork| ForkOrigin {
                sandbox_id: fork.source.to_vec(),
                fork_id: fork.id.to_vec(),
            }),
        }
    }
}

impl TryFrom<&ForkOrigin> for Fork {
    type Error = IdError;

    fn try_from(message: &ForkOrigin) -> Result<Self, IdError> {
        let source = SandboxId::try_from(&message.sandbox_id[..])?;
        Ok(Self { source, id: ForkId::try_from(&message.fork_id[..])? })
    }
}

/// What is kept on disk of one sandbox, whole, so that a restarted node agent knows it again.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The newest desired record.
    pub assignment: Assignment,
    /// It has been `Running` since it was last started.
    pub came_up: bool,
    /// How it rests, if it rests.
    pub rest: Option<Rest>,
    /// How the newest main command ended.
    pub main_exit: Option<ExitStatus>,
    /// Manifest digest of the image in use, once that is known.
    pub image_digest: String,
}

/// Why a sandbox without a VM has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rest {
    /// It ran and was stopped, or its VM ended; `reason` is for people.
    Stopped {
        /// Why.
        reason: String,
    },
    /// It could not be brought up.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a restarted node agent finds of one sandbox.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// Its record could be read.
    Known {
        /// The record, as last persisted.
        record: Box<Record>,
        /// Its VM.
        vm: FoundVm,
    },
    /// There is a folder, and no record that can be read. No VM of it lives.
    Leftover(SandboxId),
}

/// What a restarted node agent finds of a sandbox's VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundVm {
    /// None was ever started since the record's last rest.
    None,
    /// It lives and can be taken up again.
    Alive,
    /// One was started and lives no more: "the VM ended while …", "host restarted".
    Ended {
        /// Why, for people.
        reason: String,
    },
}

/// How an effect failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was wrong and what to do, for people.
    pub reason: String,
    /// Trying again may help.
    pub transient: bool,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The first input: what an earlier node agent left behind.
    Recovered(Vec<Found>),
    /// Time passed; wanted at [`crate::NodeAgent::next_deadline`].
    Tick,
    /// What may be promised changed (or is known now).
    CapacityChanged(Capacity),

    /// The control plane registered this node: a session begins.
    Registered {
        /// The session's number.
        session: Session,
        /// This node.
        node: NodeId,
    },
    /// A session was cut.
    Disconnected {
        /// The session's number.
        session: Session,
    },
    /// The control plane wants this.
    Desired {
        /// The session it came by.
        session: Session,
        /// The record.
        assignment: Box<Assignment>,
    },
    /// All that is wanted here has been told in this session.
    Bookmark {
        /// The session it came by.
        session: Session,
        /// Everything up to this revision was told.
        revision: u64,
    },
    /// The reports up to `sequence` are committed.
    Acknowledged {
        /// The session it came by.
        session: Session,
        /// Of the newest committed report.
        sequence: u64,
    },

    /// A record is on disk.
    Persisted {
        /// Whose.
        sandbox: SandboxId,
        /// That of the effect.
        version: u64,
    },
    /// A record could not be written.
    PersistFailed {
        /// Whose.
        sandbox: SandboxId,
        /// That of the effect.
        version: u64,
        /// Why.
        reason: String,
    },
    /// How far the preparation is, for people.
    PrepareProgress {
        /// Whose.
        sandbox: SandboxId,
        /// Of which run.
        run: Run,
        /// For people.
        text: String,
    },
    /// Image and disks are ready.
    Prepared {
        /// Whose.
        sandbox: SandboxId,
        /// Of which run.
        run: Run,
        /// Manifest digest of the image in use.
        image_digest: String,
    },
    /// They are not.
    PrepareFailed {
        /// Whose.
        sandbox: SandboxId,
        /// Of which run.
        run: Run,
        /// Why.
        failure: Failure,
    },
    /// The VM lives, and its guest agent is configured (or was before).
    VmStarted {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// `qemu`, ….
        driver: String,
        /// `vm (kvm)`, ….
        isolation: String,
        /// `warm` or `cold`; empty when nobody knows.
        start: String,
    },
    /// The VM could not be started or taken up. No process of this run lives.
    VmFailed {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Why.
        failure: Failure,
    },
    /// The VM is halted, and keeps all that it has.
    VmPaused {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// It could not be halted, and goes on.
    PauseFailed {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Why.
        reason: String,
    },
    /// A halted VM goes on, and its guest can be reached. (`VmFailed` where it could not.)
    VmResumed {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// The probe through the path that users use answered.
    ProbeAnswered {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// It did not, for good.
    ProbeFailed {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Why.
        reason: String,
    },
    /// A VM that runs no longer talks to the node agent, for good: it is useless.
    GuestLost {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Why.
        reason: String,
    },
    /// No process of this run lives any more.
    VmExited {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Why, for people.
        reason: String,
    },
    /// The guest says that a main command ended.
    MainExited {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// How.
        status: ExitStatus,
    },
    /// Something that people should know: the guest says it (out of memory), or who serves its
    /// local image (a file changed since the start).
    GuestNotice {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// For people.
        text: String,
    },
    /// Nothing of the sandbox is left on this node.
    Destroyed {
        /// Whose.
        sandbox: SandboxId,
        /// What that freed on the disk.
        freed_bytes: u64,
    },
    /// Something of it is.
    DestroyFailed {
        /// Whose.
        sandbox: SandboxId,
        /// What and why.
        reason: String,
    },
}

/// Who may open streams to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// Whoever holds a ticket of this epoch.
    Open {
        /// Of the placement.
        epoch: u64,
    },
    /// Nobody; the streams that are open stay (their commands are being ended).
    Closing {
        /// For people.
        reason: String,
    },
    /// Nobody, and the open streams end with this reason.
    Shut {
        /// For people.
        reason: String,
    },
}

/// What should happen. The driver begins them in order; those of different sandboxes may overlap.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write a record durably, then `Persisted` or `PersistFailed`. A later one replaces it.
    Persist {
        /// Returned by the answer.
        version: u64,
        /// What to write.
        record: Box<Record>,
    },
    /// Make image and disks ready, then `Prepared` or `PrepareFailed`.
    Prepare {
        /// Of which run.
        run: Run,
        /// For what.
        assignment: Box<Assignment>,
    },
    /// Start the VM and configure its guest, then `VmStarted` or `VmFailed`.
    StartVm {
        /// Which run.
        run: Run,
        /// For what.
        assignment: Box<Assignment>,
    },
    /// Take up the VM that an earlier node agent left, then `VmStarted` or `VmFailed`. One that should
    /// be paused is halted, and its guest left alone: `VmPaused`.
    AdoptVm {
        /// Its number from now on.
        run: Run,
        /// For what.
        assignment: Box<Assignment>,
    },
    /// Ping the guest by the way that users' streams go, then `ProbeAnswered` or `ProbeFailed`.
    Probe {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// Halt the VM, then `VmPaused` or `PauseFailed`.
    PauseVm {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// Let a halted VM go on, reach its guest if nobody has yet, then `VmResumed` or `VmFailed`. One
    /// that was not halted just goes on.
    ResumeVm {
        /// Which run.
        run: Run,
        /// For what.
        assignment: Box<Assignment>,
    },
    /// Ask the guest to end its workload and power off; `VmExited` says that it did.
    StopVm {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
        /// Between TERM and KILL of the workload.
        grace: Duration,
    },
    /// Give up a preparation or start, kill what lives of this run, then `VmExited`.
    KillVm {
        /// Whose.
        sandbox: SandboxId,
        /// Which run.
        run: Run,
    },
    /// Kill whatever lives of the sandbox, remove all of it, then `Destroyed` or `DestroyFailed`.
    Destroy {
        /// Whose.
        sandbox: SandboxId,
    },
    /// Keep what was saved for these forks, and remove that of all others.
    KeepForks {
        /// Of which copies are still to be made.
        forks: BTreeSet<ForkId>,
    },
    /// Open or shut the sandbox to streams.
    Gate {
        /// Whose.
        sandbox: SandboxId,
        /// How.
        gate: Gate,
    },
    /// Tell the control plane; `Acknowledged` says that it is committed.
    Report {
        /// By this session only.
        session: Session,
        /// Increases within a session.
        sequence: u64,
        /// The facts, in full for each sandbox.
        observed: Vec<Observed>,
    },
}
