//! What the control plane was told, what it has committed, and what to tell it next.
//!
//! One report is under way at a time; changes meanwhile coalesce into the next. A new session
//! starts from nothing told, so what was not acknowledged is told again. The invariant: within a
//! session no fact is told twice in a row, and a sandbox's facts are told in order.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::SandboxId;
use towline_proto::v1::Observed;

use crate::input::{Effect, Session};

/// Sandboxes in one report: a few hundred records stay far below a gRPC message's bound.
const REPORT_MAX: usize = 256;

#[derive(Debug, Clone, Default)]
pub(crate) struct Reports {
    session: Option<Session>,
    sequence: u64,
    dirty: BTreeSet<SandboxId>,
    /// The newest that this session carried of each sandbox.
    told: BTreeMap<SandboxId, Observed>,
    under_way: Option<Vec<SandboxId>>,
}

impl Reports {
    pub(crate) fn session(&self) -> Option<Session> {
        self.session
    }

    pub(crate) fn begin(&mut self, session: Session, all: impl Iterator<Item = SandboxId>) {
        *self = Self { session: Some(session), dirty: all.collect(), ..Self::default() };
    }

    pub(crate) fn end(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn changed(&mut self, sandbox: SandboxId) {
        if self.session.is_some() {
            self.dirty.insert(sandbox);
        }
    }

    pub(crate) fn forget(&mut self, sandbox: SandboxId) {
        self.dirty.remove(&sandbox);
        self.told.remove(&sandbox);
    }

    /// Takes an acknowledgement; returns what it settles.
    pub(crate) fn acknowledged(&mut self, sequence: u64) -> Vec<(SandboxId, Observed)> {
        if sequence != self.sequence {
            return Vec::new();
        }
        let settled = self.under_way.take().unwrap_or_default();
        settled.into_iter().filter_map(|id| Some((id, self.told.get(&id)?.clone()))).collect()
    }

    /// The next report, if none is under way and there is news.
    pub(crate) fn next(
        &mut self,
        observed: impl Fn(SandboxId) -> Option<Observed>,
    ) -> Option<Effect> {
        let session = self.session?;
        if self.under_way.is_some() {
            return None;
        }
        let mut news = Vec::new();
        while news.len() < REPORT_MAX {
            let Some(id) = self.dirty.pop_first() else { break };
            let Some(fact) = observed(id) else { continue };
            if self.told.get(&id) != Some(&fact) {
                self.told.insert(id, fact.clone());
                news.push((id, fact));
            }
        }
        if news.is_empty() {
            return None;
        }
        self.sequence += 1;
        let (ids, observed) = news.into_iter().unzip();
        self.under_way = Some(ids);
        Some(Effect::Report { session, sequence: self.sequence, observed })
    }
}
