//! The node agent's decisions, sans-IO: which VM lives, what is reported, what is promised.
//!
//! ```text
//!   control plane ──▶ Input ─┐                       ┌─▶ Effect ──▶ disks, VMs, guests
//!   disks, VMs, guests ──────┼─▶ NodeAgent::step ────┤
//!   time ────────────────────┘                       └─▶ Effect ──▶ reports
//! ```
//! It does no IO, reads no clock and draws no random number. Reading order: `input`, `lifecycle`
//! (one sandbox), `agent` (all of them), `reports`, `capacity`, `invariants`; `ready` stands alone.

mod agent;
mod capacity;
mod input;
mod invariants;
mod lifecycle;
mod ready;
mod reports;

pub use agent::NodeAgent;
pub use capacity::Promised;
pub use input::{
    Assignment, AssignmentError, Effect, Failure, Fork, Found, FoundVm, Gate, Input, Record, Rest,
    Run, Session,
};
pub use invariants::{Watcher, check};
pub use lifecycle::bounds;
pub use ready::{Ready, ReadyEffect, ReadyId, ReadyKind};
