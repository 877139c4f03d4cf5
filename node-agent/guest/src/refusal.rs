//! Why the guest agent refuses or breaks a stream: a code for programs, a sentence for people.
//!
//! Everything that can fail on behalf of a client ends here, so that each error frame says what was
//! wrong and what to do next.

use std::io;

use rustix::io::Errno;
use towline_proto::v1::{StreamError, StreamErrorCode};

/// A refusal, as it goes over the stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Decides what a program does.
    pub code: StreamErrorCode,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal with this code.
    pub fn new(code: StreamErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What the client sent is not allowed.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StreamErrorCode::Invalid, message)
    }

    /// Something that should work did not: `what` names it, the code comes from the error's cause.
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        let code = match Errno::from_io_error(error) {
            Some(Errno::NOSPC | Errno::DQUOT) => StreamErrorCode::NoSpace,
            Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE) => {
                StreamErrorCode::Limit
            }
            _ => StreamErrorCode::Internal,
        };
        Self::new(code, format!("{what}: {error}"))
    }

    /// The message of an ERROR frame.
    pub fn to_message(&self) -> StreamError {
        StreamError { code: self.code.into(), message: self.message.clone() }
    }
}
