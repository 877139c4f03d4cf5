//! What one path of a tree is, and the stamp by which a later look knows that it did not change.
//!
//! Entries from the wire are checked here once: kinds, permission bits, sizes and symlink targets
//! are within bounds, and a path is a [`TreePath`]. A stamp means something on its own side only.

use towline_proto::v1;

use crate::content::ContentId;
use crate::path::{PATH_BYTES_MAX, PathError, TreePath};

/// Largest size of a file that either end takes: what ext4 can hold.
pub const FILE_BYTES_MAX: u64 = 16 << 40;

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symlink; its target is data.
    Symlink,
}

/// Identity of one version of a path on its own side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp {
    /// Inode number.
    pub inode: u64,
    /// Size in bytes; zero for directories.
    pub size: u64,
    /// Modification time, Unix nanoseconds; zero for directories.
    pub mtime_ns: i64,
    /// Change time, Unix nanoseconds; zero for directories.
    pub ctime_ns: i64,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its kind.
    pub kind: Kind,
    /// Permission bits, 0o777 only; zero for symlinks.
    pub mode: u32,
    /// Which version it is.
    pub stamp: Stamp,
    /// Changed so shortly before the look that a later change may leave the same stamp.
    pub racy: bool,
    /// A directory with nothing but ignored paths in it.
    pub only_ignored: bool,
    /// Symlinks: the target. Empty otherwise.
    pub target: Vec<u8>,
    /// Files: what they hold, where that is known.
    pub content: Option<ContentId>,
}

/// Says what was wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// The path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The kind.
    #[error("`{0}` is of a kind that is not synced")]
    Kind(TreePath),
    /// Mode, size or target.
    #[error("`{path}` has a {what} out of bounds")]
    Bounds {
        /// Where.
        path: TreePath,
        /// Which field.
        what: &'static str,
    },
}

impl Entry {
    /// A plain entry of this kind, for callers that fill in the rest.
    pub fn new(kind: Kind, mode: u32) -> Self {
        Self {
            kind,
            mode,
            stamp: Stamp::default(),
            racy: false,
            only_ignored: false,
            target: Vec::new(),
            content: None,
        }
    }

    /// Whether this is surely the version that `earlier` was: the same stamp, and not so fresh then
    /// that another change could hide behind it.
    pub fn is_version(&self, earlier: &Self) -> bool {
        self.is_same_but_mode(earlier) && self.mode == earlier.mode
    }

    fn is_same_but_mode(&self, earlier: &Self) -> bool {
        self.kind == earlier.kind
            && self.target == earlier.target
            && match self.kind {
                Kind::Directory => true,
                Kind::Symlink => true,
                Kind::File => self.stamp == earlier.stamp && !earlier.racy,
            }
    }

    /// Whether the bytes behind it are surely those of `earlier`, whatever its mode.
    pub fn has_content_of(&self, earlier: &Self) -> bool {
        self.is_same_but_mode(earlier)
    }

    /// Whether this is the version that `expected` was, as far as a rename leaves it visible.
    pub fn survived_as(&self, expected: &Self) -> bool {
        self.kind == expected.kind
            && self.target == expected.target
            && (self.kind != Kind::File
                || (self.mode == expected.mode
                    && self.stamp.inode == expected.stamp.inode
                    && self.stamp.size == expected.stamp.size
                    && self.stamp.mtime_ns == expected.stamp.mtime_ns))
    }

    /// As a message has it.
    pub fn to_wire(&self, path: &TreePath) -> v1::Entry {
        v1::Entry {
            path: path.to_wire(),
            kind: match self.kind {
                Kind::File => v1::FileKind::File,
                Kind::Directory => v1::FileKind::Directory,
                Kind::Symlink => v1::FileKind::Symlink,
            }
            .into(),
            mode: self.mode,
            size: self.stamp.size,
            mtime_ns: self.stamp.mtime_ns,
            hash: self.content.map(ContentId::to_wire).unwrap_or_default(),
            target: self.target.clone(),
            inode: self.stamp.inode,
            ctime_ns: self.stamp.ctime_ns,
            racy: self.racy,
            only_ignored: self.only_ignored,
        }
    }

    /// Checks one from a message; `None` is a path where nothing is.
    pub fn from_wire(message: v1::Entry) -> Result<(TreePath, Option<Self>), EntryError> {
        let path = TreePath::from_components(&message.path)?;
        let kind = match message.kind() {
            v1::FileKind::Unspecified if message.kind == 0 => return Ok((path, None)),
            v1::FileKind::Unspecified => return Err(EntryError::Kind(path)),
            v1::FileKind::File => Kind::File,
            v1::FileKind::Directory => Kind::Directory,
            v1::FileKind::Symlink => Kind::Symlink,
        };
        let bounds = |what| EntryError::Bounds { path: path.clone(), what };
        if message.mode & !0o777 != 0 {
            return Err(bounds("mode"));
        }
        if message.size > FILE_BYTES_MAX {
            return Err(bounds("size"));
        }
        let target_fits = match kind {
            Kind::Symlink => {
                !message.target.is_empty()
                    && message.target.len() <= PATH_BYTES_MAX
                    && !message.target.contains(&0)
            }
            Kind::File | Kind::Directory => message.target.is_empty(),
        };
        if !target_fits {
            return Err(bounds("symlink target"));
        }
        let entry = Self {
            kind,
            mode: message.mode,
            stamp: Stamp {
                inode: message.inode,
                size: message.size,
                mtime_ns: message.mtime_ns,
                ctime_ns: message.ctime_ns,
            },
            racy: message.racy,
            only_ignored: message.only_ignored && kind == Kind::Directory,
            target: message.target,
            content: ContentId::from_wire(&message.hash),
        };
        Ok((path, Some(entry)))
    }
}

/// The message for a path where nothing is, or is expected.
pub fn nothing(path: &TreePath) -> v1::Entry {
    v1::Entry { path: path.to_wire(), ..v1::Entry::default() }
}

/// The message for what is at a path.
pub fn to_wire(path: &TreePath, entry: Option<&Entry>) -> v1::Entry {
    entry.map_or_else(|| nothing(path), |entry| entry.to_wire(path))
}
