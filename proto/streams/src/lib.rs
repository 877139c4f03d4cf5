//! Async adaptors of the sans-IO framing and multiplexer, for both ends of every stream.
//!
//! Used by `towline-link` (QUIC) and by the guest agent (guest link), which may know tokio but not
//! QUIC, TLS or gRPC. Decides nothing.
