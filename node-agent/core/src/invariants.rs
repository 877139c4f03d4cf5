//! What must always hold of a node agent's core: one checker over its state, one over its dealings.
//!
//! Shared by the core's tests, the simulator and the driver (which logs a violation instead of
//! going on silently). The checkers know the contract of `input`, not how the core keeps it.

use std::collections::BTreeMap;

use towline_proto::ids::SandboxId;
use towline_proto::v1::Observed;

use crate::agent::NodeAgent;
use crate::input::{Effect, Found, Gate, Input, Run, Session};

/// Checks the state: what is reported is about sandboxes that are here, one run each.
pub fn check(agent: &NodeAgent) -> Result<(), String> {
    for id in agent.sandboxes() {
        if let Some(observed) = agent.observed(id)
            && observed.sandbox_id != id.as_bytes()
        {
            return Err(format!("{id} is reported under another id"));
        }
    }
    Ok(())
}

/// What the watcher knows of one sandbox.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// Newest version that was handed out, and newest that is on disk.
    persisting: u64,
    persisted: u64,
    /// An earlier node agent had written it.
    recovered: bool,
    /// A run of which something may live.
    live: Option<Run>,
    prepared: Option<Run>,
    /// The run that answered its probe, or was taken up.
    answered: Option<Run>,
    /// The run that is halted, or may be.
    halted: Option<Run>,
    /// Its removal has begun.
    destroying: bool,
    told: Option<(Session, Observed)>,
}

/// Follows inputs and effects, and says when a rule is broken.
#[derive(Debug, Clone, Default)]
pub struct Watcher {
    seen: BTreeMap<SandboxId, Seen>,
    newest_run: Run,
    session: Option<Session>,
    sequence: u64,
}

impl Watcher {
    /// One that has seen nothing: for a core that was just made.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at one step.
    pub fn observe(&mut self, input: &Input, effects: &[Effect]) -> Result<(), String> {
        self.input(input);
        effects.iter().try_for_each(|effect| self.effect(effect))
    }

    fn input(&mut self, input: &Input) {
        match input {
            Input::Recovered(found) => {
                for found in found {
                    if let Found::Known { record, .. } = found {
                        let seen = self.seen.entry(record.assignment.sandbox).or_default();
                        seen.recovered = true;
                    }
                }
            }
            Input::Persisted { sandbox, version } => {
                let seen = self.seen.entry(*sandbox).or_default();
                seen.persisted = seen.persisted.max(*version);
            }
            Input::Prepared { sandbox, run, .. } => {
                self.seen.entry(*sandbox).or_default().prepared = Some(*run);
            }
            Input::VmStarted { sandbox, run, .. } | Input::ProbeAnswered { sandbox, run } => {
                self.seen.entry(*sandbox).or_default().answered = Some(*run);
            }
            Input::VmPaused { sandbox, run } => {
                self.seen.entry(*sandbox).or_default().halted = Some(*run);
            }
            Input::VmResumed { sandbox, run } => {
                let seen = self.seen.entry(*sandbox).or_default();
                (seen.halted, seen.answered) = (None, Some(*run));
            }
            Input::PauseFailed { sandbox, .. } => {
                self.seen.entry(*sandbox).or_default().halted = None;
            }
            Input::PrepareFailed { sandbox, run, .. }
            | Input::VmFailed { sandbox, run, .. }
            | Input::VmExited { sandbox, run, .. } => {
                let seen = self.seen.entry(*sandbox).or_default();
                if seen.live == Some(*run) {
                    seen.live = None;
                }
            }
            Input::Destroyed { sandbox, .. } => {
                self.seen.remove(sandbox);
            }
            Input::Registered { session, .. } => {
                (self.session, self.sequence) = (Some(*session), 0);
            }
            Input::Disconnected { session } if self.session == Some(*session) => {
                self.session = None;
            }
            _ => {}
        }
    }

    fn effect(&mut self, effect: &Effect) -> Result<(), String> {
        match effect {
            Effect::Persist { version, record } => {
                let id = record.assignment.sandbox;
                let seen = self.seen.entry(id).or_default();
                rule(*version > seen.persisting, id, "a record's version went back")?;
                seen.persisting = *version;
                Ok(())
            }
            Effect::Prepare { run, assignment } => {
                let id = assignment.sandbox;
                self.new_run(id, *run)?;
                let seen = &self.seen[&id];
                let known = seen.persisted > 0 || seen.recovered;
                let on_disk = known && seen.persisted == seen.persisting;
                rule(on_disk, id, "began before its record was on disk")
            }
            Effect::AdoptVm { run, assignment } => self.new_run(assignment.sandbox, *run),
            Effect::StartVm { run, assignment } => {
                let id = assignment.sandbox;
                let seen = self.seen.entry(id).or_default();
                rule(seen.prepared == Some(*run), id, "a VM is started unprepared")?;
                rule(seen.live == Some(*run), id, "a VM is started for a run that is over")
            }
            Effect::ResumeVm { run, assignment } => {
                let live = self.seen.entry(assignment.sandbox).or_default().live;
                rule(live == Some(*run), assignment.sandbox, "a run that is over is resumed")
            }
            Effect::PauseVm { sandbox, run } => {
                let seen = self.seen.entry(*sandbox).or_default();
                rule(seen.live == Some(*run), *sandbox, "a run that is over is paused")?;
                seen.halted = Some(*run);
                Ok(())
            }
            Effect::Probe { sandbox, run }
            | Effect::StopVm { sandbox, run, .. }
            | Effect::KillVm { sandbox, run } => {
                let live = self.seen.entry(*sandbox).or_default().live;
                rule(live == Some(*run), *sandbox, "something is done to a run that is over")
            }
            Effect::Destroy { sandbox } => {
                self.seen.entry(*sandbox).or_default().destroying = true;
                Ok(())
            }
            Effect::Gate { sandbox, gate: Gate::Open { .. } } => {
                let seen = self.seen.entry(*sandbox).or_default();
                let answered = seen.answered.is_some() && seen.answered == seen.live;
                rule(answered && !seen.destroying, *sandbox, "streams are let in too early")?;
                let halted = seen.halted.is_some() && seen.halted == seen.live;
                rule(!halted, *sandbox, "streams are let in to what is halted")
            }
            Effect::KeepForks { .. } => Ok(()),
            Effect::Gate { gate: Gate::Closing { .. } | Gate::Shut { .. }, .. } => Ok(()),
            Effect::Report { session, sequence, observed } => {
                self.report(*session, *sequence, observed)
            }
        }
    }

    fn new_run(&mut self, id: SandboxId, run: Run) -> Result<(), String> {
        let seen = self.seen.entry(id).or_default();
        rule(run > self.newest_run, id, "a run's number was used before")?;
        rule(!seen.destroying, id, "a run begins while everything is being removed")?;
        rule(seen.live.is_none(), id, "a run begins while another may live")?;
        seen.live = Some(run);
        self.newest_run = run;
        Ok(())
    }

    fn report(
        &mut self,
        session: Session,
        sequence: u64,
        observed: &[Observed],
    ) -> Result<(), String> {
        if self.session != Some(session) || sequence != self.sequence + 1 || observed.is_empty() {
            return Err(format!("report {sequence} of session {session} is out of order"));
        }
        self.sequence = sequence;
        for fact in observed {
            let id = SandboxId::try_from(&fact.sandbox_id[..]).map_err(|e| e.to_string())?;
            let seen = self.seen.entry(id).or_default();
            if let Some((when, told)) = &seen.told {
                rule(*when != session || told != fact, id, "a fact is told twice in a row")?;
                let newer = (fact.epoch, fact.generation) >= (told.epoch, told.generation);
                rule(newer, id, "a fact of an older record is told")?;
            }
            seen.told = Some((session, fact.clone()));
        }
        Ok(())
    }
}

fn rule(holds: bool, id: SandboxId, broken: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("{id}: {broken}")) }
}
