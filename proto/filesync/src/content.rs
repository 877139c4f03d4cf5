//! Identity of a file's bytes: BLAKE3 over its length and its blocks that are not all zero.
//!
//! Holes and written zeros are the same content, and a sparse file costs what it holds, not what
//! its length says. Bytes travel in the same blocks, so both ends hash what passes by.

use std::fmt;

/// Bytes of one block; data on the wire starts at multiples of it.
pub const BLOCK: usize = 64 << 10;

/// Names a file's content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId([u8; 32]);

impl ContentId {
    /// Reads one from a message; `None` when it is absent or of another length.
    pub fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// As a message has it.
    pub fn to_wire(self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// The id of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = ContentHasher::default();
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            hasher.block((index * BLOCK) as u64, block);
        }
        hasher.finish(bytes.len() as u64)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Computes a [`ContentId`] from blocks in rising order.
#[derive(Debug, Default, Clone)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// Adds the block at `offset`; blocks of zeros may be left out.
    pub fn block(&mut self, offset: u64, bytes: &[u8]) {
        if is_zero(bytes) {
            return;
        }
        self.0.update(&offset.to_le_bytes());
        self.0.update(bytes);
    }

    /// The id of what was added, in a file of `size` bytes.
    pub fn finish(mut self, size: u64) -> ContentId {
        self.0.update(&size.to_le_bytes());
        ContentId(*self.0.finalize().as_bytes())
    }
}

/// Whether all bytes are zero: such a block is not sent.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_are_the_same_and_lengths_are_not() {
        let mut bytes = vec![0; 3 * BLOCK];
        bytes[2 * BLOCK] = 7;
        let mut sparse = ContentHasher::default();
        sparse.block(2 * BLOCK as u64, &bytes[2 * BLOCK..]);
        assert_eq!(sparse.finish(3 * BLOCK as u64), ContentId::of(&bytes));
        assert_ne!(ContentId::of(&[0; 10]), ContentId::of(&[0; 11]));
        assert_ne!(ContentId::of(&bytes), ContentId::of(&bytes[BLOCK..]));
    }
}
