//! Pulling an image from a registry and pushing one to it, by the OCI distribution specification and
//! what docker's registries do besides.
//!
//! In reading order: [`mod@reference`] is what was asked for, [`session`] talks to one registry
//! (`transport` sends, `reach` says whereto, `challenge` and `token` log in), [`manifest`] chooses
//! the image, [`blob`] fetches its parts, [`pull`] does all of it; [`upload`] sends a part, read by
//! [`content`], and [`push`] sends all of them and then the manifest. A registry is a stranger: all
//! that it says is bounded, checked against digests, and followed only where the registry itself
//! may be reached. Credentials go to the registry and to the token service that it names, to
//! nobody else, and are kept nowhere.

mod blob;
mod board;
mod challenge;
mod content;
mod credentials;
mod error;
mod manifest;
mod pace;
mod pull;
mod push;
mod push_error;
mod reach;
mod reference;
mod session;
mod token;
mod transport;
mod upload;

pub use credentials::Credentials;
pub use error::PullError;
pub use pace::Pace;
pub use pull::{PullRequest, Puller};
pub use push::{PushRequest, Pushed, Pusher};
pub use push_error::PushError;
pub use reach::Private;

pub(crate) use blob::begins_at;
pub(crate) use challenge::challenges;
pub(crate) use reference::names;
pub(crate) use session::words;
pub(crate) use upload::bytes_of;

/// Whether a text is a reference, for fuzzing.
pub(crate) fn parses(text: &str) -> bool {
    reference::Reference::parse(text).is_ok()
}
