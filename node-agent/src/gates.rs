//! Who may open streams to which sandbox now, and how the open ones are ended.
//!
//! The core decides, the tunnel asks. A lock is held only to look something up.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use towline_node_core::Gate;
use towline_proto::ids::SandboxId;
use towline_proto::v1::StreamErrorCode;

/// A stream that may not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// For programs.
    pub code: StreamErrorCode,
    /// For people.
    pub message: String,
}

impl Refused {
    /// A refusal.
    pub fn new(code: StreamErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// All sandboxes' gates.
#[derive(Debug, Default)]
pub struct Gates {
    gates: Mutex<BTreeMap<SandboxId, Entry>>,
}

#[derive(Debug)]
struct Entry {
    gate: Gate,
    /// Dropped to end the streams that were let in.
    open: Option<watch::Sender<()>>,
}

/// Held by an open stream.
#[derive(Debug)]
pub struct Pass(watch::Receiver<()>);

impl Pass {
    /// Waits until the stream must end.
    pub async fn revoked(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

impl Gates {
    /// Does what the core decided.
    pub fn set(&self, sandbox: SandboxId, gate: Gate) {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let old = gates.remove(&sandbox).and_then(|entry| entry.open);
        let open = match &gate {
            // Streams that were let in before a pause go on after it.
            Gate::Open { .. } => Some(old.unwrap_or_default()),
            Gate::Closing { .. } => old,
            Gate::Shut { .. } => None,
        };
        gates.insert(sandbox, Entry { gate, open });
    }

    /// Forgets a sandbox that is gone.
    pub fn forget(&self, sandbox: SandboxId) {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).remove(&sandbox);
    }

    /// Lets a stream in that shows a ticket of this epoch.
    pub fn enter(&self, sandbox: SandboxId, epoch: u64) -> Result<Pass, Refused> {
        self.let_in(sandbox, Some(epoch))
    }

    /// Lets a stream in that the sandbox's own guest opened.
    pub fn enter_running(&self, sandbox: SandboxId) -> Result<Pass, Refused> {
        self.let_in(sandbox, None)
    }

    fn let_in(&self, sandbox: SandboxId, epoch: Option<u64>) -> Result<Pass, Refused> {
        let gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let not_running = |reason: &str| {
            let message = format!("the sandbox is not running on this node: {reason}");
            Err(Refused::new(StreamErrorCode::NotRunning, message))
        };
        match gates.get(&sandbox) {
            None => not_running("it is not ready, or not here"),
            Some(Entry { gate: Gate::Closing { reason } | Gate::Shut { reason }, .. }) => {
                not_running(reason)
            }
            Some(Entry { gate: Gate::Open { epoch: current }, open }) => match (epoch, open) {
                (Some(epoch), _) if *current != epoch => {
                    let message =
                        format!("the ticket is of epoch {epoch}, the sandbox of {current}");
                    Err(Refused::new(StreamErrorCode::Ticket, message))
                }
                (_, Some(open)) => Ok(Pass(open.subscribe())),
                (_, None) => not_running("it is being shut"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn streams_live_through_closing_and_end_when_shut() {
        let (gates, id) = (Gates::default(), SandboxId::from_bytes([1; 16]));
        assert_eq!(gates.enter(id, 1).unwrap_err().code, StreamErrorCode::NotRunning);
        gates.set(id, Gate::Open { epoch: 2 });
        assert_eq!(gates.enter(id, 1).unwrap_err().code, StreamErrorCode::Ticket);
        let pass = gates.enter(id, 2).unwrap();
        let mut revoked = tokio::spawn(pass.revoked());
        gates.set(id, Gate::Closing { reason: "being stopped".into() });
        assert!(gates.enter(id, 2).unwrap_err().message.contains("being stopped"));
        tokio::task::yield_now().await;
        assert!(!revoked.is_finished());
        gates.set(id, Gate::Open { epoch: 2 });
        tokio::task::yield_now().await;
        assert!(!revoked.is_finished(), "it was paused and goes on");
        gates.set(id, Gate::Shut { reason: "stopped".into() });
        (&mut revoked).await.unwrap();
    }
}
