//! The thread that owns the write-ahead log. It takes all writes that wait, appends them, and makes
//! them durable with one sync (group commit), then reports them in order. Its first failure is its
//! last word: the driver must end the process, because what is on disk is not known any more.

use std::sync::mpsc;
use std::thread::JoinHandle;

use towline_control_core::wal::{Disk, Wal, WalError};
use towline_proto::v1::{HardState, LogEntry, SnapshotRecord, WalRecord};

/// Writes that may wait; a driver that is ahead by so many waits too.
const QUEUE_MAX: usize = 1024;

/// What the driver wants written.
#[derive(Debug)]
pub enum Write {
    /// Entries and hard state.
    Persist {
        /// Reported when done.
        number: u64,
        /// New entries.
        entries: Vec<LogEntry>,
        /// Term, vote and commit.
        hard_state: Option<HardState>,
        /// Whether it must be durable to be reported.
        sync: bool,
    },
    /// A received snapshot.
    Install {
        /// Reported when done.
        number: u64,
        /// The snapshot.
        snapshot: SnapshotRecord,
        /// Term, vote and commit.
        hard_state: HardState,
        /// Entries after it.
        entries: Vec<LogEntry>,
    },
    /// A snapshot of our own.
    Save(SnapshotRecord),
    /// Entries up to here are not needed.
    Compact(u64),
}

/// What the thread reports.
#[derive(Debug)]
pub enum Written {
    /// All writes up to this number are done.
    Persisted(u64),
    /// The snapshot at this index is done.
    Saved(u64),
    /// The log failed; nothing more will be written.
    Failed(WalError),
}

/// The thread's handle. Dropping it lets the thread finish what was queued.
#[derive(Debug)]
pub struct LogStore {
    writes: mpsc::SyncSender<Write>,
    thread: JoinHandle<()>,
}

impl LogStore {
    /// Starts the thread; `report` must not block for long.
    pub fn start<D: Disk + Send + 'static>(
        wal: Wal<D>,
        report: impl Fn(Written) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (writes, queue) = mpsc::sync_channel(QUEUE_MAX);
        let thread = std::thread::Builder::new()
            .name("log-store".into())
            .spawn(move || run(wal, &queue, &report))?;
        Ok(Self { writes, thread })
    }

    /// Queues a write. An error means that the thread has ended, after saying why.
    pub fn write(&self, write: Write) -> Result<(), ThreadEnded> {
        self.writes.send(write).map_err(|_| ThreadEnded)
    }

    /// Waits until everything queued is written.
    pub fn finish(self) {
        drop(self.writes);
        let _ = self.thread.join();
    }
}

/// The log's thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the log's thread has ended")]
pub struct ThreadEnded;

fn run<D: Disk>(mut wal: Wal<D>, queue: &mpsc::Receiver<Write>, report: &impl Fn(Written)) {
    while let Ok(first) = queue.recv() {
        let group = std::iter::once(first).chain(queue.try_iter().take(QUEUE_MAX));
        if let Err(error) = write_group(&mut wal, group, report) {
            report(Written::Failed(error));
            return;
        }
    }
}

/// Writes a group with one sync at its end, or before something that must not overtake it.
fn write_group<D: Disk>(
    wal: &mut Wal<D>,
    group: impl Iterator<Item = Write>,
    report: &impl Fn(Written),
) -> Result<(), WalError> {
    let mut open = Open::default();
    for write in group {
        match write {
            Write::Persist { number, entries, hard_state, sync } => {
                if sync {
                    wal.append(&WalRecord { entries, hard_state, restored: 0 })?;
                    open.dirty = true;
                }
                // What needs no sync is only a newer commit index: the next record carries it.
                open.number = Some(number);
            }
            Write::Install { number, snapshot, hard_state, entries } => {
                open.close(wal, report)?;
                let record = WalRecord { entries, hard_state: Some(hard_state), restored: 0 };
                wal.install(&snapshot, record)?;
                report(Written::Persisted(number));
            }
            Write::Save(snapshot) => {
                open.close(wal, report)?;
                wal.save_snapshot(&snapshot)?;
                report(Written::Saved(snapshot.index));
            }
            Write::Compact(through) => wal.compact(through)?,
        }
    }
    open.close(wal, report)
}

/// What was appended and is not reported yet.
#[derive(Debug, Default)]
struct Open {
    dirty: bool,
    number: Option<u64>,
}

impl Open {
    fn close<D: Disk>(
        &mut self,
        wal: &mut Wal<D>,
        report: &impl Fn(Written),
    ) -> Result<(), WalError> {
        if std::mem::take(&mut self.dirty) {
            wal.sync()?;
        }
        if let Some(number) = self.number.take() {
            report(Written::Persisted(number));
        }
        Ok(())
    }
}
