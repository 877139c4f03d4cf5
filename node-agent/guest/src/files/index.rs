//! What the guest has told the laptop about a tree, so that the next scan sends the difference only.
//!
//! Kept in memory: a guest agent that started anew simply lists everything again. The sequence
//! changes with every change of the index, so that a session that was cut is noticed by both ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use towline_filesync::{Entry, TreePath};
use towline_proto::v1::FilesIndex;

/// The index of one tree.
#[derive(Debug)]
pub(super) struct Index {
    id: [u8; 16],
    sequence: u64,
    entries: BTreeMap<TreePath, Entry>,
}

/// What differs between two looks.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// New or changed.
    pub(super) changed: Vec<TreePath>,
    /// Listed before and not now.
    pub(super) unlisted: Vec<TreePath>,
}

/// The index of the tree at this path.
pub(super) fn of(root: &Path) -> Arc<tokio::sync::Mutex<Index>> {
    static TREES: Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<Index>>>> =
        Mutex::new(BTreeMap::new());
    let mut trees = TREES.lock().unwrap_or_else(PoisonError::into_inner);
    let tree = trees.entry(root.to_owned()).or_insert_with(|| Arc::new(Index::fresh().into()));
    Arc::clone(tree)
}

impl Index {
    fn fresh() -> Self {
        let mut id = [0; 16];
        // Without randomness the id is all zero, and an id of zero never matches.
        let _ = rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty());
        Self { id, sequence: 1, entries: BTreeMap::new() }
    }

    /// Its name and state.
    pub(super) fn state(&self) -> FilesIndex {
        FilesIndex { id: self.id.to_vec(), sequence: self.sequence }
    }

    /// Whether the laptop's knowledge is this state.
    pub(super) fn is_known(&self, known: Option<&FilesIndex>) -> bool {
        self.id != [0; 16] && known == Some(&self.state())
    }

    /// Takes over what a scan found and says what differs; everything when `known` is false.
    pub(super) fn update(&mut self, now: BTreeMap<TreePath, Entry>, known: bool) -> Difference {
        if !known {
            self.entries.clear();
        }
        let differs = |path: &TreePath, entry: &Entry| {
            self.entries.get(path).is_none_or(|before| {
                !entry.is_version(before) || entry.only_ignored != before.only_ignored
            })
        };
        let changed: Vec<TreePath> = now
            .iter()
            .filter(|(path, entry)| differs(path, entry))
            .map(|(path, _)| path.clone())
            .collect();
        let unlisted: Vec<TreePath> =
            self.entries.keys().filter(|path| !now.contains_key(path)).cloned().collect();
        if !known || !changed.is_empty() || !unlisted.is_empty() {
            self.sequence += 1;
        }
        self.entries = now;
        Difference { changed, unlisted }
    }

    /// What was last seen at a path.
    pub(super) fn entry(&self, path: &TreePath) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// Records what an op made of a path.
    pub(super) fn record(&mut self, path: &TreePath, entry: Option<&Entry>) {
        self.sequence += 1;
        match entry {
            Some(entry) => self.entries.insert(path.clone(), entry.clone()),
            None => self.entries.remove(path),
        };
    }
}
