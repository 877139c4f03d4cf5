//! What was answered to a request with an idempotency key, so that repeating it does nothing more.
//! Only what was done is kept: a refusal changed nothing and is decided anew. Entries expire by
//! replicated time.

use std::collections::{BTreeMap, BTreeSet};

use towline_proto::ids::TokenId;
use towline_proto::v1::{self, DedupRecord, Idempotency, Outcome, outcome};

use super::Done;
use crate::planted;
use crate::refusal::{Refusal, RefusalKind};

/// How long an answer is kept. Clients give up on a request long before.
pub const DEDUP_LIFE_MS: u64 = 3600 * 1000;
/// Most answers kept; beyond it those that would expire first go early.
pub const DEDUP_MAX: usize = 200_000;

type Key = (String, Vec<u8>);

/// Answers by (caller, key).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dedup {
    by_key: BTreeMap<Key, DedupRecord>,
    by_expiry: BTreeSet<(u64, Key)>,
}

impl Dedup {
    /// The answer that the key's first request got; an error if this is another request.
    pub fn earlier(&self, key: &Idempotency) -> Option<Result<Done, Refusal>> {
        if planted::dedup_skipped() {
            return None;
        }
        let record = self.by_key.get(&(key.caller.clone(), key.key.clone()))?;
        if record.fingerprint != key.fingerprint {
            return Some(Err(Refusal::new(
                RefusalKind::Invalid,
                "this idempotency key was used for another request: use a fresh key for each",
            )));
        }
        Some(Ok(from_outcome(record.outcome.as_ref())))
    }

    /// All, in order of caller and key.
    pub fn iter(&self) -> impl Iterator<Item = &DedupRecord> {
        self.by_key.values()
    }

    /// When the first entry expires.
    pub fn next_expiry_ms(&self) -> Option<u64> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    pub(super) fn remember(&mut self, key: &Idempotency, done: &Done, now_ms: u64) {
        let Some(outcome) = to_outcome(done) else { return };
        self.insert(DedupRecord {
            caller: key.caller.clone(),
            key: key.key.clone(),
            fingerprint: key.fingerprint,
            expires_ms: now_ms.saturating_add(DEDUP_LIFE_MS),
            outcome: Some(outcome),
        });
        while self.by_key.len() > DEDUP_MAX {
            let Some((_, first)) = self.by_expiry.pop_first() else { break };
            self.by_key.remove(&first);
        }
    }

    pub(crate) fn insert(&mut self, record: DedupRecord) {
        let key = (record.caller.clone(), record.key.clone());
        self.by_expiry.insert((record.expires_ms, key.clone()));
        self.by_key.insert(key, record);
    }

    pub(super) fn expire(&mut self, now_ms: u64) {
        while let Some((at, _)) = self.by_expiry.first() {
            if *at > now_ms {
                break;
            }
            if let Some((_, key)) = self.by_expiry.pop_first() {
                self.by_key.remove(&key);
            }
        }
    }
}

fn to_outcome(done: &Done) -> Option<Outcome> {
    let what = match done {
        Done::Sandbox(sandbox) => outcome::What::Sandbox((**sandbox).clone()),
        Done::Image(image) => outcome::What::Image(image.clone()),
        Done::Token(id) => outcome::What::TokenId(id.to_vec()),
        Done::Forked(sandboxes) => {
            outcome::What::Forked(v1::ForkSandboxResponse { sandboxes: sandboxes.clone() })
        }
        Done::Nothing => outcome::What::Done(true),
        Done::Admitted { .. } | Done::Node { .. } => return None,
    };
    Some(Outcome { what: Some(what) })
}

fn from_outcome(outcome: Option<&Outcome>) -> Done {
    match outcome.and_then(|outcome| outcome.what.clone()) {
        Some(outcome::What::Sandbox(sandbox)) => Done::Sandbox(Box::new(sandbox)),
        Some(outcome::What::Image(image)) => Done::Image(image),
        Some(outcome::What::TokenId(id)) => {
            TokenId::try_from(id.as_slice()).map_or(Done::Nothing, Done::Token)
        }
        Some(outcome::What::Forked(forked)) => Done::Forked(forked.sandboxes),
        Some(outcome::What::Done(_)) | None => Done::Nothing,
    }
}
