//! The guest's side of the network against a node that the test plays: over a made-up wire, and, as
//! root, over a real TUN device with this machine's own TCP as the workload.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should say where"
)]

mod node;
mod tun;
mod wire;
