//! Why a push failed, where that is something else than for a pull.

use super::error::PullError;
use super::reference::Reference;
use crate::{Digest, ImageError};

/// An image could not be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// What a pull may meet as well: the reference, the way there, the image here.
    #[error(transparent)]
    Registry(#[from] PullError),
    /// The registry wants a login, or another one.
    #[error("{}", unauthorized(.registry, .repository, *.with_credentials, .said))]
    Unauthorized {
        /// Which registry, as docker login names it.
        registry: String,
        /// Where the image should go.
        repository: String,
        /// Credentials were shown.
        with_credentials: bool,
        /// The registry's own words.
        said: String,
    },
    /// There is nothing to write to.
    #[error(
        "{registry} has no repository {repository} that this login may write{said}: make it there, \
         or push under another name"
    )]
    NoRepository {
        /// Which registry.
        registry: String,
        /// Where the image should go.
        repository: String,
        /// The registry's own words.
        said: String,
    },
    /// The registry names the image by something else than its digest.
    #[error(
        "{host} keeps something else than it was sent: it names the image {found}, not {expected}"
    )]
    OtherDigest {
        /// Which host.
        host: String,
        /// The image's digest.
        expected: Digest,
        /// What the registry says.
        found: String,
    },
    /// Where it should go names another image.
    #[error("an image cannot be pushed as {named}: its digest is {digest}; push it under a tag")]
    NamedByDigest {
        /// What was asked for.
        named: Digest,
        /// The image's digest.
        digest: Digest,
    },
}

fn unauthorized(registry: &str, repository: &str, with_credentials: bool, said: &str) -> String {
    if with_credentials {
        return format!(
            "{registry} does not let this user's docker configuration write to \
             {repository}{said}: `docker login {registry}` stores another login"
        );
    }
    format!(
        "{registry} wants a login to write to {repository}{said}: `docker login {registry}` or \
         `podman login {registry}` stores one"
    )
}

impl From<ImageError> for PushError {
    fn from(error: ImageError) -> PushError {
        PushError::Registry(error.into())
    }
}

impl PushError {
    /// Says what a registry's answer means for a push.
    pub(crate) fn of(to: &Reference, error: PullError) -> PushError {
        let repository = to.repository.clone();
        match error {
            PullError::Unauthorized { registry, with_credentials, said } => {
                PushError::Unauthorized { registry, repository, with_credentials, said }
            }
            PullError::NotFound { registry, said, .. } => {
                PushError::NoRepository { registry, repository, said }
            }
            error => PushError::Registry(error),
        }
    }
}
