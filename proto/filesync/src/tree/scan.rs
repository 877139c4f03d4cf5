//! Lists a tree: what is synced, and what stays where it is and why.
//!
//! Follows no symlink and enters no other file system. Sockets, devices and pipes are named, not
//! synced. A directory that cannot be read is an entry without anything below it, which is named:
//! callers must not take that for deletions.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{self as sys, Dir, Mode, OFlags};

use super::read::read_small;
use super::{Root, look_at};
use crate::classes::{Class, RULES_BYTES_MAX, RuleFiles, Rules, holds_private_key, is_git_lock};
use crate::entry::{Entry, Kind};
use crate::git_index::{INDEX_BYTES_MAX, Tracked};
use crate::path::TreePath;

/// Most entries of a tree.
pub const ENTRIES_MAX: usize = 2_000_000;

/// Most paths of a kind that are named in a report; the rest is counted.
pub const LISTED_MAX: usize = 1000;

/// How to look.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions<'a> {
    /// Part of a git repository, beyond what the tree itself shows.
    pub git: bool,
    /// This is the laptop: secrets stay.
    pub secrets_stay: bool,
    /// Ignore rules from outside.
    pub excludes: &'a [u8],
}

/// A listed tree.
#[derive(Debug, Default)]
pub struct Scan {
    /// What is synced.
    pub entries: BTreeMap<TreePath, Entry>,
    /// How many paths an ignore rule keeps on this side; a directory counts once.
    pub ignored_count: u64,
    /// The first of them.
    pub ignored: Vec<TreePath>,
    /// What looks like a secret and stays.
    pub secrets: Vec<TreePath>,
    /// What cannot be synced, and why.
    pub skipped: Vec<(TreePath, String)>,
    /// A git command holds a lock.
    pub git_locked: bool,
}

/// Lists what is beneath a root. `keep`: paths that were synced before go on being synced although
/// they look like secrets.
pub fn scan(
    root: &Root,
    options: ScanOptions<'_>,
    keep: &dyn Fn(&TreePath) -> bool,
) -> io::Result<Scan> {
    let rules = rules(root, options)?;
    let mut walk = Walk { root, rules, keep, scan: Scan::default() };
    let fd = sys::openat(&root.fd, c".", DIRECTORY, Mode::empty())?;
    walk.directory(None, fd, false)?;
    walk.scan.ignored.sort();
    walk.scan.secrets.sort();
    Ok(walk.scan)
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn rules(root: &Root, options: ScanOptions<'_>) -> io::Result<Rules> {
    let small = |path: &[u8], max: usize| -> Vec<u8> {
        let path = TreePath::from_bytes(path).ok();
        path.and_then(|path| read_small(root, &path, max).ok().flatten()).unwrap_or_default()
    };
    let dot_git = TreePath::from_bytes(b".git").map_err(io::Error::other)?;
    let git = options.git || root.is_taken(&dot_git)?;
    let index_max = usize::try_from(INDEX_BYTES_MAX).unwrap_or(usize::MAX);
    let tracked = Tracked::parse(&small(b".git/index", index_max));
    let mut outside = options.excludes.to_vec();
    outside.push(b'\n');
    outside.extend(small(b".git/info/exclude", RULES_BYTES_MAX));
    Ok(Rules::new(git, options.secrets_stay, &outside, tracked))
}

struct Walk<'a> {
    root: &'a Root,
    rules: Rules,
    keep: &'a dyn Fn(&TreePath) -> bool,
    scan: Scan,
}

/// What was found in a directory.
#[derive(Default, Clone, Copy)]
struct Contents {
    listed: bool,
    ignored: bool,
}

impl Walk<'_> {
    fn directory(
        &mut self,
        path: Option<&TreePath>,
        fd: OwnedFd,
        ignored: bool,
    ) -> io::Result<Contents> {
        let names = names(&fd)?;
        let mut files = RuleFiles::default();
        for (name, rules) in [(&b".gitignore"[..], &mut files.git), (b".towignore", &mut files.tow)]
        {
            if names.iter().any(|other| other == name)
                && let Some(file) = child(path, name)
            {
                *rules = read_small(self.root, &file, RULES_BYTES_MAX)?.unwrap_or_default();
            }
        }
        self.rules.enter(path.cloned(), &files, ignored);
        let mut contents = Contents::default();
        for name in names {
            self.name(path, fd.as_fd(), &name, &mut contents)?;
        }
        self.rules.leave();
        Ok(contents)
    }

    fn name(
        &mut self,
        directory: Option<&TreePath>,
        fd: BorrowedFd<'_>,
        name: &[u8],
        contents: &mut Contents,
    ) -> io::Result<()> {
        let Some(path) = child(directory, name) else {
            if let Some(directory) = directory {
                self.skip(directory.clone(), "something in it has too long a path".to_owned());
            }
            return Ok(());
        };
        let found = match look_at(fd, name) {
            Ok(found) => found,
            // It went away since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                self.skip(path, error.to_string());
                return Ok(());
            }
        };
        let is_directory = found.entry.as_ref().is_some_and(|entry| entry.kind == Kind::Directory);
        if is_git_lock(&path) {
            self.scan.git_locked = true;
        }
        let class = self.rules.class(&path, is_directory);
        match class {
            Class::Never => return Ok(()),
            Class::Ignored if !(is_directory && self.rules.tracks_below(&path)) => {
                contents.ignored = true;
                self.scan.ignored_count += 1;
                if self.scan.ignored.len() < LISTED_MAX {
                    self.scan.ignored.push(path);
                }
                return Ok(());
            }
            Class::Secret | Class::SecretIfKey if self.is_secret(&path, class) => {
                contents.ignored = true;
                self.scan.secrets.push(path);
                return Ok(());
            }
            Class::Ignored | Class::Sync | Class::Secret | Class::SecretIfKey => {}
        }
        let Some(mut entry) = found.entry else {
            self.skip(path, "it is a socket, a pipe or a device".to_owned());
            return Ok(());
        };
        if is_directory {
            if found.stat.st_dev != self.root.device {
                self.skip(path, "it is on another file system".to_owned());
                return Ok(());
            }
            let inside = self.enter(fd, name, &path, class == Class::Ignored)?;
            entry.only_ignored = inside.ignored && !inside.listed;
        }
        if self.scan.entries.len() >= ENTRIES_MAX {
            return Err(io::Error::other(format!("the folder has more than {ENTRIES_MAX} paths")));
        }
        contents.listed = true;
        self.scan.entries.insert(path, entry);
        Ok(())
    }

    fn enter(
        &mut self,
        fd: BorrowedFd<'_>,
        name: &[u8],
        path: &TreePath,
        ignored: bool,
    ) -> io::Result<Contents> {
        let opened = sys::openat(fd, name, DIRECTORY, Mode::empty()).map_err(io::Error::from);
        match opened.and_then(|fd| self.directory(Some(path), fd, ignored)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.skip(path.clone(), "it cannot be read (permission denied)".to_owned());
                Ok(Contents { listed: true, ignored: false })
            }
            other => other,
        }
    }

    fn is_secret(&self, path: &TreePath, class: Class) -> bool {
        if (self.keep)(path) {
            return false;
        }
        let max = usize::MAX >> 1;
        class == Class::Secret
            || read_small(self.root, path, max.min(1 << 20))
                .is_ok_and(|bytes| bytes.is_some_and(|bytes| holds_private_key(&bytes)))
    }

    fn skip(&mut self, path: TreePath, reason: String) {
        if self.scan.skipped.len() < LISTED_MAX {
            self.scan.skipped.push((path, reason));
        }
    }
}

fn child(directory: Option<&TreePath>, name: &[u8]) -> Option<TreePath> {
    match directory {
        Some(directory) => directory.join(name).ok(),
        None => TreePath::from_components(&[name]).ok(),
    }
}

fn names(fd: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for item in Dir::read_from(fd)? {
        let item = item?;
        let name = item.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}
