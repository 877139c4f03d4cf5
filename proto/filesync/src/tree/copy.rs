//! What a copy needs of a tree: things that replace whatever plain thing has their name, as `cp`
//! does. Synchronisation never uses these: it compares before it swaps.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{self as sys, AtFlags, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::{Root, Stage, Staged, look_at};
use crate::entry::Kind;
use crate::path::TreePath;

/// Names of one directory.
const NAMES_MAX: usize = 1_000_000;

impl Root {
    /// A folder by its descriptor.
    pub fn from_directory(fd: OwnedFd) -> io::Result<Self> {
        let device = sys::fstat(&fd)?.st_dev;
        Ok(Self { fd, device })
    }

    /// The names in a directory, the root without one.
    pub fn names(&self, directory: Option<&TreePath>) -> io::Result<Vec<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match directory {
            Some(path) => {
                sys::openat2(&self.fd, path.as_bytes(), flags, Mode::empty(), super::RESOLVE)?
            }
            None => sys::openat(&self.fd, c".", flags, Mode::empty())?,
        };
        let mut names = Vec::new();
        for item in sys::Dir::read_from(&fd)? {
            let item = item?;
            let name = item.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() == NAMES_MAX {
                return Err(io::Error::other("the directory has too many names"));
            }
            names.push(name.to_vec());
        }
        Ok(names)
    }
}

impl Stage {
    /// Puts what is staged in place of any file or link there; not of a directory.
    pub fn replace(&mut self, path: &TreePath, staged: Staged) -> io::Result<()> {
        let put = self
            .root
            .parent(path)
            .and_then(|parent| Ok(sys::renameat(&self.fd, &staged.0, &parent, path.name())?));
        if put.is_err() {
            self.discard_staged(staged);
        }
        put
    }

    /// Makes a directory that its owner alone may enter, if there is none; true if it is new.
    pub fn make_directory(&mut self, path: &TreePath) -> io::Result<bool> {
        let parent = self.root.parent(path)?;
        match sys::mkdirat(&parent, path.name(), Mode::RWXU) {
            Ok(()) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                self.give_away(&sys::openat(&parent, path.name(), flags, Mode::empty())?)?;
                // Others see it as others' directories, until it is finished.
                sys::chmodat(&parent, path.name(), Mode::from_raw_mode(0o755), AtFlags::empty())?;
                Ok(true)
            }
            Err(Errno::EXIST) => {
                use std::os::fd::AsFd as _;
                let found = look_at(parent.as_fd(), path.name())?;
                match found.entry.is_some_and(|entry| entry.kind == Kind::Directory) {
                    true => Ok(false),
                    false => Err(Errno::NOTDIR.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a directory its mode and modification time.
    pub fn finish_directory(&self, path: &TreePath, mode: u32, mtime_ns: i64) -> io::Result<()> {
        let parent = self.root.parent(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&parent, path.name(), flags, Mode::empty())?;
        sys::fchmod(&fd, Mode::from_raw_mode(mode & 0o777))?;
        let mtime = Timespec {
            tv_sec: mtime_ns.div_euclid(1_000_000_000),
            tv_nsec: mtime_ns.rem_euclid(1_000_000_000),
        };
        let last_access = Timespec { tv_sec: 0, tv_nsec: sys::UTIME_OMIT };
        Ok(sys::futimens(&fd, &Timestamps { last_access, last_modification: mtime })?)
    }
}
