//! Why the daemon did not open a stream, as `tow` is told: what happened, what to type next, and
//! whether trying again may help.

use towline_link::endpoint::LinkError;
use towline_link::status::RpcError;
use towline_proto::v1::{DaemonError, StreamErrorCode};

use crate::session::SessionError;

/// A refusal or failure, on both sides of the daemon's socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DaemonFailure {
    /// What happened.
    pub message: String,
    /// What to type next; may be empty.
    pub hint: String,
    /// Trying again may help.
    pub retry: bool,
    /// What a program goes by.
    pub code: StreamErrorCode,
}

impl DaemonFailure {
    /// Something that trying again does not mend.
    pub(crate) fn new(code: StreamErrorCode, message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: String::new(), retry: false, code }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StreamErrorCode::Invalid, message)
    }

    /// Something that may pass.
    pub(crate) fn passing(message: impl Into<String>) -> Self {
        Self { retry: true, ..Self::new(StreamErrorCode::Internal, message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The control plane could not be asked, or said no.
    pub(crate) fn from_control_plane(endpoint: &str, error: RpcError) -> Self {
        match error {
            RpcError::Unreachable(reason) => {
                Self::passing(format!("the control plane at {endpoint} does not answer: {reason}"))
                    .hint("tow status")
            }
            RpcError::Busy { reason, .. } => Self::passing(reason),
            RpcError::NotFound(reason) => Self::invalid(reason).hint("tow ls"),
            RpcError::Refused { reason } => Self::new(StreamErrorCode::NotRunning, reason),
            RpcError::Invalid(reason) => Self::invalid(reason),
            RpcError::Unauthenticated(reason) => Self::new(
                StreamErrorCode::Ticket,
                format!("the control plane refuses us: {reason}"),
            ),
            RpcError::Internal(reason) => {
                Self::new(StreamErrorCode::Internal, format!("the control plane failed: {reason}"))
            }
        }
    }
}

impl From<LinkError> for DaemonFailure {
    fn from(error: LinkError) -> Self {
        let source = std::error::Error::source(&error).map(|e| format!(": {e}"));
        Self::passing(format!("{error}{}", source.unwrap_or_default())).hint("tow status")
    }
}

impl From<SessionError> for DaemonFailure {
    fn from(error: SessionError) -> Self {
        let source = std::error::Error::source(&error).map(|e| format!(": {e}"));
        Self::new(StreamErrorCode::Internal, format!("{error}{}", source.unwrap_or_default()))
            .hint("tow up")
    }
}

impl From<DaemonFailure> for DaemonError {
    fn from(failure: DaemonFailure) -> Self {
        Self {
            message: failure.message,
            hint: failure.hint,
            retry: failure.retry,
            code: failure.code.into(),
        }
    }
}

impl From<DaemonError> for DaemonFailure {
    fn from(error: DaemonError) -> Self {
        let code = error.code();
        Self { message: error.message, hint: error.hint, retry: error.retry, code }
    }
}
