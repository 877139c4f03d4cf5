//! Halts VMs and lets them go on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use towline_node_core::{Assignment, Failure, Input, Run};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{GuestCommand, SetClock, guest_command};

use super::{Machine, end};
use crate::guest_configure::unix_ns;
use crate::guests::{Guest, exit_reason};
use crate::images::lasting;

/// Halting a VM or letting it go on: shorter than the core's bounds.
pub(super) const ORDER_MAX: Duration = Duration::from_secs(45);

/// A fork of it that is just being saved is waited for: with the above, shorter than the core's bound.
const SAVING_WAIT: Duration = Duration::from_secs(10);

impl Machine {
    /// `Effect::PauseVm`.
    pub async fn pause(self: Arc<Self>, sandbox: SandboxId, run: Run) {
        let paused = match self.guests.get(sandbox) {
            None => Err("it has no guest".to_owned()),
            Some(guest) => pause_attended(&guest).await,
        };
        let input = match paused {
            Ok(()) => Input::VmPaused { sandbox, run },
            Err(reason) => {
                tracing::warn!(%sandbox, run, reason, "vm not paused");
                Input::PauseFailed { sandbox, run, reason }
            }
        };
        self.tell(input).await;
    }

    /// `Effect::ResumeVm`.
    pub async fn resume(self: Arc<Self>, run: Run, assignment: Assignment) {
        let sandbox = assignment.sandbox;
        let resumed = match self.guests.get(sandbox) {
            Some(guest) => resume_attended(&guest).await,
            None => self.adopt_vm(run, &assignment).await.map(drop),
        };
        let input = match resumed {
            Ok(()) => Input::VmResumed { sandbox, run },
            Err(failure) => {
                tracing::warn!(%sandbox, run, reason = failure.reason, "vm not resumed");
                Input::VmFailed { sandbox, run, failure }
            }
        };
        self.tell(input).await;
    }

    /// `Effect::AdoptVm` of one that should be paused: it is halted, and only its end is seen.
    pub(super) async fn adopt_paused(&self, run: Run, sandbox: SandboxId) {
        let found = self.hypervisors.adopt(&self.store.sandbox(sandbox).vm());
        let Ok(Some(vm)) = found else {
            let reason = "the VM ended while the node agent was away".to_owned();
            return self.tell(Input::VmExited { sandbox, run, reason }).await;
        };
        let paused = timeout(ORDER_MAX, vm.pause()).await;
        if !matches!(paused, Ok(Ok(()))) {
            let failure = lasting(format!("the VM takes no orders: {}", why(paused)));
            end(&vm).await;
            return self.tell(Input::VmFailed { sandbox, run, failure }).await;
        }
        tracing::info!(%sandbox, run, "paused vm found");
        self.tell(Input::VmPaused { sandbox, run }).await;
        let reason = exit_reason(&vm.wait_exit().await);
        self.tell(Input::VmExited { sandbox, run, reason }).await;
    }
}

async fn pause_attended(guest: &Guest) -> Result<(), String> {
    let orders = timeout(SAVING_WAIT, guest.orders.lock()).await;
    let mut paused = orders
        .map_err(|_| "copies of it are being made: pause it again when they are done".to_owned())?;
    match timeout(ORDER_MAX, guest.vm.pause()).await {
        Ok(Ok(())) => {
            *paused = true;
            Ok(())
        }
        failed => Err(why(failed)),
    }
}

async fn resume_attended(guest: &Guest) -> Result<(), Failure> {
    let mut paused = guest.orders.lock().await;
    let resumed = timeout(ORDER_MAX, guest.vm.resume()).await;
    if !matches!(resumed, Ok(Ok(_))) {
        end(&guest.vm).await;
        return Err(lasting(format!("the VM does not go on: {}", why(resumed))));
    }
    *paused = false;
    let clock = guest_command::Command::SetClock(SetClock { unix_ns: unix_ns() });
    if !guest.command(GuestCommand { command: Some(clock) }) {
        tracing::warn!(sandbox = %guest.sandbox, "guest takes no commands, its clock is late");
    }
    Ok(())
}

/// Why an order with a bound failed.
pub(super) fn why<T>(result: Result<io::Result<T>, tokio::time::error::Elapsed>) -> String {
    match result {
        Ok(Err(error)) => crate::chain(&error),
        _ => format!("no answer within {} s", ORDER_MAX.as_secs()),
    }
}
