//! tow: the laptop's side of Towline. It asks; what runs where is decided by the control plane.
//!
//! Reading order: `cli.rs` (what can be typed), `commands/` (one file per verb), `sandbox.rs`
//! (request, follow, result), `tunnel/` (bytes to and from a guest), `embedded.rs` (the cluster on
//! this machine), `daemon/` (what goes on after `tow` returned).

pub mod config;
pub mod env_vars;
pub mod nearest;
