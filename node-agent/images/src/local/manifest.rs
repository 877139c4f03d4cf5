//! The local image as one compact file: every entry's metadata, no content.
//!
//! Records of a fixed size in breadth-first order, so that the children of a folder stand side by
//! side, sorted by name, and an entry's index is its FUSE node id less one: ids mean the same after
//! the node agent was restarted. The file's SHA-256 is the image's id. Reading checks everything
//! once ([`Manifest::parse`]); after that no index or offset can be out of range.

use crate::Digest;

const MAGIC: &[u8; 8] = b"TOWLOCL1";
const HEADER: usize = 8 + 4 * 4;
const RECORD: usize = 68;

/// Most entries in one local image; beyond it the walk is refused.
pub const ENTRIES_MAX: usize = 8_000_000;
/// Deepest nesting of folders.
pub const DEPTH_MAX: usize = 200;

/// What kind of thing an entry is: nothing else is ever served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A folder of the machine, or one made up for the guest to mount on.
    Folder,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// What tells whether a file is still the one that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number; 0 for an entry that the machine does not have.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Last change of content, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of metadata, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Names that the inode had.
    pub links: u32,
}

/// One entry, as the walk saw it and as the server reads it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, without the type.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What it must still be when it is read.
    pub identity: Identity,
    /// Index of the folder it is in; the root is its own.
    pub parent: u32,
    /// Folders: index of the first child.
    pub first_child: u32,
    /// Folders: how many children.
    pub children: u32,
    /// Files: index of the first entry with the same inode (hard links), else its own.
    pub canonical: u32,
    /// How many entries share this one's inode.
    pub names: u32,
    name: (u32, u8),
    target: (u32, u16),
}

/// The manifest was damaged or is not one.
#[derive(Debug, thiserror::Error)]
#[error("damaged manifest of a local image: {0}")]
pub struct BadManifest(&'static str);

/// A checked manifest, held in memory.
#[derive(Debug)]
pub struct Manifest {
    digest: Digest,
    devices: Vec<u64>,
    count: u32,
    /// The file as it is: tens of megabytes, so held once.
    bytes: Vec<u8>,
    records_at: usize,
    strings_at: usize,
}

impl Manifest {
    /// Checks a manifest's bytes.
    pub fn parse(bytes: impl Into<Vec<u8>>) -> Result<Manifest, BadManifest> {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(BadManifest("wrong beginning"))?;
        let count = take_u32(&mut rest)?;
        let strings_len = take_u32(&mut rest)? as usize;
        let devices_len = take_u32(&mut rest)? as usize;
        if take_u32(&mut rest)? as usize != RECORD {
            return Err(BadManifest("another version's records"));
        }
        if count == 0 || count as usize > ENTRIES_MAX || devices_len > 256 {
            return Err(BadManifest("counts out of range"));
        }
        let records_len = count as usize * RECORD;
        if rest.len() != devices_len * 8 + records_len + strings_len {
            return Err(BadManifest("truncated"));
        }
        let devices = rest[..devices_len * 8].chunks_exact(8).map(le_u64).collect();
        let strings_at = bytes.len() - strings_len;
        let records_at = strings_at - records_len;
        let manifest = Manifest { digest, devices, count, bytes, records_at, strings_at };
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), BadManifest> {
        let mut next_child = 1;
        for index in 0..self.count {
            let raw = self.record(index);
            if raw[1] as usize >= self.devices.len().max(1) || raw[0] > 2 {
                return Err(BadManifest("an entry's kind or device"));
            }
            let entry = self.decode(raw);
            if self.string(entry.name.0, entry.name.1 as usize).is_none()
                || self.string(entry.target.0, entry.target.1 as usize).is_none()
            {
                return Err(BadManifest("a name lies outside"));
            }
            let name = self.name(&entry);
            if index > 0 && (name.is_empty() || name.iter().any(|b| matches!(b, 0 | b'/'))) {
                return Err(BadManifest("a name"));
            }
            if matches!(name, b"." | b"..") {
                return Err(BadManifest("a name"));
            }
            // Breadth first: a parent comes before its children, so climbing always ends.
            if (index > 0 && entry.parent >= index) || entry.canonical > index {
                return Err(BadManifest("an entry's place"));
            }
            if entry.kind == Kind::Folder {
                if entry.children > 0 && entry.first_child != next_child {
                    return Err(BadManifest("a folder's children"));
                }
                next_child = entry
                    .children
                    .checked_add(next_child)
                    .ok_or(BadManifest("a folder's children"))?;
                if next_child > self.count {
                    return Err(BadManifest("a folder's children"));
                }
            } else if entry.children != 0 {
                return Err(BadManifest("children of what is no folder"));
            }
        }
        Ok(())
    }

    /// Returns the image's id.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns the manifest as it is written to a file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns how many entries there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Returns an entry; `None` for an index that no entry has.
    pub fn entry(&self, index: u32) -> Option<Entry> {
        (index < self.count).then(|| self.decode(self.record(index)))
    }

    /// Returns an entry's name; the root's is empty.
    pub fn name(&self, entry: &Entry) -> &[u8] {
        self.string(entry.name.0, entry.name.1 as usize).unwrap_or_default()
    }

    /// Returns where a symlink leads; empty for anything else.
    pub fn target(&self, entry: &Entry) -> &[u8] {
        self.string(entry.target.0, entry.target.1 as usize).unwrap_or_default()
    }

    /// Finds a child by name.
    pub fn child(&self, folder: &Entry, name: &[u8]) -> Option<u32> {
        let (mut low, mut high) = (folder.first_child, folder.first_child + folder.children);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.entry(middle)?;
            match self.name(&entry).cmp(name) {
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// Returns an entry's path relative to the image's root, without a leading slash.
    pub fn path(&self, index: u32) -> Vec<u8> {
        let mut components = Vec::new();
        let mut at = index;
        while at != 0
            && components.len() <= DEPTH_MAX
            && let Some(entry) = self.entry(at)
        {
            components.push(self.name(&entry));
            at = entry.parent;
        }
        components.reverse();
        components.join(&b'/')
    }

    /// Finds an entry by path, following no symlink.
    pub fn find(&self, path: &[u8]) -> Option<u32> {
        path.split(|b| *b == b'/').filter(|name| !name.is_empty()).try_fold(0, |at, name| {
            let folder = self.entry(at)?;
            self.child(&folder, name)
        })
    }

    fn string(&self, offset: u32, len: usize) -> Option<&[u8]> {
        self.bytes[self.strings_at..].get(offset as usize..)?.get(..len)
    }

    fn record(&self, index: u32) -> &[u8] {
        &self.bytes[self.records_at + index as usize * RECORD..][..RECORD]
    }

    fn decode(&self, raw: &[u8]) -> Entry {
        let kind = match raw[0] {
            0 => Kind::Folder,
            1 => Kind::File,
            _ => Kind::Symlink,
        };
        let word = |at: usize| le_u32(&raw[at..at + 4]);
        let long = |at: usize| le_u64(&raw[at..at + 8]);
        let (a, b, c) = (word(44), word(48), word(52));
        let name_len = raw[56];
        let target_len = u16::from_le_bytes([raw[57], raw[58]]);
        let folder = kind == Kind::Folder;
        Entry {
            kind,
            permissions: u16::from_le_bytes([raw[2], raw[3]]),
            uid: word(4),
            gid: word(8),
            identity: Identity {
                device: self.devices.get(raw[1] as usize).copied().unwrap_or_default(),
                inode: long(12),
                size: long(20),
                mtime_ns: long(28).cast_signed(),
                ctime_ns: long(36).cast_signed(),
                links: word(60),
            },
            parent: a,
            first_child: if folder { b } else { 0 },
            children: if folder { c } else { 0 },
            canonical: if kind == Kind::File { b } else { 0 },
            names: if kind == Kind::File { c } else { 1 },
            name: (word(64), name_len),
            target: if kind == Kind::Symlink { (b, target_len) } else { (0, 0) },
        }
    }
}

/// An entry on its way into a manifest.
#[derive(Debug)]
pub(crate) struct NewEntry<'a> {
    pub(crate) kind: Kind,
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) identity: Identity,
    pub(crate) parent: u32,
    /// Folder: first child; file: canonical index.
    pub(crate) first: u32,
    /// Folder: children; file: names.
    pub(crate) number: u32,
    pub(crate) name: &'a [u8],
    pub(crate) target: &'a [u8],
}

/// Writes a manifest's bytes; entries are pushed in breadth-first order.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    devices: Vec<u64>,
    records: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Writer {
    /// Adds one entry. Fails when there are more devices or longer names than Linux has.
    pub(crate) fn push(&mut self, entry: &NewEntry<'_>) -> Result<(), BadManifest> {
        let device = match self.devices.iter().position(|d| *d == entry.identity.device) {
            Some(at) => at,
            None => {
                self.devices.push(entry.identity.device);
                self.devices.len() - 1
            }
        };
        let device = u8::try_from(device).map_err(|_| BadManifest("too many devices"))?;
        let name_len =
            u8::try_from(entry.name.len()).map_err(|_| BadManifest("a name is too long"))?;
        let target_len =
            u16::try_from(entry.target.len()).map_err(|_| BadManifest("a symlink is too long"))?;
        let name_at = self.keep(entry.name)?;
        let target_at = self.keep(entry.target)?;
        let first = if entry.kind == Kind::Symlink { target_at } else { entry.first };
        let kind = match entry.kind {
            Kind::Folder => 0,
            Kind::File => 1,
            Kind::Symlink => 2,
        };
        let out = &mut self.records;
        out.extend([kind, device]);
        out.extend(entry.permissions.to_le_bytes());
        out.extend(entry.uid.to_le_bytes());
        out.extend(entry.gid.to_le_bytes());
        out.extend(entry.identity.inode.to_le_bytes());
        out.extend(entry.identity.size.to_le_bytes());
        out.extend(entry.identity.mtime_ns.to_le_bytes());
        out.extend(entry.identity.ctime_ns.to_le_bytes());
        out.extend(entry.parent.to_le_bytes());
        out.extend(first.to_le_bytes());
        out.extend(entry.number.to_le_bytes());
        out.push(name_len);
        out.extend(target_len.to_le_bytes());
        out.push(0);
        out.extend(entry.identity.links.to_le_bytes());
        out.extend(name_at.to_le_bytes());
        self.count += 1;
        Ok(())
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<u32, BadManifest> {
        let at = u32::try_from(self.strings.len()).map_err(|_| BadManifest("too many names"))?;
        self.strings.extend_from_slice(bytes);
        Ok(at)
    }

    /// Returns the manifest's bytes.
    pub(crate) fn finish(self) -> Result<Vec<u8>, BadManifest> {
        let too_many = |_| BadManifest("too many names");
        let mut out = Vec::with_capacity(HEADER + self.records.len() + self.strings.len() + 64);
        out.extend(MAGIC);
        out.extend(self.count.to_le_bytes());
        out.extend(u32::try_from(self.strings.len()).map_err(too_many)?.to_le_bytes());
        out.extend(u32::try_from(self.devices.len()).map_err(too_many)?.to_le_bytes());
        out.extend(u32::try_from(RECORD).map_err(too_many)?.to_le_bytes());
        for device in &self.devices {
            out.extend(device.to_le_bytes());
        }
        out.extend(&self.records);
        out.extend(&self.strings);
        Ok(out)
    }
}

fn take_u32(bytes: &mut &[u8]) -> Result<u32, BadManifest> {
    let (word, rest) = bytes.split_at_checked(4).ok_or(BadManifest("truncated"))?;
    *bytes = rest;
    Ok(le_u32(word))
}

fn le_u32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| (word << 8) | u32::from(*byte))
}

fn le_u64(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte))
}
