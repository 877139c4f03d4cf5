//! What happened to a sandbox, for its owner: what its policy refused and allowed, starts and ends.
//! Kept in the sandbox's folder, bounded, over restarts of the node agent.
//!
//! A guest causes entries, so the same ones are counted instead of repeated, and new ones have a
//! rate ([`coalesce`]). An entry that could not be written to disk is still told.

mod coalesce;
mod file;
mod serve;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{EgressDecision, FeedEntry, feed_entry::What};

use crate::store::Store;
use coalesce::Coalescer;
use file::FeedFile;

pub(crate) use serve::serve;

/// Entries of one sandbox in memory; the files hold about as many.
const ENTRIES_MAX: usize = 1024;
/// Longest text of a note.
const NOTE_MAX: usize = 300;
/// After the first repetition, how long before it is told how many there were.
const FLUSH_AFTER: Duration = Duration::from_secs(5);

/// One sandbox's feed.
#[derive(Debug)]
pub struct Feed {
    state: Mutex<State>,
    /// The newest sequence.
    newest: watch::Sender<u64>,
    start: Instant,
}

#[derive(Debug)]
struct State {
    entries: VecDeque<FeedEntry>,
    file: FeedFile,
    coalescer: Coalescer,
    flush_due: bool,
    last_note: String,
}

impl Feed {
    /// Takes up what the folder holds.
    pub fn open(folder: &Path) -> Arc<Self> {
        let (file, entries) = FeedFile::open(folder);
        let mut entries = VecDeque::from(entries);
        entries.drain(..entries.len().saturating_sub(ENTRIES_MAX));
        let newest = entries.back().map_or(0, |entry| entry.sequence);
        let is_note = |entry: &FeedEntry| match &entry.what {
            Some(What::Note(note)) => Some(note.clone()),
            _ => None,
        };
        let last_note = entries.iter().rev().find_map(is_note).unwrap_or_default();
        let coalescer = Coalescer::default();
        let state = State { entries, file, coalescer, flush_due: false, last_note };
        Arc::new(Self {
            state: Mutex::new(state),
            newest: watch::Sender::new(newest),
            start: Instant::now(),
        })
    }

    /// Records a decision.
    pub fn egress(self: &Arc<Self>, decision: EgressDecision) {
        let now = self.start.elapsed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for decision in state.coalescer.take(now, decision) {
            self.append(&mut state, What::Egress(decision));
        }
        if state.coalescer.has_pending() && !std::mem::replace(&mut state.flush_due, true) {
            tokio::spawn(flush_later(Arc::downgrade(self)));
        }
    }

    /// Records a sentence, unless it is the newest one already.
    pub fn note(&self, text: &str) {
        let text: String = text.chars().filter(|c| !c.is_control()).take(NOTE_MAX).collect();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last_note != text {
            state.last_note.clone_from(&text);
            self.append(&mut state, What::Note(text));
        }
    }

    /// Entries after this sequence, the oldest first, at most so many.
    fn after(&self, sequence: u64, max: usize) -> Vec<FeedEntry> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let from = state.entries.partition_point(|entry| entry.sequence <= sequence);
        state.entries.range(from..).take(max).cloned().collect()
    }

    /// Tells what was only counted so far.
    fn flush(&self) {
        let now = self.start.elapsed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.flush_due = false;
        let (decisions, untold) = state.coalescer.flush(now);
        for decision in decisions {
            self.append(&mut state, What::Egress(decision));
        }
        if untold > 0 {
            let text = format!("{untold} more connections were decided than are listed");
            self.append(&mut state, What::Note(text));
        }
    }

    fn append(&self, state: &mut State, what: What) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sequence = *self.newest.borrow() + 1;
        let unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let entry = FeedEntry { sequence, unix_ms, what: Some(what) };
        state.file.append(&entry);
        if state.entries.len() >= ENTRIES_MAX {
            state.entries.pop_front();
        }
        state.entries.push_back(entry);
        self.newest.send_replace(sequence);
    }
}

async fn flush_later(feed: Weak<Feed>) {
    sleep(FLUSH_AFTER).await;
    if let Some(feed) = feed.upgrade() {
        feed.flush();
    }
}

/// The feeds of this node's sandboxes.
#[derive(Debug)]
pub struct Feeds {
    store: Arc<Store>,
    feeds: Mutex<BTreeMap<SandboxId, Arc<Feed>>>,
}

impl Feeds {
    /// Of the sandboxes of this store.
    pub fn new(store: Arc<Store>) -> Arc<Self> {
        Arc::new(Self { store, feeds: Mutex::default() })
    }

    /// A sandbox's feed; reads it from its folder the first time.
    pub fn of(&self, sandbox: SandboxId) -> Arc<Feed> {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || Feed::open(&self.store.sandbox(sandbox).feed());
        Arc::clone(feeds.entry(sandbox).or_insert_with(open))
    }

    /// The feed of a sandbox that this node has; `None` for any other.
    pub fn existing(&self, sandbox: SandboxId) -> Option<Arc<Feed>> {
        self.store.sandbox(sandbox).exists().then(|| self.of(sandbox))
    }

    /// Forgets a sandbox that is gone.
    pub fn forget(&self, sandbox: SandboxId) {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner).remove(&sandbox);
    }
}

/// Does to any bytes what is done to a feed's file; for fuzzing.
pub fn fuzz_file(bytes: &[u8]) {
    let (entries, good) = file::parse(bytes);
    assert!(good <= bytes.len() && entries.len() <= bytes.len());
}

/// What a folder's files hold.
#[cfg(test)]
pub(crate) fn file_of(folder: &Path) -> Vec<FeedEntry> {
    FeedFile::open(folder).1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(port: u32) -> EgressDecision {
        EgressDecision { target: "x".into(), port, count: 1, ..EgressDecision::default() }
    }

    #[tokio::test]
    async fn a_feed_is_taken_up_where_it_was_and_counts_repetitions() {
        let dir = tempfile::tempdir().unwrap();
        let feed = Feed::open(dir.path());
        feed.note("running");
        feed.note("running");
        for _ in 0..100 {
            feed.egress(blocked(1));
        }
        feed.egress(blocked(2));
        assert_eq!(feed.after(0, 10).len(), 3);
        feed.flush();
        let told = feed.after(3, 10);
        let Some(What::Egress(decision)) = &told[0].what else { panic!("{told:?}") };
        assert_eq!((told.len(), decision.port, decision.count), (1, 1, 99));
        drop(feed);
        let feed = Feed::open(dir.path());
        assert_eq!(feed.after(0, 10).len(), 4);
        feed.note("running");
        feed.note("stopped");
        assert_eq!(feed.after(4, 10)[0].sequence, 5);
    }
}
