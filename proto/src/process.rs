//! What the node agent hands the guest agent that it starts as process 1 of a `process` sandbox:
//! how it is named, which descriptors it finds, and its setup, on one of them.
//!
//! Both are of one release and one machine; nothing here crosses a network.

use prost::Message;

/// `argv[0]` by which the guest agent knows that it is to make a sandbox on this kernel.
pub const PROCESS_NAME: &str = "towline-process-sandbox";
/// Where it finds its [`ProcessSetup`], a file.
pub const SETUP_FD: i32 = 3;
/// Where it finds the guest link's listening socket.
pub const LINK_FD: i32 = 4;
/// Where it finds a pipe: one byte means go on; its end, that the node agent is gone.
pub const GATE_FD: i32 = 5;

/// What a sandbox is made of.
#[derive(Clone, PartialEq, Message)]
pub struct ProcessSetup {
    /// An empty place that exists, absolute: the sandbox's root is mounted there, for its own
    /// mount namespace only.
    #[prost(bytes = "vec", tag = "1")]
    pub place: Vec<u8>,
    /// Squashfs files, or folders of their content, the lowest first.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub layers: Vec<Vec<u8>>,
    /// An ext4 file, or a folder.
    #[prost(bytes = "vec", tag = "3")]
    pub upper: Vec<u8>,
    /// The first of the host's ids that the sandbox's ids are; it makes the user namespace itself.
    /// Absent: it is in its user namespace already, and layers and upper are folders.
    #[prost(uint32, optional, tag = "4")]
    pub first_id: Option<u32>,
    /// The seccomp filter: `struct sock_filter`s.
    #[prost(bytes = "vec", tag = "5")]
    pub filter: Vec<u8>,
}

/// How many ids a sandbox has.
pub const IDS: u32 = 65_536;
