//! What is no change of the workload's, by a stated list with reasons.

use std::collections::BTreeSet;

use super::{Kind, Meta};

/// Why a file is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LeftOut {
    /// It is only while whoever made it runs.
    Socket,
    /// Beneath a directory whose content does not outlive a start, or is the kernel's.
    Volatile,
}

/// Directories that are mounted over or emptied at every start, and files under /etc that belong to
/// the machine: bound over the image's, whose own stay what they were.
const VOLATILE: [&[u8]; 9] = [
    b"dev",
    b"etc/hostname",
    b"etc/hosts",
    b"etc/machine-id",
    b"etc/resolv.conf",
    b"proc",
    b"run",
    b"sys",
    // By the Filesystem Hierarchy Standard programs expect nothing to stay there.
    b"tmp",
];
/// Where else the guest agent makes something to mount over.
const MADE: [&[u8]; 6] =
    [b"etc", b"etc/gitconfig", b"lib", b"lib/modules", b"usr/lib", b"usr/lib/modules"];

/// Paths of the sandbox itself, rather than of what it runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnPaths {
    made: BTreeSet<Vec<u8>>,
}

impl OwnPaths {
    /// Those that every sandbox has, and what was made for these: the project folder, the user's home
    /// and the working directory, with their parents.
    pub(crate) fn new<'a>(folders: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut made: BTreeSet<Vec<u8>> = MADE.iter().map(|path| path.to_vec()).collect();
        for folder in folders {
            let mut path = Vec::new();
            for name in folder.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                made.insert(path.clone());
            }
        }
        Self { made }
    }

    /// Whether all that is there is left out.
    pub(crate) fn is_volatile(path: &[u8]) -> bool {
        VOLATILE.contains(&path)
    }

    /// Whether this, or a directory that it is in, is left out with all that is there.
    pub(crate) fn is_beneath_volatile(path: &[u8]) -> bool {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        ends.chain([path.len()]).any(|end| Self::is_volatile(&path[..end]))
    }

    /// Whether the guest agent could have made this, as it is; a directory must be empty for it.
    pub(crate) fn could_have_made(&self, path: &[u8], meta: &Meta) -> bool {
        let as_made = match meta.kind {
            Kind::Directory => meta.mode == 0o755,
            Kind::Regular => meta.mode == 0o644 && meta.size == 0,
            Kind::Symlink | Kind::Character | Kind::Block | Kind::Fifo => false,
        };
        as_made && self.made.contains(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_makes_is_known_with_its_parents() {
        let own = OwnPaths::new([&b"/home/ann//work"[..], b"/"]);
        let meta = |kind, mode| {
            let (uid, gid, size, device, links, modified_s) = (7, 7, 0, 0, 1, 0);
            Meta { kind, mode, uid, gid, size, device, links, modified_s }
        };
        let folder = meta(Kind::Directory, 0o755);
        for path in ["home", "home/ann", "home/ann/work", "etc", "usr/lib/modules"] {
            assert!(own.could_have_made(path.as_bytes(), &folder), "{path}");
        }
        assert!(!own.could_have_made(b"home/ann/other", &folder));
        assert!(!own.could_have_made(b"home/ann", &meta(Kind::Directory, 0o700)));
        assert!(own.could_have_made(b"etc/gitconfig", &meta(Kind::Regular, 0o644)));
        assert!(
            !own.could_have_made(b"etc/gitconfig", &Meta { size: 1, ..meta(Kind::Regular, 0o644) })
        );
        assert!(OwnPaths::is_beneath_volatile(b"tmp/a/b") && OwnPaths::is_beneath_volatile(b"run"));
        assert!(!OwnPaths::is_beneath_volatile(b"home/tmp"));
        assert!(OwnPaths::is_volatile(b"etc/hosts") && !OwnPaths::is_volatile(b"etc/hosts.allow"));
    }
}
