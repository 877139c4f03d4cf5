//! The tail of the log in memory, as raft-rs reads it. What is durable is the driver's business:
//! entries are put here when they are handed to it, and raft learns of durability separately.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError, util};

/// Entries after the last snapshot, hard state and membership.
#[derive(Debug, Default)]
pub(crate) struct LogStorage {
    /// Index and term just before the first entry.
    base: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    pub(crate) hard_state: HardState,
    pub(crate) conf_state: ConfState,
    /// For a member too far behind: made by the core when raft asks.
    snapshot: RefCell<Option<Snapshot>>,
    snapshot_wanted: Cell<bool>,
}

impl LogStorage {
    pub(crate) fn new(base: (u64, u64), hard_state: HardState, conf_state: ConfState) -> Self {
        Self { base, hard_state, conf_state, ..Self::default() }
    }

    pub(crate) fn last(&self) -> u64 {
        self.base.0 + self.entries.len() as u64
    }

    /// Bytes of the entries kept.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.base.0 {
            return Some(self.base.1);
        }
        let at = usize::try_from(index.checked_sub(self.base.0 + 1)?).ok()?;
        self.entries.get(at).map(|entry| entry.term)
    }

    /// Replaces everything from the first new entry's index on.
    pub(crate) fn append(&mut self, new: &[Entry]) {
        let Some(first) = new.first() else { return };
        assert!(
            first.index > self.base.0 && first.index <= self.last() + 1,
            "raft appends within or right after the log"
        );
        let keep = usize::try_from(first.index - self.base.0 - 1).unwrap_or(usize::MAX);
        while self.entries.len() > keep {
            self.bytes -= self.entries.pop_back().map_or(0, |entry| entry.data.len());
        }
        for entry in new {
            self.bytes += entry.data.len();
            self.entries.push_back(entry.clone());
        }
    }

    /// Forgets entries up to `index`.
    pub(crate) fn compact(&mut self, index: u64) {
        let Some(term) = self.term_of(index) else { return };
        while self.entries.front().is_some_and(|entry| entry.index <= index) {
            self.bytes -= self.entries.pop_front().map_or(0, |entry| entry.data.len());
        }
        self.base = (index, term);
        let outdated =
            self.snapshot.borrow().as_ref().is_some_and(|s| s.get_metadata().index < index);
        if outdated {
            self.snapshot.replace(None);
        }
    }

    /// Starts anew from a received snapshot.
    pub(crate) fn restore(&mut self, index: u64, term: u64, conf_state: ConfState) {
        self.entries.clear();
        self.bytes = 0;
        self.base = (index, term);
        self.conf_state = conf_state;
        self.hard_state.commit = self.hard_state.commit.max(index);
        self.hard_state.term = self.hard_state.term.max(term);
        self.snapshot.replace(None);
    }

    /// Whether raft asked for a snapshot since the last time.
    pub(crate) fn take_snapshot_wanted(&self) -> bool {
        self.snapshot_wanted.replace(false)
    }

    pub(crate) fn offer_snapshot(&self, snapshot: Snapshot) {
        self.snapshot.replace(Some(snapshot));
    }
}

impl Storage for LogStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.base.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let start = usize::try_from(low - self.base.0 - 1).unwrap_or(usize::MAX);
        let count = usize::try_from(high - low).unwrap_or(usize::MAX);
        let mut found: Vec<Entry> = self.entries.iter().skip(start).take(count).cloned().collect();
        util::limit_size(&mut found, max_size.into());
        Ok(found)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_of(index).ok_or(Error::Store(if index < self.base.0 {
            StorageError::Compacted
        } else {
            StorageError::Unavailable
        }))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        match &*self.snapshot.borrow() {
            Some(snapshot) if snapshot.get_metadata().index >= request_index => {
                Ok(snapshot.clone())
            }
            _ => {
                self.snapshot_wanted.set(true);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}
