//! A folder on a file system, by its root's descriptor: the only part of this crate with effects.
//!
//! Every path is resolved beneath that descriptor by `openat2`, without following symlinks; no path
//! string is ever resolved again. `scan.rs` lists, `read.rs` reads, `apply.rs` changes.

mod apply;
mod copy;
mod read;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self as sys, AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};

pub use apply::{Outcome, Owner, Stage, Staged, StagedFile};
pub use read::{Read, content_of, read_blocks, read_small};
pub use scan::{ENTRIES_MAX, LISTED_MAX, Scan, ScanOptions, scan};

use crate::entry::{Entry, Kind, Stamp};
use crate::path::TreePath;

/// How long before a look a change must lie for its stamp to be trusted: the coarsest clock tick of
/// kernels, twice.
const RACY_NS: i128 = 20_000_000;

const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A folder's root.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    device: u64,
}

impl Root {
    /// Opens a folder. The path may lead through symlinks: it is the user's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = sys::open(path, flags, Mode::empty())?;
        let device = sys::fstat(&fd)?.st_dev;
        Ok(Self { fd, device })
    }

    /// Another handle of the same folder.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, device: self.device })
    }

    /// What names this tree's life: inode and birth of its root. A tree made anew differs.
    pub fn birth(&self) -> io::Result<[u8; 16]> {
        let mask = sys::StatxFlags::BTIME | sys::StatxFlags::INO;
        let stat = sys::statx(&self.fd, c"", AtFlags::EMPTY_PATH, mask)?;
        let mut birth = [0; 16];
        birth[..8].copy_from_slice(&stat.stx_ino.to_le_bytes());
        let born =
            stat.stx_btime.tv_sec.wrapping_mul(1_000_000_000) + i64::from(stat.stx_btime.tv_nsec);
        birth[8..].copy_from_slice(&born.to_le_bytes());
        Ok(birth)
    }

    /// What is at a path now; `None` when nothing is, or when the way to it is no directory.
    pub fn look(&self, path: &TreePath) -> io::Result<Option<Entry>> {
        let parent = match self.parent(path) {
            Ok(parent) => parent,
            Err(error) if is_absence(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match look_at(parent.as_fd(), path.name()) {
            Ok(found) => Ok(found.entry),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether anything, of whatever kind, is at a path.
    pub fn is_taken(&self, path: &TreePath) -> io::Result<bool> {
        let found = self
            .parent(path)
            .and_then(|parent| Ok(sys::statat(&parent, path.name(), AtFlags::SYMLINK_NOFOLLOW)?));
        match found {
            Ok(_) => Ok(true),
            Err(error) if is_absence(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits until a file's bytes are on the disk.
    pub fn flush(&self, path: &TreePath) -> io::Result<()> {
        let fd = read::open_file(self, path)?.0;
        Ok(sys::fdatasync(&fd)?)
    }

    /// Bytes that an ordinary user may still write to the file system.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = sys::fstatvfs(&self.fd)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Waits until everything written is on the disk.
    pub fn sync(&self) -> io::Result<()> {
        Ok(sys::syncfs(&self.fd)?)
    }

    /// The directory that holds a path.
    pub(crate) fn parent(&self, path: &TreePath) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match path.parent() {
            None => Ok(sys::openat(&self.fd, c".", flags, Mode::empty())?),
            Some(parent) => {
                Ok(sys::openat2(&self.fd, parent.as_bytes(), flags, Mode::empty(), RESOLVE)?)
            }
        }
    }
}

/// What one look at a name found.
struct Found {
    stat: Stat,
    /// `None`: of a kind that is not synced.
    entry: Option<Entry>,
}

/// Looks at a name in a directory, without following it.
fn look_at(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<Found> {
    let stat = sys::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mut entry = entry_of(&stat);
    if let Some(entry) = &mut entry
        && entry.kind == Kind::Symlink
    {
        entry.target = sys::readlinkat(directory, name, Vec::new())?.into_bytes();
    }
    Ok(Found { stat, entry })
}

#[expect(clippy::cast_possible_wrap, reason = "nanoseconds are below 2^30")]
fn nanoseconds(seconds: i64, nanoseconds: u64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds as i64)
}

/// The entry of a stat; `None` for kinds that are not synced. A symlink's target is not in it.
fn entry_of(stat: &Stat) -> Option<Entry> {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        _ => return None,
    };
    let mut entry = Entry::new(kind, if kind == Kind::Symlink { 0 } else { stat.st_mode & 0o777 });
    entry.stamp.inode = stat.st_ino;
    if kind == Kind::File {
        entry.stamp = Stamp {
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime_ns: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
            ctime_ns: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
        };
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let age = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
            - i128::from(entry.stamp.mtime_ns);
        entry.racy = age.abs() < RACY_NS;
    }
    Some(entry)
}

/// Nothing is there, or the way to it leads through something that is no directory.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        rustix::io::Errno::from_io_error(error),
        Some(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP)
    )
}
