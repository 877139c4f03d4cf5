//! Reads layer archives and writes what they mean as one plain tar stream.
//!
//! Two passes over each archive: the first learns every entry and checks the archive's digest, the
//! second copies the contents of the files that are left. Folders come first, then whiteouts and
//! what has no content, then files in the archives' order, so the same layers give the same bytes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use crate::digest::{Digest, Hashing};
use crate::error::ImageError;
use crate::limits;
use crate::tar::{Header, Reader, TarError, Type, Writer};

use super::compression::{self, BoundMet};
use super::listing::{Listing, Meta};
use super::tree::{Body, Outcome, Tree};

/// One layer's archive: what it is called in errors, what its unpacked bytes must hash to, and how
/// to open it, twice.
pub(crate) struct Archive<'a> {
    pub(crate) name: String,
    pub(crate) diff_id: Option<Digest>,
    pub(crate) open: Box<dyn Fn() -> Result<Box<dyn Read + 'a>, ImageError> + 'a>,
}

/// What is left of the bounds that all layers of one image share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { bytes: limits::IMAGE_BYTES_MAX, entries: limits::ENTRIES_MAX }
    }
}

/// First pass: reads archives, the lowest first, and returns what they mean on top of `lower`.
pub(crate) fn scan(
    archives: &[Archive<'_>],
    lower: &Listing,
    budget: &mut Budget,
) -> Result<Outcome, ImageError> {
    let mut tree = Tree::new(lower);
    for (number, archive) in archives.iter().enumerate() {
        scan_one(archive, number, &mut tree, budget)?;
    }
    Ok(tree.finish())
}

fn scan_one(
    archive: &Archive<'_>,
    number: usize,
    tree: &mut Tree<'_>,
    budget: &mut Budget,
) -> Result<(), ImageError> {
    let input = compression::unpack((archive.open)()?, budget.bytes)
        .map_err(|error| archive.damaged(TarError::Input(error)))?;
    let mut reader = Reader::new(Hashing::new(input));
    let mut entries = 0u64;
    while let Some(header) = reader.next().map_err(|error| archive.damaged(error))? {
        let shown = shown(entries, &header.path);
        if entries >= budget.entries {
            return Err(ImageError::Limit {
                what: format!("entries in {}", archive.name),
                limit: limits::ENTRIES_MAX.to_string(),
            });
        }
        tree.apply(header, (number, entries)).map_err(|why| ImageError::BadEntry {
            archive: archive.name.clone(),
            entry: shown,
            why,
        })?;
        entries += 1;
    }
    // The digest is over everything, also what comes after the end marker.
    let mut rest = reader.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|e| archive.damaged(TarError::Input(e)))?;
    let (_, found, bytes) = rest.finish();
    budget.entries -= entries;
    budget.bytes = budget.bytes.saturating_sub(bytes);
    match archive.diff_id {
        Some(expected) if expected != found => {
            Err(ImageError::WrongDigest { what: archive.name.clone(), expected, found })
        }
        _ => Ok(()),
    }
}

/// Second pass: writes the plain tar stream.
pub(crate) fn write<W: Write>(
    archives: &[Archive<'_>],
    outcome: &Outcome,
    out: W,
) -> Result<W, WriteError> {
    let mut out = Writer::new(out);
    for (path, meta) in &outcome.folders {
        out.header(&header(Type::Directory, path, meta, 0))?;
    }
    for path in &outcome.whiteouts {
        let meta = Meta { mode: 0, ..Meta::default() };
        out.header(&header(Type::Character, path, &meta, 0))?;
    }
    let mut files = BTreeMap::new();
    for (inode, names) in &outcome.inodes {
        let meta = &inode.meta;
        let Some((first, others)) = names.split_first() else { continue };
        let plain = match &inode.body {
            Body::Regular { source, size } => {
                files.insert(*source, (*size, meta, first, others));
                continue;
            }
            Body::Symlink(target) => {
                let plain = header(Type::Symlink, first, meta, 0);
                Header { link: target.clone(), mode: 0o777, ..plain }
            }
            Body::Character(device) => {
                Header { device: *device, ..header(Type::Character, first, meta, 0) }
            }
            Body::Block(device) => {
                Header { device: *device, ..header(Type::Block, first, meta, 0) }
            }
            Body::Fifo => header(Type::Fifo, first, meta, 0),
        };
        out.header(&plain)?;
        write_links(&mut out, first, others, meta)?;
    }
    for (number, archive) in archives.iter().enumerate() {
        let input = compression::unpack((archive.open)()?, limits::IMAGE_BYTES_MAX)
            .map_err(|error| archive.damaged(TarError::Input(error)))?;
        let mut reader = Reader::new(input);
        let mut entry = 0u64;
        while let Some(found) = reader.next().map_err(|error| archive.damaged(error))? {
            let wanted = files.remove(&(number, entry));
            entry += 1;
            let Some((size, meta, first, others)) = wanted else { continue };
            if found.size != size {
                let why = "it changed while it was read";
                return Err(archive.damaged(TarError::Bad(why.into())).into());
            }
            out.header(&header(Type::Regular, first, meta, size))?;
            out.data(size, &mut reader)?;
            write_links(&mut out, first, others, meta)?;
        }
    }
    Ok(out.finish()?)
}

/// The second pass failed: at reading an archive, or at writing the stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Output(#[from] io::Error),
}

fn write_links<W: Write>(
    out: &mut Writer<W>,
    target: &[u8],
    names: &[Vec<u8>],
    meta: &Meta,
) -> io::Result<()> {
    for name in names {
        let plain = Meta { xattrs: Vec::new(), ..meta.clone() };
        out.header(&Header { link: target.to_vec(), ..header(Type::HardLink, name, &plain, 0) })?;
    }
    Ok(())
}

fn header(kind: Type, path: &[u8], meta: &Meta, size: u64) -> Header {
    Header {
        kind,
        path: path.to_vec(),
        link: Vec::new(),
        mode: meta.mode,
        uid: meta.uid,
        gid: meta.gid,
        // What squashfs can hold.
        mtime: meta.mtime.clamp(0, i64::from(u32::MAX)),
        size,
        device: (0, 0),
        xattrs: meta.xattrs.clone(),
    }
}

impl Archive<'_> {
    fn damaged(&self, error: TarError) -> ImageError {
        if let TarError::Input(error) = &error
            && let Some(bound) = error.get_ref().and_then(|e| e.downcast_ref::<BoundMet>())
        {
            return ImageError::BadArchive { archive: self.name.clone(), why: bound.0.clone() };
        }
        ImageError::BadArchive { archive: self.name.clone(), why: error.to_string() }
    }
}

/// Names an entry for people: its number and a piece of its path.
pub(crate) fn shown(number: u64, path: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(path).chars().take(200).collect();
    format!("{number} `{}`", text.escape_debug())
}
