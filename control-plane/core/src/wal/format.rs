//! Bytes of segments, records and snapshot files. Integers are little-endian; records start at
//! multiples of 8 so that a search after damage has few places to look.

use prost::Message;
use towline_proto::v1::SnapshotRecord;

pub(super) const SEGMENT_MAGIC: [u8; 8] = *b"towwal01";
pub(super) const SNAPSHOT_MAGIC: [u8; 8] = *b"towsnp01";
const RECORD_MAGIC: u32 = 0x7472_3031;

/// Bytes of a segment's header.
pub(super) const HEADER_BYTES: u64 = 40;
/// Bytes of a record before its payload: magic, length, CRC of the record before, segment and
/// offset known to be on disk, own CRC.
pub(super) const RECORD_BYTES: usize = 40;
/// Longest payload that is believed.
const PAYLOAD_MAX: usize = 256 << 20;

/// A place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Position {
    pub(super) segment: u64,
    pub(super) offset: u64,
}

pub(super) fn segment_name(number: u64) -> String {
    format!("wal-{number:016x}")
}

pub(super) fn snapshot_name(index: u64) -> String {
    format!("snapshot-{index:016x}")
}

pub(super) fn number_of(name: &str, prefix: &str) -> Option<u64> {
    let hex = name.strip_prefix(prefix)?;
    (hex.len() == 16).then(|| u64::from_str_radix(hex, 16).ok()).flatten()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) member: u64,
    pub(super) number: u64,
    /// CRC of the last record of the segment before.
    pub(super) chain: u32,
}

impl SegmentHeader {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut bytes = SEGMENT_MAGIC.to_vec();
        bytes.extend(self.member.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.chain.to_le_bytes());
        bytes.resize(36, 0);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..40)?;
        let good = bytes[..8] == SEGMENT_MAGIC && u32_at(bytes, 36) == crc32c::crc32c(&bytes[..36]);
        good.then(|| Self {
            member: u64_at(bytes, 8),
            number: u64_at(bytes, 16),
            chain: u32_at(bytes, 24),
        })
    }
}

/// A record that is whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    /// CRC of the one before.
    pub(super) previous: u32,
    pub(super) synced: Position,
    pub(super) crc: u32,
    pub(super) payload: &'a [u8],
}

pub(super) fn record_size(payload: usize) -> u64 {
    ((RECORD_BYTES + payload).next_multiple_of(8)) as u64
}

/// Encodes a record; the CRC comes back for the next one's chain.
pub(super) fn encode_record(previous: u32, synced: Position, payload: &[u8]) -> (Vec<u8>, u32) {
    let size = usize::try_from(record_size(payload.len())).unwrap_or(usize::MAX);
    let mut bytes = Vec::with_capacity(size);
    bytes.extend(RECORD_MAGIC.to_le_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(previous.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(synced.segment.to_le_bytes());
    bytes.extend(synced.offset.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), payload);
    bytes.extend(crc.to_le_bytes());
    bytes.extend(payload);
    bytes.resize(size, 0);
    (bytes, crc)
}

/// The record that starts here, if a whole one does.
pub(super) fn decode_record(bytes: &[u8]) -> Option<Record<'_>> {
    let head = bytes.get(..RECORD_BYTES)?;
    if u32_at(head, 0) != RECORD_MAGIC {
        return None;
    }
    let length = usize::try_from(u32_at(head, 4)).ok().filter(|length| *length <= PAYLOAD_MAX)?;
    let payload = bytes.get(RECORD_BYTES..RECORD_BYTES + length)?;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..36]), payload);
    (crc == u32_at(head, 36)).then(|| Record {
        previous: u32_at(head, 8),
        synced: Position { segment: u64_at(head, 16), offset: u64_at(head, 24) },
        crc,
        payload,
    })
}

pub(super) fn encode_snapshot(snapshot: &SnapshotRecord) -> Vec<u8> {
    let payload = snapshot.encode_to_vec();
    let mut bytes = SNAPSHOT_MAGIC.to_vec();
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(crc32c::crc32c(&payload).to_le_bytes());
    bytes.extend(payload);
    bytes
}

pub(super) fn decode_snapshot(bytes: &[u8]) -> Option<SnapshotRecord> {
    let head = bytes.get(..20)?;
    let payload = &bytes[20..];
    let good = head[..8] == SNAPSHOT_MAGIC
        && u64_at(head, 8) == payload.len() as u64
        && u32_at(head, 16) == crc32c::crc32c(payload);
    good.then(|| SnapshotRecord::decode(payload).ok()).flatten()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes)
}
