//! The laptop's background process, one per user: it holds what must go on between two `tow`s, so
//! that the second one finds a warm link and a ticket.
//!
//! Reading order: `place.rs` (where its socket is), `client.rs` (how `tow` reaches and starts it),
//! `server.rs` (accepting, idleness, leaving), `request.rs` (one stream from open to end),
//! `clusters.rs`, `tickets.rs`, `links.rs`, `ports.rs` (what listens on the laptop). It decides nothing about sandboxes and keeps no state that its death
//! would lose: streams are taken up again by their two ends, ports from a file.

pub mod client;
mod clusters;
mod copy;
mod descriptors;
mod failure;
mod links;
pub mod place;
mod ports;
mod request;
mod server;
mod tickets;

pub use failure::DaemonFailure;
pub use server::run;

/// What `tow` and its daemon compare: another version is asked to leave and replaced.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
