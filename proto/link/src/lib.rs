//! How Towline's messages are carried and by whom: identity, TLS, QUIC, tonic services, retry.
//!
//! Leaves out what is said (`towline-proto`) and what is decided (the two cores). The invariant:
//! nobody is spoken to whose certificate the cluster's own CA did not issue.

pub mod authority;
pub mod endpoint;
pub mod enroll;
pub mod identity;
pub mod peer;
pub mod retry;
pub mod rpc;
pub mod status;
pub mod stream;
pub mod telemetry;
pub mod ticket;
pub mod tls;

/// Services generated from `proto/schema`; `tests/tidy` checks that they are current.
#[allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
#[path = "generated/towline.v1.rs"]
pub mod rpc_generated;
