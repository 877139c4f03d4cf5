//! Makes the steps of single paths fit into trees: a directory stays where something in it stays,
//! and what has no directory to be in is put aside.
//!
//! Pure. The laptop's shape of the tree wins where both cannot be had.

use std::collections::{BTreeMap, BTreeSet};

use super::{Step, Trees};
use crate::decide::{Side, What};
use crate::path::TreePath;

/// Keeps directories that are to be removed or replaced but in which something survives.
pub(super) fn keep_needed_directories(trees: &Trees<'_>, steps: &mut BTreeMap<TreePath, Step>) {
    let mut needed: BTreeSet<TreePath> = BTreeSet::new();
    for (path, step) in steps.iter_mut().rev() {
        if needed.contains(path) {
            *step = keep(trees, path, *step);
        }
        if survives(trees, path, *step)
            && let Some(parent) = path.parent()
        {
            needed.insert(parent);
        }
    }
}

/// What becomes of a directory that is needed.
fn keep(trees: &Trees<'_>, path: &TreePath, step: Step) -> Step {
    let mode = |side| trees.node(side, path).map_or(0o755, |node| node.mode);
    match step {
        Step::RemoveGuest if trees.is_directory(Side::Guest, path) => {
            Step::ToLaptop(mode(Side::Guest))
        }
        Step::RemoveLaptop if trees.is_directory(Side::Laptop, path) => {
            Step::ToGuest(mode(Side::Laptop))
        }
        Step::ToLaptop(_)
            if trees.is_directory(Side::Laptop, path) && !trees.is_directory(Side::Guest, path) =>
        {
            Step::Conflict
        }
        other => other,
    }
}

/// Whether something will be at the path that needs its directory.
fn survives(trees: &Trees<'_>, path: &TreePath, step: Step) -> bool {
    match step {
        Step::Forget | Step::RemoveGuest | Step::RemoveLaptop => false,
        Step::Adopt
        | Step::ToGuest(_)
        | Step::ToLaptop(_)
        | Step::Mode(_)
        | Step::Compare
        | Step::Conflict => true,
        Step::Held(_) => trees.laptop.contains_key(path) || trees.guest.contains_key(path),
    }
}

/// Goes down the tree and finds a place for everything.
pub(super) fn find_places(trees: &Trees<'_>, steps: &mut BTreeMap<TreePath, Step>) {
    // The nearest path above that rules what is below it.
    let mut ruler: Option<(TreePath, Rule)> = None;
    for (path, step) in steps.iter_mut() {
        if ruler.as_ref().is_some_and(|(above, _)| !path.is_below(above)) {
            ruler = None;
        }
        match &ruler {
            Some((_, rule)) => *step = rule.apply(trees, path, *step),
            None => ruler = Rule::of(trees, path, *step).map(|rule| (path.clone(), rule)),
        }
    }
}

/// What holds for everything below a path.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// The laptop's version is no directory, and stays: the guest's things have no place.
    NoPlace,
    /// The laptop's directory stays although the guest replaced it.
    LaptopStays,
    /// The guest's stand-in for a directory, or the reverse, is held: all below is as well.
    AllHeld(crate::guard::Held),
}

impl Rule {
    fn of(trees: &Trees<'_>, path: &TreePath, step: Step) -> Option<Self> {
        let laptop = trees.is_directory(Side::Laptop, path);
        let guest = trees.is_directory(Side::Guest, path);
        let laptop_other = !laptop && trees.laptop.contains_key(path);
        match step {
            Step::ToGuest(_) | Step::Conflict if guest && laptop_other => Some(Self::NoPlace),
            Step::Conflict if laptop && !guest => Some(Self::LaptopStays),
            Step::Held(held) if laptop != guest && trees.guest.contains_key(path) => {
                Some(Self::AllHeld(held))
            }
            _ => None,
        }
    }

    fn apply(self, trees: &Trees<'_>, path: &TreePath, step: Step) -> Step {
        match self {
            Self::NoPlace => match step {
                Step::ToLaptop(_) | Step::Conflict | Step::Held(_) | Step::Compare
                    if trees.guest.contains_key(path) =>
                {
                    let directory = trees.guest[path].what == What::Directory;
                    if directory { Step::RemoveGuest } else { Step::Conflict }
                }
                other => other,
            },
            Self::LaptopStays => match trees.laptop.get(path) {
                Some(node) => Step::ToGuest(node.mode),
                None => step,
            },
            Self::AllHeld(held) => Step::Held(held),
        }
    }
}
