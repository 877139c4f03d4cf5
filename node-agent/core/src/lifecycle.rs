//! One sandbox: what is wanted of it, where it stands, what happens next.
//!
//! ```text
//!  Placed ─▶ Preparing ─▶ Booting ─▶ Probing ─▶ Running ─▶ Stopping ─▶ Resting (stopped)
//!    ▲ │         │ ▲         │          │                    ▲   │
//!    │ │         ▼ │         └──────────┴────────────────────┤   ├────▶ Resting (failed)
//!    │ │       Waiting ◀─────────────────────────────────────────┤
//!    │ └──────────────────────────────────────────▶ Resting      │
//!    └───────────────────────────────────────────────────────────┘
//!  Running ─▶ Pausing ─▶ Paused ─▶ Resuming ─▶ Running, or Stopping
//!  after a restart of the node agent: Adopting ─▶ Running, or Paused, or Probing, or Stopping
//!  any ─▶ Destroying ─▶ Gone
//! ```
//! Left to `agent`: which records are refused, what is reported when, what fits. The invariant: a
//! VM is started only when no VM of the sandbox can live, and only on a record that is on disk.

mod pausing;

use std::time::Duration;

use towline_proto::ids::{ForkId, SandboxId};
use towline_proto::v1::{Desired, Observed, Phase, Shape};

use crate::input::{Assignment, Effect, Failure, Gate, Record, Rest, Run};

/// Bounds of the waits and retries of a sandbox's life.
pub mod bounds {
    use std::time::Duration;

    /// One preparation: disks are quick, the first look at a local image may take a minute.
    pub const PREPARE_MAX: Duration = Duration::from_secs(600);
    /// From spawn to a configured guest: 20 s is slow even for an emulated guest on a busy machine.
    pub const BOOT_MAX: Duration = Duration::from_secs(180);
    /// The first ping of a guest that has just said hello.
    pub const PROBE_MAX: Duration = Duration::from_secs(60);
    /// Taking up a VM that ran before: generous, because giving up kills somebody's work.
    pub const ADOPT_MAX: Duration = Duration::from_secs(300);
    /// Halting a VM, which finishes what its disks were doing.
    pub const PAUSE_MAX: Duration = Duration::from_secs(60);
    /// Letting one go on; a guest that was not reached since a restart is taken up, too.
    pub const RESUME_MAX: Duration = ADOPT_MAX;
    /// Between TERM and KILL of a workload that is stopped.
    pub const STOP_GRACE: Duration = Duration::from_secs(10);
    /// From asking a guest to power off to killing its VM.
    pub const STOP_MAX: Duration = Duration::from_secs(30);
    /// Between attempts to kill a VM that does not end.
    pub const KILL_RETRY: Duration = Duration::from_secs(10);
    /// Tries of a preparation whose failure may pass.
    pub const PREPARE_TRIES_MAX: u32 = 3;
    /// Tries of a boot whose failure may pass.
    pub const BOOT_TRIES_MAX: u32 = 2;
    /// Pause before the second try; the third waits four times as long.
    pub const RETRY_PAUSE: Duration = Duration::from_secs(1);
    /// One attempt to destroy, and the longest pause between two.
    pub const DESTROY_MAX: Duration = Duration::from_secs(60);
}
use bounds::{
    ADOPT_MAX, BOOT_MAX, BOOT_TRIES_MAX, DESTROY_MAX, KILL_RETRY, PAUSE_MAX, PREPARE_MAX,
    PREPARE_TRIES_MAX, PROBE_MAX, RESUME_MAX, RETRY_PAUSE, STOP_GRACE, STOP_MAX,
};

/// What a step may use: the time, fresh numbers, and where effects go.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) now: Duration,
    pub(crate) numbers: &'a mut u64,
    pub(crate) effects: &'a mut Vec<Effect>,
}

impl Context<'_> {
    fn number(&mut self) -> u64 {
        *self.numbers += 1;
        *self.numbers
    }
}

/// Where a sandbox stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The record is being written; nothing was begun.
    Placed {
        version: u64,
    },
    Preparing {
        deadline: Duration,
    },
    /// Between two tries.
    Waiting {
        until: Duration,
    },
    /// A VM of an earlier node agent is being taken up.
    Adopting {
        deadline: Duration,
    },
    Booting {
        deadline: Duration,
    },
    Probing {
        deadline: Duration,
    },
    Running,
    /// It is being halted; nothing is said of it meanwhile.
    Pausing {
        deadline: Duration,
    },
    /// Its VM is halted.
    Paused,
    /// It is being let go on, to run or to be stopped.
    Resuming {
        deadline: Duration,
    },
    /// What may live of the run is being ended; `cause` says what then.
    Stopping {
        cause: Cause,
        deadline: Duration,
    },
    /// No VM. `Record::rest` says why.
    Resting,
    /// Everything is being removed; `again` is when to try once more.
    Destroying {
        again: Duration,
        tries: u32,
    },
    Gone,
}

/// Why a run is being ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The control plane wants it stopped, or started anew at a higher epoch.
    Wanted,
    /// It did not come up.
    Failing(Failure),
    /// It ran, and cannot go on.
    Broken { reason: String },
}

/// One sandbox of this node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sandbox {
    pub(crate) record: Record,
    pub(crate) stage: Stage,
    /// The control plane's full set did not name it.
    pub(crate) unwanted: bool,
    pub(crate) run: Run,
    /// The newest persist, the newest that was answered, and the newest that is on disk.
    version: u64,
    version_answered: u64,
    version_on_disk: u64,
    prepare_tries: u32,
    boot_tries: u32,
    /// Progress or notice for people.
    note: String,
    driver: String,
    isolation: String,
    start: String,
    freed_bytes: u64,
}

impl Sandbox {
    pub(crate) fn new(record: Record) -> Self {
        Self {
            record,
            stage: Stage::Resting,
            unwanted: false,
            run: 0,
            version: 0,
            version_answered: 0,
            version_on_disk: 0,
            prepare_tries: 0,
            boot_tries: 0,
            note: String::new(),
            driver: String::new(),
            isolation: String::new(),
            start: String::new(),
            freed_bytes: 0,
        }
    }

    pub(crate) fn id(&self) -> SandboxId {
        self.record.assignment.sandbox
    }

    pub(crate) fn shape(&self) -> Shape {
        self.record.assignment.spec.shape.unwrap_or_default()
    }

    /// Whether CPU and memory are promised to it.
    pub(crate) fn holds_memory(&self) -> bool {
        !matches!(self.stage, Stage::Resting | Stage::Destroying { .. } | Stage::Gone)
    }

    /// Whether its disk exists or is about to.
    pub(crate) fn holds_disk(&self) -> bool {
        !matches!(self.stage, Stage::Destroying { .. } | Stage::Gone)
    }

    /// When it wants to be told the time.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match &self.stage {
            Stage::Preparing { deadline }
            | Stage::Adopting { deadline }
            | Stage::Booting { deadline }
            | Stage::Probing { deadline }
            | Stage::Pausing { deadline }
            | Stage::Resuming { deadline }
            | Stage::Stopping { deadline, .. } => Some(*deadline),
            Stage::Waiting { until } => Some(*until),
            Stage::Destroying { again, .. } => Some(*again),
            Stage::Placed { .. }
            | Stage::Running
            | Stage::Paused
            | Stage::Resting
            | Stage::Gone => None,
        }
    }

    /// The moment that a copy is still to be made of for it.
    pub(crate) fn wants_fork(&self) -> Option<ForkId> {
        let fork = self.record.assignment.copies()?;
        let begins = match &self.stage {
            Stage::Placed { .. }
            | Stage::Preparing { .. }
            | Stage::Waiting { .. }
            | Stage::Booting { .. }
            | Stage::Probing { .. }
            | Stage::Stopping { cause: Cause::Failing(_), .. } => true,
            Stage::Adopting { .. }
            | Stage::Running
            | Stage::Pausing { .. }
            | Stage::Paused
            | Stage::Resuming { .. }
            | Stage::Stopping { .. }
            | Stage::Resting
            | Stage::Destroying { .. }
            | Stage::Gone => false,
        };
        (begins && !self.record.came_up).then_some(fork.id)
    }

    /// What the control plane should know; nothing while that is not settled or not on disk.
    pub(crate) fn observed(&self) -> Option<Observed> {
        let settled = self.version == self.version_answered
            || matches!(self.stage, Stage::Destroying { .. } | Stage::Gone);
        if self.unwanted || !settled {
            return None;
        }
        let (phase, reason) = match &self.stage {
            Stage::Adopting { .. } | Stage::Pausing { .. } | Stage::Resuming { .. } => return None,
            Stage::Placed { .. } | Stage::Preparing { .. } | Stage::Waiting { .. } => {
                (Phase::Preparing, self.note.as_str())
            }
            Stage::Booting { .. } | Stage::Probing { .. } => (Phase::Booting, self.note.as_str()),
            Stage::Running => (Phase::Running, self.note.as_str()),
            Stage::Paused => (Phase::Paused, self.note.as_str()),
            Stage::Stopping { .. } => (Phase::Stopping, self.note.as_str()),
            Stage::Resting => match &self.record.rest {
                Some(Rest::Failed { reason }) => (Phase::Failed, reason.as_str()),
                Some(Rest::Stopped { reason }) => (Phase::Stopped, reason.as_str()),
                None => (Phase::Stopped, ""),
            },
            Stage::Destroying { .. } => (Phase::Deleting, self.note.as_str()),
            Stage::Gone => (Phase::Gone, ""),
        };
        Some(Observed {
            sandbox_id: self.id().to_vec(),
            epoch: self.record.assignment.epoch,
            generation: self.record.assignment.generation,
            phase: phase.into(),
            reason: reason.to_owned(),
            driver: self.driver.clone(),
            isolation: self.isolation.clone(),
            start: self.start.clone(),
            image_digest: self.record.image_digest.clone(),
            main_exit: self.record.main_exit.clone(),
            freed_bytes: self.freed_bytes,
        })
    }

    // ---- what is wanted ----

    /// Takes a newer record; `refusal` says why a start would not fit.
    pub(crate) fn assign(
        &mut self,
        assignment: Assignment,
        refusal: Option<String>,
        cx: &mut Context<'_>,
    ) {
        let new_epoch = assignment.epoch > self.record.assignment.epoch;
        let ran = assignment.ran || self.record.assignment.ran || self.record.came_up;
        self.record.assignment = Assignment { ran, ..assignment };
        match self.record.assignment.desired {
            Desired::Running => self.want_running(new_epoch, refusal, cx),
            Desired::Stopped => self.want_stopped(cx),
            Desired::Paused => self.want_paused(new_epoch, refusal, cx),
            Desired::Deleted => self.destroy(cx),
            Desired::Unspecified => {}
        }
    }

    fn want_running(&mut self, new_epoch: bool, refusal: Option<String>, cx: &mut Context<'_>) {
        match self.stage {
            // The moment is forgotten with the failure.
            Stage::Resting
                if self.record.assignment.copies().is_some() && self.record.rest.is_some() =>
            {
                let reason = "it never came to be the copy that it should be, and what it should be \
                              a copy of was not kept: remove it (`tow rm`) and fork again";
                self.rest(Rest::Failed { reason: reason.into() }, cx);
            }
            Stage::Resting | Stage::Placed { .. } | Stage::Waiting { .. } => match refusal {
                None => self.start(cx),
                Some(reason) => self.rest(Rest::Failed { reason }, cx),
            },
            Stage::Running
            | Stage::Pausing { .. }
            | Stage::Paused
            | Stage::Resuming { .. }
            | Stage::Adopting { .. }
                if new_epoch =>
            {
                self.gate_shut("the sandbox was placed anew", cx);
                self.kill(Cause::Wanted, cx);
            }
            Stage::Paused => {
                self.resume(cx);
                self.persist(cx);
            }
            // It goes on as soon as it is halted.
            Stage::Pausing { .. } | Stage::Resuming { .. } => self.persist(cx),
            // Whatever it is being ended for, the new record wants it started after that.
            Stage::Stopping { deadline, .. } => {
                self.stage = Stage::Stopping { cause: Cause::Wanted, deadline };
                self.persist(cx);
            }
            // What is being brought up is the new record's too, which has all its tries.
            Stage::Preparing { .. }
            | Stage::Adopting { .. }
            | Stage::Booting { .. }
            | Stage::Probing { .. }
            | Stage::Running => {
                (self.prepare_tries, self.boot_tries) = (0, 0);
                self.persist(cx);
            }
            Stage::Gone => self.lost_its_disk(cx),
            Stage::Destroying { .. } => {}
        }
    }

    fn want_stopped(&mut self, cx: &mut Context<'_>) {
        match self.stage {
            Stage::Placed { .. } | Stage::Waiting { .. } => {
                self.rest(Rest::Stopped { reason: "stopped before it had started".into() }, cx);
            }
            Stage::Preparing { .. } | Stage::Booting { .. } | Stage::Probing { .. } => {
                self.kill(Cause::Wanted, cx);
                self.persist(cx);
            }
            Stage::Running => {
                self.stop(cx);
                self.persist(cx);
            }
            // Its workload ends in order, so it goes on first.
            Stage::Paused => {
                self.resume(cx);
                self.persist(cx);
            }
            Stage::Resting => {
                let reason = match self.record.rest.take() {
                    Some(Rest::Failed { reason } | Rest::Stopped { reason }) => reason,
                    None => String::new(),
                };
                self.rest(Rest::Stopped { reason }, cx);
            }
            // An adopted VM is stopped once its guest can be told.
            Stage::Adopting { .. }
            | Stage::Pausing { .. }
            | Stage::Resuming { .. }
            | Stage::Stopping { .. } => self.persist(cx),
            Stage::Gone => self.lost_its_disk(cx),
            Stage::Destroying { .. } => {}
        }
    }

    /// Begins to remove everything, whatever it was doing.
    pub(crate) fn destroy(&mut self, cx: &mut Context<'_>) {
        match self.stage {
            Stage::Destroying { .. } | Stage::Gone => {}
            Stage::Placed { .. }
            | Stage::Preparing { .. }
            | Stage::Waiting { .. }
            | Stage::Adopting { .. }
            | Stage::Booting { .. }
            | Stage::Probing { .. }
            | Stage::Running
            | Stage::Pausing { .. }
            | Stage::Paused
            | Stage::Resuming { .. }
            | Stage::Stopping { .. }
            | Stage::Resting => {
                self.note.clear();
                self.gate_shut("the sandbox was removed", cx);
                self.stage = Stage::Destroying { again: cx.now + DESTROY_MAX, tries: 1 };
                cx.effects.push(Effect::Destroy { sandbox: self.id() });
            }
        }
    }

    // ---- starting ----

    /// Writes the record; the rest follows once it is on disk.
    fn start(&mut self, cx: &mut Context<'_>) {
        self.record.rest = None;
        self.record.came_up = false;
        self.record.main_exit = None;
        self.prepare_tries = 0;
        self.boot_tries = 0;
        self.note.clear();
        self.persist(cx);
        self.stage = Stage::Placed { version: self.version };
    }

    /// Goes on with a start that an earlier node agent had begun.
    pub(crate) fn resume_start(&mut self, cx: &mut Context<'_>) {
        self.start(cx);
    }

    /// Takes up a VM of an earlier node agent.
    pub(crate) fn adopt(&mut self, cx: &mut Context<'_>) {
        self.run = cx.number();
        self.stage = Stage::Adopting { deadline: cx.now + ADOPT_MAX };
        let assignment = Box::new(self.record.assignment.clone());
        cx.effects.push(Effect::AdoptVm { run: self.run, assignment });
    }

    /// Ends a copy that an earlier node agent had started and that may not know yet that it is one.
    pub(crate) fn end_unfinished_copy(&mut self, cx: &mut Context<'_>) {
        self.adopt(cx);
        let reason = "the node agent was restarted while the copy was made".to_owned();
        self.kill(Cause::Failing(Failure { reason, transient: true }), cx);
    }

    fn prepare(&mut self, cx: &mut Context<'_>) {
        self.run = cx.number();
        self.prepare_tries += 1;
        self.stage = Stage::Preparing { deadline: cx.now + PREPARE_MAX };
        let assignment = Box::new(self.record.assignment.clone());
        cx.effects.push(Effect::Prepare { run: self.run, assignment });
    }

    /// A newer record may have come meanwhile, and may not be on disk.
    fn try_again(&mut self, cx: &mut Context<'_>) {
        if self.version_on_disk == self.version {
            self.prepare(cx);
        } else {
            self.persist(cx);
            self.stage = Stage::Placed { version: self.version };
        }
    }

    /// The record of `version` is on disk.
    pub(crate) fn persisted(&mut self, version: u64, cx: &mut Context<'_>) {
        self.version_answered = self.version_answered.max(version);
        self.version_on_disk = self.version_on_disk.max(version);
        if self.stage == (Stage::Placed { version }) {
            self.prepare(cx);
        }
    }

    /// The record of `version` is not on disk: nothing may be started on it.
    pub(crate) fn persist_failed(&mut self, version: u64, reason: &str) {
        self.version_answered = self.version_answered.max(version);
        if self.stage == (Stage::Placed { version }) {
            let reason = format!("the node could not write the sandbox's record: {reason}");
            self.record.rest = Some(Rest::Failed { reason });
            self.stage = Stage::Resting;
        }
    }

    pub(crate) fn progressed(&mut self, text: String) {
        if matches!(self.stage, Stage::Preparing { .. }) {
            self.note = text;
        }
    }

    pub(crate) fn prepared(&mut self, image_digest: String, cx: &mut Context<'_>) {
        if matches!(self.stage, Stage::Preparing { .. }) {
            self.record.image_digest = image_digest;
            self.note.clear();
            self.boot_tries += 1;
            self.stage = Stage::Booting { deadline: cx.now + BOOT_MAX };
            let assignment = Box::new(self.record.assignment.clone());
            cx.effects.push(Effect::StartVm { run: self.run, assignment });
        }
    }

    pub(crate) fn vm_started(
        &mut self,
        driver: String,
        isolation: String,
        start: String,
        cx: &mut Context<'_>,
    ) {
        let adopted = match self.stage {
            Stage::Booting { .. } => false,
            Stage::Adopting { .. } => true,
            _ => return,
        };
        (self.driver, self.isolation, self.start) = (driver, isolation, start);
        if adopted && self.record.assignment.desired == Desired::Stopped {
            self.stop(cx);
        } else if adopted && self.record.came_up {
            self.as_wanted(cx);
        } else {
            self.stage = Stage::Probing { deadline: cx.now + PROBE_MAX };
            cx.effects.push(Effect::Probe { sandbox: self.id(), run: self.run });
        }
    }

    pub(crate) fn probe_answered(&mut self, cx: &mut Context<'_>) {
        if matches!(self.stage, Stage::Probing { .. }) {
            self.record.came_up = true;
            self.persist(cx);
            self.as_wanted(cx);
        }
    }

    /// It is up: it runs, or is paused or stopped at once.
    fn as_wanted(&mut self, cx: &mut Context<'_>) {
        match self.record.assignment.desired {
            Desired::Stopped => self.stop(cx),
            Desired::Paused => self.pause(cx),
            Desired::Running | Desired::Deleted | Desired::Unspecified => self.open(cx),
        }
    }

    pub(crate) fn probe_failed(&mut self, reason: &str, cx: &mut Context<'_>) {
        if matches!(self.stage, Stage::Probing { .. }) {
            let reason = format!("the guest did not answer its first ping: {reason}");
            self.kill(Cause::Failing(Failure { reason, transient: true }), cx);
        }
    }

    fn open(&mut self, cx: &mut Context<'_>) {
        self.stage = Stage::Running;
        let gate = Gate::Open { epoch: self.record.assignment.epoch };
        cx.effects.push(Effect::Gate { sandbox: self.id(), gate });
    }

    // ---- ending ----

    fn stop(&mut self, cx: &mut Context<'_>) {
        self.note.clear();
        self.stage = Stage::Stopping { cause: Cause::Wanted, deadline: cx.now + STOP_MAX };
        let (sandbox, run) = (self.id(), self.run);
        let gate = Gate::Closing { reason: self.because("the sandbox is being stopped") };
        cx.effects.push(Effect::Gate { sandbox, gate });
        cx.effects.push(Effect::StopVm { sandbox, run, grace: STOP_GRACE });
    }

    fn kill(&mut self, cause: Cause, cx: &mut Context<'_>) {
        self.stage = Stage::Stopping { cause, deadline: cx.now + KILL_RETRY };
        cx.effects.push(Effect::KillVm { sandbox: self.id(), run: self.run });
    }

    /// The guest of a VM that lives is out of reach for good.
    pub(crate) fn guest_lost(&mut self, reason: String, cx: &mut Context<'_>) {
        match self.stage {
            Stage::Running | Stage::Pausing { .. } | Stage::Paused | Stage::Resuming { .. } => {
                self.gate_shut(&reason, cx);
                self.kill(Cause::Broken { reason }, cx);
            }
            Stage::Adopting { .. } if self.record.came_up => {
                self.kill(Cause::Broken { reason }, cx);
            }
            Stage::Adopting { .. } | Stage::Booting { .. } | Stage::Probing { .. } => {
                self.kill(Cause::Failing(Failure { reason, transient: true }), cx);
            }
            _ => {}
        }
    }

    /// A preparation or start ended without a VM; nothing of the run lives.
    pub(crate) fn failed(&mut self, failure: Failure, cx: &mut Context<'_>) {
        match self.stage {
            Stage::Preparing { .. } | Stage::Booting { .. } => self.retry_or_fail(failure, cx),
            Stage::Adopting { .. }
            | Stage::Probing { .. }
            | Stage::Running
            | Stage::Pausing { .. }
            | Stage::Paused
            | Stage::Resuming { .. }
            | Stage::Stopping { .. } => self.ended(failure.reason, cx),
            _ => {}
        }
    }

    /// Nothing of the run lives any more.
    pub(crate) fn ended(&mut self, reason: String, cx: &mut Context<'_>) {
        match std::mem::replace(&mut self.stage, Stage::Resting) {
            Stage::Stopping { cause, .. } => self.after_stopping(cause, cx),
            Stage::Running | Stage::Pausing { .. } | Stage::Paused | Stage::Resuming { .. } => {
                self.gate_shut(&reason, cx);
                self.rest(Rest::Stopped { reason }, cx);
            }
            Stage::Adopting { .. } if self.record.came_up => {
                self.rest(Rest::Stopped { reason }, cx);
            }
            Stage::Preparing { .. }
            | Stage::Adopting { .. }
            | Stage::Booting { .. }
            | Stage::Probing { .. } => {
                self.retry_or_fail(Failure { reason, transient: true }, cx);
            }
            stage @ (Stage::Placed { .. }
            | Stage::Waiting { .. }
            | Stage::Resting
            | Stage::Destroying { .. }
            | Stage::Gone) => self.stage = stage,
        }
    }

    fn after_stopping(&mut self, cause: Cause, cx: &mut Context<'_>) {
        let stopped = self.record.assignment.desired == Desired::Stopped;
        match cause {
            Cause::Wanted if stopped => {
                self.gate_shut(&self.because("the sandbox was stopped"), cx);
                let reason = match self.record.assignment.reason.as_str() {
                    "" => "stopped",
                    reason => reason,
                };
                self.rest(Rest::Stopped { reason: reason.to_owned() }, cx);
            }
            Cause::Wanted => {
                self.gate_shut("the sandbox is started anew", cx);
                self.start(cx);
            }
            Cause::Failing(Failure { reason, .. }) if stopped => {
                self.rest(Rest::Stopped { reason }, cx);
            }
            Cause::Failing(failure) => self.retry_or_fail(failure, cx),
            Cause::Broken { reason } => self.rest(Rest::Stopped { reason }, cx),
        }
    }

    /// What happened, and why if nobody asked for it.
    fn because(&self, what: &str) -> String {
        match self.record.assignment.reason.as_str() {
            "" => what.to_owned(),
            reason => format!("{what} ({reason})"),
        }
    }

    fn retry_or_fail(&mut self, failure: Failure, cx: &mut Context<'_>) {
        let tries_left = self.prepare_tries < PREPARE_TRIES_MAX && self.boot_tries < BOOT_TRIES_MAX;
        if failure.transient && tries_left {
            self.note = format!("{}; trying again", failure.reason);
            let pause = RETRY_PAUSE * 4u32.pow(self.prepare_tries.saturating_sub(1));
            self.stage = Stage::Waiting { until: cx.now + pause };
        } else {
            self.rest(Rest::Failed { reason: failure.reason }, cx);
        }
    }

    /// Comes to rest and keeps that.
    pub(crate) fn rest(&mut self, rest: Rest, cx: &mut Context<'_>) {
        self.note.clear();
        self.record.rest = Some(rest);
        self.stage = Stage::Resting;
        self.persist(cx);
    }

    pub(crate) fn destroyed(&mut self, freed_bytes: u64, cx: &mut Context<'_>) {
        // A removal that was cut off and begun again has freed in parts.
        self.freed_bytes += freed_bytes;
        if !matches!(self.stage, Stage::Destroying { .. }) {
            return;
        }
        if self.record.assignment.desired == Desired::Deleted || self.unwanted {
            self.stage = Stage::Gone;
            return;
        }
        self.lost_its_disk(cx);
    }

    /// It is wanted again after it was removed.
    fn lost_its_disk(&mut self, cx: &mut Context<'_>) {
        let reason = "its disk was removed here, because the control plane had said that it was \
                      not wanted on this node; remove the sandbox and create it anew";
        self.record.came_up = false;
        self.rest(Rest::Failed { reason: reason.into() }, cx);
    }

    pub(crate) fn destroy_failed(&mut self, reason: &str, cx: &mut Context<'_>) {
        if let Stage::Destroying { tries, .. } = self.stage {
            self.note = format!("removing it failed and is tried again: {reason}");
            let pause = RETRY_PAUSE * 2u32.pow(tries.min(6));
            self.stage = Stage::Destroying { again: cx.now + pause.min(DESTROY_MAX), tries };
        }
    }

    // ---- the rest ----

    pub(crate) fn main_exited(
        &mut self,
        status: towline_proto::v1::ExitStatus,
        cx: &mut Context<'_>,
    ) {
        let up = matches!(
            self.stage,
            Stage::Probing { .. }
                | Stage::Running
                | Stage::Pausing { .. }
                | Stage::Paused
                | Stage::Resuming { .. }
                | Stage::Stopping { .. }
        );
        if up {
            self.record.main_exit = Some(status);
            self.persist(cx);
        }
    }

    pub(crate) fn noticed(&mut self, text: String) {
        // A guest reads its image while it comes up, and what was said of that is said once.
        let lives = matches!(
            self.stage,
            Stage::Adopting { .. } | Stage::Booting { .. } | Stage::Probing { .. } | Stage::Running
        );
        if lives {
            self.note = text;
        }
    }

    /// Looks at its deadline.
    pub(crate) fn tick(&mut self, cx: &mut Context<'_>) {
        if self.deadline().is_none_or(|deadline| deadline > cx.now) {
            return;
        }
        match self.stage.clone() {
            Stage::Preparing { .. } => {
                let reason = took_too_long("preparing image and disks", PREPARE_MAX);
                self.kill(Cause::Failing(Failure { reason, transient: false }), cx);
            }
            Stage::Booting { .. } => {
                let reason = took_too_long("booting the VM", BOOT_MAX);
                self.kill(Cause::Failing(Failure { reason, transient: true }), cx);
            }
            Stage::Probing { .. } => {
                let reason = took_too_long("the guest's answer to its first ping", PROBE_MAX);
                self.kill(Cause::Failing(Failure { reason, transient: true }), cx);
            }
            Stage::Adopting { .. } => {
                let reason = took_too_long("reaching the guest after a restart", ADOPT_MAX);
                self.guest_lost(reason, cx);
            }
            Stage::Pausing { .. } => {
                // Whether it is halted by now or not, it goes on.
                self.note = took_too_long("pausing the VM", PAUSE_MAX);
                self.resume(cx);
            }
            Stage::Resuming { .. } => {
                let reason = took_too_long("resuming the VM", RESUME_MAX);
                self.guest_lost(reason, cx);
            }
            Stage::Stopping { cause, .. } => {
                self.note = "its VM has not ended yet and is killed".into();
                self.kill(cause, cx);
            }
            Stage::Waiting { .. } => self.try_again(cx),
            Stage::Destroying { tries, .. } => {
                self.stage = Stage::Destroying { again: cx.now + DESTROY_MAX, tries: tries + 1 };
                cx.effects.push(Effect::Destroy { sandbox: self.id() });
            }
            Stage::Placed { .. }
            | Stage::Running
            | Stage::Paused
            | Stage::Resting
            | Stage::Gone => {}
        }
    }

    fn gate_shut(&self, reason: &str, cx: &mut Context<'_>) {
        let gate = Gate::Shut { reason: reason.to_owned() };
        cx.effects.push(Effect::Gate { sandbox: self.id(), gate });
    }

    pub(crate) fn persist(&mut self, cx: &mut Context<'_>) {
        self.version = cx.number();
        let record = Box::new(self.record.clone());
        cx.effects.push(Effect::Persist { version: self.version, record });
        // A start waits for the newest record.
        if let Stage::Placed { version } = &mut self.stage {
            *version = self.version;
        }
    }
}

fn took_too_long(what: &str, bound: Duration) -> String {
    format!("{what} took longer than {} s and was given up", bound.as_secs())
}
