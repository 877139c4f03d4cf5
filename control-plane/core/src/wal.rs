//! The write-ahead log, over a `Disk` that is real files in production and a faulty model in the
//! simulator: the same code runs on both.
//!
//! ```text
//! wal-0000000000000001   header │ record │ record │ … zeros      one writer, appended in order
//! wal-0000000000000002   header │ record │ …
//! snapshot-00000000000003e8                                      newest snapshot of the state
//! ```
//! Each record has a CRC32C over itself and names the CRC of the one before (a chain), and says up
//! to where the log was known to be on disk when it was written. So a tail torn by a crash (never
//! acknowledged: dropped) can be told from damage below an acknowledged record (refused: this
//! member must not vote on a log that lost something). Any failed write or sync is final.

mod format;
mod recover;

use prost::Message;
use towline_proto::v1::{LogEntry, SnapshotRecord, WalRecord};

use format::{Position, SegmentHeader, encode_record, segment_name, snapshot_name};

/// Size of a segment file, written as zeros when it is made so that a sync changes no metadata.
pub const SEGMENT_BYTES: u64 = 16 << 20;

/// What the log needs of files. Names are flat. Everything but `write_at` is durable on return.
pub trait Disk {
    /// Names of all files.
    fn list(&mut self) -> Result<Vec<String>, DiskError>;
    /// A file, whole.
    fn read(&mut self, name: &str) -> Result<Vec<u8>, DiskError>;
    /// Makes or replaces a file, at once or not at all: `start` and then zeros up to `size`.
    fn create(&mut self, name: &str, start: &[u8], size: u64) -> Result<(), DiskError>;
    /// Overwrites a part of a file. Durable only after `sync`.
    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// Makes earlier writes to a file durable.
    fn sync(&mut self, name: &str) -> Result<(), DiskError>;
    /// Removes a file.
    fn remove(&mut self, name: &str) -> Result<(), DiskError>;
}

/// A file operation that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("could not {what} `{name}`: {reason}")]
pub struct DiskError {
    /// What was tried.
    pub what: &'static str,
    /// On which file.
    pub name: String,
    /// What the system said.
    pub reason: String,
}

/// Why the log cannot be opened or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Something that was acknowledged is damaged.
    #[error(
        "`{file}` is damaged at byte {offset}: {what}. Acknowledged changes may be lost, so this \
         member must not start with it. Restore the data directory from a backup, or remove this \
         member and add it again under a new id; an embedded cluster can be started anew with an \
         empty data directory"
    )]
    Damaged {
        /// Which file.
        file: String,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// Another member's files.
    #[error("the log belongs to member {found}, and this is member {expected}: check `data_dir`")]
    Foreign {
        /// Whose it is.
        found: u64,
        /// Who opened it.
        expected: u64,
    },
    /// An earlier write or sync failed; what is on disk is not known any more.
    #[error("an earlier write to the log failed: restart this member")]
    Poisoned,
}

/// One segment that may be dropped once all its entries are in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    number: u64,
    last_index: u64,
}

/// The open log.
#[derive(Debug)]
pub struct Wal<D> {
    disk: D,
    member: u64,
    segment_bytes: u64,
    /// Oldest first; the last one is written.
    segments: Vec<Segment>,
    end: u64,
    chain: u32,
    /// Everything before it is known to be on disk.
    synced: Position,
    snapshot: u64,
    poisoned: bool,
}

/// A log and what is in it.
pub type Opened<D> = (Wal<D>, crate::Recovered);

impl<D: Disk> Wal<D> {
    /// Opens the log of a member, or starts one on an empty disk.
    pub fn open(disk: D, member: u64) -> Result<Opened<D>, WalError> {
        Self::open_sized(disk, member, SEGMENT_BYTES)
    }

    /// As `open`, with segments of another size.
    pub fn open_sized(disk: D, member: u64, segment_bytes: u64) -> Result<Opened<D>, WalError> {
        recover::open(disk, member, segment_bytes)
    }

    /// Appends one record. It is durable after `sync`.
    pub fn append(&mut self, record: &WalRecord) -> Result<(), WalError> {
        self.guarded(|wal| wal.append_record(record))
    }

    /// Makes what was appended durable.
    pub fn sync(&mut self) -> Result<(), WalError> {
        self.guarded(Self::sync_segment)
    }

    /// Writes a snapshot beside the log; older ones go.
    pub fn save_snapshot(&mut self, snapshot: &SnapshotRecord) -> Result<(), WalError> {
        self.guarded(|wal| wal.write_snapshot(snapshot))
    }

    /// Replaces the log by a received snapshot and the entries after it. Durable on return.
    pub fn install(
        &mut self,
        snapshot: &SnapshotRecord,
        mut record: WalRecord,
    ) -> Result<(), WalError> {
        record.restored = snapshot.index;
        self.guarded(|wal| {
            wal.write_snapshot(snapshot)?;
            wal.append_record(&record)?;
            wal.sync_segment()
        })
    }

    /// Drops segments whose entries are all covered by the newest snapshot and by `through`.
    pub fn compact(&mut self, through: u64) -> Result<(), WalError> {
        let through = through.min(self.snapshot);
        self.guarded(|wal| {
            while wal.segments.len() > 1 && wal.segments[0].last_index <= through {
                wal.disk.remove(&segment_name(wal.segments[0].number))?;
                wal.segments.remove(0);
            }
            Ok(())
        })
    }

    /// The disk, for tests and the simulator.
    pub fn disk_mut(&mut self) -> &mut D {
        &mut self.disk
    }

    /// After one failure nothing more is written: a sync that failed once may have thrown data
    /// away and succeed the next time.
    fn guarded(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), WalError>,
    ) -> Result<(), WalError> {
        if self.poisoned {
            return Err(WalError::Poisoned);
        }
        let result = write(self);
        self.poisoned = result.is_err();
        result
    }

    fn active(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.number)
    }

    fn append_record(&mut self, record: &WalRecord) -> Result<(), WalError> {
        let payload = record.encode_to_vec();
        let size = format::record_size(payload.len());
        if self.end + size > self.segment_bytes && self.end > format::HEADER_BYTES {
            self.roll(size)?;
        }
        let (bytes, crc) = encode_record(self.chain, self.synced, &payload);
        self.disk.write_at(&segment_name(self.active()), self.end, &bytes)?;
        self.end += size;
        self.chain = crc;
        if let Some(segment) = self.segments.last_mut() {
            let last = record.entries.last().map_or(0, |entry: &LogEntry| entry.index);
            segment.last_index = segment.last_index.max(last);
        }
        Ok(())
    }

    fn sync_segment(&mut self) -> Result<(), WalError> {
        let segment = self.active();
        self.disk.sync(&segment_name(segment))?;
        self.synced = Position { segment, offset: self.end };
        Ok(())
    }

    /// Starts the next segment. The one before is on disk first, so that damage in it can only be
    /// damage.
    fn roll(&mut self, needed: u64) -> Result<(), WalError> {
        self.sync_segment()?;
        self.start_segment(self.active() + 1, needed)
    }

    fn start_segment(&mut self, number: u64, needed: u64) -> Result<(), WalError> {
        let header = SegmentHeader { member: self.member, number, chain: self.chain };
        let size = self.segment_bytes.max(format::HEADER_BYTES + needed);
        self.disk.create(&segment_name(number), &header.encode(), size)?;
        self.segments.push(Segment { number, last_index: 0 });
        self.end = format::HEADER_BYTES;
        self.synced = Position { segment: number, offset: self.end };
        Ok(())
    }

    fn write_snapshot(&mut self, snapshot: &SnapshotRecord) -> Result<(), WalError> {
        let bytes = format::encode_snapshot(snapshot);
        self.disk.create(&snapshot_name(snapshot.index), &bytes, bytes.len() as u64)?;
        let older = self.snapshot;
        self.snapshot = self.snapshot.max(snapshot.index);
        if older != 0 && older != self.snapshot {
            self.disk.remove(&snapshot_name(older))?;
        }
        Ok(())
    }
}
