//! When sandboxes are stopped by themselves: `SandboxSpec.timeout_s` after each start.
//!
//! Only replicated time counts, so all members stop the same ones at the same entry; a leader
//! proposes an entry when the next time has come (`control_plane`). Nothing is ever deleted. A pause
//! does not stop the clock. The invariant: a sandbox has an `expires_ms` only while it is wanted
//! running or paused and has not ended.

use std::time::Duration;

use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, Desired};

use super::sandboxes::{Sandboxes, has_ended, no_sandbox, stays};
use super::{Changes, Done, State};
use crate::planted;
use crate::refusal::Refusal;

impl Sandboxes {
    /// When the next one is to be stopped, in replicated Unix milliseconds.
    pub fn next_expiry_ms(&self) -> Option<u64> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    /// Counts the timeout of a sandbox that starts now, or counts none any more.
    pub(super) fn count_anew(&mut self, id: SandboxId, now_ms: u64) {
        let Some(sandbox) = self.by_id.get_mut(&id).and_then(|record| record.sandbox.as_mut())
        else {
            return;
        };
        self.by_expiry.remove(&(sandbox.expires_ms, id));
        sandbox.expires_ms = expiry(sandbox, now_ms);
        if sandbox.expires_ms != 0 {
            self.by_expiry.insert((sandbox.expires_ms, id));
        }
    }
}

/// When a sandbox whose timeout counts from now is stopped; 0 for never.
pub(super) fn expiry(sandbox: &v1::Sandbox, now_ms: u64) -> u64 {
    let timeout_s = sandbox.spec.as_ref().map_or(0, |spec| spec.timeout_s);
    if timeout_s == 0 || !sandbox.desired().is_up() || has_ended(sandbox) {
        return 0;
    }
    now_ms.saturating_add(timeout_s.saturating_mul(1000))
}

impl State {
    /// Stops what is to be stopped by now.
    pub(super) fn stop_expired(&mut self, changes: &mut Changes) {
        if planted::expiry_skipped() {
            return;
        }
        while let Some((at, id)) = self.sandboxes.by_expiry.first().copied() {
            if at > self.now_ms {
                return;
            }
            let record = self.sandboxes.get(id).and_then(|record| record.sandbox.as_ref());
            let timeout_s = record.and_then(|s| s.spec.as_ref()).map_or(0, |spec| spec.timeout_s);
            let timeout = humantime::format_duration(Duration::from_secs(timeout_s));
            self.steer(id, Desired::Stopped, &format!("timeout {timeout}"), changes);
            // Stopping takes it out already; nothing may make this loop endless.
            self.sandboxes.by_expiry.remove(&(at, id));
        }
    }

    pub(super) fn set_expiry(
        &mut self,
        set: &v1::SetExpiryCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let (id, _) = self.sandboxes.owned(&set.id, &set.owner)?;
        let record = self.sandboxes.by_id.get_mut(&id).ok_or_else(|| no_sandbox(id))?;
        let sandbox = record.sandbox.get_or_insert_default();
        stays(id, sandbox)?;
        self.revision += 1;
        sandbox.revision = self.revision;
        sandbox.spec.get_or_insert_default().timeout_s = set.ttl_s;
        self.sandboxes.count_anew(id, self.now_ms);
        changes.sandboxes.insert(id);
        let record = self.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
        Ok(Done::Sandbox(Box::new(self.view(record))))
    }
}
