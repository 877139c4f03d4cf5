//! Copies of files as tar archives, `tow cp`'s: made from a tree, and applied beneath a directory.
//! Both ends use both halves; whatever comes is treated as a stranger's.
//!
//! An archive is applied beneath one directory's descriptor, whose links are not followed, each file
//! whole before it has its name. What could lead out (absolute names, `..`, links on the way), what
//! is no plain file (devices, sockets, hard links), and what was not asked for is refused by name.

mod pack;
mod place;
mod unpack;

use std::io;

pub use pack::pack;
pub use place::{Base, Place, Source, source_name};
pub use unpack::unpack;

/// Entries of one archive.
pub const ENTRIES_MAX: u64 = 2_000_000;

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files, links and directories.
    pub files: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Devices, sockets and pipes that were left out.
    pub skipped: u64,
}

/// Says why a copy ended early. Files that were finished before stay.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Something of this name could not be read or written.
    #[error("`{name}`: {source}")]
    At {
        /// The entry, as the archive names it.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The archive holds what is not taken.
    #[error("`{name}` in the archive {why}")]
    Refused {
        /// The entry.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The archive itself is broken, or its stream is.
    #[error("the archive cannot be read: {0}")]
    Archive(io::Error),
    /// It cannot be written on.
    #[error("the archive cannot be passed on: {0}")]
    Output(io::Error),
}

/// A name, fit to be shown.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn at(name: &[u8]) -> impl FnOnce(io::Error) -> CopyError {
    let name = shown(name);
    move |source| CopyError::At { name, source }
}

#[cfg(test)]
mod tests;
