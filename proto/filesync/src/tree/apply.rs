//! Changes a tree beneath its root by compare-and-swap: what is replaced or removed is looked at
//! after it was taken out, and put back when it is not what was expected.
//!
//! New things are made in a staging directory of the same file system and renamed into place, so
//! that nobody sees half a file and no edit made meanwhile is lost.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{self as sys, AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::{Root, is_absence, look_at};
use crate::content::BLOCK;
use crate::entry::{Entry, Kind};
use crate::path::TreePath;

/// Where things are made ready, at the root of the folder.
const STAGE: &[u8] = b".tow-stage";

/// Deepest nesting that is removed at once; each level holds a descriptor.
const DEPTH_MAX: usize = 512;

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was made; this is there now.
    Done(Option<Entry>),
    /// Nothing was changed: this is there, and is not what was expected.
    Changed(Option<Entry>),
    /// A directory that still holds something.
    NotEmpty,
}

/// Whom new files belong to; `None`: to whoever runs this.
pub type Owner = Option<(Uid, Gid)>;

/// A staging directory, and the changes made through it.
#[derive(Debug)]
pub struct Stage {
    pub(super) root: Root,
    pub(super) fd: OwnedFd,
    name: Vec<u8>,
    owner: Owner,
    durable: bool,
    made: u64,
    /// Something of somebody else's could not be put back and lies here.
    stray: bool,
}

/// A finished file, link, or whatever else waits in the stage.
#[derive(Debug)]
pub struct Staged(pub(super) Vec<u8>);

/// A file that is being written in the stage.
#[derive(Debug)]
pub struct StagedFile {
    fd: OwnedFd,
    name: Vec<u8>,
    size: u64,
    next: u64,
}

impl Stage {
    /// Makes a staging directory of its own for this session. `durable`: each file is on the disk
    /// before it is put in place.
    pub fn open(root: &Root, owner: Owner, durable: bool) -> io::Result<Self> {
        let root = root.try_clone()?;
        let all = open_own_directory(root.fd.as_fd(), STAGE)?;
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())?;
        let name: Vec<u8> =
            random.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect();
        let fd = open_own_directory(all.as_fd(), &name)?;
        sys::flock(&fd, sys::FlockOperation::NonBlockingLockExclusive)?;
        let stage = Self { root, fd, name, owner, durable, made: 0, stray: false };
        stage.clean_left_behind(&all);
        Ok(stage)
    }

    /// Begins a file of this size; what is not written is a hole.
    pub fn file(&mut self, size: u64) -> io::Result<StagedFile> {
        let name = self.fresh_name();
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&self.fd, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let file = StagedFile { fd, name, size, next: 0 };
        if size > 0 {
            sys::ftruncate(&file.fd, size)?;
        }
        Ok(file)
    }

    /// Finishes a file.
    pub fn finish(&mut self, file: StagedFile, mode: u32, mtime_ns: i64) -> io::Result<Staged> {
        self.give_away(&file.fd)?;
        sys::fchmod(&file.fd, Mode::from_raw_mode(mode & 0o777))?;
        sys::futimens(&file.fd, &times(mtime_ns))?;
        if self.durable {
            sys::fdatasync(&file.fd)?;
        }
        Ok(Staged(file.name))
    }

    /// Drops what was staged.
    pub fn discard(&mut self, name: StagedFile) {
        let _ = sys::unlinkat(&self.fd, &name.name, AtFlags::empty());
    }

    /// Drops a finished file.
    pub fn discard_staged(&mut self, staged: Staged) {
        let _ = sys::unlinkat(&self.fd, &staged.0, AtFlags::empty());
    }

    /// Makes a symlink ready.
    pub fn symlink(&mut self, target: &[u8]) -> io::Result<Staged> {
        let name = self.fresh_name();
        sys::symlinkat(target, &self.fd, &name)?;
        if let Some((uid, gid)) = self.owner {
            sys::chownat(&self.fd, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(Staged(name))
    }

    /// Puts what is staged in place of what is expected there.
    pub fn put(
        &mut self,
        path: &TreePath,
        staged: Staged,
        expected: Option<&Entry>,
    ) -> io::Result<Outcome> {
        let result = self.try_put(path, &staged, expected);
        if !matches!(result, Ok(Outcome::Done(_))) && !self.stray {
            self.discard_staged(staged);
        }
        self.or_changed(path, result)
    }

    /// Makes a directory, or gives an expected one this mode.
    pub fn directory(
        &mut self,
        path: &TreePath,
        mode: u32,
        expected: Option<&Entry>,
    ) -> io::Result<Outcome> {
        if expected.is_some_and(|expected| expected.kind != Kind::Directory) {
            match self.remove(path, expected)? {
                Outcome::Done(_) => {}
                other => return Ok(other),
            }
        }
        let result = self.try_directory(path, mode);
        self.or_changed(path, result)
    }

    /// Sets mode and modification time of what is expected there.
    pub fn set(
        &mut self,
        path: &TreePath,
        mode: u32,
        mtime_ns: i64,
        expected: &Entry,
    ) -> io::Result<Outcome> {
        let result = self.try_set(path, mode, mtime_ns, expected);
        self.or_changed(path, result)
    }

    /// Removes what is expected there; a directory only when it is empty.
    pub fn remove(&mut self, path: &TreePath, expected: Option<&Entry>) -> io::Result<Outcome> {
        let Some(expected) = expected else {
            let now = self.root.look(path)?;
            return Ok(if now.is_none() { Outcome::Done(None) } else { Outcome::Changed(now) });
        };
        let result = self.try_remove(path, expected);
        self.or_changed(path, result)
    }

    /// Removes a directory with all that is in it.
    pub fn remove_all(&mut self, path: &TreePath) -> io::Result<()> {
        let parent = self.root.parent(path)?;
        remove_tree(&parent, path.name(), 0)
    }

    /// Moves a finished file to a path that is free, for things kept aside; parents are made. Gives
    /// it back when something is there.
    pub fn try_aside(&mut self, path: &TreePath, staged: Staged) -> io::Result<Option<Staged>> {
        let mut parents = Vec::new();
        let mut parent = path.parent();
        while let Some(directory) = parent {
            parent = directory.parent();
            parents.push(directory);
        }
        for directory in parents.iter().rev() {
            if self.root.look(directory)?.is_none() {
                self.directory(directory, 0o755, None)?;
            }
        }
        let parent = self.root.parent(path)?;
        match self.place_new(&parent, path, &staged) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Some(staged)),
            Err(error) => Err(error),
        }
    }

    /// Removes the staging directory. What could not be put back stays, and is named.
    pub fn close(self) -> io::Result<()> {
        if self.stray {
            let place = format!(".tow-stage/{}", String::from_utf8_lossy(&self.name));
            return Err(io::Error::other(format!(
                "a file that changed while it was replaced could not be put back and lies in `{place}`"
            )));
        }
        self.clear()
    }

    fn clear(&self) -> io::Result<()> {
        let all = self.root.fd.as_fd();
        let stage = sys::openat(
            all,
            STAGE,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        empty(&self.fd);
        let _ = sys::unlinkat(&stage, &self.name, AtFlags::REMOVEDIR);
        let _ = sys::unlinkat(all, STAGE, AtFlags::REMOVEDIR);
        Ok(())
    }

    fn try_put(
        &mut self,
        path: &TreePath,
        staged: &Staged,
        expected: Option<&Entry>,
    ) -> io::Result<Outcome> {
        let parent = self.root.parent(path)?;
        match expected {
            Some(expected) if expected.kind != Kind::Directory => {
                if !self.exchange(&parent, path, staged, expected)? {
                    return Ok(Outcome::Changed(self.root.look(path)?));
                }
            }
            Some(_) => {
                match sys::unlinkat(&parent, path.name(), AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Outcome::NotEmpty),
                    other => other?,
                }
                self.place_new(&parent, path, staged)?;
            }
            None => self.place_new(&parent, path, staged)?,
        }
        Ok(Outcome::Done(look_at(parent.as_fd(), path.name())?.entry))
    }

    fn place_new(&self, parent: &OwnedFd, path: &TreePath, staged: &Staged) -> io::Result<()> {
        match sys::renameat_with(&self.fd, &staged.0, parent, path.name(), RenameFlags::NOREPLACE) {
            // A file system without it: a hard link refuses to replace as well.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                sys::linkat(&self.fd, &staged.0, parent, path.name(), AtFlags::empty())?;
                Ok(sys::unlinkat(&self.fd, &staged.0, AtFlags::empty())?)
            }
            other => Ok(other?),
        }
    }

    /// Swaps, then looks at what came out; false when it was not what was expected and is back.
    fn exchange(
        &mut self,
        parent: &OwnedFd,
        path: &TreePath,
        staged: &Staged,
        expected: &Entry,
    ) -> io::Result<bool> {
        let name = path.name();
        match sys::renameat_with(&self.fd, &staged.0, parent, name, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return self.replace_without_exchange(parent, name, staged, expected);
            }
            other => other?,
        }
        let out = look_at(self.fd.as_fd(), &staged.0)?;
        if out.entry.is_some_and(|out| out.survived_as(expected)) {
            sys::unlinkat(&self.fd, &staged.0, AtFlags::empty())?;
            return Ok(true);
        }
        if sys::renameat_with(&self.fd, &staged.0, parent, name, RenameFlags::EXCHANGE).is_err() {
            self.put_back(parent, name, &staged.0)?;
        }
        Ok(false)
    }

    /// For file systems that cannot swap: a short window remains there.
    fn replace_without_exchange(
        &self,
        parent: &OwnedFd,
        name: &[u8],
        staged: &Staged,
        expected: &Entry,
    ) -> io::Result<bool> {
        let now = look_at(parent.as_fd(), name)?.entry;
        if !now.is_some_and(|now| now.survived_as(expected)) {
            return Ok(false);
        }
        sys::renameat(&self.fd, &staged.0, parent, name)?;
        Ok(true)
    }

    fn put_back(&mut self, parent: &OwnedFd, name: &[u8], staged: &[u8]) -> io::Result<()> {
        let back = sys::renameat_with(&self.fd, staged, parent, name, RenameFlags::NOREPLACE);
        self.stray |= back.is_err();
        Ok(back?)
    }

    fn try_directory(&mut self, path: &TreePath, mode: u32) -> io::Result<Outcome> {
        let parent = self.root.parent(path)?;
        let new = match sys::mkdirat(&parent, path.name(), Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let found = look_at(parent.as_fd(), path.name())?;
        if found.entry.is_none_or(|entry| entry.kind != Kind::Directory) {
            return Ok(Outcome::Changed(self.root.look(path)?));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&parent, path.name(), flags, Mode::empty())?;
        if new {
            self.give_away(&fd)?;
        }
        sys::fchmod(&fd, Mode::from_raw_mode(mode & 0o777))?;
        Ok(Outcome::Done(look_at(parent.as_fd(), path.name())?.entry))
    }

    fn try_set(
        &mut self,
        path: &TreePath,
        mode: u32,
        mtime_ns: i64,
        expected: &Entry,
    ) -> io::Result<Outcome> {
        let parent = self.root.parent(path)?;
        // A descriptor of the path alone: it pins what was looked at, whatever its permissions.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&parent, path.name(), flags, Mode::empty())?;
        let now = super::entry_of(&sys::fstat(&fd)?);
        let same = now.as_ref().is_some_and(|now| {
            now.kind == expected.kind && (now.kind != Kind::File || now.survived_as(expected))
        });
        if !same || expected.kind == Kind::Symlink {
            return Ok(Outcome::Changed(self.root.look(path)?));
        }
        let pinned = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        sys::chmod(&pinned, Mode::from_raw_mode(mode & 0o777))?;
        if expected.kind == Kind::File {
            sys::utimensat(sys::CWD, &pinned, &times(mtime_ns), AtFlags::empty())?;
        }
        Ok(Outcome::Done(look_at(parent.as_fd(), path.name())?.entry))
    }

    fn try_remove(&mut self, path: &TreePath, expected: &Entry) -> io::Result<Outcome> {
        let parent = self.root.parent(path)?;
        if expected.kind == Kind::Directory {
            return match sys::unlinkat(&parent, path.name(), AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(Outcome::NotEmpty),
                other => Ok(other.map(|()| Outcome::Done(None))?),
            };
        }
        let name = self.fresh_name();
        sys::renameat(&parent, path.name(), &self.fd, &name)?;
        let out = look_at(self.fd.as_fd(), &name)?;
        if out.entry.is_some_and(|out| out.survived_as(expected)) {
            sys::unlinkat(&self.fd, &name, AtFlags::empty())?;
            return Ok(Outcome::Done(None));
        }
        self.put_back(&parent, path.name(), &name)?;
        Ok(Outcome::Changed(self.root.look(path)?))
    }

    /// What came or went meanwhile is no error: the path is looked at again and decided anew.
    fn or_changed(&self, path: &TreePath, result: io::Result<Outcome>) -> io::Result<Outcome> {
        match result {
            Err(error)
                if !self.stray
                    && (is_absence(&error) || error.kind() == io::ErrorKind::AlreadyExists) =>
            {
                Ok(Outcome::Changed(self.root.look(path)?))
            }
            other => other,
        }
    }

    pub(super) fn give_away(&self, fd: &OwnedFd) -> io::Result<()> {
        match self.owner {
            Some((uid, gid)) => Ok(sys::fchown(fd, Some(uid), Some(gid))?),
            None => Ok(()),
        }
    }

    fn fresh_name(&mut self) -> Vec<u8> {
        self.made += 1;
        format!("{}", self.made).into_bytes()
    }

    /// Removes staging directories of sessions that died: nobody holds their lock.
    fn clean_left_behind(&self, all: &OwnedFd) {
        let Ok(listing) = sys::Dir::read_from(all) else { return };
        for item in listing.flatten() {
            let name = item.file_name().to_bytes();
            if name == b"." || name == b".." || name == self.name {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(fd) = sys::openat(all, name, flags, Mode::empty()) else { continue };
            if sys::flock(&fd, sys::FlockOperation::NonBlockingLockExclusive).is_ok() {
                empty(&fd);
                let _ = sys::unlinkat(all, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

impl Drop for Stage {
    /// A session that was cut leaves nothing behind either, but what could not be put back.
    fn drop(&mut self) {
        if !self.stray {
            let _ = self.clear();
        }
    }
}

impl StagedFile {
    /// Writes the block at `offset`: blocks come in order, start at multiples of [`BLOCK`] and end
    /// where the next one starts, or the file.
    pub fn block(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        let whole = (self.size.saturating_sub(offset)).min(BLOCK as u64);
        if offset < self.next
            || !offset.is_multiple_of(BLOCK as u64)
            || length != whole
            || length == 0
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{length} bytes at {offset} are no block of a file of {} bytes", self.size),
            ));
        }
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&self.fd, &bytes[done..], offset + done as u64) {
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.next = offset + BLOCK as u64;
        Ok(())
    }
}

fn open_own_directory(parent: std::os::fd::BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    match sys::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(sys::openat(parent, name, flags, Mode::empty())?)
}

/// Removes a tree, following nothing; as deep as paths may be.
fn remove_tree(parent: &OwnedFd, name: &[u8], depth: usize) -> io::Result<()> {
    match sys::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return Ok(other?),
    }
    if depth > DEPTH_MAX {
        return Err(io::Error::other("a directory is nested too deeply to be removed"));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = sys::openat(parent, name, flags, Mode::empty())?;
    for item in sys::Dir::read_from(&fd)? {
        let item = item?;
        let inner = item.file_name().to_bytes();
        if inner != b"." && inner != b".." {
            remove_tree(&fd, inner, depth + 1)?;
        }
    }
    Ok(sys::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Unlinks the files of a staging directory.
fn empty(fd: &OwnedFd) {
    let Ok(listing) = sys::Dir::read_from(fd) else { return };
    for item in listing.flatten() {
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            let _ = sys::unlinkat(fd, name, AtFlags::empty());
        }
    }
}

fn times(mtime_ns: i64) -> Timestamps {
    let mtime = Timespec {
        tv_sec: mtime_ns.div_euclid(1_000_000_000),
        tv_nsec: mtime_ns.rem_euclid(1_000_000_000),
    };
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: sys::UTIME_OMIT },
        last_modification: mtime,
    }
}
