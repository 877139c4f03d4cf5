//! Reads files of the machine, and only as they were when the image was made.
//!
//! A file is opened beneath the root by its path in the manifest, no symlink followed, and must
//! have the device, inode, size and times that the manifest has, when it is opened and before and
//! after each read. A file replaced by rename goes on being served from the old inode while its
//! descriptor is kept; otherwise a changed file is an error, never a mix of old and new.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::manifest::{Identity, Manifest};
use super::walk::{BENEATH, identity};

/// Descriptors kept open per server: a compile touches fewer files than this at a time, and it is
/// far below the usual limit of 1,024.
const OPEN_MAX: usize = 256;

/// Opens and reads files of a manifest, remembering descriptors.
#[derive(Debug)]
pub(crate) struct Files {
    root: OwnedFd,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    by_index: HashMap<u32, (Arc<OwnedFd>, u64)>,
    clock: u64,
}

/// Why a file could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadError {
    /// It is not any more what it was when the image was made.
    Changed,
    /// The machine's own error.
    Machine(Errno),
}

impl Files {
    pub(crate) fn new(root: OwnedFd) -> Files {
        Files { root, open: Mutex::default() }
    }

    /// Reads at an offset into `buffer` and returns how much there was.
    pub(crate) fn read(
        &self,
        manifest: &Manifest,
        index: u32,
        expected: &Identity,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize, ReadError> {
        let file = self.open(manifest, index, expected)?;
        unchanged(&file, expected)?;
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&*file, &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(ReadError::Machine(error)),
            }
        }
        unchanged(&file, expected)?;
        Ok(done)
    }

    fn open(
        &self,
        manifest: &Manifest,
        index: u32,
        expected: &Identity,
    ) -> Result<Arc<OwnedFd>, ReadError> {
        if let Some(file) = self.lock().get(index) {
            return Ok(file);
        }
        let path = manifest.path(index);
        let flags =
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::openat2(&self.root, &*path, flags, Mode::empty(), BENEATH) {
            Ok(file) => Arc::new(file),
            // It is gone, or something on the way is now a symlink or no folder, or it was made
            // private: not what was seen.
            Err(
                Errno::NOENT
                | Errno::NOTDIR
                | Errno::LOOP
                | Errno::XDEV
                | Errno::ACCESS
                | Errno::PERM
                | Errno::NXIO,
            ) => return Err(ReadError::Changed),
            Err(error) => return Err(ReadError::Machine(error)),
        };
        unchanged(&file, expected)?;
        self.lock().keep(index, &file);
        Ok(file)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn get(&mut self, index: u32) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let (file, used) = self.by_index.get_mut(&index)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn keep(&mut self, index: u32, file: &Arc<OwnedFd>) {
        if self.by_index.len() >= OPEN_MAX {
            // A scan of 256 when a new file is opened costs less than keeping an order would.
            let oldest = self.by_index.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(index) = oldest.map(|(index, _)| *index) {
                self.by_index.remove(&index);
            }
        }
        self.clock += 1;
        self.by_index.insert(index, (Arc::clone(file), self.clock));
    }
}

/// Checks that an open file is the one that the manifest means, with the same content.
///
/// A rename over a file, and a hard link made or removed, change the link count and with it the
/// change time, but not the content: then the other marks decide.
fn unchanged(file: &OwnedFd, expected: &Identity) -> Result<(), ReadError> {
    let stat = rustix::fs::fstat(file).map_err(ReadError::Machine)?;
    let now = identity(&stat);
    let same = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_mode & 0o004 != 0
        && (now.device, now.inode, now.size, now.mtime_ns)
            == (expected.device, expected.inode, expected.size, expected.mtime_ns)
        && (now.ctime_ns == expected.ctime_ns || now.links != expected.links);
    if same { Ok(()) } else { Err(ReadError::Changed) }
}
