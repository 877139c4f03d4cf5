//! Whether a file equals the one below it: its kind, mode, owner, extended attributes, content.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Differs, Kind, Meta};
use crate::root::own_path;

/// The kernel bounds an attribute's value, and the list of names, to this.
const XATTR_MAX: usize = 64 << 10;
/// What overlayfs keeps for itself; `user.` where it may not write `trusted.`.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];
/// Read of both files before `looked` is called.
const PIECE: u64 = 256 << 10;

/// A file that was opened as itself, whatever it is.
#[derive(Debug)]
pub(crate) struct Found {
    fd: OwnedFd,
    pub(crate) meta: Meta,
    pub(crate) node: Node,
}

/// Which file it is, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    /// Of the file system.
    device: u64,
    inode: u64,
}

/// What a name stands for.
#[derive(Debug)]
pub(super) enum Look {
    File(Found),
    Socket,
    /// Overlayfs' mark for what was removed.
    Whiteout,
    Nothing,
}

/// Opens what has this name, without following a link.
pub(super) fn look(folder: &OwnedFd, name: &[u8]) -> io::Result<Look> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(Look::Nothing),
        Err(error) => return Err(error.into()),
    };
    let stat = rustix::fs::fstat(&fd)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::Regular,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice if stat.st_rdev == 0 => return Ok(Look::Whiteout),
        FileType::CharacterDevice => Kind::Character,
        FileType::BlockDevice => Kind::Block,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket | FileType::Unknown => return Ok(Look::Socket),
    };
    let (mut size, mut device) = (0, 0);
    match kind {
        Kind::Regular | Kind::Symlink => size = u64::try_from(stat.st_size).unwrap_or(0),
        Kind::Character | Kind::Block => device = stat.st_rdev,
        Kind::Directory | Kind::Fifo => {}
    }
    // A link's mode means nothing.
    let mode = if kind == Kind::Symlink { 0o777 } else { stat.st_mode & 0o7777 };
    let (uid, gid) = (stat.st_uid, stat.st_gid);
    let (links, modified_s) = (stat.st_nlink, stat.st_mtime);
    let meta = Meta { kind, mode, uid, gid, size, device, links, modified_s };
    let node = Node { device: stat.st_dev, inode: stat.st_ino };
    Ok(Look::File(Found { fd, meta, node }))
}

/// Whether overlayfs hides what is below this directory.
pub(super) fn is_opaque(folder: BorrowedFd<'_>) -> io::Result<bool> {
    for prefix in OVERLAY {
        let name = [prefix, b"opaque"].concat();
        let mut value = [0; 2];
        match rustix::fs::getxattr(own_path(folder), &name[..], &mut value[..]) {
            Ok(1) if value[0] == b'y' => return Ok(true),
            Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::RANGE) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

impl Found {
    /// Opens a regular file's content.
    pub(crate) fn content(&self) -> io::Result<File> {
        Ok(self.open(OFlags::empty())?.into())
    }

    /// Opens it for reading: the same file, whatever has its name now.
    fn open(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(own_path(self.fd.as_fd()), flags, Mode::empty())?)
    }

    /// Opens a directory to walk it.
    pub(super) fn folder(&self) -> io::Result<OwnedFd> {
        self.open(OFlags::DIRECTORY)
    }

    /// In what it differs from the one below.
    pub(super) fn differs<E: From<io::Error>>(
        &self,
        below: &Self,
        looked: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<Differs, E> {
        let (now, before) = (&self.meta, &below.meta);
        if now.kind != before.kind {
            return Ok(Differs { kind: true, ..Differs::default() });
        }
        let content = match now.kind {
            Kind::Regular => {
                now.size != before.size || !self.has_same_bytes(below, now.size, looked)?
            }
            Kind::Symlink => self.target()? != below.target()?,
            Kind::Character | Kind::Block => now.device != before.device,
            Kind::Directory | Kind::Fifo => false,
        };
        Ok(Differs {
            kind: false,
            content,
            mode: now.mode != before.mode,
            owner: (now.uid, now.gid) != (before.uid, before.gid),
            xattrs: self.xattrs()? != below.xattrs()?,
            links: false,
        })
    }

    fn has_same_bytes<E: From<io::Error>>(
        &self,
        below: &Self,
        size: u64,
        looked: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<bool, E> {
        if size == 0 {
            return Ok(true);
        }
        // No more of either is read than it had: one may grow for ever.
        let open = |file: &Self| io::Result::Ok(file.content()?.take(size));
        let (mut one, mut other) = (open(self)?, open(below)?);
        let (mut now, mut before) = (Vec::new(), Vec::new());
        loop {
            let len = piece(&mut one, &mut now)?;
            piece(&mut other, &mut before)?;
            if now != before {
                return Ok(false);
            }
            if len == 0 {
                return Ok(true);
            }
            looked()?;
        }
    }

    /// Where a symbolic link leads to.
    pub(crate) fn target(&self) -> io::Result<Vec<u8>> {
        let target = rustix::fs::readlinkat(&self.fd, "", Vec::new())?;
        Ok(target.into_bytes())
    }

    /// Its extended attributes but overlayfs' own.
    pub(crate) fn xattrs(&self) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let path = own_path(self.fd.as_fd());
        let mut names = Vec::with_capacity(XATTR_MAX);
        match rustix::fs::listxattr(&path, spare_capacity(&mut names)) {
            Ok(_) => {}
            // The file system has none, or none for this kind of file.
            Err(Errno::OPNOTSUPP | Errno::NODATA | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        let mut found = BTreeMap::new();
        let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
        for name in names.filter(|name| !OVERLAY.iter().any(|own| name.starts_with(own))) {
            let mut value = Vec::with_capacity(XATTR_MAX);
            match rustix::fs::getxattr(&path, name, spare_capacity(&mut value)) {
                Ok(_) => found.insert(name.to_vec(), value.as_slice().to_vec()),
                // Removed meanwhile.
                Err(Errno::NODATA) => continue,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(found)
    }
}

/// Reads so much of a file, or to its end.
fn piece(file: &mut impl Read, into: &mut Vec<u8>) -> io::Result<usize> {
    into.clear();
    file.take(PIECE).read_to_end(into)
}
