//! Who wants to see each change of which sandbox. A watcher gets the newest view after each change,
//! never a difference, so a driver may skip views for a slow one.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::SandboxId;
use towline_proto::v1;

use crate::input::{Effect, WatchId};
use crate::refusal::Refusal;
use crate::state::{Changes, State};

#[derive(Debug, Default)]
pub(crate) struct Watches {
    of: BTreeMap<WatchId, SandboxId>,
    by_sandbox: BTreeMap<SandboxId, BTreeSet<WatchId>>,
}

impl Watches {
    pub(crate) fn add(&mut self, watch: WatchId, id: SandboxId) {
        self.of.insert(watch, id);
        self.by_sandbox.entry(id).or_default().insert(watch);
    }

    pub(crate) fn remove(&mut self, watch: WatchId) {
        let Some(id) = self.of.remove(&watch) else { return };
        if let Some(watches) = self.by_sandbox.get_mut(&id) {
            watches.remove(&watch);
            if watches.is_empty() {
                self.by_sandbox.remove(&id);
            }
        }
    }

    /// Tells those who watch what changed.
    pub(crate) fn tell(&mut self, state: &State, changes: &Changes) -> Vec<Effect> {
        let mut effects = Vec::new();
        for id in &changes.sandboxes {
            let Some(watches) = self.by_sandbox.get(id) else { continue };
            let Some(record) = state.sandboxes.get(*id) else { continue };
            let view = state.view(record);
            effects.extend(watches.iter().map(|w| Effect::WatchUpdate(*w, Box::new(view.clone()))));
        }
        for sandbox in &changes.removed {
            let Ok(id) = SandboxId::try_from(sandbox.id.as_slice()) else { continue };
            effects.extend(self.end_of(id, sandbox));
        }
        effects
    }

    fn end_of(&mut self, id: SandboxId, last: &v1::Sandbox) -> Vec<Effect> {
        let watches = self.by_sandbox.remove(&id).unwrap_or_default();
        let mut effects = Vec::new();
        for watch in watches {
            self.of.remove(&watch);
            effects.push(Effect::WatchUpdate(watch, Box::new(last.clone())));
            effects.push(Effect::WatchEnd(watch, None));
        }
        effects
    }

    /// Ends all: this member does not lead any more.
    pub(crate) fn end_all(&mut self, why: &Refusal) -> Vec<Effect> {
        let all = std::mem::take(self);
        all.of.into_keys().map(|watch| Effect::WatchEnd(watch, Some(why.clone()))).collect()
    }
}
