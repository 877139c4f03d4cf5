//! Makes an archive of a tree: in order of names, modes and modification times kept, links as links.
//! What changes under the reader ends the copy: half a file is nobody's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{self as sys, AtFlags, FileType, Mode, OFlags, Stat};
use tar::{Builder, EntryType, Header};

use super::place::Source;
use super::{CopyError, ENTRIES_MAX, Totals, at};
use crate::path::TreePath;
use crate::tree::Root;

/// Writes the archive.
pub fn pack(source: &Source, to: impl Write) -> Result<Totals, CopyError> {
    let mut packer = Packer { archive: Builder::new(to), totals: Totals::default() };
    match &source.name {
        Some(name) => {
            let path = TreePath::from_components(&[name]).map_err(|error| CopyError::Refused {
                name: super::shown(name),
                why: format!(": {error}"),
            })?;
            packer.item(&source.root, &path)?;
        }
        None => packer.content(&source.root, None)?,
    }
    let Packer { archive, totals } = packer;
    archive.into_inner().and_then(|mut to| to.flush()).map_err(CopyError::Output)?;
    Ok(totals)
}

struct Packer<W: Write> {
    archive: Builder<W>,
    totals: Totals,
}

impl<W: Write> Packer<W> {
    fn item(&mut self, root: &Root, path: &TreePath) -> Result<(), CopyError> {
        let name = path.as_bytes();
        if self.totals.files >= ENTRIES_MAX {
            let why = format!("is one too many: a copy has at most {ENTRIES_MAX} entries");
            return Err(CopyError::Refused { name: super::shown(name), why });
        }
        let parent = root.parent(path).map_err(at(name))?;
        let stat = sys::statat(&parent, path.name(), AtFlags::SYMLINK_NOFOLLOW);
        let stat = stat.map_err(|error| at(name)(error.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.file(root, path)?,
            FileType::Directory => {
                let mut header = header(EntryType::Directory, &stat);
                self.archive
                    .append_data(&mut header, path.as_path(), io::empty())
                    .map_err(CopyError::Output)?;
                self.totals.files += 1;
                self.content(root, Some(path))?;
            }
            FileType::Symlink => {
                let target = sys::readlinkat(&parent, path.name(), Vec::new());
                let target = target.map_err(|error| at(name)(error.into()))?.into_bytes();
                let target = std::ffi::OsStr::from_bytes(&target);
                let mut header = header(EntryType::Symlink, &stat);
                self.archive
                    .append_link(&mut header, path.as_path(), target)
                    .map_err(CopyError::Output)?;
                self.totals.files += 1;
            }
            _ => self.totals.skipped += 1,
        }
        Ok(())
    }

    fn content(&mut self, root: &Root, of: Option<&TreePath>) -> Result<(), CopyError> {
        let shown = of.map_or(b".".as_slice(), TreePath::as_bytes);
        let mut names = root.names(of).map_err(at(shown))?;
        names.sort_unstable();
        for name in names {
            let path = match of {
                Some(of) => of.join(&name),
                None => TreePath::from_components(&[&name]),
            };
            let path = path.map_err(|error| CopyError::Refused {
                name: super::shown(&name),
                why: format!("cannot be copied: {error}"),
            })?;
            self.item(root, &path)?;
        }
        Ok(())
    }

    fn file(&mut self, root: &Root, path: &TreePath) -> Result<(), CopyError> {
        let name = path.as_bytes();
        let parent = root.parent(path).map_err(at(name))?;
        // Whatever it has become meanwhile, opening it neither blocks nor follows.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = sys::openat(&parent, path.name(), flags, Mode::empty());
        let fd = opened.map_err(|error| at(name)(error.into()))?;
        let stat = sys::fstat(fd.as_fd()).map_err(|error| at(name)(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(at(name)(io::Error::other("it changed while it was copied")));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut header = header(EntryType::Regular, &stat);
        header.set_size(size);
        let mut exact = Exact { inner: File::from(fd), left: size, failed: None };
        let appended = self.archive.append_data(&mut header, path.as_path(), &mut exact);
        if let Some(error) = exact.failed {
            return Err(at(name)(error));
        }
        appended.map_err(CopyError::Output)?;
        self.totals.files += 1;
        self.totals.bytes += size;
        Ok(())
    }
}

fn header(kind: EntryType, stat: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o777);
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// Exactly as many bytes as the header says: one that shrank is an error, one that grew is cut.
struct Exact {
    inner: File,
    left: u64,
    failed: Option<io::Error>,
}

impl Read for Exact {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        if max == 0 {
            return Ok(0);
        }
        match self.inner.read(&mut into[..max]) {
            Ok(0) => self.fail(io::Error::other("it became shorter while it was copied")),
            Ok(len) => {
                self.left -= len as u64;
                Ok(len)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => self.fail(error),
        }
    }
}

impl Exact {
    fn fail(&mut self, error: io::Error) -> io::Result<usize> {
        self.failed = Some(error);
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
