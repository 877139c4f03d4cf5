//! Both cores under one seed: members on disks that lose writes, node agents, clients, a network
//! that loses, delays and cuts. Invariants are checked after every event.
//!
//! `run` plays one seed to its end: faults for a while, then peace, then everything acknowledged
//! must be there once, and every node must have what is wanted of it. The same seed gives the same
//! `trace`. No tokio, no clock, no threads. Planted bugs prove that the checkers catch them.

mod client;
mod disk;
mod event;
mod member;
mod node;
mod rng;
mod world;

pub use world::{Bug, Failure, Report, Setup, run};
