//! Applies an archive beneath a directory. Extension records are read here, bounded, because what a
//! library keeps of them is not; sizes and names are checked before anything is made.

use std::io::{self, Read};

use tar::{Archive, Entry, EntryType};

use super::place::Place;
use super::{CopyError, ENTRIES_MAX, Totals, at, shown};
use crate::content::BLOCK;
use crate::path::{PATH_BYTES_MAX, TreePath};
use crate::tree::{Owner, Stage};

/// Bytes of one extension record.
const EXTENSION_MAX: u64 = 64 << 10;

/// Applies it. `owner`: whose the files become, where that is not whoever runs this.
pub fn unpack(from: impl Read, place: &Place, owner: Owner) -> Result<Totals, CopyError> {
    let stage = Stage::open(&place.root, owner, false);
    let stage = stage.map_err(|error| at(b".")(error))?;
    let mut unpacker = Unpacker {
        place,
        stage,
        totals: Totals::default(),
        directories: Vec::new(),
        name: None,
        link: None,
        mtime: None,
    };
    let mut archive = Archive::new(from);
    let entries = archive.entries().map_err(CopyError::Archive)?.raw(true);
    let mut result = Ok(());
    for entry in entries {
        result = entry.map_err(CopyError::Archive).and_then(|entry| unpacker.entry(entry));
        if result.is_err() {
            break;
        }
    }
    // Also after an error: what is there should be as the archive has it.
    let finished = unpacker.finish();
    result.and(finished)
}

struct Unpacker<'a> {
    place: &'a Place,
    stage: Stage,
    totals: Totals,
    /// Modes and times of new directories: set when nothing more goes into them.
    directories: Vec<(TreePath, u32, i64)>,
    /// Of the entry that follows.
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    mtime: Option<i64>,
}

impl Unpacker<'_> {
    fn entry(&mut self, mut entry: Entry<'_, impl Read>) -> Result<(), CopyError> {
        match entry.header().entry_type() {
            EntryType::GNULongName => {
                self.name = Some(text(extension(&mut entry, PATH_BYTES_MAX as u64 + 1)?));
                Ok(())
            }
            EntryType::GNULongLink => {
                self.link = Some(text(extension(&mut entry, PATH_BYTES_MAX as u64 + 1)?));
                Ok(())
            }
            EntryType::XHeader => self.pax(&extension(&mut entry, EXTENSION_MAX)?),
            EntryType::XGlobalHeader => Ok(()),
            kind => self.item(kind, entry),
        }
    }

    fn pax(&mut self, records: &[u8]) -> Result<(), CopyError> {
        for record in tar::PaxExtensions::new(records) {
            let record = record.map_err(CopyError::Archive)?;
            match record.key_bytes() {
                b"path" => self.name = Some(record.value_bytes().to_vec()),
                b"linkpath" => self.link = Some(record.value_bytes().to_vec()),
                b"mtime" => self.mtime = pax_time(record.value_bytes()),
                b"size" => {
                    let why = "has its size in an extended header, which is not taken: use \
                               `tar --format=gnu`";
                    let name = shown(self.name.as_deref().unwrap_or(b"an entry"));
                    return Err(CopyError::Refused { name, why: why.into() });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn item(&mut self, kind: EntryType, mut entry: Entry<'_, impl Read>) -> Result<(), CopyError> {
        let name = self.name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let link = self.link.take();
        let mtime = self.mtime.take();
        let refused = |why: &str| CopyError::Refused { name: shown(&name), why: why.into() };
        if self.totals.files >= ENTRIES_MAX {
            return Err(refused(&format!("is one too many: at most {ENTRIES_MAX} are taken")));
        }
        let Some(path) = self.path(&name)? else { return Ok(()) };
        let header = entry.header();
        let mode = header.mode().map_err(CopyError::Archive)? & 0o777;
        let seconds = header.mtime().map_err(CopyError::Archive)?;
        let mtime = mtime.unwrap_or_else(|| {
            i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000_000)
        });
        // Older archives mark a directory only by its name.
        let kind = match kind {
            EntryType::Regular if name.ends_with(b"/") => EntryType::Directory,
            kind => kind,
        };
        let top = self.place.directory_only && path.depth() == 1;
        if top && kind != EntryType::Directory {
            return Err(refused("is no directory, but its destination was written as one"));
        }
        match kind {
            EntryType::Regular | EntryType::Continuous => {
                self.file(&path, &name, mode, mtime, &mut entry)?;
            }
            EntryType::Directory => self.directory(&path, &name, mode, mtime)?,
            EntryType::Symlink => {
                let target = match link {
                    Some(link) => link,
                    None => entry.link_name_bytes().unwrap_or_default().into_owned(),
                };
                self.symlink(&path, &name, &target)?;
            }
            EntryType::Link => return Err(refused("is a hard link, which is not taken")),
            EntryType::Char | EntryType::Block => return Err(refused("is a device")),
            EntryType::Fifo => return Err(refused("is a pipe")),
            EntryType::GNUSparse => {
                return Err(refused("is a sparse file of GNU tar, which is not taken"));
            }
            _ => return Err(refused("is of a kind that is not taken")),
        }
        self.totals.files += 1;
        Ok(())
    }

    /// Where an entry goes; `None` for the root itself.
    fn path(&self, name: &[u8]) -> Result<Option<TreePath>, CopyError> {
        let refused = |why: String| CopyError::Refused { name: shown(name), why };
        if name.first() == Some(&b'/') {
            return Err(refused("has an absolute name".into()));
        }
        let names = name.split(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".");
        let mut names: Vec<&[u8]> = names.collect();
        let Some(first) = names.first_mut() else { return Ok(None) };
        if let Some((from, to)) = &self.place.only {
            if *first != &from[..] {
                return Err(refused("was not asked for".into()));
            }
            *first = to;
        }
        let path = TreePath::from_components(&names);
        path.map(Some).map_err(|error| refused(format!("cannot be made: {error}")))
    }

    fn file(
        &mut self,
        path: &TreePath,
        name: &[u8],
        mode: u32,
        mtime: i64,
        entry: &mut Entry<'_, impl Read>,
    ) -> Result<(), CopyError> {
        let size = entry.size();
        let free = self.place.root.free_bytes().map_err(at(name))?;
        if size > free {
            let why = format!("has {size} bytes; {free} are free where it goes");
            return Err(CopyError::Refused { name: shown(name), why });
        }
        self.make_parents(path, name)?;
        let mut file = self.stage.file(size).map_err(at(name))?;
        let mut buffer = vec![0; BLOCK.min(usize::try_from(size).unwrap_or(BLOCK))];
        let mut offset = 0;
        while offset < size {
            let length = usize::try_from((size - offset).min(BLOCK as u64)).unwrap_or(BLOCK);
            let block = &mut buffer[..length];
            let wrote = match entry.read_exact(block) {
                Ok(()) => file.block(offset, block).map_err(at(name)),
                Err(error) => Err(CopyError::Archive(error)),
            };
            if let Err(error) = wrote {
                self.stage.discard(file);
                return Err(error);
            }
            offset += length as u64;
        }
        let staged = self.stage.finish(file, mode, mtime).map_err(at(name))?;
        self.stage.replace(path, staged).map_err(at(name))?;
        self.totals.bytes += size;
        Ok(())
    }

    fn directory(
        &mut self,
        path: &TreePath,
        name: &[u8],
        mode: u32,
        mtime: i64,
    ) -> Result<(), CopyError> {
        self.make_parents(path, name)?;
        if self.stage.make_directory(path).map_err(at(name))? {
            self.directories.push((path.clone(), mode, mtime));
        }
        Ok(())
    }

    fn symlink(&mut self, path: &TreePath, name: &[u8], target: &[u8]) -> Result<(), CopyError> {
        let sane = !target.is_empty() && target.len() <= PATH_BYTES_MAX && !target.contains(&0);
        if !sane {
            let why = "is a link to nothing that could be".into();
            return Err(CopyError::Refused { name: shown(name), why });
        }
        self.make_parents(path, name)?;
        let staged = self.stage.symlink(target).map_err(at(name))?;
        self.stage.replace(path, staged).map_err(at(name))
    }

    /// Directories that an archive leaves out are made as any other.
    fn make_parents(&mut self, path: &TreePath, name: &[u8]) -> Result<(), CopyError> {
        let mut missing = Vec::new();
        let mut parent = path.parent();
        while let Some(directory) = parent {
            if self.place.root.is_taken(&directory).map_err(at(name))? {
                break;
            }
            parent = directory.parent();
            missing.push(directory);
        }
        for directory in missing.iter().rev() {
            self.stage.make_directory(directory).map_err(at(name))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Totals, CopyError> {
        // The deepest first: their parents may become read-only.
        while let Some((path, mode, mtime)) = self.directories.pop() {
            self.stage.finish_directory(&path, mode, mtime).map_err(at(path.as_bytes()))?;
        }
        self.stage.close().map_err(at(b"."))?;
        Ok(self.totals)
    }
}

fn extension(entry: &mut Entry<'_, impl Read>, max: u64) -> Result<Vec<u8>, CopyError> {
    if entry.size() > max {
        let text =
            format!("an extension record of {} bytes; at most {max} are taken", entry.size());
        return Err(CopyError::Archive(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(CopyError::Archive)?;
    Ok(bytes)
}

/// GNU's long names end with a NUL.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&b| b == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// `seconds[.fraction]`, as nanoseconds.
fn pax_time(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let fraction: i64 = digits.parse().ok()?;
    let fraction = if text.starts_with('-') { -fraction } else { fraction };
    Some(seconds.checked_mul(1_000_000_000)?.saturating_add(fraction))
}
