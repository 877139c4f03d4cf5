//! Opens the log after whatever happened: reads the newest snapshot and every record after it,
//! drops a torn tail, and refuses damage below what was acknowledged.

use prost::Message;
use towline_proto::v1::{HardState, LogEntry, SnapshotRecord, WalRecord};

use super::format::{
    HEADER_BYTES, Position, SegmentHeader, decode_record, decode_snapshot, number_of, record_size,
    segment_name, snapshot_name,
};
use super::{Disk, Opened, Segment, Wal, WalError};
use crate::Recovered;

pub(super) fn open<D: Disk>(
    mut disk: D,
    member: u64,
    segment_bytes: u64,
) -> Result<Opened<D>, WalError> {
    let names = disk.list()?;
    let snapshot = newest_snapshot(&mut disk, &names)?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| number_of(name, "wal-")).collect();
    numbers.sort_unstable();
    let mut wal = Wal {
        disk,
        member,
        segment_bytes,
        segments: Vec::new(),
        end: 0,
        chain: 0,
        synced: Position::default(),
        snapshot: snapshot.as_ref().map_or(0, |snapshot| snapshot.index),
        poisoned: false,
    };
    let mut replay = Replay { base: wal.snapshot, ..Replay::default() };
    for (place, number) in numbers.iter().enumerate() {
        let is_last = place + 1 == numbers.len();
        let is_next = place == 0 || numbers[place - 1] + 1 == *number;
        if !is_next {
            return Err(damaged(*number, 0, "the segment before it is missing"));
        }
        read_segment(&mut wal, *number, place == 0, is_last, &mut replay)?;
    }
    if numbers.is_empty() {
        if snapshot.is_some() {
            return Err(damaged(1, 0, "there is a snapshot but no log"));
        }
        wal.start_segment(1, 0)?;
    }
    let recovered = replay.finish(snapshot, wal.active())?;
    Ok((wal, recovered))
}

fn newest_snapshot<D: Disk>(
    disk: &mut D,
    names: &[String],
) -> Result<Option<SnapshotRecord>, WalError> {
    let indexes = names.iter().filter_map(|name| number_of(name, "snapshot-"));
    let Some(newest) = indexes.clone().max() else { return Ok(None) };
    let name = snapshot_name(newest);
    let bytes = disk.read(&name)?;
    let snapshot = decode_snapshot(&bytes).filter(|snapshot| snapshot.index == newest);
    let Some(snapshot) = snapshot else {
        let what = "the snapshot's checksum is wrong".to_owned();
        return Err(WalError::Damaged { file: name, offset: 0, what });
    };
    for older in indexes.filter(|index| *index != newest) {
        disk.remove(&snapshot_name(older))?;
    }
    Ok(Some(snapshot))
}

fn read_segment<D: Disk>(
    wal: &mut Wal<D>,
    number: u64,
    is_first: bool,
    is_last: bool,
    replay: &mut Replay,
) -> Result<(), WalError> {
    let bytes = wal.disk.read(&segment_name(number))?;
    let Some(header) = SegmentHeader::decode(&bytes).filter(|header| header.number == number)
    else {
        return Err(damaged(number, 0, "its header is wrong"));
    };
    if header.member != wal.member {
        return Err(WalError::Foreign { found: header.member, expected: wal.member });
    }
    if !is_first && header.chain != wal.chain {
        return Err(damaged(number, 0, "it does not follow the segment before it"));
    }
    wal.chain = header.chain;
    wal.segments.push(Segment { number, last_index: 0 });
    let end = read_records(wal, number, &bytes, replay)?;
    let rest = &bytes[end..];
    if rest.iter().any(|byte| *byte != 0) {
        let here = Position { segment: number, offset: end as u64 };
        if !is_last || acknowledged_after(rest, here) {
            return Err(damaged(number, end as u64, "a record is wrong and later ones are whole"));
        }
        // What was torn was never acknowledged. Zeros take its place so that nothing of it is ever
        // mistaken for a record.
        wal.disk.write_at(&segment_name(number), end as u64, &vec![0; rest.len()])?;
        wal.disk.sync(&segment_name(number))?;
    }
    wal.end = end as u64;
    wal.synced = Position { segment: number, offset: end as u64 };
    Ok(())
}

/// Reads whole, chained records; gives where they end.
fn read_records<D: Disk>(
    wal: &mut Wal<D>,
    number: u64,
    bytes: &[u8],
    replay: &mut Replay,
) -> Result<usize, WalError> {
    let mut at = usize::try_from(HEADER_BYTES).unwrap_or(usize::MAX);
    while let Some(record) = decode_record(&bytes[at..]) {
        if record.previous != wal.chain {
            break;
        }
        let decoded = WalRecord::decode(record.payload)
            .map_err(|error| damaged(number, at as u64, &error.to_string()))?;
        if let Some(segment) = wal.segments.last_mut() {
            let last = decoded.entries.last().map_or(0, |entry| entry.index);
            segment.last_index = segment.last_index.max(last);
        }
        replay.take(decoded).map_err(|what| damaged(number, at as u64, &what))?;
        wal.chain = record.crc;
        at += usize::try_from(record_size(record.payload.len())).unwrap_or(usize::MAX);
    }
    Ok(at.min(bytes.len()))
}

/// Whether a whole record further on proves that what is damaged at `here` had been synced.
fn acknowledged_after(rest: &[u8], here: Position) -> bool {
    (0..rest.len())
        .step_by(8)
        .filter_map(|at| decode_record(&rest[at..]))
        .any(|record| record.synced > here)
}

fn damaged(number: u64, offset: u64, what: &str) -> WalError {
    WalError::Damaged { file: segment_name(number), offset, what: what.to_owned() }
}

/// Records played in order.
#[derive(Debug, Default)]
struct Replay {
    base: u64,
    hard_state: HardState,
    entries: Vec<LogEntry>,
}

impl Replay {
    fn take(&mut self, record: WalRecord) -> Result<(), String> {
        if let Some(hard) = record.hard_state {
            self.hard_state = hard;
        }
        if record.restored != 0 {
            self.entries.clear();
        }
        for entry in record.entries {
            while self.entries.last().is_some_and(|last| last.index >= entry.index) {
                self.entries.pop();
            }
            if let Some(last) = self.entries.last()
                && last.index + 1 != entry.index
            {
                return Err(format!("entry {} follows {}", entry.index, last.index));
            }
            self.entries.push(entry);
        }
        Ok(())
    }

    fn finish(
        mut self,
        snapshot: Option<SnapshotRecord>,
        segment: u64,
    ) -> Result<Recovered, WalError> {
        self.entries.retain(|entry| entry.index > self.base);
        if let Some(first) = self.entries.first()
            && first.index != self.base + 1
        {
            let what = format!("entries {} to {} are missing", self.base + 1, first.index - 1);
            return Err(damaged(segment, 0, &what));
        }
        Ok(Recovered { snapshot, hard_state: self.hard_state, entries: self.entries })
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
