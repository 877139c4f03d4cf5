//! What the Raft log carries: batches of commands with a version. A member that meets a version it
//! does not know halts; skipping would make its state differ from the others'.

use bytes::Bytes;
use prost::Message;
use towline_proto::v1::{Command, CommandBatch, command::What};

/// Version of batches that this build writes, and the newest that it applies.
pub const VERSION: u32 = 1;

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
    CommandBatch { version: VERSION, now_ms, commands }.encode_to_vec().into()
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
    fn a_command_of_an_unknown_kind_halts() {
        let batch = CommandBatch {
            version: VERSION,
            now_ms: 1,
            commands: vec![Command { idempotency: None, what: None }],
        };
        assert_eq!(decode(3, &batch.encode_to_vec()), Err(Halt::Command { index: 3 }));
    }
}
