//! What of the messages must not be printed: their `Debug` says only that there is something.
//!
//! The generator leaves `Debug` of these messages out (`SECRET` in `tests/tidy/src/lib.rs`).

use std::fmt;

use crate::v1::RegistryCredentials;

impl fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegistryCredentials(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::ImagePullOpen;

    #[test]
    fn credentials_are_not_printed() {
        let credentials = RegistryCredentials {
            username: "alice".into(),
            password: "s3cret".into(),
            identity_token: "t0ken".into(),
        };
        let open = ImagePullOpen { credentials: Some(credentials), ..Default::default() };
        let shown = format!("{open:?}");
        assert!(shown.contains("redacted"), "{shown}");
        for secret in ["alice", "s3cret", "t0ken"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}
