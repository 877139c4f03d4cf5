//! All that can enter or leave the core.

use towline_proto::ids::TokenId;
use towline_proto::v1;

use crate::refusal::Refusal;

/// The driver's clocks, read once per input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Never goes back.
    pub mono_ms: u64,
    /// Only written into the log, where it is made never to go back.
    pub unix_ms: u64,
}

/// The driver's number of a waiting caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// The driver's number of a node's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// The driver's number of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(pub u64);

/// As what a caller proved itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Sees and changes what is its own.
    User,
    /// Sees and changes all.
    Operator,
    /// Reports what it runs.
    Node,
    /// Has proved nothing yet (it brings a join token).
    Stranger,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// As what.
    pub role: Role,
    /// Name in the certificate.
    pub name: String,
}

/// What a caller asks.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "few are held at once, each is moved a few times")]
pub enum Request {
    /// Admit, place and reserve.
    CreateSandbox(v1::CreateSandboxRequest),
    /// Start, pause, stop, delete.
    SetDesired(v1::SetDesiredRequest),
    /// Copy a running one.
    ForkSandbox(v1::ForkSandboxRequest),
    /// When to stop it.
    SetExpiry(v1::SetExpiryRequest),
    /// CPUs and memory of the next start.
    ResizeSandbox(v1::ResizeSandboxRequest),
    /// One by id or name.
    GetSandbox(v1::GetSandboxRequest),
    /// Pages of the caller's.
    ListSandboxes(v1::ListSandboxesRequest),
    /// What a ticket needs to say; the driver signs it.
    IssueTicket(v1::IssueTicketRequest),
    /// Name an image.
    PutImage(v1::PutImageRequest),
    /// All images.
    ListImages,
    /// Forget a name.
    DeleteImage(v1::DeleteImageRequest),
    /// All nodes.
    ListNodes,
    /// How the group is.
    ClusterStatus,
    /// A join token; the driver made id and secret.
    CreateToken {
        /// As asked.
        request: v1::CreateTokenRequest,
        /// Used unless the key was seen before.
        id: TokenId,
        /// Digest of the secret.
        secret_sha256: Vec<u8>,
    },
    /// Forget a token.
    RevokeToken(v1::RevokeTokenRequest),
    /// Let somebody in by a token.
    UseToken(v1::UseTokenCommand),
}

/// What the core answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// One sandbox.
    Sandbox(Box<v1::Sandbox>),
    /// Copies that were made.
    Forked(Vec<v1::Sandbox>),
    /// A page of them.
    Sandboxes(v1::ListSandboxesResponse),
    /// What to put into a ticket.
    Ticket {
        /// Absent: for the node's image store.
        sandbox: Option<Box<v1::Sandbox>>,
        /// Where.
        node: Box<v1::Node>,
        /// To remove all images but these from the node's image store, and for nothing else.
        keep: Option<Vec<String>>,
    },
    /// One image.
    Image(v1::Image),
    /// All images.
    Images(Vec<v1::Image>),
    /// All nodes.
    Nodes(Vec<v1::Node>),
    /// How the group is; the driver adds its version.
    Status(v1::ClusterStatus),
    /// The token that was made, now or by the key's first request.
    Token(TokenId),
    /// Let in.
    Admitted {
        /// As what.
        role: v1::TokenRole,
        /// To which project.
        project: String,
    },
    /// It was done.
    Done,
}

/// What enters.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// 100 ms went by.
    Tick,
    /// Several at once; their commands share log entries.
    Batch(Vec<Input>),
    /// A caller asks.
    Request(RequestId, Caller, Request),
    /// All `Persist` and `InstallSnapshot` up to this number are on disk.
    Persisted(u64),
    /// The snapshot of `SaveSnapshot` at this index is on disk.
    SnapshotSaved(u64),
    /// From another member.
    Received(v1::RaftMessage),
    /// Whether a snapshot reached a member.
    SnapshotSent {
        /// The member.
        to: u64,
        /// Whether it did.
        arrived: bool,
    },
    /// A node's session begins; the name is that of its certificate.
    OpenSession(SessionId, v1::RegisterNode),
    /// A node lives.
    Heartbeat(SessionId, v1::Heartbeat),
    /// A node saw something.
    Observed(SessionId, v1::ObservedBatch),
    /// A node's session ended.
    CloseSession(SessionId),
    /// Somebody wants to see each change of a sandbox.
    Watch(WatchId, Caller, v1::GetSandboxRequest),
    /// Nobody does any more.
    Unwatch(WatchId),
}

/// What leaves. The driver does them in order; nothing else may touch disk or network for raft.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write, sync if asked, then say `Persisted(number)`.
    Persist {
        /// Of this write; they are acknowledged in order.
        number: u64,
        /// Replace what the log has from the first one's index on.
        entries: Vec<v1::LogEntry>,
        /// Term, vote and commit.
        hard_state: Option<v1::HardState>,
        /// Whether it must be on disk before it is acknowledged.
        sync: bool,
    },
    /// Replace log and state by this snapshot, then say `Persisted(number)`.
    InstallSnapshot {
        /// As in `Persist`.
        number: u64,
        /// What to write.
        snapshot: v1::SnapshotRecord,
        /// Term, vote and commit to keep with it.
        hard_state: v1::HardState,
        /// Entries that follow it.
        entries: Vec<v1::LogEntry>,
    },
    /// Write a snapshot beside the log, then say `SnapshotSaved(index)`.
    SaveSnapshot(v1::SnapshotRecord),
    /// Log entries up to this index are not needed any more.
    Compact(u64),
    /// To other members.
    Send(Vec<v1::RaftMessage>),
    /// To a caller.
    Answer(RequestId, Result<Answer, Refusal>),
    /// To a node, in order.
    Directives(SessionId, Vec<v1::NodeDirective>),
    /// The session is over.
    EndSession(SessionId, Refusal),
    /// To a watcher; only the newest counts.
    WatchUpdate(WatchId, Box<v1::Sandbox>),
    /// The watch is over: the sandbox is gone, or why not.
    WatchEnd(WatchId, Option<Refusal>),
    /// This member must stop; the message says what to do.
    Halt(String),
}
