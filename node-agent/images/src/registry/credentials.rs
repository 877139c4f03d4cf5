//! What a user logs in to a registry with. Never printed, never written anywhere.

use std::fmt;

/// A password or an identity token, for one pull.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password, or what a registry takes for one.
    Basic {
        /// Who.
        username: String,
        /// The secret.
        password: String,
    },
    /// An OAuth2 refresh token, good for a token service only.
    Identity(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credentials::Basic { .. } => "Credentials::Basic(redacted)",
            Credentials::Identity(_) => "Credentials::Identity(redacted)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_them_is_printed() {
        let basic = Credentials::Basic { username: "alice".into(), password: "s3cret".into() };
        let shown = format!("{basic:?} {:?}", Credentials::Identity("s3cret".into()));
        assert!(!shown.contains("s3cret") && !shown.contains("alice"), "{shown}");
    }
}
