//! Every size and time bound that two machines must agree on.

use std::time::Duration;

/// Version of the guest protocol (`GuestHello.protocol`, `FilesOpen.protocol`).
pub const GUEST_PROTOCOL: u32 = 1;

/// Largest body of a frame: 1 MiB of payload and room for a header of its own.
pub const FRAME_BODY_MAX: usize = (1 << 20) + 4096;

/// Payload of one STDIN, STDOUT or STDERR frame that a sender should not exceed, so that
/// interactive frames never wait behind a long one.
pub const DATA_CHUNK_MAX: usize = 64 << 10;

/// What a sender of a durable stream keeps until it is acknowledged, per direction and stream. Four
/// processes pass each byte on; on a small machine that also emulates the guest, an answer takes
/// tens of milliseconds.
pub const UNACKED_MAX: usize = 4 << 20;

/// Output of an exec that its client has written and not yet acknowledged stays below this: a guest
/// agent that is short of memory still keeps this much of each, or it would wait for ever.
pub const OUTPUT_ACK_STEP: usize = 256 << 10;

/// What a sender of a forwarded connection keeps until it is acknowledged, and what its receiver
/// grants ahead, per direction: a browser has hundreds of connections at once.
pub const TCP_WINDOW: usize = 1 << 20;
/// What may be sent before the first acknowledgement.
pub const TCP_FIRST_WINDOW: usize = 64 << 10;
/// The same bounds while memory is short.
pub const TCP_PRESSED_WINDOW: usize = 16 << 10;
/// First bytes that travel with the open of a forwarded connection.
pub const TCP_FIRST_BYTES_MAX: usize = 16 << 10;
/// Forwarded connections that a guest agent keeps at once, those of a lost link too.
pub const TCP_STREAMS_MAX: usize = 2048;

/// Output kept in memory for an exec that nobody is attached to, before its process is held.
pub const DETACHED_OUTPUT_MAX: usize = 8 << 20;

/// Spool on the sandbox's disk of a `-d` exec; older output is dropped beyond it.
pub const SPOOL_MAX: u64 = 256 << 20;

/// Arguments and environment of one exec together, as Linux bounds them.
pub const ARGV_ENV_MAX: usize = 2 << 20;

/// Execs (running or ended and not yet forgotten) that a guest agent keeps.
pub const EXECS_MAX: usize = 1024;

/// Streams that one guest link carries at once.
pub const GUEST_STREAMS_MAX: usize = 4096;

/// Components of a synced path, and bytes of one.
pub const PATH_DEPTH_MAX: usize = 128;
/// Bytes of one path component, as Linux bounds them.
pub const PATH_COMPONENT_MAX: usize = 255;

/// Longest life of a ticket.
pub const TICKET_LIFE_MAX: Duration = Duration::from_secs(600);

/// Life of a leaf certificate; it is renewed at half of it.
pub const LEAF_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A node's right to run what it was given, renewed by each heartbeat's answer.
pub const NODE_LEASE: Duration = Duration::from_secs(10);

/// How often a node says that it is alive.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// vCPUs of a sandbox that asked for none, on a node that has as many. A node keeps a template of
/// this shape.
pub const CPUS_DEFAULT: u32 = 4;
/// Memory of a sandbox that asked for none.
pub const MEMORY_DEFAULT_MIB: u64 = 2048;
