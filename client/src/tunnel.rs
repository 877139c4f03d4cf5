//! Bytes between this machine and a guest, by way of the daemon: commands, terminals and connections.
//!
//! The daemon and the node only splice; the two ends of every protocol here are `tow` and the
//! guest agent. What a guest sends is checked here before it touches anything.

pub mod copy;
pub mod diff;
pub mod exec;
pub mod export;
pub mod feed;
pub mod files;
pub mod guest;
pub mod import;
pub mod pull;
pub mod push;
pub mod save;
pub mod tcp;
pub mod terminal;
pub mod tty;
