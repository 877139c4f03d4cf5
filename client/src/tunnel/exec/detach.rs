//! Finds the detach keys in what is typed.
//!
//! Keys that begin the sequence are held back until it is clear what they are; nothing typed is
//! lost when it turns out not to be the sequence.

/// What became of typed bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Typed {
    /// What goes to the command.
    pub(super) pass: Vec<u8>,
    /// The sequence was typed.
    pub(super) detach: bool,
}

/// Matches one sequence of keys.
#[derive(Debug)]
pub(super) struct DetachKeys {
    keys: Vec<u8>,
    matched: usize,
}

impl DetachKeys {
    pub(super) fn new(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// Whether no key detaches.
    pub(super) fn is_off(&self) -> bool {
        self.keys.is_empty()
    }

    pub(super) fn on_typed(&mut self, bytes: &[u8]) -> Typed {
        let mut pass = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return Typed { pass, detach: true };
                }
                continue;
            }
            pass.extend_from_slice(&self.keys[..self.matched]);
            self.matched = 0;
            match self.keys.first() == Some(&byte) {
                true => self.matched = 1,
                false => pass.push(byte),
            }
        }
        Typed { pass, detach: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_detaches_and_everything_else_passes() {
        type Typed<'a> = &'a [&'a [u8]];
        let cases: [(Typed<'_>, &[u8], bool); 6] = [
            (&[b"abc"], b"abc", false),
            (&[b"ab\x10\x11cd"], b"ab", true),
            (&[b"\x10", b"\x11"], b"", true),
            (&[b"\x10x"], b"\x10x", false),
            (&[b"\x10\x10\x11"], b"\x10", true),
            (&[b"\x10", b"\x10", b"y"], b"\x10\x10y", false),
        ];
        for (pieces, pass, detach) in cases {
            let mut keys = DetachKeys::new(vec![0x10, 0x11]);
            let (mut got, mut left) = (Vec::new(), false);
            for piece in pieces {
                let typed = keys.on_typed(piece);
                got.extend(typed.pass);
                left |= typed.detach;
            }
            assert_eq!((&got[..], left), (pass, detach), "{pieces:?}");
        }
    }

    #[test]
    fn no_keys_never_detach() {
        let mut keys = DetachKeys::new(Vec::new());
        assert_eq!(keys.on_typed(b"\x10\x11"), Typed { pass: b"\x10\x11".to_vec(), detach: false });
    }
}
