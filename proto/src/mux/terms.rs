//! What the two ends of a session tell each other in the preamble: a version, and how much each takes
//! unread on one stream.
//!
//! A guest runs with the build that it was started with, a node agent is replaced under it; so
//! neither may count on the other's numbers. The invariant: before it knows its peer's terms, an end
//! sends no more than what every build takes ([`WINDOW_MIN`], frames of [`VERSION_MIN`]).

/// Newest version of the multiplexer's frames that this build speaks.
pub const VERSION: u16 = 1;
/// Oldest version that this build can still speak.
pub const VERSION_MIN: u16 = 1;

/// What every end takes on a stream before it has said more.
pub const WINDOW_MIN: u32 = 16 << 10;
/// A window above this is nobody's.
pub const WINDOW_MAX: u32 = 64 << 20;

/// Bytes of encoded terms.
pub const TERMS_LEN: usize = 8;

/// One end's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// A host's: the newest version that it speaks. A guest's: the session's.
    pub version: u16,
    /// Bytes that this end takes on one stream before its reader has read.
    pub window: u32,
}

impl Terms {
    /// This build's, with a window of `window` bytes, which is brought into its bounds.
    pub fn new(window: u32) -> Self {
        Self { version: VERSION, window: window.clamp(WINDOW_MIN, WINDOW_MAX) }
    }

    /// A guest's answer to a host's terms: the newest version that both know, or the oldest that this
    /// build knows, which such a host refuses.
    #[must_use]
    pub fn answer_to(self, host: Self) -> Self {
        Self { version: self.version.min(host.version).max(VERSION_MIN), ..self }
    }

    /// Whether this build speaks the version.
    pub fn is_ours(&self) -> bool {
        (VERSION_MIN..=VERSION).contains(&self.version)
    }

    /// Version and two bytes that are zero, then the window, little endian.
    pub(super) fn encode(self) -> [u8; TERMS_LEN] {
        let [a, b] = self.version.to_le_bytes();
        let [w, x, y, z] = self.window.to_le_bytes();
        [a, b, 0, 0, w, x, y, z]
    }

    /// Reads terms off the start of `bytes`; `None` for what no build sends.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let [a, b, _, _, w, x, y, z] = *bytes.first_chunk::<TERMS_LEN>()?;
        let version = u16::from_le_bytes([a, b]);
        let window = u32::from_le_bytes([w, x, y, z]);
        let known = version > 0 && (WINDOW_MIN..=WINDOW_MAX).contains(&window);
        known.then_some(Self { version, window })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_pass_and_what_nobody_sends_does_not() {
        let terms = Terms::new(512 << 10);
        assert_eq!(Terms::decode(&terms.encode()), Some(terms));
        assert_eq!(Terms::new(0).window, WINDOW_MIN);
        for (version, window) in [(0, WINDOW_MIN), (1, 0), (1, WINDOW_MIN - 1), (1, u32::MAX)] {
            assert_eq!(Terms::decode(&Terms { version, window }.encode()), None);
        }
        assert_eq!(Terms::decode(&terms.encode()[..7]), None);
    }

    #[test]
    fn the_session_has_the_older_ends_version() {
        let of = |version| Terms { version, window: WINDOW_MIN };
        assert_eq!(of(3).answer_to(of(1)).version, 1);
        assert_eq!(of(1).answer_to(of(3)).version, 1);
        assert!(of(VERSION).is_ours() && !of(VERSION + 1).is_ours());
    }
}
