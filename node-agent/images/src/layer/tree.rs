//! What one or more layers' archives mean, entry by entry, on top of the layers below.
//!
//! Entries are applied in order to a tree of names; contents stay in the archives and are referred
//! to by (archive, entry number). Parents are resolved through symlinks within the image, as a
//! runtime that unpacks would; nothing can name a place outside of it. Whiteouts, also opaque ones,
//! become a list of names to hide that is exact for these lower layers.

use std::collections::{BTreeMap, BTreeSet};

use crate::limits;
use crate::tar::{Header, Type};

use super::listing::{Listing, Lower, Meta, subtree};

/// Symlinks followed while one parent is looked up, as Linux bounds it.
const HOPS_MAX: usize = 40;

/// Where a regular file's content lies: archive and entry number.
pub(crate) type Source = (usize, u64);

/// A file, symlink, FIFO or device, however many names it has.
#[derive(Debug, Clone)]
pub(crate) struct Inode {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
}

/// What an inode is.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    Regular { source: Source, size: u64 },
    Symlink(Vec<u8>),
    Character((u32, u32)),
    Block((u32, u32)),
    Fifo,
}

#[derive(Debug, Clone)]
enum What {
    Folder(Meta),
    Inode(usize),
}

#[derive(Debug, Clone)]
struct Node {
    /// Which archive made it: a whiteout hides what earlier ones made.
    archive: usize,
    what: What,
}

/// The tree of names that some archives make on top of a listing.
#[derive(Debug)]
pub(crate) struct Tree<'l> {
    lower: &'l Listing,
    names: BTreeMap<Vec<u8>, Node>,
    inodes: Vec<Inode>,
    hidden: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
}

/// The tree as it is written: what a layer disk holds.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) root: Meta,
    /// Sorted: a folder comes before what is in it.
    pub(crate) folders: Vec<(Vec<u8>, Meta)>,
    pub(crate) whiteouts: Vec<Vec<u8>>,
    /// Each with its names, sorted; never without one.
    pub(crate) inodes: Vec<(Inode, Vec<Vec<u8>>)>,
    /// What there is with the lower layers.
    pub(crate) merged: Listing,
}

impl Outcome {
    /// Says whether a disk of it would change nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.folders.is_empty() && self.whiteouts.is_empty() && self.inodes.is_empty()
    }
}

impl<'l> Tree<'l> {
    pub(crate) fn new(lower: &'l Listing) -> Tree<'l> {
        Tree {
            lower,
            names: BTreeMap::new(),
            inodes: Vec::new(),
            hidden: BTreeSet::new(),
            opaque: BTreeSet::new(),
        }
    }

    /// Applies one entry, given where its content lies.
    pub(crate) fn apply(&mut self, header: Header, source: Source) -> Result<(), String> {
        let archive = source.0;
        let path = clean(&header.path, false)?;
        let Some((parent, name)) = split(&path) else {
            if header.kind != Type::Directory {
                return Err("the image's root is no folder".into());
            }
            self.set_folder(Vec::new(), meta_of(header), archive);
            return Ok(());
        };
        if components(parent).any(|name| name.starts_with(b".wh..wh.")) {
            // Bookkeeping of aufs, a folder of it.
            return Ok(());
        }
        if name == b".wh..wh..opq" {
            let folder = self.resolve(parent, Some(archive))?;
            self.make_opaque(&folder, archive);
            return Ok(());
        }
        if name.starts_with(b".wh..wh.") {
            // Bookkeeping of aufs.
            return Ok(());
        }
        if let Some(name) = name.strip_prefix(b".wh.") {
            let why = "a whiteout of nothing";
            if name.is_empty() || matches!(name, b"." | b"..") {
                return Err(why.into());
            }
            let folder = self.resolve(parent, Some(archive))?;
            self.hide(&join(&folder, name), archive);
            return Ok(());
        }
        let folder = self.resolve(parent, Some(archive))?;
        let path = join(&folder, name);
        if path.len() > limits::PATH_MAX {
            return Err("a path longer than 4095 bytes".into());
        }
        if header.kind == Type::Directory {
            self.set_folder(path, meta_of(header), archive);
            return Ok(());
        }
        let inode = self.inode_of(header, source)?;
        self.remove_subtree(&path);
        if matches!(self.lower.get(&path), Some(Lower::Folder(_))) {
            // Even if a later archive makes it a folder again, what was in it is gone.
            self.hidden.insert(path.clone());
        }
        self.names.insert(path, Node { archive, what: What::Inode(inode) });
        Ok(())
    }

    fn inode_of(&mut self, header: Header, source: Source) -> Result<usize, String> {
        let body = match header.kind {
            Type::HardLink => return self.linked(&header.link),
            Type::Regular => Body::Regular { source, size: header.size },
            Type::Symlink => {
                if header.link.is_empty() || header.link.len() > limits::PATH_MAX {
                    return Err("a symlink that is empty or too long".into());
                }
                Body::Symlink(header.link.clone())
            }
            Type::Character if header.device == (0, 0) => {
                return Err("a character device 0:0, which overlayfs takes for a whiteout".into());
            }
            Type::Character => Body::Character(header.device),
            Type::Block => Body::Block(header.device),
            Type::Fifo => Body::Fifo,
            Type::Directory => return Err("a folder is no file".into()),
        };
        self.inodes.push(Inode { meta: meta_of(header), body });
        Ok(self.inodes.len() - 1)
    }

    /// Finds the inode that a hard link means.
    fn linked(&mut self, target: &[u8]) -> Result<usize, String> {
        let path = clean(target, true)?;
        let shown = String::from_utf8_lossy(target).into_owned();
        let Some((parent, name)) = split(&path) else {
            return Err("a hard link to the root".into());
        };
        let path = join(&self.resolve(parent, None)?, name);
        match self.names.get(&path).map(|node| &node.what) {
            Some(What::Inode(inode)) => Ok(*inode),
            Some(What::Folder(_)) => Err(format!("a hard link to the folder `{shown}`")),
            None if self.lower.get(&path).is_some() => Err(format!(
                "a hard link to `{shown}` of a lower layer: layers of common tools repeat the \
                 file instead; build the image again with one of them"
            )),
            None => Err(format!("a hard link to `{shown}`, which is not in the layer")),
        }
    }

    fn set_folder(&mut self, path: Vec<u8>, meta: Meta, archive: usize) {
        if let Some(node) = self.names.get_mut(&path)
            && let What::Folder(old) = &mut node.what
        {
            *old = meta;
            return;
        }
        self.names.insert(path, Node { archive, what: What::Folder(meta) });
    }

    /// Follows a path of folders through symlinks within the image. With an archive, what is
    /// missing on the way is made; without, it is passed over.
    fn resolve(&mut self, path: &[u8], make_for: Option<usize>) -> Result<Vec<u8>, String> {
        let mut at = Vec::new();
        let mut hops = 0;
        let mut waiting: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
        while let Some(name) = waiting.pop() {
            match &*name {
                b"." => continue,
                b".." => {
                    at.truncate(at.iter().rposition(|b| *b == b'/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = join(&at, &name);
            let target = match self.look(&next) {
                Seen::Folder(lower) => {
                    if let (Some(archive), Some(meta)) = (make_for, lower) {
                        self.set_folder(next.clone(), meta, archive);
                    }
                    at = next;
                    continue;
                }
                Seen::Nothing => {
                    if let Some(archive) = make_for {
                        if name.starts_with(b".wh.") {
                            return Err("a folder that has the name of a whiteout".into());
                        }
                        self.set_folder(next.clone(), Meta::default(), archive);
                    }
                    at = next;
                    continue;
                }
                Seen::File => {
                    let shown = String::from_utf8_lossy(&next).into_owned();
                    return Err(format!("`{shown}` is a file and no folder"));
                }
                Seen::Symlink(target) => target,
            };
            hops += 1;
            if hops > HOPS_MAX || waiting.len() > limits::PATH_MAX {
                return Err("symlinks in a circle".into());
            }
            if target.starts_with(b"/") {
                at.clear();
            }
            waiting.extend(components(&target).rev().map(<[u8]>::to_vec));
        }
        Ok(at)
    }

    /// Looks at a path whose parent is resolved.
    fn look(&self, path: &[u8]) -> Seen {
        if let Some(node) = self.names.get(path) {
            return match &node.what {
                What::Folder(_) => Seen::Folder(None),
                What::Inode(inode) => match &self.inodes[*inode].body {
                    Body::Symlink(target) => Seen::Symlink(target.clone()),
                    _ => Seen::File,
                },
            };
        }
        if !self.lower_shows(path) {
            return Seen::Nothing;
        }
        match self.lower.get(path) {
            Some(Lower::Folder(meta)) => Seen::Folder(Some(meta.clone())),
            Some(Lower::Symlink(target)) => Seen::Symlink(target.clone()),
            Some(Lower::Other) => Seen::File,
            None => Seen::Nothing,
        }
    }

    /// Says whether whiteouts so far let a lower path through.
    fn lower_shows(&self, path: &[u8]) -> bool {
        !self.hidden.contains(path)
            && !parents(path)
                .any(|above| self.hidden.contains(above) || self.opaque.contains(above))
    }

    /// A whiteout: hides what lower layers and earlier archives have at a path.
    fn hide(&mut self, path: &[u8], archive: usize) {
        self.hidden.insert(path.to_vec());
        self.forget_earlier(path, archive);
        if self.names.get(path).is_some_and(|node| node.archive < archive)
            && subtree(&self.names, path).next().is_none()
        {
            self.names.remove(path);
        }
    }

    fn make_opaque(&mut self, folder: &[u8], archive: usize) {
        self.opaque.insert(folder.to_vec());
        self.forget_earlier(folder, archive);
    }

    /// Removes what earlier archives put into a folder, but not the way to what this one did.
    fn forget_earlier(&mut self, folder: &[u8], archive: usize) {
        let inside: Vec<_> = subtree(&self.names, folder)
            .filter(|(_, node)| node.archive < archive)
            .map(|(path, _)| path.clone())
            .collect();
        for path in inside.into_iter().rev() {
            if subtree(&self.names, &path).next().is_none() {
                self.names.remove(&path);
            }
        }
    }

    fn remove_subtree(&mut self, path: &[u8]) {
        let inside: Vec<_> = subtree(&self.names, path).map(|(path, _)| path.clone()).collect();
        for path in inside {
            self.names.remove(&path);
        }
        self.names.remove(path);
    }

    /// Works out what is to be written and what the image then consists of.
    pub(crate) fn finish(mut self) -> Outcome {
        let root = match self.names.remove(&Vec::new()).map(|node| node.what) {
            Some(What::Folder(meta)) => meta,
            _ => match self.lower.get(b"") {
                Some(Lower::Folder(meta)) => meta.clone(),
                _ => Meta::default(),
            },
        };
        let whiteouts = self.whiteouts();
        let mut merged = self.lower.clone();
        for path in &whiteouts {
            merged.remove(path);
        }
        merged.set(b"", Lower::Folder(root.clone()));
        let mut folders = Vec::new();
        let mut names: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
        for (path, node) in self.names {
            match node.what {
                What::Folder(meta) => {
                    merged.set(&path, Lower::Folder(meta.clone()));
                    folders.push((path, meta));
                }
                What::Inode(inode) => {
                    merged.remove(&path);
                    merged.set(
                        &path,
                        match &self.inodes[inode].body {
                            Body::Symlink(target) => Lower::Symlink(target.clone()),
                            _ => Lower::Other,
                        },
                    );
                    names.entry(inode).or_default().push(path);
                }
            }
        }
        let inodes =
            names.into_iter().map(|(inode, names)| (self.inodes[inode].clone(), names)).collect();
        Outcome { root, folders, whiteouts: whiteouts.into_iter().collect(), inodes, merged }
    }

    /// Returns every lower name that must be hidden by name: whiteouts of what is there, and
    /// opaque folders expanded.
    fn whiteouts(&self) -> BTreeSet<Vec<u8>> {
        let mut found = BTreeSet::new();
        for path in &self.hidden {
            self.hide_lower(path, &mut found);
        }
        for folder in self.opaque.iter().filter(|folder| self.is_folder(folder)) {
            self.hide_lower_children(folder, &mut found);
        }
        // A whiteout stands in a folder of this disk; where that is gone, so is all it hid.
        found.retain(|path| split(path).is_some_and(|(parent, _)| self.is_folder(parent)));
        found
    }

    fn is_folder(&self, path: &[u8]) -> bool {
        path.is_empty()
            || self.names.get(path).is_some_and(|node| matches!(node.what, What::Folder(_)))
    }

    fn hide_lower(&self, path: &[u8], found: &mut BTreeSet<Vec<u8>>) {
        let Some(lower) = self.lower.get(path) else { return };
        match self.names.get(path).map(|node| &node.what) {
            None => {
                found.insert(path.to_vec());
            }
            Some(What::Folder(_)) if matches!(lower, Lower::Folder(_)) => {
                self.hide_lower_children(path, found);
            }
            // Whatever else is there covers it.
            Some(_) => {}
        }
    }

    fn hide_lower_children(&self, folder: &[u8], found: &mut BTreeSet<Vec<u8>>) {
        if !folder.is_empty() && !matches!(self.lower.get(folder), Some(Lower::Folder(_))) {
            return;
        }
        // Depth is bounded by the longest path.
        for child in self.lower.children(folder) {
            self.hide_lower(child, found);
        }
    }
}

enum Seen {
    /// With the lower folder's marks when this tree does not have it yet.
    Folder(Option<Meta>),
    Symlink(Vec<u8>),
    File,
    Nothing,
}

fn meta_of(header: Header) -> Meta {
    let mut xattrs = header.xattrs;
    xattrs.retain(|(name, _)| {
        name == b"security.capability"
            || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
    });
    Meta { mode: header.mode, uid: header.uid, gid: header.gid, mtime: header.mtime, xattrs }
}

/// Checks a stranger's path and returns it without empty and `.` components.
fn clean(path: &[u8], may_begin_with_slash: bool) -> Result<Vec<u8>, String> {
    if path.starts_with(b"/") && !may_begin_with_slash {
        return Err("an absolute path".into());
    }
    if path.is_empty() || path.contains(&0) {
        return Err("an empty path, or one with a NUL in it".into());
    }
    if path.len() > limits::PATH_MAX + 1 {
        return Err("a path longer than 4095 bytes".into());
    }
    let names: Vec<&[u8]> = components(path).filter(|name| *name != b".").collect();
    for name in &names {
        if *name == b".." {
            return Err("a path with `..` in it".into());
        }
        // The mark of what is removed is in front of a name as long as any.
        let name = name.strip_prefix(b".wh.").unwrap_or(name);
        if name.len() > limits::NAME_MAX {
            return Err("a name longer than 255 bytes".into());
        }
    }
    Ok(names.join(&b'/'))
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|b| *b == b'/').filter(|name| !name.is_empty())
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

/// Splits a path into its folder and its name; the root has none.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    })
}

/// Returns every folder above a path, the nearest first, the root last.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(split(path).map(|(parent, _)| parent), |above| {
        split(above).map(|(parent, _)| parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: Type, path: &str, link: &str) -> Header {
        Header {
            kind,
            path: path.as_bytes().to_vec(),
            link: link.as_bytes().to_vec(),
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: 0,
            size: 0,
            device: (1, 3),
            xattrs: Vec::new(),
        }
    }

    fn file(path: &str) -> Header {
        entry(Type::Regular, path, "")
    }

    fn folder(path: &str) -> Header {
        entry(Type::Directory, path, "")
    }

    fn build(lower: &Listing, archives: &[Vec<Header>]) -> Result<Outcome, String> {
        let mut tree = Tree::new(lower);
        for (archive, entries) in archives.iter().enumerate() {
            for (number, header) in entries.iter().enumerate() {
                tree.apply(header.clone(), (archive, number as u64))?;
            }
        }
        Ok(tree.finish())
    }

    fn text(paths: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<String> {
        paths.into_iter().map(|p| String::from_utf8_lossy(p.as_ref()).into_owned()).collect()
    }

    /// Lower `d/{a,b,s/{x,y}}`, `f`, `l -> d`.
    fn lower() -> Listing {
        let base = [
            folder("d"),
            file("d/a"),
            file("d/b"),
            file("d/s/x"),
            file("d/s/y"),
            file("f"),
            entry(Type::Symlink, "l", "d"),
        ];
        build(&Listing::default(), &[base.to_vec()]).unwrap().merged
    }

    fn check(entries: &[Header], folders: &[&str], whiteouts: &[&str], files: &[&str]) {
        let out = build(&lower(), &[entries.to_vec()]).unwrap();
        assert_eq!(text(out.folders.iter().map(|(path, _)| path)), folders, "folders");
        assert_eq!(text(&out.whiteouts), whiteouts, "whiteouts");
        assert_eq!(text(out.inodes.iter().flat_map(|(_, names)| names)), files, "files");
    }

    #[test]
    fn whiteouts_hide_what_is_there_and_nothing_else() {
        check(&[file("d/.wh.a")], &["d"], &["d/a"], &[]);
        check(&[file("d/.wh.no")], &["d"], &[], &[]);
        check(&[file(".wh.d")], &[], &["d"], &[]);
        check(&[file(".wh.f"), file("f")], &[], &[], &["f"]);
        check(&[file("f"), file(".wh.f")], &[], &[], &["f"]);
    }

    #[test]
    fn an_opaque_folder_hides_every_lower_entry_by_name() {
        check(&[folder("d"), file("d/.wh..wh..opq")], &["d"], &["d/a", "d/b", "d/s"], &[]);
        check(
            &[folder("d"), file("d/a"), file("d/.wh..wh..opq"), file("d/s/x")],
            &["d", "d/s"],
            &["d/b", "d/s/y"],
            &["d/a", "d/s/x"],
        );
        // A folder that was removed and made anew.
        check(&[file(".wh.d"), folder("d"), file("d/n")], &["d"], &["d/a", "d/b", "d/s"], &["d/n"]);
        // What aufs kept for itself.
        check(&[folder(".wh..wh.plnk"), file(".wh..wh.plnk/9.1"), file("n")], &[], &[], &["n"]);
    }

    #[test]
    fn a_folder_in_passing_keeps_the_lower_ones_marks() {
        let mut lower = lower();
        let meta = Meta { mode: 0o1777, uid: 7, ..Meta::default() };
        lower.set(b"d", Lower::Folder(meta.clone()));
        let out = build(&lower, &[vec![file("d/n")]]).unwrap();
        assert_eq!(out.folders, [(b"d".to_vec(), meta)]);
    }

    #[test]
    fn parents_are_followed_through_symlinks_inside_the_image() {
        check(&[file("l/n")], &["d"], &[], &["d/n"]);
        check(&[entry(Type::Symlink, "e", "/../../l"), file("e/n")], &["d"], &[], &["e", "d/n"]);
        // A folder in the archive replaces the symlink.
        check(&[folder("l"), file("l/n")], &["l"], &[], &["l/n"]);
    }

    #[test]
    fn the_last_of_several_entries_counts_and_links_keep_their_file() {
        let entries =
            vec![file("x"), entry(Type::HardLink, "y", "x"), file("x"), folder("z"), file("z")];
        let out = build(&Listing::default(), &[entries]).unwrap();
        let names: Vec<_> = out.inodes.iter().map(|(_, names)| text(names)).collect();
        assert_eq!(names, [["y"], ["x"], ["z"]]);
        let Body::Regular { source, .. } = out.inodes[0].0.body else { panic!() };
        assert_eq!(source, (0, 0));
    }

    #[test]
    fn squashed_layers_are_what_they_are_one_after_the_other() {
        let first = vec![file("d/n"), file("d/o"), file("k")];
        let second = vec![file("d/.wh.n"), file("d/.wh.a"), file(".wh.k")];
        let out = build(&lower(), &[first.clone(), second]).unwrap();
        assert_eq!(text(&out.whiteouts), ["d/a"]);
        assert_eq!(text(out.inodes.iter().flat_map(|(_, n)| n)), ["d/o"]);

        // d becomes a file, then a folder again: the lower d must not shine through.
        let out = build(&lower(), &[vec![file("d")], vec![folder("d"), file("d/q")]]).unwrap();
        assert_eq!(text(&out.whiteouts), ["d/a", "d/b", "d/s"]);

        let out = build(&lower(), &[first, vec![file("d/.wh..wh..opq"), file("d/p")]]).unwrap();
        assert_eq!(text(&out.whiteouts), ["d/a", "d/b", "d/s"]);
        assert_eq!(text(out.inodes.iter().flat_map(|(_, n)| n)), ["k", "d/p"]);
    }

    #[test]
    fn hostile_entries_are_refused() {
        let long = "n".repeat(256);
        let deep = "d/".repeat(2100);
        for (entry, why) in [
            (file("../x"), ".."),
            (file("a/../../x"), ".."),
            (file("/etc/passwd"), "absolute"),
            (file(""), "empty"),
            (file(&long), "255"),
            (file(&deep), "4095"),
            (file("f/x"), "no folder"),
            (entry(Type::HardLink, "h", "../../etc/shadow"), ".."),
            (entry(Type::HardLink, "h", "/etc/shadow"), "not in the layer"),
            (entry(Type::HardLink, "h", "d"), "lower"),
            (entry(Type::HardLink, "h", "d/a"), "lower layer"),
            (Header { device: (0, 0), ..entry(Type::Character, "c", "") }, "whiteout"),
            (file(".wh."), "whiteout"),
            (file(".wh..."), "whiteout"),
            (file("d/.wh.a/x"), "whiteout"),
            (file("d/.wh./.wh..wh..opq"), "whiteout"),
        ] {
            let error = build(&lower(), &[vec![entry]]).unwrap_err();
            assert!(error.contains(why), "{error} / {why}");
        }
        let link = vec![entry(Type::Symlink, "p", "d/.wh.a"), file("p/x")];
        assert!(build(&lower(), &[link]).unwrap_err().contains("whiteout"));
        let circle =
            vec![entry(Type::Symlink, "p", "q"), entry(Type::Symlink, "q", "p"), file("p/x")];
        assert!(build(&lower(), &[circle]).unwrap_err().contains("circle"));
    }
}
