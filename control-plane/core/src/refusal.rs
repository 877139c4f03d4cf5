//! Why the control plane said no. The driver maps a kind to a status code and shows the message as
//! it is, so a message says what was wrong and what would change the answer.

use std::fmt;

/// What kind of no it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The request itself is wrong, whatever the state.
    Invalid,
    /// No such thing, or not the caller's.
    NotFound,
    /// A name or key is taken.
    AlreadyExists,
    /// The state does not allow it now.
    Precondition,
    /// No node has the room.
    Exhausted,
    /// The caller may not.
    Denied,
    /// This member does not lead; `leader` does, if known.
    NotLeader {
        /// Raft id of the leader, 0 if unknown.
        leader: u64,
    },
    /// Nothing was done, and it may work when tried again.
    Unavailable,
    /// It may or may not have been done; the same request with the same key tells.
    Unknown,
    /// The state changed between plan and commit; the core plans again.
    Raced,
}

/// A refusal with its reason, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind.
    pub kind: RefusalKind,
    /// What was wrong and what would change the answer.
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::NotFound, message)
    }

    pub(crate) fn precondition(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Precondition, message)
    }

    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Denied, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Unavailable, message)
    }

    pub(crate) fn unknown() -> Self {
        Self::new(
            RefusalKind::Unknown,
            "the leader changed before the outcome was known; repeat the request with the same key",
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}
