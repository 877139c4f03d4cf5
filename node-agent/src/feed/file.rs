//! A feed on disk: two files, the older of which is dropped when the newer is full. Each entry has
//! its length and checksum in front, so that one that was cut off by a crash ends what is read.
//!
//! Nothing is synced: entries that a power cut loses are no loss of the sandbox. A disk that is full
//! or gone loses entries, never more.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use prost::Message;
use towline_proto::v1::FeedEntry;

/// Bytes of one file; two of them are kept.
const FILE_MAX: u64 = 128 << 10;
/// Bytes of one entry.
const ENTRY_MAX: usize = 4 << 10;
/// Length and CRC32C, both little endian.
const HEAD: usize = 8;

/// The newer file, open for appending.
#[derive(Debug)]
pub(super) struct FeedFile {
    folder: PathBuf,
    file: Option<File>,
    len: u64,
}

impl FeedFile {
    /// Reads what is there, oldest first. A part that is cut off or damaged is dropped.
    pub(super) fn open(folder: &Path) -> (Self, Vec<FeedEntry>) {
        let mut entries = parse(&read(&old(folder))).0;
        let bytes = read(&new(folder));
        let (newer, good) = parse(&bytes);
        entries.extend(newer);
        // Sequences that do not grow are another file's, or somebody's.
        let mut last = 0;
        entries.retain(|entry| {
            let grows = entry.sequence > last;
            last = last.max(entry.sequence);
            grows
        });
        let mut this = Self { folder: folder.to_owned(), file: None, len: good as u64 };
        if good < bytes.len() {
            let cut = OpenOptions::new().write(true).open(new(folder));
            if cut.and_then(|file| file.set_len(this.len)).is_err() {
                this.rotate();
            }
        }
        (this, entries)
    }

    /// Appends an entry.
    pub(super) fn append(&mut self, entry: &FeedEntry) {
        let Some(bytes) = encode(entry) else { return };
        if self.len + bytes.len() as u64 > FILE_MAX {
            self.rotate();
        }
        if self.file.is_none() {
            let open =
                OpenOptions::new().create(true).append(true).mode(0o600).open(new(&self.folder));
            // A folder that is gone is not made again.
            self.file = open.ok();
        }
        let Some(file) = &mut self.file else { return };
        match file.write_all(&bytes) {
            Ok(()) => self.len += bytes.len() as u64,
            // What may have been written in part would end the reading: begin anew.
            Err(_) => self.rotate(),
        }
    }

    fn rotate(&mut self) {
        self.file = None;
        self.len = 0;
        if fs::rename(new(&self.folder), old(&self.folder)).is_err() {
            let _ = fs::remove_file(new(&self.folder));
        }
    }
}

fn new(folder: &Path) -> PathBuf {
    folder.join("feed")
}

fn old(folder: &Path) -> PathBuf {
    folder.join("feed.old")
}

fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = File::open(path).and_then(|file| file.take(2 * FILE_MAX).read_to_end(&mut bytes));
    bytes
}

fn encode(entry: &FeedEntry) -> Option<Vec<u8>> {
    let len = entry.encoded_len();
    if len > ENTRY_MAX {
        return None;
    }
    let body = entry.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEAD + len);
    bytes.extend_from_slice(&u32::try_from(len).ok()?.to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    Some(bytes)
}

/// Reads whole entries until the end or the first that is not one; returns how many bytes were good.
pub(super) fn parse(bytes: &[u8]) -> (Vec<FeedEntry>, usize) {
    let (mut entries, mut at) = (Vec::new(), 0);
    while let Some((entry, len)) = next(&bytes[at..]) {
        entries.push(entry);
        at += len;
    }
    (entries, at)
}

fn next(bytes: &[u8]) -> Option<(FeedEntry, usize)> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let len = u32::from_le_bytes(*len) as usize;
    let body = rest.get(..len).filter(|_| len <= ENTRY_MAX)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    Some((FeedEntry::decode(body).ok()?, HEAD + len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_proto::v1::feed_entry::What;

    fn entry(sequence: u64, text: &str) -> FeedEntry {
        FeedEntry { sequence, unix_ms: 1, what: Some(What::Note(text.into())) }
    }

    #[test]
    fn a_torn_or_damaged_tail_is_dropped_and_appending_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (mut file, none) = FeedFile::open(dir.path());
        assert!(none.is_empty());
        (1..=3).for_each(|n| file.append(&entry(n, "a text")));
        let path = new(dir.path());
        let whole = fs::read(&path).unwrap();
        let each = whole.len() / 3;
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut file, entries) = FeedFile::open(dir.path());
            assert_eq!(entries.len(), cut / each);
            file.append(&entry(9, "later"));
            let (_, entries) = FeedFile::open(dir.path());
            assert_eq!(entries.len(), cut / each + 1);
        }
        let mut damaged = whole.clone();
        damaged[each + HEAD + 1] ^= 1;
        fs::write(&path, &damaged).unwrap();
        assert_eq!(FeedFile::open(dir.path()).1, [entry(1, "a text")]);
    }

    #[test]
    fn it_stays_small_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let (mut file, _) = FeedFile::open(dir.path());
        let text = "x".repeat(500);
        (1..=2000).for_each(|n| file.append(&entry(n, &text)));
        file.append(&entry(2001, &"x".repeat(2 * ENTRY_MAX)));
        let sizes =
            [new(dir.path()), old(dir.path())].map(|path| fs::metadata(path).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= FILE_MAX), "{sizes:?}");
        let (_, entries) = FeedFile::open(dir.path());
        assert_eq!(entries.last().unwrap().sequence, 2000);
        assert!(entries.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence));
    }

    #[test]
    fn a_folder_that_is_gone_is_not_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let (mut file, _) = FeedFile::open(&gone);
        file.append(&entry(1, "x"));
        assert!(!gone.exists());
    }
}
