//! The few structures of the FUSE kernel protocol that a read-only server needs, from
//! `<linux/fuse.h>` (7.31 and later). The bytes come from a guest: every read is bounded, and
//! nothing here allocates by a number that the guest chose.

use super::manifest::Kind;

/// Operations by number; those that change something are only needed to be refused.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const READ: u32 = 15;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const READDIRPLUS: u32 = 44;
    /// SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR,
    /// CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE.
    pub(crate) const WRITES: [u32; 16] =
        [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51];
}

/// Bytes before every request.
pub(crate) const IN_HEADER: usize = 40;
/// Bytes before every answer.
pub(crate) const OUT_HEADER: usize = 16;

/// A request's header and what follows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads a request; `None` when there is not even a header to answer to.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Request<'a>> {
        Some(Request {
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            node: u64_at(bytes, 16)?,
            body: bytes.get(IN_HEADER..)?,
        })
    }
}

/// What READ, READDIR and READDIRPLUS ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadIn {
    pub(crate) offset: u64,
    pub(crate) size: u32,
}

impl ReadIn {
    pub(crate) fn parse(body: &[u8]) -> Option<ReadIn> {
        Some(ReadIn { offset: u64_at(body, 8)?, size: u32_at(body, 16)? })
    }
}

/// Attributes of a node, as every answer about one carries them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    pub(crate) node: u64,
    pub(crate) kind: Kind,
    pub(crate) permissions: u16,
    pub(crate) size: u64,
    pub(crate) mtime_ns: i64,
    pub(crate) ctime_ns: i64,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// An answer being written; its length is set at the end.
#[derive(Debug)]
pub(crate) struct Answer {
    bytes: Vec<u8>,
}

impl Answer {
    /// Begins a good answer with room for a payload.
    pub(crate) fn new(unique: u64, room: usize) -> Answer {
        let mut bytes = Vec::with_capacity(OUT_HEADER + room);
        bytes.extend([0; 8]);
        bytes.extend(unique.to_le_bytes());
        Answer { bytes }
    }

    /// Makes a whole answer that says an error.
    pub(crate) fn error(unique: u64, error: rustix::io::Errno) -> Vec<u8> {
        let mut answer = Answer::new(unique, 0);
        answer.bytes[4..8].copy_from_slice(&(-error.raw_os_error()).to_le_bytes());
        answer.finish()
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        // An answer is at most a mebibyte and a header.
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&len.to_le_bytes());
        self.bytes
    }

    pub(crate) fn payload_len(&self) -> usize {
        self.bytes.len() - OUT_HEADER
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns `len` zero bytes at the end, to read a file into.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        &mut self.bytes[at..]
    }

    fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_le_bytes());
    }

    /// `fuse_entry_out`. Node 0 with a validity is a negative entry that the kernel remembers.
    pub(crate) fn entry(&mut self, attributes: Option<&Attributes>, valid_s: u64) {
        self.u64(attributes.map_or(0, |attributes| attributes.node));
        self.u64(0); // generation
        self.u64(valid_s);
        self.u64(valid_s);
        self.u32(0);
        self.u32(0);
        match attributes {
            Some(attributes) => self.attributes(attributes),
            None => self.bytes(&[0; ATTRIBUTES]),
        }
    }

    /// `fuse_attr_out`.
    pub(crate) fn attr(&mut self, attributes: &Attributes, valid_s: u64) {
        self.u64(valid_s);
        self.u32(0);
        self.u32(0);
        self.attributes(attributes);
    }

    fn attributes(&mut self, a: &Attributes) {
        let seconds = |ns: i64| ns.div_euclid(1_000_000_000).cast_unsigned();
        let nanos = |ns: i64| u32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or_default();
        self.u64(a.node);
        self.u64(a.size);
        self.u64(a.size.div_ceil(512));
        self.u64(seconds(a.mtime_ns)); // access time: never told
        self.u64(seconds(a.mtime_ns));
        self.u64(seconds(a.ctime_ns));
        self.u32(nanos(a.mtime_ns));
        self.u32(nanos(a.mtime_ns));
        self.u32(nanos(a.ctime_ns));
        self.u32(file_type(a.kind) << 12 | u32::from(a.permissions));
        self.u32(a.links);
        self.u32(a.uid);
        self.u32(a.gid);
        self.u32(0); // device
        self.u32(4096);
        self.u32(0); // flags
    }

    /// `fuse_dirent`, padded; `next` is the offset that continues after it.
    pub(crate) fn dirent(&mut self, node: u64, next: u64, kind: Kind, name: &[u8]) {
        self.u64(node);
        self.u64(next);
        self.u32(u32::try_from(name.len()).unwrap_or_default());
        self.u32(file_type(kind));
        self.bytes(name);
        let padding = name.len().next_multiple_of(8) - name.len();
        self.bytes(&[0; 8][..padding]);
    }

    /// `fuse_kstatfs` of a full, read-only file system.
    pub(crate) fn statfs(&mut self, files: u64) {
        for value in [0, 0, 0, files, 0] {
            self.u64(value);
        }
        for value in [4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0] {
            self.u32(value);
        }
    }
}

/// Bytes of `fuse_attr`.
const ATTRIBUTES: usize = 88;

/// Bytes that a directory entry takes; with `plus`, with its attributes.
pub(crate) fn dirent_len(name: &[u8], plus: bool) -> usize {
    24 + name.len().next_multiple_of(8) + if plus { 40 + ATTRIBUTES } else { 0 }
}

/// `S_IFMT >> 12`, which is also `d_type`.
fn file_type(kind: Kind) -> u32 {
    match kind {
        Kind::Folder => 4,
        Kind::File => 8,
        Kind::Symlink => 10,
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
