//! A command in a guest that outlives every hop between it and us.
//!
//! `client.rs` decides (offsets, acknowledgements, resume; no IO), `driver.rs` carries (streams,
//! signals, time), `stdin.rs` and `output.rs` touch our own descriptors. Whatever breaks in
//! between, each byte of input and output passes exactly once.

mod client;
mod detach;
mod driver;
mod output;
mod signals;
mod stdin;

pub use client::{Event, ExecClient, How, Outgoing, ProtocolError, Stream};
pub use driver::{DialError, Dialer, Ended, Io, Verdict, Wire, run};
