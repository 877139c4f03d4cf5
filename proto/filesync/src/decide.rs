//! What to do about one path, from what it was when both sides last agreed and what it is now.
//!
//! Pure, and the whole of the conflict rules for single paths; `reconcile.rs` makes trees of it.
//! An edit always survives a deletion, and two different edits are a conflict, never a choice.

use crate::content::ContentId;
use crate::entry::Kind;

/// One end of the synchronisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The user's machine.
    Laptop,
    /// The sandbox.
    Guest,
}

/// What is known of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// Those of the ancestor.
    Base,
    /// These.
    Known(ContentId),
    /// The same on both sides, by size and a modification time to the nanosecond.
    Paired,
    /// Perhaps changed since the ancestor, and not read.
    Unread,
}

/// What is at a path, as far as decisions need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Kind and content.
    pub what: What,
    /// Permission bits; zero for symlinks.
    pub mode: u32,
}

/// Kind and content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A directory.
    Directory,
    /// A file.
    File {
        /// Its bytes.
        content: Content,
        /// How many they are.
        size: u64,
    },
    /// A symlink and its target.
    Symlink(Vec<u8>),
}

/// What to do about one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// Both sides agree, or nothing is there.
    Settled,
    /// This side's version goes to the other; both get this mode.
    Take(Side, u32),
    /// Contents agree; both get this mode.
    Mode(u32),
    /// It goes from this side too.
    RemoveFrom(Side),
    /// Contents must be read to know.
    Compare,
    /// Both changed it differently.
    Conflict,
}

impl Node {
    /// The kind alone.
    pub fn kind(&self) -> Kind {
        match self.what {
            What::Directory => Kind::Directory,
            What::File { .. } => Kind::File,
            What::Symlink(_) => Kind::Symlink,
        }
    }
}

/// Decides about one path.
pub fn decide(base: Option<&Node>, laptop: Option<&Node>, guest: Option<&Node>) -> Decision {
    match (laptop, guest) {
        (None, None) => Decision::Settled,
        (Some(laptop), None) => one_sided(base, laptop, Side::Laptop),
        (None, Some(guest)) => one_sided(base, guest, Side::Guest),
        (Some(laptop), Some(guest)) => two_sided(base, laptop, guest),
    }
}

/// The path exists on `side` only.
fn one_sided(base: Option<&Node>, node: &Node, side: Side) -> Decision {
    let edited = base.is_none_or(|base| {
        changed(base, node) || (node.mode != base.mode && node.what != What::Directory)
    });
    if edited { Decision::Take(side, node.mode) } else { Decision::RemoveFrom(side) }
}

fn two_sided(base: Option<&Node>, laptop: &Node, guest: &Node) -> Decision {
    let mode = match base {
        Some(base) if laptop.mode == base.mode => guest.mode,
        _ => laptop.mode,
    };
    let agreed = if laptop.mode == guest.mode { Decision::Settled } else { Decision::Mode(mode) };
    let laptop_changed = base.is_none_or(|base| changed(base, laptop));
    let guest_changed = base.is_none_or(|base| changed(base, guest));
    match (laptop_changed, guest_changed) {
        (false, false) => agreed,
        (true, false) => Decision::Take(Side::Laptop, own_mode(mode, laptop, guest)),
        (false, true) => Decision::Take(Side::Guest, own_mode(mode, guest, laptop)),
        (true, true) => match equal(&laptop.what, &guest.what) {
            Some(true) => agreed,
            Some(false) => Decision::Conflict,
            None => Decision::Compare,
        },
    }
}

/// Modes merge between versions of one kind only.
fn own_mode(merged: u32, taken: &Node, replaced: &Node) -> u32 {
    if taken.kind() == replaced.kind() { merged } else { taken.mode }
}

fn changed(base: &Node, now: &Node) -> bool {
    match (&base.what, &now.what) {
        (What::File { content: was, .. }, What::File { content: is, .. }) => {
            !(*is == Content::Base
                || matches!((was, is), (Content::Known(a), Content::Known(b)) if a == b))
        }
        (was, is) => was != is,
    }
}

/// `None`: only reading tells.
fn equal(laptop: &What, guest: &What) -> Option<bool> {
    match (laptop, guest) {
        (What::File { content: a, size: a_size }, What::File { content: b, size: b_size }) => {
            match (a, b) {
                _ if a_size != b_size => Some(false),
                (Content::Known(a), Content::Known(b)) => Some(a == b),
                (Content::Base, Content::Base) | (Content::Paired, Content::Paired) => Some(true),
                _ => None,
            }
        }
        (a, b) => Some(a == b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Node {
        let content = Content::Known(ContentId::of(text.as_bytes()));
        Node { what: What::File { content, size: text.len() as u64 }, mode: 0o644 }
    }

    fn unread(size: u64) -> Node {
        Node { what: What::File { content: Content::Unread, size }, mode: 0o644 }
    }

    #[test]
    fn the_table_of_rules() {
        let (a, b, c) = (file("a"), file("b"), file("c"));
        let directory = Node { what: What::Directory, mode: 0o755 };
        let executable = Node { mode: 0o755, ..a.clone() };
        type Case<'a> = (&'a str, Option<&'a Node>, Option<&'a Node>, Option<&'a Node>, Decision);
        let cases: [Case<'_>; 16] = [
            ("unchanged", Some(&a), Some(&a), Some(&a), Decision::Settled),
            ("laptop edited", Some(&a), Some(&b), Some(&a), Decision::Take(Side::Laptop, 0o644)),
            ("guest edited", Some(&a), Some(&a), Some(&b), Decision::Take(Side::Guest, 0o644)),
            ("same edit", Some(&a), Some(&b), Some(&b), Decision::Settled),
            ("different edits", Some(&a), Some(&b), Some(&c), Decision::Conflict),
            ("laptop deleted", Some(&a), None, Some(&a), Decision::RemoveFrom(Side::Guest)),
            ("guest deleted", Some(&a), Some(&a), None, Decision::RemoveFrom(Side::Laptop)),
            ("deleted and edited", Some(&a), None, Some(&b), Decision::Take(Side::Guest, 0o644)),
            ("edited and deleted", Some(&a), Some(&b), None, Decision::Take(Side::Laptop, 0o644)),
            ("both deleted", Some(&a), None, None, Decision::Settled),
            ("created", None, None, Some(&a), Decision::Take(Side::Guest, 0o644)),
            ("both created alike", None, Some(&a), Some(&a), Decision::Settled),
            ("both created", None, Some(&a), Some(&b), Decision::Conflict),
            ("file and directory", None, Some(&a), Some(&directory), Decision::Conflict),
            (
                "mode and content",
                Some(&a),
                Some(&executable),
                Some(&b),
                Decision::Take(Side::Guest, 0o755),
            ),
            ("mode only", Some(&a), Some(&a), Some(&executable), Decision::Mode(0o755)),
        ];
        for (name, base, laptop, guest, wanted) in cases {
            assert_eq!(decide(base, laptop, guest), wanted, "{name}");
        }
        assert_eq!(decide(None, Some(&unread(3)), Some(&unread(3))), Decision::Compare);
        assert_eq!(decide(None, Some(&unread(3)), Some(&unread(4))), Decision::Conflict);
        assert_eq!(
            decide(Some(&a), Some(&unread(1)), Some(&a)),
            Decision::Take(Side::Laptop, 0o644)
        );
    }
}
