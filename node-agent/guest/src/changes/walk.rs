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
        let names = upper.map(|upper| self.names(upper)).transpose()?.unwrap_or_default();
        let mut hides = hides;
        if let Some(upper) = upper.filter(|_| !hides) {
            hides = is_opaque(upper.as_fd()).map_err(|error| self.at(error))?;
        }
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
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use proptest::prelude::*;
    use rustix::fs::{CWD, XattrFlags};
    use rustix::fs::{FileType, Mode};

    use super::*;

    /// What was told: a letter, what differs, the path.
    #[derive(Debug, Default)]
    struct Told {
        changes: Vec<String>,
        left_out: Vec<LeftOut>,
        looked: u64,
    }

    impl Visitor for Told {
        fn change(
            &mut self,
            Change { path, what }: Change,
            _: Option<&Found>,
        ) -> Result<(), WalkError> {
            let path = String::from_utf8_lossy(&path);
            self.changes.push(match what {
                What::Added(_) => format!("A {path}"),
                What::Removed(_) => format!("D {path}"),
                What::Changed { differs, .. } => {
                    let Differs { kind, content, mode, owner, xattrs, links } = differs;
                    let names = [
                        (kind, "kind"),
                        (content, "content"),
                        (mode, "mode"),
                        (owner, "owner"),
                        (xattrs, "xattrs"),
                        (links, "links"),
                    ];
                    let names: Vec<_> = names.iter().filter(|(is, _)| *is).map(|n| n.1).collect();
                    format!("C {path} {}", names.join(","))
                }
            });
            Ok(())
        }

        fn looked(&mut self, new: bool) -> Result<(), WalkError> {
            self.looked += u64::from(new);
            Ok(())
        }

        fn left_out(&mut self, why: LeftOut) {
            self.left_out.push(why);
        }
    }

    fn open(path: &Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    fn told(upper: &Path, below: &Path) -> Told {
        told_wanted(upper, below, &Wanted::default())
    }

    fn told_wanted(upper: &Path, below: &Path, wanted: &Wanted) -> Told {
        let own = OwnPaths::new([&b"/home/ann/work"[..]]);
        let mut told = Told::default();
        walk_wanted(&open(upper), &open(below), &own, wanted, &mut told).unwrap();
        told
    }

    fn whiteout(path: &Path) {
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, 0).unwrap();
    }

    /// Whether this file system lets it be done.
    fn make_opaque(path: &Path) -> bool {
        let flags = XattrFlags::empty();
        rustix::fs::setxattr(path, "user.overlay.opaque", b"y", flags).is_ok()
    }

    #[test]
    fn every_kind_of_change_is_told_once_in_the_order_of_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
        for path in ["a", "gone/deep", "replaced", "home", "tmp", "etc"] {
            fs::create_dir_all(below.join(path)).unwrap();
        }
        for (path, content) in
            [("same", "1"), ("touched", "1"), ("a/x", "old"), ("file", "f"), ("moded", "m")]
        {
            fs::write(below.join(path), content).unwrap();
        }
        fs::write(below.join("replaced/in"), "x").unwrap();
        symlink("there", below.join("link")).unwrap();

        for path in ["a/x.d", "a/deep", "file/in", "home/ann/work", "tmp/any", "etc", "proc"] {
            fs::create_dir_all(upper.join(path)).unwrap();
        }
        for (path, content) in
            [("touched", "1"), ("a/x", "new"), ("a/x.d/n", ""), ("moded", "m"), ("replaced", "now")]
        {
            fs::write(upper.join(path), content).unwrap();
        }
        fs::write(upper.join("etc/hostname"), "box").unwrap();
        fs::set_permissions(upper.join("moded"), fs::Permissions::from_mode(0o4755)).unwrap();
        symlink("elsewhere", upper.join("link")).unwrap();
        whiteout(&upper.join("gone"));
        whiteout(&upper.join("never-was"));
        rustix::fs::mknodat(
            CWD,
            upper.join("a/pipe"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let _socket = UnixListener::bind(upper.join("a/socket")).unwrap();

        let told = told(&upper, &below);
        assert_eq!(
            told.changes,
            [
                "A a/deep",
                "A a/pipe",
                "C a/x content",
                "A a/x.d",
                "A a/x.d/n",
                "C file kind",
                "A file/in",
                "D gone",
                "C link content",
                "C moded mode",
                "C replaced kind",
            ]
        );
        use LeftOut::{Socket, Volatile};
        assert_eq!(told.left_out, [Socket, Volatile, Volatile, Volatile]);
        assert!(told.looked > 15);
    }

    #[test]
    fn attributes_count_but_not_those_of_overlayfs() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
        for tree in [&upper, &below] {
            fs::create_dir(tree).unwrap();
            fs::write(tree.join("a"), "").unwrap();
            fs::write(tree.join("b"), "").unwrap();
        }
        let set = |name: &str, path: &Path| {
            rustix::fs::setxattr(path, name, b"v", XattrFlags::empty()).is_ok()
        };
        if !set("user.x", &upper.join("a")) {
            writeln_skipped("this file system has no attributes");
            return;
        }
        assert!(set("user.overlay.impure", &upper.join("b")));
        assert_eq!(told(&upper, &below).changes, ["C a xattrs"]);
        assert!(set("user.x", &below.join("a")));
        assert_eq!(told(&upper, &below).changes, [""; 0]);
    }

    /// `ln same other` copies the file up as it is: only its names are new.
    #[test]
    fn a_file_whose_names_are_others_is_told_with_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
        for tree in [&upper, &below] {
            fs::create_dir_all(tree.join("d")).unwrap();
            for (name, other) in [("a", "d/a"), ("e", "d/e"), ("k", "tmp/k")] {
                fs::write(tree.join(name), name).unwrap();
                fs::create_dir_all(tree.join("tmp")).unwrap();
                fs::hard_link(tree.join(name), tree.join(other)).unwrap();
            }
            fs::write(tree.join("b"), "b").unwrap();
            fs::write(tree.join("f"), "f").unwrap();
        }
        fs::write(below.join("d/f"), "f").unwrap();
        fs::remove_file(below.join("d/e")).unwrap();
        fs::write(below.join("d/e"), "e").unwrap();
        // As below; one more name; two that were two files; one that nobody looks at.
        fs::hard_link(upper.join("b"), upper.join("d/b")).unwrap();
        fs::hard_link(upper.join("f"), upper.join("tmp/f")).unwrap();
        assert_eq!(
            told(&upper, &below).changes,
            ["C b links", "A d/b", "C d/e links", "C e links"]
        );
    }

    #[test]
    fn a_whole_tree_is_what_is_there_and_of_the_image_what_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
        for path in ["a", "etc", "gone", "home", "kept/deep", "proc", "run/lock", "tmp"] {
            fs::create_dir_all(below.join(path)).unwrap();
        }
        for path in ["a", "a.new", "etc", "home/ann/work", "proc/1", "run/later", "tmp/any"] {
            fs::create_dir_all(upper.join(path)).unwrap();
        }
        for (path, content) in [("a/same", "1"), ("etc/hostname", "image"), ("etc/hosts", "x")] {
            fs::write(below.join(path), content).unwrap();
        }
        for (path, content) in [("a/same", "1"), ("etc/hostname", "box"), ("etc/resolv.conf", "")] {
            fs::write(upper.join(path), content).unwrap();
        }
        fs::write(below.join("a/hidden"), "").unwrap();
        whiteout(&upper.join("a/hidden"));
        whiteout(&upper.join("gone"));
        let wanted = Wanted { whole: true, project: None };
        let expected = [
            "A a",
            "A a.new",
            "A a/same",
            "A etc",
            "A etc/hostname",
            "A etc/hosts",
            "A home",
            "A kept",
            "A kept/deep",
            "A proc",
            "A run",
            "A run/lock",
            "A tmp",
        ];
        assert_eq!(told_wanted(&upper, &below, &wanted).changes, expected);
        fs::remove_dir_all(upper.join("etc")).unwrap();
        assert_eq!(told_wanted(&upper, &below, &wanted).changes, expected, "nothing is above it");
    }

    /// Whatever of the way to it was made, by whom ever; and it hides what the image has there.
    #[test]
    fn the_project_folder_is_told_at_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, below, folder] = ["upper", "below", "folder"].map(|name| dir.path().join(name));
        fs::create_dir_all(folder.join("src")).unwrap();
        fs::write(folder.join("src/main"), "m").unwrap();
        fs::write(folder.join("kept"), "k").unwrap();
        // Names around the slash in the order of bytes.
        for tree in [&upper, &below] {
            fs::create_dir_all(tree.join("home/ann-2")).unwrap();
        }
        fs::write(upper.join("home/ann-2/new"), "").unwrap();
        let wanted = || {
            let (path, folder) = (b"home/ann/work".to_vec(), open(&folder));
            Wanted { whole: false, project: Some(super::super::Project { path, folder }) }
        };
        let inside = ["A home/ann/work", "A home/ann/work/kept", "A home/ann/work/src"];
        let [new, main] = ["A home/ann-2/new", "A home/ann/work/src/main"];
        let [place, kept, src] = inside;
        fs::create_dir_all(upper.join("home/ann/work")).unwrap();
        let changes = told_wanted(&upper, &below, &wanted()).changes;
        assert_eq!(changes, ["A home/ann", new, place, kept, src, main]);
        // The image has the place, and overlayfs nothing of it above.
        fs::remove_dir_all(upper.join("home/ann")).unwrap();
        fs::create_dir_all(below.join("home/ann/work")).unwrap();
        fs::write(below.join("home/ann/work/hidden"), "").unwrap();
        fs::write(below.join("home/ann/work/kept"), "k").unwrap();
        let changes = told_wanted(&upper, &below, &wanted()).changes;
        assert_eq!(changes, [new, "D home/ann/work/hidden", src, main]);
        let whole = Wanted { whole: true, ..wanted() };
        let changes = told_wanted(&upper, &below, &whole).changes;
        assert_eq!(changes[3..], [new, place, kept, src, main]);
    }

    #[expect(clippy::print_stderr, reason = "a skipped test says why")]
    fn writeln_skipped(why: &str) {
        eprintln!("SKIPPED: {why}");
    }

    #[test]
    fn a_tree_that_is_too_deep_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
        fs::create_dir(&below).unwrap();
        fs::create_dir_all(upper.join("d/".repeat(PATH_DEPTH_MAX + 2))).unwrap();
        let mut told = Told::default();
        let ended = walk(&open(&upper), &open(&below), &OwnPaths::default(), &mut told);
        assert!(matches!(ended, Err(WalkError::TooDeep { .. })), "{ended:?}");
    }

    /// A tree as a list: content, or a directory.
    type Tree = BTreeMap<String, Option<u8>>;

    /// Paths of at most three names, of letters around the slash in the order of bytes.
    fn tree() -> impl Strategy<Value = Tree> {
        let name = prop_oneof!["a", "a-", "a0", "b"];
        let path = proptest::collection::vec(name, 1..4);
        let entries = proptest::collection::vec((path, proptest::option::of(0..3u8)), 0..12);
        entries.prop_map(|entries| {
            let mut tree = Tree::new();
            for (names, content) in entries {
                let is_free =
                    |end: usize| tree.get(&names[..end].join("/")).is_none_or(Option::is_none);
                if !(1..names.len()).all(is_free) || tree.contains_key(&names.join("/")) {
                    continue;
                }
                for end in 1..names.len() {
                    tree.insert(names[..end].join("/"), None);
                }
                tree.insert(names.join("/"), content);
            }
            tree
        })
    }

    fn parent(path: &str) -> &str {
        path.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    /// Writes `now` over `before` as overlayfs would; `copied` of what is equal is there too, and
    /// directories hide what is below them by attribute where `opaque`.
    fn make_upper(upper: &Path, before: &Tree, now: &Tree, copied: u8, opaque: bool) {
        for (number, (path, node)) in now.iter().enumerate() {
            let is_dir = node.is_none();
            let was_dir = before.get(path) == Some(&None);
            let equal = before.get(path) == Some(node);
            if equal && !is_dir && number % 3 != usize::from(copied) {
                continue;
            }
            let place = upper.join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            match node {
                Some(content) => fs::write(place, [*content]).unwrap(),
                None => {
                    fs::create_dir_all(&place).unwrap();
                    if opaque && was_dir {
                        // All that stays is here, copied or not. The mark of a directory around it
                        // is enough: overlayfs makes no other.
                        assert!(!parent(path).is_empty() || make_opaque(&place));
                        for (inside, node) in now.iter().filter(|(p, _)| parent(p) == path) {
                            match node {
                                Some(content) => fs::write(upper.join(inside), [*content]).unwrap(),
                                None => fs::create_dir_all(upper.join(inside)).unwrap(),
                            }
                        }
                    }
                }
            }
        }
        for path in before.keys().filter(|path| !now.contains_key(*path)) {
            let above = parent(path);
            let stays = above.is_empty() || now.get(above) == Some(&None);
            if stays && (!opaque || above.is_empty()) {
                fs::create_dir_all(upper.join(above)).unwrap();
                whiteout(&upper.join(path));
            }
        }
    }

    fn expected(before: &Tree, now: &Tree) -> Vec<String> {
        let all: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
        let change = |path: &String| match (before.get(path), now.get(path)) {
            (None, _) => Some(format!("A {path}")),
            (Some(_), None) => {
                let above = parent(path);
                let told = above.is_empty() || now.get(above) == Some(&None);
                told.then(|| format!("D {path}"))
            }
            (Some(was), Some(is)) if was.is_some() != is.is_some() => {
                Some(format!("C {path} kind"))
            }
            (Some(was), Some(is)) => (was != is).then(|| format!("C {path} content")),
        };
        all.into_iter().filter_map(change).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_same_state_gives_the_same_changes_however_it_was_written(
            before in tree(), now in tree(), copied in 0..3u8, opaque: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let opaque = opaque && make_opaque(dir.path());
            let (upper, below) = (dir.path().join("upper"), dir.path().join("below"));
            for tree in [&upper, &below] {
                fs::create_dir(tree).unwrap();
            }
            for (path, node) in &before {
                match node {
                    Some(content) => fs::write(below.join(path), [*content]).unwrap(),
                    None => fs::create_dir(below.join(path)).unwrap(),
                }
            }
            make_upper(&upper, &before, &now, copied, opaque);
            prop_assert_eq!(told(&upper, &below).changes, expected(&before, &now));
            let whole = Wanted { whole: true, project: None };
            let all: Vec<_> = now.keys().map(|path| format!("A {path}")).collect();
            prop_assert_eq!(told_wanted(&upper, &below, &whole).changes, all);
        }
    }
}
