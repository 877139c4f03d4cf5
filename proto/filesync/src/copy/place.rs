//! What the two paths of a copy mean, as docker's users mean them: what is copied, and under which
//! name it arrives.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{self as sys, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::tree::Root;

/// From where paths are resolved.
#[derive(Debug)]
pub struct Base {
    /// A directory; relative paths begin here.
    pub directory: OwnedFd,
    /// How far they may lead.
    pub resolve: ResolveFlags,
}

/// What is copied: a tree beneath a directory.
#[derive(Debug)]
pub struct Source {
    /// The directory that holds it, or whose content it is.
    pub root: Root,
    /// The item in it; `None`: all that is in it.
    pub name: Option<Vec<u8>>,
}

/// Where an archive is applied.
#[derive(Debug)]
pub struct Place {
    /// The directory.
    pub root: Root,
    /// The one item that may come, and the name that it gets; `None`: whatever comes.
    pub only: Option<(Vec<u8>, Vec<u8>)>,
    /// The path was written as a directory's and is not there: only a directory will do.
    pub directory_only: bool,
}

/// The name under which the item of a path travels; `None` when its content is meant (`dir/.`, `/`).
pub fn source_name(path: &[u8]) -> Option<&[u8]> {
    let name = path.rsplit(|&b| b == b'/').find(|name| !name.is_empty())?;
    let content = name == b"." || name == b"..";
    (!content).then_some(name)
}

/// The directory that a path is in, and its last name.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = path.iter().rposition(|&b| b != b'/')? + 1;
    let path = &path[..end];
    let start = path.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
    let directory = match &path[..start] {
        b"" => b".".as_slice(),
        directory => directory,
    };
    Some((directory, &path[start..]))
}

impl Base {
    fn open(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(sys::openat2(&self.directory, path, flags, Mode::empty(), self.resolve)?)
    }

    /// Opens what is to be copied. A link at the end is copied as a link, unless the path goes on
    /// with a slash.
    pub fn source(&self, path: &[u8]) -> io::Result<Source> {
        let Some(name) = source_name(path) else {
            return Ok(Source { root: Root::from_directory(self.open(path)?)?, name: None });
        };
        let (directory, _) = split(path).ok_or(io::ErrorKind::InvalidInput)?;
        let directory = self.open(directory)?;
        let stat = sys::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if is_link && path.ends_with(b"/") {
            // What the link means, whatever that is called.
            return Ok(Source { root: Root::from_directory(self.open(path)?)?, name: None });
        }
        if path.ends_with(b"/") && FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Source { root: Root::from_directory(directory)?, name: Some(name.to_vec()) })
    }

    /// Opens where a copy of `name` goes (`None`: of a directory's content). `make`: a directory
    /// that is not there is made for content.
    pub fn place(&self, path: &[u8], name: Option<&[u8]>, make: bool) -> io::Result<Place> {
        let missing = match self.open(path) {
            Ok(directory) => {
                let only = name.map(|name| (name.to_vec(), name.to_vec()));
                let root = Root::from_directory(directory)?;
                return Ok(Place { root, only, directory_only: false });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTDIR) => false,
            Err(error) => return Err(error),
        };
        let (directory, last) = split(path).ok_or(io::ErrorKind::InvalidInput)?;
        if last == b"." || last == b".." {
            return Err(io::ErrorKind::NotFound.into());
        }
        let directory = self.open(directory)?;
        match name {
            Some(name) => Ok(Place {
                root: Root::from_directory(directory)?,
                only: Some((name.to_vec(), last.to_vec())),
                directory_only: path.ends_with(b"/"),
            }),
            None if missing && make => {
                sys::mkdirat(&directory, last, Mode::from_raw_mode(0o755))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = sys::openat(&directory, last, flags, Mode::empty())?;
                let root = Root::from_directory(made)?;
                Ok(Place { root, only: None, directory_only: false })
            }
            None if missing => Err(io::ErrorKind::NotFound.into()),
            None => Err(Errno::NOTDIR.into()),
        }
    }
}
