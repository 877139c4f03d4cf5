//! What a sandbox changed against its image: the upper directory of its overlay, walked beside the
//! image's own files below it.
//!
//! The order is that of the paths' raw bytes, and what equals the layer below is no change, however
//! it came to be written: the same state gives the same changes. Times alone are no change. Both
//! trees may be the work of a hostile workload and may change meanwhile: every file is opened once,
//! without following links, and looked at by its descriptor; depth and number are bounded.

mod compare;
mod left_out;
mod links;
mod packages;
mod walk;

use std::io;
use std::os::fd::OwnedFd;

pub(crate) use compare::{Found, Node};
pub(crate) use left_out::{LeftOut, OwnPaths};
pub(crate) use packages::{PackageChange, packages_changed};
pub(crate) use walk::{walk, walk_wanted};

/// What a file is, apart from its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) kind: Kind,
    /// Permissions with setuid, setgid and sticky bit.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bytes of a regular file, of a link's target; else 0.
    pub(crate) size: u64,
    /// A device's number; else 0.
    pub(crate) device: u64,
    /// How many names it has.
    pub(crate) links: u64,
    /// When its content was last changed, in seconds since 1970.
    pub(crate) modified_s: i64,
}

/// What kind of file it is. Sockets and whiteouts are none of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular,
    Directory,
    Symlink,
    Character,
    Block,
    Fifo,
}

/// In what a file differs from the one below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Differs {
    pub(crate) kind: bool,
    /// A file's bytes, a link's target, a device's number.
    pub(crate) content: bool,
    pub(crate) mode: bool,
    pub(crate) owner: bool,
    pub(crate) xattrs: bool,
    /// Nothing else, but its other names are not those of the one below.
    pub(crate) links: bool,
}

/// One change, at a path relative to the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) path: Vec<u8>,
    pub(crate) what: What,
}

/// What happened at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Added(Meta),
    Changed {
        before: Meta,
        now: Meta,
        differs: Differs,
    },
    /// With all beneath it.
    Removed(Meta),
}

/// What of a sandbox is wanted besides what it changed of its image.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// All of the tree, as if there were nothing below it.
    pub(crate) whole: bool,
    /// The project folder at its place.
    pub(crate) project: Option<Project>,
}

/// The project folder.
#[derive(Debug)]
pub(crate) struct Project {
    /// Where it is mounted, relative to the root; names that are no links.
    pub(crate) path: Vec<u8>,
    /// Itself.
    pub(crate) folder: OwnedFd,
}

/// Why a walk ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WalkError {
    #[error("/{}: {source}", String::from_utf8_lossy(path))]
    At { path: Vec<u8>, source: io::Error },
    #[error("/{} is nested deeper than {max} directories", String::from_utf8_lossy(path))]
    TooDeep { path: Vec<u8>, max: usize },
    #[error("/{} has more than {max} entries", String::from_utf8_lossy(path))]
    TooMany { path: Vec<u8>, max: usize },
    #[error("/{} has become shorter while it was read", String::from_utf8_lossy(path))]
    Shorter { path: Vec<u8> },
    #[error(
        "/{} cannot be in an image: names that begin with .wh. mark what was removed",
        String::from_utf8_lossy(path)
    )]
    NotForImages { path: Vec<u8> },
    #[error("nobody listens any more")]
    Stopped,
}

/// Who is told.
pub(crate) trait Visitor {
    /// One change, in order, with the file as it is now. May end the walk.
    fn change(&mut self, change: Change, now: Option<&Found>) -> Result<(), WalkError>;
    /// The walk goes on: at another file, or at one that takes long to compare.
    fn looked(&mut self, new: bool) -> Result<(), WalkError>;
    /// A file was left out.
    fn left_out(&mut self, why: LeftOut);
}
