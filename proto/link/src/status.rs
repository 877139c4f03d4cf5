//! The vocabulary of errors between our processes, as gRPC statuses and back, with the text kept.
//!
//! A service turns its own error into an [`RpcError`] and that into a `tonic::Status`; a client
//! turns the status back. Only [`RpcError::may_retry`] decides whether to try again.

use std::time::Duration;

use tonic::{Code, Status};

const RETRY_AFTER: &str = "towline-retry-after-ms";

/// Why a call did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// Understood, and refused; the text says what would change that.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// Not now; the same call may succeed later.
    #[error("{reason}")]
    Busy {
        /// Why.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The caller did not prove who it is, or may not do this.
    #[error("{0}")]
    Unauthenticated(String),
    /// A fault on the other side.
    #[error("{0}")]
    Internal(String),
    /// No answer: the other side cannot be reached or went away. Whether the call was carried out
    /// is unknown, so only calls with an idempotency key are tried again.
    #[error("{0}")]
    Unreachable(String),
}

impl RpcError {
    /// A refusal.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into() }
    }

    /// Whether the same call may succeed later.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Busy { .. } | Self::Unreachable(_) => true,
            Self::NotFound(_)
            | Self::Refused { .. }
            | Self::Invalid(_)
            | Self::Unauthenticated(_)
            | Self::Internal(_) => false,
        }
    }
}

impl From<RpcError> for Status {
    fn from(error: RpcError) -> Self {
        let text = error.to_string();
        match error {
            RpcError::NotFound(_) => Status::not_found(text),
            RpcError::Refused { .. } => Status::failed_precondition(text),
            RpcError::Busy { retry_after, .. } => {
                let mut status = Status::resource_exhausted(text);
                let ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
                status.metadata_mut().insert(RETRY_AFTER, ms.into());
                status
            }
            RpcError::Invalid(_) => Status::invalid_argument(text),
            RpcError::Unauthenticated(_) => Status::unauthenticated(text),
            RpcError::Internal(_) => Status::internal(text),
            RpcError::Unreachable(_) => Status::unavailable(text),
        }
    }
}

impl From<Status> for RpcError {
    fn from(status: Status) -> Self {
        let text = text_of(&status);
        let retry_after = status
            .metadata()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_millis);
        match status.code() {
            Code::NotFound => Self::NotFound(text),
            Code::ResourceExhausted => match retry_after {
                Some(retry_after) => Self::Busy { reason: text, retry_after },
                None => Self::Refused { reason: text },
            },
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => {
                Self::Refused { reason: text }
            }
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => Self::Invalid(text),
            Code::Unauthenticated | Code::PermissionDenied => Self::Unauthenticated(text),
            Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => Self::Unreachable(text),
            Code::Internal | Code::Unknown | Code::DataLoss | Code::Ok => {
                // A connection that broke under a call is reported as Unknown or Internal, with
                // the transport's error as source; the other side's own words have none.
                if std::error::Error::source(&status).is_some() {
                    Self::Unreachable(text)
                } else {
                    Self::Internal(text)
                }
            }
        }
    }
}

/// The status's text; where a transport failed, with the causes that tonic hides behind it.
fn text_of(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let words = error.to_string();
        if !text.contains(&words) {
            text = if text.is_empty() { words } else { format!("{text}: {words}") };
        }
        source = error.source();
    }
    if text.is_empty() { format!("the call ended with {:?}", status.code()) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_the_wire() {
        let text = || "no node has 64 GiB free; the größte has 48 GiB".to_owned();
        for error in [
            RpcError::NotFound(text()),
            RpcError::Refused { reason: text() },
            RpcError::Busy { reason: text(), retry_after: Duration::from_millis(250) },
            RpcError::Invalid(text()),
            RpcError::Unauthenticated(text()),
            RpcError::Internal(text()),
            RpcError::Unreachable(text()),
        ] {
            let headers = Status::from(error.clone()).into_http::<()>().into_parts().0.headers;
            let status = Status::from_header_map(&headers).unwrap();
            assert_eq!(RpcError::from(status), error);
        }
    }
}
