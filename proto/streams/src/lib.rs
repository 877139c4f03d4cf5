//! Async adaptors of the sans-IO framing and multiplexer, for both ends of every stream.
//!
//! Used by `towline-link` (QUIC) and by the guest agent (guest link), which may know tokio but not
//! QUIC, TLS or gRPC. Decides nothing.

mod archive;
mod framed;
mod listener;
mod mux;
mod pipe;
mod port;
mod splice;

pub use archive::{ArchiveReader, ArchiveWriter, archive_reader, archive_writer};
pub use framed::{FrameReader, FrameWriter};
pub use listener::{Accept, LinkListener};
pub use mux::{GuestSession, GuestSessions, Incoming, MuxDriver, MuxHandle, MuxRecv, MuxSend};
pub use pipe::{Attachment, Memory, Over, Pipe, Socket};
pub use port::Port;
pub use splice::splice;
pub use towline_proto::mux::preamble::{Marker, Nonce};
pub use towline_proto::mux::{MuxError, Priority};
