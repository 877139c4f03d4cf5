//! How Towline's messages are carried and by whom: identity, TLS, QUIC, tonic services, retry.

/// Services generated from `proto/schema`; `tests/tidy` checks that they are current.
#[allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
#[path = "generated/towline.v1.rs"]
pub mod rpc_generated;
