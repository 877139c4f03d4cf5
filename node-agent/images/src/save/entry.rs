//! What a guest says of one file, checked before anything is made of it.

use std::collections::BTreeSet;

use towline_proto::v1::{FileType, LayerEntry, LayerXattr};

use super::SaveError;
use crate::layer::listing::Listing;
use crate::layer::normal::{self, Archive, Budget};
use crate::limits;
use crate::tar::{self, Header, Type};

/// Bytes of the paths that hard links may lead to, over one layer.
const LINKED_MAX: usize = 16 << 20;
/// How OCI layers mark what is removed.
const WHITEOUT: &[u8] = b".wh.";

/// Name and value.
type Xattr = (Vec<u8>, Vec<u8>);

/// Entries of one layer so far: each must come after the one before, and beneath directories only.
#[derive(Debug, Default)]
pub(super) struct Order {
    last: Vec<u8>,
    /// Paths that nothing may be beneath, as long as what would be beneath them may still come.
    closed: Vec<Vec<u8>>,
    /// Regular files that later entries may be other names of.
    linked: BTreeSet<Vec<u8>>,
    linked_len: usize,
    entries: u64,
}

impl Order {
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Checks an entry; returns the header that it has in the layer.
    pub(super) fn header(&mut self, entry: &LayerEntry) -> Result<Header, SaveError> {
        let path = &entry.path;
        let bad = |why: &str| SaveError::entry(path, why);
        check_path(path).map_err(bad)?;
        if self.entries > 0 && *path <= self.last {
            return Err(bad("it is out of order"));
        }
        self.entries += 1;
        if self.entries > limits::ENTRIES_MAX {
            return Err(SaveError::Limit(format!("more than {} files", limits::ENTRIES_MAX)));
        }
        self.check_parents(path).map_err(bad)?;
        let header = header(entry).map_err(bad)?;
        if header.kind == Type::HardLink && !self.linked.contains(&header.link) {
            return Err(bad("it is another name of no file before it"));
        }
        if entry.has_links {
            self.linked_len += path.len();
            if header.kind != Type::Regular || self.linked_len > LINKED_MAX {
                return Err(bad("too many files with several names"));
            }
            self.linked.insert(path.clone());
        }
        if header.kind != Type::Directory {
            self.closed.push(path.clone());
        }
        self.last.clone_from(path);
        Ok(header)
    }

    fn check_parents(&mut self, path: &[u8]) -> Result<(), &'static str> {
        // All beneath `a` is before `a0`, the slash being just below the zero.
        let is_past = |closed: &Vec<u8>| *path >= *[&closed[..], b"0"].concat();
        while self.closed.last().is_some_and(is_past) {
            self.closed.pop();
        }
        let holds = |closed: &Vec<u8>| {
            path.strip_prefix(&closed[..]).is_some_and(|rest| rest.starts_with(b"/"))
        };
        match self.closed.iter().any(holds) {
            true => Err("it is beneath what is no directory"),
            false => Ok(()),
        }
    }
}

fn check_path(path: &[u8]) -> Result<(), &'static str> {
    // Room for the mark in front of its name.
    let most = limits::PATH_MAX - WHITEOUT.len();
    if path.is_empty() || path.len() > most || path.contains(&0) {
        return Err("its path is empty, too long or no path");
    }
    for name in path.split(|&byte| byte == b'/') {
        if name.is_empty() || name == b"." || name == b".." || name.len() > limits::NAME_MAX {
            return Err("its path leads elsewhere");
        }
        if name.starts_with(WHITEOUT) {
            return Err("names that begin with .wh. mark what was removed");
        }
    }
    Ok(())
}

fn header(entry: &LayerEntry) -> Result<Header, &'static str> {
    let kind = match FileType::try_from(entry.r#type) {
        Ok(FileType::Regular) if !entry.hard_link.is_empty() => Type::HardLink,
        Ok(FileType::Unspecified) => return removed(entry),
        Ok(FileType::Regular) => Type::Regular,
        Ok(FileType::Directory) => Type::Directory,
        Ok(FileType::Symlink) => Type::Symlink,
        Ok(FileType::CharacterDevice) => Type::Character,
        Ok(FileType::BlockDevice) => Type::Block,
        Ok(FileType::Fifo) => Type::Fifo,
        Err(_) => return Err("it is of no known kind"),
    };
    let is_file = kind == Type::Regular;
    if !is_file && (entry.size > 0 || !entry.content.is_empty() || entry.has_links) {
        return Err("it has content and is no regular file");
    }
    if entry.content.len() as u64 > entry.size || entry.size > limits::IMAGE_BYTES_MAX {
        return Err("its content does not have the size that was said");
    }
    let (is_link, target) = (kind == Type::Symlink, &entry.target);
    if is_link == target.is_empty() || target.len() > limits::PATH_MAX || target.contains(&0) {
        return Err("where it leads to is no path");
    }
    if kind != Type::HardLink && !entry.hard_link.is_empty() {
        return Err("it is another name of a file and is none");
    }
    let device = (entry.device_major, entry.device_minor);
    let is_device = matches!(kind, Type::Character | Type::Block);
    if (!is_device && device != (0, 0)) || (kind == Type::Character && device == (0, 0)) {
        return Err("its device number is of another kind of file");
    }
    if entry.mode > 0o7777 {
        return Err("its mode has bits that no file has");
    }
    let link = if is_link { target } else { &entry.hard_link };
    Ok(Header {
        kind,
        path: entry.path.clone(),
        link: link.clone(),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.modified_s,
        size: entry.size,
        device,
        xattrs: xattrs(&entry.xattrs)?,
    })
}

/// An empty file whose name says what is gone.
fn removed(entry: &LayerEntry) -> Result<Header, &'static str> {
    let LayerEntry { path, .. } = entry;
    let plain = LayerEntry { path: path.clone(), ..LayerEntry::default() };
    if *entry != plain {
        return Err("it is removed and is something");
    }
    let at = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    Ok(Header {
        kind: Type::Regular,
        path: [&path[..at], WHITEOUT, &path[at..]].concat(),
        link: Vec::new(),
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: 0,
        size: 0,
        device: (0, 0),
        xattrs: Vec::new(),
    })
}

fn xattrs(said: &[LayerXattr]) -> Result<Vec<Xattr>, &'static str> {
    if said.len() > limits::XATTRS_MAX {
        return Err("it has too many extended attributes");
    }
    let mut all: Vec<Xattr> = Vec::new();
    for LayerXattr { name, value } in said {
        let is_name = !name.is_empty() && name.len() <= limits::NAME_MAX;
        // As the archive has them: NAME=value.
        if !is_name || name.iter().any(|byte| matches!(byte, 0 | b'=' | b'\n')) {
            return Err("the name of an extended attribute cannot be in an archive");
        }
        if value.len() > limits::XATTR_VALUE_MAX || all.last().is_some_and(|(last, _)| name <= last)
        {
            return Err("its extended attributes are too large, or out of order");
        }
        all.push((name.clone(), value.clone()));
    }
    Ok(all)
}

/// Puts what a guest could say into an archive in memory; whatever is accepted can be read by the
/// careful reader that others' layers are read with.
pub(crate) fn fuzz(entries: &[LayerEntry]) {
    const SMALL: u64 = 64 << 10;
    let mut order = Order::default();
    let mut tar = tar::Writer::new(Vec::new());
    for entry in entries {
        // The first that is refused ends a save.
        let Ok(header) = order.header(entry) else { break };
        if header.size > SMALL {
            return;
        }
        let zeros = vec![0; usize::try_from(header.size).unwrap_or(0) - entry.content.len()];
        let write = tar
            .header(&header)
            .and_then(|()| tar.piece(&entry.content))
            .and_then(|()| tar.piece(&zeros))
            .and_then(|()| tar.pad(header.size));
        write.expect("writing to memory does not fail");
    }
    let bytes = tar.finish().expect("writing to memory does not fail");
    let archive = Archive {
        name: "layer".into(),
        diff_id: None,
        open: Box::new(move || Ok(Box::new(std::io::Cursor::new(bytes.clone())))),
    };
    let read = normal::scan(&[archive], &Listing::default(), &mut Budget::default());
    let outcome = read.expect("what is saved can be read");
    assert!(outcome.inodes.len() as u64 <= order.entries(), "nothing was made of nothing");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> LayerEntry {
        LayerEntry { path: path.into(), r#type: FileType::Regular.into(), ..Default::default() }
    }

    fn refused(entries: &[LayerEntry]) -> String {
        let mut order = Order::default();
        let (last, before) = entries.split_last().unwrap();
        for entry in before {
            order.header(entry).unwrap();
        }
        order.header(last).unwrap_err().to_string()
    }

    #[test]
    fn paths_stay_in_the_image_and_in_order() {
        for path in
            ["", "/etc", "a//b", "a/", "..", "a/../b", "./a", "a\0", "a/.wh.b", ".wh..wh..opq"]
        {
            refused(&[file(path)]);
        }
        refused(&[file(&"n".repeat(256))]);
        refused(&[file(&"n/".repeat(2100))]);
        assert!(refused(&[file("b"), file("a")]).contains("out of order"));
        assert!(refused(&[file("b"), file("b")]).contains("out of order"));
    }

    #[test]
    fn nothing_is_beneath_what_is_no_directory() {
        let folder = |path| LayerEntry { r#type: FileType::Directory.into(), ..file(path) };
        let gone = |path| LayerEntry { r#type: FileType::Unspecified.into(), ..file(path) };
        let mut order = Order::default();
        for entry in
            [folder("a"), gone("a.d"), file("a/x"), gone("a/x!"), file("a/y/z"), file("a0")]
        {
            order.header(&entry).unwrap();
        }
        assert_eq!(order.closed, [b"a0"]);
        for above in [file("a"), gone("a")] {
            let why = refused(&[above, folder("a!"), file("a.d"), file("a/x")]);
            assert!(why.contains("no directory"), "{why}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let of = |kind: FileType| LayerEntry { r#type: kind.into(), ..file("f") };
        let link = LayerEntry { target: b"t".to_vec(), ..of(FileType::Symlink) };
        assert!(Order::default().header(&link).is_ok());
        let name = |name: &str| LayerXattr { name: name.into(), value: Vec::new() };
        let with = |names: &[&str]| LayerEntry {
            xattrs: names.iter().map(|n| name(n)).collect(),
            ..file("f")
        };
        assert!(Order::default().header(&with(&["user.a", "user.b"])).is_ok());
        for entry in [
            LayerEntry { r#type: 99, ..file("f") },
            LayerEntry { size: 1, ..of(FileType::Directory) },
            LayerEntry { content: vec![1], ..file("f") },
            LayerEntry { size: u64::MAX, ..file("f") },
            LayerEntry { mode: 0o10_0644, ..file("f") },
            LayerEntry { target: b"t".to_vec(), ..file("f") },
            LayerEntry { hard_link: b"t".to_vec(), ..of(FileType::Fifo) },
            LayerEntry { hard_link: b"never".to_vec(), ..file("f") },
            LayerEntry { uid: 1, ..of(FileType::Unspecified) },
            of(FileType::Symlink),
            of(FileType::CharacterDevice),
            LayerEntry { device_major: 1, ..file("f") },
            with(&["user.b", "user.a"]),
            with(&["user.a=b"]),
            with(&[""]),
        ] {
            refused(&[entry]);
        }
    }

    #[test]
    fn a_hard_link_leads_to_an_earlier_file_that_may_have_some() {
        let first = |has_links| LayerEntry { has_links, ..file("a") };
        let other = LayerEntry { hard_link: b"a".to_vec(), ..file("b") };
        let mut order = Order::default();
        order.header(&first(true)).unwrap();
        let header = order.header(&other).unwrap();
        assert_eq!((header.kind, &header.link[..]), (Type::HardLink, &b"a"[..]));
        refused(&[first(false), other]);
    }
}
