//! The spool of a detached exec: a file on the sandbox's disk, outside the workload's view, whose
//! offsets are the stream's. What is older than the bound is punched out of it.
//!
//! A disk that is full breaks the spool; the newest output is then kept in memory, so a workload
//! that fills its disk goes on running.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use towline_proto::limits::SPOOL_MAX;

/// How much is punched out at once.
const PUNCH_STEP: u64 = 1 << 20;

/// One output's spool.
#[derive(Debug)]
pub(crate) struct Spool {
    file: Arc<File>,
    path: PathBuf,
    bound: u64,
    /// Offset of the oldest byte in the file.
    pub(crate) first: u64,
    /// Offset after the newest byte in the file.
    pub(crate) end: u64,
    /// The disk took no more.
    pub(crate) broken: bool,
}

impl Spool {
    /// Makes the file.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Self::bounded(path, SPOOL_MAX)
    }

    fn bounded(path: &Path, bound: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        let file = Arc::new(file);
        Ok(Self { file, path: path.to_owned(), bound, first: 0, end: 0, broken: false })
    }

    /// The file, for reading at an offset outside any lock.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// What to punch out before `len` bytes more are written: the file keeps within its bound.
    pub(crate) fn excess(&mut self, len: usize) -> Option<(u64, u64)> {
        let wanted = (self.end + len as u64).saturating_sub(self.bound);
        if wanted <= self.first {
            return None;
        }
        let until = wanted.next_multiple_of(PUNCH_STEP.min(self.bound)).min(self.end);
        let hole = (self.first, until - self.first);
        self.first = until;
        Some(hole)
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // Readers that are at it keep the open file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Writes all bytes at an offset, after making the hole. Blocks.
pub(crate) fn write(
    file: &File,
    hole: Option<(u64, u64)>,
    offset: u64,
    bytes: &[u8],
) -> io::Result<()> {
    if let Some((from, len)) = hole {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, from, len)?;
    }
    file.write_all_at(bytes, offset)
}

/// Reads up to `len` bytes at an offset. Blocks.
pub(crate) fn read(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let got = file.read_at(&mut bytes, offset)?;
    bytes.truncate(got);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spool_keeps_the_newest_bytes_within_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::bounded(&folder.path().join("out"), 1 << 16).unwrap();
        let all: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        for piece in all.chunks(7_000) {
            let hole = spool.excess(piece.len());
            write(&spool.file, hole, spool.end, piece).unwrap();
            spool.end += piece.len() as u64;
            assert!(spool.end - spool.first <= 1 << 16);
        }
        let first = usize::try_from(spool.first).unwrap();
        let kept = read(&spool.file, spool.first, all.len() - first).unwrap();
        assert_eq!(kept, all[first..]);
        assert!(first < all.len(), "something is kept");
    }
}
