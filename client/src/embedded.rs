//! The embedded cluster: the fleet's own two binaries on this machine, supervised by `tow up`.
//!
//! ```text
//! tow up ── supervisor ──┬── towline-control-plane   (member/)
//!   (lock, own session)  └── towline-node-agent      (node/) ── QEMU… (sessions of their own)
//! ```
//! Leaves everything a cluster does to those binaries. One supervisor at a time, by a lock that
//! dies with it; the two children die with it too, VMs do not. So killing anything here is
//! harmless: the next `tow` finds the lock free and starts a supervisor that takes all up again.

mod child;
mod configs;
mod enrol;
mod layout;
mod lock;
mod ready;
mod start;
mod stop;
mod supervisor;

pub use enrol::renew_user;
pub use layout::Layout;
pub use lock::Holder;
pub use ready::{Health, health};
pub use start::{ensure_started, own_session, start_detached};
pub use stop::{Stopped, stop};
pub use supervisor::{Reporter, supervise};
