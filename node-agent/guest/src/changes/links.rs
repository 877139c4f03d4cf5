//! Whether a file that equals the one below has the same names as that one.
//!
//! Overlayfs copies a file up by one name: the others stay names of the file below. So names of one
//! file in the upper directory are one file because somebody made them so, or copied both.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use towline_proto::limits::PATH_DEPTH_MAX;

use super::compare::{Found, Look, Node, look};
use super::walk::names;
use super::{Kind, OwnPaths, WalkError};

/// The names of the upper directory's files, looked up when first needed: most sandboxes have no
/// file with two.
pub(super) struct Links<'a> {
    upper: &'a OwnedFd,
    below: &'a OwnedFd,
    names: Option<BTreeMap<Node, Vec<Vec<u8>>>>,
}

impl<'a> Links<'a> {
    pub(super) fn new(upper: &'a OwnedFd, below: &'a OwnedFd) -> Self {
        Self { upper, below, names: None }
    }

    /// Whether a file has another name above that is not one of the file below.
    pub(super) fn differ(
        &mut self,
        path: &[u8],
        found: &Found,
        below: &Found,
    ) -> Result<bool, WalkError> {
        if found.meta.kind != Kind::Regular || found.meta.links < 2 {
            return Ok(false);
        }
        if self.names.is_none() {
            let mut names = BTreeMap::new();
            collect(self.upper, &mut Vec::new(), 0, &mut names)?;
            self.names = Some(names);
        }
        let all = self.names.as_ref().and_then(|names| names.get(&found.node));
        for other in all.into_iter().flatten().filter(|other| *other != path) {
            if self.node_below(other)? != Some(below.node) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn node_below(&self, path: &[u8]) -> Result<Option<Node>, WalkError> {
        let at = |error: Errno| WalkError::At { path: path.to_vec(), source: error.into() };
        let (folder, name) = match path.iter().rposition(|&byte| byte == b'/') {
            None => (None, path),
            Some(slash) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let folder = &path[..slash];
                match rustix::fs::openat2(self.below, folder, flags, Mode::empty(), beneath) {
                    Ok(folder) => (Some(folder), &path[slash + 1..]),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
                    Err(error) => return Err(at(error)),
                }
            }
        };
        let looked = look(folder.as_ref().unwrap_or(self.below), name);
        match looked.map_err(|source| WalkError::At { path: path.to_vec(), source })? {
            Look::File(found) => Ok(Some(found.node)),
            Look::Socket | Look::Whiteout | Look::Nothing => Ok(None),
        }
    }
}

/// Notes each name of each file that has more than one.
fn collect(
    folder: &OwnedFd,
    path: &mut Vec<u8>,
    depth: usize,
    into: &mut BTreeMap<Node, Vec<Vec<u8>>>,
) -> Result<(), WalkError> {
    if depth > PATH_DEPTH_MAX {
        return Err(WalkError::TooDeep { path: path.clone(), max: PATH_DEPTH_MAX });
    }
    for name in names(folder, path)? {
        let len = path.len();
        if len > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let at = |source| WalkError::At { path: path.clone(), source };
        if !OwnPaths::is_volatile(path)
            && let Look::File(found) = look(folder, &name).map_err(at)?
        {
            match found.meta.kind {
                Kind::Directory => {
                    collect(&found.folder().map_err(at)?, path, depth + 1, into)?;
                }
                Kind::Regular if found.meta.links > 1 => {
                    into.entry(found.node).or_default().push(path.clone());
                }
                _ => {}
            }
        }
        path.truncate(len);
    }
    Ok(())
}
