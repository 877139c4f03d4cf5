//! The walk over both trees, in the order of the paths' raw bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::Dir;
use towline_proto::limits::PATH_DEPTH_MAX;

use super::compare::{Found, Look, is_opaque, look};
use super::links::Links;
use super::{Change, Differs, Kind, LeftOut, OwnPaths, Visitor, WalkError, Wanted, What};

/// Entries of one directory.
const ENTRIES_MAX: usize = 4 << 20;

/// Tells the visitor what differs in `upper`, an overlay's upper directory, from what is `below` it.
pub(crate) fn walk(
    upper: &OwnedFd,
    below: &OwnedFd,
    own: &OwnPaths,
    visitor: &mut dyn Visitor,
) -> Result<(), WalkError> {
    walk_wanted(upper, below, own, &Wanted::default(), visitor)
}

/// The same of what is wanted. Where that is the whole tree, all of it is told as added: what did not
/// change, and what is left out, as the image has it.
pub(crate) fn walk_wanted(
    upper: &OwnedFd,
    below: &OwnedFd,
    own: &OwnPaths,
    wanted: &Wanted,
    visitor: &mut dyn Visitor,
) -> Result<(), WalkError> {
    let links = Links::new(upper, below);
    let mut walk =
        Walk { own, wanted, visitor, links, path: Vec::new(), depth: 0, of_image: false };
    walk.folder(Some(upper), Some(below), false)
}

struct Walk<'a> {
    own: &'a OwnPaths,
    wanted: &'a Wanted,
    visitor: &'a mut dyn Visitor,
    links: Links<'a>,
    /// Where it is, relative to the root.
    path: Vec<u8>,
    depth: usize,
    /// It tells the image's own files.
    of_image: bool,
}

/// What is to be done at a name of a directory.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// It is in the upper directory.
    Entry,
    /// It is below, and what is above hides it.
    Hidden,
    /// What is in it. Its key ends in a slash, so that it comes where its content belongs.
    Within,
    /// The image's is taken.
    OfImage,
    /// What the image has in it.
    WithinImage,
}

impl Walk<'_> {
    /// One directory. `hides`: what is below it is not seen, because of a directory around it.
    /// Without an upper directory it is looked at only because the project folder is beneath it.
    fn folder(
        &mut self,
        upper: Option<&OwnedFd>,
        below: Option<&OwnedFd>,
        hides: bool,
    ) -> Result<(), WalkError> {
        let mut hides = hides;
        if let Some(upper) = upper.filter(|_| !hides) {
            hides = is_opaque(upper.as_fd()).map_err(|error| self.at(error))?;
        }
        let mut steps = self.steps(upper, below, hides)?;
        while let Some((name, step)) = steps.pop_first() {
            let len = self.path.len();
            if len > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.strip_suffix(b"/").unwrap_or(&name));
            match step {
                Step::Entry if !self.of_image && OwnPaths::is_volatile(&self.path) => {
                    self.visitor.left_out(LeftOut::Volatile);
                }
                Step::Entry => {
                    if self.entry(upper, below, &name)? {
                        steps.insert([&name[..], b"/"].concat(), Step::Within);
                    }
                }
                Step::Hidden if OwnPaths::is_volatile(&self.path) => {}
                Step::Hidden => {
                    let found = self.below(below, &name)?;
                    self.removed(found.as_ref())?;
                }
                Step::Within => self.within(upper, below, &name[..name.len() - 1], hides)?,
                Step::OfImage => {
                    if self.of_image(|walk| walk.entry(below, None, &name))? {
                        steps.insert([&name[..], b"/"].concat(), Step::WithinImage);
                    }
                }
                Step::WithinImage => {
                    let name = &name[..name.len() - 1];
                    self.of_image(|walk| walk.within(below, None, name, false))?;
                }
            }
            self.path.truncate(len);
        }
        Ok(())
    }

    /// What is to be done in one directory, by name.
    fn steps(
        &self,
        upper: Option<&OwnedFd>,
        below: Option<&OwnedFd>,
        hides: bool,
    ) -> Result<BTreeMap<Vec<u8>, Step>, WalkError> {
        let names = upper.map(|upper| self.names(upper)).transpose()?.unwrap_or_default();
        let mut steps = BTreeMap::new();
        if let Some(below) = below.filter(|_| hides && !self.wanted.whole) {
            let hidden = self.names(below)?;
            steps.extend(hidden.into_iter().map(|name| (name, Step::Hidden)));
        }
        let on_the_way = self.to_project().filter(|(name, _)| !names.contains(*name));
        if let Some((name, is_it)) = on_the_way {
            match is_it || self.wanted.whole {
                true => steps.insert(name.to_vec(), Step::Entry),
                false => steps.insert([name, b"/"].concat(), Step::Within),
            };
        }
        steps.extend(names.into_iter().map(|name| (name, Step::Entry)));
        if let Some(below) = below.filter(|_| self.wanted.whole) {
            for name in self.names(below)? {
                let is_volatile = OwnPaths::is_volatile(&self.join(&name));
                if is_volatile || (!hides && !steps.contains_key(&name)) {
                    steps.insert(name, Step::OfImage);
                }
            }
        }
        Ok(steps)
    }

    /// One file; returns whether it is a directory to look into.
    fn entry(
        &mut self,
        upper: Option<&OwnedFd>,
        below: Option<&OwnedFd>,
        name: &[u8],
    ) -> Result<bool, WalkError> {
        self.visitor.looked(true)?;
        let looked = match (self.project(), upper) {
            (Some(folder), _) => look(folder, b"."),
            (None, Some(upper)) => look(upper, name),
            (None, None) => Ok(Look::Nothing),
        };
        let looked = looked.map_err(|error| self.at(error))?;
        let before = self.below(below, name)?;
        let found = match looked {
            Look::File(found) => found,
            // Renamed or removed meanwhile; or only on the way to the project folder.
            Look::Nothing => return self.unchanged(before.as_ref()),
            Look::Socket => {
                self.visitor.left_out(LeftOut::Socket);
                self.removed(before.as_ref())?;
                return Ok(false);
            }
            Look::Whiteout => {
                self.removed(before.as_ref())?;
                return Ok(false);
            }
        };
        let now = found.meta;
        let what = match before {
            None if self.is_own(&found)? => return Ok(false),
            None => What::Added(now),
            Some(before) => {
                let path = &self.path;
                let visitor = &mut *self.visitor;
                let mut differs = found
                    .differs(&before, &mut || visitor.looked(false).map_err(Stop::Walk))
                    .map_err(|stop| stop.at(path))?;
                if differs == Differs::default() {
                    differs.links = self.links.differ(path, &found, &before)?;
                }
                match differs == Differs::default() {
                    true => return self.unchanged(Some(&before)),
                    false if self.wanted.whole => What::Added(now),
                    false => What::Changed { before: before.meta, now, differs },
                }
            }
        };
        self.visitor.change(Change { path: self.path.clone(), what }, Some(&found))?;
        Ok(now.kind == Kind::Directory)
    }

    /// What is as the image has it; returns whether it is a directory.
    fn unchanged(&mut self, image: Option<&Found>) -> Result<bool, WalkError> {
        let Some(image) = image else { return Ok(false) };
        if self.wanted.whole {
            let what = What::Added(image.meta);
            self.visitor.change(Change { path: self.path.clone(), what }, Some(image))?;
        }
        Ok(image.meta.kind == Kind::Directory)
    }

    fn within(
        &mut self,
        upper: Option<&OwnedFd>,
        below: Option<&OwnedFd>,
        name: &[u8],
        hides: bool,
    ) -> Result<(), WalkError> {
        if self.depth == PATH_DEPTH_MAX {
            return Err(WalkError::TooDeep { path: self.path.clone(), max: PATH_DEPTH_MAX });
        }
        let open = |parent: Option<&OwnedFd>, name| match parent {
            Some(parent) => self.open(parent, name),
            None => Ok(None),
        };
        // Nothing of what the project folder is mounted over is seen.
        let (folder, hides) = match self.project() {
            Some(folder) => (self.open(folder, b".")?, true),
            None => (open(upper, name)?, hides),
        };
        if folder.is_none() && self.to_project().is_none() {
            return Ok(());
        }
        let below = open(below, name)?;
        self.depth += 1;
        self.folder(folder.as_ref(), below.as_ref(), hides)?;
        self.depth -= 1;
        Ok(())
    }

    /// A directory of this name, opened to be read; `None` where there is none.
    fn open(&self, parent: &OwnedFd, name: &[u8]) -> Result<Option<OwnedFd>, WalkError> {
        match look(parent, name).map_err(|error| self.at(error))? {
            Look::File(found) if found.meta.kind == Kind::Directory => {
                found.folder().map(Some).map_err(|error| self.at(error))
            }
            Look::File(_) | Look::Socket | Look::Whiteout | Look::Nothing => Ok(None),
        }
    }

    fn below(&self, below: Option<&OwnedFd>, name: &[u8]) -> Result<Option<Found>, WalkError> {
        let Some(below) = below else { return Ok(None) };
        match look(below, name).map_err(|error| self.at(error))? {
            Look::File(found) => Ok(Some(found)),
            Look::Socket | Look::Whiteout | Look::Nothing => Ok(None),
        }
    }

    fn removed(&mut self, before: Option<&Found>) -> Result<(), WalkError> {
        let Some(before) = before.filter(|_| !self.wanted.whole) else { return Ok(()) };
        let what = What::Removed(before.meta);
        self.visitor.change(Change { path: self.path.clone(), what }, None)
    }

    /// Looks at the image's own files with this.
    fn of_image<T>(&mut self, look: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.of_image, true);
        let result = look(self);
        self.of_image = before;
        result
    }

    /// The project folder, if it is wanted and its place is here.
    fn project(&self) -> Option<&OwnedFd> {
        let project = self.wanted.project.as_ref()?;
        (project.path == self.path).then_some(&project.folder)
    }

    /// The next name on the way to the project folder, if that is wanted and beneath this directory;
    /// and whether it is the folder's own.
    fn to_project(&self) -> Option<(&[u8], bool)> {
        let path = &self.wanted.project.as_ref()?.path[..];
        let rest = match self.path.is_empty() {
            true => path,
            false => path.strip_prefix(&self.path[..])?.strip_prefix(b"/")?,
        };
        let name = rest.split(|&byte| byte == b'/').next()?;
        Some((name, name.len() == rest.len()))
    }

    fn join(&self, name: &[u8]) -> Vec<u8> {
        match self.path.is_empty() {
            true => name.to_vec(),
            false => [&self.path, &b"/"[..], name].concat(),
        }
    }

    /// Whether the guest agent made this and nobody put anything there that is wanted.
    fn is_own(&self, found: &Found) -> Result<bool, WalkError> {
        if self.of_image || self.project().is_some() || self.to_project().is_some() {
            return Ok(false);
        }
        self.is_own_at(&self.path, found)
    }

    fn is_own_at(&self, path: &[u8], found: &Found) -> Result<bool, WalkError> {
        if !self.own.could_have_made(path, &found.meta) {
            return Ok(false);
        }
        if found.meta.kind != Kind::Directory {
            return Ok(true);
        }
        let at = |source| WalkError::At { path: path.to_vec(), source };
        let folder = found.folder().map_err(at)?;
        for name in self.names(&folder)? {
            let inside = [path, b"/", &name].concat();
            if OwnPaths::is_volatile(&inside) {
                continue;
            }
            let is_own = match look(&folder, &name).map_err(at)? {
                // No path that the agent makes is deeper than what it was told.
                Look::File(found) => self.is_own_at(&inside, &found)?,
                Look::Socket | Look::Whiteout | Look::Nothing => true,
            };
            if !is_own {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn names(&self, folder: &OwnedFd) -> Result<BTreeSet<Vec<u8>>, WalkError> {
        names(folder, &self.path)
    }

    fn at(&self, source: io::Error) -> WalkError {
        WalkError::At { path: self.path.clone(), source }
    }
}

/// The names in a directory, which is at this path.
pub(super) fn names(folder: &OwnedFd, path: &[u8]) -> Result<BTreeSet<Vec<u8>>, WalkError> {
    let at = |source| WalkError::At { path: path.to_vec(), source };
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(folder).map_err(|error| at(error.into()))? {
        let entry = entry.map_err(|error| at(error.into()))?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() == ENTRIES_MAX {
            return Err(WalkError::TooMany { path: path.to_vec(), max: ENTRIES_MAX });
        }
        names.insert(name.to_vec());
    }
    Ok(names)
}

/// Why a comparison ended: itself, or the walk.
enum Stop {
    Io(io::Error),
    Walk(WalkError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Stop {
    fn at(self, path: &[u8]) -> WalkError {
        match self {
            Self::Io(source) => WalkError::At { path: path.to_vec(), source },
            Self::Walk(error) => error,
        }
    }
}

#[cfg(test)]
mod tests;
