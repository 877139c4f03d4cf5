//! Makes the trees that reconciliation sees out of listings, ancestors, and what must not be seen.
//!
//! Here an unlisted path is told apart from a deleted one: what is still there but ignored, secret
//! or unreadable on either side is left alone on both.

use std::collections::{BTreeMap, BTreeSet};

use towline_filesync::classes::{OWN_NAMES, is_nobodys};
use towline_filesync::decide::{Content, Node, What};
use towline_filesync::reconcile::Nodes;
use towline_filesync::tree::Root;
use towline_filesync::{Entry, Kind, TreePath};

use super::link::SyncError;
use super::state::Base;

/// The three trees of one round.
#[derive(Debug, Default)]
pub(super) struct Trees {
    pub(super) bases: Nodes,
    pub(super) laptop: Nodes,
    pub(super) guest: Nodes,
}

/// The listings that trees are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listings<'a> {
    pub(super) bases: &'a BTreeMap<TreePath, Base>,
    pub(super) laptop: &'a BTreeMap<TreePath, Entry>,
    pub(super) guest: &'a BTreeMap<TreePath, Entry>,
}

impl Trees {
    /// Builds them, without what is excluded.
    pub(super) fn new(listings: Listings<'_>, excluded: &BTreeSet<TreePath>) -> Self {
        let Listings { bases, laptop, guest } = listings;
        let mut trees = Self::default();
        for (path, base) in bases.iter().filter(|(path, _)| !excluded.contains(*path)) {
            let content = base.laptop.content.map_or(Content::Base, Content::Known);
            trees.bases.insert(path.clone(), node(&base.laptop, content));
        }
        for (path, entry) in laptop.iter().filter(|(path, _)| !excluded.contains(*path)) {
            let base = bases.get(path).map(|base| &base.laptop);
            let content = content(entry, base, guest.get(path));
            trees.laptop.insert(path.clone(), node(entry, content));
        }
        for (path, entry) in guest.iter().filter(|(path, _)| !excluded.contains(*path)) {
            let base = bases.get(path).map(|base| &base.guest);
            let content = content(entry, base, laptop.get(path));
            trees.guest.insert(path.clone(), node(entry, content));
        }
        trees
    }
}

fn node(entry: &Entry, content: Content) -> Node {
    let what = match entry.kind {
        Kind::Directory => What::Directory,
        Kind::Symlink => What::Symlink(entry.target.clone()),
        Kind::File => What::File { content, size: entry.stamp.size },
    };
    Node { what, mode: entry.mode }
}

/// What is known of a file's bytes without reading them. Times to the nanosecond come from an
/// earlier barrier that was cut; whole seconds may come from an archive, and prove nothing.
fn content(entry: &Entry, base: Option<&Entry>, other: Option<&Entry>) -> Content {
    let paired = |other: &Entry| {
        other.kind == entry.kind
            && other.stamp.size == entry.stamp.size
            && other.stamp.mtime_ns == entry.stamp.mtime_ns
            && entry.stamp.mtime_ns % 1_000_000_000 != 0
    };
    if base.is_some_and(|base| entry.has_content_of(base)) {
        Content::Base
    } else if let Some(id) = entry.content {
        Content::Known(id)
    } else if base.is_none() && other.is_some_and(paired) {
        Content::Paired
    } else {
        Content::Unread
    }
}

/// Paths that exist on the laptop although its listing does not have them.
pub(super) fn unlisted_here(root: &Root, listings: Listings<'_>) -> BTreeSet<TreePath> {
    let Listings { bases, laptop, guest } = listings;
    bases
        .keys()
        .chain(guest.keys())
        .filter(|path| !laptop.contains_key(*path))
        // What cannot be looked at is not known to be gone.
        .filter(|path| root.is_taken(path).unwrap_or(true))
        .cloned()
        .collect()
}

/// Directories on the laptop that hold nothing but ignored paths and that the sandbox never had.
pub(super) fn empty_shells(listings: Listings<'_>) -> BTreeSet<TreePath> {
    let Listings { bases, laptop, guest } = listings;
    laptop
        .iter()
        .filter(|(_, entry)| entry.only_ignored)
        .map(|(path, _)| path.clone())
        .filter(|path| !bases.contains_key(path) && !guest.contains_key(path))
        .collect()
}

/// Paths that look deleted in the sandbox: only looking tells whether they are.
pub(super) fn missing_there(listings: Listings<'_>) -> Vec<TreePath> {
    let Listings { bases, laptop, guest } = listings;
    bases
        .keys()
        .filter(|path| laptop.contains_key(*path) && !guest.contains_key(*path))
        .cloned()
        .collect()
}

/// Whether an entry from the sandbox counts: it may not name what is ours, and not what is nobody's.
pub(super) fn may_come(path: &TreePath) -> Result<bool, SyncError> {
    if path.components().next().is_some_and(|first| OWN_NAMES.contains(&first)) {
        return Err(SyncError::Protocol(format!("it listed `{path}`, which is not synced")));
    }
    Ok(!is_nobodys(path))
}
