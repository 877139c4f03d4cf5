//! One output of an exec: bytes by offset, kept until they are acknowledged or pushed out.
//!
//! In memory the process is held back when the bound is met; a spool on the disk never holds it
//! back but drops its oldest bytes. `base <= end` always; all offsets count from the process' first
//! byte.

use std::collections::VecDeque;

use super::spool::Spool;

/// An output stream's kept part.
#[derive(Debug)]
pub(crate) struct Output {
    /// Offset of the first byte in `memory`.
    base: u64,
    memory: VecDeque<u8>,
    spool: Option<Spool>,
    /// No byte will follow.
    pub(crate) closed: bool,
}

/// Where the bytes at an offset are.
#[derive(Debug)]
pub(crate) enum Piece {
    /// A copy of them, with their offset.
    Bytes(u64, Vec<u8>),
    /// In the spool's file: this many at most, from this offset.
    Spooled(u64, std::sync::Arc<std::fs::File>, usize),
}

impl Output {
    /// An output that is kept in memory.
    pub(crate) fn in_memory() -> Self {
        Self { base: 0, memory: VecDeque::new(), spool: None, closed: false }
    }

    /// An output that goes to a spool.
    pub(crate) fn spooled(spool: Spool) -> Self {
        Self { spool: Some(spool), ..Self::in_memory() }
    }

    /// Where the file to write to is, if it has one that still works.
    pub(crate) fn spool(&mut self) -> Option<&mut Spool> {
        self.spool.as_mut().filter(|spool| !spool.broken)
    }

    /// Whether a full memory holds the process back: not when there is a spool, even a broken one.
    pub(crate) fn holds_back(&self) -> bool {
        self.spool.is_none()
    }

    /// Bytes in memory.
    pub(crate) fn held(&self) -> usize {
        self.memory.len()
    }

    /// Offset of the oldest byte that can still be had.
    pub(crate) fn first(&self) -> u64 {
        match &self.spool {
            Some(spool) if spool.first < spool.end => spool.first,
            _ => self.base,
        }
    }

    /// Offset after the newest byte.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.memory.len() as u64
    }

    /// Appends to memory; with `keep`, drops the oldest beyond that many.
    pub(crate) fn push(&mut self, bytes: &[u8], keep: Option<usize>) {
        self.memory.extend(bytes);
        if let Some(keep) = keep {
            let excess = self.memory.len().saturating_sub(keep);
            self.drop_front(excess);
        }
    }

    /// Says that the spool's file has taken `len` bytes more.
    pub(crate) fn spooled_more(&mut self, len: usize) {
        self.base += len as u64;
        if let Some(spool) = &mut self.spool {
            spool.end = self.base;
        }
    }

    /// Forgets what is below `offset`; a spool keeps it.
    pub(crate) fn acknowledge(&mut self, offset: u64) {
        if self.spool.is_none() {
            let len = offset.saturating_sub(self.base).min(self.memory.len() as u64);
            self.drop_front(usize::try_from(len).unwrap_or(usize::MAX));
        }
    }

    /// Up to `max` bytes at `offset` or the first offset after it that is still kept.
    pub(crate) fn at(&self, offset: u64, max: usize) -> Option<Piece> {
        let offset = offset.max(self.first());
        if offset >= self.end() {
            return None;
        }
        let spooled = self.spool.as_ref().filter(|spool| offset < spool.end.min(self.base));
        if let Some(spool) = spooled {
            let len = (spool.end - offset).min(max as u64);
            return Some(Piece::Spooled(offset, spool.file(), usize::try_from(len).unwrap_or(max)));
        }
        // Between a spool that broke and what is still in memory there may be a hole.
        let offset = offset.max(self.base);
        let from = usize::try_from(offset - self.base).ok()?;
        let bytes = self.memory.iter().skip(from).take(max).copied().collect();
        Some(Piece::Bytes(offset, bytes))
    }

    fn drop_front(&mut self, len: usize) {
        self.memory.drain(..len);
        self.base += len as u64;
        if self.memory.is_empty() {
            self.memory = VecDeque::new();
        }
    }
}
