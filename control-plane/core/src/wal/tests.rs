//! Torture of the log: cut, torn, changed and reordered at every byte.

use std::collections::BTreeMap;

use super::*;
use crate::wal::DiskError;

/// Files in memory; every write counts as durable, and tests damage the bytes themselves.
#[derive(Debug, Clone, Default)]
struct Memory {
    files: BTreeMap<String, Vec<u8>>,
    fail_sync: bool,
}

impl Disk for Memory {
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        Ok(self.files.keys().cloned().collect())
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>, DiskError> {
        Ok(self.files[name].clone())
    }

    fn create(&mut self, name: &str, start: &[u8], size: u64) -> Result<(), DiskError> {
        let mut bytes = start.to_vec();
        bytes.resize(usize::try_from(size).unwrap(), 0);
        self.files.insert(name.to_owned(), bytes);
        Ok(())
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let file = self.files.get_mut(name).unwrap();
        let at = usize::try_from(offset).unwrap();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        if self.fail_sync {
            return Err(DiskError { what: "sync", name: name.into(), reason: "EIO".into() });
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        self.files.remove(name);
        Ok(())
    }
}

const SEGMENT: u64 = 2048;

fn open(disk: &Memory) -> Result<Opened<Memory>, WalError> {
    Wal::open_sized(disk.clone(), 1, SEGMENT)
}

fn record(index: u64) -> WalRecord {
    let data = vec![b'x'; usize::try_from(index % 40).unwrap()].into();
    let entry = LogEntry { index, term: 1, kind: 0, data, ..Default::default() };
    let hard_state = Some(HardState { term: 1, vote: 1, commit: index - 1 });
    WalRecord { entries: vec![entry], hard_state, restored: 0 }
}

/// A log with entries 1 to `n`, each synced.
fn log_of(n: u64) -> Memory {
    let (mut wal, _) = open(&Memory::default()).unwrap();
    for index in 1..=n {
        wal.append(&record(index)).unwrap();
        wal.sync().unwrap();
    }
    wal.disk_mut().clone()
}

fn last_of(recovered: &Recovered) -> u64 {
    recovered.entries.last().map_or(0, |entry| entry.index)
}

#[test]
fn what_was_written_is_read_again_over_many_segments() {
    let disk = log_of(100);
    assert!(disk.files.len() > 3);
    let (mut wal, recovered) = open(&disk).unwrap();
    assert_eq!(recovered.entries.len(), 100);
    assert_eq!(recovered.hard_state.commit, 99);
    wal.append(&record(101)).unwrap();
    wal.sync().unwrap();
    let (_, recovered) = open(wal.disk_mut()).unwrap();
    assert_eq!(last_of(&recovered), 101);
}

#[test]
fn a_tail_cut_at_any_byte_loses_only_what_was_cut() {
    for keep in [1, 10] {
        let before = log_of(keep);
        let after = log_of(keep + 1);
        let name = segment_name(1);
        let (old, new) = (&before.files[&name], &after.files[&name]);
        let start = (0..new.len()).find(|at| old[*at] != new[*at]).unwrap();
        let end = (0..new.len()).rfind(|at| new[*at] != 0).unwrap() + 1;
        for cut in start..=end {
            for garbage in [0u8, 0xff] {
                let mut disk = after.clone();
                let file = disk.files.get_mut(&name).unwrap();
                let filled = file.len().min(cut + 64);
                file[cut..].fill(0);
                file[cut..filled].fill(garbage);
                let (mut wal, recovered) = open(&disk).unwrap();
                // A record is whole once its last byte that is not padding is there.
                let whole = cut >= end;
                assert_eq!(last_of(&recovered), keep + u64::from(whole), "cut at {cut}");
                let next = last_of(&recovered) + 1;
                wal.append(&record(next)).unwrap();
                wal.sync().unwrap();
                let (_, again) = open(wal.disk_mut()).unwrap();
                assert_eq!(last_of(&again), next, "cut at {cut}");
            }
        }
    }
}

#[test]
fn a_changed_byte_below_an_acknowledged_record_is_refused() {
    let disk = log_of(20);
    let name = segment_name(1);
    let (_, whole) = open(&disk).unwrap();
    // Nothing follows the newest record to prove that it was acknowledged: a torn tail, if damaged.
    let (before, after) = (&log_of(19).files[&name], &disk.files[&name]);
    let newest = (0..after.len()).find(|at| before[*at] != after[*at]).unwrap();
    for at in 0..newest {
        let mut disk = disk.clone();
        disk.files.get_mut(&name).unwrap()[at] ^= 0x10;
        match open(&disk) {
            Err(WalError::Damaged { .. }) => {}
            Err(other) => panic!("byte {at}: {other}"),
            // Padding between records means nothing, and is not covered by a checksum.
            Ok((_, recovered)) => assert_eq!(recovered, whole, "byte {at}"),
        }
    }
    let mut disk = disk;
    disk.files.get_mut(&name).unwrap()[60] ^= 1;
    let message = open(&disk).unwrap_err().to_string();
    assert!(message.contains("under a new id"), "{message}");
}

#[test]
fn a_write_torn_in_its_middle_is_a_torn_tail() {
    // Three records written and not yet synced: the disk kept the last and lost the first.
    let (mut wal, _) = open(&log_of(5)).unwrap();
    let before = wal.disk_mut().clone();
    for index in 6..=8 {
        wal.append(&record(index)).unwrap();
    }
    let mut disk = wal.disk_mut().clone();
    let (name, old) = (segment_name(1), &before.files[&segment_name(1)]);
    let file = disk.files.get_mut(&name).unwrap();
    let start = (0..file.len()).find(|at| old[*at] != file[*at]).unwrap();
    file[start..start + 40].fill(0);
    let (_, recovered) = open(&disk).unwrap();
    assert_eq!(last_of(&recovered), 5);
}

#[test]
fn a_missing_segment_and_a_damaged_snapshot_are_refused() {
    let mut disk = log_of(100);
    disk.files.remove(&segment_name(2));
    assert!(matches!(open(&disk), Err(WalError::Damaged { .. })));
    let (mut wal, _) = open(&log_of(3)).unwrap();
    let snapshot = SnapshotRecord { index: 2, term: 1, ..Default::default() };
    wal.save_snapshot(&snapshot).unwrap();
    let mut disk = wal.disk_mut().clone();
    disk.files.get_mut(&snapshot_name(2)).unwrap()[21] ^= 1;
    assert!(open(&disk).unwrap_err().to_string().contains("checksum"));
    assert!(matches!(
        Wal::open_sized(log_of(1), 2, SEGMENT),
        Err(WalError::Foreign { found: 1, expected: 2 })
    ));
}

#[test]
fn snapshots_let_segments_go() {
    let (mut wal, _) = open(&log_of(100)).unwrap();
    for index in [50, 90] {
        wal.save_snapshot(&SnapshotRecord { index, term: 1, ..Default::default() }).unwrap();
        wal.compact(index).unwrap();
    }
    let disk = wal.disk_mut().clone();
    assert!(disk.files.len() < log_of(100).files.len());
    assert!(!disk.files.contains_key(&snapshot_name(50)));
    let (_, recovered) = open(&disk).unwrap();
    assert_eq!(recovered.snapshot.map(|s| s.index), Some(90));
    assert_eq!(recovered.entries.first().map(|e| e.index), Some(91));
    assert_eq!(recovered.entries.last().map(|e| e.index), Some(100));
}

#[test]
fn a_received_snapshot_takes_the_place_of_the_log() {
    let (mut wal, _) = open(&log_of(10)).unwrap();
    let snapshot = SnapshotRecord { index: 7, term: 3, ..Default::default() };
    let hard_state = Some(HardState { term: 3, vote: 0, commit: 7 });
    wal.install(&snapshot, WalRecord { hard_state, ..Default::default() }).unwrap();
    let (_, recovered) = open(wal.disk_mut()).unwrap();
    assert!(recovered.entries.is_empty(), "entries 8 to 10 were another history");
    assert_eq!(recovered.hard_state.term, 3);
}

#[test]
fn overwritten_entries_stay_overwritten() {
    let (mut wal, _) = open(&log_of(10)).unwrap();
    let mut newer = record(4);
    newer.entries[0].term = 2;
    wal.append(&newer).unwrap();
    wal.sync().unwrap();
    let (_, recovered) = open(wal.disk_mut()).unwrap();
    assert_eq!(last_of(&recovered), 4);
    assert_eq!(recovered.entries[3].term, 2);
}

#[test]
fn a_failed_sync_is_final() {
    let (mut wal, _) = open(&log_of(1)).unwrap();
    wal.disk_mut().fail_sync = true;
    wal.append(&record(2)).unwrap();
    assert!(matches!(wal.sync(), Err(WalError::Disk(_))));
    wal.disk_mut().fail_sync = false;
    assert_eq!(wal.sync(), Err(WalError::Poisoned));
    assert_eq!(wal.append(&record(3)), Err(WalError::Poisoned));
}
