//! Trees as overlayfs would have written them, and what the walk tells of them.

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
    rustix::fs::mknodat(CWD, upper.join("a/pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
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
    assert_eq!(told(&upper, &below).changes, ["C b links", "A d/b", "C d/e links", "C e links"]);
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
        (Some(was), Some(is)) if was.is_some() != is.is_some() => Some(format!("C {path} kind")),
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
