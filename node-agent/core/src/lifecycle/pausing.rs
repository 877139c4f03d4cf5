//! Running ─▶ Pausing ─▶ Paused ─▶ Resuming ─▶ Running, or what is wanted by then.

use towline_proto::v1::Desired;

use super::bounds::{PAUSE_MAX, RESUME_MAX};
use super::{Context, Sandbox, Stage};
use crate::input::{Effect, Gate};

impl Sandbox {
    pub(super) fn want_paused(
        &mut self,
        new_epoch: bool,
        refusal: Option<String>,
        cx: &mut Context<'_>,
    ) {
        match self.stage {
            // Only what is up can be paused.
            Stage::Resting if self.record.rest.is_some() => self.persist(cx),
            Stage::Running if !new_epoch => {
                self.pause(cx);
                self.persist(cx);
            }
            // It is paused already, or will be when what is under way has ended.
            Stage::Pausing { .. } | Stage::Paused | Stage::Resuming { .. } if !new_epoch => {
                self.persist(cx);
            }
            _ => self.want_running(new_epoch, refusal, cx),
        }
    }

    pub(super) fn pause(&mut self, cx: &mut Context<'_>) {
        self.note.clear();
        self.stage = Stage::Pausing { deadline: cx.now + PAUSE_MAX };
        self.gate_paused(cx);
        cx.effects.push(Effect::PauseVm { sandbox: self.id(), run: self.run });
    }

    /// Nobody new is let in; who is in stays.
    fn gate_paused(&self, cx: &mut Context<'_>) {
        let reason = "it is paused; `tow resume` lets it go on".to_owned();
        cx.effects.push(Effect::Gate { sandbox: self.id(), gate: Gate::Closing { reason } });
    }

    pub(super) fn resume(&mut self, cx: &mut Context<'_>) {
        self.stage = Stage::Resuming { deadline: cx.now + RESUME_MAX };
        let assignment = Box::new(self.record.assignment.clone());
        cx.effects.push(Effect::ResumeVm { run: self.run, assignment });
    }

    pub(crate) fn vm_paused(&mut self, cx: &mut Context<'_>) {
        if !matches!(self.stage, Stage::Pausing { .. } | Stage::Adopting { .. }) {
            return;
        }
        self.stage = Stage::Paused;
        self.gate_paused(cx);
        if self.record.assignment.desired != Desired::Paused {
            self.resume(cx);
        }
    }

    pub(crate) fn pause_failed(&mut self, reason: &str, cx: &mut Context<'_>) {
        if matches!(self.stage, Stage::Pausing { .. }) {
            self.note = format!("it could not be paused: {reason}");
            match self.record.assignment.desired {
                Desired::Stopped => self.stop(cx),
                _ => self.open(cx),
            }
        }
    }

    pub(crate) fn vm_resumed(&mut self, cx: &mut Context<'_>) {
        if matches!(self.stage, Stage::Resuming { .. }) {
            match self.record.assignment.desired {
                // It took too long to be paused, and the control plane is told so.
                Desired::Paused if !self.note.is_empty() => self.open(cx),
                _ => self.as_wanted(cx),
            }
        }
    }
}
