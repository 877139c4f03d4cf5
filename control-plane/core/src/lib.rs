//! The control plane's decisions, sans-IO: raft, replicated state, placement, liveness, reconcile.
//!
//! ```text
//!            Input ──▶ step ──▶ propose ─▶ raft ─▶ Persist ──▶ (driver's disk)
//!  (driver's clock,      │                  │◀──── Persisted ◀──────┘
//!   sockets, disk)       │                  ▼ committed
//!            Effect ◀────┴── answers ◀── apply to State ──▶ node sessions, watches
//! ```
//! Left to the driver: disk, sockets, clocks, randomness (it gives a seed). The invariant: nothing
//! is answered or told to a node before the log entry that decided it is committed.

pub mod command;
pub mod input;
pub mod invariants;
pub mod placement;
pub mod planted;
pub mod refusal;
pub mod resources;
pub mod snapshot;
pub mod state;
pub mod wal;

mod admission;
mod control_plane;
mod liveness;
mod names;
mod proposals;
mod random;
mod reads;
mod reconcile;
mod replica;
mod storage;
mod watch;

pub use control_plane::{Config, ControlPlane, Recovered};
pub use input::{Answer, Caller, Effect, Input, Now, Request, RequestId, Role, SessionId, WatchId};
pub use refusal::{Refusal, RefusalKind};
pub use state::State;
