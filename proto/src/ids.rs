//! Every id type, with its printed prefix. An id is 16 bytes, ordered by time of creation (ULID:
//! 48 bits of Unix milliseconds, 80 random bits), and prints as prefix and Crockford base 32 in
//! lower case, so a log line explains itself.

use std::fmt;
use std::str::FromStr;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const TEXT_LEN: usize = 26;

/// Says why a text or byte string is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The prefix is missing or another kind's.
    #[error("`{text}` is not an id of this kind: it should start with `{prefix}`")]
    Prefix {
        /// What was given.
        text: String,
        /// What an id of this kind starts with.
        prefix: &'static str,
    },
    /// Not 26 characters of Crockford base 32.
    #[error(
        "`{0}` is not an id: 26 characters of 0-9 a-z without i, l, o, u should follow the prefix"
    )]
    Text(String),
    /// Not 16 bytes.
    #[error("an id has 16 bytes, not {0}")]
    Length(usize),
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// What its text starts with.
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id from the time and 80 random bits.
            pub fn from_parts(unix_ms: u64, random: [u8; 10]) -> Self {
                let mut bytes = [0; 16];
                bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
                bytes[6..].copy_from_slice(&random);
                Self(bytes)
            }

            /// Takes the 16 bytes of an id as they are.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// The 16 bytes, as messages carry them.
            pub fn to_vec(self) -> Vec<u8> {
                self.0.to_vec()
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;
            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                bytes.try_into().map(Self).map_err(|_| IdError::Length(bytes.len()))
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let Some(rest) = text.strip_prefix($prefix) else {
                    return Err(IdError::Prefix { text: text.into(), prefix: $prefix });
                };
                decode(rest).map(Self).ok_or_else(|| IdError::Text(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                f.write_str(&encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(/// What a user gets.
    SandboxId, "sbx_");
id!(/// A machine that runs sandboxes.
    NodeId, "node_");
id!(/// One Raft group and all that belongs to it.
    ClusterId, "cluster_");
id!(/// One command inside a sandbox.
    ExecId, "exec_");
id!(/// A join token, without its secret.
    TokenId, "token_");
id!(/// One moment of a sandbox, of which copies are made.
    ForkId, "fork_");
id!(/// One right of a client to reach one sandbox.
    TicketId, "ticket_");
id!(/// One synchronisation of one folder with one sandbox.
    SyncSessionId, "sync_");

fn encode(bytes: &[u8; 16]) -> String {
    let mut value = u128::from_be_bytes(*bytes);
    let mut text = [0u8; TEXT_LEN];
    for place in text.iter_mut().rev() {
        *place = ALPHABET[(value & 31) as usize];
        value >>= 5;
    }
    text.iter().map(|&b| char::from(b)).collect()
}

fn decode(text: &str) -> Option<[u8; 16]> {
    if text.len() != TEXT_LEN || text.as_bytes()[0] > b'7' {
        return None;
    }
    let mut value = 0u128;
    for byte in text.bytes() {
        let digit = ALPHABET.iter().position(|&a| a == byte)?;
        value = (value << 5) | digit as u128;
    }
    Some(value.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_id_of_another_kind_is_refused_by_name() {
        let node = NodeId::from_parts(1, [7; 10]).to_string();
        let error = node.parse::<SandboxId>().unwrap_err();
        assert!(error.to_string().contains("should start with `sbx_`"), "{error}");
    }

    #[test]
    fn ids_sort_by_time() {
        assert!(SandboxId::from_parts(1, [255; 10]) < SandboxId::from_parts(2, [0; 10]));
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 16]) {
            let id = SandboxId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<SandboxId>().unwrap(), id);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<SandboxId>();
            let _ = format!("sbx_{text}").parse::<SandboxId>();
        }
    }
}
