//! Has copies made of running sandboxes: a moment is saved (`forks`), a VM is started from it, and its
//! guest becomes another sandbox before anybody is let in.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use towline_node_core::{Assignment, Failure, Input, Run};
use towline_proto::ids::{ForkId, SandboxId};

use super::{ADOPT_MAX, CONFIGURE_MAX, HELLO_MAX, Machine, transient};
use crate::forks::{AGAIN, Moment, Source};
use crate::guest_configure::guest_become;
use crate::guest_link::GuestLink;
use crate::guests::{Attendance, Guest};
use crate::hypervisor::Hypervisor;
use crate::images::lasting;

/// Between two looks whether a guest was taken up.
const SOURCE_LOOK: Duration = Duration::from_millis(100);

impl Machine {
    /// Has the moment saved that the sandbox is to be a copy of, if it is to be one.
    pub(super) async fn prepare_fork(
        &self,
        run: Run,
        assignment: &Assignment,
        driver: &Arc<dyn Hypervisor>,
    ) -> Result<Option<Moment>, Failure> {
        let Some(fork) = assignment.copies() else { return Ok(None) };
        let (sandbox, text) = (assignment.sandbox, format!("saving {}", fork.source));
        let _ = self.inputs.try_send(Input::PrepareProgress { sandbox, run, text });
        let guest = self.source_guest(fork.source).await;
        let source = Source::find(guest, Arc::clone(driver), &self.store, fork);
        self.forks.ready(fork, source).await?;
        self.forks.open(fork.id, driver.as_ref()).map(Some)
    }

    /// The guest of what a copy is made of; one whose VM lives may just be taken up again.
    async fn source_guest(&self, source: SandboxId) -> Option<Arc<Guest>> {
        let until = Instant::now() + ADOPT_MAX;
        loop {
            let guest = self.guests.get(source);
            let lives = || {
                let found = self.hypervisors.adopt(&self.store.sandbox(source).vm());
                found.is_ok_and(|vm| vm.is_some())
            };
            if guest.is_some() || Instant::now() >= until || !lives() {
                return guest;
            }
            sleep(SOURCE_LOOK).await;
        }
    }

    /// Waits for a copy's guest, has it become another sandbox, and has it attended to. On failure
    /// nothing of the VM lives.
    pub(super) async fn take_up_copy(
        &self,
        attendance: Attendance,
        assignment: &Assignment,
        fork: ForkId,
        moment: &Moment,
    ) -> Result<(), Failure> {
        let talk = async {
            let (vm, secret) = (&attendance.vm, attendance.secret);
            let link = GuestLink::connect_copy(vm, secret, moment.secret, HELLO_MAX).await;
            let mut link = link.map_err(|error| transient(&error))?;
            // What has run before it knows who it is would share its secrets.
            if !link.hello.configured || !link.hello.frozen {
                return Err(lasting(format!(
                    "the copy's workload was not frozen when it was saved: {AGAIN}"
                )));
            }
            let order =
                guest_become(assignment, fork, secret).map_err(|error| transient(&error))?;
            let opened = attendance.become_copy(&mut link, order, CONFIGURE_MAX).await;
            Ok((link, opened.map_err(|error| transient(&error))?))
        };
        let talked = talk.await;
        self.attend_or_end(attendance, talked).await
    }

    /// `Effect::KeepForks`.
    pub fn keep_forks(&self, kept: BTreeSet<ForkId>) {
        let forks = Arc::clone(&self.forks);
        tokio::task::spawn_blocking(move || forks.keep(kept));
    }
}
