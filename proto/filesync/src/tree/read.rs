//! Reads files beneath a root, block by block, without what is zero.
//!
//! Says whether the file stayed the same meanwhile: what changed under the reader is no version of
//! anything and must be read again.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;

use rustix::fs::{self as sys, Mode, OFlags, SeekFrom};

use super::{Root, entry_of};
use crate::content::{BLOCK, ContentHasher, ContentId, is_zero};
use crate::entry::{Entry, Kind};
use crate::path::TreePath;

/// What was read.
#[derive(Debug)]
pub struct Read {
    /// The file, with its content.
    pub entry: Entry,
    /// It changed while it was read.
    pub changed: bool,
}

/// Reads a file and gives each block that is not zero to `sink`.
pub fn read_blocks(
    root: &Root,
    path: &TreePath,
    mut sink: impl FnMut(&Entry, u64, &[u8]) -> io::Result<()>,
) -> io::Result<Read> {
    let (fd, mut entry) = open_file(root, path)?;
    let size = entry.stamp.size;
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0; BLOCK.min(usize::try_from(size).unwrap_or(BLOCK))];
    let mut offset = 0;
    while let Some(start) = next_data(&fd, offset, size)? {
        let length = usize::try_from((size - start).min(BLOCK as u64)).unwrap_or(BLOCK);
        let block = &mut buffer[..length];
        if !fill(&fd, start, block)? {
            break;
        }
        if !is_zero(block) {
            hasher.block(start, block);
            sink(&entry, start, block)?;
        }
        offset = start + BLOCK as u64;
    }
    let changed = entry_of(&sys::fstat(&fd)?)
        .is_none_or(|after| (after.stamp, after.mode) != (entry.stamp, entry.mode));
    entry.content = Some(hasher.finish(size));
    Ok(Read { entry, changed })
}

/// Reads a file of at most `max` bytes; `None` when it is absent, longer, or no file.
pub fn read_small(root: &Root, path: &TreePath, max: usize) -> io::Result<Option<Vec<u8>>> {
    match root.look(path)? {
        Some(entry) if entry.kind == Kind::File && entry.stamp.size <= max as u64 => {}
        _ => return Ok(None),
    }
    let mut bytes = Vec::new();
    let read = read_blocks(root, path, |_, offset, block| {
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        if offset + block.len() > max {
            return Err(io::Error::other("the file grew"));
        }
        bytes.resize(offset, 0);
        bytes.extend_from_slice(block);
        Ok(())
    })?;
    bytes.resize(usize::try_from(read.entry.stamp.size).map_or(max, |size| size.min(max)), 0);
    Ok(Some(bytes))
}

/// The content id alone.
pub fn content_of(root: &Root, path: &TreePath) -> io::Result<Option<ContentId>> {
    let read = read_blocks(root, path, |_, _, _| Ok(()))?;
    Ok(read.entry.content.filter(|_| !read.changed))
}

pub(super) fn open_file(root: &Root, path: &TreePath) -> io::Result<(OwnedFd, Entry)> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let parent = root.parent(path)?;
    // Only regular files are opened: opening a device or a pipe would have effects.
    let looked = super::look_at(parent.as_fd(), path.name())?;
    let is_file = |entry: &Entry| entry.kind == Kind::File;
    let not_a_file = || io::Error::new(io::ErrorKind::NotFound, "it is no regular file");
    looked.entry.filter(is_file).ok_or_else(not_a_file)?;
    let fd = sys::openat(&parent, path.name(), flags, Mode::empty())?;
    let entry = entry_of(&sys::fstat(&fd)?).filter(is_file).ok_or_else(not_a_file)?;
    Ok((fd, entry))
}

/// Where the next block with data starts, skipping holes.
fn next_data(fd: &OwnedFd, offset: u64, size: u64) -> io::Result<Option<u64>> {
    if offset >= size {
        return Ok(None);
    }
    match sys::seek(fd, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data - data % BLOCK as u64)
            .map(|start| start.max(offset))
            .filter(|start| *start < size)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        // No holes on this file system.
        Err(_) => Ok(Some(offset)),
    }
}

/// Reads a whole block; false when the file ends before.
fn fill(fd: &OwnedFd, offset: u64, block: &mut [u8]) -> io::Result<bool> {
    let mut done = 0;
    while done < block.len() {
        match rustix::io::pread(fd, &mut block[done..], offset + done as u64) {
            Ok(0) => return Ok(false),
            Ok(read) => done += read,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
