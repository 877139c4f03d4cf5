//! A host name that a guest asked for: checked, lower case, without the dot at its end.
//!
//! Everything that is compared with a rule or handed to the resolver has this type.

use std::fmt;

/// Bytes of a name as it is written, and of one label (RFC 1035).
const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// A name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TargetName(String);

/// Says why a text is no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a host name (labels of 1 to {LABEL_MAX} letters, digits, `-` or `_`, at most {NAME_MAX} bytes)"
)]
pub struct NameError;

impl TargetName {
    /// Checks a name. Labels may hold `_`, which names of services do.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let label = |label: &str| {
            (1..=LABEL_MAX).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.len() > NAME_MAX || !text.split('.').all(label) {
            return Err(NameError);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a name within the other one's, and not that itself.
    pub(crate) fn is_below(&self, other: &Self) -> bool {
        self.0.strip_suffix(&other.0).is_some_and(|rest| rest.ends_with('.'))
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "A.b.", "_sip._tcp.example", "xn--bcher-kva.example", "1.2.3.4"] {
            assert_eq!(TargetName::parse(good).unwrap().as_str().to_owned() + ".", {
                let lower = good.to_ascii_lowercase();
                lower.trim_end_matches('.').to_owned() + "."
            });
        }
        let long = format!("{}.x", "a".repeat(64));
        let longer = ["a"; 128].join(".");
        let bad =
            ["", ".", "a..b", "a b", "a\0b", "b\u{fc}cher", "-a", "a-", "[::1]", "a/b", "%lo"];
        for bad in bad.into_iter().chain([long.as_str(), longer.as_str()]) {
            assert_eq!(TargetName::parse(bad), Err(NameError), "{bad:?}");
        }
    }
}
