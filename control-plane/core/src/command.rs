//! What the Raft log carries: batches of commands with a version. A member that meets a version it
//! does not know halts; skipping would make its state differ from the others'.

use bytes::Bytes;
use prost::Message;
use towline_proto::v1::{Command, CommandBatch, Desired, command::What};

/// The newest version of batches that this build writes and applies. A batch is written with the
/// oldest version that has all that it holds, so that what is new halts members of an older build
/// only once it is used.
///
/// 1: the first. 2: timeouts ([`What::SetExpiry`], `SandboxSpec.timeout_s`). 3: pauses and forks
/// ([`What::ForkSandbox`], `DESIRED_PAUSED`). 4: [`What::ResizeSandbox`].
pub const VERSION: u32 = 4;

/// Most commands in one log entry.
pub const BATCH_COMMANDS_MAX: usize = 1000;
/// Most bytes of commands in one log entry (a single larger command gets an entry of its own).
pub const BATCH_BYTES_MAX: usize = 512 << 10;

/// Why a member must stop applying its log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    /// Written by a newer build.
    #[error(
        "log entry {index} has command version {version}, and this build knows up to {VERSION}: \
         upgrade this member"
    )]
    Version {
        /// The entry.
        index: u64,
        /// Its version.
        version: u32,
    },
    /// A command of a kind that this build does not know.
    #[error("log entry {index} holds a command that this build does not know: upgrade this member")]
    Command {
        /// The entry.
        index: u64,
    },
    /// Not a batch at all.
    #[error("log entry {index} cannot be decoded: {reason}")]
    Decode {
        /// The entry.
        index: u64,
        /// What prost said.
        reason: String,
    },
    /// A snapshot of a newer layout, or a damaged one.
    #[error("the snapshot at {index} cannot be used: {reason}")]
    Snapshot {
        /// Its index.
        index: u64,
        /// Why.
        reason: String,
    },
}

/// Encodes commands as the data of one log entry.
pub fn encode(now_ms: u64, commands: Vec<Command>) -> Bytes {
    let version = commands.iter().map(version_of).max().unwrap_or(1);
    CommandBatch { version, now_ms, commands }.encode_to_vec().into()
}

/// The oldest version that has all of a command.
fn version_of(command: &Command) -> u32 {
    match &command.what {
        Some(What::ResizeSandbox(_)) => 4,
        Some(What::ForkSandbox(_)) => 3,
        Some(What::SetDesired(set)) if set.desired() == Desired::Paused => 3,
        Some(What::SetExpiry(_)) => 2,
        Some(What::CreateSandbox(create))
            if create.spec.as_ref().is_some_and(|spec| spec.timeout_s != 0) =>
        {
            2
        }
        _ => 1,
    }
}

/// Decodes and checks the data of one log entry.
pub fn decode(index: u64, data: &[u8]) -> Result<CommandBatch, Halt> {
    let batch = CommandBatch::decode(data)
        .map_err(|error| Halt::Decode { index, reason: error.to_string() })?;
    if batch.version == 0 || batch.version > VERSION {
        return Err(Halt::Version { index, version: batch.version });
    }
    if batch.commands.iter().any(|command| command.what.is_none()) {
        return Err(Halt::Command { index });
    }
    Ok(batch)
}

/// A command that no client asked for.
pub(crate) fn internal(what: What) -> Command {
    Command { idempotency: None, what: Some(what) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_version_halts() {
        let newer = CommandBatch { version: VERSION + 1, now_ms: 1, commands: vec![] };
        assert_eq!(
            decode(7, &newer.encode_to_vec()),
            Err(Halt::Version { index: 7, version: VERSION + 1 })
        );
        assert!(decode(7, b"\xff\xff").is_err());
    }

    #[test]
    fn what_is_new_and_nothing_else_asks_for_a_new_version() {
        let version = |what| {
            let data = encode(5, vec![internal(What::AdvanceTime(true)), internal(what)]);
            decode(1, &data).map(|batch| batch.version)
        };
        let create = |timeout_s| {
            let spec = towline_proto::v1::SandboxSpec { timeout_s, ..Default::default() };
            What::CreateSandbox(towline_proto::v1::CreateSandboxCommand {
                spec: Some(spec),
                ..Default::default()
            })
        };
        assert_eq!(version(create(0)), Ok(1));
        assert_eq!(version(create(60)), Ok(2));
        assert_eq!(version(What::SetExpiry(Default::default())), Ok(2));
        assert_eq!(version(What::ForkSandbox(Default::default())), Ok(3));
        assert_eq!(version(What::ResizeSandbox(Default::default())), Ok(4));
        let set = |desired: Desired| {
            let desired = desired.into();
            What::SetDesired(towline_proto::v1::SetDesiredCommand { desired, ..Default::default() })
        };
        assert_eq!(version(set(Desired::Stopped)), Ok(1));
        assert_eq!(version(set(Desired::Paused)), Ok(3));
    }

    #[test]
    fn a_command_of_an_unknown_kind_halts() {
        let batch = CommandBatch {
            version: VERSION,
            now_ms: 1,
            commands: vec![Command { idempotency: None, what: None }],
        };
        assert_eq!(decode(3, &batch.encode_to_vec()), Err(Halt::Command { index: 3 }));
    }
}
