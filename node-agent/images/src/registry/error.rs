//! Why a pull failed, in words that say what was asked of whom and what to do next.

use std::time::Duration;

use super::reach::Class;
use crate::{Digest, ImageError};

/// An image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// What was asked for is no image reference.
    #[error("`{reference}` is not an image reference: {why}")]
    BadReference {
        /// What was typed.
        reference: String,
        /// What is wrong with it.
        why: String,
    },
    /// The host has no address, or only such as may not be connected to.
    #[error("{host} is not asked: its address is {what}{hint}")]
    Blocked {
        /// Which host.
        host: String,
        /// What kind of address.
        what: String,
        /// What would allow it.
        hint: &'static str,
    },
    /// No connection, or it broke.
    #[error("could not reach the registry {host}")]
    Unreachable {
        /// Which host.
        host: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host's name is unknown.
    #[error("could not find the address of the registry {host}")]
    UnknownHost {
        /// Which host.
        host: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The registry's certificate is not trusted.
    #[error(
        "the certificate of {host} is not trusted by this node; install its authority's \
         certificate there (update-ca-certificates)"
    )]
    Certificate {
        /// Which host.
        host: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No certificate authorities are installed.
    #[error("this node trusts no certificate authority: install the package ca-certificates")]
    NoRoots,
    /// It took too long.
    #[error("{host} is too slow: {what}")]
    Slow {
        /// Which host.
        host: String,
        /// What was waited for.
        what: &'static str,
    },
    /// The registry wants a login, or another one.
    #[error("{}", unauthorized(.registry, *.with_credentials, .said))]
    Unauthorized {
        /// Which registry, as docker login names it.
        registry: String,
        /// Credentials were shown.
        with_credentials: bool,
        /// The registry's own words.
        said: String,
    },
    /// The image is not there.
    #[error("{registry} has no {what}{said}")]
    NotFound {
        /// Which registry.
        registry: String,
        /// What.
        what: String,
        /// The registry's own words.
        said: String,
    },
    /// The registry wants fewer requests.
    #[error(
        "{host} wants fewer requests{}{said}; being logged in (`docker login`) may raise its limit",
        again(.retry_after)
    )]
    TooMany {
        /// Which host.
        host: String,
        /// How long to wait.
        retry_after: Option<Duration>,
        /// The registry's own words.
        said: String,
    },
    /// Another answer than was hoped for.
    #[error("{host} answered {status} to the request for {what}{said}")]
    Status {
        /// Which host.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// The registry's own words.
        said: String,
    },
    /// An answer that the protocol does not know.
    #[error("{host} does not answer as a registry does: {why}")]
    Protocol {
        /// Which host.
        host: String,
        /// What is wrong.
        why: String,
    },
    /// The connection ended in the middle of a blob.
    #[error("{host} ended the transfer of {what} after {got} of {size} bytes")]
    Cut {
        /// Which host.
        host: String,
        /// What was transferred.
        what: String,
        /// Bytes that came.
        got: u64,
        /// Bytes that should.
        size: u64,
    },
    /// A manifest is not what it was named by.
    #[error("{host} sent something else than {expected}: it is {found}")]
    WrongDigest {
        /// Which host.
        host: String,
        /// The digest that was promised.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// Another pull has the same blob and neither ends nor gets anywhere.
    #[error("another pull of {what} makes no progress; try again when it has ended")]
    Waited {
        /// Which blob.
        what: String,
    },
    /// The image itself, or the node's disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A task of ours ended early.
    #[error("it was interrupted")]
    Interrupted,
}

fn unauthorized(registry: &str, with_credentials: bool, said: &str) -> String {
    if with_credentials {
        return format!(
            "{registry} does not accept the credentials of this user's docker configuration{said}: \
             renew them with `docker login {registry}`"
        );
    }
    format!(
        "{registry} wants a login, or has no such image{said}: `docker login {registry}` or \
         `podman login {registry}` stores one"
    )
}

fn again(after: &Option<Duration>) -> String {
    after.map_or_else(String::new, |after| format!(" (again in {} s)", after.as_secs()))
}

impl PullError {
    /// Whether trying again may help, and how long the registry wants waited.
    pub(crate) fn passing(&self) -> Option<Option<Duration>> {
        match self {
            PullError::TooMany { retry_after, .. } => Some(*retry_after),
            PullError::Status { status: 408 | 500..=599, .. }
            | PullError::Unreachable { .. }
            | PullError::Slow { .. }
            | PullError::Cut { .. } => Some(None),
            PullError::Status { .. }
            | PullError::BadReference { .. }
            | PullError::Blocked { .. }
            | PullError::UnknownHost { .. }
            | PullError::Certificate { .. }
            | PullError::NoRoots
            | PullError::Unauthorized { .. }
            | PullError::NotFound { .. }
            | PullError::Protocol { .. }
            | PullError::WrongDigest { .. }
            | PullError::Waited { .. }
            | PullError::Image(_)
            | PullError::Interrupted => None,
        }
    }

    pub(crate) fn blocked(host: &str, class: Option<Class>, hint: &'static str) -> PullError {
        let what = match class {
            Some(class) => format!("{class}, and the registry is not"),
            None => "one that no registry has (link-local, metadata, multicast, reserved)".into(),
        };
        PullError::Blocked { host: host.to_owned(), what, hint }
    }
}
