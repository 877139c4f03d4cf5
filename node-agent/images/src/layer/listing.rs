//! What an image is made of after some of its layers: every path, its kind, and what a folder made
//! in passing by a higher layer must repeat. Kept beside each layer disk, sorted and compressed.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::ops::Bound;

/// Owner, mode, time and extended attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Default for Meta {
    /// What a folder has that nobody described.
    fn default() -> Meta {
        Meta { mode: 0o755, uid: 0, gid: 0, mtime: 0, xattrs: Vec::new() }
    }
}

/// A path's kind, as far as higher layers care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lower {
    Folder(Meta),
    Symlink(Vec<u8>),
    Other,
}

/// The merged view of some layers. Paths are relative, without slashes at the ends; the root is
/// the empty path and always a folder.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Listing {
    entries: BTreeMap<Vec<u8>, Lower>,
}

const MAGIC: &[u8; 8] = b"TOWLIST1";

impl Listing {
    pub(crate) fn get(&self, path: &[u8]) -> Option<&Lower> {
        self.entries.get(path)
    }

    pub(crate) fn set(&mut self, path: &[u8], lower: Lower) {
        self.entries.insert(path.to_vec(), lower);
    }

    /// Forgets a path and everything in it.
    pub(crate) fn remove(&mut self, path: &[u8]) {
        self.entries.remove(path);
        self.clear(path);
    }

    /// Forgets everything in a folder.
    pub(crate) fn clear(&mut self, folder: &[u8]) {
        let inside: Vec<_> = subtree(&self.entries, folder).map(|(path, _)| path.clone()).collect();
        for path in inside {
            self.entries.remove(&path);
        }
    }

    /// Returns the paths directly in a folder.
    pub(crate) fn children(&self, folder: &[u8]) -> Vec<&[u8]> {
        let skip = if folder.is_empty() { 0 } else { folder.len() + 1 };
        subtree(&self.entries, folder)
            .map(|(path, _)| path.as_slice())
            .filter(|path| !path[skip..].contains(&b'/'))
            .collect()
    }

    /// Writes the listing, compressed.
    pub(crate) fn write(&self, out: impl Write) -> io::Result<()> {
        let mut out = zstd::stream::write::Encoder::new(out, 3)?;
        out.write_all(MAGIC)?;
        out.write_all(&(self.entries.len() as u64).to_le_bytes())?;
        for (path, lower) in &self.entries {
            put_bytes(&mut out, path)?;
            match lower {
                Lower::Folder(meta) => {
                    out.write_all(b"d")?;
                    for word in [meta.mode, meta.uid, meta.gid] {
                        out.write_all(&word.to_le_bytes())?;
                    }
                    out.write_all(&meta.mtime.to_le_bytes())?;
                    out.write_all(&(meta.xattrs.len() as u64).to_le_bytes())?;
                    for (name, value) in &meta.xattrs {
                        put_bytes(&mut out, name)?;
                        put_bytes(&mut out, value)?;
                    }
                }
                Lower::Symlink(target) => {
                    out.write_all(b"l")?;
                    put_bytes(&mut out, target)?;
                }
                Lower::Other => out.write_all(b"-")?,
            }
        }
        out.finish()?;
        Ok(())
    }

    /// Reads a listing back; damage is an error, and the layer is then made again.
    pub(crate) fn read(input: impl Read) -> io::Result<Listing> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a damaged layer listing");
        let mut input = io::BufReader::new(zstd::stream::read::Decoder::new(input)?);
        if take::<8>(&mut input)? != *MAGIC {
            return Err(damaged());
        }
        let count = u64::from_le_bytes(take(&mut input)?);
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let path = take_bytes(&mut input)?;
            let lower = match &take::<1>(&mut input)? {
                b"d" => {
                    let [mode, uid, gid] = [
                        u32::from_le_bytes(take(&mut input)?),
                        u32::from_le_bytes(take(&mut input)?),
                        u32::from_le_bytes(take(&mut input)?),
                    ];
                    let mtime = i64::from_le_bytes(take(&mut input)?);
                    let mut xattrs = Vec::new();
                    for _ in 0..u64::from_le_bytes(take(&mut input)?) {
                        xattrs.push((take_bytes(&mut input)?, take_bytes(&mut input)?));
                    }
                    Lower::Folder(Meta { mode, uid, gid, mtime, xattrs })
                }
                b"l" => Lower::Symlink(take_bytes(&mut input)?),
                b"-" => Lower::Other,
                _ => return Err(damaged()),
            };
            entries.insert(path, lower);
        }
        Ok(Listing { entries })
    }
}

/// Everything strictly beneath a folder, in order.
pub(crate) fn subtree<'m, V>(
    map: &'m BTreeMap<Vec<u8>, V>,
    folder: &[u8],
) -> impl Iterator<Item = (&'m Vec<u8>, &'m V)> {
    let (from, to) = if folder.is_empty() {
        (Bound::Excluded(Vec::new()), Bound::Unbounded)
    } else {
        // `0` follows `/` in ASCII.
        let from = [folder, b"/"].concat();
        (Bound::Excluded(from), Bound::Excluded([folder, b"0"].concat()))
    };
    map.range((from, to))
}

fn put_bytes(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&(bytes.len() as u64).to_le_bytes())?;
    out.write_all(bytes)
}

fn take<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_bytes(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let len = u64::from_le_bytes(take(input)?);
    let mut bytes = Vec::new();
    if input.take(len.min(1 << 20)).read_to_end(&mut bytes)? as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_holds_what_is_under_it_and_not_its_neighbours() {
        let mut listing = Listing::default();
        for path in ["a", "a-b", "a/b", "a/b/c", "a/b-c", "a0", "ab"] {
            listing.set(path.as_bytes(), Lower::Other);
        }
        assert_eq!(listing.children(b"a"), [&b"a/b"[..], b"a/b-c"]);
        assert_eq!(listing.children(b""), [&b"a"[..], b"a-b", b"a0", b"ab"]);
        listing.remove(b"a/b");
        assert_eq!(listing.children(b"a"), [&b"a/b-c"[..]]);
        listing.remove(b"a");
        assert_eq!(listing.entries.len(), 3);
    }

    #[test]
    fn reads_back_what_it_writes() {
        let mut listing = Listing::default();
        let meta =
            Meta { mtime: -5, xattrs: vec![(b"user.x".to_vec(), vec![0])], ..Meta::default() };
        listing.set(b"a\xff", Lower::Folder(meta));
        listing.set(b"a\xff/l", Lower::Symlink(b"/x".to_vec()));
        listing.set(b"b", Lower::Other);
        let mut bytes = Vec::new();
        listing.write(&mut bytes).unwrap();
        assert_eq!(Listing::read(&bytes[..]).unwrap(), listing);
        assert!(Listing::read(&bytes[..bytes.len() - 4]).is_err());
    }
}
