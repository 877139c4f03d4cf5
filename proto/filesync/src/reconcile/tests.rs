//! Properties of whole plans over random trees: they converge, lose no edit, and come to rest.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::content::ContentId;
use crate::decide::Content;

/// A tree of texts; `None` is a directory.
type Model = BTreeMap<TreePath, Option<u8>>;

fn path(text: &str) -> TreePath {
    TreePath::from_bytes(text.as_bytes()).unwrap()
}

fn node(text: Option<u8>) -> Node {
    match text {
        None => Node { what: What::Directory, mode: 0o755 },
        Some(text) => Node {
            what: What::File { content: Content::Known(ContentId::of(&[text])), size: 1 },
            mode: 0o644,
        },
    }
}

fn nodes(model: &Model) -> Nodes {
    model.iter().map(|(path, text)| (path.clone(), node(*text))).collect()
}

#[derive(Debug, Clone)]
enum Edit {
    Write(TreePath, u8),
    MakeDirectory(TreePath),
    Remove(TreePath),
}

fn edit() -> impl Strategy<Value = Edit> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| path(&names.join("/")));
    prop_oneof![
        3 => (path.clone(), 0u8..6).prop_map(|(path, text)| Edit::Write(path, text)),
        1 => path.clone().prop_map(Edit::MakeDirectory),
        2 => path.prop_map(Edit::Remove),
    ]
}

fn remove(model: &mut Model, path: &TreePath) {
    model.retain(|other, _| other != path && !other.is_below(path));
}

fn make_parents(model: &mut Model, path: &TreePath) {
    if let Some(parent) = path.parent() {
        make_parents(model, &parent);
        if model.get(&parent).is_none_or(Option::is_some) {
            model.insert(parent, None);
        }
    }
}

fn apply_edit(model: &mut Model, edit: &Edit) {
    match edit {
        Edit::Remove(path) => remove(model, path),
        Edit::Write(path, text) => {
            remove(model, path);
            make_parents(model, path);
            model.insert(path.clone(), Some(*text));
        }
        Edit::MakeDirectory(path) => {
            if model.get(path).is_none_or(Option::is_some) {
                make_parents(model, path);
                model.insert(path.clone(), None);
            }
        }
    }
}

struct Synced {
    laptop: Model,
    guest: Model,
    aside: Vec<(TreePath, u8)>,
}

/// Carries a plan out as the two ends do: removals from the leaves up, then the rest downwards.
fn carry_out(laptop: &Model, guest: &Model, steps: &BTreeMap<TreePath, Step>) -> Synced {
    let mut out = Synced { laptop: laptop.clone(), guest: guest.clone(), aside: Vec::new() };
    for (path, step) in steps.iter().rev() {
        match step {
            Step::RemoveGuest => take_away(&mut out.guest, path),
            Step::RemoveLaptop => take_away(&mut out.laptop, path),
            Step::Conflict => {
                if let Some(Some(text)) = guest.get(path) {
                    out.aside.push((path.clone(), *text));
                }
                if !guest.get(path).is_some_and(Option::is_none)
                    || !laptop.get(path).is_some_and(Option::is_none)
                {
                    take_away(&mut out.guest, path);
                }
            }
            Step::ToGuest(_)
                if guest.get(path).is_some_and(Option::is_none) != laptop[path].is_none() =>
            {
                take_away(&mut out.guest, path);
            }
            Step::ToLaptop(_)
                if laptop.get(path).is_some_and(Option::is_none) != guest[path].is_none() =>
            {
                take_away(&mut out.laptop, path);
            }
            _ => {}
        }
    }
    for (path, step) in steps {
        match step {
            Step::ToGuest(_) => put(&mut out.guest, path, laptop[path]),
            Step::ToLaptop(_) => put(&mut out.laptop, path, guest[path]),
            Step::Conflict if laptop.contains_key(path) => put(&mut out.guest, path, laptop[path]),
            Step::Compare => panic!("everything is known here"),
            _ => {}
        }
    }
    out
}

fn take_away(model: &mut Model, path: &TreePath) {
    assert!(!model.keys().any(|other| other.is_below(path)), "{path} is not empty");
    model.remove(path);
}

fn put(model: &mut Model, path: &TreePath, text: Option<u8>) {
    if let Some(parent) = path.parent() {
        assert_eq!(model.get(&parent), Some(&None), "{path} has a directory to be in");
    }
    model.insert(path.clone(), text);
}

fn files(model: &Model) -> BTreeSet<(TreePath, u8)> {
    model.iter().filter_map(|(path, text)| text.map(|text| (path.clone(), text))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn both_sides_come_to_agree_and_no_edit_is_lost(
        first in prop::collection::vec(edit(), 0..12),
        on_laptop in prop::collection::vec(edit(), 0..8),
        on_guest in prop::collection::vec(edit(), 0..8),
    ) {
        let mut base = Model::new();
        first.iter().for_each(|edit| apply_edit(&mut base, edit));
        let (mut laptop, mut guest) = (base.clone(), base.clone());
        on_laptop.iter().for_each(|edit| apply_edit(&mut laptop, edit));
        on_guest.iter().for_each(|edit| apply_edit(&mut guest, edit));

        let steps = reconcile(&nodes(&base), &nodes(&laptop), &nodes(&guest), false);
        let synced = carry_out(&laptop, &guest, &steps);

        prop_assert_eq!(&synced.laptop, &synced.guest, "both sides agree");
        let (was, kept) = (files(&base), files(&synced.laptop));
        for edit in files(&laptop).difference(&was) {
            prop_assert!(kept.contains(edit), "the laptop's {edit:?} stays in place");
        }
        for edit in files(&guest).difference(&was) {
            prop_assert!(kept.contains(edit) || synced.aside.contains(edit), "{edit:?} is kept");
        }
        for file in &was {
            if files(&laptop).contains(file) && files(&guest).contains(file) {
                prop_assert!(kept.contains(file) || synced.aside.contains(file), "{file:?} was touched by nobody");
            }
        }
        let rest = reconcile(&nodes(&synced.laptop), &nodes(&synced.laptop), &nodes(&synced.guest), false);
        prop_assert!(rest.values().all(|step| *step == Step::Adopt), "it comes to rest");
    }
}

#[test]
fn a_mass_deletion_by_the_guest_is_held_and_one_by_the_laptop_is_not() {
    let full: Model = (0..200).map(|n| (path(&format!("f{n}")), Some(1))).collect();
    let few: Model = full.clone().into_iter().take(90).collect();
    let by_guest = reconcile(&nodes(&full), &nodes(&full), &nodes(&few), false);
    let held = by_guest.values().filter(|step| **step == Step::Held(Held::MassDeletion)).count();
    assert_eq!(held, 110);
    let by_laptop = reconcile(&nodes(&full), &nodes(&few), &nodes(&full), false);
    assert_eq!(by_laptop.values().filter(|step| **step == Step::RemoveGuest).count(), 110);
}

fn one(path_text: &str, base: Option<Node>, laptop: Option<Node>, guest: Option<Node>) -> Step {
    let tree = |node: Option<Node>| node.into_iter().map(|node| (path(path_text), node)).collect();
    reconcile(&tree(base), &tree(laptop), &tree(guest), false)[&path(path_text)]
}

#[test]
fn what_is_guarded_moves_up_but_never_down() {
    let (a, b) = (node(Some(1)), node(Some(2)));
    let hook = ".git/hooks/pre-commit";
    assert_eq!(one(hook, None, None, Some(a.clone())), Step::Held(Held::Git));
    assert_eq!(one(hook, Some(a.clone()), Some(a.clone()), None), Step::Held(Held::Git));
    assert_eq!(one(hook, Some(a.clone()), Some(b.clone()), Some(a.clone())), Step::ToGuest(0o644));
    assert_eq!(one(hook, None, Some(a.clone()), Some(b.clone())), Step::Held(Held::Git));
    assert_eq!(one(".git", None, None, Some(a.clone())), Step::Held(Held::Git), "a gitdir file");
    assert_eq!(one("x/HEAD", None, None, Some(a.clone())), Step::Held(Held::Git));
    assert_eq!(
        one("x/HEAD", Some(a.clone()), Some(a.clone()), Some(b.clone())),
        Step::ToLaptop(0o644)
    );
    let link = |target: &str| Node { what: What::Symlink(target.into()), mode: 0 };
    assert_eq!(one("l", None, None, Some(link("/etc"))), Step::Held(Held::Symlink));
    assert_eq!(one("l", None, None, Some(link("a/b"))), Step::ToLaptop(0));
    assert_eq!(one("l", None, Some(link("/etc")), None), Step::ToGuest(0), "data on the way up");
    assert_eq!(
        one(".git/index", Some(a.clone()), Some(a.clone()), Some(b.clone())),
        Step::Held(Held::UpOnly)
    );
    assert_eq!(
        one(".git/index", Some(a), Some(b.clone()), Some(node(Some(3)))),
        Step::ToGuest(0o644)
    );
}

#[test]
fn a_directory_replaced_by_a_held_symlink_keeps_the_laptops_files() {
    let mut laptop = nodes(&[(path("d"), None), (path("d/f"), Some(1))].into());
    let base = laptop.clone();
    let guest: Nodes =
        [(path("d"), Node { what: What::Symlink(b"/etc".to_vec()), mode: 0 })].into();
    let steps = reconcile(&base, &laptop, &guest, false);
    assert!(steps.values().all(|step| *step == Step::Held(Held::Symlink)), "{steps:?}");
    laptop.insert(path("d/g"), node(Some(2)));
    let steps = reconcile(&base, &laptop, &guest, false);
    assert!(steps.values().all(|step| *step == Step::Held(Held::Symlink)), "{steps:?}");
}
